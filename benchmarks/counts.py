"""Count the operations and bytes of an adapted linear layer: LoRA and DoRA as PEFT computes them, and DuDe.

    python benchmarks/counts.py        # Llama-2-7B; pure arithmetic, nothing is measured

A multiply-add is two floating-point operations. Bytes are those of the operands and the result of each operation, each
read or written once, as if nothing stayed in a cache between two operations and nothing had to be read twice within
one. The time that a machine needs at least is then the sum over the operations of the larger of operations / peak rate
and bytes / bandwidth (the roofline model, Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785).

T tokens, r rank, k = 2r the inner size of DuDe's difference s P Q (k = r with a random start).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from measure import markdown_table

# (out, in), how many in a block of Llama-2-7B: q, k, v, o; gate, up; down.
LLAMA_2_7B_BLOCK = (((4096, 4096), 4), ((11008, 4096), 2), ((4096, 11008), 1))
LLAMA_2_7B_BLOCKS = 32


class Operation(NamedTuple):
    """One pass over memory: its multiply-adds in matrix products, and the elements that it reads and writes."""

    name: str
    macs: int
    read: int
    written: int


@dataclass(frozen=True)
class Work:
    """A sum of operations."""

    flops: int
    bytes: int
    seconds: float  # at least, on the machine asked for; 0 without one

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.seconds + other.seconds)

    def times(self, count: float) -> Work:
        return Work(round(self.flops * count), round(self.bytes * count), self.seconds * count)


class Machine(NamedTuple):
    """Rates of a plain product and of a copy."""

    flop_per_s: float
    bytes_per_s: float


class Layer(NamedTuple):
    """The sizes that the counts depend on."""

    out: int
    in_: int
    tokens: int
    rank: int


def frozen(layer: Layer) -> list[Operation]:
    """The frozen layer alone: its output, and the gradient of its input."""
    out, in_, T, _ = layer
    return [product("z = x W0'", T, out, in_), product("dx = dz W0", T, in_, out)]


def peft_lora(layer: Layer) -> list[Operation]:
    """A micro-batch of `peft.tuners.lora.layer.Linear`: result + lora_B(lora_A(x)) * scaling."""
    out, in_, T, r = layer
    return [
        *frozen(layer),
        product("h = x A'", T, r, in_),
        product("d = h B'", T, out, r),
        elementwise("s d", T * out, reads=1),
        elementwise("z + s d", T * out, reads=2),
        elementwise("s dy", T * out, reads=1),
        *_factor_gradients(layer),
        elementwise("dx + dh A", T * in_, reads=2),
    ]


def peft_dora(layer: Layer) -> list[Operation]:
    """A micro-batch of `peft.tuners.lora.dora.DoraLinearLayer`, which builds B A from an identity each time.

    The norm is detached, so the dense product has no backward pass. A PiSSA start costs the same.
    """
    out, in_, T, r = layer
    return [
        *frozen(layer),
        product("I A'", in_, r, in_),
        product("(I A') B'", in_, out, r),
        elementwise("s B A", out * in_, reads=1),
        elementwise("W0 + s B A", out * in_, reads=2),
        elementwise("norms of W0 + s B A", out * in_, reads=1, writes=0),
        product("h = x A'", T, r, in_),
        product("d = h B'", T, out, r),
        elementwise("(g - 1) z", T * out, reads=1),
        elementwise("g d", T * out, reads=1),
        elementwise("s g d", T * out, reads=1),
        elementwise("their sum", T * out, reads=2),
        elementwise("z + sum", T * out, reads=2),
        elementwise("s dy", T * out, reads=1),
        elementwise("g s dy", T * out, reads=1),
        elementwise("s dy d", T * out, reads=2),
        elementwise("dg = sum s dy d", T * out, reads=1, writes=0),
        elementwise("(g - 1) dy", T * out, reads=1),
        elementwise("dy z", T * out, reads=2),
        elementwise("dg = sum dy z", T * out, reads=1, writes=0),
        elementwise("dz = dy + (g - 1) dy", T * out, reads=2),
        *_factor_gradients(layer),
        elementwise("dx + dh A", T * in_, reads=2),
    ]


def dude(layer: Layer) -> list[Operation]:
    """A micro-batch of DuDe with what `constant_adapters` holds: g, s P and Q.

    The products add to what is there, g z is in place, and the gradients of A and B use half of P and Q each.
    """
    out, in_, T, r = layer
    k = 2 * r
    return [
        *frozen(layer),
        product("h = x Q'", T, k, in_),
        product("z += h (s P)'", T, out, k, adds=True),
        elementwise("y = g z", T * out, reads=1),
        elementwise("dz = g dy, dm = sum dy y / m", T * out, reads=2),
        product("u = dz s P", T, k, out),
        product("dx += u Q", T, in_, k, adds=True),
        product("dB = s dz' h1", out, r, T),
        product("dA = (u1 + u2)' x", r, in_, T),
    ]


def dude_once_per_step(layer: Layer) -> list[Operation]:
    """What DuDe does once per optimizer step: the norm, from D W0' and the A0 W0' that never changes, and P and Q."""
    out, in_, _, r = layer
    k = 2 * r
    return [
        product("D W0'", out, r, in_),
        product("Q Q'", k, k, in_),
        product("P (Q Q')", out, k, k),
        elementwise("row sums", out * k, reads=4, writes=0),
        elementwise("P, Q", (out + in_) * r, reads=3, writes=2),
    ]


MICRO_BATCH: dict[str, Callable[[Layer], list[Operation]]] = {
    "PEFT lora": peft_lora,
    "PEFT dora": peft_dora,
    "dude": dude,
}


def product(name: str, rows: int, columns: int, inner: int, *, adds: bool = False) -> Operation:
    """(rows, inner) times (inner, columns), which may be added to what the result's place has."""
    result = rows * columns
    return Operation(name, result * inner, rows * inner + inner * columns + adds * result, result)


def elementwise(name: str, elements: int, *, reads: int, writes: int = 1) -> Operation:
    return Operation(name, 0, reads * elements, writes * elements)


def work(operations: list[Operation], element_bytes: int, machine: Machine | None = None) -> Work:
    """The sum of `operations` on elements of one size, and the seconds that they need at least on `machine`."""
    total = Work(0, 0, 0.0)
    for operation in operations:
        flops, moved = 2 * operation.macs, (operation.read + operation.written) * element_bytes
        seconds = max(flops / machine.flop_per_s, moved / machine.bytes_per_s) if machine is not None else 0.0
        total += Work(flops, moved, seconds)
    return total


def step_work(name: str, layer: Layer, micro_batches: int, element_bytes: int, machine: Machine | None = None) -> Work:
    """One layer's share of an optimizer step: its micro-batches, and what DuDe does once, which is in float32."""
    total = work(MICRO_BATCH[name](layer), element_bytes, machine).times(micro_batches)
    return total + work(dude_once_per_step(layer), 4, machine) if name == "dude" else total


def llama_2_7b(name: str, tokens: int, rank: int, micro_batches: int, element_bytes: int) -> Work:
    """All 224 adapted layers of Llama-2-7B in one optimizer step."""
    total = Work(0, 0, 0.0)
    for (out, in_), count in LLAMA_2_7B_BLOCK:
        layer = Layer(out, in_, tokens, rank)
        total += step_work(name, layer, micro_batches, element_bytes).times(count * LLAMA_2_7B_BLOCKS)
    return total


def _factor_gradients(layer: Layer) -> list[Operation]:
    """The backward products of h = x A', d = h B'."""
    out, in_, T, r = layer
    return [
        product("dh = dd B", T, r, out),
        product("dB = dd' h", out, r, T),
        product("dA = dh' x", r, in_, T),
        product("dh A", T, in_, r),
    ]


def operations_table() -> str:
    """Every operation of one 4096 x 4096 layer at r = 16 and 2048 tokens."""
    layer = Layer(4096, 4096, tokens=2048, rank=16)
    lists = {name: operations(layer) for name, operations in MICRO_BATCH.items()}
    lists["dude, once per step"] = dude_once_per_step(layer)
    rows = [
        [
            name,
            f"`{operation.name}`",
            f"{2 * operation.macs / 1e9:.3f}",
            f"{(operation.read + operation.written) / 1e6:.1f}",
        ]
        for name, operations in lists.items()
        for operation in operations
    ]
    return markdown_table(["method", "operation", "GFLOP", "million elements read and written"], rows)


def llama_2_7b_table() -> str:
    """Operations and bytes of an optimizer step for Llama-2-7B: micro-batches of 2048 tokens, bfloat16."""
    header = ["", "TFLOP", "to PEFT's LoRA", "GB", "to PEFT's LoRA"]
    rows = []
    for rank in (16, 64, 128):
        for micro_batches in (1, 8):
            lora = llama_2_7b("PEFT lora", 2048, rank, micro_batches, element_bytes=2)
            for name in MICRO_BATCH:
                found = llama_2_7b(name, 2048, rank, micro_batches, element_bytes=2)
                rows.append(
                    [
                        f"r = {rank}, {micro_batches} micro-batch{'es' * (micro_batches > 1)}, {name}",
                        f"{found.flops / 1e12:.1f}",
                        f"{found.flops / lora.flops:.3f}",
                        f"{found.bytes / 1e9:.0f}",
                        f"{found.bytes / lora.bytes:.3f}",
                    ]
                )
    return markdown_table(header, rows)


if __name__ == "__main__":
    print(operations_table())
    print(llama_2_7b_table())
