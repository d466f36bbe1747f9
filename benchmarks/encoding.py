"""Time how rows become tokens: by the tokenizer's threads, as `dude train` does it, by processes, and from the cache.

    python benchmarks/encoding.py ROWS.jsonl [--model embedded:quickstart] [--count 20000] [--processes 2]

ROWS has the columns question and answer, as GSM8K has; its rows are repeated, each with its number in front, until
there are `--count`. The processes have one thread each; their start is part of their time, and reading the rows is
not, which is part of the others'. Writes benchmarks/results/encoding.json and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from measure import record

from dude_cli.config import DataConfig, DataSource, ModelConfig
from dude_cli.data import prepare_data
from dude_cli.data.encode import TextEncoder, format_columns, row_texts
from dude_cli.data.rows import Seen, read_source
from dude_cli.data.table import TokenTable
from dude_cli.model import load_tokenizer

CHUNK_ROWS = 1000


def write_rows(source: Path, path: Path, count: int) -> None:
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            row = rows[number % len(rows)]
            file.write(json.dumps(row | {"question": f"({number}) {row['question']}"}) + "\n")


def by_threads(config: DataConfig, tokenizer: Any) -> float:
    """Seconds of `prepare_data`, whether or not the cache has the rows."""
    started = time.perf_counter()
    prepare_data(config, tokenizer, 0)
    return time.perf_counter() - started


def by_processes(config: DataConfig, model: str, processes: int) -> float:
    form = config.form(config.train[0])
    texts = [row_texts(form, row) for row in read_source(config.train[0], format_columns(form), Seen()).values]
    chunks = [texts[start : start + CHUNK_ROWS] for start in range(0, len(texts), CHUNK_ROWS)]
    os.environ["RAYON_NUM_THREADS"] = "1"
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of threads that it does not copy
    with ProcessPoolExecutor(processes, context, initializer=start_process, initargs=(model,)) as pool:
        list(pool.map(encode_chunk, chunks))
    del os.environ["RAYON_NUM_THREADS"]
    return time.perf_counter() - started


def start_process(model: str) -> None:
    global encoder
    encoder = TextEncoder(load_tokenizer(ModelConfig(name_or_path=model)))


def encode_chunk(chunk: list[tuple[str, str]]) -> dict[str, Any]:
    return TokenTable.of(encoder.encode_pairs(chunk, learn_all=False), 512).arrays()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--model", default="embedded:quickstart")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DUDE_CACHE_DIR"] = folder
        path = Path(folder) / "rows.jsonl"
        write_rows(arguments.rows, path, arguments.count)
        config = DataConfig(
            train=[DataSource(path=str(path))], prompt="Question: {question}\nAnswer:", completion=" {answer}"
        )
        tokenizer = load_tokenizer(ModelConfig(name_or_path=arguments.model))
        small = config.model_copy(update={"train": [DataSource(path=str(path), split="train[:10]")]})
        by_threads(small, tokenizer)  # the imports
        seconds = {
            "threads of the tokenizer": by_threads(config, tokenizer),
            "the same rows again": by_threads(config, tokenizer),
            f"{arguments.processes} processes": by_processes(config, arguments.model, arguments.processes),
        }
    result = {
        "settings": {"model": arguments.model, "count": arguments.count, "rows": arguments.rows.name},
        **record(),
        "seconds": seconds,
    }
    path = Path(__file__).parent / "results" / "encoding.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"| {arguments.count:,} rows | s |\n| --- | ---: |")
    for name, value in seconds.items():
        print(f"| {name} | {value:.1f} |")


if __name__ == "__main__":
    main()
