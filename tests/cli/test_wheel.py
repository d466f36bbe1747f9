"""The installed wheel has everything that a checkout has."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command import environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


def test_dude_ls_runs_from_an_installed_wheel(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        "import sys; sys.argv = ['dude', 'ls']; from dude_cli import __main__ as cli; "
        f"assert cli.__file__.startswith({str(site)!r}), cli.__file__; cli.main()"
    )
    env = environment(PYTHONPATH=str(site))
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for file in (ROOT / "configs").glob("*.yaml"):
        assert f"configs/{file.name}" in done.stdout


def test_the_wheel_holds_the_embedded_model_its_tasks_and_the_type_marker(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "dude_cli/py.typed",
        "dude_cli/quickstart/model/config.json",
        "dude_cli/quickstart/model/model.safetensors",
        "dude_cli/quickstart/model/tokenizer.json",
        "dude_cli/configs/quickstart.yaml",
        "dude_cli/recipes/quickstart.yaml",
        "dude_cli/evaluation/protocols/pissa_gsm8k.yaml",
        "dude_cli/evaluation/protocols/_dora_commonsense",
    } <= names
    assert any(name.startswith("dude_cli/quickstart/tasks/") and name.endswith(".yaml") for name in names)
    assert not any(name.startswith(("tests/", "tools/")) for name in names)
