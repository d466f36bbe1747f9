"""Small random models of real architectures, and the layers that the adapter tests need."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

VOCABULARY = 96
KINDS = ("llama", "gpt2", "qwen2", "gemma")  # no biases, Conv1D with biases, biases on q k v, tied embeddings
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def tiny_model(
    kind: str, dtype: torch.dtype = torch.float32, seed: int = 0, *, attention_bias: bool = False
) -> PreTrainedModel:
    """A random model of two layers with grouped-query attention where the architecture has it.

    `attention_bias` is for llama and gemma; gpt2 and qwen2 have their biases always.
    """
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 56, "head_dim": 8, "max_position_embeddings": 64}
        sizes |= {"attention_bias": True} if attention_bias else {}
    config = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **sizes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Biases start at zero in a fresh model and would hide every mistake with them.
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model.to(dtype).eval()


def tiny_batch(rows: int = 2, length: int = 12, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def linear_layer(
    out_features: int, in_features: int, *, bias: bool, conv1d: bool = False, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A random linear layer, with a spread of row norms as trained layers have."""
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    weight = (
        torch.randn(out_features, in_features, generator=generator) * torch.logspace(-1, 0.5, out_features)[:, None]
    )
    layer: nn.Module
    if conv1d:
        layer = Conv1D(out_features, in_features)
        layer.weight.data = weight.T.contiguous()
    else:
        layer = nn.Linear(in_features, out_features, bias=bias)
        layer.weight.data = weight
    if layer.bias is not None:
        layer.bias.data = torch.randn(out_features, generator=generator)
    return layer.to(dtype).requires_grad_(False)


def train_a_little(model: PreTrainedModel, steps: int = 3, learning_rate: float = 1e-2) -> None:
    """Real optimizer steps on the trainable tensors, so that A, B and m are away from their start."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    ids = tiny_batch()
    for _ in range(steps):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
