"""What one process knows of its surroundings: seeds, signals, versions, devices."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.errors import UsageError, is_lost_rank, without_tokens
from dude_cli.system.gpu import gpu_kind
from dude_cli.system.stopping import Interrupted, handling

if TYPE_CHECKING:
    from accelerate import Accelerator

RECORDED_PACKAGES = (
    "dude-cli",
    "torch",
    "transformers",
    "datasets",
    "accelerate",
    "lm-eval",
    "safetensors",
    "bitsandbytes",
)


def seed_everything(*parts: object) -> None:
    """Seed Python, NumPy and torch on every device as a pure function of `parts`, such as (seed, step, rank)."""
    import random

    import numpy as np
    import torch

    digest = _digest(*parts)
    random.seed(digest)
    np.random.seed(int.from_bytes(digest[:4], "big"))
    torch.manual_seed(torch_seed(*parts))


def torch_seed(*parts: object) -> int:
    """What `seed_everything` seeds torch with, for a generator beside torch's own."""
    return int.from_bytes(_digest(*parts)[:7], "big")


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(":".join(map(str, parts)).encode()).digest()


class StopSignal:
    """Remembers that a signal asked the process to stop; truthy from then on."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Within, the first signal is only remembered; a second SIGINT interrupts at once.

    So does, after a signal, the loss of another rank that was interrupted.
    """
    stop = StopSignal()

    def remember(number: int) -> None:
        if stop and number == signal.SIGINT:
            raise Interrupted
        stop.name = signal.Signals(number).name

    try:
        with handling(remember):
            yield stop
    except RuntimeError as error:
        if stop and is_lost_rank(error):
            raise Interrupted from error
        raise


def make_accelerator(timeout_s: float | None = None) -> Accelerator:
    """accelerate's view of the ranks and devices, with the libraries' own chatter off.

    A rank that waits for another one longer than `timeout_s`, else torch's own limit, ends with an error; the first
    call decides. Mixed precision stays off there: the base has its dtype, the adapters are float32, and the layer
    casts. Raises UsageError if accelerate's own configuration asks for an engine that shards models itself.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    _refuse_other_engines()
    quiet_libraries()
    # Ranks may run different numbers of micro-batches, so buffers must not be exchanged in each forward. Newer torch
    # has another name for that, which accelerate does not pass on yet.
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    # Without `cpu`, accelerate 1.15 takes several ranks on a CPU for as many single processes.
    group = InitProcessGroupKwargs(timeout=None if timeout_s is None else timedelta(seconds=timeout_s))
    return Accelerator(mixed_precision="no", cpu=gpu_kind() is None, kwargs_handlers=[ddp, group])


def _refuse_other_engines() -> None:
    """Raise UsageError for what `accelerate launch` has put into the environment and we would not follow."""
    for engine in ("DeepSpeed", "FSDP", "Megatron_LM"):
        name = f"ACCELERATE_USE_{engine.upper()}"
        if os.environ.get(name, "").lower() in ("true", "1"):
            raise UsageError(
                f"accelerate is configured to use {engine.replace('_', '-')}, and dude shards the base itself",
                where=f"{name}={os.environ[name]}",
                fix="turn it off there, or start without accelerate, and set train.distributed: fsdp",
            )


def part_ranks() -> None:
    """Take leave of the other ranks, at the end of a command: NCCL warns of those that just go."""
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def local_main_first(accelerator: Accelerator) -> Iterator[None]:
    """Within, the main rank of each machine goes first, and the others follow with what it has left for them.

    They follow too when it fails: they meet the same failure, and no rank waits for one that is gone.
    """
    if not accelerator.is_local_main_process:
        accelerator.wait_for_everyone()
    try:
        yield
    finally:
        if accelerator.is_local_main_process:
            accelerator.wait_for_everyone()


def process_age_s() -> float:
    """Seconds since this process was started, the interpreter's own start included."""
    import psutil

    return time.time() - float(psutil.Process().create_time())


def best_device() -> str:
    """The device of this process: the GPU if there is one, the rank's own of several."""
    import torch

    gpu = gpu_kind()
    return "cpu" if gpu is None else f"{gpu.type}:{torch.accelerator.current_device_index()}"


def quiet_libraries() -> None:
    """Turn off the progress bars and notes of the libraries below us: they are not ours to explain."""
    import datasets
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # load_model compares the two itself
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it has one for each 8-bit layer in each forward
    logging.getLogger("huggingface_hub.utils._http").addFilter(_is_no_retry)


def _is_no_retry(record: logging.LogRecord) -> bool:
    """Whether a line of the hub's client is none of those that each try of a request has: our error is the last one."""
    text = record.getMessage()
    return "thrown while requesting" not in text and not text.startswith("Retrying in")


def environment(device: str, world_size: int, model_revision: str | None) -> dict[str, Any]:
    """What a number depends on beside the config: versions, git commit, devices, threads, world size."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in RECORDED_PACKAGES},
        "git_commit": _git_commit(),
        "device": device,
        "gpus": gpus,
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "world_size": world_size,
        "model_revision": model_revision,
        "command": [without_tokens(argument) for argument in sys.argv],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the code that runs, with `+changes` if the tree differs from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if status.stdout.strip() else "")
