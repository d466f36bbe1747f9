"""What must be right before step 1, and is kept: data, base model, the adapter at step 0, the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli import quickstart
from dude_cli.config import Config, DataSource, TrainConfig, dump_config
from dude_cli.console import Counter, no_counter
from dude_cli.data import DataReport, PreparedData, prepare_data, steps_per_epoch
from dude_cli.data.packing import check_packing
from dude_cli.errors import DataError, UsageError
from dude_cli.model import check_quantization, check_vocabulary, hub_commit, is_flash, load_model, load_tokenizer
from dude_cli.system import files
from dude_cli.system.memory import PeakMemory
from dude_cli.system.ranks import on_main_rank
from dude_cli.system.runtime import environment, local_main_first
from dude_cli.training.checkpoint import Origin
from dude_cli.training.cpu import product_slowdown
from dude_cli.training.disk import check_disk_space
from dude_cli.training.metrics import check_trackers
from dude_cli.training.resume import checkpoint_to_continue
from dude_cli.training.run_dir import begun_at, begun_base_revision, check_writable, clear_run
from dude_cli.training.schedule import total_steps, warmup_steps
from dude_cli.training.sharding import blocks_of
from dude_cli.training.start import Start

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dude_cli.training.estimate import MemoryEstimate

# Rows times longest row that `per_device_batch_size: auto` starts with.
AUTO_BATCH_TOKENS = 16_384
# So many times slower than in float32 is worth a line.
SLOW = 3
# A forecast reads the rows for their longest one if their file is no larger than this.
QUICK_DATA_BYTES = 32 * 2**20


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
    source_sha256: str | None  # of the adapter that the run continues from
    memory: MemoryEstimate | None  # the forecast, on the main rank; None for a model that has none
    peak_memory: PeakMemory
    origin: Origin
    checkpoint: Path | None  # to continue from

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
            "memory": self.memory.report() if self.memory is not None else None,
            "reused": self.reused,
            "init_from": self.config.adapter.init_from,
            "init_from_sha256": self.source_sha256,
        }


def prepare(
    config: Config,
    accelerator: Accelerator,
    say: Callable[[str], None],
    *,
    counter: Counter = no_counter,
    overwrite: bool = False,
    continues: bool = True,
    allow_changes: bool = False,
) -> Prepared:
    """Check everything, load, make or reuse `initial/`, and verify that the patched model is the base.

    Each rank decomposes its share; the main one writes and the others read that, so all have the same bytes. With
    `overwrite` an earlier training in the run folder is deleted, once nothing can be wrong any more; else, if it
    `continues`, the checkpoint to go on from is looked for, and refused if the run was another one and that is not
    allowed. Raises DudeError of the kind that fits, before anything is written where that can be known.
    """
    on_main_rank(accelerator, lambda: check_writable(config.run_dir))
    check_trackers(config.train.report_to)
    check_quantization(config.model)
    if config.train.weight_decay > 0 and config.adapter.has_svd_init:
        say("train.weight_decay pulls an SVD start away from the base model; 0 is usual for dude and pissa")
    # One commit for all that is read of a base from the hub, whatever its branch points to in the meantime.
    begun = None if overwrite else begun_base_revision(config)
    model_revision = begun or on_main_rank(accelerator, lambda: hub_commit(config.model))
    base = config.model.model_copy(update={"revision": model_revision or config.model.revision})
    moment = on_main_rank(accelerator, lambda: _moment(config, overwrite=overwrite).isoformat())
    tokenizer = load_tokenizer(base)
    say(f"reading the data: {', '.join(source.path for source in config.data.train)}")
    with local_main_first(accelerator):  # it encodes, the others find the rows in the cache
        data = prepare_data(config.data, tokenizer, config.seed, say, datetime.fromisoformat(moment))
    plan = make_plan(config, data, accelerator.num_processes)
    origin = Origin(accelerator.num_processes, model_revision, data.fingerprints())
    checkpoint = None
    if continues and not overwrite:
        checkpoint = checkpoint_to_continue(config.run_dir, origin, accelerator, say, allow_changes=allow_changes)
    memory = _forecast(config, plan, int(data.train.lengths.max()), say) if accelerator.is_main_process else None
    peak_memory = PeakMemory(accelerator.device)
    bits = f", quantised to {config.model.quantization}" if config.model.quantization else ""
    say(f"loading {config.model.name_or_path} in {config.model.dtype}{bits}")
    _say_slow_dtype(config.model.dtype, accelerator, say)
    model = load_model(base, accelerator.device)
    check_vocabulary(model, tokenizer)
    _say_left_out(config, model, say)
    check_positions(model, data, config.data.max_length, say)
    if config.train.distributed == "fsdp":
        blocks_of(model)  # that cannot be sharded is better known before an hour of decomposing
    on_main_rank(accelerator, lambda: check_disk_space(config, model))
    if config.data.packing:
        check_packing(model, flatten=packs_flat(config))
    first = data.train[0]
    row = first.input_ids[: first.segment_lengths[0]]  # a packed sequence may be longer than the model takes
    start = Start(config, model, row, model_revision, say, counter)
    reused = start.on_all_ranks(accelerator, overwrite=overwrite)
    record = environment(str(accelerator.device), origin.world_size, model_revision)
    record |= {"data_revisions": data.revisions, "begun_at": moment}
    on_main_rank(accelerator, lambda: _write_run(config, record, overwrite=overwrite))
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
        source_sha256=start.source_sha256(),
        memory=memory,
        peak_memory=peak_memory,
        origin=origin,
        checkpoint=checkpoint,
    )


def _moment(config: Config, *, overwrite: bool) -> datetime:
    """When the run began, which a chat template may tell: it has the same rows on whatever day it goes on."""
    return (None if overwrite else begun_at(config)) or datetime.now()


def _say_slow_dtype(dtype: str, accelerator: Accelerator, say: Callable[[str], None]) -> None:
    """One line if this CPU takes several times as long in the base's dtype: it trains, and nothing else would tell."""
    import torch

    if accelerator.device.type != "cpu" or dtype == "float32" or not accelerator.is_main_process:
        return
    slowdown = product_slowdown(getattr(torch, dtype))
    if slowdown > SLOW:
        say(f"this CPU multiplies {slowdown:.0f} times slower in {dtype} than in float32: try model.dtype=float32")


def _say_left_out(config: Config, model: PreTrainedModel, say: Callable[[str], None]) -> None:
    from dude_cli.adapter import smaller_than_rank, target_names

    names = smaller_than_rank(model, config.adapter)
    if names:
        short = target_names(model, names)
        shown = ", ".join(short[:4]) + (" ..." if len(short) > 4 else "")
        say(f"{len(names)} layers smaller than rank {config.adapter.rank} get no adapter: {shown}")


def check_positions(model: PreTrainedModel, data: PreparedData, max_length: int, say: Callable[[str], None]) -> None:
    """Raise DataError for a row that is longer than the model's table of positions; warn where they are computed."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(rows.longest_row for rows in (data.train, data.validation) if rows is not None)
    if positions is None or longest <= positions:
        return
    what = f"the longest row has {longest:,} tokens, and {model.config.name_or_path} is made for {positions:,}"
    if _has_position_table(model, positions):
        raise DataError(what, where=f"data.max_length: {max_length}", fix=f"set data.max_length to at most {positions}")
    say(f"warning: {what}: beyond that its answers may be poor; data.max_length cuts the rows")


def _has_position_table(model: PreTrainedModel, positions: int) -> bool:
    """Whether the positions are rows of a table, which end: learned ones, or GPT-J's, which are computed once."""
    from torch import nn

    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    tables += [buffer for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    vocabulary = model.get_input_embeddings().weight
    # OPT's has two rows more than positions.
    return any(positions <= len(table) <= positions + 2 for table in tables if table is not vocabulary)


def _write_run(config: Config, record: dict[str, Any], *, overwrite: bool) -> None:
    if overwrite:
        clear_run(config)
    files.write_text(config.run_dir / "config.yaml", dump_config(config))
    files.write_text(config.run_dir / "environment.json", json.dumps(record, indent=2) + "\n")


def estimate(config: Config, world_size: int) -> tuple[MemoryEstimate, str]:
    """The memory that a training would take, before anything is loaded, and where its length of rows is from.

    The rows are read for their longest one where that is quick; else each may have `data.max_length` tokens.
    Raises DudeError as `prepare` does.
    """
    from dude_cli.training.estimate import Batch, estimate_memory

    length, source = config.data.max_length, "data.max_length"
    if all(map(_is_quick, config.data.train)):
        data = prepare_data(config.data, load_tokenizer(config.model), config.seed)
        length, source = int(data.train.lengths.max()), "the longest row"
    rows, accumulation = split_batch(config.train, length, world_size)
    return estimate_memory(config, Batch(rows, length, accumulation, world_size)), source


def _is_quick(source: DataSource) -> bool:
    path = Path(source.path).expanduser()
    return source.path == quickstart.NAME or (path.is_file() and path.stat().st_size <= QUICK_DATA_BYTES)


def _forecast(config: Config, plan: Plan, length: int, say: Callable[[str], None]) -> MemoryEstimate | None:
    from dude_cli.training.estimate import Batch, estimate_memory

    batch = Batch(plan.per_device_batch_size, length, plan.gradient_accumulation_steps, plan.world_size)
    try:
        return estimate_memory(config, batch)
    except UsageError as error:  # a model without a forecast may well be trained
        say(f"no forecast: {error.what}")
        return None


def make_plan(config: Config, data: PreparedData, world_size: int) -> Plan:
    """The number of steps, and how a global batch is split over ranks and micro-batches."""
    train = config.train
    per_epoch = steps_per_epoch(len(data.train), train.global_batch_size)
    steps = total_steps(train, per_epoch)
    per_device, accumulation = split_batch(train, int(data.train.lengths.max()), world_size)
    return Plan(
        total_steps=steps,
        warmup_steps=warmup_steps(train, steps),
        steps_per_epoch=per_epoch,
        global_batch_size=train.global_batch_size,
        per_device_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        world_size=world_size,
    )


def split_batch(train: TrainConfig, longest_row: int, world_size: int) -> tuple[int, int]:
    """The rows of a micro-batch on one device, and how many of them make its part of a global batch."""
    rows_per_rank = -(-train.global_batch_size // world_size)
    if train.per_device_batch_size == "auto":
        per_device = max(1, min(rows_per_rank, AUTO_BATCH_TOKENS // longest_row))
    else:
        per_device = min(train.per_device_batch_size, rows_per_rank)
    return per_device, -(-rows_per_rank // per_device)


def evaluation_batch(rows: int, planned: int, longest_row: int) -> int:
    """The rows of a forward of an evaluation under `auto`: the training's, or fewer where rows are longer than there.

    `rows` is what memory has left of the `planned` ones, and its share of the tokens is what a forward may have.
    """
    return max(1, min(rows, AUTO_BATCH_TOKENS * rows // (planned * longest_row)))


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
    return config.data.packing and is_flash(config.model)
