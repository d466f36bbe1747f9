"""Commands in processes of their own, without the seconds that imports take: forked from one that has done them.

A rank can be told to send itself a signal when it comes to a stage, so that no test has to guess the moment.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from command import environment

from dude_cli.reproduce.execute import PRELOAD

# One server is for these and for the runs of `dude reproduce` in a test's process: what it imports is decided once.
PRELOADED = [*PRELOAD, "dude_cli.cli", "dude_cli.report", "drawn"]
# Where each stage is entered, and which time: the first evaluation and the first checksums are others.
STAGES: dict[str, tuple[str, str, int]] = {
    "data": ("dude_cli.training.prepare", "prepare_data", 1),
    "load": ("dude_cli.training.prepare", "load_model", 1),
    "decomposition": ("dude_cli.adapter.decomposition_cache", "decompose_layer", 2),
    "first evaluation": ("dude_cli.training.validation", "longest_first", 1),
    "step": ("dude_cli.training.step", "accumulate_gradients", 3),
    "evaluation": ("dude_cli.training.validation", "longest_first", 2),
    "save": ("dude_cli.training.checkpoint", "_checksums", 1),
}


@dataclass(frozen=True)
class Strike:
    """The signal that a rank sends itself the `count`-th time that it calls a function."""

    module: str
    name: str
    count: int
    number: signal.Signals

    @classmethod
    def at(cls, stage: str, number: signal.Signals) -> Strike:
        return cls(*STAGES[stage], number)

    def arm(self) -> None:
        module, left = importlib.import_module(self.module), self.count
        function = getattr(module, self.name)

        def struck(*args: object, **kwargs: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), self.number)
            return function(*args, **kwargs)

        setattr(module, self.name, struck)


def dude(arguments: list[str]) -> None:
    from dude_cli.__main__ import main

    sys.argv = ["dude", *arguments]
    main()


class Ranks:
    """The ranks of one command; one is a process without a group. Each has the files rank-N.out and .err in `folder`.

    The command is `dude ARGUMENTS`, or what the function `command` does with the arguments.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        folder: Path,
        count: int = 1,
        strikes: Mapping[int, Strike] | None = None,
        command: Callable[[list[str]], None] = dude,
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.logs = [folder / f"rank-{rank}.err" for rank in range(count)]
        world = {} if count == 1 else _world(count)
        with mock.patch.dict(os.environ, environment()):  # of the first call, for the libraries that read it once
            self.processes: list[BaseProcess] = [
                context.Process(
                    target=_rank,
                    args=(
                        command,
                        [str(argument) for argument in arguments],
                        environment(**world, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world else {})),
                        self.logs[rank],
                        (strikes or {}).get(rank),
                    ),
                )
                for rank in range(count)
            ]
            for process in self.processes:
                process.start()

    def wait(self, timeout_s: float = 120) -> list[int]:
        """The exit codes. Kills what is still there after `timeout_s` and fails."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.exitcode is None]
        for process in self.processes:
            process.kill()
        assert not late, f"ranks {late} did not end within {timeout_s} s: {self.said()}"
        return [int(process.exitcode or 0) for process in self.processes]

    def said(self) -> str:
        """What they have written to standard error."""
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())

    def printed(self) -> str:
        """What they have written to standard output."""
        return "".join(log.with_suffix(".out").read_text() for log in self.logs)


def dude_forked(
    *arguments: object, count: int = 1, command: Callable[[list[str]], None] = dude
) -> subprocess.CompletedProcess[str]:
    """`dude ARGUMENTS`, or another command, by so many ranks, with the exit code of the first that failed."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = Ranks(arguments, Path(folder), count, command=command)
        code = next(filter(None, ranks.wait()), 0)
        return subprocess.CompletedProcess(list(arguments), code, ranks.printed(), ranks.said())


def two_ranks(*arguments: object) -> subprocess.CompletedProcess[str]:
    return dude_forked(*arguments, count=2)


def _world(count: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(count)
    return {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _rank(
    command: Callable[[list[str]], None], arguments: list[str], env: dict[str, str], log: Path, strike: Strike | None
) -> None:
    os.environ.clear()
    os.environ.update(env)
    for descriptor, file in ((1, log.with_suffix(".out")), (2, log)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if strike is not None:
        strike.arm()
    command(arguments)
