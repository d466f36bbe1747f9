from __future__ import annotations

import os

import pytest

from dude_cli.system import files


@pytest.fixture
def folder(tmp_path):
    with files.new_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("old")
    return tmp_path / "folder"


def test_an_interrupt_between_the_two_renames_leaves_the_old_folder(folder, monkeypatch):
    rename = os.rename

    def interrupted(source, target):
        if target == folder and source.name.endswith(".partial"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), files.new_folder(folder) as partial:
        (partial / "file").write_text("new")
    assert (folder / "file").read_text() == "old"
    assert os.listdir(folder.parent) == ["folder"]


def test_what_a_killed_process_left_aside_is_put_back_before_the_next_write(folder):
    os.rename(folder, folder.with_name(".folder.old"))
    with files.new_folder(folder):
        assert (folder / "file").read_text() == "old"
    assert os.listdir(folder.parent) == ["folder"]


def test_checking_a_folder_leaves_nothing_behind(tmp_path):
    files.check_writable(tmp_path / "a/b")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="file"):
        files.check_writable(tmp_path / "file/run")
    assert os.listdir(tmp_path) == ["file"]
