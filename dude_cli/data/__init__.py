"""From the rows of a data set to the batches of a step: read, encode, pack, order, collate."""

from dude_cli.data.batches import NOT_LEARNED, EncodedRow, EncodedRows, collate
from dude_cli.data.order import step_rows, steps_per_epoch
from dude_cli.data.packing import check_packing
from dude_cli.data.prepare import DataReport, PreparedData, prepare_data

__all__ = [
    "NOT_LEARNED",
    "DataReport",
    "EncodedRow",
    "EncodedRows",
    "PreparedData",
    "check_packing",
    "collate",
    "prepare_data",
    "step_rows",
    "steps_per_epoch",
]
