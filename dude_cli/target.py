"""What `dude eval` and its neighbours are pointed at, a run, an adapter or a plain model: find it, load it."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dude_cli import quickstart
from dude_cli.config import DTYPES, HUB_NAME, QUANTIZATIONS, DataConfig, DType, EvalConfig, ModelConfig, load_config
from dude_cli.errors import AdapterError, ConfigError, UsageError, nearest
from dude_cli.model import load_model, load_tokenizer, refuse_moved_folder, saved_context_length, saved_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dude_cli.adapter import SavedAdapter

ADAPTER_CONFIG = Path("adapter_config.json")
RUNS_DIR = Path("runs")


@dataclass(frozen=True)
class Target:
    """A run folder, an adapter folder, or a model: a folder, a hub name or `embedded:quickstart`.

    `path` is the folder of a run, an adapter or a local model, else None; `name` is what the user wrote.
    """

    kind: Literal["run", "adapter", "model"]
    name: str
    path: Path | None = None

    @property
    def run_dir(self) -> Path | None:
        """The folder of a run; None for all else."""
        return self.path if self.kind == "run" else None

    @property
    def adapter_dir(self) -> Path | None:
        """The folder of the trained adapter; None for a plain model."""
        if self.run_dir is not None:
            return self.run_dir / "adapter"
        return self.path if self.kind == "adapter" else None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


def find_target(target: str | None) -> Target:
    """Say what `target` is; with None, the newest finished run under `runs/` that is none of `--smoke`.

    A run is finished once `adapter/adapter_config.json` exists in it; the newest is the one whose file is youngest.
    Raises UsageError for a folder that is none of the three, an unfinished run, a path that does not exist, and for
    None without a finished run. Whether an adapter is one of ours is seen when it is read.
    """
    if target is None:
        return _newest_run()
    if target == quickstart.NAME:
        return Target("model", target)
    folder = Path(os.path.expanduser(target))
    if folder.is_dir():
        return _folder_target(target, folder)
    if folder.exists():
        raise UsageError(
            f"`{target}` is a file; a run, an adapter or a model is a folder",
            where=target,
            fix="give the folder that it is in",
        )
    # `runs/gsm8k` reads like a hub name; a first part that is a folder here means that a path was meant.
    is_path = folder.is_absolute() or target[0] in ".~" or (folder.parts[1:] and Path(folder.parts[0]).is_dir())
    if is_path or not HUB_NAME.fullmatch(target):
        raise _no_such_path(target, folder)
    return Target("model", target)


@dataclass(frozen=True)
class LoadedTarget:
    """A model ready to be used, with what it was made from; without an adapter the last two are None."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: ModelConfig
    adapter: SavedAdapter | None
    base_fingerprint: str | None

    @property
    def saved(self) -> SavedAdapter:
        """The adapter, where there is known to be one."""
        assert self.adapter is not None
        return self.adapter

    @property
    def adapter_sha256(self) -> str | None:
        return None if self.adapter is None else self.adapter.sha256

    @property
    def is_on_other_base(self) -> bool:
        """Whether the adapter is on a base with other weights than its own."""
        return self.adapter is not None and self.base_fingerprint != self.adapter.base_fingerprint


@dataclass(frozen=True)
class Loading:
    """How a target is loaded: in `dtype`, else in the one it was trained with, else as it was saved.

    `base_model` is where the adapter's base is, if not where it was when the adapter was trained; with
    `allow_other_base` its weights may be other ones. `chat_template` is a file in place of the tokenizer's template,
    and `chat_template_kwargs` values for its names.
    """

    dtype: str | None = None
    base_model: str | None = None
    allow_other_base: bool = False
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def changes_chat_template(self) -> bool:
        return self.chat_template is not None or bool(self.chat_template_kwargs)


AS_TRAINED = Loading()


def load_target(target: Target, how: Loading = AS_TRAINED) -> LoadedTarget:
    """Load `target` on the best device, with the tokenizer that was saved with the adapter.

    Raises UsageError and AdapterError with what to do.
    """
    import torch

    from dude_cli.adapter import cast_model, check_base, load_adapter
    from dude_cli.adapter.state import base_fingerprint
    from dude_cli.system.runtime import best_device, quiet_libraries

    quiet_libraries()
    chosen = check_dtype(how.dtype)
    config, saved = _parts(target, how)
    folder = target.adapter_dir
    if folder is None or saved is None:
        with _explained(target, how):
            config = config.model_copy(update={"dtype": chosen or saved_dtype(config)})
            model = load_model(config, best_device())
        return LoadedTarget(model, target_tokenizer(target, how), config, None, None)
    if chosen is not None and config.quantization is not None:
        config = config.model_copy(update={"dtype": chosen})
    with _explained(target, how):
        model = load_model(config, best_device())
    if how.allow_other_base:
        fingerprint = base_fingerprint(model)
    else:
        try:
            check_base(model, folder, saved)
        except AdapterError as error:
            fix = f"{error.fix}, or allow another base (--allow-other-base)"
            raise AdapterError(error.what, where=error.where, fix=fix) from error
        fingerprint = saved.base_fingerprint
    # What was trained on is cast: rounded to float16 from the files, the same base would have another fingerprint.
    if chosen is not None:
        cast_model(model, model.dtype, getattr(torch, chosen))
        config = config.model_copy(update={"dtype": chosen})
    load_adapter(model, folder, allow_other_base=True)
    return LoadedTarget(model, target_tokenizer(target, how), config, saved, fingerprint)


def target_tokenizer(target: Target, how: Loading = AS_TRAINED) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_target` loads. Raises as it does."""
    from dude_cli.data.chat_template import OPTIONS, set_chat_template

    config, _ = _parts(target, how)
    with _explained(target, how):
        tokenizer = load_tokenizer(config, target.adapter_dir)
    set_chat_template(tokenizer, how.chat_template, how.chat_template_kwargs, keys=OPTIONS)
    return tokenizer


def context_length(target: Target, how: Loading = AS_TRAINED) -> int:
    """How many tokens the model of `target` is made for, by its config. Raises as `load_target` does."""
    config, _ = _parts(target, how)
    with _explained(target, how):
        return saved_context_length(config)


def check_target(target: Target, how: Loading) -> None:
    """Raise what `load_target` would for a model or a base that is not there, and for options that do not fit.

    Of the model only its config is read.
    """
    from dude_cli.system.runtime import quiet_libraries

    quiet_libraries()
    check_dtype(how.dtype)
    config, _ = _parts(target, how)
    with _explained(target, how):
        saved_dtype(config)


def _parts(target: Target, how: Loading) -> tuple[ModelConfig, SavedAdapter | None]:
    """Where the model or the base is and how it is loaded, and what the adapter says of itself, if there is one."""
    from dude_cli.adapter import read_adapter_config

    folder = target.adapter_dir
    if folder is None:
        if how.base_model is not None or how.allow_other_base:
            raise UsageError(
                f"{target} is no adapter, so it has no base model",
                where="--base-model, --allow-other-base",
                fix="give a run or an adapter, or leave these options out",
            )
        return ModelConfig(name_or_path=target.name if target.path is None else str(target.path)), None
    saved = read_adapter_config(folder)
    config = _model_config(target) or ModelConfig(
        name_or_path=saved.base_model,
        revision=saved.base_revision,
        dtype=saved.base_dtype,
        # Another one than these is not the config's: the base's own files have it.
        quantization=next((known for known in QUANTIZATIONS if known == saved.base_quantization), None),
    )
    # The commit that was trained on, not what a branch points to by now.
    moved = {"name_or_path": how.base_model, "revision": None}
    place = moved if how.base_model else {"revision": saved.base_revision}
    config = config.model_copy(update=place)
    if how.base_model is None and saved.base_revision is None:
        with _explained(target, how):
            refuse_moved_folder(config, where=f"{Path.cwd()}: {config.name_or_path}", fix="put it back")
    return config, saved


@contextmanager
def _explained(target: Target, how: Loading) -> Iterator[None]:
    """Add to an error of loading what else the user may have meant."""
    try:
        yield
    except UsageError as error:
        if target.adapter_dir is not None and how.base_model is None:
            fix = f"{error.fix}; or say where it is: --base-model FOLDER, or its name on the hub"
            raise UsageError(error.what, where=error.where, fix=fix) from error
        if target.kind == "model" and target.path is None and "/" not in target.name:
            close = _close_folders(Path(target.name))
            raise UsageError(
                f"there is no run, folder or file `{target.name}` here; as a model's name: {error.what}",
                where=str(Path.cwd()),
                fix=f"nearest: {', '.join(close)}" if close else error.fix,
            ) from error
        raise


def eval_config(target: Target) -> EvalConfig:
    """The `eval` section of a run's config; the defaults for an adapter or a model."""
    path = _config_file(target)
    return EvalConfig() if path is None else load_config(path).eval


def run_of(target: Target) -> Path | None:
    """The folder of the run that a run's, or a checkpoint's, adapter is of; None for all else."""
    if target.run_dir is not None or target.adapter_dir is None:
        return target.run_dir
    folder = target.adapter_dir.resolve().parent
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent
    return folder if (folder / "config.yaml").is_file() and (folder / "environment.json").is_file() else None


def data_config(target: Target) -> DataConfig | None:
    """The `data` section of the config of the run that a target is of, which says in what form its prompts were."""
    run = run_of(target)
    return None if run is None else load_config(run / "config.yaml").data


def results_dir(target: Target) -> Path | None:
    """Where the results of a run go by themselves; None for an adapter or a model."""
    return None if target.run_dir is None else target.run_dir / "eval"


def smoke_inputs(output_dir: str) -> Path:
    """The folder of the model and the rows that `--smoke` generates for a run: beside it, where nothing may be yet."""
    return Path(f"{output_dir}-inputs")


def _newest_run() -> Target:
    finished = {
        config: config.stat().st_mtime_ns
        for config in RUNS_DIR.rglob(f"adapter/{ADAPTER_CONFIG}")
        if (config.parent.parent / "config.yaml").is_file()
    }
    # The path decides between equal times, so that the choice is the same on every machine.
    newest_first = sorted(finished, key=lambda config: (finished[config], config.as_posix()), reverse=True)
    run = next((config.parent.parent for config in newest_first if not _is_smoke(config.parent.parent)), None)
    if run is None:
        raise UsageError(
            f"there is no finished run{', but for those of --smoke' if finished else ''}",
            where=str(RUNS_DIR),
            fix="train one with `dude train CONFIG`, or name a run, an adapter or a model",
        )
    return Target("run", str(run), run)


def _is_smoke(run: Path) -> bool:
    """Whether a run is one of `--smoke`: its model is the one that was generated for it."""
    with suppress(ConfigError):  # what is wrong with the file is told when the run is used
        config = load_config(run / "config.yaml")
        return Path(config.model.name_or_path).is_relative_to(smoke_inputs(config.output_dir))
    return False


def _folder_target(name: str, folder: Path) -> Target:
    if (folder / "config.yaml").is_file():
        if (folder / "adapter" / ADAPTER_CONFIG).is_file():
            return Target("run", name, folder)
        raise UsageError(
            f"the run `{name}` is not finished: it has no trained adapter yet",
            where=str(folder / "adapter" / ADAPTER_CONFIG),
            fix=f"finish it with `{_finishing(folder)}`{_or_a_checkpoint(folder)}",
        )
    if (folder / ADAPTER_CONFIG).is_file():
        return Target("adapter", name, folder)
    if (folder / "adapter" / ADAPTER_CONFIG).is_file():  # a checkpoint
        return Target("adapter", name, folder / "adapter")
    if (folder / "config.json").is_file():
        return Target("model", name, folder)
    raise UsageError(
        f"`{name}` is neither a run, nor an adapter, nor a model",
        where=str(folder),
        fix="a run has config.yaml, an adapter has adapter_config.json, a model has config.json",
    )


def _finishing(folder: Path) -> str:
    """The command that goes on with the run in `folder`.

    Its config names the folder as seen from where the training began: from elsewhere it would begin another run.
    """
    command = ["dude", "train", str(folder / "config.yaml")]
    with suppress(ConfigError):  # what is wrong with the file `dude train` says better
        if load_config(folder / "config.yaml").run_dir.resolve() != folder.resolve():
            command.append(f"output_dir={folder}")
    return shlex.join(command)


def _or_a_checkpoint(run: Path) -> str:
    """The newest checkpoint of a run without a result, which can be used as it is, in words; nothing without one."""
    found = [config.parent.parent for config in run.glob(f"checkpoints/step-*/adapter/{ADAPTER_CONFIG}")]
    steps = {int(number): folder for folder in found if (number := folder.name.removeprefix("step-")).isdecimal()}
    return f"; or give its newest checkpoint, {steps[max(steps)]}" if steps else ""


def _no_such_path(target: str, folder: Path) -> UsageError:
    close = _close_folders(folder)
    return UsageError(
        f"there is no folder `{target}`",
        where=str(folder.absolute().parent),
        fix=f"nearest: {', '.join(close)}" if close else "give a run, an adapter, a model folder or a hub name",
    )


def _close_folders(folder: Path) -> list[str]:
    """The folders beside `folder`, and the runs, whose names are spelt most like its own."""
    parents = [parent for parent in (RUNS_DIR, folder.parent) if parent.is_dir()]
    around = {path.name: str(path) for parent in parents for path in sorted(parent.iterdir()) if path.is_dir()}
    return [around[name] for name in nearest(folder.name, list(around))]


def _model_config(target: Target) -> ModelConfig | None:
    path = _config_file(target)
    return None if path is None else load_config(path).model


def _config_file(target: Target) -> Path | None:
    return None if target.run_dir is None else target.run_dir / "config.yaml"


def check_dtype(dtype: str | None) -> DType | None:
    """The dtype of that name. Raises UsageError for another."""
    found = next((known for known in DTYPES if known == dtype), None)
    if dtype is not None and found is None:
        close = nearest(str(dtype), list(DTYPES))
        hint = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"unknown dtype {dtype}", where="--dtype", fix=f"{hint}use one of {', '.join(DTYPES)}")
    return found
