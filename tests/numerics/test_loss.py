"""The chunked loss is the plain one: its value, and the gradients of every A, B and magnitude."""

from __future__ import annotations

import functools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, VOCABULARY, tiny_model, train_a_little
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dude_cli.adapter import AdapterConfig, patch_model, trainable_parameters, widened
from dude_cli.data.batches import NOT_LEARNED, EncodedRow, collate
from dude_cli.training import loss as loss_module
from dude_cli.training.live_bytes import counted
from dude_cli.training.loss import SummedLoss, chunk_tokens, head_of, linear_cross_entropy, with_targets


def plain_loss(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The formula as everybody writes it, with all logits."""
    logits = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=NOT_LEARNED, reduction="sum")


def loss_and_gradients(model: PreTrainedModel, loss: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    return loss.item(), {name: p.grad.double() for name, p in trainable_parameters(model).items()}


def assert_equal_to_plain(model: PreTrainedModel, batch: dict[str, torch.Tensor], tolerance: float) -> None:
    expected, expected_gradients = loss_and_gradients(model, plain_loss(model, batch))
    found, gradients = loss_and_gradients(model, SummedLoss(model)(with_targets(batch)))
    assert found == pytest.approx(expected, rel=tolerance)
    whole = torch.stack([gradient.norm() for gradient in expected_gradients.values()]).norm()
    for name, gradient in expected_gradients.items():
        # A gradient that cancels is rounded with the size of its terms: hence the share of the whole.
        difference = float((gradients[name] - gradient).norm())
        assert difference <= tolerance * float(gradient.norm() + 0.01 * whole), name


def chunks_of(tokens: int) -> mock._patch:
    return mock.patch.object(loss_module, "chunk_tokens", return_value=tokens)


@functools.cache
def trained_model(kind: str, targets: str | tuple[str, ...] = "all-linear") -> PreTrainedModel:
    model = tiny_model(kind)
    config = AdapterConfig(
        method="dude",
        rank=4,
        target_modules=targets if isinstance(targets, str) else list(targets),
        exclude_modules=["lm_head"] if isinstance(targets, str) else [],
    )
    patch_model(model, config).train()
    train_a_little(model)
    return model


def batch_of(lengths: list[int], learned: list[list[bool]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = []
    for length, flags in zip(lengths, learned, strict=True):
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        labels = [token if flag else NOT_LEARNED for token, flag in zip(ids, flags, strict=True)]
        rows.append(EncodedRow(ids, labels, [length], []))
    return collate(rows, pad_id=0)


@st.composite
def batches(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    return batch_of(lengths, [draw(st.lists(st.booleans(), min_size=n, max_size=n)) for n in lengths])


@settings(max_examples=40, deadline=None)
@given(batch=batches(), chunk=st.integers(1, 40))
def test_loss_and_gradients_are_those_of_the_plain_formula(batch, chunk):
    """Any lengths and masks, rows and batches without a target too; any number of chunks."""
    model = trained_model("llama")
    with chunks_of(chunk):
        assert head_of(model) is not None
        assert_equal_to_plain(model, batch, 1e-5)


BATCH = batch_of([12, 7, 3], [[False] * 5 + [True] * 7, [True] * 7, [False] * 3])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tied_heads_and_checkpointing(kind, checkpointing):
    model = trained_model(kind)
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    try:
        with chunks_of(5):
            assert head_of(model) is not None
            assert_equal_to_plain(model, BATCH, 1e-5)
    finally:
        model.activation_checkpointing_disable()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)])
@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("scale", [0.2, 2.0])  # unsure and sure predictions
def test_a_head_in_each_dtype(dtype, tolerance, is_slow, has_bias, scale, monkeypatch):
    monkeypatch.setattr(widened, "CPU_IS_SLOW", is_slow)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(50, 32, generator=generator).to(dtype).requires_grad_()
    weight = (scale * torch.randn(300, 32, generator=generator)).to(dtype)
    bias = torch.randn(300, generator=generator).to(dtype) if has_bias else None
    targets = torch.randint(300, (50,), generator=generator)
    expected = F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="sum")
    with chunks_of(16):
        found = linear_cross_entropy(hidden, weight, bias, targets)
    # A factor as that of a step, whose gradient is a mean over its tokens.
    (gradient,) = torch.autograd.grad(found / 50, hidden)
    (expected_gradient,) = torch.autograd.grad(expected / 50, hidden)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert gradient.dtype == dtype
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) <= tolerance


SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48, "head_dim": 8}
CHANGED_AFTERWARDS = {
    "gemma2": {"num_key_value_heads": 2, "final_logit_softcapping": 30.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 4.0},
}


@pytest.mark.parametrize("kind", CHANGED_AFTERWARDS)
def test_logits_that_a_model_changes_are_taken_as_they_are(kind):
    """In bfloat16 the cap of Gemma 2 is lost in the rounding of small logits: the check must not be fooled by that."""
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **SIZES, **CHANGED_AFTERWARDS[kind])
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        patch_model(model, AdapterConfig(method="dude", rank=2))
        assert head_of(model) is None
        assert_equal_to_plain(model, BATCH, 1e-6)


def test_an_adapter_on_the_head_gets_its_gradients():
    model = trained_model("llama", ("lm_head", "q_proj"))
    assert head_of(model) is None
    assert_equal_to_plain(model, BATCH, 1e-5)


def test_a_head_that_is_no_plain_linear_layer_is_called():
    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    model = patch_model(tiny_model("llama"), AdapterConfig(method="dude", rank=4))
    head = Halved(32, VOCABULARY, bias=False).requires_grad_(False)
    model.set_output_embeddings(head)
    assert head_of(model) is None
    assert_equal_to_plain(model, BATCH, 1e-6)


class LargestLogits(TorchDispatchMode):
    """Remembers the most values of a tensor whose last side is the vocabulary, the weights left out."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCABULARY,) and result.shape[0] != 32:
            self.largest = max(self.largest, result.numel())
        return result


def test_logits_never_exist_at_once_forward_or_backward():
    model = trained_model("llama")
    with chunks_of(3), LargestLogits() as seen:
        SummedLoss(model)(with_targets(BATCH)).backward()
    # The check on its first eight tokens is the largest.
    assert seen.largest <= 8 * VOCABULARY
    assert BATCH["labels"].numel() > 4 * 8


@pytest.mark.parametrize(("dtype", "bytes_each"), [(torch.float32, 4), (torch.bfloat16, 2 + 4)])
@pytest.mark.parametrize("is_slow", [False, True])
def test_one_chunk_of_logits_and_no_second_tensor_of_its_size(dtype, bytes_each, is_slow, monkeypatch):
    tokens, vocabulary, width = 4096, 8000, 64
    monkeypatch.setattr(widened, "CPU_IS_SLOW", is_slow)
    monkeypatch.setattr(widened, "CHUNK_VALUES", 64 * width)  # of the head's weight, in float32
    hidden = torch.empty(tokens, width, dtype=dtype, device="meta", requires_grad=True)
    head = nn.Linear(width, vocabulary, bias=False, dtype=dtype, device="meta").requires_grad_(False)
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    with counted(head) as live:
        linear_cross_entropy(hidden, head.weight, None, targets)
    chunk = chunk_tokens(tokens, vocabulary)
    beside = 2 * hidden.nbytes + targets.nbytes + 32 * chunk  # input, gradient, targets; some values for each token
    beside += 4 * (chunk * width + widened.CHUNK_VALUES) if is_slow else 0  # the gradient and some rows of the weight
    assert live.peak.total() <= chunk * vocabulary * bytes_each + beside


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "expected"),
    [(1, 32000, 128), (256, 32000, 128), (2048, 32000, 256), (16384, 32000, 524), (16384, 256000, 256)],
)
def test_a_chunk_is_a_share_of_its_batch_within_bounds(tokens, vocabulary, expected):
    assert chunk_tokens(tokens, vocabulary) == expected


def test_positions_without_a_target_get_no_logits():
    model = trained_model("llama")
    summed_loss = SummedLoss(model)
    with LargestLogits() as seen:
        summed_loss(with_targets(BATCH)).backward()
    assert seen.largest == 13 * VOCABULARY  # 7 targets in the first row, 6 in the second, none in the third
