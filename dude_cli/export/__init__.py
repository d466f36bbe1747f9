"""Adapters for other programs, and theirs for us: each hand-over is measured on a probe before it is kept."""

from dude_cli.export.from_peft import import_peft, import_to, peft_base
from dude_cli.export.low_rank import export_lora
from dude_cli.export.merged import export_merged
from dude_cli.export.peft_format import export_peft
from dude_cli.export.report import ExportReport, ImportReport, export_shown, import_shown

__all__ = [
    "ExportReport",
    "ImportReport",
    "export_lora",
    "export_merged",
    "export_peft",
    "export_shown",
    "import_peft",
    "import_shown",
    "import_to",
    "peft_base",
]
