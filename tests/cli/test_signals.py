"""Ctrl-C and SIGTERM: one line and exit code 75, whatever they interrupt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import environment

ROOT = Path(__file__).parents[2]

SIGNALLED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.{signal})
sys.meta_path.insert(0, Finder())
sys.argv = {argv!r}
from dude_cli.__main__ import main
main()
"""


def signalled(argv: list[str], module: str, name: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command that gets the signal when it comes to import `module`."""
    code = SIGNALLED.format(module=module, signal=name, argv=["dude", *argv])
    env = environment(PYTHONPATH=str(ROOT))
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize(
    ("argv", "module", "said"),
    [
        (["ls"], "typer", "error: stopped\n"),
        (["ls"], "dude_cli.shipped", "error: stopped\n"),
        (["init", "c.yaml"], "yaml", "error: stopped; the same command starts again\n"),
        (["train", "c.yaml"], "yaml", "error: stopped; what was not saved is lost, and the same command starts or"),
        (["generate", "--prompt", "x"], "dude_cli.generation.generate", "error: stopped\n"),
        (
            ["eval", "embedded:quickstart", "--task", "x"],
            "dude_cli.evaluation",
            "error: stopped; the scores written so",
        ),
    ],
)
def test_a_signal_ends_a_command_with_one_line(argv, module, said, name, tmp_path):
    done = signalled(argv, module, name, tmp_path)
    assert done.returncode == 75, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize("module", ["typer", "dude_cli.shipped"])
def test_a_signal_is_a_document_too(module, tmp_path):
    done = signalled(["ls", "--json"], module, "SIGINT", tmp_path)
    assert done.stderr == "error: stopped\n"
    assert json.loads(done.stdout) == {"error": {"what": "stopped", "where": None, "fix": None, "exit_code": 75}}


@pytest.mark.parametrize("delay_s", [0.1, 0.3, 1.0])
def test_a_signal_at_any_time_ends_it_the_same_way(delay_s, tmp_path):
    command = [sys.executable, "-m", "dude_cli", "eval", "embedded:quickstart", "--task", "quickstart_choices"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    wait_for_our_code(process.pid)
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 75, stderr
    assert "Traceback" not in stderr
    assert [line for line in stderr.splitlines() if "stopped" in line] == stderr.splitlines()[-1:]


def test_an_interruption_that_passes_through_exec_keeps_the_exit_code(tmp_path):
    """Python remembers a KeyboardInterrupt that left `exec`, and then `python -m` ends by SIGINT, handled or not."""
    (tmp_path / "program.py").write_text(
        "import os, signal, sys\nfrom dude_cli.commands import listing\nfrom dude_cli.__main__ import main\n"
        "listing.list_shipped = lambda output: exec('os.kill(os.getpid(), signal.SIGINT)')\n"
        "sys.argv = ['dude', 'ls']\nmain()\n"
    )
    env = environment(PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}")
    done = subprocess.run(
        [sys.executable, "-m", "program"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (75, "error: stopped\n")


def wait_for_our_code(pid: int) -> None:
    """Until the handlers are there: before that, Python itself answers."""
    caught = 1 << (signal.SIGUSR1 - 1)
    for _ in range(1000):
        status = Path(f"/proc/{pid}/status").read_text()
        if int(status.partition("SigCgt:")[2].split()[0], 16) & caught:
            return
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    pytest.fail("the handlers were never installed")


POOL = """
import multiprocessing, time
from dude_cli.system.runtime import stop_signals
from dude_cli.system.stopping import interrupting_signals

with {scope}():
    with multiprocessing.get_context("fork").Pool(4) as pool:  # leaving it ends its processes by SIGTERM
        print(sum(pool.map(abs, range(-100, 0))))
"""


@pytest.mark.parametrize("scope", ["interrupting_signals", "stop_signals"])
def test_a_librarys_own_processes_end_by_a_signal_without_a_word(scope, tmp_path):
    """lm-eval has them for bootstrapped errors, datasets to read rows: they are forked, and our handlers with them."""
    code, env = POOL.format(scope=scope), environment(PYTHONPATH=str(ROOT))
    for _ in range(5):
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "5050\n", "")
