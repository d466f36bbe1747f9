"""Rows of the user's own as a task of lm-eval: how likely a model finds their answers, and whether it would give them.

Prompts and answers are the tokens that a training on such rows has, so the loss is that of a training's evaluation.
lm-eval would encode their text again, and knows no conversations with several answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task, TaskConfig

from dude_cli.data import EncodedRow, EncodedRows, as_trained, learned_pieces, prepare_data
from dude_cli.evaluation.chat import TOLD_DAY
from dude_cli.evaluation.row_reader import RowReader

if TYPE_CHECKING:
    from dude_cli.config import DataSource


@dataclass
class EncodedInstance(Instance):  # type: ignore[misc]
    """A request of lm-eval whose tokens are known: those before an answer, and its own."""

    tokens: tuple[list[int], list[int]] = ((), ())  # type: ignore[assignment]  # the fields before it have defaults


class RowsTask(Task):  # type: ignore[misc]
    """Rows with their own answers; of each row two numbers, whose means over the rows are the scores.

    - `loss`: with s_i the sum of -ln p(token | tokens before it) over the n_i tokens of row i's answers, and n the mean
      of n_i, it is s_i / n, in nats. The mean over the rows is sum_i s_i / sum_i n_i, the mean over all tokens, as a
      training's `eval_loss` is; and mean and paired standard errors over rows are right for it, given the rows.
    - `exact_match`: 1 where each token of the answers is the likeliest one, the end of an answer too: what the model
      answers by taking the likeliest token is then the row's own answer.
    """

    VERSION = 1
    OUTPUT_TYPE = "loglikelihood"

    def __init__(self, name: str, rows: EncodedRows, tokenizer: Any, limit: int | None, *, are_chats: bool) -> None:
        super().__init__()
        self.are_chats = are_chats
        self._config = TaskConfig(task=name, output_type=self.OUTPUT_TYPE, num_fewshot=0)
        count = len(rows) if limit is None else min(limit, len(rows))
        self._rows = [rows[index] for index in range(count)]
        self._docs = [_doc(tokenizer, row) for row in self._rows]
        self._tokens_per_row = sum(rows.target_tokens[:count].tolist()) / count

    def download(self, *given: Any, **settings: Any) -> None:
        """The rows are read already."""

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        return self._docs

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return str(doc["prompt"])

    def doc_to_target(self, doc: dict[str, Any]) -> str:
        return str(doc["completion"])

    def fewshot_context(self, doc: dict[str, Any], *given: Any, **settings: Any) -> str:
        return self.doc_to_text(doc)

    def construct_requests(
        self, doc: dict[str, Any], ctx: str, *, metadata: tuple[str, int, int], **settings: Any
    ) -> list[Instance]:
        row = self._rows[metadata[1]]
        texts = (ctx, self.doc_to_target(doc))
        return [
            EncodedInstance("loglikelihood", doc, texts, index, metadata, tokens=tokens)
            for index, tokens in enumerate(_answers(row))
        ]

    def process_results(self, doc: dict[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        return {
            "loss": -sum(likelihood for likelihood, _ in results) / self._tokens_per_row,
            "exact_match": float(all(is_likeliest for _, is_likeliest in results)),
        }

    def aggregation(self) -> dict[str, Callable[..., float]]:
        return {"loss": mean, "exact_match": mean}

    def higher_is_better(self) -> dict[str, bool]:
        return {"loss": False, "exact_match": True}


def rows_task(
    name: str,
    sources: Sequence[DataSource],
    reader: RowReader,
    limit: int | None,
    log: Callable[[str], None],
    warn: Callable[[str], None],
) -> RowsTask:
    """The first `limit` rows of `sources`, read and encoded. Raises DataError as `prepare_data` does."""
    config = as_trained(sources, reader.trained, reader.context)
    data = prepare_data(config, reader.tokenizer, 0, log, TOLD_DAY, train_name=name)
    for line in data.train_report.warnings():
        warn(f"warning: {name}: {line}")
    hashes = data.train.row_hashes()[:limit]
    seen = 0 if reader.trained_rows is None else int(np.isin(hashes, reader.trained_rows).sum())
    if seen:
        what = f"{seen:,} of {len(hashes):,} rows are among those that it was trained on"
        warn(f"warning: {name}: {what}: of them the scores do not tell what the model makes of new rows")
    left_out = data.train_report.rows_without_target
    if left_out:
        warn(f"warning: {name}: {left_out:,} rows have no answer to score and are left out")
    return RowsTask(name, data.train, reader.tokenizer, limit, are_chats=config.has_chats)


def _doc(tokenizer: Any, row: EncodedRow) -> dict[str, Any]:
    """What the results show of a row: the text in front of its first answer, and all from there on."""
    pieces = learned_pieces(tokenizer, row)
    first = 0 if pieces[0][1] else 1
    texts = [text for text, _ in pieces]
    (number,) = row.source_rows
    return {"row": number + 1, "prompt": "".join(texts[:first]), "completion": "".join(texts[first:])}


def _answers(row: EncodedRow) -> Iterator[tuple[list[int], list[int]]]:
    """Each answer of a row, its tokens behind all those before it. The very first token of a text has none."""
    start = None
    for place in range(1, len(row) + 1):
        is_learned = place < len(row) and row.labels[place] >= 0
        if is_learned and start is None:
            start = place
        elif not is_learned and start is not None:
            yield row.input_ids[:start], row.input_ids[start:place]
            start = None
