"""Load the frozen base model and its tokenizer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli import quickstart
from dude_cli.config import DTYPES, HUB_NAME, DType, ModelConfig, Quantization
from dude_cli.errors import ResourceError, UsageError, is_out_of_memory, nearest
from dude_cli.system.garbage import collect_as_usual

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

UNKNOWN_CONTEXT = 2048
# Either has a vocabulary; there are other names for it beside them.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def load_model(config: ModelConfig, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The base model on `device` in `config.dtype`, quantised if asked for, in evaluation mode.

    Quantised weights are made where they stay: bitsandbytes cannot move all that belongs to them.
    Raises UsageError with what to do.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from dude_cli.adapter.weight import keep_packing

    check_quantization(config)
    path = _path(config)
    with _explained(config):
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.revision or "main",
            dtype=getattr(torch, config.dtype),
            device_map=device,
            attn_implementation=config.attn_implementation,
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,  # never a pickle, which is code
            **_quantization_options(config),
        )
    collect_as_usual()
    _check_quantized(model, config)
    keep_packing(model)
    # The name as the user knows it, not where this machine keeps the files.
    model.config._name_or_path = config.name_or_path
    return model.eval()


def load_shape(config: ModelConfig) -> tuple[PreTrainedModel, Quantization | None]:
    """The base model on the meta device, without weights, unquantised, and what they would be quantised to.

    Only the model's config is read. Raises UsageError with what to do.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with _explained(config):
        found = AutoConfig.from_pretrained(
            _path(config), revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )
        saved = getattr(found, "quantization_config", None) or {}
        if saved:
            del found.quantization_config
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                found,
                dtype=getattr(torch, config.dtype),
                # A flash kernel may be there only where the training will be; it holds what sdpa holds.
                attn_implementation="sdpa" if is_flash(config) else config.attn_implementation,
                trust_remote_code=config.trust_remote_code,
            )
    return model.eval(), config.quantization or _saved_quantization(saved, config)


def is_flash(config: ModelConfig) -> bool:
    """Whether the attention kernel is one of flash attention's."""
    return "flash" in (config.attn_implementation or "")


def load_tokenizer(config: ModelConfig, adapter_dir: Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in `adapter_dir` if it holds one, else the one beside the base model.

    Raises UsageError with what to do.
    """
    from transformers import AutoTokenizer

    has_own = adapter_dir is not None and (adapter_dir / "tokenizer_config.json").is_file()
    path = str(adapter_dir) if has_own else _path(config)
    with _explained(config):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path,
            revision="main" if has_own else config.revision or "main",
            trust_remote_code=config.trust_remote_code,
        )
    _check_tokenizer_files(tokenizer, Path(path), config)
    return tokenizer


def _check_tokenizer_files(tokenizer: PreTrainedTokenizerBase, folder: Path, config: ModelConfig) -> None:
    """Raise UsageError for a folder without a vocabulary: for some models transformers makes an empty one of it."""
    names = [name for name in tokenizer.vocab_files_names.values() if isinstance(name, str)]
    wanted = {*names, *TOKENIZER_FILES} if names else set()  # a tokenizer of bytes has no files
    if wanted and folder.is_dir() and not any((folder / name).is_file() for name in wanted):
        what, fix = _no_tokenizer(config.name_or_path)
        raise UsageError(what, where=f"model.name_or_path: {config.name_or_path}", fix=fix)


def _no_tokenizer(name: str) -> tuple[str, str]:
    files = ", or ".join(TOKENIZER_FILES)
    return (
        f"{name} has no tokenizer files that can be read",
        f"put those of the model beside its weights: {files}, with tokenizer_config.json",
    )


def hub_commit(config: ModelConfig) -> str | None:
    """The commit that `config.revision` stands for now, of a model on the hub; None for a local one.

    Offline it is the one that was downloaded last. Raises UsageError with what to do.
    """
    from huggingface_hub import hf_hub_download

    if not is_hub_name(config):
        return None
    with _explained(config):
        found = hf_hub_download(config.name_or_path, "config.json", revision=config.revision)
    return Path(found).parent.name


def is_hub_name(config: ModelConfig) -> bool:
    """Whether the model is to be found by its name on the hub. Raises UsageError for a folder that is not there."""
    return _path(config) == config.name_or_path and not Path(config.name_or_path).is_dir()


def refuse_moved_folder(config: ModelConfig, *, where: str, fix: str) -> None:
    """Raise UsageError for a base that is no folder any more, and not in the hub's cache either.

    It is for a base of which no commit is recorded: it was a folder, and the hub would be asked in vain for a minute.
    """
    from huggingface_hub import try_to_load_from_cache

    name = config.name_or_path
    if not is_hub_name(config):
        return
    if HUB_NAME.fullmatch(name) and isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    raise UsageError(f"there is no folder `{name}` here, where the adapter's base model was", where=where, fix=fix)


def saved_dtype(config: ModelConfig) -> DType:
    """The dtype that a model's files name, so that a plain model is scored as it was published; float32 if none."""
    saved = str(_saved_config(config).dtype).removeprefix("torch.")
    return next((dtype for dtype in DTYPES if dtype == saved), "float32")


def saved_context_length(config: ModelConfig) -> int:
    """How many tokens a model is made for; lm-eval's 2048 where its config does not say."""
    found = getattr(_saved_config(config).get_text_config(), "max_position_embeddings", None)
    return UNKNOWN_CONTEXT if found is None else int(found)


def _saved_config(config: ModelConfig) -> PretrainedConfig:
    from transformers import AutoConfig

    with _explained(config):
        return AutoConfig.from_pretrained(
            _path(config), revision=config.revision or "main", trust_remote_code=config.trust_remote_code
        )


def check_quantization(config: ModelConfig) -> None:
    """Raise UsageError if the base is to be quantised and bitsandbytes is not there to do it."""
    if config.quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise _needs_bitsandbytes(f"model.quantization: {config.quantization}")


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UsageError if the tokenizer knows more tokens than the model has embeddings for."""
    embeddings = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > embeddings:
        raise UsageError(
            f"the tokenizer has {len(tokenizer)} tokens and the model embeddings for {embeddings}",
            where=f"model.name_or_path: {model.config.name_or_path}",
            fix="use the tokenizer that the model was trained with",
        )


def _quantization_options(config: ModelConfig) -> dict[str, BitsAndBytesConfig]:
    """What transformers calls `config.quantization`; its defaults leave `lm_head` and what is tied as they are.

    Nothing where nothing is asked for: a given None hides from transformers that the files are quantised already.
    Without QLoRA's second quantisation, of the scales: it saves 0.37 bits a weight, and a mean in it is rounded
    otherwise with another number of threads, so that a model would not be the same base everywhere.
    """
    import torch
    from transformers import BitsAndBytesConfig

    if config.quantization is None:
        return {}
    if config.quantization == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        bnb_4bit_use_double_quant=False,
    )
    return {"quantization_config": nf4}


def _check_quantized(model: PreTrainedModel, config: ModelConfig) -> None:
    """Raise UsageError if the model's files are quantised otherwise, or nothing in it can be."""
    from dude_cli.adapter.weight import quantization

    found = quantization(model)
    if config.quantization not in (None, found):
        name = config.name_or_path
        raise UsageError(
            f"{name} is saved in {found} already" if found else f"{name} has no linear layer that can be quantised",
            where=f"model.quantization: {config.quantization}",
            fix="leave model.quantization out",
        )


def _saved_quantization(saved: dict[str, Any], config: ModelConfig) -> Quantization | None:
    """What a model's files are quantised to, by the `quantization_config` of its config."""
    if not saved:
        return None
    if saved.get("load_in_4bit"):
        return "nf4"
    if saved.get("load_in_8bit"):
        return "int8"
    raise UsageError(
        f"the memory of a model that is saved in {saved.get('quant_method', 'an unknown quantisation')} is not known",
        where=f"model.name_or_path: {config.name_or_path}",
        fix="train without a forecast",
    )


def _needs_bitsandbytes(where: str) -> UsageError:
    return UsageError(
        "a quantised base model needs bitsandbytes, which is not installed",
        where=where,
        fix="pip install bitsandbytes",
    )


def _path(config: ModelConfig) -> str:
    """Where transformers finds the model: a folder, or a hub name."""
    name = config.name_or_path
    if name == quickstart.NAME:
        return str(quickstart.MODEL_DIR)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise _no_model(name, folder)
        return str(folder)
    if folder.suffix == ".gguf" and folder.is_file():
        what, fix = _gguf(name)
        raise UsageError(what, where=f"model.name_or_path: {name}", fix=fix)
    if folder.exists() or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise UsageError(
            f"the model folder {name} {what}",
            where=f"model.name_or_path: {name}",
            fix="name a folder with config.json and the weights, or a hub name such as meta-llama/Llama-2-7b-hf",
        )
    return name


def _no_model(name: str, folder: Path) -> UsageError:
    """The error for a folder without config.json, which may be something else of use."""
    what = f"{name} is not a model: it has no config.json"
    fix = "name the folder that save_pretrained wrote, or a hub name"
    if any(folder.glob("*.gguf")):
        what, fix = _gguf(name)
    for kind, file in (("a run", "adapter/adapter_config.json"), ("an adapter", "adapter_config.json")):
        if (folder / file).is_file():
            what = f"{name} is {kind}, not a model"
            fix = f"name the base model here; a training continues from the adapter with adapter.init_from: {name}"
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:8]) or "nothing"
    return UsageError(what, where=f"model.name_or_path: {name} (holds {found})", fix=fix)


def _gguf(name: str) -> tuple[str, str]:
    return (
        f"{name} has its weights in GGUF, which cannot be trained",
        "give the original weights that it was made from: a folder with safetensors files, or a hub name",
    )


@contextmanager
def _explained(config: ModelConfig) -> Iterator[None]:
    """Turn what transformers and the hub raise into an error that says what to do."""
    name = config.name_or_path
    try:
        yield
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ResourceError(
                "out of memory while the base model was loaded",
                where=f"model.name_or_path: {name}",
                fix="use model.dtype: bfloat16 or model.quantization: nf4; with several GPUs, "
                "train.distributed: fsdp needs room for one whole copy all the same",
            ) from error
        if any(word in str(error) for word in ("attn_implementation", "FlashAttention", "`kernels`")):
            raise _attention_error(config.attn_implementation or "null", str(error)) from error
        if isinstance(error, ImportError) and "bitsandbytes" in str(error):
            raise _needs_bitsandbytes(f"model.name_or_path: {name}, whose files are quantised") from error
        what, fix = _reason(error, name)
        raise UsageError(what, where=f"model.name_or_path: {name}", fix=fix) from error


def _attention_error(attention: str, text: str) -> UsageError:
    close = [name for name in nearest(attention, ["sdpa", "eager", "flash_attention_2"]) if name != attention]
    return UsageError(
        f"the attention kernel {attention} cannot be used: {text.strip().splitlines()[0].partition('. ')[0]}",
        where=f"model.attn_implementation: {attention}",
        fix=f"{f'did you mean {close[0]}? ' if close else ''}sdpa and eager need nothing but torch",
    )


def _reason(error: BaseException, name: str) -> tuple[str, str]:
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_chain(error))
    text = str(error).strip()
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return (
            f"{name} is gated: its owner asks for an agreement",
            f"agree at https://huggingface.co/{name}, then run `hf auth login`",
        )
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"{name} has no such revision", "check model.revision"
    if any(isinstance(cause, LocalEntryNotFoundError) for cause in causes) or "couldn't connect" in text:
        return (
            f"{name} is not a local folder and the hub cannot be reached",
            f"check the name; or run `hf download {name}` where there is a network and copy the folder here",
        )
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return f"the hub has no model {name}, or it is private", "check the name, or run `hf auth login`"
    if "safetensors" in text and (".bin" in text or "no file named" in text or "not appear to have" in text):
        return (
            f"{name} has no weights in safetensors files, and pickled ones are never read",
            "load it where you trust it, and write it anew with save_pretrained",
        )
    if "backend tokenizer" in text:
        return _no_tokenizer(name)
    if "gguf" in name.lower():
        return _gguf(name)
    if "trust_remote_code" in text:
        return f"{name} needs Python code of its own to load", "read that code, then set model.trust_remote_code: true"
    return f"{name} cannot be loaded: {text.splitlines()[0] if text else type(error).__name__}", "see --debug"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
