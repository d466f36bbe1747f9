"""Time what a user waits for: `--help`, an error in a config, the first optimizer step of the quickstart.

    python benchmarks/startup.py [--repeats 3]

Each command is a process of its own; reported are medians, in seconds. "First step" is the run's own `first_step_s`,
from the start of the process to the first optimizer step, the evaluation before it included: with an empty cache of
encoded rows, then with the rows of an earlier run. Writes startup.json to the results of this kind of CPU and prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import place_of_seconds, record, results, write

BAD_CONFIG = "model: {name_or_path: some/model}\nadapter: {method: doda}\ntrain: {learnin_rate: 1e-4}\n"


def dude(*arguments: str, cache: Path) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Run a command; return its seconds and what came out."""
    env = os.environ | {"DUDE_CACHE_DIR": str(cache), "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "dude_cli", *arguments], env=env, capture_output=True, text=True)
    return time.perf_counter() - started, done


def first_step_s(folder: Path, cache: Path) -> float:
    """The quickstart's own figure; it is stopped after its first step, which changes nothing before that."""
    output = f"output_dir={folder}"
    _, done = dude("train", "configs/quickstart.yaml", output, "train.max_steps=1", "--json", "--quiet", cache=cache)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout)["first_step_s"])


def measure(folder: Path) -> dict[str, float]:
    config = folder / "config.yaml"
    config.write_text(BAD_CONFIG)
    cache = folder / "cache"
    help_s, helped = dude("--help", cache=cache)
    error_s, refused = dude("train", str(config), cache=cache)
    assert (helped.returncode, refused.returncode) == (0, 2), refused.stderr
    return {
        "--help": help_s,
        "config error": error_s,
        "quickstart, first step": first_step_s(folder / "cold", cache),
        "quickstart, first step, rows encoded before": first_step_s(folder / "warm", cache),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    measured = []
    for _ in range(arguments.repeats):
        with tempfile.TemporaryDirectory() as folder:
            measured.append(measure(Path(folder)))
    median = {name: statistics.median(run[name] for run in measured) for name in measured[0]}
    result = {
        **record(),
        "median_s": median,
        "seconds": measured,
    }
    write(results(place_of_seconds("cpu")) / "startup.json", result)
    print("| | median, s |\n| --- | ---: |")
    for name, value in median.items():
        print(f"| {name} | {value:.2f} |")


if __name__ == "__main__":
    main()
