"""What a report consists of: sections of tables and charts, as plain data for a page, for Markdown and for JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dude_cli.evaluation.statistics import Summary
from dude_cli.system.memory import human_bytes

NOTHING = "–"
# What is longer is shortened in labels.
LONGEST_LABEL = 50
Shown = Callable[[Any], str]


@dataclass(frozen=True)
class Column:
    """One column of a table: the key of its values in the rows, what it is called, and how a value is written."""

    key: str
    heading: str
    shown: Shown = str
    is_text: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of raw values by column key; a missing one, or None, is shown as a dash. `note` says how to read it."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    note: str = ""
    is_folded: bool = False
    group_by: str | None = None  # a column that the page shows as headings over its rows

    def groups(self) -> list[tuple[str | None, list[list[str]]]]:
        """The rows' cells under their headings, in order, without the column that these come from."""
        if self.group_by is None:
            return [(None, [self.cells(row) for row in self.rows])]
        place = [column.key for column in self.columns].index(self.group_by)
        found: dict[str | None, list[list[str]]] = {}
        for row in self.rows:
            cells = self.cells(row)
            found.setdefault(cells.pop(place), []).append(cells)
        return list(found.items())

    def ungrouped_columns(self) -> list[Column]:
        return [column for column in self.columns if column.key != self.group_by]

    def cells(self, row: Mapping[str, Any]) -> list[str]:
        values = [(column, row.get(column.key)) for column in self.columns]
        return [NOTHING if value is None else column.shown(value) for column, value in values]

    def record(self) -> dict[str, Any]:
        """The table for machines: numbers as they are."""
        rows = [{column.key: _plain(row.get(column.key)) for column in self.columns} for row in self.rows]
        return {"title": self.title, "note": self.note, "rows": rows}


@dataclass(frozen=True)
class Chart:
    """A picture: `draw` makes its SVG, which takes its text colour from the page; `alt` says in words what it shows."""

    name: str
    title: str
    draw: Callable[[], str]
    alt: str


@dataclass(frozen=True)
class Style:
    """How a setting is drawn, in every chart of a report: a colour and an SVG dash pattern."""

    color: str
    dash: tuple[float, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the report. `legend` has the styles of its charts by label; `lists` are folded lists of lines."""

    name: str
    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    legend: Mapping[str, Style] = field(default_factory=dict)
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """The whole of it; `warnings` say what the reader must know before any number."""

    title: str
    subtitle: str
    warnings: Sequence[str]
    sections: Sequence[Section]

    def record(self) -> dict[str, Any]:
        """The report for machines: every table by its name."""
        tables = {table.name: table.record() for section in self.sections for table in section.tables}
        return {"title": self.title, "subtitle": self.subtitle, "warnings": list(self.warnings), "tables": tables}


def text_column(key: str, heading: str, shown: Shown = str) -> Column:
    return Column(key, heading, shown, is_text=True)


SETTING = text_column("setting", "setting")


def number(digits: int = 4) -> Shown:
    """Significant digits, without an exponent where that is readable."""

    def shown(value: float) -> str:
        if not math.isfinite(value):
            return str(value)
        if value != 0 and not 1e-4 <= abs(value) < 1e6:
            return f"{value:.{max(0, digits - 2)}e}".replace("e-0", "e-").replace("e+0", "e+")
        decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value else 0)
        return f"{value:,.{max(0, decimals)}f}"

    return shown


def mean_and_sd(shown: Shown) -> Shown:
    """`mean ± sd` with as many decimals and one unit for both; the mean alone for a single run."""

    def both(value: Summary) -> str:
        if value.sd is None:
            return shown(value.mean)
        text = shown(value.mean)
        number_shown, space, unit = text.partition(" ")
        decimals = len(number_shown.partition(".")[2])
        # A clock's time and an exponent have decimals of their own.
        is_plain = number_shown.replace(",", "").replace(".", "").removeprefix("-").isdecimal() and unit in ("", "%")
        return (
            f"{number_shown} ± {_rounded(value.sd, unit, decimals)}{space}{unit}"
            if is_plain
            else (f"{text} ± {shown(value.sd)}")
        )

    return both


def _rounded(value: float, unit: str, decimals: int) -> str:
    return f"{100 * value if unit == '%' else value:,.{decimals}f}"


def mean(shown: Shown) -> Shown:
    """The mean alone, of what hardly differs between runs."""

    def only(value: Summary) -> str:
        return shown(value.mean)

    return only


def percent(decimals: int = 2) -> Shown:
    return lambda value: f"{100 * value:.{decimals}f} %"


def count(value: float) -> str:
    return f"{value:,.0f}"


RUNS = Column("runs", "runs", count)


def seconds(value: float) -> str:
    """Seconds as a clock says them, from two minutes on."""
    if value < 120:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def size(value: float) -> str:
    return human_bytes(round(value))


def p_value(value: float) -> str:
    return f"{value:.1e}" if value < 0.001 else f"{value:.3f}"


def short_rate(value: float) -> str:
    """A learning rate: `3e-4`."""
    mantissa, _, exponent = f"{value:.6e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def shortened(text: str, length: int = LONGEST_LABEL) -> str:
    """Text on one line, without its middle if it is long."""
    text = " ".join(text.split())
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[: length - 1 - half]}…{text[-half:]}"


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Summary) else value
