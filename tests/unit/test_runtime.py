"""Which device a process takes."""

from __future__ import annotations

import accelerate
import pytest
import torch

from dude_cli.runtime import best_device, make_accelerator


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
