"""A training ends with its report, and is kept where none can be written."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import dude_here
from quickstart_config import quickstart_config
from training import train_here

import dude_cli.report
from dude_cli.config import load_config
from dude_cli.training import result
from dude_cli.training.resume import is_finished_run
from dude_cli.training.run import Run


def test_a_training_ends_with_a_report_and_loses_nothing_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = quickstart_config(tmp_path, max_steps="2"), tmp_path / "run"

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("no font was found")

    with monkeypatch.context() as patched:
        patched.setattr(dude_cli.report, "write_report", fails)
        done = dude_here("train", config)
    assert done.returncode == 0, done.stderr
    assert "no report was written: RuntimeError: no font was found" in done.stderr
    assert (run / "adapter" / "adapter_config.json").is_file()
    assert not (run / "report.html").exists()

    done = dude_here("train", config, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert f"report: {run / 'report.html'}" in done.stdout
    assert "How far the layers moved" in (run / "report.html").read_text()


@pytest.mark.parametrize("name", ["_memory", "_layers"])
def test_a_run_is_finished_when_all_that_is_written_at_its_end_is_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quickstart_config(tmp_path, max_steps="1", rows="4")

    def killed(run: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(result, name, killed)
        with pytest.raises(KeyboardInterrupt):
            train_here(config)
    assert not is_finished_run(load_config(config))
