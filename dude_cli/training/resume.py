"""Whether a run folder holds this very run, and which checkpoint it continues from."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from dude_cli.config import ADAPTER_FIXED, Config, load_config
from dude_cli.errors import ConfigError, UsageError
from dude_cli.model import refuse_moved_folder
from dude_cli.system.ranks import on_main_rank
from dude_cli.training.checkpoint import Origin, checkpoints, newest_checkpoint, read_state
from dude_cli.training.run_dir import has_result, has_steps

if TYPE_CHECKING:
    from accelerate import Accelerator

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


def is_finished_run(config: Config, *, allow_changes: bool = False) -> bool:
    """Whether the run folder holds this run, finished. Raises UsageError if it holds steps of another config.

    `allow_changes` lets an unfinished run have other settings than those which its tensors were made with.
    """
    folder = config.run_dir
    is_finished = has_result(folder)
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


def refuse_moved_base(config: Config) -> None:
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


def checkpoint_to_continue(
    run_dir: Path, now: Origin, accelerator: Accelerator, say: Callable[[str], None], *, allow_changes: bool
) -> Path | None:
    """The newest valid checkpoint, the same on all ranks; None for a run that starts at step 0.

    The main rank looks, sets damaged ones aside and tells the others. Raises UsageError if the run was on other rows,
    another commit of the base or another number of ranks, unless that is allowed; the settings are `is_finished_run`'s.
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
