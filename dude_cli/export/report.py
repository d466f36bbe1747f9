"""What an export measured of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dude_cli.config import DType, Method
from dude_cli.export.probe import Difference

Format = Literal["merged", "peft", "lora"]


@dataclass(frozen=True)
class LowRankError:
    """||dW - dW_N||_F / ||dW||_F of each layer: the share of the learned change that a LoRA of rank N leaves out."""

    rank: int
    by_layer: dict[str, float]
    logits: Difference  # of the LoRA to the adapter that it stands for

    @property
    def worst_layer(self) -> str:
        return max(self.by_layer, key=self.by_layer.__getitem__)


@dataclass(frozen=True)
class ImportReport:
    """`difference` is that of the imported adapter to PEFT's own logits."""

    path: Path
    method: Method
    rank: int
    dtype: DType
    difference: Difference
    tolerance: float

    def record(self) -> dict[str, Any]:
        """The same as a JSON document."""
        return asdict(self) | {"path": str(self.path), "relative_difference": self.difference.relative}


@dataclass(frozen=True)
class ExportReport:
    """`difference` is that of the files, loaded again, to the model in memory.

    `tolerance` is what was allowed, as a share of the largest logit. `quantization` is the base's in the training.
    """

    format: Format
    path: Path
    dtype: DType
    difference: Difference
    tolerance: float
    quantization: str | None
    low_rank: LowRankError | None = None

    def record(self) -> dict[str, Any]:
        """The same as a JSON document."""
        found = asdict(self) | {"path": str(self.path), "relative_difference": self.difference.relative}
        if self.low_rank is not None:
            found["low_rank"]["relative_logit_difference"] = self.low_rank.logits.relative
            found["low_rank"]["worst_layer"] = self.low_rank.worst_layer
        return found


def export_shown(report: ExportReport) -> str:
    """What a person reads after an export."""
    lines = [f"wrote {report.path}, verified by loading it again in {report.dtype}:"]
    lines += [f"  {report.difference.shown(report.tolerance)}"]
    if report.quantization is not None:
        lines.append(
            f"the base was trained on in {report.quantization}: its weights are dequantised in the merged model"
            if report.format == "merged"
            else f"verified on the {report.quantization} base that it was trained on: load it onto that, not a full one"
        )
    if report.low_rank is not None:
        found = report.low_rank
        errors = sorted(found.by_layer.values())
        lines += [
            f"the LoRA of rank {found.rank} beside the adapter that it stands for:",
            f"  share of the learned change left out, by layer: median {errors[len(errors) // 2]:.3g}, "
            f"worst {errors[-1]:.3g} ({found.worst_layer})",
            f"  {found.logits}",
        ]
    return "\n".join(lines)


def import_shown(report: ImportReport) -> str:
    """What a person reads after an import."""
    return (
        f"wrote {report.path}: {report.method}, rank {report.rank}; beside PEFT, in {report.dtype}:\n"
        f"  {report.difference.shown(report.tolerance)}"
    )
