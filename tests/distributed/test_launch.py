"""The launcher, with small programs as ranks: what it starts, passes on, prints and returns; it leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.elastic.multiprocessing

from dude_cli.errors import UsageError
from dude_cli.system import launch
from dude_cli.system.launch import ranks_to_start, run_ranks
from dude_cli.system.runtime import make_accelerator

RANK = """
import json, os, signal, sys, time
from pathlib import Path
from dude_cli.errors import DudeError
from dude_cli.system.launch import follow_launcher, tell_error
from dude_cli.system.stopping import leave_on_signals

folder, mode, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
(folder / f"pid-{rank}").write_text(str(os.getpid()))
(folder / f"environment-{rank}").write_text(json.dumps(dict(os.environ)))
if mode == "starts":
    time.sleep(1)  # as the interpreter's own start, when a signal would kill
leave_on_signals()
follow_launcher()
seen = []
if mode in ("saves", "hangs"):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: seen.append(signal.Signals(number).name))
(folder / f"ready-{rank}").touch()
if mode == "agree":
    tell_error(DudeError("the loss is nan"), as_json=True)
    sys.exit(4)
if mode == "differ":
    if rank == 0:
        time.sleep(0.5)
    tell_error(DudeError("the disk is full" if rank == 1 else "another rank is gone"), as_json=True)
    sys.exit(5 if rank == 1 else 1)
if mode == "dies" and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
while mode != "saves" or not seen:
    if mode == "dies":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as one that waits in a collective
    time.sleep(0.05)
time.sleep(1)
(folder / f"seen-{rank}").write_text(" ".join(seen))
tell_error(DudeError("stopped; a checkpoint is saved"))
sys.exit(75)
"""


class Launched:
    """A launcher with two ranks that run RANK: a fork of this process, which has imported torch."""

    def __init__(self, folder: Path, mode: str) -> None:
        self.folder, self.stderr = folder, folder / "stderr"
        (folder / "rank.py").write_text(RANK)
        self.pid = os.fork()
        if self.pid == 0:
            self._launch([sys.executable, str(folder / "rank.py"), str(folder), mode])

    def _launch(self, command: list[str]) -> None:
        code = 1
        try:
            os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
            os.environ.pop("OMP_NUM_THREADS", None)
            launch.GRACE_S = launch.TERMINATE_S = 1
            with self.stderr.open("w") as sys.stderr, (self.folder / "stdout").open("w") as sys.stdout:
                os.dup2(sys.stderr.fileno(), 2)
                run_ranks(2, command)
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code)

    def wait_for(self, name: str) -> None:
        files = [self.folder / f"{name}-{rank}" for rank in (0, 1)]
        for _ in range(2000):
            if all(file.exists() for file in files):
                return
            time.sleep(0.02)
        pytest.fail(f"no {name}")

    def end(self) -> tuple[int, str]:
        """The exit code and what was printed, once no rank is left."""
        for _ in range(2000):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(0.02)
        else:
            pytest.fail("the launcher does not end")
        assert self.left() == []
        return os.waitstatus_to_exitcode(status), self.stderr.read_text()

    def close(self) -> None:
        """Whatever a test has found: neither launcher nor ranks are left."""
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.pid)
            for process in [launcher, *launcher.children()]:
                process.kill()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)

    def left(self) -> list[int]:
        pids = [int(file.read_text()) for file in self.folder.glob("pid-*")]
        return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


@pytest.fixture
def launched(tmp_path):
    """Starts a launcher in a mode of RANK, in tmp_path."""
    started: list[Launched] = []

    def start(mode: str) -> Launched:
        started.append(Launched(tmp_path, mode))
        return started[-1]

    yield start
    for each in started:
        each.close()


def test_an_error_of_all_ranks_is_printed_once_and_gives_its_code(launched, tmp_path):
    assert launched("agree").end() == (4, "error: the loss is nan\n")
    assert json.loads((tmp_path / "stdout").read_text())["error"]["what"] == "the loss is nan"


def test_an_error_of_one_rank_names_it_and_what_follows_from_it_is_left_out(launched, tmp_path):
    ranks = launched("differ")
    assert ranks.end() == (5, "error: rank 1: the disk is full\n")
    assert json.loads((tmp_path / "stdout").read_text())["error"]["what"] == "the disk is full"
    first, second = (json.loads((tmp_path / f"environment-{rank}").read_text()) for rank in (0, 1))
    assert [first["RANK"], second["RANK"], first["LOCAL_RANK"], second["LOCAL_RANK"]] == ["0", "1", "0", "1"]
    assert first["WORLD_SIZE"] == second["LOCAL_WORLD_SIZE"] == "2"
    assert first["MASTER_PORT"] == second["MASTER_PORT"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert first["OMP_NUM_THREADS"] == str(max(1, cores // 2))


def test_a_signal_reaches_each_rank_once_and_the_launcher_waits_for_them_to_save(launched, tmp_path):
    ranks = launched("saves")
    ranks.wait_for("ready")
    os.kill(ranks.pid, signal.SIGUSR2)
    time.sleep(0.3)
    os.kill(ranks.pid, signal.SIGTERM)  # as from a batch system that has waited
    assert ranks.end() == (75, "error: stopped; a checkpoint is saved\n")
    assert {(tmp_path / f"seen-{rank}").read_text() for rank in (0, 1)} == {"SIGUSR2"}


def test_a_signal_waits_for_ranks_that_cannot_answer_yet(launched):
    ranks = launched("starts")
    ranks.wait_for("pid")
    os.kill(ranks.pid, signal.SIGINT)
    assert ranks.end() == (75, "error: stopped\n")


def test_a_launcher_that_is_killed_takes_its_ranks_with_it(launched, tmp_path):
    ranks = launched("saves")
    ranks.wait_for("ready")
    os.kill(ranks.pid, signal.SIGKILL)
    os.waitpid(ranks.pid, 0)
    for _ in range(200):
        if not ranks.left():
            break
        time.sleep(0.05)
    assert ranks.left() == []
    assert (tmp_path / "seen-1").read_text().startswith("SIGTERM")  # one from each of the launcher's threads


def test_a_rank_that_is_killed_ends_one_that_waits_for_it(launched):
    code, stderr = launched("dies").end()
    assert code == 128 + signal.SIGKILL
    assert stderr.startswith("error: rank 1 was killed by SIGKILL; the other ranks were stopped\n")
    assert launch.GRACE_S + launch.TERMINATE_S < 20  # seconds, where it is not the fork of a test


def test_a_second_interrupt_ends_ranks_that_do_not_answer(launched):
    ranks = launched("hangs")
    ranks.wait_for("ready")
    os.kill(ranks.pid, signal.SIGINT)
    time.sleep(0.3)
    os.kill(ranks.pid, signal.SIGINT)
    assert ranks.end()[0] == 75


def test_how_many_ranks_are_started(monkeypatch):
    for name in ("LOCAL_RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    for kind in (None, torch.device("mps")):  # what is taken for no GPU
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available, kind=kind: kind)
        assert [ranks_to_start(None), ranks_to_start(3)] == [1, 3]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    assert [ranks_to_start(None), ranks_to_start(2)] == [4, 2]
    with pytest.raises(UsageError, match="there are 4 GPUs for 5 ranks"):
        ranks_to_start(5)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(UsageError, match="none knows its rank"):
        ranks_to_start(None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert [ranks_to_start(None), ranks_to_start(2)] == [1, 1]
    with pytest.raises(UsageError, match="one of 2 ranks that another program has started"):
        ranks_to_start(4)


@pytest.mark.parametrize("engine", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_an_engine_of_accelerates_own_is_refused_in_words(engine, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(UsageError, match="accelerate is configured to use"):
        make_accelerator()
