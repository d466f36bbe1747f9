"""The run folder: whether it may be written to, what it holds, and what starting anew deletes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dude_cli.config import ADAPTER_FIXED, TRACKERS, Config, load_config
from dude_cli.errors import ConfigError, UsageError
from dude_cli.model import refuse_moved_folder
from dude_cli.system import files
from dude_cli.system.lock import LOCK_FILE, alone_in
from dude_cli.system.ranks import on_main_rank
from dude_cli.training.checkpoint import BEST, CHECKPOINTS, checkpoints
from dude_cli.training.metrics import LAYERS_FILE, MEMORY_FILE, METRICS_FILE
from dude_cli.training.trained_rows import TRAINED_ROWS_FILE

if TYPE_CHECKING:
    from accelerate import Accelerator

INITIAL, RESULT = "initial", "adapter"
REPORT_FILES = ("report.html", "report.md")
# What a run folder holds. First what is there before step 1, which starting anew writes over.
PREPARED = (INITIAL, "config.yaml", "environment.json", TRAINED_ROWS_FILE)
# Then what starting anew deletes, in this order: what is said of the adapter first, so that none of it is there beside
# another one, should that be cut short.
TRAINED = ("eval", *REPORT_FILES, LAYERS_FILE, RESULT, BEST, CHECKPOINTS, *TRACKERS, METRICS_FILE, MEMORY_FILE)
# Settings that may change between two parts of one run: they do not touch what is learned.
FREE_SETTINGS = {
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "per_device_batch_size",
    "distributed",
    "distributed_timeout_s",
}
# Settings that a checkpoint's tensors were made with.
FIXED_SETTINGS = {f"adapter.{key}" for key in (*ADAPTER_FIXED, "init_from")}


@contextmanager
def alone_in_run_dir(config: Config, accelerator: Accelerator, say: Callable[[str], None]) -> Iterator[None]:
    """Within, no other command prepares or trains in the run folder; raises UsageError on all ranks if one does.

    The main rank, which is the one that writes, holds a lock.
    """
    where, fix = f"output_dir: {config.run_dir}", "choose another output_dir"
    with ExitStack() as stack:
        own = alone_in(config.run_dir, say, where=where, fix=fix)
        on_main_rank(accelerator, lambda: stack.enter_context(own))
        yield


def check_run_dir(config: Config) -> None:
    """Raise UsageError unless the run folder is new, empty or a run: nothing else is written to or deleted."""
    folder = config.run_dir
    if folder.is_file():
        raise UsageError(f"{folder} is a file", where="output_dir", fix="name a folder")
    refuse_links(folder, (*PREPARED, *TRAINED, LOCK_FILE))
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


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise UsageError if one of these in `folder` is a link: what is written to it would land somewhere else."""
    links = [name for name in names if (folder / name).is_symlink()]
    if links:
        raise UsageError(
            f"{', '.join(links)} in it would lead what is written out of the folder: a symbolic link",
            where=str(folder),
            fix="put the folder itself where the files are to be, or choose another one",
        )


def is_finished_run(config: Config, *, allow_changes: bool = False) -> bool:
    """Whether the run folder holds this run, finished. Raises UsageError if it holds steps of another config.

    `allow_changes` lets an unfinished run have other settings than those which its tensors were made with.
    """
    folder = config.run_dir
    is_finished = (folder / RESULT).is_dir()
    changed = changed_settings(config)
    refused = changed if is_finished or not allow_changes else [key for key in changed if key in FIXED_SETTINGS]
    if refused:
        fix = "choose another output_dir, or start anew with --overwrite"
        if is_finished:
            fix += f"; a new run continues from this one's adapter with adapter.init_from={folder}"
        elif not FIXED_SETTINGS.intersection(changed):
            fix += "; --allow-changes continues all the same, and the result is then that of no single training"
        raise UsageError(
            f"{folder} holds a {'finished ' if is_finished else ''}run of another config; different are: "
            f"{', '.join(refused)}",
            where=f"output_dir: {folder}",
            fix=fix,
        )
    return is_finished


def changed_settings(config: Config) -> list[str]:
    """The dotted keys that matter to what is learned and differ from those of the run folder's steps, if it has any."""
    folder = config.run_dir
    return _changed_settings(load_config(folder / "config.yaml"), config) if has_steps(folder) else []


def begun_base_revision(config: Config) -> str | None:
    """The commit of the base that the steps in the run folder were made on; None without steps, or for another base."""
    found = _recorded_of_steps(config.run_dir, "model_revision")
    if found is None:
        return None
    before = load_config(config.run_dir / "config.yaml").model
    is_same = (before.name_or_path, before.revision) == (config.model.name_or_path, config.model.revision)
    return found if is_same else None


def check_base(config: Config) -> None:
    """Raise UsageError if the run was prepared on a base in a folder, and there is none of its name any more."""
    folder, name = config.run_dir, config.model.name_or_path
    if _recorded(folder, "begun_at") is None or _recorded(folder, "model_revision") is not None:
        return
    try:
        before = load_config(folder / "config.yaml").model.name_or_path
    except ConfigError:  # of a run without steps: it is written anew
        return
    if before == name:
        fix = "put it back; or say where it is: model.name_or_path=FOLDER"
        fix += ", with --allow-changes" if has_steps(folder) else ""
        refuse_moved_folder(config.model, where=f"model.name_or_path: {name}", fix=fix)


def begun_at(config: Config) -> datetime | None:
    """When the run began that the steps in the run folder are of; None without steps."""
    found = _recorded_of_steps(config.run_dir, "begun_at")
    with suppress(ValueError):
        return None if found is None else datetime.fromisoformat(found)
    return None


def clear_run(config: Config) -> None:
    """Delete what an earlier training left in the run folder; `initial/` stays, and is reused if it fits."""
    for name in TRAINED:
        files.delete(config.run_dir / name)


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
    """What says what the adapter of `initial/` was made from; None if there is none, or it cannot be read."""
    try:
        return (folder / "key").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def has_steps(folder: Path) -> bool:
    return (folder / RESULT).is_dir() or bool(checkpoints(folder))


def _recorded_of_steps(folder: Path, key: str) -> str | None:
    """What environment.json has of the steps in the run folder; None without steps."""
    return _recorded(folder, key) if has_steps(folder) else None


def _recorded(folder: Path, key: str) -> str | None:
    """What environment.json has of the run, prepared or begun; None if there is none that can be read."""
    try:
        found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _changed_settings(before: Config, now: Config) -> list[str]:
    """The dotted keys that differ and matter to what is learned."""
    changed = []
    for section in ("model", "adapter", "data", "train"):
        old, new = (getattr(config, section).model_dump(mode="json") for config in (before, now))
        changed += [f"{section}.{key}" for key in new if old[key] != new[key] and key not in FREE_SETTINGS]
    return changed + (["seed"] if before.seed != now.seed else [])
