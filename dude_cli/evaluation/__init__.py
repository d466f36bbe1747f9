"""Benchmark scores through lm-eval: which tasks, the model in memory, the scoring, what is made of the results."""

from dude_cli.evaluation.chat import chat_template, check_system_instruction
from dude_cli.evaluation.compare import (
    Comparison,
    compare_results,
    comparison_shown,
    different_settings,
    refuse_other_questions,
)
from dude_cli.evaluation.results import form_of, plain_results, results_json, results_table
from dude_cli.evaluation.reuse import changes_since, replaced_by
from dude_cli.evaluation.row_reader import RowReader
from dude_cli.evaluation.run import EvalRequest, evaluate, load_request
from dude_cli.evaluation.saved import (
    find_results,
    is_of_adapter,
    join_results,
    other_examples,
    read_results,
    requested_task,
    result_files,
    task_results,
    write_results,
)
from dude_cli.evaluation.tasks import LoadedTask

__all__ = [
    "Comparison",
    "EvalRequest",
    "LoadedTask",
    "RowReader",
    "changes_since",
    "chat_template",
    "check_system_instruction",
    "compare_results",
    "comparison_shown",
    "different_settings",
    "evaluate",
    "find_results",
    "form_of",
    "is_of_adapter",
    "join_results",
    "load_request",
    "other_examples",
    "plain_results",
    "read_results",
    "refuse_other_questions",
    "replaced_by",
    "requested_task",
    "result_files",
    "results_json",
    "results_table",
    "task_results",
    "write_results",
]
