"""Trained adapters on small bases, as folders on disk: what exports start from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model, train_a_little
from transformers import AutoModelForCausalLM, AutoTokenizer

from dude_cli import quickstart
from dude_cli.adapter import AdapterConfig, patch_model, save_adapter
from dude_cli.target import LoadedTarget, find_target, load_target


def save_base(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A tiny model with a tokenizer beside it, as a model folder."""
    tiny_model(kind, dtype, **settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(quickstart.MODEL_DIR).save_pretrained(folder)
    return folder


def save_trained(folder: Path, base: Path, config: AdapterConfig, dtype: torch.dtype = torch.float32) -> Path:
    """An adapter folder, after real optimizer steps on `base`."""
    model = patch_model(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), config)
    train_a_little(model)
    save_adapter(model, folder)
    return folder


def trained_target(folder: Path, kind: str, config: AdapterConfig, dtype: torch.dtype = torch.float32) -> LoadedTarget:
    """A base and a trained adapter on it, written to `folder` and loaded as `dude export` does."""
    base = save_base(folder / "base", kind, dtype)
    return load_target(find_target(str(save_trained(folder / "adapter", base, config, dtype))))
