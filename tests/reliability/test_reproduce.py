"""`dude reproduce`, run: repeated, interrupted, killed, with runs that fail; in processes of their own."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import dude_here, environment

from dude_cli import report, shipped
from dude_cli import reproduce as reproduce_package
from dude_cli.commands import reproducing
from dude_cli.errors import DivergedError, NumberNotMetError, StoppedError, UsageError
from dude_cli.reproduce import Job, Plan, Slot, check_result, execute, load_recipe, make_plan, reproduce, slots
from dude_cli.reproduce.execute import Failures, run_jobs
from dude_cli.system.lock import LOCK_FILE, locked

RECIPE = """\
config: {config}
matrix:
  - {{method: {methods}, learning_rate: [1e-3, 3e-3]}}
selection: {{seed: 1}}
seeds: [1, 2]
threads: 1
evaluation: {{tasks: [{{name: quickstart_choices, num_fewshot: 0, limit: 8}}], batch_size: 8}}
numbers:
  - {{name: loss, of: {{method: dude}}, metric: eval_loss, unit: nats, value: {value}, tolerance: 100.0, source: ours,
     required: {required}}}
  - {{name: choices, of: {{method: dude}}, task: quickstart_choices, metric: "acc,none", value: 50, tolerance: 50,
     source: ours}}
budget: {{device: CPU, tflops: 0.03, tokens_per_row: 60, models: [{{name: "embedded:quickstart", parameters: 8e5}}]}}
"""
CONFIG = """\
model: {name_or_path: "embedded:quickstart", dtype: float32}
adapter: {rank: 4}
data:
  train: [{path: "embedded:quickstart", split: "train[:64]"}]
  validation: [{path: "embedded:quickstart", split: "dev[:16]"}]
  max_length: 96
train: {max_steps: 4, global_batch_size: 4, per_device_batch_size: 4, gradient_checkpointing: false, save_steps: 2}
"""


def recipe_file(folder: Path, *, methods: str = "[dude]", value: float = 1.0, required: str = "true") -> Path:
    (folder / "base.yaml").write_text(CONFIG)
    path = folder / "mine.yaml"
    path.write_text(RECIPE.format(config="base.yaml", methods=methods, value=value, required=required))
    return path


def plan_of(folder: Path) -> Plan:
    recipe, file = load_recipe(recipe_file(folder, methods="[lora, dude]"))
    return make_plan(recipe, file, folder / "out")


def jobs_of(plan: Plan) -> list[Job]:
    return [
        Job(run, plan.folder / "configs" / f"{run.name}.yaml") for setting in plan.settings for run in setting.search
    ]


# What runs do here in place of a training: a module's functions, because they are called in another process.


def write_finished(job: Job) -> None:
    (job.run.folder / "adapter").mkdir(parents=True)
    (job.run.folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"sha256": "", "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "pid": os.getpid()})
    )


def fail_some(job: Job) -> None:
    (job.run.folder).mkdir(parents=True, exist_ok=True)
    with (job.run.folder / "tries").open("a") as tries:
        tries.write("x")
    if job.run.name == "lora-r4-lr0.001-seed1":
        raise UsageError("no such data", where="here")
    if job.run.name == "lora-r4-lr0.003-seed1":
        raise DivergedError("step 3 has loss nan")
    if job.run.name == "dude-r4-lr0.001-seed1":
        os.kill(os.getpid(), signal.SIGKILL)
    write_finished(job)


def stop(job: Job) -> None:
    raise StoppedError("stopped by SIGTERM after step 3")


def test_a_failed_run_is_reported_and_the_rest_go_on(tmp_path: Path) -> None:
    jobs, failures, said = jobs_of(plan_of(tmp_path)), Failures(), list[str]()
    run_jobs(jobs, [Slot()], fail_some, failures, said.append)
    assert failures.diverged == {"lora-r4-lr0.003-seed1"}
    assert set(failures.messages) == {"lora-r4-lr0.001-seed1", "dude-r4-lr0.001-seed1"}
    assert failures.messages["lora-r4-lr0.001-seed1"] == "no such data"
    assert "killed" in failures.messages["dude-r4-lr0.001-seed1"]
    assert [job.run.is_finished for job in jobs] == [False, False, False, True]
    assert any("no such data" in line and str(jobs[0].log) in line for line in said)
    assert "where: here" in jobs[0].log.read_text()

    # Again: what failed is tried again, what diverged would diverge again, and what is finished stays.
    again = Failures()
    run_jobs(jobs, [Slot()], fail_some, again, said.append)
    assert again.diverged == failures.diverged
    assert [(job.run.folder / "tries").read_text() for job in jobs] == ["xx", "x", "xx", "x"]


def diverge(job: Job) -> None:
    raise DivergedError("step 3 has loss nan")


def plan_without_numbers(folder: Path, rates: str) -> Plan:
    text = recipe_file(folder).read_text().replace("[1e-3, 3e-3]", rates)
    (folder / "mine.yaml").write_text(text.partition("numbers:")[0] + text[text.index("budget:") :])
    recipe, file = load_recipe(folder / "mine.yaml")
    return make_plan(recipe, file, folder / "out")


def test_a_run_that_diverges_outside_of_the_search_is_a_failure_each_time(tmp_path: Path) -> None:
    plan = plan_without_numbers(tmp_path, "[1e-3]")
    for _ in range(2):
        result = reproduce(plan, [Slot()], diverge)
        failed = (tmp_path / "out" / "report.md").read_text().partition("## Failed runs")[2]
        for seed in (1, 2):
            assert f"- dude-r4-lr0.001-seed{seed}: diverged" in failed
        assert set(result.document()["failed"]) == {"dude-r4-lr0.001-seed1", "dude-r4-lr0.001-seed2"}
        with pytest.raises(NumberNotMetError, match=r"dude-r4-lr0\.001-seed1: failed, diverged"):
            check_result(result)


def test_a_search_that_diverges_at_each_rate_is_a_failure(tmp_path: Path) -> None:
    result = reproduce(plan_without_numbers(tmp_path, "[1e-3, 3e-3]"), [Slot()], diverge)
    assert set(result.document()["failed"]) == {"dude-r4"}
    with pytest.raises(NumberNotMetError, match="dude-r4: failed, diverged at each learning rate of its search"):
        check_result(result)


def test_each_run_is_in_a_process_of_its_own_one_on_each_gpu(tmp_path: Path) -> None:
    jobs = jobs_of(plan_of(tmp_path))
    run_jobs(jobs, [Slot(gpu="3"), Slot(gpu="5")], write_finished, Failures(), lambda text: None)
    found = [json.loads((job.run.folder / "adapter" / "adapter_config.json").read_text()) for job in jobs]
    assert {one["gpu"] for one in found} == {"3", "5"}
    assert len({one["pid"] for one in found}) == 4
    assert os.getpid() not in {one["pid"] for one in found}


def test_a_run_that_is_stopped_stops_all(tmp_path: Path) -> None:
    with pytest.raises(StoppedError, match=r"lora-r4-lr0\.001-seed1 was stopped"):
        run_jobs(jobs_of(plan_of(tmp_path)), [Slot()], stop, Failures(), lambda text: None)


def test_a_run_that_another_process_works_on_is_waited_for(tmp_path: Path) -> None:
    job = jobs_of(plan_of(tmp_path))[0]
    job.run.folder.parent.mkdir()
    with (job.run.folder.parent / f".{job.run.folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arguments = ([job], [Slot()], write_finished, Failures(), lambda text: None)
        thread = threading.Thread(target=run_jobs, args=arguments)
        thread.start()
        deadline = time.monotonic() + 60
        while not job.log.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        assert not job.run.is_finished
    thread.join()
    assert job.run.is_finished


def test_a_file_system_without_locks_costs_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    job, done = jobs_of(plan_of(tmp_path))[0], []
    assert execute._outcome(job, Slot(), done.append) == (0, "")
    assert done == [job]
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("os.cpu_count", lambda: 6)
    assert slots(None, None) == [Slot()]
    assert slots(None, 2) == [Slot(threads=2)] * 3
    assert slots(2, 1) == [Slot(threads=1)] * 2
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    assert slots(None, 1) == [Slot(gpu="4"), Slot(gpu="GPU-abc")]
    assert slots(1, None) == [Slot(gpu="4")]
    with pytest.raises(UsageError, match="as many GPUs"):
        slots(3, None)


def test_ctrl_c_while_the_server_of_the_runs_starts_is_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dude_cli",
        "reproduce",
        str(recipe_file(tmp_path)),
        "--output",
        str(tmp_path / "o"),
    ]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if line.startswith("[1/2]"))
    time.sleep(1)  # it imports torch and more for seconds
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, line + said
    assert "Traceback" not in said
    assert "the same command continues" in said


def test_a_second_command_in_a_recipes_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first look at the runs to the page of all of them, the first one has the folder for itself."""
    recipe, out, codes = recipe_file(tmp_path), tmp_path / "out", list[int]()
    other = tmp_path / "other.yaml"
    other.write_text(recipe.read_text() + "set: [train.max_steps=30]\n")
    told: list[str] = []

    def with_second(function: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            with monkeypatch.context() as undone:
                undone.setattr(reproduce_package, "check_runs", lambda plan: 1 / 0)  # what it does after the lock
                done = dude_here("reproduce", other, "--output", out)
            codes.append(done.returncode)
            told.append(done.stderr)
            return function(*args, **kwargs)

        return both

    monkeypatch.setattr(reproducing, "reproduce_run", write_finished)
    for module, name in ((reproduce_package, "check_runs"), (report, "write_report_if_possible")):
        monkeypatch.setattr(module, name, with_second(getattr(module, name)))
    assert dude_here("reproduce", recipe, "--output", out).returncode == 6  # these runs have no scores
    assert codes == [2, 2]
    assert all(f"another dude command works in {out}: process {os.getpid()} on" in text for text in told)
    assert all("or choose another folder with --output" in text for text in told)
    assert not list(out.glob(".*"))


def test_a_plan_is_shown_while_its_runs_are_made(tmp_path: Path) -> None:
    with locked(tmp_path / "out" / LOCK_FILE, print):
        done = dude_here("reproduce", recipe_file(tmp_path), "--output", tmp_path / "out", "--plan")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()


def tables(folder: Path) -> tuple[str, str]:
    return (folder / "report.md").read_text(), (folder / "report.json").read_text()


def test_killed_halfway_and_started_again_it_gives_the_table_of_an_undisturbed_one(tmp_path: Path) -> None:
    recipe = recipe_file(tmp_path)
    undisturbed = dude_here("reproduce", recipe, "--output", tmp_path / "whole", "--jobs", 1)
    assert undisturbed.returncode == 0, undisturbed.stderr

    command = [sys.executable, "-m", "dude_cli", "reproduce", str(recipe), "--output", str(tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    second = tmp_path / "killed" / "dude-r4-lr0.003-seed1"
    while not second.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert second.exists()

    again = dude_here("reproduce", recipe, "--output", tmp_path / "killed", "--jobs", 1)
    assert again.returncode == 0, again.stderr
    assert tables(tmp_path / "killed") == tables(tmp_path / "whole")
    document = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert [number["verdict"] for number in document["numbers"]] == ["reproduced", "reproduced"]
    assert all(number["measured"]["n"] == 2 for number in document["numbers"])
    assert all(run in (tmp_path / "killed" / "runs.html").read_text() for run in ("lr0.001-seed1", "lr0.003-seed1"))

    # A wrong reference number: nothing is run again, the exit is 6, and the row is named.
    wrong = recipe_file(tmp_path, value=500.0)
    refused = dude_here("reproduce", wrong, "--output", tmp_path / "killed", "--json")
    assert refused.returncode == 6
    assert "loss: differs by -49" in refused.stderr
    assert "choices" not in refused.stderr.partition("error:")[2]
    assert "[1/" not in refused.stderr
    assert [number["verdict"] for number in json.loads(refused.stdout)["numbers"]] == ["differs", "reproduced"]
    # One that is not required is only reported.
    wrong = recipe_file(tmp_path, value=500.0, required="false")
    reported = dude_here("reproduce", wrong, "--output", tmp_path / "killed", "--json")
    assert reported.returncode == 0, reported.stderr
    assert [number["verdict"] for number in json.loads(reported.stdout)["numbers"]] == ["differs", "reproduced"]
    # Of a recipe with other settings these runs are none: it is refused, and nothing of them is touched.
    edited = recipe_file(tmp_path)
    edited.write_text(edited.read_text() + "set: [train.max_steps=30]\n")
    before = tables(tmp_path / "killed")
    for plan in ([], ["--plan"]):
        refused = dude_here("reproduce", edited, "--output", tmp_path / "killed", *plan)
        assert refused.returncode == 2
        assert "dude-r4-lr0.001-seed1: train.max_steps" in refused.stderr
        assert "--output" in refused.stderr
    assert tables(tmp_path / "killed") == before


SHIPPED = [name for name, _ in shipped.list_shipped() if name.startswith("recipes/")]


@pytest.mark.parametrize("recipe", SHIPPED)
def test_a_shipped_recipe_runs_small_and_offline_to_its_report(recipe: str, tmp_path: Path) -> None:
    name = Path(recipe).stem
    done = dude_here("reproduce", recipe, "--smoke", "--output", tmp_path / name, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / f"{name}-smoke" / "report.json").read_text())
    assert {number["verdict"] for number in document["numbers"]} <= {"smoke"}
    assert not document["failed"]
    assert all(setting["learning_rate"] for setting in document["settings"])
    assert all(number["measured"]["n"] == 1 for number in document["numbers"])
