"""What holds for every config text, not for chosen ones."""

from __future__ import annotations

import contextlib
import re
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dude_cli import shipped
from dude_cli.config import LEAST_ALPHA, MOST_ALPHA, Config
from dude_cli.config.hints import FOREIGN
from dude_cli.config.keys import key_paths
from dude_cli.config.read import dump_config, load_config
from dude_cli.errors import ConfigError

FAST = settings(max_examples=60, deadline=None)
FULL = {
    "model": {"name_or_path": "m"},
    "data": {
        "train": [{"path": "a"}],
        "validation": [{"path": "b"}],
        "prompt": "Q: {q}\n",
        "completion": "{a}",
    },
    "eval": {"tasks": [{"name": "own", "rows": [{"path": "c"}]}]},
    "output_dir": "runs/full",
}


@pytest.fixture(scope="module")
def file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "x.yaml"


def free_text() -> st.SearchStrategy[str]:
    tricky = [
        "1e-4",
        "no",
        "null",
        "~",
        "0o7",
        "0x1f",
        ".5",
        "1_0",
        "2024-01-01",
        "<<",
        "=",
        "- a",
        "a: b",
        " a ",
        "\u2028",
    ]
    return st.one_of(st.sampled_from(tricky), st.text(min_size=1, max_size=20))


def braces_doubled(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


@st.composite
def configs(draw: st.DrawFn) -> Config:
    maybe_text = st.none() | free_text()
    source = st.fixed_dictionaries({"path": free_text(), "name": maybe_text, "split": free_text()})
    number = st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False)
    rate = st.floats(min_value=0, exclude_min=True, max_value=1000)
    length = draw(st.sampled_from(["max_steps", "num_train_epochs"]))
    values: dict[str, Any] = {
        "model": {"name_or_path": draw(free_text()), "revision": draw(maybe_text)},
        "adapter": {
            "alpha": draw(st.none() | st.floats(LEAST_ALPHA, MOST_ALPHA)),
            "target_modules": draw(free_text() | st.lists(free_text(), min_size=1)),
            "rank": draw(st.integers(1, 2**70)),
        },
        "data": {
            "train": draw(st.lists(source, min_size=1, max_size=2)),
            "validation": draw(st.none() | st.floats(0.01, 0.99) | st.lists(source, min_size=1, max_size=2)),
            "completion": draw(st.none() | free_text().map(braces_doubled)),
            "packing": draw(st.booleans()),
        },
        "train": {"learning_rate": draw(rate), length: draw(st.integers(1, 99)), "adam_epsilon": draw(number)},
        "eval": {"tasks": [{"name": draw(free_text())}] if draw(st.booleans()) else []},
        "output_dir": draw(free_text()),
    }
    return Config.model_validate(values)


@FAST
@given(config=configs())
def test_a_dumped_config_reads_back_equal(file: Path, config: Config) -> None:
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


@st.composite
def typos(draw: st.DrawFn) -> tuple[tuple[str, ...], str]:
    """A key of the schema, and the same with one letter dropped, added, changed or swapped with the next."""
    path = draw(st.sampled_from(key_paths()))
    key = path[-1]
    at = draw(st.integers(0, len(key) - 1))
    letter = draw(st.sampled_from(string.ascii_lowercase + "_"))
    typo = draw(
        st.sampled_from(
            [
                key[:at] + key[at + 1 :],
                key[:at] + letter + key[at:],
                key[:at] + letter + key[at + 1 :],
                key[:at] + key[at + 1 : at + 2] + key[at] + key[at + 2 :],
            ]
        )
    )
    siblings = {other[-1] for other in key_paths() if other[:-1] == path[:-1]}
    return path, typo if typo and typo not in siblings and typo not in FOREIGN else key + "x"


@FAST
@given(typo=typos())
def test_any_one_letter_typo_of_any_key_is_caught_and_corrected(file: Path, typo: tuple[tuple[str, ...], str]) -> None:
    path, misspelt = typo
    text = dump_config(Config.model_validate(FULL))
    values = yaml.safe_load(text)
    if path == ("train", "max_steps"):
        values["train"].pop("num_train_epochs")
    section = values
    for key in path[:-1]:
        section = section[key]
        section = section[0] if isinstance(section, list) else section
    section[misspelt] = section.pop(path[-1])
    file.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    lines = [line for line in str(caught.value).splitlines() if f"unknown key `{misspelt}`" in line]
    assert len(lines) == 1
    assert re.match(r".*x\.yaml:\d+:\d+: unknown key", lines[0])
    suggested = re.findall(r"`([^`]+)`", lines[0].rpartition("did you mean")[2])
    assert path[-1] in suggested
    assert len(str(caught.value).splitlines()) == 1


TEXTS = [
    dump_config(Config.model_validate(FULL)),
    *[path.read_text(encoding="utf-8") for name, _ in shipped.list_shipped() if (path := shipped.find_shipped(name))],
]
SNIPPETS = [
    "!!python/name:os.system ", "&a ", "*a", "<<: ", "{", "}", "[", "]", "\t", ": ", "- ", "'", '"', "|", ">", "%", "@",
    "\x00", "\ufeff", "\x85", "---\n", "...\n", "? ", "# ", "\\", "\n", "\r", "1e999", ".nan", "null", "!!set",
    "~", ",",
    '"\\UFFFFFFFF"', '"\\ud800"', "9" * 5000, "!!float .", "%YAML 9" + "9" * 5000 + ".1\n", "%TAG ! x\n",
    "data: ", "train: ",
]  # fmt: skip


@st.composite
def mutated(draw: st.DrawFn) -> str:
    text = draw(st.sampled_from(TEXTS))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = draw(st.integers(start, min(len(text), start + 30)))
        inserted = draw(st.sampled_from(SNIPPETS) | st.text(max_size=5))
        text = text[:start] + inserted + text[stop:]
    return text


@FAST
@given(text=mutated())
def test_a_mutated_file_raises_nothing_but_a_config_error(file: Path, text: str) -> None:
    _load_or_explain(file, text.encode("utf-8"))


@FAST
@given(data=st.binary(max_size=200))
def test_any_bytes_raise_nothing_but_a_config_error(file: Path, data: bytes) -> None:
    _load_or_explain(file, data)


@FAST
@given(
    key=st.lists(st.sampled_from([*{path[-1] for path in key_paths()}, "0", "1", "7", "", "٣", "²"]), max_size=4),
    value=st.sampled_from(SNIPPETS) | st.text(max_size=10),
)
def test_any_override_raises_nothing_but_a_config_error(file: Path, key: list[str], value: str) -> None:
    _load_or_explain(file, TEXTS[0].encode(), f"{'.'.join(key)}={value}")


def _load_or_explain(file: Path, data: bytes, *overrides: str) -> None:
    file.write_bytes(data)
    with contextlib.suppress(ConfigError):
        load_config(file, overrides)
