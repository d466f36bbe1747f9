"""A fixed batch that two models are compared on: what an export gives away, it shows here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dude_cli.config import DType
from dude_cli.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

ROWS, LENGTH, SEED = 4, 32, 0
# Half the distance from 1 to the next number.
UNIT_ROUNDOFF: dict[DType, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
_OVERFLOW = "in float16, values above 65504 become infinite: use bfloat16 or float32"
INT8_ROUNDOFF = 0.5 / 127  # of a token's largest activation, which LLM.int8() rounds too


@dataclass(frozen=True)
class Difference:
    """How far the logits of two models on the probe are apart.

    `largest` is max |a - b|, `largest_logit` max |b|, both in the logits' own unit; `same_top_token` is the share of
    positions at which both have the same token in front.
    """

    largest: float
    largest_logit: float
    same_top_token: float

    @property
    def relative(self) -> float:
        return self.largest / self.largest_logit if self.largest_logit > 0 else self.largest

    def __str__(self) -> str:
        return self.shown()

    def shown(self, allowed: float | None = None) -> str:
        """For a person; `allowed` is a share of the largest logit too."""
        beside = "" if allowed is None else f" (allowed {allowed:.2g})"
        return (
            f"largest logit difference {self.largest:.3g}, {self.relative:.2g} of the largest logit{beside}; "
            f"same next token at {self.same_top_token:.1%} of {ROWS * LENGTH} positions"
        )


def probe_logits(model: PreTrainedModel) -> Tensor:
    """The logits of `model` on the probe, (4, 32, vocabulary), float32 on the CPU: token ids from a fixed seed."""
    import torch

    from dude_cli.adapter import constant_adapters

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(SEED))
    was_training = model.training
    model.eval()
    with torch.no_grad(), constant_adapters(model):
        logits: Tensor = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False).logits
    model.train(was_training)
    return logits.float().cpu()


def difference(found: Tensor, expected: Tensor) -> Difference:
    """Compare the logits of the same probe. A value that is not finite makes the difference so."""
    return Difference(
        largest=float((found - expected).abs().max()),
        largest_logit=float(expected.abs().max()),
        same_top_token=float((found.argmax(-1) == expected.argmax(-1)).float().mean()),
    )


def tolerance(model: PreTrainedModel, *dtypes: DType) -> float:
    """The largest difference that rounding explains, as a share of the largest logit: 8 u sqrt(layers), at least 1e-5.

    u is the unit roundoff of the coarsest of `dtypes`, or of an int8 base's activations. Each layer rounds once more,
    so errors grow as a random walk over the layers. Measured by `benchmarks/export_error.py` in bfloat16 and float16:
    0.9 to 1.5 u sqrt(layers) on 2 to 80 layers of width up to 1024, and up to 4.0 at width 4096 with 32000 tokens: the
    largest of more differences is larger. In float32 up to 2e-6, where a lost magnitude is at 1e-2 and above.
    """
    from dude_cli.adapter.weight import quantization

    layers: int = model.config.get_text_config().num_hidden_layers
    roundoffs = [UNIT_ROUNDOFF[dtype] for dtype in dtypes]
    if quantization(model) == "int8":
        roundoffs.append(INT8_ROUNDOFF)
    return max(1e-5, 8 * max(roundoffs) * math.sqrt(layers))


def check(found: Difference, allowed: float, what: str) -> None:
    """Raise AdapterError if `found` is more than `allowed`, as a share of the largest logit."""
    if not math.isfinite(found.largest_logit):
        raise AdapterError(
            f"{what} cannot be verified: the logits that it is to give are not finite themselves",
            fix=f"look for values that are not finite in the base and in the adapter; {_OVERFLOW}",
        )
    if not found.relative <= allowed:  # so that NaN fails too
        raise AdapterError(
            f"{what} does not give the logits of the model in memory: the largest difference is {found.largest:.3g}, "
            f"{found.relative:.2g} of the largest logit, and {allowed:.2g} is allowed",
            fix="nothing was kept; please report this, with the config and the base model"
            if math.isfinite(found.largest)
            else f"nothing was kept; {_OVERFLOW}",
        )
