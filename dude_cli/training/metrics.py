"""What a training run tells: metrics.jsonl, its trackers, and one live line."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dude_cli.config import Config
from dude_cli.console import PLAIN_LINE_EVERY_S
from dude_cli.system import files
from dude_cli.training.trackers import Trackers

if TYPE_CHECKING:
    from rich.console import Console

METRICS_FILE = "metrics.jsonl"
MEMORY_FILE = "memory.json"
LAYERS_FILE = "layers.json"


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, in order; a last line that was cut off by a crash is left out."""
    path = run_dir / METRICS_FILE
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            break
        records.append(record)
    return records


def comparable_evaluations(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of the evaluations on the rows of the last one: a run may have been continued with other rows."""
    found = [record for record in records if "eval_loss" in record]
    start = max((place for place, record in enumerate(found) if record.get("new_rows")), default=0)
    return found[start:]


def run_summary(config: Config) -> dict[str, Any]:
    """What became of a run, from its metrics: steps, last loss, first, last and lowest evaluation loss, seconds.

    The first evaluation loss is that of step 0; all are of the validation rows that the run had at its end.

    `first_step_s` is the time from the start of the process to its first step; of the last part of a run in parts.
    `memory` has the most bytes that the training held, predicted and measured.
    `kept_step` is the step whose adapter is the result: the last, or where the best is kept the lowest evaluation's
    since it is, which is `kept_eval_loss`.
    """
    records = read_metrics(config.run_dir)
    steps = [record for record in records if "loss" in record]
    evaluations = comparable_evaluations(records)
    last = steps[-1] if steps else {"step": 0}
    lowest = min(evaluations, key=lambda record: record["eval_loss"], default=None)
    kept = last
    if config.train.keeps_best and lowest is not None:
        # A run may be told so on its way, after a lower evaluation. Earlier versions did not say which is kept.
        kept = next((record for record in reversed(evaluations) if record.get("kept")), lowest)
    return {
        "run_dir": str(config.run_dir),
        "steps": last["step"],
        "kept_step": kept["step"],
        "kept_eval_loss": kept.get("eval_loss"),
        "loss": last.get("loss"),
        "first_eval_loss": next((record["eval_loss"] for record in evaluations if record["step"] == 0), None),
        "last_eval_loss": evaluations[-1]["eval_loss"] if evaluations else None,
        "lowest_eval_loss": lowest["eval_loss"] if lowest else None,
        "elapsed_s": last.get("elapsed_s"),
        "first_step_s": next((record["first_step_s"] for record in reversed(steps) if "first_step_s" in record), None),
        "memory": _read_memory(config.run_dir),
    }


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """What became of a run, for a person: how far the losses fell, which step's adapter it is, and if it is worse."""
    if summary["loss"] is None:
        return []
    lines = [f"{summary['steps']:,} steps, the last one's loss {summary['loss']:.4f}"]
    first, last, lowest = (summary[f"{which}_eval_loss"] for which in ("first", "last", "lowest"))
    if last is not None:
        before = "" if first is None else f"{first:.4f} before, "
        lines.append(f"evaluation loss {before}{last:.4f} at the end, {lowest:.4f} at the lowest")
    if summary["kept_step"] != summary["steps"]:
        loss = summary["kept_eval_loss"]
        lines.append(f"the adapter is that of step {summary['kept_step']:,}, evaluation loss {loss:.4f}")
    elif first is not None and last > first:
        lines.append("warning: the evaluation loss is higher than before the training: lower train.learning_rate")
    return lines


def _read_memory(run_dir: Path) -> dict[str, Any] | None:
    """The most bytes of a finished training, as predicted and as measured; None before its end."""
    path = run_dir / MEMORY_FILE
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {key: record[key] for key in ("predicted_training_bytes", "measured_training_bytes", "measured")}
    except (ValueError, KeyError, TypeError):  # damaged: a summary goes without
        return None


class MetricsLog:
    """Appends one JSON object per line to metrics.jsonl, and gives the numbers to the trackers."""

    def __init__(self, run_dir: Path, trackers: Trackers, *, from_step: int, with_evaluation: bool) -> None:
        """Keep the lines of the first `from_step` steps, which a resumed run does not repeat.

        Those of the last step's evaluation are kept `with_evaluation`: else it is to be done again.
        """
        kept = [
            record
            for record in read_metrics(run_dir)
            if from_step > 0
            and (record["step"] < from_step or (record["step"] == from_step and (with_evaluation or "loss" in record)))
        ]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        files.write_text(run_dir / METRICS_FILE, text)
        self._file = (run_dir / METRICS_FILE).open("a", encoding="utf-8")
        self._trackers = trackers

    def log(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        values = {
            key: value for key, value in record.items() if key not in ("step", "kept", "new_rows") and value is not None
        }
        self._trackers.log(record["step"], values)

    def sync(self) -> None:
        """Ask the disk to hold all lines before going on."""
        os.fsync(self._file.fileno())

    def close(self, *, failed: bool) -> None:
        self._file.close()
        self._trackers.close(failed=failed)


class TrainDisplay:
    """One live line with step, loss, learning rate, tokens per second and time left; on standard error."""

    def __init__(self, console: Console, total_steps: int, start_step: int) -> None:
        self._console = console
        self._total_steps = total_steps
        self._live = console.is_terminal
        self._last_line_s = time.monotonic()
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[numbers]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not self._live,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=start_step, numbers="")

    def __enter__(self) -> TrainDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int, loss: float, learning_rate: float, tokens_per_s: float) -> None:
        numbers = f"loss {loss:.4f}  lr {learning_rate:.2e}  {tokens_per_s:,.0f} tokens/s"
        self._progress.update(self._task, completed=step, numbers=numbers)
        now = time.monotonic()
        is_due = now - self._last_line_s >= PLAIN_LINE_EVERY_S or step == self._total_steps
        if not self._live and is_due:
            self._last_line_s = now
            self._console.print(f"step {step}/{self._total_steps}  {numbers}")

    def message(self, text: str) -> None:
        self._progress.console.print(text, highlight=False)
