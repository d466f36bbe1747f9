"""What loading a base model says when it fails."""

from __future__ import annotations

import pytest

from dude_cli import quickstart
from dude_cli.config import ModelConfig
from dude_cli.errors import UsageError
from dude_cli.model import load_model


@pytest.mark.parametrize(
    ("attention", "meant"), [("sdpaa", "did you mean sdpa?"), ("flash_attention_3", "sdpa and eager need nothing")]
)
def test_an_attention_kernel_that_is_not_there_is_named_as_the_cause(attention, meant):
    config = ModelConfig(name_or_path=quickstart.NAME, dtype="float32", attn_implementation=attention)
    with pytest.raises(UsageError, match=f"the attention kernel {attention} cannot be used") as error:
        load_model(config)
    assert error.value.where == f"model.attn_implementation: {attention}"
    assert meant in (error.value.fix or "")


@pytest.mark.parametrize(
    ("cause", "what", "fix"),
    [
        ("GatedRepoError", "is gated", "hf auth login"),
        ("RevisionNotFoundError", "has no such revision", "model.revision"),
        ("LocalEntryNotFoundError", "the hub cannot be reached", "hf download owner/name"),
        ("RepositoryNotFoundError", "has no model owner/name", "check the name"),
    ],
)
def test_what_the_hub_refuses_is_explained(monkeypatch, cause, what, fix):
    """transformers wraps the hub's errors in an OSError; the hub itself cannot be asked in a test."""
    from huggingface_hub import errors
    from transformers import AutoModelForCausalLM

    kind = getattr(errors, cause)

    def from_pretrained(*_: object, **__: object) -> None:
        raise OSError("You are trying to access a repo.") from kind.__new__(kind)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(UsageError) as error:
        load_model(ModelConfig(name_or_path="owner/name"))
    assert what in error.value.what
    assert fix in (error.value.fix or "")
