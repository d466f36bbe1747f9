"""The file with the answers to rows: nothing that is answered is lost, and what has its name is whole.

`ANSWERS.jsonl.partial` takes each batch as it is answered, the longest prompts first, behind a line that says what they
are answers to. When all are there, `ANSWERS.jsonl` has them in the rows' order, and the other file goes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from dude_cli.errors import UsageError
from dude_cli.system import files
from dude_cli.system.lock import locked

Record = dict[str, Any]
_BEGUN = "begun_at"


class AnswersFile:
    """The answers for `path`, with those that an interrupted command has left; made by `answers_file`."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, _partial(path)
        self.answers: dict[int, Record] = {}
        self.settings: Record | None = None
        self._read()
        self.begun_at = datetime.now() if self.settings is None else datetime.fromisoformat(self.settings[_BEGUN])
        self._file: TextIO | None = None

    def _read(self) -> None:
        """Read what is there, but for a line that a power cut has left without its end."""
        try:
            data = self.partial.read_bytes()
        except FileNotFoundError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        try:
            first, *records = [json.loads(line) for line in whole.splitlines()] or [None]
            if first is not None:
                self.settings = dict(first["answers_to"])
                datetime.fromisoformat(self.settings[_BEGUN])
            self.answers = {int(record["row"]): record for record in records}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(
                "this file is in the way: it is not what an interrupted `dude generate --rows` leaves",
                where=str(self.partial),
                fix="move it away, or choose another --output",
            ) from error
        if len(whole) < len(data):
            os.truncate(self.partial, len(whole))

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Begin, or go on with, the answers to what `settings` say.

        Raises UsageError where those that are there are answers to something else.
        """
        given = {_BEGUN: self.begun_at.isoformat(), **settings}
        if self.settings is not None and self.settings != given:
            other = [key for key in given if given[key] != self.settings.get(key)]
            raise UsageError(
                f"the answers that are there are from a command that differs in: {', '.join(other)}",
                where=str(self.partial),
                fix="give that command again, delete the file, or choose another --output",
            )
        files.make_folder(self.path.parent)
        self._file = self.partial.open("a", encoding="utf-8", newline="\n")
        if self.settings is None:
            self._write([{"answers_to": given}])

    def add(self, records: Sequence[Record]) -> None:
        """Keep some answers, each with the number of its `row`."""
        self._write(records)
        self.answers |= {record["row"]: record for record in records}

    def _write(self, records: Sequence[Record]) -> None:
        assert self._file is not None
        self._file.write(_lines(records))
        self._file.flush()
        os.fsync(self._file.fileno())

    def finish(self) -> list[Record]:
        """Write all answers in the rows' order, and return them so."""
        check_new(self.path)  # hours may have passed
        ordered = [self.answers[row] for row in sorted(self.answers)]
        files.write_text(self.path, _lines(ordered))
        self.close()
        self.partial.unlink()
        return ordered

    def close(self) -> None:
        """Close the file; from then on `answers` are those that it has. One without an answer goes."""
        if self._file is not None:
            self._file.close()
            self._file = None
            self._read()  # an interruption may have come between the writing and the counting
        if not self.answers:
            self.partial.unlink(missing_ok=True)


@contextmanager
def answers_file(path: Path, say: Callable[[str], None]) -> Iterator[AnswersFile]:
    """The answers for `path`, for this command alone.

    Raises UsageError where something is at `path` already, or another command is at work on it.
    """
    check_new(path)
    files.check_writable(path.parent)
    try:
        with locked(path.with_name(f".{path.name}.lock"), say):
            answers = AnswersFile(path)
            try:
                yield answers
            finally:
                answers.close()
    except BlockingIOError as error:
        raise UsageError(
            f"another dude command writes these answers: {error.strerror}",
            where=str(path),
            fix="wait until it has ended, or choose another --output",
        ) from error


def check_new(path: Path) -> None:
    """Raise UsageError where something is at `path`."""
    if os.path.lexists(path):
        raise UsageError(
            f"{path.name or path} is there already, and nothing is ever replaced",
            where=str(path),
            fix="name a new file with --output",
        )


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _lines(records: Sequence[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
