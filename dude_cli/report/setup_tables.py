"""The first table of a report and the last ones: all in one row for each setting, and what ran."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dude_cli.evaluation import form_of
from dude_cli.report.collect import Run
from dude_cli.report.content import (
    RUNS,
    SETTING,
    Column,
    Table,
    count,
    mean,
    mean_and_sd,
    number,
    seconds,
    short_rate,
    size,
    text_column,
)
from dude_cli.report.score_tables import first_names, score_value, shown_metric
from dude_cli.report.settings import Setting, flat_config, is_sources, shown_sources
from dude_cli.report.training_tables import last_smoothed_loss, peak_memory, trainable_parameters

# What a reader asks first, of the configs.
_ASKED = {
    "base model": "model.name_or_path",
    "dtype": "model.dtype",
    "quantization": "model.quantization",
    "method": "adapter.method",
    "rank": "adapter.rank",
    "alpha": "adapter.alpha",
    "target modules": "adapter.target_modules",
    "training rows": "data.train",
    "validation rows": "data.validation",
    "longest row, tokens": "data.max_length",
    "learning rate": "train.learning_rate",
    "schedule": "train.lr_scheduler_type",
    "warm-up ratio": "train.warmup_ratio",
    "epochs": "train.num_train_epochs",
    "steps": "train.max_steps",
    "global batch, rows": "train.global_batch_size",
    "weight decay": "train.weight_decay",
}


def headline_table(settings: Sequence[Setting]) -> Table:
    """One row for each setting: the evaluation loss, each task's first score, and what it cost."""
    names = first_names(settings)
    rows = []
    for setting in settings:
        row: dict[str, Any] = {
            "setting": setting.label,
            "runs": len(setting.runs),
            "eval_loss": setting.summary(lambda run: run.eval_loss),
            "parameters": setting.summary(trainable_parameters),
            "elapsed_s": setting.summary(lambda run: run.last("elapsed_s")),
            "memory": setting.summary(peak_memory),
        }
        scores = {name: setting.summary(functools.partial(score_value, key=key)) for key, name in names.items()}
        rows.append(row | scores)
    return Table(
        "headline",
        "Results",
        [
            SETTING,
            RUNS,
            Column("eval_loss", "evaluation loss, nats/token", mean_and_sd(number())),
            *(Column(name, name, mean_and_sd(shown_metric(key[2]))) for key, name in names.items()),
            Column("parameters", "trainable", mean(count)),
            Column("elapsed_s", "training time", mean(seconds)),
            Column("memory", "peak memory", mean(size)),
        ],
        rows,
        "Mean ± standard deviation over the runs of a setting (n - 1 in its denominator), which differ in their "
        "seed; of one run there is no deviation. The loss is the last evaluation's, or that of the best adapter where "
        "that is kept; the memory is the training's.",
    )


def runs_table(settings: Sequence[Setting]) -> Table:
    rows = [
        {
            "setting": setting.label,
            "seed": run.seed,
            "steps": _last_step(run),
            "kept": None if run.kept_step == _last_step(run) else run.kept_step,
            "loss": last_smoothed_loss(run),
            "eval_loss": run.eval_loss,
            "adapter": None if run.adapter_sha256 is None else run.adapter_sha256[:12],
            "commit": (run.environment.get("git_commit") or "")[:9] or None,
            "folder": str(run.folder),
        }
        for setting in settings
        for run in setting.runs
    ]
    has_earlier = any(row["kept"] is not None for row in rows)
    return Table(
        "runs",
        "Runs",
        [
            SETTING,
            Column("seed", "seed"),
            Column("steps", "steps", count),
            *([Column("kept", "kept step", count)] if has_earlier else []),
            Column("loss", "training loss", number()),
            Column("eval_loss", "evaluation loss", number()),
            text_column("adapter", "adapter sha256"),
            text_column("commit", "commit"),
            text_column("folder", "folder"),
        ],
        rows,
        "The training loss is the last value of its running mean."
        + (" Adapter and evaluation loss are those of the kept step, where one is named." if has_earlier else ""),
    )


def _last_step(run: Run) -> int:
    return int(run.steps[-1]["step"]) if run.steps else 0


def common_table(settings: Sequence[Setting]) -> Table:
    """The values of the configs that a reader asks for, and every other one that differs between the runs."""
    flat = [flat_config(run) for setting in settings for run in setting.runs]
    differing = [key for setting in settings for key in setting.values]
    rows = []
    for name, key in {**_ASKED, **{key: key for key in differing if key not in _ASKED.values()}}.items():
        values = list(dict.fromkeys(_shown_value(key, values.get(key)) for values in flat if _is_used(key, values)))
        if values not in ([], ["null"]):
            rows.append({"key": name, "value": "; ".join(values)})
    columns = [text_column("key", "setting"), text_column("value", "value; several where the runs differ")]
    return Table("common", "Config", columns, rows)


def evaluations_table(settings: Sequence[Setting]) -> Table:
    """How the scores were made: one row for each task and form of its questions."""
    rows: dict[str, dict[str, Any]] = {}
    for run in (run for setting in settings for run in setting.runs):
        for results in run.results:
            ((name, request),) = results["requested"].items()
            config = results["config"]
            row = {
                "task": name,
                "form": form_of(request) or "plain text",
                "limit": config["limit"],
                "version": _common(results["versions"].values()),
                "shots": _common(results["n-shot"].values()),
                "questions": sum(row["effective"] for row in results["n-samples"].values()),
                "prompts": _common(value[:12] for value in results["prompt_hashes"].values()),
                "dtype": config["model_dtype"].removeprefix("torch."),
                "batch_size": config["batch_size"],
                "lm_eval": results["lm_eval_version"],
            }
            rows.setdefault(repr(row), row)
    return Table(
        "evaluations",
        "Evaluations",
        [
            text_column("task", "task"),
            text_column("form", "asked in"),
            Column("limit", "limit"),
            Column("version", "task version"),
            Column("shots", "examples"),
            Column("questions", "questions", count),
            text_column("prompts", "prompts' sha256"),
            text_column("dtype", "dtype"),
            Column("batch_size", "batch size"),
            text_column("lm_eval", "lm-eval"),
        ],
        list(rows.values()),
    )


def _common(values: Iterable[Any]) -> str:
    """The one value of all, or how many there are."""
    known = list(dict.fromkeys(map(str, values)))
    return known[0] if len(known) == 1 else f"{len(known)} different"


def _is_used(key: str, values: Mapping[str, Any]) -> bool:
    """A number of steps makes that of the epochs void."""
    return key != "train.num_train_epochs" or values["train.max_steps"] is None


def _shown_value(key: str, value: Any) -> str:
    if key == "train.learning_rate":
        return short_rate(value)
    if is_sources(key, value):
        return shown_sources(value)
    return value if isinstance(value, str) else json.dumps(value)
