"""What the tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from dude_cli.system.garbage import RARELY

# Looking through what libraries and tests make was a fifth of the time of tests of commands.
gc.set_threshold(RARELY)

if not torch.cuda.is_available():
    # Read when Triton is imported, which transformers may do first.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish() -> None:
    """What is imported by now stays, and is not looked at again."""
    gc.freeze()


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real benchmark data and a small real model, from the environment."""
    folder = os.environ.get("DUDE_TEST_DATA")
    if not folder:
        pytest.skip("DUDE_TEST_DATA does not name a folder with gsm8k/, mmlu/ and models/stories260K/")
    if not Path(folder).is_dir():
        pytest.skip(f"DUDE_TEST_DATA names {folder}, which is no folder")
    return Path(folder).resolve()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of this session alone: the tests neither read nor fill the user's."""
    with mock.patch.dict(os.environ, {"DUDE_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}):
        yield
