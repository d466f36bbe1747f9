"""Which checkpoint a run continues from, and whether what it depends on is still the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dude_cli.errors import UsageError
from dude_cli.system.ranks import on_main_rank
from dude_cli.training.checkpoint import Origin, checkpoints, newest_checkpoint, read_state

if TYPE_CHECKING:
    from accelerate import Accelerator


def checkpoint_to_continue(
    run_dir: Path, now: Origin, accelerator: Accelerator, say: Callable[[str], None], *, allow_changes: bool
) -> Path | None:
    """The newest valid checkpoint, the same on all ranks; None for a run that starts at step 0.

    The main rank looks, sets damaged ones aside and tells the others. Raises UsageError if the run was on other rows,
    another commit of the base or another number of ranks, unless that is allowed; the settings are `run_dir`'s.
    """
    found = on_main_rank(accelerator, lambda: _checkpoint(run_dir, now, say, allow_changes=allow_changes))
    return None if found is None else Path(found)


def _checkpoint(run_dir: Path, now: Origin, say: Callable[[str], None], *, allow_changes: bool) -> str | None:
    has_some = bool(checkpoints(run_dir))
    folder = newest_checkpoint(run_dir, say)
    if folder is None:
        if has_some:
            say("no checkpoint is whole: the run starts again at step 0")
        return None
    changed = read_state(folder).origin.differences(now)
    if changed and not allow_changes:
        raise UsageError(
            f"the run was started otherwise; different are: {', '.join(changed)}",
            where=str(folder),
            fix="put that back, or start anew with --overwrite; --allow-changes continues all the same, and the result "
            "is then that of no single training",
        )
    if changed:
        say(f"continuing although different are: {', '.join(changed)}")
    return str(folder)
