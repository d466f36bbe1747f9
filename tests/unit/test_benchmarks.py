"""The benchmarks measure what they say, and docs/performance.md has what they measured."""

from __future__ import annotations

import shlex

import counts
import measure
import memory
import page
import pytest
import torch
from candidates import PEFT, layer_candidate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def test_the_page_has_what_the_result_files_have():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.render(text) == text, "run: python benchmarks/page.py"
    assert all(f"<!-- table {name} -->" in text for name in page.BLOCKS)


def test_every_case_says_what_ran_and_where():
    names = ("layer.json", "step.json", "memory.json", "growth.json")  # the others write one result, not cases
    for path in [measure.results(device) / name for device in ("cpu", "amx", "avx2", "cuda") for name in names]:
        for name, case in measure.read(path).items():
            assert {"settings", "command", "commit", "date", "machine"} <= set(case), f"{path.name}: {name}"
            assert not case["commit"].endswith("+changes"), f"{path.name}: {name} was measured with uncommitted code"
            after = shlex.split(case["command"].partition(" --only ")[2])
            assert after == [] or (after[0] in name and after[1:2] in ([], ["--seconds"])), case["command"]
    singles = [
        measure.read(measure.RESULTS / f"{name}.json")
        for name in (
            "decomposition",
            "amx/decomposition",
            "avx2/decomposition",
            "startup",
            "avx2/startup",
            "padding",
            "encoding",
            "prompts",
        )
    ]
    trainings = measure.read(measure.results("cuda") / "large.json").values()
    commits = [
        *(single["commit"] for single in singles),
        *(training["environment"]["git_commit"] for training in trainings),
    ]
    assert not any(commit.endswith("+changes") for commit in commits)


@pytest.mark.parametrize("name", PEFT)
def test_the_counted_operations_of_peft_are_those_that_run(name):
    sizes = counts.Layer(out=48, in_=32, tokens=10, rank=4)
    candidate = layer_candidate(name, torch.randn(sizes.out, sizes.in_) / 6, sizes.rank)
    x = torch.randn(sizes.tokens, sizes.in_, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        candidate.module(x).sum().backward()
    operations = counts.MICRO_BATCH[name.removesuffix(" + pissa")](sizes)
    assert counter.get_total_flops() == counts.work(operations, element_bytes=4).flops


def test_the_roofline_takes_the_slower_of_arithmetic_and_memory_for_each_operation():
    operations = [counts.product("x", 2, 3, 5), counts.elementwise("y", 7, reads=2)]
    machine = counts.Machine(flop_per_s=1.0, bytes_per_s=4.0)
    found = counts.work(operations, 4, machine)
    assert found == counts.Work(flops=60, bytes=4 * (10 + 15 + 6 + 21), seconds=60.0 + 21.0)


def test_rounds_alternate_their_order_and_the_first_is_not_counted(monkeypatch):
    monkeypatch.setattr(measure, "MIN_ROUNDS", 2)
    calls = []
    seconds = measure.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, budget_s=0.0)
    assert "".join(calls) == "ab" + "ab" + "ba"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


@pytest.mark.parametrize(
    ("instructions", "has_amx", "folder"), [("AVX512", False, "."), ("AVX512", True, "amx"), ("AVX2", False, "avx2")]
)
def test_a_case_that_is_measured_again_replaces_only_itself(monkeypatch, tmp_path, instructions, has_amx, folder):
    monkeypatch.setattr(measure.torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    monkeypatch.setattr(measure.torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx})
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(measure.torch, "set_num_threads", lambda threads: None)
    cases = [measure.Case("r=1", {}, True), measure.Case("r=2", {}, False)]
    for arguments, value in (([], 1), (["--only", "r=2"], 2), (["--short"], 3)):
        monkeypatch.setattr("sys.argv", ["benchmarks/x.py", *arguments])
        path = measure.run("x", None, cases, lambda case, budget_s, value=value: {"value": value})
    assert {name: case["value"] for name, case in measure.read(tmp_path / folder / "x.json").items()} == {
        "r=1": 1,
        "r=2": 2,
    }
    assert path == tmp_path / "short" / "x.json"
    assert list(measure.read(path)) == ["r=1"]
    monkeypatch.setattr("sys.argv", ["benchmarks/y.py"])
    of_bytes = measure.run("y", None, cases, lambda case, budget_s: {}, is_timed=False)
    assert of_bytes == tmp_path / "y.json", "bytes are the same on every CPU"


def test_ratios_are_of_the_same_round():
    """A machine whose pace changes between rounds changes no ratio; the ratio of the medians here is 1.5."""
    seconds = {"a": [1.0, 4.0, 2.0], "b": [3.0, 8.0, 2.0]}
    assert page._spread(seconds, "b", "a") == "2.00 ± 0.50"


def test_live_bytes_know_the_peak_and_the_end():
    def function():
        kept = torch.empty(1000, dtype=torch.float32)
        torch.empty(5000, dtype=torch.float32)
        torch.empty(3000, dtype=torch.float32)
        return kept

    assert memory.live_bytes(function) == memory.LiveBytes(peak=24_000, end=4_000)


def test_saved_bytes_are_each_storage_once_without_parameters_and_without_what_is_gone():
    layer = nn.Linear(8, 8)
    x = torch.randn(4, 8, requires_grad=True)  # so that the weight is saved too

    def forward():
        (layer(2 * x) * 2).exp()  # its graph is gone with it
        y = layer(x)
        return (y * y).sum() + y.view(-1).square().sum()

    # x for the weight's gradient; y for both squares, as y and as a view of it.
    assert memory.saved_bytes(layer, forward) == x.nbytes + 4 * 8 * 4
