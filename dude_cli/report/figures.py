"""Static charts as SVG, drawn by matplotlib, that take text and grid colours from the page they are in.

The same data give the same bytes: no date, no random ids. A chart is as wide as a phone, so that it is readable there
and several stand side by side on a desktop.
"""

from __future__ import annotations

import io
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from dude_cli.evaluation.statistics import Summary
from dude_cli.report.content import Style, short_rate, shortened

WIDTH_IN, HEIGHT_IN = 4.7, 3.1
# Labels of rows that are longer are broken into lines, so that the dots have half of the width or more.
_LABEL_WIDTH, _LINE_HEIGHT_IN = 30, 0.15
# An axis's own label is as long as the axis at most.
_AXIS_LABEL_WIDTH = 36
# More points than this are drawn as the least and greatest of each of so many parts, so that no spike is lost.
MOST_POINTS = 600
# Placeholders that `_page_colors` replaces with the page's own.
_INK, _FAINT, _GRID = "#010203", "#040506", "#070809"
_STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and read aloud
    "svg.hashsalt": "dude",
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "text.parse_math": False,  # a $ in a label is a $
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True)
class Line:
    """A curve. `weight` is `faint` for raw values, `thin` for one run of several, `thick` for what is to be seen."""

    x: Sequence[float]
    y: Sequence[float]
    style: Style
    weight: str = "thick"
    marker: bool = False
    spread: Sequence[float | None] = ()  # a standard deviation for each point


@dataclass(frozen=True)
class Row:
    """A line of a dot chart: the values of the runs, their summary, and the base's value."""

    label: str
    values: Sequence[float]
    summary: Summary | None
    style: Style


def line_chart(
    name: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] = (),
    level: float | None = None,
) -> str:
    """Curves over one another; `level` is a dashed horizontal line, such as the base's score."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(HEIGHT_IN)
        if level is not None:
            axes.axhline(level, color=_FAINT, linewidth=1.0, linestyle=(0, (4, 3)))
        for line in lines:
            _draw_line(axes, line)
        axes.set_xlabel(shortened(x_label, _AXIS_LABEL_WIDTH))
        axes.set_ylabel(shortened(y_label, _AXIS_LABEL_WIDTH))
        _scale(axes, "x", log_x, x_ticks)
        _scale(axes, "y", log_y, ())
        return _svg(figure, name)


def dot_chart(name: str, rows: Sequence[Row], *, x_label: str, level: float | None = None) -> str:
    """One row for each setting: a dot for each run, a diamond at their mean with a bar of one standard deviation."""
    with matplotlib.rc_context(_STYLE):
        labels = [textwrap.wrap(row.label, _LABEL_WIDTH) for row in rows]
        lines = max(map(len, labels), default=1)
        figure, axes = _figure(0.75 + max(0.81, (0.12 + _LINE_HEIGHT_IN * lines) * len(rows)))
        if level is not None:
            axes.axvline(level, color=_FAINT, linewidth=1.0, linestyle=(0, (4, 3)))
        for place, row in enumerate(rows):
            alpha = 0.45 if len(row.values) > 1 else 1.0
            axes.plot(row.values, [place] * len(row.values), "o", color=row.style.color, alpha=alpha, markersize=4.5)
            if row.summary is not None and row.summary.n > 1:
                axes.errorbar(
                    row.summary.mean,
                    place,
                    xerr=row.summary.sd,
                    fmt="D",
                    color=row.style.color,
                    elinewidth=1.4,
                    capsize=3.0,
                    markersize=6.0,
                )
        axes.set_yticks(range(len(rows)), ["\n".join(label) for label in labels])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(shortened(x_label, _AXIS_LABEL_WIDTH))
        axes.margins(x=0.08)
        axes.xaxis.set_major_locator(_round_steps())
        return _svg(figure, name)


def scatter_chart(name: str, groups: Sequence[Line], *, x_label: str, y_label: str) -> str:
    """A cloud of points for each setting."""
    markers = "os^Dv"
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(HEIGHT_IN)
        for index, group in enumerate(groups):
            marker = markers[index % len(markers)]
            axes.plot(
                group.x, group.y, marker, color=group.style.color, alpha=0.65, markersize=4.0, markeredgewidth=0.0
            )
        axes.set_xlabel(shortened(x_label, _AXIS_LABEL_WIDTH))
        axes.set_ylabel(shortened(y_label, _AXIS_LABEL_WIDTH))
        for axis in "xy":
            _scale(axes, axis, False, ())
        return _svg(figure, name)


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points that keep the least and the greatest value of each part, in order."""
    if len(x) <= MOST_POINTS:
        return list(x), list(y)
    parts = MOST_POINTS // 2
    kept: set[int] = {0, len(x) - 1}
    for part in range(parts):
        indices = range(part * len(x) // parts, (part + 1) * len(x) // parts)
        kept |= {min(indices, key=lambda index: y[index]), max(indices, key=lambda index: y[index])}
    return [x[index] for index in sorted(kept)], [y[index] for index in sorted(kept)]


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, height))
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _draw_line(axes: Axes, line: Line) -> None:
    width, alpha = {"faint": (0.7, 0.25), "thin": (0.9, 0.5), "thick": (1.8, 1.0)}[line.weight]
    x, y = thinned(line.x, line.y)
    # A single point has no line.
    marker = "o" if line.marker or len(x) == 1 else ""
    dash = (0, line.style.dash) if line.style.dash and line.weight == "thick" else "-"
    axes.plot(x, y, color=line.style.color, linewidth=width, alpha=alpha, linestyle=dash, marker=marker, markersize=3.5)
    spread = line.spread or [None] * len(line.x)
    known = [(at, value, sd) for at, value, sd in zip(line.x, line.y, spread, strict=True) if sd is not None]
    if known:
        at, value, sd = (list(part) for part in zip(*known, strict=True))
        axes.errorbar(at, value, yerr=sd, fmt="none", ecolor=line.style.color, elinewidth=1.1, capsize=2.5)


def _scale(axes: Axes, axis: str, is_log: bool, ticks: Sequence[float]) -> None:
    drawn = axes.xaxis if axis == "x" else axes.yaxis
    if is_log and _has_positive(axes, axis):
        (axes.set_xscale if axis == "x" else axes.set_yscale)("log")
        low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
        if ticks:
            drawn.set_major_locator(FixedLocator(list(ticks)))
            drawn.set_minor_locator(NullLocator())
        elif high / low < 100:  # within two decades the powers of ten alone would be one label or none
            drawn.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        drawn.set_major_formatter(FuncFormatter(_small_tick if low < 0.01 else _tick))
        drawn.set_minor_formatter(NullFormatter())
        return
    if ticks:
        drawn.set_major_locator(FixedLocator(list(ticks)))
    else:
        drawn.set_major_locator(_round_steps(is_integer=_is_integer(axes, axis)))
    low, high = axes.get_xlim() if axis == "x" else axes.get_ylim()
    is_small = max(abs(low), abs(high)) < 0.01
    drawn.set_major_formatter(FuncFormatter(_small_tick if is_small else _tick))


def _round_steps(is_integer: bool = False) -> MaxNLocator:
    return MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=is_integer)


def _is_integer(axes: Axes, axis: str) -> bool:
    return all(float(value).is_integer() for value in _drawn_values(axes, axis))


def _has_positive(axes: Axes, axis: str) -> bool:
    """Without any, such as gradients of zero, there is nothing for a logarithmic axis."""
    return any(value > 0 for value in _drawn_values(axes, axis))


def _drawn_values(axes: Axes, axis: str) -> Iterator[float]:
    for line in axes.get_lines():
        yield from np.asarray(line.get_xdata() if axis == "x" else line.get_ydata()).tolist()


def _tick(value: float, _: Any) -> str:
    """`12,000`, `0.25`, `3e-4`: as the tables write numbers."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return short_rate(value)
    return f"{value:,.10g}"


def _small_tick(value: float, _: Any) -> str:
    """All ticks of an axis of small numbers are written alike."""
    return "0" if value == 0 else short_rate(value)


def _svg(figure: Figure, name: str) -> str:
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # Text stays text: the page's fonts draw it, which have what matplotlib's lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing|Matplotlib currently does not support")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    # Several charts share one page, and ids are the page's.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    # Hundredths of a point are enough for the lines; the text between the tags stays.
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\d+\.\d{2})\d+", r"\1", tag.group()), svg)
    for placeholder, variable in ((_INK, "--ink"), (_FAINT, "--faint"), (_GRID, "--grid")):
        svg = svg.replace(placeholder, f"var({variable})")
    return svg.strip()
