"""Load what `find_target` found: the base model, its adapter if there is one, the tokenizer, the run's settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dude_cli.config import DTYPES, DType, EvalConfig, ModelConfig
from dude_cli.config_file import load_config
from dude_cli.errors import UsageError
from dude_cli.eval_target import Target
from dude_cli.model import load_model, load_tokenizer, saved_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class LoadedTarget:
    """A model ready to be used; `adapter_sha256` is None without an adapter."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter_sha256: str | None


def load_target(target: Target, dtype: str | None) -> LoadedTarget:
    """Load `target` on the best device, in `dtype`, else in the one it was trained with, else as it was saved."""
    from dude_cli.adapter import load_adapter, read_adapter_config
    from dude_cli.runtime import best_device, quiet_libraries

    quiet_libraries()
    chosen = _check_dtype(dtype)
    if target.adapter_dir is None:
        name = target.name if target.path is None else str(target.path)
        config = ModelConfig(name_or_path=name, dtype=chosen or saved_dtype(name))
        return LoadedTarget(load_model(config).to(best_device()), load_tokenizer(config), None)
    saved = read_adapter_config(target.adapter_dir)
    config = _model_config(target) or ModelConfig(
        name_or_path=saved.base_model, revision=saved.base_revision, dtype=saved.base_dtype
    )
    if chosen is not None:
        config = config.model_copy(update={"dtype": chosen})
    model = load_model(config).to(best_device())
    load_adapter(model, target.adapter_dir)
    return LoadedTarget(model, load_tokenizer(config), saved.sha256)


def eval_config(target: Target) -> EvalConfig:
    """The `eval` section of a run's config; the defaults for an adapter or a model."""
    path = _config_file(target)
    return EvalConfig() if path is None else load_config(path).eval


def results_dir(target: Target) -> Path | None:
    """Where the results of a run go by themselves; None for an adapter or a model."""
    return target.path / "eval" if target.kind == "run" and target.path is not None else None


def _model_config(target: Target) -> ModelConfig | None:
    path = _config_file(target)
    return None if path is None else load_config(path).model


def _config_file(target: Target) -> Path | None:
    return target.path / "config.yaml" if target.kind == "run" and target.path is not None else None


def _check_dtype(dtype: str | None) -> DType | None:
    found = next((known for known in DTYPES if known == dtype), None)
    if dtype is not None and found is None:
        raise UsageError(f"unknown dtype {dtype}", where="--dtype", fix=f"use one of {', '.join(DTYPES)}")
    return found
