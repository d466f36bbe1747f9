"""Python looks for garbage rarely while a command imports its work, and as usual once there is a model."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from dude_cli.config import ModelConfig
from dude_cli.model import load_model
from dude_cli.quickstart import NAME
from dude_cli.system.garbage import RARELY, collect_as_usual, collect_rarely

COMMAND = """
import gc, sys
from dude_cli.__main__ import main
sys.argv = ["dude", "--version"]
try:
    main()
except SystemExit:
    print(gc.get_threshold()[0])
"""


@pytest.fixture
def usual():
    before = gc.get_threshold()
    gc.set_threshold(700)
    gc.unfreeze()
    yield gc.get_threshold()
    gc.set_threshold(*before)
    gc.freeze()


def test_a_command_starts_with_few_looks_for_garbage():
    done = subprocess.run([sys.executable, "-c", COMMAND], capture_output=True, text=True, check=True)

    assert done.stdout.split()[-1] == str(RARELY)


def test_a_loaded_model_ends_that(usual):
    collect_rarely()
    assert gc.get_threshold()[0] == RARELY

    load_model(ModelConfig(name_or_path=NAME, dtype="float32"))

    assert gc.get_threshold() == usual
    assert gc.get_freeze_count() > 0


def test_where_nobody_asked_for_it_nothing_is_changed(usual):
    gc.set_threshold(123)

    collect_as_usual()

    assert gc.get_threshold()[0] == 123
    assert gc.get_freeze_count() == 0
