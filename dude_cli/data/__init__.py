"""From the rows of a data set to the batches of a step: read, encode, pack, order, collate."""

from dude_cli.data.as_trained import as_trained
from dude_cli.data.batches import NOT_LEARNED, EncodedRow, EncodedRows, collate
from dude_cli.data.chat_template import default_template, set_chat_template
from dude_cli.data.messages import Message
from dude_cli.data.order import StepOrder, longest_first, steps_per_epoch
from dude_cli.data.packing import check_packing
from dude_cli.data.prepare import PreparedData, learned_pieces, prepare_data
from dude_cli.data.prompt import Prompt, PromptForm, prompt_form
from dude_cli.data.report import DataReport

__all__ = [
    "NOT_LEARNED",
    "DataReport",
    "EncodedRow",
    "EncodedRows",
    "Message",
    "PreparedData",
    "Prompt",
    "PromptForm",
    "StepOrder",
    "as_trained",
    "check_packing",
    "collate",
    "default_template",
    "learned_pieces",
    "longest_first",
    "prepare_data",
    "prompt_form",
    "set_chat_template",
    "steps_per_epoch",
]
