"""Which rows a run was trained on is known afterwards, so that an evaluation can tell those that it has seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from command import dude_here
from quickstart_config import quickstart_config
from training import StopAfter, init_here, train_here

from dude_cli import quickstart
from dude_cli.errors import StoppedError
from dude_cli.training.trained_rows import TRAINED_ROWS_FILE, trained_rows


def rows(first: int, last: int) -> str:
    return f'data.train=[{{path: "embedded:quickstart", split: "train[{first}:{last}]"}}]'


def write_rows(path: Path, first: int, last: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in quickstart.rows("train")[first:last]))
    return path


def known(folder: Path) -> set[int]:
    found = trained_rows(folder)
    assert found is not None
    return set(found.tolist())


def test_they_are_those_of_the_data_however_they_are_packed(tmp_path: Path) -> None:
    config = quickstart_config(tmp_path, rows="8", max_steps="1")
    data = init_here(config, "data.packing=true", "data.max_length=300").data.train
    assert len(data) < 8
    assert known(tmp_path / "run") == set(data.row_hashes().tolist())
    assert len(known(tmp_path / "run")) == 8


def test_what_was_prepared_and_not_trained_on_is_not_among_them(tmp_path: Path) -> None:
    config = quickstart_config(tmp_path, max_steps="1")
    init_here(config, rows(0, 8))
    before = known(tmp_path / "run")
    train_here(config, rows(8, 16))
    assert not before & known(tmp_path / "run")


def test_those_before_a_change_and_of_an_earlier_run_are_among_them(tmp_path: Path) -> None:
    config = quickstart_config(tmp_path, max_steps="3", extra="  save_steps: 1")
    with pytest.raises(StoppedError):
        train_here(config, rows(0, 8), stop=StopAfter(2))
    first = known(tmp_path / "run")
    train_here(config, rows(8, 16), allow_changes=True)
    both = known(tmp_path / "run")
    assert first < both
    assert len(both) == 16
    third = [f"output_dir={tmp_path / 'third'}", f"adapter={{init_from: {tmp_path / 'run'}}}", rows(16, 20)]
    train_here(config, *third)
    assert both < known(tmp_path / "third")
    assert len(known(tmp_path / "third")) == 20


def test_those_of_the_run_are_among_them_where_one_of_its_checkpoints_is_continued_from(tmp_path: Path) -> None:
    extra = "  eval_steps: 1\n  save_steps: 1\n  early_stopping_patience: 3"
    train_here(quickstart_config(tmp_path, max_steps="1", extra=extra), rows(0, 8))
    checkpoint = tmp_path / "run/checkpoints/step-000001"
    for name in ("", "adapter", "best"):
        config = quickstart_config(tmp_path / f"next{name}", rows="8", max_steps="1")
        init_here(config, f"adapter={{init_from: {checkpoint / name}}}", rows(8, 12))
        assert known(tmp_path / "run") < known(tmp_path / f"next{name}" / "run")


def test_preparing_a_begun_run_forgets_none(tmp_path: Path) -> None:
    config = quickstart_config(tmp_path, max_steps="3", extra="  save_steps: 1")
    with pytest.raises(StoppedError):
        train_here(config, rows(0, 8), stop=StopAfter(1))
    with pytest.raises(StoppedError):
        train_here(config, rows(8, 16), stop=StopAfter(2), allow_changes=True)
    both = known(tmp_path / "run")
    done = dude_here("init", config, rows(8, 16))
    assert done.returncode == 0, done.stderr
    assert known(tmp_path / "run") == both
    done = dude_here("train", config, rows(16, 20), "--overwrite")
    assert done.returncode == 0, done.stderr
    assert not both & known(tmp_path / "run")


def test_an_evaluation_tells_rows_that_were_trained_on(tmp_path: Path) -> None:
    train_here(quickstart_config(tmp_path, rows="8", max_steps="1"))
    mixed, new = write_rows(tmp_path / "mixed.jsonl", 5, 12), write_rows(tmp_path / "new.jsonl", 8, 12)
    done = dude_here("eval", tmp_path / "run", "--rows", mixed, "--rows", new, "--quiet")
    assert done.returncode == 0, done.stderr
    assert "warning: mixed.jsonl: 3 of 7 rows are among those that it was trained on" in done.stderr
    assert "new.jsonl" not in done.stderr


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"not an array"])
def test_a_damaged_list_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    assert trained_rows(tmp_path) is None
    (tmp_path / TRAINED_ROWS_FILE).write_bytes(content)
    assert trained_rows(tmp_path) is None
    np.save(tmp_path / TRAINED_ROWS_FILE, np.zeros(3))
    assert trained_rows(tmp_path) is None


def test_rows_to_be_scored_that_are_not_there_are_told_before_the_training(tmp_path: Path) -> None:
    config = quickstart_config(tmp_path, rows="8", max_steps="1")
    for name, said in (("gone.jsonl", "no such data file"), ("other.jsonl", "the rows of the training have")):
        (tmp_path / "other.jsonl").write_text('{"question": "a"}\n')
        done = dude_here("train", config, f"eval.tasks=[{{name: own, rows: [{{path: {tmp_path / name}}}]}}]")
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert not (tmp_path / "run" / "initial").exists()
