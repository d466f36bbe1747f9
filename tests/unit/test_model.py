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
