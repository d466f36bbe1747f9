"""What a command says in the end is read as it is meant."""

from __future__ import annotations

from pathlib import Path

from dude_cli.export.probe import Difference
from dude_cli.export.report import ExportReport, ImportReport, export_shown, import_shown


def test_the_allowance_stands_beside_the_share_that_it_is_of() -> None:
    found = Difference(largest=2e-05, largest_logit=13.0, same_top_token=1.0)
    line = "largest logit difference 2e-05, 1.5e-06 of the largest logit (allowed 1e-05); same next token at 100.0% "
    exported = ExportReport("merged", Path("out"), "float32", found, 1e-5, None)
    imported = ImportReport(Path("out"), "lora", 8, "float32", found, 1e-5)
    assert line in export_shown(exported)
    assert line in import_shown(imported)
    assert "allowed" not in str(found)
