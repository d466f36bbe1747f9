"""What must be right before step 1, and is kept: data, base model, decomposition, the check at step 0, the plan."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from dude_cli import files
from dude_cli.config import Config, dump_config
from dude_cli.data import DataReport, PreparedData, prepare_data, steps_per_epoch
from dude_cli.data.packing import check_packing
from dude_cli.errors import AdapterError
from dude_cli.metrics import check_trackers
from dude_cli.model import check_quantization, check_vocabulary, hub_commit, load_model, load_tokenizer
from dude_cli.run_dir import INITIAL, RESULT, check_writable, clear_run, initial_key
from dude_cli.runtime import environment
from dude_cli.schedule import total_steps, warmup_steps

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Rows times longest row that `per_device_batch_size: auto` starts with.
AUTO_BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class LayerReport:
    """One adapted layer; `energy_captured` is the share of ||W0||_F^2 in the initial factors, None if random."""

    name: str
    out_features: int
    in_features: int
    rank: int
    energy_captured: float | None
    trainable_parameters: int


@dataclass(frozen=True)
class Plan:
    """What the run will do. Batch sizes in rows, over all ranks where they are called global."""

    total_steps: int
    warmup_steps: int
    steps_per_epoch: int
    global_batch_size: int
    per_device_batch_size: int
    gradient_accumulation_steps: int
    world_size: int


@dataclass(frozen=True)
class Prepared:
    """A patched model and its data, ready for step 1; `reused` says that the decomposition was done before."""

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    model_revision: str | None
    data: PreparedData
    layers: list[LayerReport]
    plan: Plan
    trainable_parameters: int
    all_parameters: int
    reused: bool

    def data_fingerprints(self) -> dict[str, str]:
        """What tells other rows under the same names, for a run that continues."""
        found = {"data.train": self.data.fingerprint}
        if self.data.validation is not None:
            found["data.validation"] = self.data.validation.fingerprint()
        return found

    def report(self) -> dict[str, object]:
        """The same for machines: what `dude init --json` prints."""
        reports: dict[str, DataReport | None] = {
            "train": self.data.train_report,
            "validation": self.data.validation_report,
        }
        return {
            "run_dir": self.config.output_dir,
            "method": self.config.adapter.method,
            "layers": [asdict(layer) for layer in self.layers],
            "trainable_parameters": self.trainable_parameters,
            "all_parameters": self.all_parameters,
            "data": {name: asdict(report) for name, report in reports.items() if report is not None},
            "plan": asdict(self.plan),
            "reused": self.reused,
        }


def prepare(
    config: Config, accelerator: Accelerator, say: Callable[[str], None], *, overwrite: bool = False
) -> Prepared:
    """Check everything, load, decompose or reuse `initial/`, and verify that the patched model is the base.

    The main rank decomposes and writes; the others read what it wrote, so all have the same bytes. With `overwrite`
    an earlier training in the run folder is deleted, once nothing can be wrong any more.
    Raises DudeError of the kind that fits, before anything is written where that can be known.
    """
    if accelerator.is_main_process:
        check_writable(config.run_dir)
    check_trackers(config.train.report_to)
    check_quantization(config.model)
    if config.train.weight_decay > 0 and config.adapter.has_svd_init:
        say("train.weight_decay pulls an SVD start away from the base model; 0 is usual for dude and pissa")
    tokenizer = load_tokenizer(config.model)
    say(f"reading the data: {', '.join(source.path for source in config.data.train)}")
    data = prepare_data(config.data, tokenizer, config.seed)
    bits = f", quantised to {config.model.quantization}" if config.model.quantization else ""
    say(f"loading {config.model.name_or_path} in {config.model.dtype}{bits}")
    model = load_model(config.model, accelerator.device)
    check_vocabulary(model, tokenizer)
    if config.data.packing:
        check_packing(model, flatten=packs_flat(config))
    model_revision = hub_commit(config.model)
    plan = make_plan(config, data, accelerator.num_processes)
    reused = _initial_adapter(config, model, model_revision, accelerator, say)
    if accelerator.is_main_process:
        check_step_zero(model, data, config.output_dir)
        if overwrite:
            clear_run(config)
        record = environment(str(accelerator.device), accelerator.num_processes, model_revision)
        files.write_text(config.run_dir / "config.yaml", dump_config(config))
        files.write_text(config.run_dir / "environment.json", json.dumps(record, indent=2) + "\n")
    accelerator.wait_for_everyone()  # no rank may find the checkpoints of a run that is being cleared
    layers = layer_reports(model)
    return Prepared(
        config=config,
        model=model,
        tokenizer=tokenizer,
        model_revision=model_revision,
        data=data,
        layers=layers,
        plan=plan,
        trainable_parameters=sum(layer.trainable_parameters for layer in layers),
        all_parameters=model.num_parameters(),
        reused=reused,
    )


def make_plan(config: Config, data: PreparedData, world_size: int) -> Plan:
    """The number of steps, and how a global batch is split over ranks and micro-batches."""
    train = config.train
    per_epoch = steps_per_epoch(len(data.train), train.global_batch_size)
    steps = total_steps(train, per_epoch)
    rows_per_rank = -(-train.global_batch_size // world_size)
    if train.per_device_batch_size == "auto":
        fitting = AUTO_BATCH_TOKENS // int(data.train.lengths.max())
        per_device = max(1, min(rows_per_rank, fitting))
    else:
        per_device = min(train.per_device_batch_size, rows_per_rank)
    return Plan(
        total_steps=steps,
        warmup_steps=warmup_steps(train, steps),
        steps_per_epoch=per_epoch,
        global_batch_size=train.global_batch_size,
        per_device_batch_size=per_device,
        gradient_accumulation_steps=-(-rows_per_rank // per_device),
        world_size=world_size,
    )


def check_step_zero(model: PreTrainedModel, data: PreparedData, where: str) -> None:
    """Raise AdapterError unless the patched model's logits on a training row are the base's, bit for bit."""
    import torch

    from dude_cli.adapter import disable_adapters

    ids = torch.tensor([data.train[0].input_ids], device=next(model.parameters()).device)
    with torch.no_grad():
        patched = model(input_ids=ids, use_cache=False).logits
        with disable_adapters(model):
            base = model(input_ids=ids, use_cache=False).logits
    if not torch.equal(patched, base):
        difference = float((patched.float() - base.float()).abs().max())
        raise AdapterError(
            f"the patched model is not the base model at step 0: logits differ by up to {difference:.3g}",
            where=where,
            fix="if the base gives infinite or NaN values in this dtype, try model.dtype: float32; else report this",
        )


def layer_reports(model: PreTrainedModel) -> list[LayerReport]:
    from dude_cli.adapter import adapter_layers

    return [
        LayerReport(
            name=name,
            out_features=layer.lora_B.shape[0],
            in_features=layer.lora_A.shape[1],
            rank=layer.rank,
            energy_captured=layer.energy_captured(),
            trainable_parameters=sum(p.numel() for p in layer.parameters() if p.requires_grad),
        )
        for name, layer in adapter_layers(model).items()
    ]


def packs_flat(config: Config) -> bool:
    """Flash attention finds the borders of packed rows only in a batch of one sequence."""
    return config.data.packing and "flash" in config.model.attn_implementation


def _initial_adapter(
    config: Config,
    model: PreTrainedModel,
    model_revision: str | None,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> bool:
    """Patch `model` with the adapter of `initial/`, made first if it is not there or not of this config.

    Returns whether it was there. The main rank makes it, the others read it.
    """
    from dude_cli.adapter import load_adapter

    reused = False
    if accelerator.is_main_process:
        reused = _reuse(config, model, say)
        if not reused:
            _decompose(config, model, model_revision, say)
    accelerator.wait_for_everyone()
    if not accelerator.is_main_process:
        load_adapter(model, config.run_dir / INITIAL / RESULT, config.adapter)
    return reused


def _reuse(config: Config, model: PreTrainedModel, say: Callable[[str], None]) -> bool:
    from dude_cli.adapter import load_adapter

    folder = config.run_dir / INITIAL
    if initial_key(folder) != _decomposition_key(config):
        return False
    try:
        load_adapter(model, folder / RESULT, config.adapter)
    except AdapterError as error:
        say(f"{folder} does not fit and is made anew: {error.what}")
        return False
    say(f"reusing the decomposition of {folder}")
    return True


def _decompose(config: Config, model: PreTrainedModel, model_revision: str | None, say: Callable[[str], None]) -> None:
    from dude_cli.adapter import patch_model, save_adapter

    patch_model(model, config.adapter, seed=config.seed, on_layer=_tell_layers(config, say))
    with files.new_folder(config.run_dir / INITIAL) as partial:
        save_adapter(model, partial / RESULT, base_revision=model_revision)
        files.write_text(partial / "key", _decomposition_key(config))


def _decomposition_key(config: Config) -> str:
    """What the initial adapter depends on, as a hash; the base's weights have their own fingerprint in it."""
    model = config.model.model_dump(mode="json", include={"name_or_path", "revision", "dtype", "quantization"})
    kept = {"method", "rank", "target_modules", "exclude_modules", "svd"}
    adapter = config.adapter.model_dump(mode="json", include=kept)
    parts = [model, adapter, config.adapter.scaling, config.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _tell_layers(config: Config, say: Callable[[str], None]) -> Callable[[str, int, int], None]:
    what = "decomposing" if config.adapter.has_svd_init else "patching"

    def tell(name: str, number: int, count: int) -> None:
        if number == 1 or number % 32 == 0:
            say(f"{what} layer {number}/{count}: {name}")

    return tell
