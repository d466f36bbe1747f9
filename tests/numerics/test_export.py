"""What is exported computes what was trained: measured here by loading it with transformers and PEFT alone."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from exporting import save_base, save_trained, trained_target
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, tiny_batch, train_a_little
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dude_cli import quickstart
from dude_cli.adapter import AdapterConfig, adapter_layers, load_adapter, patch_model, save_adapter
from dude_cli.adapter.weight import in_stored_orientation
from dude_cli.config import ModelConfig
from dude_cli.errors import AdapterError, UsageError
from dude_cli.export import export_lora, export_merged, export_peft, from_peft, import_peft, import_to, peft_files
from dude_cli.export.low_rank import learned_change, lowest_rank
from dude_cli.export.peft_files import PeftLayer
from dude_cli.model import load_tokenizer
from dude_cli.target import Loading, find_target, load_target

METHODS = ("dude", "dora", "pissa", "lora")
TOLERANCE = 1e-5  # of the largest logit, in float32


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_batch(), use_cache=False).logits.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def base_of(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_is_the_adapted_one(method, kind, tmp_path):
    loaded = trained_target(tmp_path, kind, AdapterConfig(method=method, rank=4, alpha=6.0))
    expected = logits(loaded.model)
    report = export_merged(loaded, tmp_path / "merged", "float32")
    found = logits(base_of(tmp_path / "merged"))
    assert relative(found, expected) <= TOLERANCE
    assert relative(logits(base_of(tmp_path / "base")), expected) >= 1e-2  # there was something to merge
    assert report.difference.relative <= TOLERANCE
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= files


@pytest.mark.parametrize(
    ("trained", "saved"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16")]
)
def test_each_merged_weight_is_rounded_once(trained, saved, tmp_path):
    config = AdapterConfig(method="dude", rank=4)
    loaded = trained_target(tmp_path, "llama", config, getattr(torch, trained))
    expected = {
        name: torch.cat([rows for _, rows in layer.adapted_chunks()])
        for name, layer in adapter_layers(loaded.model).items()
    }
    report = export_merged(loaded, tmp_path / "merged", saved)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, saved)}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == saved
    for name, weight in expected.items():
        assert torch.equal(written[f"{name}.weight"], weight.to(getattr(torch, saved))), name
    assert 0 < report.difference.relative <= report.tolerance


def test_large_models_are_merged_into_several_files(tmp_path, monkeypatch):
    monkeypatch.setattr("dude_cli.export.merged.SHARD_SIZE", "20KB")
    loaded = trained_target(tmp_path, "llama", AdapterConfig(method="dude", rank=4))
    expected = logits(loaded.model)
    export_merged(loaded, tmp_path / "merged", "float32")
    assert len(list((tmp_path / "merged").glob("model-*.safetensors"))) > 2
    assert relative(logits(base_of(tmp_path / "merged")), expected) <= TOLERANCE


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_peft_loads_the_exported_adapter_onto_the_untouched_base(method, kind, rank_stabilized, tmp_path):
    config = AdapterConfig(method=method, rank=4, alpha=6.0, rank_stabilized=rank_stabilized)
    loaded = trained_target(tmp_path, kind, config)
    expected = logits(loaded.model)
    report = export_peft(loaded, tmp_path / "peft")
    assert torch.equal(logits(loaded.model), expected)  # the model in memory is as it was
    base = base_of(tmp_path / "base")
    before = {name: parameter.clone() for name, parameter in base.named_parameters()}
    theirs = PeftModel.from_pretrained(base, tmp_path / "peft")
    assert relative(logits(theirs), expected) <= TOLERANCE
    assert report.difference.relative <= TOLERANCE
    unloaded = theirs.unload()
    assert all(torch.equal(parameter, before[name]) for name, parameter in unloaded.named_parameters())
    saved = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert saved["r"] == (8 if config.has_svd_init else 4)
    assert saved["use_dora"] == config.has_magnitude
    assert saved["use_rslora"] is False


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("method", METHODS)
def test_half_precision_bases_are_within_what_rounding_explains(method, dtype, tmp_path):
    loaded = trained_target(tmp_path, "llama", AdapterConfig(method=method, rank=4), getattr(torch, dtype))
    for report in (export_peft(loaded, tmp_path / "peft"), export_merged(loaded, tmp_path / "merged", dtype)):
        assert 0 < report.difference.relative <= 2e-2
        assert report.difference.relative <= report.tolerance


@pytest.mark.parametrize("rank_stabilized", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_export_import_export_returns_equal_bytes(method, rank_stabilized, tmp_path):
    config = AdapterConfig(method=method, rank=3, alpha=7.0, rank_stabilized=rank_stabilized)
    loaded = trained_target(tmp_path, "qwen2", config)
    export_peft(loaded, tmp_path / "first")
    model = base_of(tmp_path / "base")
    model_config = ModelConfig(name_or_path=str(tmp_path / "base"), dtype="float32")
    import_to(model, loaded.tokenizer, model_config, tmp_path / "first", tmp_path / "imported")
    again = load_target(find_target(str(tmp_path / "imported")))
    assert relative(logits(again.model), logits(loaded.model)) <= TOLERANCE
    export_peft(again, tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


PEFT_ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rank-stabilised": {"use_rslora": True, "use_dora": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": {"rank_pattern": {"q_proj": 2, "c_attn": 2}, "alpha_pattern": {"up_proj": 3, "mlp.c_fc": 3}},
    "pissa": {"init_lora_weights": "pissa"},
    "pissa with dora": {"init_lora_weights": "pissa", "use_dora": True, "use_rslora": True},
}


def change_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


METHOD_OF = {"dora": "dora", "rank-stabilised": "dora", "pissa": "pissa", "pissa with dora": "dude"}


def peft_trained(base, folder, *, initial=None, **settings):
    """One of PEFT's own adapters after real steps, saved by PEFT; its logits, in training's own model."""
    model = base_of(base)
    targets = [name for name, _ in adapter_layers(patch_model(base_of(base), AdapterConfig(rank=1))).items()]
    config = {"r": 4, "lora_alpha": 6, "target_modules": targets, "fan_in_fan_out": "gpt2" in str(base)} | settings
    theirs = get_peft_model(model, LoraConfig(**config))
    if initial is not None:
        theirs.save_pretrained(initial)
    train_a_little(theirs)
    theirs.save_pretrained(folder)
    return logits(theirs.eval())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", PEFT_ADAPTERS)
def test_pefts_own_adapters_are_imported_exactly(name, kind, tmp_path):
    base = save_base(tmp_path / f"base-{kind}", kind)
    expected = peft_trained(base, tmp_path / "peft", **PEFT_ADAPTERS[name])
    model, tokenizer = base_of(base), load_tokenizer(ModelConfig(name_or_path=str(base)))
    report = import_to(
        model, tokenizer, ModelConfig(name_or_path=str(base), dtype="float32"), tmp_path / "peft", tmp_path / "ours"
    )
    assert report.difference.relative <= TOLERANCE
    fresh = base_of(base)
    load_adapter(fresh, tmp_path / "ours")
    assert relative(logits(fresh), expected) <= TOLERANCE
    assert relative(logits(base_of(base)), expected) >= 1e-2
    assert report.method == METHOD_OF.get(name, "lora")


def test_a_start_that_is_computed_again_has_the_signs_that_were_trained_from(tmp_path):
    """A decomposition may come out with other signs elsewhere; A - A0 must stay small, or bfloat16 loses its digits."""
    base = save_base(tmp_path / "base", "llama")
    expected = peft_trained(base, tmp_path / "peft", init_lora_weights="pissa")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path)  # the same product B A
    model = base_of(base)
    import_peft(model, tmp_path / "peft")
    assert relative(logits(model), expected) <= TOLERANCE
    for layer in adapter_layers(model).values():
        assert float((layer.lora_A - layer.initial_A).norm()) < 0.5 * float(layer.lora_A.norm())


def base_with_equal_singular_values(folder):
    """A base whose q_proj are the identity: which singular vectors lead is the decomposition's own choice."""
    base = save_base(folder, "llama")
    model = base_of(base)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.copy_(torch.eye(32))
    model.save_pretrained(base)
    return base


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_start_without_leading_singular_vectors_is_the_one_that_peft_computes(use_dora, tmp_path):
    base = base_with_equal_singular_values(tmp_path / "base")
    settings = {"target_modules": ["q_proj"], "init_lora_weights": "pissa", "use_dora": use_dora}
    expected = peft_trained(base, tmp_path / "peft", **settings)
    model, config = base_of(base), ModelConfig(name_or_path=str(base), dtype="float32")
    report = import_to(model, load_tokenizer(config), config, tmp_path / "peft", tmp_path / "ours")
    assert report.difference.relative <= TOLERANCE
    assert relative(logits(model), expected) <= TOLERANCE
    for layer in model.model.layers:  # PEFT subtracts its start from them when it loads
        assert torch.equal(layer.self_attn.q_proj.base_layer.weight, torch.eye(32))


def test_a_start_other_than_pefts_does_not_pass(tmp_path, monkeypatch):
    """The comparison is with the start that PEFT computes, not with ours put into PEFT."""
    base = base_with_equal_singular_values(tmp_path / "base")
    peft_trained(base, tmp_path / "peft", target_modules=["q_proj"], init_lora_weights="pissa")
    real = from_peft._exact_pissa

    def other(model, adapter, name):
        start = real(model, adapter, name)
        return PeftLayer(start.lora_A.roll(1, dims=1), start.lora_B.roll(1, dims=0))  # as good for the identity

    monkeypatch.setattr("dude_cli.export.from_peft._exact_pissa", other)
    model, config = base_of(base), ModelConfig(name_or_path=str(base), dtype="float32")
    with pytest.raises(AdapterError, match="the imported adapter, beside PEFT's, does not give"):
        import_to(model, load_tokenizer(config), config, tmp_path / "peft", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_randomised_pissa_start_needs_the_initial_adapter(use_dora, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    settings = {"init_lora_weights": "pissa_niter_2", "use_dora": use_dora}
    expected = peft_trained(base, tmp_path / "peft", initial=tmp_path / "initial", **settings)
    with pytest.raises(AdapterError, match="cannot be restored from itself") as error:
        import_peft(base_of(base), tmp_path / "peft")
    assert "--initial" in (error.value.fix or "")
    model = base_of(base)
    config = import_peft(model, tmp_path / "peft", initial=tmp_path / "initial")
    assert config.method == ("dude" if use_dora else "pissa")
    assert relative(logits(model), expected) <= TOLERANCE


def test_a_heads_weight_that_peft_saved_must_be_the_bases(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    expected = peft_trained(base, tmp_path / "peft", target_modules=["q_proj", "lm_head"], use_dora=True)
    path = tmp_path / "peft" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in tensors  # PEFT's own doing
    model = base_of(base)
    import_peft(model, tmp_path / "peft")
    assert relative(logits(model), expected) <= TOLERANCE
    tensors[key][3] += 1
    save_file(tensors, path)
    with pytest.raises(AdapterError, match="a weight of its own for lm_head"):
        import_peft(base_of(base), tmp_path / "peft")


def test_an_imported_adapter_goes_on_training_and_is_saved(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    peft_trained(base, tmp_path / "peft", use_dora=True)
    model = base_of(base)
    import_peft(model, tmp_path / "peft")
    before = logits(model)
    train_a_little(model)
    after = logits(model)
    assert relative(after, before) >= 1e-3
    save_adapter(model, tmp_path / "ours")
    fresh = base_of(base)
    load_adapter(fresh, tmp_path / "ours")
    assert torch.equal(logits(fresh), after)


@pytest.mark.parametrize("method", METHODS)
def test_the_error_of_the_best_lora_falls_to_nothing(method, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = save_trained(tmp_path / "adapter", base, AdapterConfig(method=method, rank=4))
    errors, logit_errors = [], []
    for rank in (1, 4, 8, 16, 32):
        loaded = load_target(find_target(str(adapter)))
        expected = logits(loaded.model)
        report = export_lora(loaded, tmp_path / f"rank-{rank}", rank=rank)
        assert torch.equal(logits(loaded.model), expected)
        theirs = PeftModel.from_pretrained(base_of(base), tmp_path / f"rank-{rank}")
        assert report.low_rank is not None
        by_layer = report.low_rank.by_layer
        assert set(by_layer) == set(adapter_layers(loaded.model))
        errors.append(max(by_layer.values()))
        logit_errors.append(relative(logits(theirs), expected))
    assert all(later < earlier or later <= 1e-5 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] <= TOLERANCE
    assert logit_errors[-1] <= TOLERANCE
    assert logit_errors[0] > 1e-3
    if method in ("pissa", "lora"):  # without a magnitude the change has the rank of its factors
        assert errors[2] <= TOLERANCE


def test_the_error_is_that_of_the_truncated_decomposition(tmp_path):
    loaded = trained_target(tmp_path, "llama", AdapterConfig(method="dude", rank=4))
    report = export_lora(loaded, tmp_path / "lora", rank=5)
    assert report.low_rank is not None
    for name, layer in adapter_layers(loaded.model).items():
        W0 = layer.weight.double()
        P, Q = (factor.detach().double() for factor in layer.factors.difference())
        V = W0 + layer.scaling * P @ Q
        change = (layer.magnitude.detach().double() / V.norm(dim=1))[:, None] * V - W0
        assert torch.allclose(learned_change(layer).double(), change, atol=1e-6)
        S = torch.linalg.svdvals(change)
        assert report.low_rank.by_layer[name] == pytest.approx(float(S[5:].norm() / S.norm()), rel=1e-3)


@pytest.mark.parametrize("max_error", [0.5, 0.1, 0.01])
def test_the_lowest_rank_within_an_error_is_found(max_error, tmp_path):
    loaded = trained_target(tmp_path, "llama", AdapterConfig(method="dude", rank=4))
    report = export_lora(loaded, tmp_path / "lora", max_error=max_error)
    assert report.low_rank is not None
    assert max(report.low_rank.by_layer.values()) <= max_error
    rank = report.low_rank.rank
    one_less = export_lora(loaded, tmp_path / "less", rank=rank - 1).low_rank
    assert one_less is not None
    assert max(one_less.by_layer.values()) > max_error
    assert lowest_rank(loaded.model, 0.0, lambda text: None) == 32


def save_moe_base(folder):
    """A base with a dense block, and one with experts and a shared expert: its linear layers are not the experts."""
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "first_k_dense_replace": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    sizes |= {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_shared_experts": 1}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("glm4_moe", vocab_size=96, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(quickstart.MODEL_DIR).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("export", [export_peft, export_lora])
@pytest.mark.parametrize("method", ["dude", "lora"])
def test_layers_that_peft_takes_for_experts_are_refused(method, export, tmp_path):
    base = save_moe_base(tmp_path / "base")
    config = AdapterConfig(method=method, rank=2)
    loaded = load_target(find_target(str(save_trained(tmp_path / "adapter", base, config))))
    with pytest.raises(UsageError, match="6 layers") as error:
        export(loaded, tmp_path / "out")
    assert "model.layers.0.mlp.gate_proj" in error.value.what
    excluded = ["lm_head", "down_proj", "gate_proj", "up_proj"]
    assert "adapter.exclude_modules: [down_proj, gate_proj, up_proj]" in (error.value.fix or "")
    assert not (tmp_path / "out").exists()

    config = AdapterConfig(method=method, rank=2, exclude_modules=excluded)
    loaded = load_target(find_target(str(save_trained(tmp_path / "without", base, config))))
    expected = logits(loaded.model)
    export_peft(loaded, tmp_path / "out")
    assert relative(logits(PeftModel.from_pretrained(base_of(base), tmp_path / "out")), expected) <= TOLERANCE


def test_a_target_is_named_in_full_where_another_module_ends_alike(tmp_path):
    """CTRL's linear layers `ffn.0` and `ffn.2` have short names that its blocks `h.0` and the like have too."""
    sizes = {"n_embd": 32, "dff": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("ctrl", vocab_size=96, **sizes))
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(quickstart.MODEL_DIR).save_pretrained(tmp_path / "base")
    save_trained(tmp_path / "adapter", tmp_path / "base", AdapterConfig(method="dude", rank=2))
    loaded = load_target(find_target(str(tmp_path / "adapter")))
    expected = logits(loaded.model)
    export_peft(loaded, tmp_path / "peft")
    theirs = PeftModel.from_pretrained(base_of(tmp_path / "base"), tmp_path / "peft")
    assert relative(logits(theirs), expected) <= TOLERANCE


def test_a_rank_that_no_layer_has_is_refused(tmp_path):
    loaded = trained_target(tmp_path, "llama", AdapterConfig(method="lora", rank=4))
    with pytest.raises(UsageError, match="at rank 32 nothing is left out"):
        export_lora(loaded, tmp_path / "lora", rank=33)


def test_the_rank_that_is_not_given_is_at_most_the_layers_own(tmp_path):
    config = AdapterConfig(method="pissa", rank=12, target_modules=["k_proj"])  # 16 x 32: the difference has rank 16
    report = export_lora(trained_target(tmp_path, "llama", config), tmp_path / "lora")
    assert report.low_rank is not None
    assert report.low_rank.rank == 16
    assert max(report.low_rank.by_layer.values()) <= TOLERANCE


@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["dude", "lora"])
def test_an_adapter_is_loaded_in_float16_too(method, trained, tmp_path):
    config = AdapterConfig(method=method, rank=4)
    expected = logits(trained_target(tmp_path, "llama", config, getattr(torch, trained)).model)
    half = load_target(find_target(str(tmp_path / "adapter")), Loading("float16"))
    assert half.model.dtype == torch.float16
    assert half.config.dtype == "float16"
    assert relative(logits(half.model), expected) <= 2e-2


def test_an_untrained_adapter_is_exported_without_a_division_by_zero(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    save_adapter(patch_model(base_of(base), AdapterConfig(method="dude", rank=4)), tmp_path / "adapter")
    loaded = load_target(find_target(str(tmp_path / "adapter")))
    report = export_lora(loaded, tmp_path / "lora", max_error=0.1)
    assert report.low_rank is not None
    assert set(report.low_rank.by_layer.values()) == {0.0}


def test_an_export_past_the_tolerance_leaves_nothing(tmp_path, monkeypatch):
    real = peft_files.write_peft_adapter

    def lossy(folder, layers, config):
        real(folder, {name: layer for name, layer in layers.items() if "layers.1" not in name}, config)

    monkeypatch.setattr("dude_cli.export.peft_format.write_peft_adapter", lossy)
    loaded = trained_target(tmp_path, "llama", AdapterConfig(method="dude", rank=4))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="does not give the logits of the model in memory") as error:
        export_peft(loaded, tmp_path / "peft")
    assert error.value.exit_code == 3
    assert sorted(tmp_path.iterdir()) == before


def base_with_zero_rows(folder, kind, count, dtype=torch.float32):
    """A base whose first block has `count` zero rows in one layer."""
    base = save_base(folder, kind, dtype)
    model = base_of(base, dtype)
    name = "model.layers.0.mlp.up_proj" if kind == "llama" else "transformer.h.0.mlp.c_fc"
    with torch.no_grad():
        in_stored_orientation(model.get_submodule(name), model.get_submodule(name).weight)[:count] = 0
    model.save_pretrained(base)
    return base


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["dude", "dora"])
def test_a_row_that_is_zero_is_zero_in_peft_too(method, kind, dtype, tmp_path):
    """PEFT's DoRA divides zero by zero there, if it is given the row as it is."""
    base = base_with_zero_rows(tmp_path / "base", kind, 3, getattr(torch, dtype))
    save_trained(tmp_path / "adapter", base, AdapterConfig(method=method, rank=4), getattr(torch, dtype))
    loaded = load_target(find_target(str(tmp_path / "adapter")))
    expected = logits(loaded.model)
    report = export_peft(loaded, tmp_path / "first")
    theirs = logits(PeftModel.from_pretrained(base_of(base, getattr(torch, dtype)), tmp_path / "first"))
    assert relative(theirs, expected) <= report.tolerance
    model, config = base_of(base, getattr(torch, dtype)), ModelConfig(name_or_path=str(base), dtype=dtype)
    import_to(model, load_tokenizer(config), config, tmp_path / "first", tmp_path / "imported")
    export_peft(load_target(find_target(str(tmp_path / "imported"))), tmp_path / "second")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


def test_a_layer_that_is_zero_has_nothing_that_peft_could_divide_by(tmp_path):
    base = base_with_zero_rows(tmp_path / "base", "llama", 56)
    save_trained(tmp_path / "adapter", base, AdapterConfig(method="dude", rank=4))
    with pytest.raises(UsageError, match=r"row 0 of model\.layers\.0\.mlp\.up_proj is zero") as error:
        export_peft(load_target(find_target(str(tmp_path / "adapter"))), tmp_path / "peft")
    assert "adapter.exclude_modules: [model.layers.0.mlp.up_proj]" in (error.value.fix or "")
    assert not (tmp_path / "peft").exists()


def import_files(base, folder, out, **given):
    config = ModelConfig(name_or_path=str(base), dtype="float32")
    return import_to(base_of(base), load_tokenizer(config), config, folder, out, **given)


@pytest.mark.parametrize("start", [False, "gaussian"])
def test_an_initial_adapter_that_was_not_subtracted_is_refused(start, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    peft_trained(base, tmp_path / "peft", initial=tmp_path / "initial", init_lora_weights=start)
    with pytest.raises(UsageError, match=f"the start {start!r} was not subtracted from the base"):
        import_files(base, tmp_path / "peft", tmp_path / "ours", initial=tmp_path / "initial")
    change_config(tmp_path / "peft", init_lora_weights=True)
    with pytest.raises(UsageError, match=f"the start {start!r} was not subtracted from the base"):
        import_files(base, tmp_path / "peft", tmp_path / "ours", initial=tmp_path / "initial")
    import_files(base, tmp_path / "peft", tmp_path / "ours")


@pytest.mark.parametrize("written", ["olora", True])
def test_a_subtracted_start_may_be_called_pefts_default(written, tmp_path):
    """PEFT's own example writes True into the initial adapter, and what is trained from it may say so too."""
    base = save_base(tmp_path / "base", "llama")
    expected = peft_trained(base, tmp_path / "peft", initial=tmp_path / "initial", init_lora_weights="olora")
    change_config(tmp_path / "peft", init_lora_weights=written)
    change_config(tmp_path / "initial", init_lora_weights=True)
    import_files(base, tmp_path / "peft", tmp_path / "ours", initial=tmp_path / "initial")
    model = base_of(base)
    load_adapter(model, tmp_path / "ours")
    assert relative(logits(model), expected) <= TOLERANCE


@pytest.mark.parametrize("start", ["pissa", "olora", True])
def test_a_base_with_a_nan_is_told_in_an_import(start, tmp_path):
    base = save_base(tmp_path / "base", "llama")
    peft_trained(base, tmp_path / "peft", initial=tmp_path / "initial", init_lora_weights=start)
    model = base_of(base)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(base)
    message = "infinite or NaN values cannot be decomposed" if start == "pissa" else "are not finite themselves"
    initial = tmp_path / "initial" if start == "olora" else None
    with pytest.raises(AdapterError, match=message) as error:
        import_files(base, tmp_path / "peft", tmp_path / "ours", initial=initial)
    assert error.value.where == ("model.layers.0.mlp.up_proj" if start == "pissa" else None)


def test_what_peft_cannot_load_is_told_as_peft_says_it(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    peft_trained(base, tmp_path / "peft")
    change_config(tmp_path / "peft", r=16)
    with pytest.raises(AdapterError, match=r"PEFT cannot load the adapter: .* size mismatch"):
        import_files(base, tmp_path / "peft", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_change_with_a_nan_names_its_layer(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    model = patch_model(base_of(base), AdapterConfig(method="dude", rank=4))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_A[0, 0] = float("nan")
    save_adapter(model, tmp_path / "adapter")
    loaded = load_target(find_target(str(tmp_path / "adapter")))
    for options in ({"rank": 2}, {"max_error": 0.1}):
        with pytest.raises(AdapterError, match="cannot be decomposed") as error:
            export_lora(loaded, tmp_path / "lora", **options)
        assert error.value.where == "model.layers.1.mlp.up_proj"
    with pytest.raises(AdapterError, match="are not finite themselves"):
        export_merged(loaded, tmp_path / "merged", "float32")


def test_a_merged_model_for_images_has_its_processor_and_one_dtype_in_its_config(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = sizes | {"model_type": "gemma3_text", "vocab_size": 96, "num_key_value_heads": 2, "head_dim": 8}
    vision = sizes | {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(quickstart.MODEL_DIR).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    settings = AdapterConfig(method="dude", rank=2, target_modules=r".*language_model.*q_proj")
    save_adapter(patch_model(base_of(tmp_path / "base"), settings), tmp_path / "adapter")
    loaded = load_target(find_target(str(tmp_path / "adapter")))
    export_merged(loaded, tmp_path / "merged", "bfloat16")
    saved = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {part["dtype"] for part in (saved, saved["text_config"], saved["vision_config"])} == {"bfloat16"}
    written = (tmp_path / "merged" / "preprocessor_config.json").read_text()
    assert written == (tmp_path / "base" / "preprocessor_config.json").read_text()
