"""Answers to the rows of a data set, in batches of prompts of about one length."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

from dude_cli.data import Prompt
from dude_cli.data.bad_rows import BadRows
from dude_cli.data.row_prompts import RowPrompt
from dude_cli.errors import DataError, UsageError, is_out_of_memory, memory_errors
from dude_cli.generation.answers_file import Record
from dude_cli.generation.generate import Answer, Generator
from dude_cli.system.memory import free_models

BATCH_SIZE = 8  # as in an evaluation


def check_rows(generator: Generator, rows: Sequence[RowPrompt], where: str) -> None:
    """Raise DataError, naming the rows, for prompts that are empty or leave no room for the longest answer."""
    bad = BadRows()
    for row in rows:
        with bad.collected():
            try:
                generator.check_room(row.prompt)
            except UsageError as error:
                raise DataError(error.what, where=row.place, fix=error.fix) from error
    bad.check(len(rows), where)


def answer_rows(
    generator: Generator,
    rows: Sequence[RowPrompt],
    numbers: Sequence[int],
    *,
    batch_size: int,
    compare_base: bool,
    say: Callable[[str], None],
) -> Iterator[list[Record]]:
    """Yield what `dude generate --rows` writes of the rows with these numbers, which begin at 1, batch by batch.

    The longest prompts come first, so that too large a batch fails early: out of memory, it goes on with half of it.
    Raises ResourceError where one prompt is too much.
    """
    from dude_cli.adapter import constant_adapters

    left = sorted(numbers, key=lambda number: -len(rows[number - 1].prompt.ids))
    if batch_size > 1 and left and not pads_unseen(generator, rows[left[0] - 1].prompt.ids):
        say(f"{type(generator.model).__name__} sees the padding of a batch: rows are answered one by one")
        batch_size = 1
    with constant_adapters(generator.model):
        while left:
            records = _answered(generator, rows, left[:batch_size], compare_base=compare_base)
            if records is None:
                batch_size //= 2
                say(f"out of memory: from now on {batch_size} prompts at once")
                free_models()  # what the failed batch held
            else:
                left = left[batch_size:]
                yield records


def _answered(
    generator: Generator, rows: Sequence[RowPrompt], numbers: Sequence[int], *, compare_base: bool
) -> list[Record] | None:
    """What is written of one batch; None if there is not enough memory for it, but may be for half of it."""
    from dude_cli.adapter import disable_adapters

    prompts = [rows[number - 1].prompt for number in numbers]
    places = [number - 1 for number in numbers]  # `--prompt` counts from 0: the same number has the same random ones
    fix = "lower it, shorten the prompts, or use --dtype bfloat16"
    try:
        with memory_errors("out of memory", where="--max-new-tokens", fix=fix) if len(numbers) == 1 else nullcontext():
            base: Sequence[Answer | None] = [None] * len(numbers)
            if compare_base:
                with disable_adapters(generator.model):
                    base = generator.answer_all(prompts, places)
            tuned = generator.answer_all(prompts, places)
    except Exception as error:
        if len(numbers) == 1 or not is_out_of_memory(error):
            raise
        return None
    answered = zip(numbers, tuned, base, strict=True)
    return [_record(number, rows[number - 1], answer, of_base) for number, answer, of_base in answered]


def _record(number: int, row: RowPrompt, tuned: Answer, base: Answer | None) -> Record:
    record: Record = {"row": number, "prompt": row.prompt.text, "prompt_tokens": len(row.prompt.ids)}
    record |= {**tuned.record(), "expected": row.expected}
    return record if base is None else record | {"base": base.record()}


def pads_unseen(generator: Generator, ids: Sequence[int]) -> bool:
    """Whether the first tokens of a prompt have the same logits alone and with padding in front of them.

    In most models what is padded is masked; seen otherwise with transformers 5.23: RWKV, RecurrentGemma, XLNet.
    """
    short, long = Prompt("", list(ids[:3])), Prompt("", (list(ids[:3]) * 11)[:11])
    (alone,) = generator.first_logits([short])
    batched, _ = generator.first_logits([short, long])
    # Kernels differ with the shape, most in half precision; a model that sees the padding is off by a quarter or more.
    return float((alone - batched).abs().max()) <= 0.05 * float(alone.abs().max())


def summary(records: Sequence[Record], *, compare_base: bool) -> dict[str, Any]:
    """How many answers there are, how many were cut, and how many equal the row's own, of the rows that have one."""
    with_answer = sum(record["expected"] is not None for record in records)
    found = {"rows": len(records), "rows_with_answer": with_answer, **_counts(records, records)}
    return found | {"base": _counts([record["base"] for record in records], records)} if compare_base else found


def _counts(answers: Sequence[Record], rows: Sequence[Record]) -> dict[str, int | None]:
    both = [(answer["completion"], row["expected"]) for answer, row in zip(answers, rows, strict=True)]
    pairs = [(said, expected) for said, expected in both if expected is not None]
    return {
        "cut": sum(answer["stop_reason"] == "length" for answer in answers),
        "exact_matches": sum(said.strip() == expected.strip() for said, expected in pairs) if pairs else None,
    }


def summary_lines(found: dict[str, Any], max_new_tokens: int) -> list[str]:
    """The same for a person."""
    rows, with_answer, lines = found["rows"], found["rows_with_answer"], []
    equal = "equal the row's answer" if with_answer == rows else "rows with an answer equal it"
    for name, counts in (("", found), ("base: ", found.get("base"))):
        if counts is not None and counts["exact_matches"] is not None:
            share = counts["exact_matches"] / with_answer
            lines.append(f"{name}{counts['exact_matches']} of {with_answer} {equal} exactly ({share:.2%})")
        if counts is not None and counts["cut"]:
            was = "was" if counts["cut"] == 1 else "were"
            lines.append(f"{name}{counts['cut']} of {rows} {was} cut at --max-new-tokens {max_new_tokens}")
    return lines


def prompts_sha256(rows: Sequence[RowPrompt]) -> str:
    """The digest of all prompts, as tokens, and of the rows' own answers."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt.ids, row.expected]).encode())
    return digest.hexdigest()
