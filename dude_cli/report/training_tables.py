"""Trainings as tables: convergence, stability, how far the layers moved, cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from dude_cli.evaluation.statistics import Summary, summarize
from dude_cli.report import numbers
from dude_cli.report.collect import Run
from dude_cli.report.content import (
    RUNS,
    SETTING,
    Column,
    Table,
    count,
    mean,
    mean_and_sd,
    number,
    percent,
    seconds,
    size,
    text_column,
)
from dude_cli.report.settings import Setting


def convergence_table(settings: Sequence[Setting], losses: Sequence[float], by_evaluation: bool) -> Table:
    rows = []
    for loss in losses:
        for setting in settings:
            found = [numbers.first_reaching(run, loss, by_evaluation) for run in setting.runs]
            reached = [one for one in found if one is not None]
            rows.append(
                {
                    "loss": loss,
                    "setting": setting.label,
                    "reached": len(reached),
                    "runs": len(found),
                    "steps": summarize([float(one.step) for one in reached]),
                    "tokens": summarize([float(one.tokens) for one in reached if one.tokens is not None]),
                }
            )
    curve = "evaluation loss" if by_evaluation else "running mean of the training loss over a twentieth of the log"
    return Table(
        "convergence",
        "Steps and tokens to a loss",
        [
            Column("loss", "loss, nats/token", number()),
            SETTING,
            Column("reached", "runs that reached it", count),
            RUNS,
            Column("steps", "steps", mean_and_sd(count)),
            Column("tokens", "tokens", mean_and_sd(count)),
        ],
        rows,
        f"The first logged step with that {curve} or less; between two of them is not interpolated. Tokens are "
        "those of all rows until then, prompts included, padding not.",
        group_by="loss",
    )


def stability_table(settings: Sequence[Setting]) -> Table:
    rows = []
    for setting in settings:
        losses, norms = ([run.series(key)[1] for run in setting.runs] for key in ("loss", "grad_norm"))
        rows.append(
            {
                "setting": setting.label,
                "runs": len(setting.runs),
                "eval_loss_sd": _sd(setting.summary(lambda run: run.eval_loss)),
                "loss_sd": _sd(setting.summary(last_smoothed_loss)),
                "norm": summarize([statistics.median(values) for values in norms if values]),
                "norm_max": max((max(values) for values in norms if values), default=None),
                "loss_spikes": sum(map(numbers.spikes, losses)),
                "norm_spikes": sum(map(numbers.spikes, norms)),
                "skipped": sum(1 for run in setting.runs for line in run.steps if line.get("skipped")),
            }
        )
    return Table(
        "stability",
        "Spread and spikes",
        [
            SETTING,
            RUNS,
            Column("eval_loss_sd", "sd of the evaluation loss", number(3)),
            Column("loss_sd", "sd of the last training loss", number(3)),
            Column("norm", "median gradient norm", mean_and_sd(number(3))),
            Column("norm_max", "largest gradient norm", number(3)),
            Column("loss_spikes", "loss spikes", count),
            Column("norm_spikes", "gradient spikes", count),
            Column("skipped", "skipped steps", count),
        ],
        rows,
        "Spreads are over the runs of a setting, of the training loss that of its running mean. A spike is a "
        f"logged step more than {numbers.SPIKE_DEVIATIONS:g} standard deviations above the mean of the "
        f"{numbers.SPIKE_WINDOW} before; the counts are of all runs together. The gradient norm is the one before "
        "clipping. Skipped are steps that float16 made overflow.",
    )


_LAYER_MEANS = (
    "energy_captured",
    "relative_change",
    "relative_magnitude_change",
    "magnitude_change",
    "direction_change",
    "mean_gain_change",
)


def layers_table(settings: Sequence[Setting], by_kind: bool) -> Table:
    """How far the layers have moved, over all of them or for each kind, such as q_proj."""
    rows = []
    for setting in settings:
        layers = [layer for run in setting.runs for layer in numbers.layers_of(run)]
        kinds = dict.fromkeys(numbers.layer_kind(layer["name"]) for layer in layers) if by_kind else {"all": None}
        for kind in kinds:
            members = [layer for layer in layers if not by_kind or numbers.layer_kind(layer["name"]) == kind]
            if members:
                means = {key: numbers.layer_mean(members, key) for key in _LAYER_MEANS}
                gains = [(layer["lowest_gain"], layer["highest_gain"]) for layer in members]
                rows.append(
                    {
                        "setting": setting.label,
                        "kind": kind,
                        "layers": len(members) // len([run for run in setting.runs if run.layers is not None]),
                        "lowest_gain": min(low for low, _ in gains),
                        "highest_gain": max(high for _, high in gains),
                        "correlation": None if by_kind else setting.summary(numbers.layer_correlation),
                    }
                    | means
                )
    return Table(
        "layer_kinds" if by_kind else "layers",
        "By kind of layer" if by_kind else "How far the layers moved",
        [
            SETTING,
            *([text_column("kind", "kind")] if by_kind else []),
            Column("layers", "layers", count),
            Column("energy_captured", "energy captured", percent(1)),
            Column("relative_change", "‖W' - W₀‖ / ‖W₀‖", percent()),
            Column("relative_magnitude_change", "ΔM / mean ‖W₀ᵢ‖", percent()),
            Column("direction_change", "ΔD", number(3)),
            Column("mean_gain_change", "mean |g - 1|", percent()),
            Column("lowest_gain", "least g", number(4)),
            Column("highest_gain", "greatest g", number(4)),
            *([] if by_kind else [Column("correlation", "correlation of ΔD and ΔM", mean_and_sd(number(2)))]),
        ],
        rows,
        "Means over the layers, and over the runs of a setting. ΔM is the mean over the output rows of | ‖W'ᵢ‖ - "
        "‖W₀ᵢ‖ |, ΔD that of 1 - cos(W'ᵢ, W₀ᵢ) (DoRA, arXiv 2402.09353, section 3.2); g = m / ‖V‖ is what the "
        "magnitude does beyond the change of direction, 1 without a magnitude. Energy captured is the share of "
        "‖W₀‖² in the initial factors.",
        is_folded=by_kind and len(rows) > 12,
    )


def cost_table(settings: Sequence[Setting]) -> Table:
    rows = []
    for setting in settings:
        rows.append(
            {
                "setting": setting.label,
                "runs": len(setting.runs),
                "parameters": setting.summary(trainable_parameters),
                "share": setting.summary(_trainable_share),
                "steps": setting.summary(lambda run: float(run.steps[-1]["step"]) if run.steps else None),
                "elapsed_s": setting.summary(lambda run: run.last("elapsed_s")),
                "speed": setting.summary(lambda run: numbers.median_after_first(run.series("tokens_per_s")[1])),
                "first_step_s": setting.summary(lambda run: run.last("first_step_s")),
                "memory": setting.summary(peak_memory),
                "predicted": setting.summary(lambda run: (run.memory or {}).get("predicted_training_bytes")),
                "device": ", ".join(dict.fromkeys(_device(run) for run in setting.runs)),
            }
        )
    return Table(
        "cost",
        "Cost",
        [
            SETTING,
            RUNS,
            Column("parameters", "trainable", mean(count)),
            Column("share", "of all", mean(percent())),
            Column("steps", "steps", mean(count)),
            Column("elapsed_s", "time of the steps", mean_and_sd(seconds)),
            Column("speed", "tokens/s, median", mean_and_sd(count)),
            Column("first_step_s", "start to first step", mean(seconds)),
            Column("memory", "peak memory", mean_and_sd(size)),
            Column("predicted", "predicted", mean(size)),
            text_column("device", "device"),
        ],
        rows,
        "Evaluations during the training count in the time. Times of runs compare only if they had the machine alone.",
    )


def last_smoothed_loss(run: Run) -> float | None:
    losses = run.series("loss")[1]
    return numbers.running_mean(losses, numbers.smoothing_window(len(losses)))[-1] if losses else None


def trainable_parameters(run: Run) -> float | None:
    return None if run.layers is None else float(run.layers["trainable_parameters"])


def peak_memory(run: Run) -> float | None:
    return None if run.memory is None else float(run.memory["measured_training_bytes"])


def _sd(summary: Summary | None) -> float | None:
    return None if summary is None else summary.sd


def _trainable_share(run: Run) -> float | None:
    return None if run.layers is None else run.layers["trainable_parameters"] / run.layers["all_parameters"]


def _device(run: Run) -> str:
    gpus = run.environment.get("gpus") or []
    return f"{run.environment.get('world_size', 1)} x {gpus[0] if gpus else run.environment.get('device', 'unknown')}"
