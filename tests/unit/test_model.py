"""What loading a base model says when it fails."""

from __future__ import annotations

import pytest
from exporting import save_base, save_trained

from dude_cli import quickstart
from dude_cli.adapter import AdapterConfig
from dude_cli.config import ModelConfig
from dude_cli.errors import ResourceError, UsageError
from dude_cli.model import check_quantization, hub_commit, load_model, load_tokenizer


@pytest.mark.parametrize(
    ("attention", "meant"), [("sdpaa", "did you mean sdpa?"), ("flash_attention_3", "sdpa and eager need nothing")]
)
def test_an_attention_kernel_that_is_not_there_is_named_as_the_cause(attention, meant):
    config = ModelConfig(name_or_path=quickstart.NAME, dtype="float32", attn_implementation=attention)
    with pytest.raises(UsageError, match=f"the attention kernel {attention} cannot be used") as error:
        load_model(config)
    assert error.value.where == f"model.attn_implementation: {attention}"
    assert meant in (error.value.fix or "")


def test_a_base_that_does_not_fit_is_a_want_of_memory(monkeypatch):
    from transformers import AutoModelForCausalLM

    class OutOfMemoryError(RuntimeError):  # as torch's is called
        pass

    def from_pretrained(*_: object, **__: object) -> None:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(ResourceError, match="out of memory while the base model was loaded"):
        load_model(ModelConfig(name_or_path=quickstart.NAME, dtype="float32"))


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


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_without_bitsandbytes_a_quantised_base_is_refused_with_what_to_install(monkeypatch, quantization):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_quantization(ModelConfig(name_or_path=quickstart.NAME))
    with pytest.raises(UsageError, match="needs bitsandbytes") as error:
        load_model(ModelConfig(name_or_path=quickstart.NAME, quantization=quantization))
    assert error.value.where == f"model.quantization: {quantization}"
    assert error.value.fix == "pip install bitsandbytes"


def test_files_that_are_quantised_need_bitsandbytes_too(monkeypatch):
    from transformers import AutoModelForCausalLM

    def from_pretrained(*_: object, **__: object) -> None:
        raise ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install ...`")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(UsageError, match="needs bitsandbytes") as error:
        load_model(ModelConfig(name_or_path=quickstart.NAME))
    assert error.value.where == f"model.name_or_path: {quickstart.NAME}, whose files are quantised"


def test_the_commit_of_a_base_is_that_of_its_files_on_the_hub(monkeypatch):
    asked = []

    def download(name: str, file: str, revision: str | None) -> str:
        asked.append((name, revision))
        return f"/cache/models--owner--name/snapshots/{'c' * 40}/{file}"

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert hub_commit(ModelConfig(name_or_path="owner/name", revision="v2")) == "c" * 40
    assert hub_commit(ModelConfig(name_or_path=quickstart.NAME)) is None
    assert hub_commit(ModelConfig(name_or_path=str(quickstart.MODEL_DIR))) is None
    assert asked == [("owner/name", "v2")]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma"])
def test_a_model_without_tokenizer_files_is_told_which_are_wanted(kind, tmp_path):
    """transformers fails for one kind, and gives another an empty tokenizer."""
    base = save_base(tmp_path / "base", kind)
    assert len(load_tokenizer(ModelConfig(name_or_path=str(base)))) > 500
    for file in base.glob("tokenizer*"):
        if file.name != "tokenizer_config.json":
            file.unlink()
    (base / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UsageError, match="has no tokenizer files") as error:
        load_tokenizer(ModelConfig(name_or_path=str(base)))
    assert error.value.where == f"model.name_or_path: {base}"
    assert "tokenizer.json" in (error.value.fix or "")


def test_an_adapter_in_the_place_of_a_model_is_told_where_it_belongs(tmp_path):
    save_trained(tmp_path / "run/adapter", save_base(tmp_path / "base", "llama"), AdapterConfig(rank=2))
    (tmp_path / "run/config.yaml").write_text("")
    for folder, what in ((tmp_path / "run", "a run"), (tmp_path / "run/adapter", "an adapter")):
        with pytest.raises(UsageError, match=f"is {what}, not a model") as error:
            load_model(ModelConfig(name_or_path=str(folder)))
        assert f"adapter.init_from: {folder}" in (error.value.fix or "")


def test_gguf_files_are_told_to_be_no_weights_for_a_training(tmp_path):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    for path in (tmp_path, tmp_path / "model.Q4_K_M.gguf"):
        with pytest.raises(UsageError, match="GGUF, which cannot be trained") as error:
            load_model(ModelConfig(name_or_path=str(path)))
        assert "the original weights" in (error.value.fix or "")


def test_a_repository_of_gguf_files_is_told_to_be_no_weights_for_a_training(monkeypatch):
    from transformers import AutoModelForCausalLM

    def from_pretrained(*_: object, **__: object) -> None:
        raise OSError("owner/name-GGUF does not appear to have a file named config.json.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(UsageError, match="GGUF, which cannot be trained"):
        load_model(ModelConfig(name_or_path="owner/name-GGUF"))
