"""What must be right before step 1, and is kept: data, base model, the adapter at step 0, the plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.config import Config, ModelConfig, dump_config
from dude_cli.console import Counter, no_counter
from dude_cli.data import (
    DataReport,
    PreparedData,
    as_trained,
    check_packing,
    default_template,
    prepare_data,
    set_chat_template,
)
from dude_cli.errors import UsageError
from dude_cli.model import (
    check_quantization,
    check_vocabulary,
    hub_commit,
    load_model,
    load_shape,
    load_tokenizer,
)
from dude_cli.system import files
from dude_cli.system.memory import PeakMemory
from dude_cli.system.ranks import on_main_rank
from dude_cli.system.runtime import environment, local_main_first
from dude_cli.training.checkpoint import Origin
from dude_cli.training.cpu import product_slowdown
from dude_cli.training.disk import check_disk_space
from dude_cli.training.forecast import forecast
from dude_cli.training.init_from import source_run, template_note
from dude_cli.training.plan import Plan, make_plan, packs_flat
from dude_cli.training.positions import check_positions
from dude_cli.training.resume import begun_at, begun_base_revision, checkpoint_to_continue, refuse_moved_base
from dude_cli.training.run_dir import check_writable, clear_run, has_steps
from dude_cli.training.sharding import blocks_of
from dude_cli.training.start import Start
from dude_cli.training.trackers import check_trackers
from dude_cli.training.trained_rows import record_trained_rows
from dude_cli.training.untrained import untrained_ends

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dude_cli.data import EncodedRows
    from dude_cli.training.estimate import MemoryEstimate

# So many times slower than in float32 is worth a line.
SLOW = 3


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
class Prepared:
    """A patched model and its data, ready for step 1; `reused` says that the decomposition was done before."""

    config: Config
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    data: PreparedData
    layers: list[LayerReport]
    plan: Plan
    all_parameters: int
    reused: bool
    source_sha256: str | None  # of the adapter that the run continues from
    memory: MemoryEstimate | None  # the forecast, on the main rank; None for a model that has none
    peak_memory: PeakMemory
    origin: Origin
    checkpoint: Path | None  # to continue from
    warnings: list[str]  # what may spoil the result

    @property
    def trainable_parameters(self) -> int:
        return sum(layer.trainable_parameters for layer in self.layers)

    def report(self) -> dict[str, object]:
        """What `dude init --json` prints: layers, data, plan, memory, and where the start comes from."""
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
    on_main_rank(accelerator, lambda: check_trackers(config.train.report_to))
    check_quantization(config.model)
    if config.train.weight_decay > 0 and config.adapter.has_svd_init:
        say("train.weight_decay pulls an SVD start away from the base model; 0 is usual for dude and pissa")
    # One commit for all that is read of a base from the hub, whatever its branch points to in the meantime.
    if not overwrite:
        refuse_moved_base(config)
    begun = None if overwrite else begun_base_revision(config)
    model_revision = begun or on_main_rank(accelerator, lambda: hub_commit(config.model))
    base = config.model.model_copy(update={"revision": model_revision or config.model.revision})
    moment = on_main_rank(accelerator, lambda: _moment(config, overwrite=overwrite).isoformat())
    tokenizer = load_tokenizer(base)
    on_main_rank(accelerator, lambda: _check_fit(config, base, tokenizer))
    set_chat_template(tokenizer, config.data.chat_template, config.data.chat_template_kwargs, say)
    note = template_note(config, tokenizer)
    if note:
        say(note)
    _check_tasks(config, tokenizer)
    say(f"reading the data: {', '.join(source.path for source in config.data.train)}")
    with local_main_first(accelerator):  # it encodes, the others find the rows in the cache
        data = prepare_data(config.data, tokenizer, config.seed, say, datetime.fromisoformat(moment))
    plan = make_plan(config, data, accelerator.num_processes)
    if plan.global_batch_size < config.train.global_batch_size:
        what = f"{plan.global_batch_size} {'sequences' if config.data.packing else 'rows'}"
        asked = config.train.global_batch_size
        say(f"note: train.global_batch_size is {asked}, and there are {what}: each step takes all of them")
    origin = Origin(accelerator.num_processes, model_revision, data.fingerprints())
    checkpoint = None
    if continues and not overwrite:
        checkpoint = checkpoint_to_continue(config.run_dir, origin, accelerator, say, allow_changes=allow_changes)
    memory = None
    if accelerator.is_main_process:
        pinned = config.model_copy(update={"model": base})
        memory = forecast(pinned, plan, int(data.train.lengths.max()), say)
    peak_memory = PeakMemory(accelerator.device)
    model = _load_base(config, base, tokenizer, data, accelerator, say)
    ends = on_main_rank(accelerator, lambda: untrained_ends(model, tokenizer, config))
    first = data.train[0]
    row = first.input_ids[: first.segment_lengths[0]]  # a packed sequence may be longer than the model takes
    start = Start(config, model, row, model_revision, say, counter)
    reused = start.on_all_ranks(accelerator, overwrite=overwrite)
    record = environment(str(accelerator.device), origin.world_size, model_revision)
    record |= {"data_revisions": data.revisions, "begun_at": moment}
    on_main_rank(accelerator, lambda: _write_run(config, record, data.train, overwrite=overwrite))
    return Prepared(
        config=config,
        model=model,
        tokenizer=tokenizer,
        data=data,
        layers=layer_reports(model),
        plan=plan,
        all_parameters=model.num_parameters(),
        reused=reused,
        source_sha256=start.source_sha256(),
        memory=memory,
        peak_memory=peak_memory,
        origin=origin,
        checkpoint=checkpoint,
        warnings=[f"warning: {line}" for line in (*data.warnings(), *ends)],
    )


def _check_fit(config: Config, base: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UsageError for targets, a rank or a vocabulary that do not fit the base, by its config: before any reading.

    A model that cannot be made without its weights is looked at when it is loaded.
    """
    from dude_cli.adapter import find_targets
    from dude_cli.adapter.patch import check_ranks

    try:
        model, _ = load_shape(base)
    except UsageError:
        return
    check_vocabulary(model, tokenizer)
    check_ranks(find_targets(model, config.adapter), config.adapter.rank)


def _check_tasks(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise DudeError for a task of `eval.tasks` that cannot be asked: after hours of training it would be a pity.

    That is one to be asked as a chat where there is no chat template, or rows that are not of the training's form.
    """
    for task in config.eval.tasks:
        if task.apply_chat_template:
            default_template(tokenizer, f"eval.tasks: {task.name}, apply_chat_template")
        if task.rows is not None:
            as_trained(task.rows, config.data, config.data.max_length)


def _load_base(
    config: Config,
    base: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: PreparedData,
    accelerator: Accelerator,
    say: Callable[[str], None],
) -> PreTrainedModel:
    """The base model, with all that can be wrong with it known: better now than after an hour of decomposing."""
    bits = f", quantised to {base.quantization}" if base.quantization else ""
    say(f"loading {base.name_or_path} in {base.dtype}{bits}")
    _say_slow_dtype(base.dtype, accelerator, say)
    model = load_model(base, accelerator.device)
    check_vocabulary(model, tokenizer)
    _say_left_out(config, model, say)
    check_positions(model, data, config.data.max_length, say)
    if config.train.distributed == "fsdp":
        blocks_of(model)
    on_main_rank(accelerator, lambda: check_disk_space(config, model, tokenizer))
    if config.data.packing:
        check_packing(model, flatten=packs_flat(config))
    return model


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


def _write_run(config: Config, record: dict[str, Any], rows: EncodedRows, *, overwrite: bool) -> None:
    if overwrite:
        clear_run(config)
    begun = config.run_dir if has_steps(config.run_dir) else None
    record_trained_rows(config.run_dir, rows, begun, source_run(config))
    files.write_text(config.run_dir / "config.yaml", dump_config(config))
    files.write_text(config.run_dir / "environment.json", json.dumps(record, indent=2) + "\n")


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
