"""The charts of a report: which curves, over what, with what units."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

from dude_cli.evaluation.results import is_share
from dude_cli.evaluation.statistics import Summary, summarize
from dude_cli.report import numbers
from dude_cli.report.collect import Run
from dude_cli.report.content import Chart, Style
from dude_cli.report.figures import Line, Row, dot_chart, line_chart, scatter_chart
from dude_cli.report.score_tables import ScoreKey, all_scores, first_names, score_of
from dude_cli.report.settings import Setting, method_style, setting_label

# A rank or a rate against a score: the key of the config, the axis.
SWEEPS = {"train.learning_rate": "learning rate", "adapter.rank": "rank"}
_LAYER_CHARTS = {
    "direction_change": ("turn", "Direction", "ΔD, mean of 1 - cos"),
    "relative_magnitude_change": ("magnitude", "Magnitude", "ΔM / mean ‖W₀ᵢ‖"),
    "mean_gain_change": ("gain", "Gain", "mean |g - 1|"),
    "energy_captured": ("energy", "Energy captured", "share of ‖W₀‖²"),
}


def legend(settings: Sequence[Setting]) -> dict[str, Style]:
    return {setting.label: setting.style for setting in settings}


def training_charts(settings: Sequence[Setting]) -> list[Chart]:
    """Loss, evaluation loss, gradient norm, learning rate and speed, all runs over each other."""
    charts = [
        _curves(settings, "loss", "Training loss", "loss, nats per token", is_noisy=True),
        _curves(settings, "eval_loss", "Evaluation loss", "loss, nats per token"),
        _curves(settings, "grad_norm", "Gradient norm, before clipping", "L2 norm", is_noisy=True, log_y=True),
        _curves(settings, "learning_rate", "Learning rate", "learning rate"),
        _curves(settings, "tokens_per_s", "Speed", "tokens per second", is_noisy=True),
    ]
    return [chart for chart in charts if chart is not None]


def score_charts(settings: Sequence[Setting]) -> list[Chart]:
    """Each task's first score: a dot for each run, and the base as a dashed line."""
    charts = []
    for index, (key, name) in enumerate(first_names(settings).items()):
        factor, unit = _unit(key[2])
        rows = []
        for setting in settings:
            values = [score.value * factor for run in setting.runs if (score := score_of(run, key)) is not None]
            if values:
                rows.append(Row(setting.label, values, summarize(values), setting.style))
        base = _base(settings, key)
        draw = partial(dot_chart, f"score{index}", rows, x_label=unit, level=None if base is None else base * factor)
        charts.append(Chart(f"score{index}", name, draw, f"{name}: a dot for each run, by setting"))
    return charts


def sweep_charts(settings: Sequence[Setting], key: str) -> tuple[list[Chart], dict[str, Style]]:
    """The evaluation loss and each task's first score over a learning rate or a rank; [] if it is the same for all."""
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        groups.setdefault(setting_label(setting.method, setting.parts, without=key), []).append(setting)
    if all(len(members) < 2 for members in groups.values()):
        return [], {}
    is_by_method = len({members[0].method for members in groups.values()}) == len(groups)
    styles = {
        label: method_style(members[0].method) if is_by_method else Style(members[0].style.color)
        for label, members in groups.items()
    }
    measures: dict[str, tuple[str, Callable[[Run], float | None], float | None]] = {
        "Evaluation loss": ("loss, nats per token", lambda run: run.eval_loss, None)
    }
    for score_key, name in first_names(settings).items():
        factor, unit = _unit(score_key[2])
        base = _base(settings, score_key)
        measures[name] = unit, _scaled_score(score_key, factor), None if base is None else base * factor
    axis = SWEEPS[key]
    ticks = sorted({float(setting.values[key]) for setting in settings})
    charts = []
    for index, (title, (unit, value, base)) in enumerate(measures.items()):
        lines = []
        for label, members in groups.items():
            points = [(float(member.values[key]), member.summary(value)) for member in members]
            known = sorted(((at, summary) for at, summary in points if summary is not None), key=lambda point: point[0])
            lines += _sweep_lines(known, members, key, value, styles[label])
        if any(line.y for line in lines):
            name = f"{axis.replace(' ', '-')}{index}"
            draw = partial(line_chart, name, lines, x_label=axis, y_label=unit, log_x=True, x_ticks=ticks, level=base)
            charts.append(Chart(name, title, draw, f"{title} over the {axis}, a line for each of {', '.join(groups)}"))
    return charts, styles


def layer_charts(settings: Sequence[Setting]) -> list[Chart]:
    """Each measure by depth in the model, and the turn of each layer against its growth."""
    charts = []
    for key, (name, title, unit) in _LAYER_CHARTS.items():
        lines = [Line(*numbers.by_depth(setting.runs, key), setting.style, marker=True) for setting in settings]
        lines = [line for line in lines if len(line.x) > 0 and any(line.y)]
        if lines:
            draw = partial(line_chart, f"layers-{name}", lines, x_label="block of the model", y_label=unit)
            charts.append(Chart(f"layers-{name}", title, draw, f"{unit} by depth, a line for each setting"))
    clouds = []
    for setting in settings:
        layers = [layer for run in setting.runs for layer in numbers.layers_of(run)]
        turned, grown = ([layer[key] for layer in layers] for key in ("direction_change", "relative_magnitude_change"))
        if layers:
            clouds.append(Line(turned, grown, setting.style))
    if clouds:
        draw = partial(scatter_chart, "layers-both", clouds, x_label="ΔD, mean of 1 - cos", y_label="ΔM / mean ‖W₀ᵢ‖")
        alt = "a point for each layer of each run: change of magnitude over change of direction"
        charts.append(Chart("layers-both", "Magnitude against direction", draw, alt))
    return charts


def _curves(
    settings: Sequence[Setting], key: str, title: str, unit: str, *, is_noisy: bool = False, log_y: bool = False
) -> Chart | None:
    """A thin line for each run, a thick one for the mean of a setting; of noisy values the running means, over faint
    raw ones.
    """
    lines: list[Line] = []
    for setting in settings:
        curves = []
        for run in setting.runs:
            steps, values = run.series(key)
            if not steps:
                continue
            if is_noisy:
                lines.append(Line(steps, values, setting.style, "faint"))
                values = numbers.running_mean(values, numbers.smoothing_window(len(values)))
            curves.append((steps, values))
        if len(curves) > 1 and len({tuple(steps) for steps, _ in curves}) == 1:
            mean = [statistics.fmean(values) for values in zip(*(values for _, values in curves), strict=True)]
            lines += [Line(steps, values, setting.style, "thin") for steps, values in curves]
            lines.append(Line(curves[0][0], mean, setting.style))
        else:  # runs that were logged at other steps have no mean
            lines += [Line(steps, values, setting.style) for steps, values in curves]
    if not lines:
        return None
    # What matters on top.
    lines.sort(key=lambda line: ("faint", "thin", "thick").index(line.weight))
    name = key.replace("_", "-")
    draw = partial(line_chart, name, lines, x_label="optimizer step", y_label=unit, log_y=log_y)
    return Chart(name, title, draw, f"{title} over the optimizer steps, all runs over each other")


def _sweep_lines(
    points: Sequence[tuple[float, Summary]],
    members: Sequence[Setting],
    key: str,
    value: Callable[[Run], float | None],
    style: Style,
) -> list[Line]:
    """The means with their deviations, and a faint dot for each run."""
    dots = [
        Line([float(member.values[key])], [found], style, "thin")
        for member in members
        for run in member.runs
        if (found := value(run)) is not None and len(member.runs) > 1
    ]
    xs, means, sds = [at for at, _ in points], [s.mean for _, s in points], [s.sd for _, s in points]
    return [*dots, Line(xs, means, style, marker=True, spread=sds)]


def _scaled_score(key: ScoreKey, factor: float) -> Callable[[Run], float | None]:
    def value(run: Run) -> float | None:
        score = score_of(run, key)
        return None if score is None else score.value * factor

    return value


def _unit(metric: str) -> tuple[float, str]:
    return (100.0, f"{metric}, %") if is_share(metric) else (1.0, metric)


def _base(settings: Sequence[Setting], key: ScoreKey) -> float | None:
    """The base's score, if all runs say the same."""
    values = {score.base for score in all_scores(settings) if score.key == key and score.base is not None}
    return values.pop() if len(values) == 1 else None
