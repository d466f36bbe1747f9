"""Starting anew deletes an earlier run only when the new one can start, and never what is no run."""

from __future__ import annotations

import json

import pytest
from command import dude_here
from quickstart_config import quickstart_config
from training import train_here

from dude_cli.commands import training
from dude_cli.config import TRACKERS, load_config
from dude_cli.console import Output
from dude_cli.errors import UsageError
from dude_cli.system import files
from dude_cli.training.run_dir import PREPARED, TRAINED, clear_run


def train(config, *overrides, overwrite=True):
    options = {"smoke": False, "overwrite": overwrite, "allow_changes": False, "num_processes": None}
    training.train(config, overrides, **options, output=Output(is_quiet=True))


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def finished(tmp_path):
    config = quickstart_config(tmp_path, max_steps="2", extra="  save_steps: 1")
    train_here(config)
    return config


@pytest.mark.parametrize("change", ["data.train=[{path: nowhere.jsonl}]", "adapter.rank=100000"])
def test_a_config_that_cannot_start_deletes_nothing(change, finished, tmp_path):
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError):
        train(finished, change)
    assert contents(tmp_path / "run") == before


def test_a_new_run_takes_the_place_of_the_old(finished, tmp_path, capsys):
    for name in ("eval", "best", "tensorboard"):
        (tmp_path / "run" / name).mkdir()
        (tmp_path / "run" / name / "of_the_old").write_text("x")
    train(finished, "adapter.rank=2", "train.save_steps=null")
    assert json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())["adapter"]["rank"] == 2
    folders = [path.name for path in (tmp_path / "run").iterdir() if path.is_dir()]
    assert sorted(folders) == ["adapter", "initial"]


def test_no_score_outlives_the_adapter_that_it_is_of(finished, tmp_path, monkeypatch):
    (tmp_path / "run/eval").mkdir()
    for name in ("eval/quickstart.json", "report.html", "report.md"):
        (tmp_path / "run" / name).write_text("x")
    delete = files.delete

    def looked_at(path):
        delete(path)
        if not (tmp_path / "run/adapter").exists():
            assert not [name for name in ("eval", "report.html", "report.md") if (tmp_path / "run" / name).exists()]

    monkeypatch.setattr(files, "delete", looked_at)
    clear_run(load_config(finished))
    assert not (tmp_path / "run/adapter").exists()


def test_all_that_a_run_leaves_is_known_and_what_it_began_with_stays(tmp_path):
    path = quickstart_config(tmp_path, max_steps="2", extra="  save_steps: 1\n  eval_steps: 1\n  keep: best")
    for command in (("train", path), ("eval", tmp_path / "run", "--task", "quickstart_choices", "--limit", "1")):
        done = dude_here(*command)
        assert done.returncode == 0, done.stderr
    left = {file.name for file in (tmp_path / "run").iterdir() if not file.name.startswith(".")}
    assert left == {*PREPARED, *TRAINED} - {*TRACKERS}
    clear_run(load_config(path))
    left = {file.name for file in (tmp_path / "run").iterdir() if not file.name.startswith(".")}
    assert left == {*PREPARED}


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_is_no_run_is_left_alone(overwrite, tmp_path):
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/adapter/precious").write_text("x")
    before = contents(tmp_path / "run")
    with pytest.raises(UsageError, match="not a run"):
        train(quickstart_config(tmp_path), overwrite=overwrite)
    assert contents(tmp_path / "run") == before
