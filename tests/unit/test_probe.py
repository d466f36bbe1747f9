"""What two models' logits are compared by."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, train_a_little

from dude_cli.adapter import AdapterConfig, patch_model
from dude_cli.errors import AdapterError
from dude_cli.export.probe import check, difference, probe_logits, tolerance


def test_the_difference_is_the_largest_one_and_its_share_of_the_largest_logit():
    expected = torch.tensor([[[1.0, -4.0], [0.5, 3.0]]])
    found = difference(expected + torch.tensor([[[0.0, 0.2], [0.0, -2.8]]]), expected)
    assert found.largest == pytest.approx(2.8)
    assert found.relative == pytest.approx(0.7)
    assert found.same_top_token == 0.5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_never_within_a_tolerance(bad):
    expected = torch.ones(1, 2, 3)
    found = expected.clone()
    found[0, 1, 2] = bad
    with pytest.raises(AdapterError, match="does not give the logits") as error:
        check(difference(found, expected), 0.5, "the copy")
    assert "above 65504" in (error.value.fix or "")
    with pytest.raises(AdapterError, match=r"the copy cannot be verified: .* are not finite themselves"):
        check(difference(expected, found), 0.5, "the copy")
    check(difference(expected, expected), 0.0, "the copy")


def test_the_probe_is_the_same_each_time_and_leaves_the_model_as_it_was():
    model = patch_model(tiny_model("llama"), AdapterConfig(method="dude", rank=4, dropout=0.5)).train()
    train_a_little(model)
    logits = probe_logits(model)
    assert torch.equal(probe_logits(model), logits)
    assert logits.dtype == torch.float32
    assert model.training


def test_the_tolerance_is_that_of_the_coarsest_dtype_and_grows_with_the_depth():
    model = tiny_model("llama")
    assert tolerance(model, "float32") == 1e-5
    assert tolerance(model, "float32", "bfloat16") == tolerance(model, "bfloat16") > tolerance(model, "float16")
    shallow = tolerance(model, "bfloat16")
    model.config.num_hidden_layers = 8
    assert tolerance(model, "bfloat16") == pytest.approx(2 * shallow)
