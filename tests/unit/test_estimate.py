"""The memory forecast against real tensors, and what it needs: no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dude_cli.adapter import constant_adapters, patch_model, widened
from dude_cli.config import Config
from dude_cli.errors import UsageError
from dude_cli.model import load_model
from dude_cli.system.memory import human_bytes
from dude_cli.training import live_bytes
from dude_cli.training.estimate import Batch, MemoryEstimate, estimate_memory
from dude_cli.training.live_bytes import counted
from dude_cli.training.loss import SummedLoss, with_targets
from dude_cli.training.optimizer import make_optimizer

METHODS = ("dude", "dora", "pissa", "lora")


def run_config(folder: Path, **changes: dict[str, object]) -> Config:
    values: dict[str, dict[str, object]] = {
        "model": {"name_or_path": str(folder), "dtype": "float32"},
        "adapter": {"rank": 4},
        "data": {"train": [{"path": "rows.jsonl"}]},
        "train": {"gradient_checkpointing": False},
    }
    return Config.model_validate({name: section | changes.get(name, {}) for name, section in values.items()})


def shape_of(folder: Path, **sizes: object) -> Path:
    AutoConfig.for_model(**{"model_type": "llama", "vocab_size": VOCABULARY} | sizes).save_pretrained(folder)
    return folder


def total_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def step_peak(config: Config, batch: Batch) -> int:
    """What the tensors of a real step take at their most, base and adapter left out."""
    model = patch_model(load_model(config.model), config.adapter).train()
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    summed_loss = SummedLoss(model)
    ids = torch.randint(3, VOCABULARY, (batch.rows, batch.length))
    inputs = {"input_ids": ids, "labels": ids}
    if config.data.packing:  # two rows in each sequence
        inputs["position_ids"] = (torch.arange(batch.length) % (batch.length // 2)).repeat(batch.rows, 1)
    with counted(model) as live, constant_adapters(model):
        for _ in range(batch.gradient_accumulation_steps):
            summed_loss(with_targets(inputs)).backward()
    return live.peak.total()


def step_bytes(estimate: MemoryEstimate) -> int:
    """The same of a forecast, without the optimizer."""
    apart = ("base weights", "adapter", "optimizer", "gradient buckets")
    return sum(size for part, size in estimate.training.items() if part not in apart)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma"])
def test_what_stays_is_exact(method, kind, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    config = run_config(tmp_path, adapter={"method": method, "rank": 4})
    found = estimate_memory(config, Batch(2, 12, 1)).training
    base = total_bytes(model)
    patch_model(model, config.adapter)
    optimizer = make_optimizer(model, config.train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
    assert found["base weights"] == base
    assert found["adapter"] == total_bytes(model) - base
    assert found["optimizer"] == sum(t.numel() * t.element_size() for t in moments)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("dtype", "is_slow"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_a_step_takes_what_a_real_one_takes(method, checkpointing, dtype, is_slow, tmp_path, monkeypatch):
    monkeypatch.setattr(widened, "CPU_IS_SLOW", is_slow)
    tiny_model("llama").save_pretrained(tmp_path)
    changes = {"adapter": {"method": method}, "train": {"gradient_checkpointing": checkpointing}}
    config = run_config(tmp_path, model={"dtype": dtype}, **changes)
    for accumulation in (1, 3):
        batch = Batch(4, 32, accumulation)
        assert step_bytes(estimate_memory(config, batch)) == pytest.approx(step_peak(config, batch), rel=0.02)


def test_grouped_queries_caps_and_checkpointing_of_deep_models(tmp_path):
    """Logits that a model changes exist whole, and the forecast knows it."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4}
    shape_of(tmp_path, model_type="gemma2", num_key_value_heads=2, head_dim=8, **sizes)
    config = run_config(tmp_path)
    batch = Batch(4, 32, 1)
    capped = estimate_memory(config, batch)
    assert capped.training["loss"] >= 4 * 32 * VOCABULARY * 4


LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_2_7B_PARAMETERS = 6_738_415_616


def test_of_a_sharded_base_a_part_stays_and_two_blocks_and_what_is_around_them_are_gathered(tmp_path):
    folder, batch = shape_of(tmp_path, **LLAMA_2_7B | {"vocab_size": 32000}), Batch(1, 128, 1, world_size=8)
    shared, whole = (
        estimate_memory(run_config(folder, model={"dtype": "bfloat16"}, train={"distributed": strategy}), batch)
        for strategy in ("fsdp", "ddp")
    )
    block = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    around = 2 * 32000 * 4096 + 4096
    assert shared.training["base weights"] == -(-whole.training["base weights"] // 8)
    assert shared.training["gathered weights"] == 2 * (around + 2 * block)
    assert shared.init == whole.init  # each rank loads all of it
    assert {part for part in whole.training if shared.training[part] != whole.training[part]} == {"base weights"}


def test_a_large_model_needs_its_config_alone(tmp_path):
    shape_of(tmp_path, vocab_size=32000, **LLAMA_2_7B)
    train = {"gradient_checkpointing": True}
    config = run_config(tmp_path, model={"dtype": "bfloat16"}, adapter={"rank": 16}, train=train)
    found = estimate_memory(config, Batch(4, 512, 8))
    assert not list(tmp_path.glob("*.safetensors"))
    assert found.training["base weights"] == pytest.approx(2 * LLAMA_2_7B_PARAMETERS, rel=1e-4)
    # Rank 16 on q, k, v, o, gate, up and down: 40 million values in A and B, and a magnitude for each row.
    rows = 4 * 4096 + 2 * 11008 + 4096
    factors = 16 * (rows + 4 * 4096 + 2 * 4096 + 11008)
    assert found.training["optimizer"] == 2 * 4 * 32 * (factors + rows)
    # Checkpointing keeps each layer's input, 512 MiB, and one layer's activations.
    kept = 32 * 4 * 512 * 4096 * 2
    assert kept < found.training["activations"] < 4 * kept
    assert found.init["decomposition"] == 3 * 4 * 4096 * 11008
    assert found.peak_phase == "training"
    assert found.peak_bytes == sum(found.training.values())


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_as_small_as_it_will_be(quantization, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from dude_cli.adapter.weight import is_quantized, quantization_state

    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    run = run_config(tmp_path, model={"quantization": quantization, "dtype": "bfloat16"})
    model = load_model(run.model)
    scales = 0
    for layer in (module for module in model.modules() if is_quantized(module)):
        state = quantization_state(layer)
        scales += sum(t.numel() * t.element_size() for name, t in state.items() if name != "quant_map")
    found = estimate_memory(run, Batch(2, 12, 1))
    assert found.training["base weights"] == total_bytes(model) + scales
    assert found.training["dequantized weight"] == 128 * 192 * 2


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_int8_layers_keep_their_inputs_past_checkpointing(quantization, tmp_path):
    """nf4 layers do not."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    run = run_config(tmp_path, model={"quantization": quantization}, train={"gradient_checkpointing": True})
    batch = Batch(8, 64, 1)
    assert step_bytes(estimate_memory(run, batch)) == pytest.approx(step_peak(run, batch), rel=0.1)


def test_packed_rows_take_a_mask_too(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    batch = Batch(8, 64, 1)
    config = run_config(tmp_path, data={"packing": True}, train={"gradient_checkpointing": True})
    packed, alone = estimate_memory(config, batch), estimate_memory(run_config(tmp_path), batch)
    assert step_bytes(packed) == pytest.approx(step_peak(config, batch), rel=0.01)
    assert step_bytes(packed) != pytest.approx(step_bytes(alone), rel=0.01)


def test_several_ranks_have_buckets_for_their_gradients(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    alone = estimate_memory(run_config(tmp_path), Batch(2, 32, 1))
    ranks = estimate_memory(run_config(tmp_path), Batch(2, 32, 1, world_size=2))
    assert ranks.training_bytes - alone.training_bytes == alone.training["optimizer"] // 2


def test_what_has_no_forecast_says_so(tmp_path):
    shape_of(tmp_path / "experts", model_type="mixtral", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    with pytest.raises(UsageError, match="which experts"):
        estimate_memory(run_config(tmp_path / "experts"), Batch(1, 8, 1))
    tiny_model("llama").save_pretrained(tmp_path / "tiny")
    with pytest.raises(UsageError, match="rank 40 is larger"):
        estimate_memory(run_config(tmp_path / "tiny", adapter={"rank": 40}), Batch(1, 8, 1))
    saved = json.loads((tmp_path / "tiny/config.json").read_text())
    saved["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "tiny/config.json").write_text(json.dumps(saved))
    with pytest.raises(UsageError, match="gptq"):
        estimate_memory(run_config(tmp_path / "tiny"), Batch(1, 8, 1))


@pytest.mark.parametrize(
    ("count", "text"), [(999, "999 B"), (1536, "1.5 KiB"), (2**30, "1 GiB"), (1000 * 2**30, "0.977 TiB")]
)
def test_bytes_are_shown_in_the_unit_that_fits(count, text):
    assert human_bytes(count) == text


def counts(computation):
    """The bytes at the most and at the end of a computation on the meta device."""
    with counted(nn.Module()) as live:
        kept = computation()
        return live.peak.total(), live.now.total(), kept


@pytest.mark.parametrize(
    "computation",
    [
        lambda x: x + x,
        lambda x: x[:, :1] * x,
        lambda x: x.t().contiguous(),
        lambda x: (x * 2, x.view(-1), x[1:]),
        lambda x: x.mul_(2).t(),
        lambda x: x.max(dim=0),
        lambda x: torch.cat([x, x.bfloat16()]),
        lambda x: torch.cat([x, x]).split(4),
        lambda x: x.expand(3, 4, 4).sum(0),
        lambda x: torch.zeros_like(x).t_(),
        lambda x: torch.native_layer_norm(x, (4,), None, None, 1e-5),
        lambda x: torch.add(x, 1, out=torch.empty_like(x)),
        lambda x: tuple(x.long() + one for one in (1, True, 1.0)),
        lambda x: (x * x, x.bfloat16() * x.bfloat16()),
        lambda x: (x * 1, x.t() * 1),
        lambda x: (x.new_empty_strided((2, 2), (8, 2)),),
        lambda x: x.new_zeros(4, dtype=torch.int64) + 1,
    ],
)
def test_a_result_that_is_known_is_like_the_first(computation, monkeypatch):
    """On the meta device: of the same kind, shape, strides, dtype and bytes, and a view where it was one."""

    def found():
        x = torch.empty(4, 4, device="meta")
        peak, now, results = counts(lambda: computation(x))
        results = [results] if isinstance(results, torch.Tensor) else results
        tensors = [(r.shape, r.stride(), r.dtype, r.untyped_storage().nbytes()) for r in results]
        return peak, now, type(results), tensors, [r.untyped_storage() == x.untyped_storage() for r in results]

    with monkeypatch.context() as patch:
        patch.setattr(live_bytes, "_result", lambda func, args, kwargs: func(*args, **kwargs))
        expected = found()
    monkeypatch.setattr(live_bytes, "_known", {})
    assert [found(), found(), found()] == [expected] * 3


def test_a_forecast_asks_torch_once_for_layers_that_are_alike(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(live_bytes, "_known", {})
    monkeypatch.setattr(
        live_bytes, "_are_apart", lambda result, of=live_bytes._are_apart: asked.append(0) or of(result)
    )
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64}
    flat, deep = (run_config(shape_of(tmp_path / str(n), num_hidden_layers=n, **sizes)) for n in (2, 6))
    first = estimate_memory(flat, Batch(2, 8, 2))
    number = len(asked)
    estimate_memory(deep, Batch(2, 8, 2))
    assert len(asked) < number * 1.2
    assert estimate_memory(flat, Batch(2, 8, 2)) == first


def test_real_tensors_are_computed(monkeypatch):
    monkeypatch.setattr(live_bytes, "_known", {})
    x = torch.ones(4)
    for expected in (2, 4, 8):
        with counted(nn.Module()):
            result = x.mul_(2) + 0
        assert result.tolist() == [expected] * 4
