"""What the ranks of one training tell each other: small values, failures and signals. Nothing is pickled."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from dude_cli.errors import DudeError, explained
from dude_cli.system.stopping import Interrupted, ignore_signals

if TYPE_CHECKING:
    from accelerate import Accelerator

Result = TypeVar("Result")


def gather_json(accelerator: Accelerator, value: Any) -> list[Any]:
    """The `value` of each rank, in the ranks' order, on all of them; of JSON's types."""
    import torch

    if accelerator.num_processes == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(accelerator.device)
    sizes = accelerator.gather(torch.tensor([len(data)], device=accelerator.device)).tolist()
    padded = torch.zeros(1, max(sizes), dtype=torch.uint8, device=accelerator.device)
    padded[0, : len(data)] = data
    rows = accelerator.gather(padded).cpu()
    return [json.loads(row[:size].numpy().tobytes()) for row, size in zip(rows, sizes, strict=True)]


@contextmanager
def failing_together(accelerator: Accelerator) -> Iterator[None]:
    """Within, each rank works for itself; an error of one is raised on all at the end, so that none waits for it.

    The other ranks raise a DudeError with its text and its exit code.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        if accelerator.num_processes == 1:
            raise
        failure = error
    told = gather_json(accelerator, None if failure is None else _told(failure))
    if failure is not None:
        raise failure
    for rank, other in enumerate(told):
        if other is not None:
            theirs = DudeError(f"rank {rank} failed: {other['what']}", where=other["where"], fix=other["fix"])
            theirs.exit_code = other["exit_code"]
            raise theirs


def on_main_rank(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """What `action` returns on the main rank, of JSON's types, on all ranks; its error is raised on all too."""
    result: Any = None
    with failing_together(accelerator):
        if accelerator.is_main_process:
            result = action()
    found: Result = gather_json(accelerator, result)[0]
    return found


@contextmanager
def stopping_together(accelerator: Accelerator) -> Iterator[None]:
    """Within, a signal that ends this rank at once is passed on to the others on this machine, as SIGTERM.

    They would wait for it otherwise. Other machines get the signal from their own launcher.
    """
    import psutil

    own = psutil.Process()
    ranks = gather_json(accelerator, [socket.gethostname(), own.pid, own.create_time()])
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        ignore_signals()  # they pass theirs on as well
        for host, pid, created in ranks:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if host == socket.gethostname() and pid != own.pid and process.create_time() == created:
                    process.send_signal(signal.SIGTERM)
        raise


def _told(error: Exception) -> dict[str, Any]:
    known = explained(error) or DudeError(f"{type(error).__name__}: {error}")
    return {"what": known.what, "where": known.where, "fix": known.fix, "exit_code": known.exit_code}
