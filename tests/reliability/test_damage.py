"""Every file of a checkpoint, damaged in turn: it is noticed, set aside, and the run ends as the undisturbed one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from quickstart_config import quickstart_config
from training import train_here

from dude_cli.system import ranks
from dude_cli.training.checkpoint import Origin, checkpoints, is_valid, newest_checkpoint
from dude_cli.training.metrics import read_metrics
from dude_cli.training.resume import checkpoint_to_continue

EXTRA = "  save_steps: 2"
RESULT = "adapter/adapter.safetensors"
FILES = [
    "adapter/adapter.safetensors",
    "adapter/adapter_config.json",
    "adapter/tokenizer.json",
    "adapter/tokenizer_config.json",
    "manifest.json",
    "optimizer.safetensors",
    "state.json",
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train_here(quickstart_config(folder, max_steps="6", extra=EXTRA))
    return folder / "run"


@pytest.fixture
def unfinished(undisturbed, tmp_path):
    """A copy of the run as it was before its result was written, with its checkpoints of step 4 and 6."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    return quickstart_config(tmp_path, max_steps="6", extra=EXTRA)


def newest(tmp_path):
    return tmp_path / "run/checkpoints/step-000006"


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def replace_by_a_link(file):
    """What it leads to has the very bytes: a checkpoint is what is in its folder."""
    outside = next(parent for parent in file.parents if parent.name == "checkpoints") / "outside"
    shutil.move(file, outside)
    file.symlink_to(outside)


def losses(run_dir):
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("eval_loss")) for r in read_metrics(run_dir)]


def test_these_are_all_the_files(undisturbed):
    folder = undisturbed / "checkpoints/step-000006"
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert sorted(found) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip, truncate, lambda file: file.unlink(), replace_by_a_link])
def test_each_file_is_looked_at(name, damage, unfinished, tmp_path):
    folder, said = newest(tmp_path), []
    assert is_valid(folder)
    damage(folder / name)
    assert not is_valid(folder)
    assert newest_checkpoint(tmp_path / "run", said.append).name == "step-000004"
    assert "step-000006 is damaged" in said[0]
    assert folder.with_name("step-000006.broken").is_dir()


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_is_fallen_back_from_and_changes_nothing(name, unfinished, undisturbed, tmp_path):
    flip(newest(tmp_path) / name)
    train_here(unfinished)
    assert (newest(tmp_path).with_name("step-000006.broken") / name).is_file()
    assert (tmp_path / "run" / RESULT).read_bytes() == (undisturbed / RESULT).read_bytes()
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_a_run_without_a_whole_checkpoint_starts_again_at_step_0(unfinished, undisturbed, tmp_path):
    for folder in checkpoints(tmp_path / "run"):
        flip(folder / "state.json")
    said = []
    train_here(unfinished, say=said.append)
    assert any("starts again at step 0" in line for line in said)
    assert losses(tmp_path / "run") == losses(undisturbed)


def test_another_rank_takes_the_checkpoint_that_the_main_one_names(tmp_path, monkeypatch):
    """It does not look for itself: it might see what the main one is setting aside."""
    damaged = tmp_path / "checkpoints/step-000001"
    damaged.mkdir(parents=True)
    told = [None, "chosen"]  # that nothing failed, and which one
    monkeypatch.setattr(ranks, "gather_json", lambda _, own: [told.pop(0), own])
    second = SimpleNamespace(num_processes=2, process_index=1, is_main_process=False)
    found = checkpoint_to_continue(tmp_path, Origin(2, None, {}), second, pytest.fail, allow_changes=False)
    assert found == Path("chosen")
    assert damaged.is_dir()


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "adapter/../../outside"])
def test_a_manifest_that_names_a_file_elsewhere_is_not_followed(name, unfinished, tmp_path):
    (tmp_path / "run/checkpoints/outside").write_text("x")
    path = newest(tmp_path) / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: "0" * 64}))
    assert not is_valid(newest(tmp_path))


def test_a_file_more_and_a_manifest_deeper_down_are_noticed(unfinished, tmp_path):
    (newest(tmp_path) / "adapter/manifest.json").write_text("{}")
    assert not is_valid(newest(tmp_path))


def test_a_checkpoint_that_is_a_link_is_set_aside_and_what_it_leads_to_stays(unfinished, tmp_path):
    outside = tmp_path / "outside"
    shutil.move(newest(tmp_path), outside)
    newest(tmp_path).symlink_to(outside)
    train_here(unfinished, "train.save_total_limit=1")
    assert (outside / "manifest.json").is_file()
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000006"]
    assert not newest(tmp_path).is_symlink()


def test_the_newest_is_that_of_the_highest_step_also_above_a_million(tmp_path):
    for step in (999_999, 1_000_000, 5):
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
    assert [folder.name for folder in checkpoints(tmp_path)] == ["step-1000000", "step-999999", "step-000005"]
