"""Run what is missing: each run in a process of its own, several at once, one on each GPU."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from dude_cli.config import EvalTask, dump_config
from dude_cli.errors import DivergedError, DudeError, StoppedError, UsageError
from dude_cli.reproduce.plan import Run
from dude_cli.reproduce.scores import task_results
from dude_cli.system import files
from dude_cli.system.lock import locked
from dude_cli.system.stopping import Interrupted, interrupting_signals

# What a run imports, once for all of them: the server process of multiprocessing does it, and each run is a copy of it.
PRELOAD = ["dude_cli.commands.reproducing", "dude_cli.target", "dude_cli.evaluation"]
PRELOAD += [f"dude_cli.training.{name}" for name in ("loop", "prepare", "start", "decompositions", "estimate")]
PRELOAD += ["dude_cli.training.init_report", "datasets", "peft", "transformers.models.llama.modeling_llama"]
PRELOAD += ["lm_eval", "lm_eval.evaluator", "lm_eval.tasks", "lm_eval.models.huggingface"]


@dataclass(frozen=True)
class Job:
    """What one process does: train a run, unless it is finished, and score it on the `tasks` that it lacks.

    `anew` trains it in any case; `base` scores the base model too; `data_dir` has local copies of the tasks' data.
    """

    run: Run
    config_path: Path
    tasks: tuple[EvalTask, ...] = ()
    anew: bool = False
    base: bool = False
    data_dir: Path | None = None

    @property
    def log(self) -> Path:
        return self.config_path.parent.parent / "logs" / f"{self.run.name}.log"

    @property
    def diverged(self) -> Path:
        """Says of which config it is known that it diverges, so that it is not tried again."""
        return self.config_path.parent.parent / "diverged" / f"{self.run.name}.yaml"

    def missing_tasks(self) -> list[EvalTask]:
        found = [(task, task_results(self.run, task)) for task in self.tasks]
        return [task for task, results in found if results is None or (self.base and "base" not in results)]

    @property
    def is_done(self) -> bool:
        return not self.anew and self.run.is_finished and not self.missing_tasks()


Work = Callable[[Job], None]


@dataclass
class Failures:
    """What went wrong, by run: the message of each failure, and the names of those that diverged."""

    messages: dict[str, str] = field(default_factory=dict)
    diverged: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Slot:
    """Where a run goes: a GPU by its name in CUDA_VISIBLE_DEVICES, or the CPU with so many threads."""

    gpu: str | None = None
    threads: int | None = None


def slots(jobs: int | None, threads: int | None) -> list[Slot]:
    """One slot for each run at a time: one per GPU; on a CPU, as many as `threads` each leave room for, or one.

    Raises UsageError for more jobs than GPUs.
    """
    import torch

    count = torch.cuda.device_count()
    if count == 0:
        default = 1 if threads is None else max(1, (os.cpu_count() or 1) // threads)
        return [Slot(threads=threads)] * (jobs or default)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = visible or [str(index) for index in range(count)]
    if jobs is not None and jobs > count:
        raise UsageError(
            f"{jobs} runs at once need as many GPUs, and there are {count}", where="--jobs", fix=f"--jobs {count}"
        )
    return [Slot(gpu=name) for name in names[: jobs or count]]


def run_jobs(
    jobs: Sequence[Job], places: Sequence[Slot], work: Work, failures: Failures, say: Callable[[str], None]
) -> None:
    """Do `work` for each job that is not done, on whichever place is free; a failure is noted and the rest go on.

    `work` must be a module's function: it is called in another process. When this process is interrupted, or ends in
    any way, the runs are stopped too, and a training saves a checkpoint first.
    """
    waiting = deque(job for job in jobs if not job.is_done and not _is_known_to_diverge(job, failures))
    total, started = len(waiting), 0
    free, running = deque(places), dict[Any, _Child]()
    try:
        while waiting or running:
            while waiting and free:
                started += 1
                job, place = waiting.popleft(), free.popleft()
                on = f" on GPU {place.gpu}" if place.gpu is not None else ""
                say(f"[{started}/{total}] {job.run.name}{on}")
                child = _Child(job, place, work)
                running[child.process.sentinel] = child
            for sentinel in wait(list(running)):
                child = running.pop(sentinel)
                free.append(child.place)
                child.note_end(failures, say)
    except BaseException:
        _stop([child.process for child in running.values()], say)
        raise


def _is_known_to_diverge(job: Job, failures: Failures) -> bool:
    try:
        known = job.diverged.read_text(encoding="utf-8") == dump_config(job.run.config)
    except OSError:
        return False
    if known:
        failures.diverged.add(job.run.name)
    return known


class _Child:
    """A process that does one job, and what it has said of its end."""

    def __init__(self, job: Job, place: Slot, work: Work) -> None:
        self.job, self.place = job, place
        files.write_text(job.config_path, dump_config(job.run.config))
        job.log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        _start_server()
        self.answer, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=_child_main, args=(job, place, work, theirs, dict(os.environ)))
        self.process.start()
        theirs.close()

    def note_end(self, failures: Failures, say: Callable[[str], None]) -> None:
        self.process.join()
        name, log = self.job.run.name, self.job.log
        try:
            code, message = self.answer.recv()
        except EOFError:
            code, message = 1, f"its process ended with exit code {self.process.exitcode} (out of memory, or killed)"
        if code == 0:
            return
        if code == StoppedError.exit_code:
            raise StoppedError(
                f"{name} was stopped by a signal", where=str(log), fix="the same command continues where it stopped"
            )
        if code == DivergedError.exit_code and not self.job.run.is_finished:
            files.write_text(self.job.diverged, dump_config(self.job.run.config))
            failures.diverged.add(name)
            say(f"{name} diverged: {message}")
            return
        failures.messages[name] = message
        say(f"{name} failed: {message}\n  log: {log}")


def _start_server() -> None:
    """Start the server process, if it is not running, so that Ctrl-C does not end it with a traceback while it imports.

    What it forks inherits that SIGINT is blocked.
    """
    from multiprocessing import forkserver, resource_tracker

    resource_tracker.ensure_running()  # it unblocks SIGINT when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(processes: list[Any], say: Callable[[str], None]) -> None:
    if processes:
        say(f"stopping {len(processes)} runs")
    for process in processes:
        process.terminate()
    for process in processes:
        process.join()


def _child_main(job: Job, place: Slot, work: Work, answer: Connection, environment: dict[str, str]) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    os.environ.clear()
    os.environ.update(environment)  # the server's is that of an earlier time
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    outcome = _outcome(job, place, work)
    with suppress(BrokenPipeError):  # the command is gone
        answer.send(outcome)


def _outcome(job: Job, place: Slot, work: Work) -> tuple[int, str]:
    """The exit code that a command would have, and its message."""
    import traceback

    try:
        # A process that an earlier command left behind on this run is waited for.
        lock = job.run.folder.with_name(f".{job.run.folder.name}.lock")
        with interrupting_signals(), locked(lock, functools.partial(print, file=sys.stderr), wait=True):
            if place.threads is not None:
                import torch

                torch.set_num_threads(place.threads)
            work(job)
    except (Interrupted, KeyboardInterrupt):
        return StoppedError.exit_code, "stopped"
    except DudeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code, error.what
    except Exception as error:
        traceback.print_exc()
        return 1, f"{type(error).__name__}: {error}"
    return 0, ""


def _end_with_parent() -> None:
    """When the command is killed, stop as by a signal: a training saves a checkpoint."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
