"""What `dude init` shows: the layers, the data, an example with its masked part dimmed, the planned steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from dude_cli.data import DataReport
from dude_cli.decompositions import CheckedLayer
from dude_cli.prepare import LayerReport, Plan, Prepared


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
    )


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
