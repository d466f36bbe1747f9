"""Start the ranks of a command on this machine, pass signals on to them, and end as they do.

A rank is this command again, with the variables that torch's `env://` rendezvous reads. One that some other program
has started (torchrun, accelerate launch, a SLURM script) finds them set, and works in place.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dude_cli.errors import DudeError, StoppedError, UsageError, without_tokens
from dude_cli.system.gpu import gpu_kind
from dude_cli.system.stopping import SIGNALS

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing import SubprocessContext

POLL_S = 0.05
# When one rank has failed, the others have so long to end by themselves, then after a SIGTERM, and are killed.
GRACE_S = 6
TERMINATE_S = 8
# Set for the ranks that are started here: who their launcher is, and the file that takes their last words.
LAUNCHER, ERROR_FILE = "DUDE_LAUNCHER", "DUDE_ERROR_FILE"


def ranks_to_start(num_processes: int | None) -> int:
    """How many ranks this command has to start; 1 if it is one itself, or the only one.

    Without a number, one for each visible GPU, or one on a CPU. Raises UsageError for more ranks than GPUs, for another
    number than the program that has started this rank says, and for tasks of SLURM's that do not know of each other.
    """
    if _is_rank():
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if num_processes not in (None, world_size):
            raise UsageError(
                f"this is one of {world_size} ranks that another program has started, and cannot be {num_processes}",
                where=f"--num-processes {num_processes}",
                fix="leave it out, and give the number to torchrun, accelerate launch or srun",
            )
        return 1
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise UsageError(
            "SLURM has started several tasks, and none knows its rank: each would do all of the work",
            where=f"SLURM_STEP_NUM_TASKS={os.environ['SLURM_STEP_NUM_TASKS']}, LOCAL_RANK is not set",
            fix="start one task on each machine with torchrun in it, or export RANK, LOCAL_RANK, WORLD_SIZE and "
            "MASTER_ADDR: see docs/distributed.md",
        )
    import torch

    gpus = 0 if gpu_kind() is None else torch.accelerator.device_count()
    if gpus and num_processes is not None and num_processes > gpus:
        raise UsageError(
            f"there {'is 1 GPU' if gpus == 1 else f'are {gpus} GPUs'} for {num_processes} ranks",
            where=f"--num-processes {num_processes}",
            fix=f"give at most {gpus}; train.global_batch_size does not depend on it",
        )
    return num_processes or max(1, gpus)


def run_ranks(count: int, command: Sequence[str] = ()) -> NoReturn:
    """Start this command, or `command`, as ranks 0 to `count` - 1 and exit with the code of the first that failed.

    Of a rank that a signal killed it is 128 plus the signal's number, as in a shell. The first signal to this process
    is passed on to each rank, which saves and ends; a second SIGINT is too, and ends them within seconds. When a rank
    fails, none is left after GRACE_S + TERMINATE_S.
    """
    command = command or [sys.executable, "-m", "dude_cli", *sys.argv[1:]]
    with tempfile.TemporaryDirectory(prefix="dude-ranks-") as folder:
        # A signal waits until all ranks are there to get it; they unblock it when they can answer.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        ranks = _start(count, command, Path(folder))
        codes = _wait(ranks)
        code = _exit_code(codes)
        _report(codes, code, Path(folder))
    raise SystemExit(code)


def follow_launcher() -> None:
    """In a rank, ask Linux for a SIGTERM should the launcher die, so that none is left behind."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    import ctypes

    PR_SET_PDEATHSIG = 1  # prctl(2)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(launcher):
        os.kill(os.getpid(), signal.SIGTERM)


def tell_error(error: DudeError, trace: str = "", *, as_json: bool = False) -> None:
    """Print an error, with the rank's name if it is not the main one; `as_json` that one prints it for a machine too.

    Where we have started the ranks, the launcher prints it: what several of them say, once.
    """
    rank, file = int(os.environ.get("RANK", "0")), os.environ.get(ERROR_FILE)
    message, document = str(error), error.document() if as_json else None
    if file is not None and os.getppid() == int(os.environ[LAUNCHER]):
        Path(file).write_text(json.dumps([message, trace, document]), encoding="utf-8")
    else:
        _print_error(rank, message, trace)
        if document is not None and rank == 0:
            print_document(document)


def _is_rank() -> bool:
    # `accelerate launch` sets no LOCAL_RANK for a single process.
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _start(count: int, command: Sequence[str], folder: Path) -> SubprocessContext:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SubprocessContext, start_processes

    world = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        LAUNCHER: str(os.getpid()),
    }
    # With a thread for each core in each rank they would wait for each other.
    world |= {"OMP_NUM_THREADS": str(max(1, _cores() // count))} if "OMP_NUM_THREADS" not in os.environ else {}
    envs = {
        rank: world | {"RANK": str(rank), "LOCAL_RANK": str(rank), ERROR_FILE: str(folder / f"error-{rank}")}
        for rank in range(count)
    }
    logs = folder / "logs"
    logs.mkdir()
    logging.disable()  # torch tells of each signal that it sends
    arguments = dict.fromkeys(range(count), tuple(command[1:]))
    ranks = start_processes("dude", command[0], arguments, envs, DefaultLogsSpecs(log_dir=str(logs)))
    assert isinstance(ranks, SubprocessContext)
    return ranks


def _wait(ranks: SubprocessContext) -> dict[int, int]:
    """The exit codes by rank, in the order in which they ended: negative for a signal, as in `subprocess`."""
    received: list[int] = []
    for kind in SIGNALS:  # torch has put its own handlers there
        signal.signal(kind, lambda number, _: received.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    codes: dict[int, int] = {}
    is_told, deadline = False, math.inf
    try:
        while len(codes) < ranks.nprocs:
            time.sleep(POLL_S)
            while received:
                number = received.pop(0)
                if not is_told or number == signal.SIGINT:
                    _send(ranks, number)
                    deadline = min(deadline, time.monotonic() + GRACE_S) if is_told else deadline
                    is_told = True
            codes |= _ended(ranks, codes)
            if any(codes.values()):
                deadline = min(deadline, time.monotonic() + GRACE_S)
            if time.monotonic() > deadline:
                break
    finally:
        ranks.close(signal.SIGTERM, timeout=TERMINATE_S)
    # What ends now does so because we want it to, and is not what the run ends of.
    return codes | dict.fromkeys(_ended(ranks, codes), StoppedError.exit_code)


def _send(ranks: SubprocessContext, number: int) -> None:
    for handler in ranks.subprocess_handlers.values():
        if handler.proc.poll() is None:
            handler.proc.send_signal(number)


def _ended(ranks: SubprocessContext, known: dict[int, int]) -> dict[int, int]:
    """The exit codes of ranks that have ended and are not `known`; of several at once, the cause before what follows.

    A rank that a signal killed is why others lose it; theirs is 1. One that was stopped before it could say why has 75.
    """
    polled = {rank: handler.proc.poll() for rank, handler in ranks.subprocess_handlers.items() if rank not in known}
    ended = {rank: code for rank, code in polled.items() if code is not None}
    consequences = (1, StoppedError.exit_code)
    return dict(sorted(ended.items(), key=lambda item: (item[1] >= 0, item[1] in consequences)))


def _exit_code(codes: dict[int, int]) -> int:
    first = next((code for code in codes.values() if code), 0)
    return first if first >= 0 else 128 - first


def _report(codes: dict[int, int], code: int, folder: Path) -> None:
    """Print what the ranks that ended with `code` said of it; the others lost them or were stopped."""
    told: list[str] = []
    documents: list[Mapping[str, Any]] = []
    for rank, own in sorted(codes.items()):
        if own < 0 and 128 - own == code:
            name = signal.Signals(-own).name
            fix = "see the system's log: it may have been out of memory" if name == "SIGKILL" else "run it with --debug"
            error = DudeError(f"rank {rank} was killed by {name}; the other ranks were stopped", fix=fix)
            _print_error(0, str(error), "")
            documents += [error.document() | {"exit_code": code}] if "--json" in sys.argv else []
        file = folder / f"error-{rank}"
        if own != code or not file.exists():
            continue
        message, trace, document = json.loads(file.read_text(encoding="utf-8"))
        documents += [document] if document is not None else []
        if not any(message in earlier for earlier in told):
            _print_error(rank, message, trace)
        told.append(message)
    if documents:
        print_document(documents[0])


def _print_error(rank: int, message: str, trace: str) -> None:
    name = f"rank {rank}: " if rank else ""
    print(without_tokens(f"{trace}error: {name}{message}"), file=sys.stderr)


def print_document(document: Mapping[str, Any]) -> None:
    """Print an error for a machine."""
    print(without_tokens(json.dumps({"error": document}, indent=2)), flush=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _cores() -> int:
    """The cores that this process may use: of a container or a SLURM job, not of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
