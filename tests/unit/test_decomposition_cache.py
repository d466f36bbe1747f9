"""Decompositions are kept by content, verified, shared, bounded, and never in the way of a run."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from dude_cli.adapter import AdapterConfig, DecompositionCache, SvdConfig, adapter_layers, patch_model
from dude_cli.adapter import decomposition_cache as module
from dude_cli.adapter.decomposition_cache import decomposition_key
from dude_cli.errors import AdapterError
from dude_cli.system.cache_dir import prune

CONFIG = AdapterConfig(rank=3)


def linear(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(12, 9, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(9, 12, generator=torch.Generator().manual_seed(seed)))
    return layer


@pytest.fixture
def said():
    return []


@pytest.fixture
def cache(tmp_path, said):
    return DecompositionCache(tmp_path / "cache", said.append)


@pytest.fixture
def computed(monkeypatch):
    """The names of the layers that were decomposed, not read."""
    names = []
    compute = module.decompose_layer

    def record(name, layer, config):
        names.append(name)
        return compute(name, layer, config)

    monkeypatch.setattr(module, "decompose_layer", record)
    return names


def test_what_is_kept_is_what_was_computed_and_is_not_computed_again(cache, computed, said):
    first = cache.decompose("a", linear(), CONFIG)
    again = DecompositionCache(cache.folder).decompose("b", linear(), CONFIG.model_copy(update={"alpha": 64.0}))
    assert computed == ["a"]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert said == []


def test_seeds_methods_alphas_and_rates_share_and_what_changes_the_factors_does_not(computed, cache):
    for seed, settings in enumerate([{"method": "dude"}, {"method": "pissa", "alpha": 7.0}, {"dropout": 0.1}]):
        config = AdapterConfig(rank=2, target_modules=["q_proj"], **settings)
        patched = patch_model(tiny_model("llama"), config, seed=seed, decompose=cache.decompose)
        plain = patch_model(tiny_model("llama"), config, seed=9)
        for one, other in zip(adapter_layers(patched).values(), adapter_layers(plain).values(), strict=True):
            assert torch.equal(one.lora_A, other.lora_A)
            assert torch.equal(one.lora_B, other.lora_B)
    assert len(computed) == len(set(computed)) > 1

    exact, randomized = SvdConfig(algorithm="exact"), SvdConfig(algorithm="randomized")
    same = decomposition_key(linear(), 3, SvdConfig())
    assert decomposition_key(linear(), 3, exact) == same  # what `auto` does here
    changed = linear()
    changed.weight.data.view(torch.uint8)[-1, -4] ^= 1
    conv = Conv1D(12, 9)  # the same bytes as (in, out)
    conv.weight.data = linear().weight.data.clone()
    others = [
        decomposition_key(changed, 3, exact),
        decomposition_key(conv, 3, exact),
        decomposition_key(linear(dtype=torch.bfloat16), 3, exact),
        decomposition_key(linear(), 2, exact),
        decomposition_key(linear(), 3, randomized),
        decomposition_key(linear(), 3, randomized.model_copy(update={"iterations": 5})),
    ]
    assert len({same, *others}) == 1 + len(others)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "another file"])
def test_a_damaged_file_is_made_anew_with_a_line(damage, cache, computed, said):
    first = cache.decompose("a", linear(), CONFIG)
    (path,) = cache.folder.iterdir()
    whole = path.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    path.write_bytes({"flipped": flipped, "cut": whole[:-3], "empty": b"", "another file": b"x" * 99}[damage])
    again = cache.decompose("a", linear(), CONFIG)
    assert torch.equal(first.A, again.A)
    assert computed == ["a", "a"]
    assert said == [f"{path} is damaged and is made anew"]
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_a_line_not_the_run(tmp_path, computed, said):
    (tmp_path / "file").write_text("x")
    cache = DecompositionCache(tmp_path / "file/cache", said.append)
    for name in ("a", "b"):
        cache.decompose(name, linear(), CONFIG)
    cache.prune()
    assert computed == ["a", "b"]
    assert len(said) == 1
    assert "cannot be used" in said[0]


def test_a_full_disk_leaves_nothing_half_written(cache, monkeypatch, said):
    def fail(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(module.files, "save_tensors", fail)
    assert cache.decompose("a", linear(), CONFIG).A.shape == (3, 12)
    assert list(cache.folder.iterdir()) == []
    assert "No space left on device" in said[0]


def test_several_at_once_are_all_right(cache):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: DecompositionCache(cache.folder).decompose("a", linear(), CONFIG), range(12)))
    assert all(torch.equal(one.A, found[0].A) for one in found)
    assert len(list(cache.folder.iterdir())) == 1


def test_the_least_recently_used_are_deleted_first(cache, computed):
    for seed in range(4):
        cache.decompose(str(seed), linear(seed), CONFIG)
    for seed, path in enumerate(
        cache.folder / f"{decomposition_key(linear(n), 3, CONFIG.svd)}.safetensors" for n in range(4)
    ):
        os.utime(path, ns=(seed, seed))
    cache.decompose("0", linear(0), CONFIG)  # used now
    size = next(cache.folder.iterdir()).stat().st_size
    prune(cache.folder, 2 * size)
    computed.clear()
    for seed in (0, 3, 1, 2):
        cache.decompose(str(seed), linear(seed), CONFIG)
    assert computed == ["1", "2"]


def test_a_layer_that_cannot_be_decomposed_is_named(cache):
    layer = linear()
    layer.weight.data[0, 0] = float("nan")
    with pytest.raises(AdapterError, match=r"where: model\.q_proj"):
        cache.decompose("model.q_proj", layer, CONFIG)
    assert not cache.folder.exists()
