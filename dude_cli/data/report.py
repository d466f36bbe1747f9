"""What became of the rows of a data set, and what is to be said of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataReport:
    """What became of a data set's rows.

    `rows` counts the rows to learn from; `rows_without_target` those left out because nothing of them is learned.
    `empty_answers` of them have an answer without words.
    A document of more than `max_length` tokens is several rows; `split_documents` counts such.
    `truncated_rows` were longer than `max_length`; of those among `rows`, `lost_starts` lost the start of their prompt,
    `lost_questions` all that is said in front of the first answer, `cut_answers` the end of an answer, with its EOS,
    and `shortened_chats` messages at their end that would be learned, with `lost_turns` of the assistant's in all.
    `tokens` and `target_tokens` are over `rows`, after truncation; `longest_row` is in tokens, before it.
    `packed_sequences` is None without packing. `example` is the first row as pieces of text, each with whether it
    is learned.
    """

    rows: int
    tokens: int
    target_tokens: int
    empty_answers: int
    truncated_rows: int
    lost_starts: int
    lost_questions: int
    cut_answers: int
    shortened_chats: int
    lost_turns: int
    rows_without_target: int
    split_documents: int
    longest_row: int
    max_length: int
    packed_sequences: int | None
    example: list[tuple[str, bool]]

    def notes(self) -> list[str]:
        """What a user may not expect and need not change, a line each."""
        found = []
        if self.split_documents:
            found.append(
                f"texts longer than data.max_length ({self.max_length}): {self.split_documents:,}, split into rows of "
                f"at most that length; {self.rows:,} rows in all"
            )
        if self.lost_starts and not self._many_lost_starts:
            found.append(
                f"rows longer than data.max_length ({self.max_length}): {self.lost_starts:,} lose the start of their "
                "prompt"
            )
        return found

    @property
    def _many_lost_starts(self) -> bool:
        """Whether it is no longer a few rows that lose the start of their prompt."""
        return self.lost_starts > self.rows / 10

    def warnings(self) -> list[str]:
        """What a user should know before training on these rows, a line each."""
        found, limit = [], f"data.max_length ({self.max_length}); the longest row has {self.longest_row:,} tokens"
        if self.cut_answers:
            found.append(
                f"{self.cut_answers:,} of {self.rows:,} rows lose their whole prompt and the end of their answer, with "
                f"its EOS, to {limit}"
            )
        if self._many_lost_starts:
            found.append(f"{self.lost_starts:,} of {self.rows:,} rows lose the start of their prompt to {limit}")
        if self.lost_questions:
            found.append(
                f"{self.lost_questions:,} conversations lose all of the question in front of their first answer to "
                f"{limit}"
            )
        if self.shortened_chats:
            turns = f", with {self.lost_turns:,} turns of the assistant's," if self.lost_turns else ""
            found.append(f"{self.shortened_chats:,} conversations lose their last messages{turns} to {limit}")
        if self.empty_answers:
            found.append(
                f"{self.empty_answers:,} of {self.rows:,} rows have an empty answer: only its end can be learned"
            )
        return found
