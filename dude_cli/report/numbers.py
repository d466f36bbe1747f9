"""What the report computes from the logs: smoothed curves, when a loss was reached, spikes, layers by depth."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dude_cli.report.collect import Run

# A spike is more than so many standard deviations above the mean of so many logged steps before it.
SPIKE_DEVIATIONS = 4.0
SPIKE_WINDOW = 20
# With fewer evaluations than these, a loss is looked up on the smoothed training loss.
LEAST_EVALUATIONS = 4


@dataclass(frozen=True)
class Reached:
    """The first logged step at which a loss was reached, and the tokens of all rows until then, if they are known."""

    step: int
    tokens: int | None


def smoothing_window(length: int) -> int:
    """How many logged steps a running mean is over: a twentieth of them."""
    return max(1, length // 20)


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means


def uses_evaluations(runs: Sequence[Run]) -> bool:
    """Whether all runs were evaluated often enough to say when a loss was reached."""
    return all(len(run.evaluations) >= LEAST_EVALUATIONS for run in runs)


def loss_curve(run: Run, by_evaluation: bool) -> tuple[list[int], list[float]]:
    """The curve on which a loss is looked up: the evaluation loss, or the running mean of the training loss."""
    steps, losses = run.series("eval_loss" if by_evaluation else "loss")
    return steps, losses if by_evaluation else running_mean(losses, smoothing_window(len(losses)))


def common_losses(runs: Sequence[Run], by_evaluation: bool) -> list[float]:
    """Two losses that every run reaches: the lowest such, and halfway there from the first value; [] without curves."""
    curves = [loss_curve(run, by_evaluation)[1] for run in runs]
    if not curves or not all(curves):
        return []
    lowest = max(min(curve) for curve in curves)
    highest = statistics.fmean(curve[0] for curve in curves)
    return [(lowest + highest) / 2, lowest] if highest > lowest else [lowest]


def first_reaching(run: Run, loss: float, by_evaluation: bool) -> Reached | None:
    """When the run was first at `loss` or below; None if it never was."""
    steps, losses = loss_curve(run, by_evaluation)
    step = next((step for step, value in zip(steps, losses, strict=True) if value <= loss), None)
    return None if step is None else Reached(step, run.tokens_at(step))


def spikes(values: Sequence[float]) -> int:
    """How many values are more than SPIKE_DEVIATIONS above the SPIKE_WINDOW before: a spike's own tail counts too."""
    found = 0
    for index in range(SPIKE_WINDOW, len(values)):
        before = values[index - SPIKE_WINDOW : index]
        found += values[index] > statistics.fmean(before) + SPIKE_DEVIATIONS * statistics.stdev(before)
    return found


def median_after_first(values: Sequence[float]) -> float | None:
    """The median without the first, which warms up; of one value that."""
    return statistics.median(values[1:] or values) if values else None


def layers_of(run: Run) -> list[Mapping[str, Any]]:
    return list(run.layers["layers"]) if run.layers is not None else []


def layer_kind(name: str) -> str:
    return name.rpartition(".")[2]


def layer_depth(name: str) -> int | None:
    """The number of the block that a layer is in: the first number in its name."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return None if found is None else int(found.group(1))


def layer_mean(layers: Sequence[Mapping[str, Any]], key: str) -> float | None:
    """The plain mean over layers of a measure; None if no layer has it."""
    values = [layer[key] for layer in layers if layer.get(key) is not None]
    return statistics.fmean(values) if values else None


def by_depth(runs: Sequence[Run], key: str) -> tuple[list[int], list[float]]:
    """The mean of a measure over the layers of each block, and over runs."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for layer in layers_of(run):
            depth = layer_depth(layer["name"])
            if depth is not None and layer.get(key) is not None:
                values.setdefault(depth, []).append(layer[key])
    return sorted(values), [statistics.fmean(values[depth]) for depth in sorted(values)]


def layer_correlation(run: Run) -> float | None:
    """Pearson's correlation of delta D and delta M over the layers, as DoRA's figure 2 discusses; None if undefined."""
    layers = layers_of(run)
    turned = [layer["direction_change"] for layer in layers]
    grown = [layer["relative_magnitude_change"] for layer in layers]
    if len(set(turned)) < 2 or len(set(grown)) < 2:
        return None
    return statistics.correlation(turned, grown)
