"""Write the tables of docs/performance.md from the result files, so that the page and the raw numbers cannot differ.

    python benchmarks/page.py        # fills the text between `<!-- table NAME -->` and `<!-- end -->`

Ratios are of two candidates in the same round; shown are the median over the rounds and half the interquartile range.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import counts
from measure import REPOSITORY, RESULTS, Seconds, markdown_table, read, results

PAGE = REPOSITORY / "docs" / "performance.md"
LORA = "PEFT lora"
NO_AUTOCAST = "dude, no autocast"
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}


def layer(path: Path) -> str:
    """A micro-batch of one layer, in the middle of an optimizer step; what ours do once per step is beside it."""
    others = ["frozen base", "PEFT dora", "PEFT dora + pissa", "lora", "pissa", "dora", "dude", NO_AUTOCAST]
    header = [
        "out x in",
        f"{LORA}, ms",
        *others,
        "PEFT dora + pissa over dude",
        "dude once per step, ms",
        "dude, step of 1",
    ]
    rows = []
    for name, case in read(path).items():
        seconds, once_s = case["seconds"], _once_per_step_s(case, "dude")
        micro_batch_s = statistics.median(seconds["dude"])
        step_of_1 = _ratio(seconds, "dude", LORA) * (1 + once_s / micro_batch_s)
        rows.append(
            [
                name,
                _ms(seconds, LORA),
                *(_spread(seconds, other, LORA) for other in others),
                _spread(seconds, "PEFT dora + pissa", "dude"),
                f"{once_s * 1e3:.1f}",
                f"{step_of_1:.2f}",
            ]
        )
    return markdown_table(header, rows) + _source(path)


def step(path: Path) -> str:
    """An optimizer step of a whole model."""
    others = ["PEFT dora", "PEFT dora + pissa", "lora", "dude", NO_AUTOCAST]
    rows = [
        [
            name,
            _ms(case["seconds"], LORA),
            *(_spread(case["seconds"], other, LORA) for other in others),
            _spread(case["seconds"], "PEFT dora + pissa", "dude"),
        ]
        for name, case in read(path).items()
    ]
    return markdown_table(["", f"{LORA}, ms", *others, "PEFT dora + pissa over dude"], rows) + _source(path)


def step_on_a_gpu(path: Path) -> str:
    """An optimizer step of Llama-2-7B's shapes: time, throughput, and the memory that it takes above the weights'."""
    lora, dora = "lora, no autocast", "PEFT dora + pissa"
    header = ["", f"{LORA}, ms", dora, "lora", "dude", f"{dora} over dude", "dude, tokens/s"]
    header += [f"{name}, peak GB" for name in (LORA, dora, "lora", "dude")]
    rows = []
    for name, case in read(path).items():
        settings, seconds = case["settings"], case["seconds"]
        tokens = settings["tokens"] * settings["accumulation"]
        rows.append(
            [
                name,
                _ms(seconds, LORA),
                *(_spread(seconds, other, LORA) for other in (dora, lora, NO_AUTOCAST)),
                _spread(seconds, dora, NO_AUTOCAST),
                f"{tokens / statistics.median(seconds[NO_AUTOCAST]):,.0f}",
                *(f"{case['peak_bytes'][other] / 1e9:.1f}" for other in (LORA, dora, lora, NO_AUTOCAST)),
            ]
        )
    return markdown_table(header, rows) + _source(path)


def large(path: Path) -> str:
    """A training of `large.py`: foreseen and measured memory, pace, and how long the first step took to come."""
    header = ["", "trained", "foreseen, GB", "measured, GB", "tokens/s", "first step done after, s"]
    rows, sources = [], []
    for name, case in read(path).items():
        steps = [record for record in case["metrics"] if "loss" in record]
        foreseen = case["memory"]["predicted"]["training"]
        rows.append(
            [
                name,
                f"{foreseen['gradients'] / 4 / 1e6:.0f} million parameters",
                f"{case['memory']['predicted_training_bytes'] / 1e9:.1f}",
                f"{case['memory']['measured_training_bytes'] / 1e9:.1f}",
                f"{statistics.median(record['tokens_per_s'] for record in steps[1:]):,.0f}",
                f"{steps[0]['first_step_s']:.0f}",
            ]
        )
        environment = case["environment"]
        packages = environment["packages"]
        where = (environment["gpus"] or [environment["platform"]])[0]
        sources.append(
            f"{name}: at {environment['git_commit'][:10]} on {where}, torch {packages['torch']}, "
            f"transformers {packages['transformers']}"
        )
    if not rows:
        return "Not measured yet: `python benchmarks/large.py` does it.\n"
    raw = f"`python benchmarks/large.py`, raw: {path.relative_to(REPOSITORY)}; {'; '.join(sources)}."
    return f"{markdown_table(header, rows)}\n{raw}\n"


def growth(path: Path) -> str:
    """The step of DuDe over LoRA's as one size grows."""
    rows = [
        [name, _ms(case["seconds"], LORA), _ms(case["seconds"], "dude"), _spread(case["seconds"], "dude", LORA)]
        for name, case in read(path).items()
    ]
    return markdown_table(["", f"{LORA}, ms", "dude, ms", "ratio"], rows) + _source(path)


def memory(path: Path) -> str:
    """What a step takes above what is there between steps, with it, and what is kept for the backward pass."""
    others = ["PEFT dora", "PEFT dora + pissa", "lora", "pissa", "dora", "dude", NO_AUTOCAST]
    header = ["", f"{LORA}, MB", *others, "dude over PEFT dora"]
    parts = [
        f"{title}:\n\n{markdown_table(header, _memory_rows(read(path), amount, others))}"
        for title, amount in {
            "Peak of a step, above what is there between steps": lambda found: found["peak"],
            "Peak of a step in all, with weights, adapter and optimizer": lambda found: (
                found["between_steps"] + found["peak"]
            ),
            "Live between a forward and its backward pass, above what is there between steps": lambda found: found[
                "after_forward"
            ],
            "Saved for backward by autograd; not known under checkpointing": lambda found: found["saved"],
        }.items()
    ]
    return "\n".join(parts) + _source(path)


def decomposition(path: Path) -> str:
    """Seconds and accuracy of each algorithm, and what that makes for all layers of Llama-2-7B."""
    result = json.loads(path.read_text(encoding="utf-8"))
    header = ["out x in", "rank", "algorithm", "seconds", "share of the sum", "residual above the best"]
    rows = [
        [
            f"{row['matrix']}, {row['shape'][0]}x{row['shape'][1]}",
            str(row["rank"]),
            row["algorithm"],
            f"{row['median_s']:.2f}",
            f"{row['share']:.3%}",
            f"{row['residual'] - 1:.1e}",
        ]
        for row in result["rows"]
    ]
    text = markdown_table(header, rows)
    if totals := result.get("llama_2_7b_extrapolated_s"):
        names = list(next(iter(totals.values())))
        minutes = [[rank, *(f"{found[name] / 60:.1f}" for name in names)] for rank, found in totals.items()]
        text += "\nAll 224 layers, minutes, from one layer of each shape:\n\n" + markdown_table(["", *names], minutes)
    return (
        f"{text}\n`python benchmarks/decomposition.py`, raw: {path.relative_to(REPOSITORY)}; "
        f"at {result['commit']} ({result['date']}) on {_where(result['machine'])}.\n"
    )


def limits(path: Path) -> str:
    """The measured micro-batch of one layer beside the count of its operations and bytes."""
    header = [
        "out x in",
        "GFLOP/s, GB/s",
        "operations",
        "at least",
        "measured",
        "dude: of its limit",
        f"{LORA}: of its limit",
    ]
    rows = []
    for name, case in read(path).items():
        settings, seconds = case["settings"], case["seconds"]
        sizes = counts.Layer(settings["out"], settings["in"], settings["tokens"], settings["rank"])
        machine = counts.Machine(**case["pace"])
        ours = NO_AUTOCAST if NO_AUTOCAST in seconds else "dude"
        dude, lora = (
            counts.work(counts.MICRO_BATCH[method](sizes), ELEMENT_BYTES[settings["dtype"]], machine)
            for method in ("dude", LORA)
        )
        rows.append(
            [
                name,
                f"{machine.flop_per_s / 1e9:.0f}, {machine.bytes_per_s / 1e9:.0f}",
                f"{dude.flops / lora.flops:.3f}",
                f"{dude.seconds / lora.seconds:.3f}",
                _spread(seconds, ours, LORA),
                f"{dude.seconds / statistics.median(seconds[ours]):.0%}",
                f"{lora.seconds / statistics.median(seconds[LORA]):.0%}",
            ]
        )
    return markdown_table(header, rows) + _source(path)


def step_limits(path: Path) -> str:
    """The measured step of a whole model beside the count for its adapted layers: no attention, head or optimizer."""
    rows = []
    for name, case in read(path).items():
        if case["settings"]["checkpointing"]:  # the count is of one forward pass
            continue
        found = {method: _model_work(method, case) for method in ("dude", LORA)}
        ours = NO_AUTOCAST if NO_AUTOCAST in case["seconds"] else "dude"
        rows.append(
            [
                name,
                f"{found['dude'].flops / found[LORA].flops:.3f}",
                f"{found['dude'].seconds / found[LORA].seconds:.3f}",
                _spread(case["seconds"], ours, LORA),
            ]
        )
    return markdown_table(["", "operations", "at least", "measured"], rows) + _source(path)


def render(text: str) -> str:
    """`text` with each block between `<!-- table NAME -->` and `<!-- end -->` written anew."""
    return re.sub(
        r"(?<=<!-- table )(\w+)( -->\n).*?(?=<!-- end -->)",
        lambda found: f"{found[1]}{found[2]}\n{BLOCKS[found[1]]()}\n",
        text,
        flags=re.DOTALL,
    )


BLOCKS: dict[str, Callable[[], str]] = {
    "layer": lambda: layer(RESULTS / "layer.json"),
    "step": lambda: step(RESULTS / "step.json"),
    "memory": lambda: memory(RESULTS / "memory.json"),
    "growth": lambda: growth(RESULTS / "growth.json"),
    "decomposition": lambda: decomposition(RESULTS / "decomposition.json"),
    "limits": lambda: limits(RESULTS / "layer.json"),
    "step_limits": lambda: step_limits(RESULTS / "step.json"),
    "layer_amx": lambda: layer(results("amx") / "layer.json"),
    "step_amx": lambda: step(results("amx") / "step.json"),
    "decomposition_amx": lambda: decomposition(results("amx") / "decomposition.json"),
    "layer_avx2": lambda: layer(results("avx2") / "layer.json"),
    "step_avx2": lambda: step(results("avx2") / "step.json"),
    "decomposition_avx2": lambda: decomposition(results("avx2") / "decomposition.json"),
    "layer_cuda": lambda: layer(results("cuda") / "layer.json"),
    "limits_cuda": lambda: limits(results("cuda") / "layer.json"),
    "step_cuda": lambda: step_on_a_gpu(results("cuda") / "step.json"),
    "large": lambda: large(results("cuda") / "large.json"),
    "operations": counts.operations_table,
    "llama_2_7b": counts.llama_2_7b_table,
}


def _once_per_step_s(case: dict[str, Any], name: str) -> float:
    new, held = (statistics.median(case[f"one_token_{scope}_scope"][name]) for scope in ("new", "held"))
    return float(new - held)


def _model_work(method: str, case: dict[str, Any]) -> counts.Work:
    """The adapted layers' part of a step of `candidates.llama`."""
    settings, machine = case["settings"], counts.Machine(**case["pace"])
    hidden, tokens, rank = settings["hidden"], settings["tokens"], settings["rank"]
    element_bytes, micro_batches = ELEMENT_BYTES[settings["dtype"]], settings["accumulation"]
    wide = hidden * 11 // 4
    total = counts.Work(0, 0, 0.0)
    for (out, in_), count in (((hidden, hidden), 4), ((wide, hidden), 2), ((hidden, wide), 1)):
        sizes = counts.Layer(out, in_, tokens, rank)
        total += counts.step_work(method, sizes, micro_batches, element_bytes, machine).times(
            count * settings["layers"]
        )
    return total


def _memory_rows(cases: dict[str, Any], amount: Callable[[dict[str, int]], int], others: list[str]) -> list[list[str]]:
    rows = []
    for name, case in cases.items():
        found = {candidate: amount(bytes_) for candidate, bytes_ in case["bytes"].items()}
        ratios = [f"{found[other] / found[LORA]:.2f}" if other in found else "" for other in others]
        rows.append([name, f"{found[LORA] / 1e6:.1f}", *ratios, f"{found['dude'] / found['PEFT dora']:.2f}"])
    return rows


def _ms(seconds: Seconds, name: str) -> str:
    milliseconds = statistics.median(seconds[name]) * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 10 else f"{milliseconds:.2f}"


def _ratio(seconds: Seconds, name: str, reference: str) -> float:
    return statistics.median(_ratios(seconds, name, reference))


def _ratios(seconds: Seconds, name: str, reference: str) -> list[float]:
    return [value / other for value, other in zip(seconds[name], seconds[reference], strict=True)]


def _spread(seconds: Seconds, name: str, reference: str) -> str:
    """The median ratio and half the interquartile range; nothing for a candidate that was not measured."""
    if name not in seconds:
        return ""
    low, median, high = statistics.quantiles(_ratios(seconds, name, reference), n=4, method="inclusive")
    return f"{median:.2f} ± {(high - low) / 2:.2f}"


def _instructions(machine: dict[str, Any]) -> str:
    return f" ({machine['instructions']})" if "instructions" in machine else ""


def _where(machine: dict[str, Any]) -> str:
    versions = f"torch {machine['torch']}, PEFT {machine['peft']}, transformers {machine['transformers']}"
    if "gpu" in machine:
        return f"{machine['gpu']}, CUDA {machine['cuda']}, Triton {machine['triton']}, {versions}"
    cores = f"{machine['threads']} threads on {machine['cores']} cores"
    return f"{machine['processor']}{_instructions(machine)}, {cores}, {versions}"


def _source(path: Path) -> str:
    """How the table came about: command, raw numbers, commits, machines; the cases of each where there are several."""
    command = f"`python benchmarks/{path.stem}.py{' --device cuda' * (path.parent == results('cuda'))}`"
    groups: dict[str, list[str]] = {}
    for name, case in read(path).items():
        groups.setdefault(f"at {case['commit']} ({case['date']}) on {_where(case['machine'])}", []).append(name)
    if not groups:
        return f"\nNot measured yet: {command} does it.\n"
    source = f"\n{command}, raw: {path.relative_to(REPOSITORY)}"
    if len(groups) == 1:
        return f"{source}; {next(iter(groups))}.\n"
    lines = [f"- {', '.join(names)}: {origin}\n" for origin, names in groups.items()]
    return f"{source}:\n\n{''.join(lines)}"


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
