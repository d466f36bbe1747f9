"""The adapter at step 0: decomposed, or one to continue from; kept in `initial/`, checked, the same on each rank."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dude_cli.config import Config
from dude_cli.console import Counter
from dude_cli.errors import AdapterError
from dude_cli.system import files
from dude_cli.system.cache_dir import cache_dir
from dude_cli.system.ranks import failing_together, on_main_rank
from dude_cli.training.decompositions import decompose_on_all_ranks
from dude_cli.training.init_from import keeps_own_start, source_folder, source_sha256
from dude_cli.training.overwritten import finding_overwritten
from dude_cli.training.run_dir import INITIAL, RESULT, initial_key
from dude_cli.training.uncalled import refusing_uncalled

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from dude_cli.adapter import DecompositionCache
    from dude_cli.adapter.decompose import PrincipalFactors


@dataclass(frozen=True)
class Start:
    """Patches `model` with the adapter at step 0; `row_ids` are the tokens that it is checked on."""

    config: Config
    model: PreTrainedModel
    row_ids: Sequence[int]
    model_revision: str | None
    say: Callable[[str], None]
    counter: Counter

    def on_all_ranks(self, accelerator: Accelerator, *, overwrite: bool) -> bool:
        """Patch with the adapter of `initial/`, made first if it is not there or not of this config.

        Returns whether it was there. All ranks decompose, the main one makes and checks it, the others read it.
        Raises UsageError for a target layer that the model does not call, and AdapterError unless the base model is
        still there, bit for bit; see `_check`.
        """
        base_logits, seen = None, set[str]()
        with failing_together(accelerator):
            if accelerator.is_main_process:
                base_logits, seen = self._base_logits()
        overwritten = on_main_rank(accelerator, lambda: sorted(seen))
        reused = on_main_rank(accelerator, lambda: self._reuse(overwrite=overwrite))
        found = None if reused else self._decompose(accelerator)
        on_main_rank(accelerator, lambda: self._make_checked(found, base_logits))
        if not accelerator.is_main_process:
            self._load(self.config.run_dir / INITIAL / RESULT)
        self._keep_outputs_of(overwritten)
        return reused

    def _base_logits(self) -> tuple[torch.Tensor, set[str]]:
        """Those of the model before it is patched, and the target layers whose output it writes over.

        Raises UsageError for one that it does not call: that is better known before an hour of decomposing.
        """
        from dude_cli.adapter import find_targets

        targets = find_targets(self.model, self.config.adapter)
        with refusing_uncalled(targets), finding_overwritten(targets) as overwritten:
            logits = self._logits()
        return logits, overwritten

    def _keep_outputs_of(self, names: Sequence[str]) -> None:
        from dude_cli.adapter import adapter_layers

        layers = adapter_layers(self.model)
        for name in names:
            layers[name].returns_copy = layers[name].magnitude is not None

    def _make_checked(self, found: dict[str, PrincipalFactors] | None, base_logits: torch.Tensor | None) -> None:
        assert base_logits is not None
        if found is not None:
            self._make(found)
        self._check(base_logits)

    def source_sha256(self) -> str | None:
        """What identifies the adapter that the run continues from, by the copy in `initial/`; None without one."""
        from dude_cli.adapter import read_adapter_config

        if self.config.adapter.init_from is None:
            return None
        return read_adapter_config(self.config.run_dir / INITIAL / RESULT).sha256

    def _reuse(self, *, overwrite: bool) -> bool:
        folder = self.config.run_dir / INITIAL
        is_kept = keeps_own_start(self.config) and not overwrite
        if not is_kept and initial_key(folder) != initial_adapter_key(self.config):
            return False
        try:
            self._load(folder / RESULT)
        except AdapterError as error:
            self.say(f"{folder} does not fit and is made anew: {error.what}")
            return False
        self.say(f"reusing the {'decomposition' if self.config.adapter.init_from is None else 'copy'} of {folder}")
        return True

    def _decompose(self, accelerator: Accelerator) -> dict[str, PrincipalFactors]:
        """The layers' decompositions, on the main rank; none if the start needs none."""
        from dude_cli.adapter.decompose import decompose_layer

        adapter = self.config.adapter
        if adapter.init_from is not None or not adapter.has_svd_init:
            return {}
        cache = self._cache()
        decompose = decompose_layer if cache is None else cache.decompose
        with self.counter("decompositions") as on_layer:
            found = decompose_on_all_ranks(self.model, adapter, accelerator, decompose, on_layer)
        if cache is not None and cache.hits:
            self.say(f"{cache.hits} decompositions were in {cache.folder}")
        if cache is not None and accelerator.is_local_main_process:
            cache.prune()
        return found

    def _cache(self) -> DecompositionCache | None:
        from dude_cli.adapter import DecompositionCache

        try:
            return DecompositionCache(cache_dir("decompositions"), self.say)
        except RuntimeError as error:  # no home folder
            self.say(f"decompositions are not kept: {error}")
            return None

    def _make(self, found: dict[str, PrincipalFactors]) -> None:
        from dude_cli.adapter import patch_model, save_adapter

        if self.config.adapter.init_from is None:
            # Handed over one by one: the layers have copies of their own.
            patch_model(
                self.model, self.config.adapter, seed=self.config.seed, decompose=lambda name, *_: found.pop(name)
            )
            source_logits = None
        else:
            source_logits = self._load_source()
        with files.new_folder(self.config.run_dir / INITIAL) as partial:
            save_adapter(self.model, partial / RESULT, base_revision=self.model_revision)
            if source_logits is not None:
                self._take_copy(partial / RESULT, source_logits)
            files.write_text(partial / "key", initial_adapter_key(self.config))

    def _load_source(self) -> torch.Tensor:
        """Patch with the adapter that the run continues from, under its own settings; return the logits then."""
        from dude_cli.adapter import load_adapter

        source = source_folder(self.config)
        self.say(f"continuing from the adapter of {source}")
        load_adapter(self.model, source)
        return self._logits()

    def _take_copy(self, folder: Path, source_logits: torch.Tensor) -> None:
        """Patch with the copy under this run's settings. Raises AdapterError unless it gives the source's logits."""
        from dude_cli.adapter import unpatch_model

        unpatch_model(self.model)
        self._load(folder)
        what = f"the start is not the adapter of {self.config.adapter.init_from}"
        self._check_equal(self._logits(), source_logits, what)

    def _load(self, folder: Path) -> None:
        from dude_cli.adapter import load_adapter

        # The adapter that comes out is whole without the one that it continues from.
        load_adapter(self.model, folder, self.config.adapter.model_copy(update={"init_from": None}))

    def _check(self, base_logits: torch.Tensor) -> None:
        """Raise AdapterError unless the model has the base's logits from before it was patched, bit for bit.

        At step 0 it must; one that continues from a trained adapter, with its adapters disabled.
        """
        from dude_cli.adapter import disable_adapters

        continues = self.config.adapter.init_from is not None
        with disable_adapters(self.model) if continues else nullcontext():
            logits = self._logits()
        when = "with its adapters disabled" if continues else "at step 0"
        self._check_equal(logits, base_logits, f"the patched model is not the base model {when}")

    def _check_equal(self, logits: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
        import torch

        if not torch.equal(logits, wanted):
            difference = float((logits.float() - wanted.float()).abs().max())
            raise AdapterError(
                f"{what}: logits differ by up to {difference:.3g}",
                where=self.config.output_dir,
                fix="if the base gives infinite or NaN values in this dtype, try model.dtype: float32; "
                "else report this",
            )

    def _logits(self) -> torch.Tensor:
        import torch

        ids = torch.tensor([self.row_ids], device=next(self.model.parameters()).device)
        with torch.no_grad():
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits


def initial_adapter_key(config: Config) -> str:
    """What the initial adapter depends on, as a hash; the base's weights have their own fingerprint in it."""
    model = config.model.model_dump(mode="json", include={"name_or_path", "revision", "dtype", "quantization"})
    kept = {"method", "rank", "target_modules", "exclude_modules", "svd"}
    adapter = config.adapter.model_dump(mode="json", include=kept)
    seed = None if config.adapter.has_svd_init else config.seed
    parts = [model, adapter, config.adapter.scaling, seed]
    if config.adapter.init_from is not None:
        parts.append(source_sha256(config))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
