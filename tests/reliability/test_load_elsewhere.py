"""What was trained is what loads: in a new process, on a fresh base from disk, logits are equal bit for bit."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import environment
from safetensors.torch import save_file
from tiny_models import tiny_batch, tiny_model, train_a_little
from transformers import AutoModelForCausalLM

from dude_cli.adapter import AdapterConfig, patch_model, save_adapter

METHODS = ("dude", "dora", "pissa", "lora")
# Biases in no layer, in the attention, in all layers of GPT-2, on q k v of Qwen2; Gemma ties its embeddings.
BASES = {
    "llama": {"kind": "llama"},
    "llama with biases": {"kind": "llama", "attention_bias": True},
    "gpt2": {"kind": "gpt2"},
    "qwen2": {"kind": "qwen2"},
    "gemma": {"kind": "gemma"},
    "gemma with biases": {"kind": "gemma", "attention_bias": True},
}
DTYPES = (torch.float32, torch.bfloat16)
CASES = list(itertools.product(METHODS, DTYPES, BASES))

COMPARE = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from dude_cli.adapter import load_adapter

equal = []
for case in sorted(Path(sys.argv[1]).iterdir()):
    expected = load_file(case / "expected.safetensors")
    model = AutoModelForCausalLM.from_pretrained(case / "base", dtype=expected["logits"].dtype)
    load_adapter(model, case / "adapter")
    with torch.no_grad():
        equal.append(torch.equal(model(input_ids=expected["ids"]).logits, expected["logits"]))
print(json.dumps(equal))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[bool]:
    """Train and save each case here; load them all in one other process, which says whether the logits are equal."""
    folder = tmp_path_factory.mktemp("cases")
    for number, (method, dtype, base) in enumerate(CASES):
        save_case(folder / f"{number:03d}", method, dtype, base)
    command = [sys.executable, "-c", COMPARE, str(folder)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def save_case(folder: Path, method: str, dtype: torch.dtype, base: str) -> None:
    tiny_model(dtype=dtype, **BASES[base]).save_pretrained(folder / "base")
    model, ids = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype), tiny_batch()
    with torch.no_grad():
        before = model(input_ids=ids).logits
    patch_model(model, AdapterConfig(method=method, rank=4, alpha=6.0))
    train_a_little(model)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert not torch.equal(logits, before)
    save_adapter(model, folder / "adapter")
    save_file({"ids": ids, "logits": logits}, folder / "expected.safetensors")


@pytest.mark.parametrize("number", range(len(CASES)), ids=[" ".join(map(str, case)) for case in CASES])
def test_logits_in_a_new_process_are_equal_bit_for_bit(number, found):
    assert found[number]
