"""Run folders as plain data: what ran, what it logged, how it scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dude_cli.config import Config, load_config
from dude_cli.errors import DudeError, UsageError
from dude_cli.evaluation import form_of, is_of_adapter, other_examples, read_results, requested_task, result_files
from dude_cli.evaluation.compare import higher_is_better_of
from dude_cli.evaluation.results import as_number, scores, table_rows
from dude_cli.training.metrics import LAYERS_FILE, MEMORY_FILE, comparable_evaluations, read_metrics, run_summary
from dude_cli.training.run_dir import RESULT


@dataclass(frozen=True)
class Score:
    """One number of one evaluation. Errors are lm-eval's, over the questions; that of `difference` is paired.

    `questions` stands for the task in this version with these prompts: scores that have it in common may be compared.
    """

    path: Path
    label: str
    task: str
    metric: str
    filter: str
    questions: str
    value: float
    stderr: float | None
    base: float | None
    difference: float | None
    difference_stderr: float | None
    higher_is_better: bool | None
    is_of_config: bool  # named in the run's own eval.tasks

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.questions, self.task, self.metric, self.filter

    @property
    def name(self) -> str:
        return f"{self.label}, {self.metric}" + ("" if self.filter == "none" else f" ({self.filter})")


@dataclass(frozen=True)
class Run:
    """One training: its config, the lines of its log, and what it left behind; what is not there is None or empty."""

    folder: Path
    config: Config
    environment: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    evaluations: Sequence[Mapping[str, Any]]  # on the validation rows that it had at its end
    memory: Mapping[str, Any] | None
    layers: Mapping[str, Any] | None
    adapter_sha256: str | None
    scores: Sequence[Score]
    results: Sequence[Mapping[str, Any]]
    kept_step: int  # the step whose adapter is the result
    left_out: Sequence[str] = ()  # files of results that are not of this adapter

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def eval_loss(self) -> float | None:
        """The last evaluation's, or where the best is kept that of its adapter, as its scores are."""
        if not self.config.train.keeps_best:
            return self.last("eval_loss")
        return next((line["eval_loss"] for line in self.evaluations if line["step"] == self.kept_step), None)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """The logged steps and values of a metric, where it has one."""
        lines = [line for line in (*self.steps, *self.evaluations) if line.get(key) is not None]
        return [line["step"] for line in lines], [float(line[key]) for line in lines]

    def last(self, key: str) -> float | None:
        _, values = self.series(key)
        return values[-1] if values else None

    def tokens_at(self, step: int) -> int | None:
        """The tokens of all rows up to and with a step, if that step was logged."""
        if step == 0:
            return 0
        return next((int(line["total_tokens"]) for line in self.steps if line["step"] == step), None)


def read_run(folder: Path) -> Run:
    """Everything that a report needs of one run folder. Raises UsageError for a folder that is no run."""
    if not (folder / "config.yaml").is_file() or not (folder / "environment.json").is_file():
        raise UsageError(
            f"`{folder}` is no run: it lacks config.yaml or environment.json",
            where=str(folder.absolute()),
            fix="give folders that `dude train` wrote, such as runs/quickstart",
        )
    config = load_config(folder / "config.yaml")
    lines = read_metrics(folder)
    adapter = _read_json(folder / RESULT / "adapter_config.json")
    adapter_sha256 = None if adapter is None else adapter.get("sha256")
    found = [read_results(path, samples=False) | {"path": path} for path in result_files(folder / "eval")]
    results = [document for document in found if is_of_adapter(document, adapter_sha256)]
    return Run(
        folder=folder,
        config=config,
        environment=_read_json(folder / "environment.json") or {},
        steps=[line for line in lines if "loss" in line],
        evaluations=comparable_evaluations(lines),
        memory=_read_json(folder / MEMORY_FILE),
        layers=_read_json(folder / LAYERS_FILE),
        adapter_sha256=adapter_sha256,
        # What the run is for comes first.
        scores=sorted(
            (score for document in results for score in _scores(config, document)),
            key=lambda score: not score.is_of_config,
        ),
        results=results,
        kept_step=run_summary(config.model_copy(update={"output_dir": str(folder)}))["kept_step"],
        left_out=[document["path"].name for document in found if document not in results],
    )


def _scores(config: Config, results: Mapping[str, Any]) -> Iterator[Score]:
    """The numbers of a document: its task's or group's own, or those of its parts where it has none."""
    requested = requested_task(results)
    shots = other_examples(results)
    form = form_of(results["requested"][requested.name])
    notes = [] if form is None else [form]
    notes += [] if shots is None else [f"{shots} examples"]
    notes += [] if requested.limit is None else [f"first {requested.limit}"]
    rows = [(depth, name) for depth, name in table_rows(results) if any(scores(results["results"].get(name, {})))]
    depth = min((depth for depth, _ in rows), default=0)
    for name in [name for at, name in rows if at == depth]:
        row, base = results["results"][name], results.get("base", {}).get("results", {}).get(name, {})
        change = results.get("difference", {}).get(name, {})
        for metric, filter_name, value in scores(row):
            key, error_key = f"{metric},{filter_name}", f"{metric}_stderr,{filter_name}"
            number = as_number(value)
            if number is None:
                continue
            yield Score(
                path=results["path"],
                label=f"{name} ({', '.join(notes)})" if notes else name,
                task=name,
                metric=metric,
                filter=filter_name,
                questions=_questions(results, requested.limit),
                value=number,
                stderr=as_number(row.get(error_key)),
                base=as_number(base.get(key)),
                difference=as_number(change.get(key)),
                difference_stderr=as_number(change.get(error_key)),
                higher_is_better=higher_is_better_of(results, name, metric),
                is_of_config=requested.name in {task.name for task in config.eval.tasks},
            )


def _questions(results: Mapping[str, Any], limit: int | None) -> str:
    keys = ("versions", "prompt_hashes", "task_hashes", "max_gen_toks")
    parts = [results[key] for key in keys] + [sorted(results["requested"]), limit]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DudeError(
            f"{path.name} cannot be read: {error}", where=str(path), fix="restore it from a copy, or train again"
        ) from error
    return found
