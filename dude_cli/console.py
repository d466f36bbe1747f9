"""Where words go: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, RenderableType

# Without a terminal there is no live line; a plain one this often instead.
PLAIN_LINE_EVERY_S = 10.0
# Nor is there an edge to wrap at: for grep and awk an entry is a line, however long.
PLAIN_WIDTH = 10_000

Count = Callable[[int, int], None]  # (done, total)
Counter = Callable[[str], AbstractContextManager[Count]]

_COMMANDS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters but tab and line break


@dataclass
class Output:
    """How one command talks. With `as_json`, standard output is one JSON document and nothing else."""

    as_json: bool = False
    is_quiet: bool = False
    out: Console = field(default_factory=lambda: _console())
    err: Console = field(default_factory=lambda: _console(stderr=True))
    has_result: bool = field(default=False, init=False)

    @property
    def progress(self) -> Console:
        """For progress: standard error, or nowhere when quiet."""
        return _console(stderr=True, quiet=True) if self.is_quiet else self.err

    def on_rank(self, is_main_process: bool) -> Output:
        """The same, or a silent one: of several ranks only the main one talks."""
        return (
            self
            if is_main_process
            else Output(is_quiet=True, out=_console(quiet=True), err=_console(stderr=True, quiet=True))
        )

    def say(self, *lines: str) -> None:
        for line in lines:
            self.progress.print(line, highlight=False, soft_wrap=True)

    def warn(self, *lines: str) -> None:
        """The same for what may spoil the result: when quiet too."""
        for line in lines:
            self.err.print(line, highlight=False, soft_wrap=True)

    def result(self, shown: RenderableType, document: object) -> None:
        """The command's result: `shown` for a person, `document` for a machine."""
        if self.out.quiet:
            return
        self.has_result = True
        if self.as_json:
            print(json.dumps(document, indent=2, default=str))
        elif isinstance(shown, str):
            print(shown)
        elif self.out.is_terminal:
            self.out.print(shown)
        else:
            with self.out.capture() as text:
                self.out.print(shown)
            lines = [line.rstrip() for line in text.get().splitlines()]  # columns are padded
            print(*lines, sep="\n", file=self.out.file)

    def write(self, text: str) -> None:
        """A piece of a result that comes bit by bit: as it stands, without a line break.

        A model can say anything: on a terminal, characters that would command it are not sent.
        """
        print(_COMMANDS.sub("\N{REPLACEMENT CHARACTER}", text) if self.out.is_terminal else text, end="", flush=True)

    @contextmanager
    def counter(self, label: str) -> Iterator[Count]:
        """Within, a progress bar on a terminal; elsewhere a line at once and then each PLAIN_LINE_EVERY_S seconds."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns: list[Any] = [TextColumn(label), MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn()]
        console, next_line_s = self.progress, 0.0
        with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
            task = progress.add_task(label, total=None)

            def show(done: int, total: int) -> None:
                nonlocal next_line_s
                progress.update(task, completed=done, total=total)
                now = time.monotonic()
                if done > 0 and not console.is_terminal and now >= next_line_s:
                    next_line_s = now + PLAIN_LINE_EVERY_S
                    self.say(f"{label} {done}/{total}")

            yield show


def no_counter(label: str) -> AbstractContextManager[Count]:
    """For one who does not look."""
    return nullcontext(lambda done, total: None)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command line: rich would exit with code 1, which is a bug's here."""
        raise BrokenPipeError


def _console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """A console that shows text as it stands: rich would take `[red]` or `:smile:` in a path for its own."""
    console = _Console(stderr=stderr, quiet=quiet, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    return console
