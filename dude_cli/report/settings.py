"""Runs that differ in nothing but their seed are one setting: its name, its mean and spread, its colour."""

from __future__ import annotations

import colorsys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dude_cli.evaluation.statistics import Summary, summarize
from dude_cli.report.collect import Run
from dude_cli.report.content import Style, short_rate, shortened
from dude_cli.training.resume import FREE_SETTINGS

METHODS = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA", "dude": "DuDe"}
_METHOD_COLORS = {"lora": "#c07a10", "dora": "#189a70", "pissa": "#3b82f6", "dude": "#d6455d"}
_DASHED = ("dora", "dude")  # LoRA and DoRA, PiSSA and DuDe often lie on each other
# Okabe and Ito's colours, which can be told apart with any colour vision, darkened where they are pale.
_COLORS = ("#0d7fc4", "#d55e00", "#0a9a72", "#c766a0", "#b88700", "#3a9fd6", "#7a6ff0", "#7d8590")
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2))
# Keys whose change goes with another one's, or that have short names in a label.
_SHORT = {"train.learning_rate": "lr", "adapter.rank": "rank", "adapter.alpha": "alpha", "model.name_or_path": "model"}


@dataclass(frozen=True)
class Setting:
    """Runs of one setting. `values` has what it does not share with all others, by dotted key of the config.

    `parts` has how its label says them, without those that are not set.
    """

    values: Mapping[str, Any]
    parts: Mapping[str, str]
    runs: Sequence[Run]
    style: Style

    @property
    def label(self) -> str:
        return setting_label(self.method, self.parts)

    @property
    def method(self) -> str:
        return str(self.runs[0].config.adapter.method)

    def summary(self, value: Callable[[Run], float | None]) -> Summary | None:
        """Mean and standard deviation over the runs that have the value."""
        values = [value(run) for run in self.runs]
        return summarize([known for known in values if known is not None])


def group_runs(runs: Sequence[Run]) -> list[Setting]:
    """The settings of `runs`: by method, then by what else differs; within each the runs by their seed."""
    flat = [flat_config(run) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)  # a run may have some that another has not
    varying = [key for key in keys if len({repr(values.get(key)) for values in flat}) > 1]
    if all(values["adapter.alpha"] == values["adapter.rank"] for values in flat):
        varying = [key for key in varying if key != "adapter.alpha"]  # the default: it goes with the rank
    order = list(METHODS)
    groups: dict[str, list[tuple[dict[str, Any], Run]]] = {}
    for values, run in zip(flat, runs, strict=True):
        own = {key: values.get(key) for key in varying}
        groups.setdefault(repr(own), []).append((own, run))
    ordered = sorted(
        groups.values(),
        key=lambda members: (
            order.index(members[0][1].config.adapter.method),
            [_sortable(value) for value in members[0][0].values()],
        ),
    )
    styles = _styles([members[0][1].config.adapter.method for members in ordered])
    parts = _label_parts([members[0][0] for members in ordered])
    return [
        Setting(
            values=members[0][0],
            parts=own_parts,
            runs=sorted((run for _, run in members), key=lambda run: (run.seed, run.folder)),
            style=style,
        )
        for members, own_parts, style in zip(ordered, parts, styles, strict=True)
    ]


def setting_label(method: str, parts: Mapping[str, str], *, without: str | None = None) -> str:
    """`DuDe, lr 3e-4, rank 8`: the method, and what else is this setting's own; `without` one key."""
    return ", ".join([METHODS[method], *(part for key, part in parts.items() if key != without)])


def _label_parts(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """How the label of each setting says its values, by key; settings that differ in a value differ in its part."""
    parts: list[dict[str, str]] = [{} for _ in settings]
    for key in settings[0]:
        if key == "adapter.method":
            continue
        name = _SHORT.get(key, key.partition(".")[2])
        shown = _shown_values(key, {repr(values[key]): values[key] for values in settings})
        for values, own in zip(settings, parts, strict=True):
            text = shown[repr(values[key])]
            if text is not None:
                own[key] = f"{name} {text}"
    return parts


def _shown_values(key: str, values: Mapping[str, Any]) -> dict[str, str | None]:
    """Different values of a key as labels say them; None for what is not set, which goes without saying.

    Those that are equal when they are shortened are numbered.
    """
    texts = {name: shortened(str(_in_label(key, value))) for name, value in values.items()}
    times, seen = Counter(texts.values()), Counter[str]()
    shown: dict[str, str | None] = {}
    for name, text in texts.items():
        seen[text] += 1
        shown[name] = text if times[text] == 1 else f"{text} ({seen[text]})"
    unset = [name for name, value in values.items() if value in (None, [], "")]
    if len(unset) == 1:  # of several no label could leave out its own
        shown[unset[0]] = None
    return shown


def _in_label(key: str, value: Any) -> Any:
    if key == "train.learning_rate":
        return short_rate(value)
    if isinstance(value, float):
        return f"{value:g}"
    return shown_sources(value) if is_sources(key, value) else value


def is_sources(key: str, value: Any) -> bool:
    """Whether a config's value is a list of data sets."""
    return key in ("data.train", "data.validation") and isinstance(value, list)


def shown_sources(sources: Sequence[Mapping[str, Any]]) -> str:
    """Data sets by their names, each with its split where that is another one than the usual."""
    return ", ".join(
        source["path"] if source.get("split") in (None, "train") else f"{source['path']} {source['split']}"
        for source in sources
    )


def flat_config(run: Run) -> dict[str, Any]:
    """What a run's result depends on but its seed, by dotted key."""
    flat: dict[str, Any] = {}
    for section in ("model", "adapter", "data", "train"):
        for key, value in getattr(run.config, section).model_dump(mode="json").items():
            if isinstance(value, dict):
                flat |= {f"{section}.{key}.{inner}": item for inner, item in value.items()}
            elif key not in FREE_SETTINGS:
                flat[f"{section}.{key}"] = value
    flat["adapter.alpha"] = float(flat["adapter.alpha"] or flat["adapter.rank"])  # the default is the rank
    return flat


def repeated_seeds(setting: Setting) -> list[int]:
    """Seeds that more than one run of a setting has: these are not independent."""
    return [seed for seed, times in Counter(run.seed for run in setting.runs).items() if times > 1]


def method_style(method: str) -> Style:
    """How a method is drawn where its settings are one line."""
    return Style(_METHOD_COLORS[method], _DASHES[int(method in _DASHED)])


def _styles(methods: Sequence[str]) -> list[Style]:
    """A colour for each method, and of several settings of one method shades and dashes; else a colour for each."""
    if len(set(methods)) == 1:
        return [
            Style(_COLORS[index % len(_COLORS)], _DASHES[index // len(_COLORS) % len(_DASHES)])
            for index in range(len(methods))
        ]
    sizes, seen = Counter(methods), Counter[str]()
    styles = []
    for method in methods:
        place, size = seen[method], sizes[method]
        seen[method] += 1
        dash = _DASHES[int(method in _DASHED) if size == 1 else place % len(_DASHES)]
        shade = 0.0 if size == 1 else 0.11 * (2 * place / (size - 1) - 1)
        styles.append(Style(_shaded(_METHOD_COLORS[method], shade), dash))
    return styles


def _shaded(color: str, change: float) -> str:
    red, green, blue = (int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    shaded = colorsys.hls_to_rgb(hue, min(0.8, max(0.2, lightness + change)), saturation)
    return "#" + "".join(f"{round(255 * part):02x}" for part in shaded)


def _sortable(value: Any) -> tuple[int, float, str]:
    is_number = isinstance(value, (int, float))
    return (0, float(value), "") if is_number else (1, 0.0, repr(value))
