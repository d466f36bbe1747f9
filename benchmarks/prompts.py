"""Time how long an evaluation takes to make its prompts, as lm-eval does it and with its templates kept compiled.

    python benchmarks/prompts.py --data-dir DIR [--limit 20] [--repeats 3]

DIR has a copy of MMLU in mmlu/, as for `dude eval`. Made are the prompts of the first `--limit` questions of each of
its 57 subjects, with five examples each, both ways in turn; then all 14,042 with the templates kept. Reported are
medians, in seconds, and that both ways give the same prompts. Writes benchmarks/results/prompts.json and prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from measure import RESULTS, record, write

from dude_cli.config import EvalTask
from dude_cli.evaluation import EvalRequest, load_request
from dude_cli.evaluation.harness import quiet, templates_compiled_once
from dude_cli.evaluation.tasks import FEWSHOT_SEED


def make(tasks: list[Any], limit: int | None, *, kept: bool) -> tuple[float, int, str]:
    """The seconds, how many questions, and a digest of their prompts."""
    digest, questions = hashlib.sha256(), 0
    started = time.perf_counter()
    with quiet(), templates_compiled_once() if kept else nullcontext():
        for task in tasks:
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
            task.build_all_requests(limit=limit)
    seconds = time.perf_counter() - started
    for task in tasks:
        questions += len({instance.doc_id for instance in task.instances})
        for instance in task.instances:
            digest.update(instance.args[0].encode())
    return seconds, questions, digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    (found,) = load_request(EvalRequest((EvalTask(name="mmlu"),), data_dir=arguments.data_dir))
    tasks = list(found.tasks.values())
    rounds = [
        {name: make(tasks, arguments.limit, kept=kept) for name, kept in (("as lm-eval", False), ("kept", True))}
        for _ in range(arguments.repeats)
    ]
    assert len({digest for each in rounds for _, _, digest in each.values()}) == 1
    seconds = {name: [each[name][0] for each in rounds] for name in rounds[0]}
    whole_s, whole, _ = make(tasks, None, kept=True)
    result = {
        **record(),
        "questions": rounds[0]["kept"][1],
        "median_s": {name: statistics.median(values) for name, values in seconds.items()},
        "seconds": seconds,
        "all": {"questions": whole, "kept_s": whole_s},
    }
    write(RESULTS / "prompts.json", result)
    print("| mmlu's prompts | questions | s |\n| --- | ---: | ---: |")
    for name, value in result["median_s"].items():
        print(f"| {name} | {result['questions']:,} | {value:.2f} |")
    print(f"| all, kept | {whole:,} | {whole_s:.2f} |")


if __name__ == "__main__":
    main()
