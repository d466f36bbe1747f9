"""The run folder: whether it may be written to, what it holds, and what starting anew deletes."""

from __future__ import annotations

import shutil
from pathlib import Path

from dude_cli import files
from dude_cli.checkpoint import CHECKPOINTS, checkpoints
from dude_cli.config import Config, load_config
from dude_cli.errors import UsageError
from dude_cli.metrics import LAYERS_FILE, MEMORY_FILE, METRICS_FILE

INITIAL, RESULT, BEST = "initial", "adapter", "best"
REPORT_FILES = ("report.html", "report.md")
# Settings that may change between two parts of one run: they do not touch what is learned.
FREE_SETTINGS = {
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "per_device_batch_size",
    "distributed",
}


def check_run_dir(config: Config) -> None:
    """Raise UsageError unless the run folder is new, empty or a run: nothing else is written to or deleted."""
    folder = config.run_dir
    if folder.is_file():
        raise UsageError(f"{folder} is a file", where="output_dir", fix="name a folder")
    for name in (INITIAL, RESULT, BEST):
        files.recover_folder(folder / name)
    # Hidden files may be what a killed process left half-written.
    is_empty = not folder.exists() or all(file.name.startswith(".") for file in folder.iterdir())
    is_run = (folder / "config.yaml").is_file() and (folder / "environment.json").is_file()
    is_prepared = initial_key(folder / INITIAL) is not None and not has_steps(folder)
    if not (is_empty or is_run or is_prepared):
        raise UsageError(
            f"{folder} is not empty and not a run: it lacks config.yaml or environment.json",
            where=f"output_dir: {folder}",
            fix="choose another output_dir, or move away what is there",
        )


def is_finished_run(config: Config) -> bool:
    """Whether the run folder holds this run, finished. Raises UsageError if it holds steps of another config."""
    folder = config.run_dir
    if has_steps(folder):
        changed = _changed_settings(load_config(folder / "config.yaml"), config)
        if changed:
            raise UsageError(
                f"{folder} holds a run of another config; different are: {', '.join(changed)}",
                where=f"output_dir: {folder}",
                fix="choose another output_dir, or start anew with --overwrite",
            )
    return (folder / RESULT).is_dir()


def refuse_other_data(before: dict[str, str], now: dict[str, str], checkpoint: Path) -> None:
    """Raise UsageError if rows have other fingerprints than those that the run was started with."""
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise UsageError(
            f"the rows of {' and '.join(changed)} are not those that the run was started with",
            where=str(checkpoint),
            fix="put the data back, or start anew with --overwrite",
        )


def clear_run(config: Config) -> None:
    """Delete what an earlier training left in the run folder; `initial/` stays, and is reused if it fits."""
    for name in (RESULT, BEST, CHECKPOINTS, "eval", "tensorboard"):
        shutil.rmtree(config.run_dir / name, ignore_errors=True)
    for name in (METRICS_FILE, MEMORY_FILE, LAYERS_FILE, *REPORT_FILES):
        (config.run_dir / name).unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise UsageError if the run folder cannot be written: better now than after an hour of decomposing."""
    try:
        files.check_writable(folder)
    except OSError as error:
        raise UsageError(
            f"nothing can be written to {folder}: {error.strerror}",
            where=f"output_dir: {folder}",
            fix="choose another output_dir, or change its permissions",
        ) from error


def initial_key(folder: Path) -> str | None:
    """What says what the adapter of `initial/` was made from; None if there is none."""
    try:
        return (folder / "key").read_text(encoding="utf-8")
    except OSError:
        return None


def has_steps(folder: Path) -> bool:
    return (folder / RESULT).is_dir() or bool(checkpoints(folder))


def _changed_settings(before: Config, now: Config) -> list[str]:
    """The dotted keys that differ and matter to what is learned."""
    changed = []
    for section in ("model", "adapter", "data", "train"):
        old, new = (getattr(config, section).model_dump(mode="json") for config in (before, now))
        changed += [f"{section}.{key}" for key in new if old[key] != new[key] and key not in FREE_SETTINGS]
    return changed + (["seed"] if before.seed != now.seed else [])
