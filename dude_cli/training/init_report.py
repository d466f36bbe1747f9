"""What `dude init` shows: the layers, the data, an example with its masked part dimmed, the planned steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dude_cli.data import DataReport
from dude_cli.system.memory import RESIDENT_SET, device_bytes, human_bytes
from dude_cli.training.decompositions import CheckedLayer
from dude_cli.training.plan import Plan
from dude_cli.training.prepare import LayerReport, Prepared

if TYPE_CHECKING:
    from dude_cli.training.estimate import MemoryEstimate


def init_report(prepared: Prepared, checked: Sequence[CheckedLayer] = ()) -> RenderableType:
    """The whole report, for a rich console; `checked` are layers whose decomposition was compared with an exact one."""
    share = prepared.trainable_parameters / prepared.all_parameters
    return Group(
        _layer_table(prepared.layers),
        f"trainable: {prepared.trainable_parameters:,} of {prepared.all_parameters:,} parameters ({share:.2%}), "
        f"{prepared.config.adapter.method}, scaling {prepared.config.adapter.scaling:g}; {_start(prepared)}",
        *_checked_line(checked),
        "",
        _data_table(prepared),
        "",
        Text("one training row, what is not learned is dim:"),
        _example(prepared.data.train_report),
        "",
        _plan_line(prepared.plan, prepared),
        *([_memory_line(prepared.memory, prepared)] if prepared.memory is not None else []),
    )


def memory_table(estimate: MemoryEstimate, device: str, device_bytes: int, length_source: str) -> RenderableType:
    """The forecast by part, in bytes and in units that can be read, against what the device has."""
    batch = estimate.batch
    table = Table(title="predicted memory of one device, at its most", title_justify="left")
    for name in ("phase", "part", "bytes", ""):
        table.add_column(name, justify="left" if name in ("phase", "part") else "right")
    for phase, parts in estimate.phases.items():
        for number, (part, size) in enumerate(parts.items()):
            table.add_row("" if number else phase, part, f"{size:,}", human_bytes(size))
        total = sum(parts.values())
        table.add_row("", "total", f"{total:,}", human_bytes(total), style="bold", end_section=True)
    fits = "fits" if estimate.peak_bytes <= device_bytes else "does NOT fit"
    return Group(
        table,
        f"micro-batches of {batch.rows} rows of {batch.length} tokens ({length_source}); in a step "
        f"{batch.world_size} ranks x {batch.gradient_accumulation_steps} micro-batches",
        f"peak: {human_bytes(estimate.peak_bytes)}, in {estimate.peak_phase}; {device} has "
        f"{human_bytes(device_bytes)}: it {fits}",
        "not counted: scratch space inside of kernels, and what the allocator keeps beside",
    )


def memory_line(summary: dict[str, Any]) -> list[str]:
    """What a finished training says of its memory; nothing for a run that recorded none."""
    memory = summary["memory"]
    if memory is None:
        return []
    predicted = memory["predicted_training_bytes"]
    forecast = "no forecast" if predicted is None else f"predicted {human_bytes(predicted)}"
    measured = human_bytes(memory["measured_training_bytes"])
    if memory["measured"] == RESIDENT_SET:  # the forecast is of tensors alone, so the two are not of the same
        measured += " (resident set, what libraries take too)"
    return [f"peak memory of the training: {measured}, {forecast}"]


def _memory_line(estimate: MemoryEstimate, prepared: Prepared) -> str:
    size = device_bytes(prepared.peak_memory.device)
    line = f"memory: {human_bytes(estimate.peak_bytes)} at most, in {estimate.peak_phase}"
    if estimate.peak_bytes <= size:
        return line
    return f"{line}; the device has {human_bytes(size)}: lower train.per_device_batch_size or data.max_length"


def _start(prepared: Prepared) -> str:
    if prepared.source_sha256 is None:
        return "at step 0 the patched model is the base model, bit for bit"
    source = f"{prepared.config.adapter.init_from} (sha256 {prepared.source_sha256[:12]})"
    return f"at step 0 it is the adapter of {source}, and with adapters disabled the base model, bit for bit"


def _checked_line(checked: Sequence[CheckedLayer]) -> list[str]:
    if not checked:
        return []
    shares = ", ".join(f"{layer.name} {layer.share:.3%}" for layer in checked)
    return [
        f"sum of the singular values in the initial factors, of the largest exact ones, in sampled layers: {shares}"
    ]


def _layer_table(layers: list[LayerReport]) -> Table:
    """One line for all layers of one kind and shape: a 7B model has 224 layers of 7 kinds."""
    table = Table(title="adapted layers", title_justify="left")
    for name in ("layer", "number", "out x in", "rank", "energy captured", "parameters"):
        table.add_column(name, justify="left" if name == "layer" else "right")
    for (kind, out_features, in_features), members in _by_kind(layers):
        table.add_row(
            kind,
            str(len(members)),
            f"{out_features} x {in_features}",
            str(members[0].rank),
            _energy(members),
            f"{sum(layer.trainable_parameters for layer in members):,}",
        )
    return table


def _by_kind(layers: list[LayerReport]) -> Iterator[tuple[tuple[str, int, int], list[LayerReport]]]:
    def kind(layer: LayerReport) -> tuple[str, int, int]:
        return layer.name.rpartition(".")[2], layer.out_features, layer.in_features

    order = {key: position for position, key in reversed(list(enumerate(map(kind, layers))))}
    for key, members in groupby(sorted(layers, key=lambda layer: order[kind(layer)]), key=kind):
        yield key, list(members)


def _energy(members: list[LayerReport]) -> str:
    shares = [layer.energy_captured for layer in members if layer.energy_captured is not None]
    if not shares:
        return "random start"
    low, high = min(shares), max(shares)
    return f"{low:.1%}" if len(shares) == 1 else f"{low:.1%} to {high:.1%}"


def _data_table(prepared: Prepared) -> Table:
    table = Table(title="data", title_justify="left")
    reports = {"train": prepared.data.train_report, "validation": prepared.data.validation_report}
    present = {name: report for name, report in reports.items() if report is not None}
    table.add_column("")
    for name in present:
        table.add_column(name, justify="right")
    lines: dict[str, Callable[[DataReport], str]] = {
        "rows": lambda report: f"{report.rows:,}",
        "tokens": lambda report: f"{report.tokens:,}",
        "share of tokens learned": lambda report: f"{report.target_tokens / report.tokens:.1%}",
        "longest row, in tokens": lambda report: f"{report.longest_row:,}",
        f"truncated to {prepared.config.data.max_length} tokens": lambda report: f"{report.truncated_rows:,}",
        "of those, answers that lost their end": lambda report: f"{report.cut_answers:,}",
        "nothing to learn, left out": lambda report: f"{report.rows_without_target:,}",
    }
    if any(report.shortened_chats for report in present.values()):
        lines["conversations that lost messages at their end"] = lambda report: f"{report.shortened_chats:,}"
    if any(report.split_documents for report in present.values()):
        lines["longer texts, split into several rows"] = lambda report: f"{report.split_documents:,}"
    if prepared.config.data.packing:
        lines["packed into sequences"] = lambda report: f"{report.packed_sequences or 0:,}"
    for label, cell in lines.items():
        table.add_row(label, *(cell(report) for report in present.values()))
    return table


def _example(report: DataReport) -> Text:
    text = Text("  ")
    for piece, is_learned in report.example:
        text.append(piece, style="bold" if is_learned else "dim")
    return text


def _plan_line(plan: Plan, prepared: Prepared) -> str:
    return (
        f"plan: {plan.total_steps:,} steps ({plan.warmup_steps:,} of warm-up, {plan.steps_per_epoch:,} an epoch), "
        f"each of {plan.global_batch_size} rows = {plan.world_size} ranks x "
        f"{plan.gradient_accumulation_steps} micro-batches of up to {plan.per_device_batch_size}; "
        f"result in {prepared.config.output_dir}"
    )
