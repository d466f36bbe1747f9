"""Two commands in one run folder would mix what they write: the second one is refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import dude_here
from quickstart_config import quickstart_config

from dude_cli.system.lock import LOCK_FILE, locked
from dude_cli.training import prepare, result

COMMANDS = [("init",), ("train",), ("train", "--overwrite")]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_folder_in_use_is_refused_before_anything_in_it_changes(command: tuple[str, ...], tmp_path: Path) -> None:
    config = quickstart_config(tmp_path)
    # As the first one leaves it for a moment, while a new adapter takes the place of an old one.
    (tmp_path / "run/.adapter.old").mkdir(parents=True)
    (tmp_path / "run/.adapter.old/file").write_text("x")
    with locked(tmp_path / "run" / LOCK_FILE, print):
        before = contents(tmp_path)
        done = dude_here(*command, config)
        assert done.returncode == 2, done.stderr
        assert f"another dude command works in {tmp_path / 'run'}: process {os.getpid()} on" in done.stderr
        assert "wait until it has ended" in done.stderr
        assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["init", "train"])
def test_a_command_has_its_folder_for_itself_to_its_end(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = quickstart_config(tmp_path, max_steps="1", rows="4")
    codes: list[int] = []

    def with_second(function: Callable[..., Any]) -> Callable[..., Any]:
        def both(*args: Any, **kwargs: Any) -> Any:
            with monkeypatch.context() as undone:
                undone.setattr(prepare, "check_writable", lambda folder: 1 / 0)  # what it does after the lock
                codes.append(dude_here("train", "--overwrite", config).returncode)
            return function(*args, **kwargs)

        return both

    # Of `init` the first and the last thing, of `train` the last one too: the card of the adapter that it keeps.
    for module, name in ((prepare, "prepare_data"), (prepare, "layer_reports"), (result, "model_card")):
        monkeypatch.setattr(module, name, with_second(getattr(module, name)))
    done = dude_here(command, config)
    assert done.returncode == 0, done.stderr
    assert codes == [2] * (2 if command == "init" else 3)
    assert not (tmp_path / "run" / LOCK_FILE).exists()
