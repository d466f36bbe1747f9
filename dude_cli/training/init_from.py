"""`adapter.init_from`, the adapter that a training continues from: find it, take over what its tensors fix.

A run that has begun keeps its own start, `initial/`, whatever has become of the source since: a run is one training.
A run without steps takes the source as it is now, or its own copy if the source is gone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dude_cli.config import ADAPTER_FIXED, AdapterConfig, Config, SvdConfig, load_config
from dude_cli.errors import AdapterError, UsageError
from dude_cli.target import find_target
from dude_cli.training.checkpoint import CHECKPOINTS
from dude_cli.training.run_dir import INITIAL, has_steps, initial_key


def resolve_init_from(config: Config, *, overwrite: bool = False) -> Config:
    """`config` with what the tensors of its `adapter.init_from` fix; the same config if it has none.

    Raises UsageError if there is no such adapter, if it is in the run folder itself, and for values that the config
    states and the adapter has otherwise, all of them at once; AdapterError if it is not an adapter of ours.
    """
    if config.adapter.init_from is None:
        return config
    from dude_cli.adapter import read_adapter_config  # only here: it imports torch and transformers

    own = None if overwrite else _own_start(config)
    source = read_adapter_config(source_folder(config)).config if own is None else own
    _refuse_other_values(config.adapter, source)
    taken = {key: getattr(source, key) for key in ADAPTER_FIXED}
    return config.model_copy(update={"adapter": config.adapter.model_copy(update=taken)})


def keeps_own_start(config: Config) -> bool:
    """Whether the run goes on from its `initial/` without a look at the source; see the head of this module."""
    return config.adapter.init_from is not None and _own_start(config) is not None


def source_folder(config: Config) -> Path:
    """The adapter folder that `adapter.init_from` names. Raises UsageError if there is none."""
    name = str(config.adapter.init_from)
    where = f"adapter.init_from: {name}"
    try:
        folder = find_target(name).adapter_dir
    except UsageError as error:
        raise UsageError(error.what, where=where, fix=error.fix) from error
    if folder is None:
        raise UsageError(
            f"`{name}` is neither a run nor an adapter", where=where, fix="name a run folder, or an adapter folder"
        )
    if folder.resolve().is_relative_to(config.run_dir.resolve()):
        raise UsageError(
            "a run cannot continue from itself", where=where, fix="choose another output_dir for what is to follow"
        )
    return folder


def source_run(config: Config) -> Path | None:
    """The run whose adapter, or one of a checkpoint's, the training continues from; None without one, or if gone."""
    if config.adapter.init_from is None:
        return None
    try:
        adapter = source_folder(config).resolve()
    except UsageError:
        return None
    folder = adapter.parent
    return folder.parent.parent if folder.parent.name == CHECKPOINTS else folder


def template_note(config: Config, tokenizer: Any) -> str | None:
    """What to say where a training on conversations goes on with another chat template than its source's."""
    if not config.data.trains_on_chats or config.adapter.init_from is None or keeps_own_start(config):
        return None
    file = source_folder(config) / "chat_template.jinja"
    own = tokenizer.chat_template
    default = own.get("default") if isinstance(own, dict) else own  # the others are in files of their own
    if not file.is_file() or file.read_text(encoding="utf-8") == default:
        return None
    return f"note: adapter.init_from was trained with another chat template; data.chat_template={file} takes that one"


def source_sha256(config: Config) -> str:
    """What identifies the source's tensors."""
    from dude_cli.adapter import read_adapter_config

    return read_adapter_config(source_folder(config)).sha256


def _own_start(config: Config) -> AdapterConfig | None:
    """The resolved settings of the run that is in the run folder, if it is to go on from its own start."""
    folder = config.run_dir
    if initial_key(folder / INITIAL) is None or not (folder / "config.yaml").is_file():
        return None
    before = load_config(folder / "config.yaml").adapter
    is_same = before.init_from == config.adapter.init_from
    return before if is_same and (has_steps(folder) or _is_gone(config)) else None


def _is_gone(config: Config) -> bool:
    try:
        source_sha256(config)
    except (UsageError, AdapterError):
        return True
    return False


def _refuse_other_values(stated: AdapterConfig, source: AdapterConfig) -> None:
    values = {
        key: (_comparable(getattr(stated, key), source.rank), _comparable(getattr(source, key), source.rank))
        for key in ADAPTER_FIXED
        if key in stated.model_fields_set
    }
    differing = {key: pair for key, pair in values.items() if pair[0] != pair[1]}
    if differing:
        lines = [f"adapter.{key} is {here}, and in the adapter {there}" for key, (here, there) in differing.items()]
        raise UsageError(
            "the adapter to continue from was made with other values: " + "; ".join(lines),
            where=f"adapter.init_from: {stated.init_from}",
            fix=f"leave out {', '.join(f'adapter.{key}' for key in differing)}: the adapter has its own",
        )


def _comparable(value: object, rank: int) -> object:
    """A setting so that equal ones compare equal: no `alpha` is the rank, and patterns have no order."""
    if value is None:
        return float(rank)
    if isinstance(value, SvdConfig):
        return value.model_dump()
    return sorted(value) if isinstance(value, list) else value
