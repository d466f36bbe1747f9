"""Time one optimizer step of a Llama-shaped model: our four methods beside PEFT's, interleaved in one process.

    python benchmarks/step.py [--hidden 512] [--layers 2] [--micro-batches 4] [--tokens 256] [--rank 16] [--repeats 7]

Each repeat runs every candidate once, so that a change of the machine's pace hits all of them alike. Reported are
medians and their ratio to PEFT's LoRA. Writes benchmarks/results/step.json and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dude_cli.adapter import AdapterConfig, constant_adapters, patch_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Step = Callable[[], None]


def base_model(hidden: int, layers: int) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=2048,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
    )
    return AutoModelForCausalLM.from_config(config)


def our_step(method: str, arguments: argparse.Namespace) -> Step:
    model = base_model(arguments.hidden, arguments.layers)
    patch_model(model, AdapterConfig(method=method, rank=arguments.rank))
    return step_of(model, arguments, scope=True)


def peft_step(use_dora: bool, init: bool | str, arguments: argparse.Namespace) -> Step:
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.rank,
        target_modules=TARGETS,
        use_dora=use_dora,
        init_lora_weights=init,
    )
    return step_of(get_peft_model(base_model(arguments.hidden, arguments.layers), config), arguments, scope=False)


def step_of(model: torch.nn.Module, arguments: argparse.Namespace, *, scope: bool) -> Step:
    """Forward and backward of the micro-batches, then AdamW; ours within `constant_adapters`, as `dude train` does."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    ids = torch.randint(0, 2048, (1, arguments.tokens))

    def micro_batches() -> None:
        for _ in range(arguments.micro_batches):
            (model(input_ids=ids, labels=ids, use_cache=False).loss / arguments.micro_batches).backward()

    def step() -> None:
        if scope:
            with constant_adapters(model):
                micro_batches()
        else:
            micro_batches()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {
        "hidden": 512,
        "layers": 2,
        "micro-batches": 4,
        "tokens": 256,
        "rank": 16,
        "repeats": 7,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    candidates = {
        "PEFT lora": peft_step(False, True, arguments),
        "PEFT dora": peft_step(True, True, arguments),
        "PEFT dora + pissa": peft_step(True, "pissa", arguments),
    } | {method: our_step(method, arguments) for method in ("lora", "pissa", "dora", "dude")}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(arguments.repeats + 1):
        for name, step in candidates.items():
            start = time.perf_counter()
            step()
            if repeat > 0:  # the first round only warms up
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result = {
        "settings": vars(arguments),
        "machine": {"processor": platform.processor(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "median_s": median,
        "ratio_to_peft_lora": {name: value / median["PEFT lora"] for name, value in median.items()},
        "seconds": seconds,
    }
    path = Path(__file__).parent / "results" / "step.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print("| step of | median, ms | to PEFT's LoRA |\n| --- | ---: | ---: |")
    for name, value in median.items():
        print(f"| {name} | {value * 1e3:.0f} | {value / median['PEFT lora']:.2f} |")


if __name__ == "__main__":
    main()
