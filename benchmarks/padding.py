"""Count the padding of three orders of the same rows, and time a training step with each.

    python benchmarks/padding.py ROWS.jsonl [--model embedded:quickstart] [--batch 32] [--micro-batch 4] [--steps 20]

ROWS has the columns question and answer, as GSM8K has. The orders: as the rows come in the epoch's permutation, sorted
by length within each step, and with `data.group_by_length` besides. The padding is counted over a whole epoch: the
share of all positions that hold no token. The steps are timed interleaved; tokens exclude padding. Writes
benchmarks/results/padding.json and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
from measure import record

from dude_cli.adapter import AdapterConfig, constant_adapters, patch_model
from dude_cli.config import DataConfig, DataSource, ModelConfig
from dude_cli.data import StepOrder, collate, prepare_data, steps_per_epoch
from dude_cli.data.batches import EncodedRows
from dude_cli.model import load_model, load_tokenizer
from dude_cli.training.gradients import accumulate_gradients
from dude_cli.training.loss import SummedLoss, with_targets

Order = list[np.ndarray]  # the rows of each step of an epoch


def orders(rows: EncodedRows, batch: int) -> dict[str, Order]:
    def epoch(lengths: np.ndarray, *, group_by_length: bool = False) -> Order:
        order = StepOrder(lengths, batch, 0, group_by_length=group_by_length)
        return [order.rows(step) for step in range(steps_per_epoch(len(rows), batch))]

    return {
        "as they come": epoch(np.ones_like(rows.lengths)),
        "sorted within a step": epoch(rows.lengths),
        "group_by_length": epoch(rows.lengths, group_by_length=True),
    }


def padding_share(order: Order, lengths: np.ndarray, micro_batch: int) -> float:
    """The share of positions without a token, over an epoch."""
    micro_batches = [step[start : start + micro_batch] for step in order for start in range(0, len(step), micro_batch)]
    positions = sum(int(lengths[rows].max()) * len(rows) for rows in micro_batches)
    return 1 - float(lengths.sum()) / positions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("--model", default="embedded:quickstart")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    model_config = ModelConfig(name_or_path=arguments.model, dtype="float32")
    data_config = DataConfig(
        train=[DataSource(path=arguments.rows)], prompt="Question: {question}\nAnswer:", completion=" {answer}"
    )
    rows = prepare_data(data_config, load_tokenizer(model_config), 0).train
    model = patch_model(load_model(model_config), AdapterConfig(rank=16)).train()
    summed_loss = SummedLoss(model)
    found = orders(rows, arguments.batch)

    def tokens_per_s(step_rows: np.ndarray) -> float:
        started = time.perf_counter()
        with constant_adapters(model):
            accumulate_gradients(
                summed_loss,
                [rows[int(row)] for row in step_rows],
                per_device_batch_size=arguments.micro_batch,
                target_tokens=int(rows.target_tokens[step_rows].sum()),
                make_batch=lambda some: with_targets(collate(some, pad_id=0)),
                backward=lambda loss: loss.backward(),
            )
        model.zero_grad(set_to_none=True)
        return float(rows.lengths[step_rows].sum()) / (time.perf_counter() - started)

    rates: dict[str, list[float]] = {name: [] for name in found}
    for step in range(arguments.steps + 1):
        for name, order in found.items():
            rate = tokens_per_s(order[step])
            if step > 0:  # the first round only warms up
                rates[name].append(rate)
    result = {
        "settings": vars(arguments) | {"rows": Path(arguments.rows).name, "count": len(rows)},
        **record(),
        "padding_share": {name: padding_share(o, rows.lengths, arguments.micro_batch) for name, o in found.items()},
        "median_tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "tokens_per_s": rates,
    }
    path = Path(__file__).parent / "results" / "padding.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print("| order of the rows | padding | tokens/s |\n| --- | ---: | ---: |")
    for name in found:
        print(f"| {name} | {result['padding_share'][name]:.1%} | {result['median_tokens_per_s'][name]:,.0f} |")


if __name__ == "__main__":
    main()
