"""The merged model: the adapted weights in place of the base's, for anything that loads with transformers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from dude_cli.config import DType, ModelConfig
from dude_cli.errors import UsageError
from dude_cli.export.probe import check, difference, probe_logits, tolerance
from dude_cli.export.report import ExportReport
from dude_cli.model import load_model
from dude_cli.system import files
from dude_cli.training.model_card import merged_card

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from dude_cli.target import LoadedTarget

SHARD_SIZE = "5GB"
# What turns images, sound and video into a model's inputs.
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
# What a generation config says of the random choice of a token.
SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")


def export_merged(
    loaded: LoadedTarget,
    out: Path,
    dtype: DType,
    ends: Collection[int] = (),
    say: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write W' = (m / ||V||) V, computed in float32 and saved in `dtype`, as a model of its own to `out`.

    `ends` are the tokens at which its answers are to end, if not those of the base's generation config.

    The weights are merged layer by layer in place and written shard by shard, so the model in memory, which is used up,
    is all that it takes. What was written is loaded again and compared on the probe.
    Raises AdapterError, with nothing left at `out`, past the tolerance of the coarser dtype; UsageError, before
    anything is merged, for a generation config that transformers does not save.
    """
    from dude_cli.adapter import merge_adapter

    model = loaded.model
    if model.generation_config is not None:
        _settle(model.generation_config, ends, loaded.config, say)
    device = next(model.parameters()).device
    allowed, expected = tolerance(model, dtype, loaded.config.dtype), probe_logits(model)
    with files.fresh_folder(out) as partial:
        merge_adapter(model, dtype)
        with files.disk_errors(partial):
            model.save_pretrained(partial, max_shard_size=SHARD_SIZE)
        files.save_tokenizer(loaded.tokenizer, partial)
        if model.config.sub_configs:
            _copy_processor(loaded.config, partial)
        model.to_empty(device="meta")  # before the second model is loaded, the first gives its memory back
        place = {"name_or_path": str(partial), "revision": None, "dtype": dtype, "quantization": None}
        written = load_model(loaded.config.model_copy(update=place), device)
        found = difference(probe_logits(written), expected)
        check(found, allowed, f"the merged model in {dtype}")
        card = merged_card(loaded.saved, dtype, str(found), trust_remote_code=loaded.config.trust_remote_code)
        files.write_text(partial / "README.md", card)
    return ExportReport("merged", out, dtype, found, allowed, loaded.saved.base_quantization)


def _settle(settings: GenerationConfig, ends: Collection[int], base: ModelConfig, say: Callable[[str], None]) -> None:
    """Give the generation config its end tokens, and make it one that transformers saves."""
    if ends:
        settings.eos_token_id = sorted(ends)
    keys = [key for key in SAMPLING_KEYS if getattr(settings, key, None) is not None]
    if keys and settings.do_sample is not True and _refusal(settings) is not None:
        if settings.temperature == 0:  # the likeliest token in other words, and nothing that can be sampled with
            settings.update(**dict.fromkeys(keys))
            done = "they are left out, for a temperature of 0 is the likeliest token"
        else:
            # Servers follow the keys without it, so with it the model answers there as its base does.
            settings.do_sample = True
            done = "do_sample is true in the merged model, so they keep their meaning"
        say(f"note: the base's generation config has {', '.join(keys)} without do_sample; {done}")
    refusal = _refusal(settings)
    if refusal is not None:
        raise UsageError(
            f"transformers does not save the base's generation config: {refusal}",
            where=f"{base.name_or_path}: generation_config.json",
            fix="correct it in a copy of the base, and export with --base-model FOLDER",
        )


def _refusal(settings: GenerationConfig) -> str | None:
    """Why transformers does not save a generation config that was changed; None if it does."""
    try:
        settings.validate(strict=True)
    except ValueError as error:
        return " ".join(line.strip("- ") for line in str(error).splitlines()[:2])
    return None


def _copy_processor(config: ModelConfig, folder: Path) -> None:
    """Copy the processor's files of the base, where it has some: a model for images is of no use without them."""
    from transformers.utils import cached_file

    for name in PROCESSOR_FILES:
        found = cached_file(
            config.name_or_path,
            name,
            revision=config.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,  # offline, what was not downloaded may not be there
        )
        if found is not None:
            shutil.copyfile(found, folder / name)
