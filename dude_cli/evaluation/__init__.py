"""Benchmark scores through lm-eval: which tasks, the model in memory, the scoring, what is made of the results."""

from dude_cli.evaluation.results import plain_results, results_json, results_table, task_results, write_results
from dude_cli.evaluation.run import EvalRequest, evaluate

__all__ = ["EvalRequest", "evaluate", "plain_results", "results_json", "results_table", "task_results", "write_results"]
