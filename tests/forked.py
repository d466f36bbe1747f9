"""Commands in processes of their own, without the seconds that imports take: forked from a process that has done them.

A rank can be told to send itself a signal when it comes to a stage, so that no test has to guess the moment.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from command import environment

PRELOADED = [
    "torch",
    "datasets",
    "accelerate",
    "transformers.models.llama.modeling_llama",
    "dude_cli.cli",
    "dude_cli.commands",
    "dude_cli.prepare",
    "dude_cli.train",
]
# Where each stage is entered, and which time: the first evaluation and the first checksums are others.
STAGES: dict[str, tuple[str, str, int]] = {
    "data": ("dude_cli.prepare", "prepare_data", 1),
    "load": ("dude_cli.prepare", "load_model", 1),
    "decomposition": ("dude_cli.adapter.decomposition_cache", "decompose_layer", 2),
    "first evaluation": ("dude_cli.train", "longest_first", 1),
    "step": ("dude_cli.train", "accumulate_gradients", 3),
    "evaluation": ("dude_cli.train", "longest_first", 2),
    "save": ("dude_cli.checkpoint", "_checksums", 1),
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


class Ranks:
    """The ranks of one command; one is a process without a group. What they said is in `folder`/rank-N.log."""

    def __init__(
        self, arguments: Sequence[object], folder: Path, count: int = 1, strikes: Mapping[int, Strike] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.logs = [folder / f"rank-{rank}.log" for rank in range(count)]
        world = {} if count == 1 else _world(count)
        with mock.patch.dict(os.environ, environment()):  # of the first call, for the libraries that read it once
            self.processes: list[BaseProcess] = [
                context.Process(
                    target=_command,
                    args=(
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
        return "".join(log.read_text(errors="replace") for log in self.logs if log.exists())


def _world(count: int) -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    size = str(count)
    return {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _command(arguments: list[str], env: dict[str, str], log: Path, strike: Strike | None) -> None:
    from dude_cli.__main__ import main

    os.environ.clear()
    os.environ.update(env)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if strike is not None:
        strike.arm()
    sys.argv = ["dude", *arguments]
    main()
