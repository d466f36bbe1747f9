"""PEFT as an oracle: where it is right, we give its logits and its gradients."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_batch, tiny_model

from dude_cli.adapter import AdapterConfig, SvdConfig, adapter_layers, patch_model

# PEFT builds B A and its norm by other sums: float32 rounding, not more.
TOLERANCE = 1e-5


def peft_twin(kind: str, use_dora: bool, init: str | bool, rank: int = 6, alpha: float = 6):
    model = tiny_model(kind)
    targets = [name for name, module in model.named_modules() if "lm_head" not in name and _is_linear(module)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        target_modules=targets,
        use_dora=use_dora,
        init_lora_weights=init,
        fan_in_fan_out=kind == "gpt2",
    )
    return get_peft_model(model, config).eval()


def _is_linear(module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")


def ours_and_peft_layers(ours, theirs):
    found = dict(theirs.base_model.model.named_modules())
    return {name: (layer, found[name]) for name, layer in adapter_layers(ours).items()}


def copy_factors_to_peft(ours, theirs) -> None:
    with torch.no_grad():
        for layer, peft_layer in ours_and_peft_layers(ours, theirs).values():
            peft_layer.lora_A["default"].weight.copy_(layer.lora_A)
            peft_layer.lora_B["default"].weight.copy_(layer.lora_B)
            if layer.magnitude is not None:
                peft_layer.lora_magnitude_vector["default"].weight.copy_(layer.magnitude)


def shake(model) -> None:
    torch.manual_seed(7)
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.lora_B.add_(0.1 * torch.randn_like(layer.lora_B))
            if layer.magnitude is not None:
                layer.magnitude.mul_(1 + 0.1 * torch.randn_like(layer.magnitude))


def relative(a, b) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_and_dora_have_pefts_logits_and_gradients(method, kind):
    ours = patch_model(tiny_model(kind), AdapterConfig(method=method, rank=6, alpha=12.0))
    shake(ours)
    theirs = peft_twin(kind, use_dora=method == "dora", init=True, alpha=12)
    copy_factors_to_peft(ours, theirs)
    ids = tiny_batch()
    our_output, their_output = ours(input_ids=ids, labels=ids), theirs(input_ids=ids, labels=ids)
    assert relative(our_output.logits, their_output.logits) <= TOLERANCE
    our_output.loss.backward()
    their_output.loss.backward()
    for name, (layer, peft_layer) in ours_and_peft_layers(ours, theirs).items():
        pairs = [
            (layer.lora_A, peft_layer.lora_A["default"].weight),
            (layer.lora_B, peft_layer.lora_B["default"].weight),
        ]
        if method == "dora":
            pairs.append((layer.magnitude, peft_layer.lora_magnitude_vector["default"].weight))
        for mine, theirs_ in pairs:
            assert relative(mine.grad, theirs_.grad) <= 10 * TOLERANCE, name


def test_dude_equals_pefts_dora_with_pissa_at_the_start_and_after_five_steps():
    config = AdapterConfig(method="dude", rank=6, svd=SvdConfig(algorithm="exact"))
    ours = patch_model(tiny_model("llama"), config)
    theirs = peft_twin("llama", use_dora=True, init="pissa")
    ids = tiny_batch(rows=4)
    assert relative(ours(input_ids=ids).logits, theirs(input_ids=ids).logits) <= 1e-4
    for model in (ours, theirs):
        trainable = [p for p in model.parameters() if p.requires_grad]
        # SGD: Adam divides by the gradient's size and would blow up rounding in entries that are nearly zero.
        optimizer = torch.optim.SGD(trainable, lr=0.5)
        for _ in range(5):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert relative(ours(input_ids=ids).logits, theirs(input_ids=ids).logits) <= 1e-4
    start = tiny_model("llama")(input_ids=ids).logits
    assert relative(ours(input_ids=ids).logits, start) >= 1e-2  # the steps did something
    for layer, peft_layer in ours_and_peft_layers(ours, theirs).values():
        product = layer.lora_B @ layer.lora_A
        peft_product = peft_layer.lora_B["default"].weight @ peft_layer.lora_A["default"].weight
        assert relative(product, peft_product) <= 1e-4
