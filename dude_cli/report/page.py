"""A report as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from dude_cli import __version__
from dude_cli.markup import escaped, escaped_but_code, table_row
from dude_cli.report.content import Report, Section, Table

_TEMPLATE = Path(__file__).parent / "page.html.j2"


def html_page(report: Report) -> str:
    """One page without scripts and without anything from elsewhere; light and dark, for screens, phones and paper."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["code"] = _with_code
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, version=__version__, dashes=_dashes, group_label=_group_label) + "\n"


def markdown(report: Report) -> str:
    """The same tables and texts; the charts are on the page alone."""
    lines = [f"# {escaped(report.title)}", "", escaped(report.subtitle), ""]
    for warning in report.warnings:
        lines += [f"> {escaped_but_code(warning)}", ""]
    for section in report.sections:
        lines += _section(section)
    return "\n".join(lines).rstrip() + "\n"


def _section(section: Section) -> Iterator[str]:
    tables = [table for table in section.tables if table.rows]
    if not (section.text and not section.charts) and not tables and not section.lists:
        return
    yield from (f"## {section.title}", "")
    if section.text and not section.charts:
        yield from (escaped_but_code(section.text), "")
    for table in tables:
        if table.title != section.title:
            yield from (f"### {table.title}", "")
        yield from (markdown_table(table), "")
    for heading, items in section.lists.items():
        yield from (f"{escaped(heading)}:", "")
        yield from (f"- {escaped(item)}" for item in items)
        yield ""


def markdown_table(table: Table) -> str:
    """A table and, under it, its note."""
    lines = [
        table_row([column.heading for column in table.columns]),
        "| " + " | ".join("---" if column.is_text else "---:" for column in table.columns) + " |",
        *(table_row(table.cells(row)) for row in table.rows),
    ]
    return "\n".join([*lines, "", escaped_but_code(table.note)] if table.note else lines)


def _with_code(text: str) -> str:
    """Text with what stands between backticks as code."""
    import markupsafe

    parts = [markupsafe.escape(part) for part in text.split("`")]
    return markupsafe.Markup("").join(
        markupsafe.Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def _group_label(table: Table) -> str:
    """A heading that is a number says of what."""
    column = next(column for column in table.columns if column.key == table.group_by)
    return "" if column.is_text else f"{column.heading}: "


def _dashes(dash: Sequence[float]) -> str:
    return " ".join(f"{2 * length:g}" for length in dash)
