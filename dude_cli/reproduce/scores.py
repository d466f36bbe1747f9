"""What finished runs have: development losses and lm-eval's scores, read from their folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from dude_cli.config import EvalTask
from dude_cli.evaluation import find_results
from dude_cli.reproduce.plan import Run
from dude_cli.training.metrics import run_summary


@dataclass(frozen=True)
class Measured:
    """One figure of one run; `stderr` is lm-eval's standard error over the questions, where there is one."""

    value: float
    stderr: float | None = None


def eval_loss(run: Run) -> Measured | None:
    """The development loss of the adapter that the run has kept; None if it is not finished or has no such rows."""
    if not run.is_finished:
        return None
    config = run.config.model_copy(update={"output_dir": str(run.folder)})
    loss = run_summary(config)["kept_eval_loss" if config.train.keeps_best else "last_eval_loss"]
    return None if loss is None else Measured(float(loss))


def task_score(run: Run, task: EvalTask, metric: str, *, base: bool = False) -> Measured | None:
    """The score of a run, or of its base model, from the file that `dude eval` has written; None if it has none.

    Raises KeyError if there are results, but without this metric.
    """
    results = task_results(run, task)
    if results is None or (base and "base" not in results):
        return None
    scores = (results["base"] if base else results)["results"][task.name]
    name, _, filter_name = metric.partition(",")
    stderr = scores.get(f"{name}_stderr,{filter_name}")
    return Measured(float(scores[metric]), float(stderr) if isinstance(stderr, int | float) else None)


def task_results(run: Run, task: EvalTask) -> dict[str, Any] | None:
    """The results of a task, if this lm-eval made them, of the run's adapter as it is now and asked in the same way."""
    try:
        adapter = json.loads((run.folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    wanted = {"adapter_sha256": adapter["sha256"], "base_fingerprint": adapter["base_model"]["fingerprint"]}
    found = find_results(run.folder / "eval", task, **wanted, dtype=adapter["base_model"]["dtype"], samples=False)
    is_this_lm_eval = found is not None and found["lm_eval_version"] == version("lm_eval")
    return found if is_this_lm_eval else None
