"""What the timed benchmarks share: cases, interleaved rounds, the machine's pace and record, the result files.

A benchmark is a list of cases. `results/NAME.json` has one line per case, with the raw seconds, the settings, the
commit and the machine, so that a case can be measured again alone (`--only`) without losing the others. Medians and
ratios are not stored: `page.py` computes them from the seconds. `--short` writes to `results/short/` instead, and
`--device cuda`, which has cases of its own, to `results/cuda/`. A GPU is torch's default device then: a case makes its
tensors where they are used. Seconds of a CPU with AMX go to `results/amx/`, those of one without AVX-512 to
`results/avx2/`, with tables of their own.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dude_cli.adapter.widened import is_slow

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
MIN_ROUNDS, MAX_ROUNDS = 3, 101
LONG_S = 60.0  # a round as long as this needs no other to warm up
GPU_S = 0.02  # a GPU's work is timed in runs of at least this, between two waits for it

Seconds = dict[str, list[float]]


class Case(NamedTuple):
    """One setting in which all candidates are measured."""

    name: str
    settings: dict[str, Any]
    is_short: bool = False  # part of `--short`
    device: str = "cpu"


def run(
    name: str,
    doc: str | None,
    cases: Iterable[Case],
    measure: Callable[[Case, float], dict[str, Any]],
    *,
    is_timed: bool = True,
) -> Path:
    """Measure the cases that the command line asks for and write each as soon as it is done; the result file.

    `measure` gets a case and the seconds that its rounds should take, and returns what is to be stored as JSON.
    """
    options = _parse(doc)
    torch.set_num_threads(options.threads)
    if options.device != "cpu":
        torch.set_default_device(options.device)
    place = options.device if options.short or not is_timed else place_of_seconds(options.device)
    path = results(place, short=options.short) / f"{name}.json"
    chosen = [case for case in cases if case.device == options.device and (case.is_short or not options.short)]
    exact = [case for case in chosen if case.name == options.only]
    chosen = exact or [case for case in chosen if options.only in case.name]
    about = record()
    for number, case in enumerate(chosen, start=1):
        print(f"{name} {number}/{len(chosen)}: {case.name}", file=sys.stderr, flush=True)
        found = {"settings": case.settings} | about | measure(case, options.seconds)
        write(path, read(path) | {case.name: found})
        gc.collect()
    return path


def results(place: str, *, short: bool = False) -> Path:
    """The folder of the result files of a device, or of a kind of CPU."""
    folder = RESULTS if place == "cpu" else RESULTS / place
    return folder / "short" if short else folder


def place_of_seconds(device: str) -> str:
    """`device`, and of a CPU how its products are made: `amx`, `cpu` for AVX-512, or `avx2`.

    A float32 product takes two to five times as long without AVX-512, and a bfloat16 one a quarter with AMX.
    """
    if device != "cpu":
        return device
    if torch.cpu.get_capabilities().get("amx_bf16", False):
        return "amx"
    instructions = torch.backends.cpu.get_cpu_capability().lower()
    return "cpu" if instructions == "avx512" else instructions


def interleave(candidates: dict[str, Callable[[], object]], budget_s: float) -> Seconds:
    """Seconds of each candidate in each round, after one round that only warms up, unless it takes minutes.

    Each round runs every candidate once, so that a change of the machine's pace hits all alike, and every second one
    runs in reverse, so that none always follows the same neighbour. Rounds go on until `budget_s` is spent. On a GPU a
    candidate runs several times in a row, and the seconds are the mean: its queue is never empty, as in a training.
    """
    started = time.perf_counter()
    first = {name: _warm_up(run_once) for name, run_once in candidates.items()}
    times = {name: times for name, (times, _) in first.items()}
    is_long = time.perf_counter() - started > LONG_S
    seconds: Seconds = {name: [round(took_s, 7)] if is_long else [] for name, (_, took_s) in first.items()}
    names, started = list(candidates), time.perf_counter()
    for number in range(int(is_long), MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - started > budget_s:
            break
        gc.collect()
        for name in names if number % 2 == 0 else reversed(names):
            seconds[name].append(round(_timed(candidates[name], times[name]), 7))
    return seconds


def _warm_up(run_once: Callable[[], object]) -> tuple[int, float]:
    """How many runs a round should have, and the seconds of one.

    On a GPU kernels are made in a first run, graphs recorded in a second.
    """
    took_s = _timed(run_once, 1)
    if torch.get_default_device().type == "cpu":
        return 1, took_s
    run_once()
    took_s = _timed(run_once, 1)
    return max(1, math.ceil(GPU_S / took_s)), took_s


def _timed(run_once: Callable[[], object], times: int) -> float:
    """Seconds of one of `times` runs in a row."""
    synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run_once()
    synchronize()
    return (time.perf_counter() - start) / times


def synchronize() -> None:
    """Wait until the GPU, if that is where the benchmark runs, has done all."""
    if torch.get_default_device().type != "cpu":
        torch.accelerator.synchronize()


def pace(dtype: torch.dtype) -> dict[str, float]:
    """What this device reaches now: a plain product's FLOP/s in `dtype`, and a copy's bytes/s, read and written."""
    rows, width = (64, 1024) if is_slow(torch.empty(0, dtype=dtype)) else (2048, 4096)
    left, right = torch.randn(rows, width, dtype=dtype), torch.randn(width, width, dtype=dtype)
    source, target = torch.randn(2**26), torch.empty(2**26)  # 256 MiB each: past every cache
    best = {
        name: min(values)
        for name, values in interleave(
            {"product": lambda: left @ right, "copy": lambda: target.copy_(source)}, budget_s=1.0
        ).items()
    }
    return {"flop_per_s": 2 * rows * width**2 / best["product"], "bytes_per_s": 2 * source.nbytes / best["copy"]}


def read(path: Path) -> dict[str, Any]:
    """The cases in a result file by name; none if it is not there."""
    cases: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return cases


def write(path: Path, cases: dict[str, Any]) -> None:
    """One case per line, so that a difference in git is a list of the cases that were measured again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    path.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table whose first column is text and the others numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _parse(doc: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="few cases and rounds, in results/short/")
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="the case of this name, else all with TEXT in theirs"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--seconds", type=float, help=f"per case, 60, or 5 with --short; at least {MIN_ROUNDS} rounds run"
    )
    options = parser.parse_args()
    if options.seconds is None:
        options.seconds = 5.0 if options.short else 60.0
    return options


def record() -> dict[str, Any]:
    """What ran, when, and where."""
    return {
        "command": shlex.join(["python", os.path.relpath(sys.argv[0], REPOSITORY), *sys.argv[1:]]),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "machine": {
            "processor": _processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        }
        | _gpu()
        | {package: version(package) for package in ("torch", "peft", "transformers")},
    }


def _gpu() -> dict[str, str]:
    if torch.get_default_device().type == "cpu":
        return {}
    return {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": version("triton")}


def _commit() -> str:
    """The commit, with `+changes` if the code differs from it; results that are being written do not count."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "dude_cli", "benchmarks/*.py")
    return git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else "")


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"
