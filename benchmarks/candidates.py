"""The candidates: our four methods and PEFT's LoRA, DoRA and DoRA with a PiSSA start, on a layer or a whole model.

In float32 nothing is cast. In bfloat16 the base has bfloat16 weights and the adapters float32 ones, as PEFT makes
them, and the forward pass runs under autocast; the backward pass runs outside, as torch advises and Trainer does.
`lora, no autocast` and `dude, no autocast` are ours as `dude train` runs them: the layer casts by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dude_cli.adapter import AdapterConfig, constant_adapters, patch_model
from dude_cli.adapter.layer import AdapterLayer, Factors
from dude_cli.adapter.widened import is_slow
from dude_cli.training.loss import SummedLoss, with_targets

# Four power iterations instead of PiSSA's full SVD: the start's accuracy does not change what a step costs.
PEFT = {
    "PEFT lora": {"use_dora": False, "init_lora_weights": True},
    "PEFT dora": {"use_dora": True, "init_lora_weights": True},
    "PEFT dora + pissa": {"use_dora": True, "init_lora_weights": "pissa_niter_4"},
}
METHODS = ("lora", "pissa", "dora", "dude")
NO_AUTOCAST = ", no autocast"
VOCABULARY = 4096  # the head costs all candidates the same; Llama-2's 32000 would hide much of what differs
MLP_AND_HEADS = {1024: (2816, 16), 4096: (11008, 32)}  # by hidden size; the second are Llama-2-7B's
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Candidate:
    """What is trained, and how a step calls it."""

    module: nn.Module
    is_ours: bool
    autocast: bool

    def precision(self) -> AbstractContextManager[object]:
        """For a forward pass."""
        return torch.autocast(torch.get_default_device().type, torch.bfloat16, enabled=self.autocast)

    def step_scope(self) -> AbstractContextManager[object]:
        """For the micro-batches of one optimizer step: ours do once in it what does not change until it ends."""
        return constant_adapters(self.module) if self.is_ours else nullcontext()


def candidate_names(dtype: str) -> list[str]:
    """PEFT's LoRA first: the ratios are to it."""
    without = [f"{method}{NO_AUTOCAST}" for method in ("lora", "dude")]
    return [*PEFT, *METHODS, *(without if dtype == "bfloat16" else [])]


def timed_candidate_names(dtype: str) -> list[str]:
    """The same, or what our aims compare, where a step of PEFT's takes minutes for want of a CPU's instructions."""
    if is_slow(torch.empty(0, dtype=getattr(torch, dtype))):
        return ["PEFT lora", "PEFT dora + pissa", "dude"]
    return candidate_names(dtype)


def make_candidate(
    name: str, dtype: str, ours: Callable[[str], nn.Module], pefts: Callable[[str], nn.Module]
) -> Candidate:
    """The candidate `name`, whose module `ours` makes from a method or `pefts` from a name in `PEFT`."""
    method, is_ours = name.removesuffix(NO_AUTOCAST), name not in PEFT
    module = (ours if is_ours else pefts)(method)
    return Candidate(module.train(), is_ours, autocast=dtype == "bfloat16" and not name.endswith(NO_AUTOCAST))


def layer_candidate(name: str, weight: Tensor, rank: int) -> Candidate:
    """An adapter on a frozen linear layer with `weight` (out, in), which all candidates share."""

    def ours(method: str) -> nn.Module:
        return AdapterLayer(_linear(weight), AdapterConfig(method=method, rank=rank), _factors(method, weight, rank))

    def pefts(name: str) -> nn.Module:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=["0"], **PEFT[name])
        wrapped = get_peft_model(nn.Sequential(_linear(weight)), config)
        layer = wrapped.get_submodule("base_model.model.0")
        assert isinstance(layer, nn.Module)
        return layer

    return make_candidate(name, str(weight.dtype).removeprefix("torch."), ours, pefts)


def model_candidate(
    name: str,
    dtype: str,
    rank: int,
    *,
    layers: int,
    hidden: int = 1024,
    checkpointing: bool = False,
    vocabulary: int = VOCABULARY,
) -> Candidate:
    """An adapter on each linear layer of a Llama of random weights, the head excepted."""

    def ours(method: str) -> nn.Module:
        config = AdapterConfig(method=method, rank=rank, svd={"algorithm": "randomized", "iterations": 2})
        return patch_model(llama(dtype, layers, hidden, checkpointing, vocabulary), config)

    def pefts(name: str) -> nn.Module:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), **PEFT[name])
        return get_peft_model(llama(dtype, layers, hidden, checkpointing, vocabulary), config)

    return make_candidate(name, dtype, ours, pefts)


def llama(dtype: str, layers: int, hidden: int, checkpointing: bool, vocabulary: int) -> PreTrainedModel:
    """A Llama of random weights; checkpointing as `dude train` turns it on."""
    torch.manual_seed(0)
    mlp_width, heads = MLP_AND_HEADS[hidden]
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp_width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=8192,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    return model


def model_loss(candidate: Candidate, ids: Tensor) -> Tensor:
    """The mean cross-entropy of the next token over one micro-batch (batch, tokens), float32."""
    with candidate.precision():
        logits = candidate.module(input_ids=ids, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def own_loss(candidate: Candidate, ids: Tensor) -> Tensor:
    """The same value as each tool's user gets it: `dude train`'s loss in chunks, or the loss of the model's labels."""
    with candidate.precision():
        if candidate.is_ours:
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
            total: Tensor = SummedLoss(candidate.module)(with_targets(batch))
            return total / (ids.numel() - len(ids))
        loss: Tensor = candidate.module(input_ids=ids, labels=ids, use_cache=False).loss
        return loss


@dataclass(frozen=True)
class Training:
    """A candidate with its optimizer, its loss and one micro-batch of random tokens."""

    candidate: Candidate
    optimizer: torch.optim.Optimizer
    ids: Tensor  # (1, tokens)
    loss_of: Callable[[Candidate, Tensor], Tensor] = model_loss

    @classmethod
    def of(cls, candidate: Candidate, tokens: int) -> Training:
        trained = [parameter for parameter in candidate.module.parameters() if parameter.requires_grad]
        ids = torch.randint(0, VOCABULARY, (1, tokens), generator=_generator())
        return cls(candidate, torch.optim.AdamW(trained, lr=1e-5), ids)

    def loss(self) -> Tensor:
        """Of one forward pass."""
        return self.loss_of(self.candidate, self.ids)

    def step(self, micro_batches: int) -> None:
        """One optimizer step."""
        with self.candidate.step_scope():
            for _ in range(micro_batches):
                (self.loss() / micro_batches).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def _generator() -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(0)


def _linear(weight: Tensor) -> nn.Linear:
    out_features, in_features = weight.shape
    layer = nn.Linear(in_features, out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _factors(method: str, weight: Tensor, rank: int) -> Factors:
    """Factors a little away from a start like the method's own; random ones, because an SVD of each would take long.

    The start of `pissa` and `dude` has the size of singular vectors times the root of the largest singular value.
    """
    out_features, in_features = weight.shape
    generator = _generator()
    A = torch.randn(rank, in_features, generator=generator) / math.sqrt(in_features)
    B = torch.randn(out_features, rank, generator=generator) / math.sqrt(out_features)
    if method in ("lora", "dora"):
        return Factors(A, 1e-2 * B)
    largest = float(weight[:, :64].float().std()) * (math.sqrt(out_features) + math.sqrt(in_features))
    A0, B0 = math.sqrt(largest) * A, math.sqrt(largest) * B
    moved_A = A0 * (1 + 1e-2 * torch.randn(A.shape, generator=generator))
    moved_B = B0 * (1 + 1e-2 * torch.randn(B.shape, generator=generator))
    return Factors(moved_A, moved_B, None, A0, B0)
