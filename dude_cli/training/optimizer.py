"""What applies a gradient: AdamW over the adapters, and float16's loss scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dude_cli.config import TrainConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

INITIAL_LOSS_SCALE = 2.0**12


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over A, B and the magnitudes; the magnitudes have no weight decay."""
    import torch

    from dude_cli.adapter import trainable_parameters

    named = trainable_parameters(model)
    magnitudes = [parameter for name, parameter in named.items() if name.endswith(".magnitude")]
    factors = [parameter for name, parameter in named.items() if not name.endswith(".magnitude")]
    groups = [{"params": factors, "weight_decay": config.weight_decay}, {"params": magnitudes, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=next(iter(named.values())).device.type == "cuda",
    )


def make_loss_scaler(device: torch.device, dtype: str) -> torch.amp.GradScaler:
    """A scale for the loss with a float16 base, whose gradients underflow; bfloat16 has float32's range."""
    import torch

    return torch.amp.GradScaler(device.type, enabled=dtype == "float16", init_scale=INITIAL_LOSS_SCALE)
