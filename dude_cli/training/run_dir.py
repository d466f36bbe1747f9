"""The run folder: whether it may be written to, what it holds, and what starting anew deletes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dude_cli.config import TRACKERS, Config
from dude_cli.errors import UsageError
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


def has_result(folder: Path) -> bool:
    """Whether the training in this run folder is finished: its adapter is whole or not there."""
    return (folder / RESULT).is_dir()


def has_steps(folder: Path) -> bool:
    return has_result(folder) or bool(checkpoints(folder))
