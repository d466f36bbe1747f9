"""Which device a process takes, and what it is slow in."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from quickstart_config import quickstart_config
from training import init_here

import dude_cli
from dude_cli.system.runtime import best_device, environment, make_accelerator, quiet_libraries
from dude_cli.training import cpu


@pytest.mark.parametrize(("kind", "device"), [(None, "cpu"), ("mps", "cpu"), ("cuda", "cuda:0")])
def test_a_gpu_without_float64_is_not_taken(kind, device, monkeypatch):
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    asked = []
    monkeypatch.setattr(accelerate, "Accelerator", lambda **given: asked.append(given["cpu"]))
    make_accelerator()
    assert best_device() == device
    assert asked == [device == "cpu"]


@pytest.mark.parametrize(
    ("dtype", "slowdown", "is_said"),
    [("bfloat16", 40.0, True), ("bfloat16", 1.5, False), ("float32", 40.0, False)],
)
def test_a_dtype_that_this_cpu_is_slow_in_is_told(dtype, slowdown, is_said, tmp_path, monkeypatch):
    monkeypatch.setattr("dude_cli.training.prepare.product_slowdown", lambda dtype: slowdown)
    said = []
    init_here(quickstart_config(tmp_path, dtype=dtype, rows="8"), say=said.append)
    line = f"this CPU multiplies 40 times slower in {dtype} than in float32: try model.dtype=float32"
    assert (line in said) == is_said
    assert any("slower" in text for text in said) == is_said


def test_half_precision_is_compared_with_float32_by_the_clock(monkeypatch):
    """By the quickest: a machine may be busy. The first of a dtype is not counted."""
    times = iter([0, 1, 1, 10, 10, 16, 16, 30])
    with monkeypatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: next(times))
        assert cpu._product_seconds(torch.bfloat16) == 6
    monkeypatch.setattr(cpu, "_product_seconds", {torch.bfloat16: 6.0, torch.float32: 2.0}.__getitem__)
    assert cpu.product_slowdown(torch.bfloat16) == 3


@pytest.mark.parametrize(
    ("text", "is_shown"),
    [
        ("'timed out' thrown while requesting HEAD https://huggingface.co/base2/resolve/main/config.json", False),
        ("Retrying in 8s [Retry 5/5].", False),
        ("Rate limited. Waiting 290s before retry [Retry 1/5].", True),
    ],
)
def test_the_hub_is_tried_again_without_a_line(text, is_shown):
    """What fails in the end is told by our own error; a wait of minutes is told as it begins."""
    quiet_libraries()
    record = logging.LogRecord("", logging.WARNING, "", 0, text, None, None)
    assert bool(logging.getLogger("huggingface_hub.utils._http").filter(record)) == is_shown


def test_the_commit_of_the_code_is_recorded_in_a_checkout():
    root = Path(dude_cli.__file__).parents[1]
    if not (root / ".git").exists():
        pytest.skip("this is no checkout")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
    assert environment("cpu", 1, None)["git_commit"].removesuffix("+changes") == head.stdout.strip()


def test_code_outside_a_checkout_has_no_commit(tmp_path):
    shutil.copytree(Path(dude_cli.__file__).parent, tmp_path / "dude_cli")
    code = "from dude_cli.system.runtime import environment; print(environment('cpu', 1, None)['git_commit'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={}, stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"None\n"
