"""Rows are encoded once: what is found again, what makes it another entry, and what may go wrong with the files."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dude_cli.config import DataConfig, DataSource, RowForm
from dude_cli.data import PreparedData, prepare_data, token_cache
from dude_cli.data.encode import Encoded, TextEncoder
from dude_cli.data.row_encoder import Part
from dude_cli.data.table import TokenTable
from dude_cli.data.token_cache import encoded_once, token_key
from dude_cli.errors import DataError
from dude_cli.system.cache_dir import cache_dir, prune
from dude_cli.system.runtime import local_main_first

CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
ROWS = [{"prompt": f"How many is {i}?", "completion": f" {i} apples"} for i in range(20)]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DUDE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache/tokens"


@pytest.fixture
def prepare(tmp_path, bos_tokenizer):
    """Prepare rows, and say how many of them went to the tokenizer."""

    def run(
        rows: list[dict], said: list[str] | None = None, seed: int = 0, **fields: object
    ) -> tuple[PreparedData, int]:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(train=[DataSource(path=str(path))], **fields)
        with pytest.MonkeyPatch.context() as patch:
            encoded = []
            original = TextEncoder.encode_pairs
            patch.setattr(
                TextEncoder, "encode_pairs", lambda *args, **kw: encoded.extend(args[1]) or original(*args, **kw)
            )
            prepared = prepare_data(config, bos_tokenizer, seed, [].append if said is None else said.append)
        return prepared, len(encoded)

    return run


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_the_next_run_finds_the_rows_whatever_it_is_called_and_however_it_takes_them(prepare, folder):
    rows = [*ROWS, {"prompt": "x" * 400, "completion": " y"}, {"prompt": "y", "completion": " x" * 400}]
    first, count = prepare(rows, max_length=40)
    said: list[str] = []
    again, none = prepare(rows, said, max_length=40)
    assert (count, none) == (22, 0)
    assert said[0] == f"these rows were encoded before: {files(folder)[0]}"
    assert again.fingerprint == first.fingerprint
    assert again.train_report == first.train_report
    assert list(again.train) == list(first.train)
    for fields in ({"packing": True}, {"validation": 0.2}, {"shuffle": False}, {"validation": 0.2, "seed": 1}):
        kept, none = prepare(rows, max_length=40, **fields)
        assert none == 0
        for file in files(folder):
            file.unlink()
        new, count = prepare(rows, max_length=40, **fields)
        assert count == 22
        assert (kept.fingerprint, kept.train_report) == (new.fingerprint, new.train_report)
        assert kept.validation_report == new.validation_report


KEYS = {
    "a text": lambda given: given | {"inputs": [("a", "b"), ("c", "e")]},
    "the border in a row": lambda given: given | {"inputs": [("ab", ""), ("c", "d")]},
    "the border between rows": lambda given: given | {"inputs": [("a", "bc"), ("", "d")]},
    "a row more": lambda given: given | {"inputs": [("a", "b"), ("c", "d"), ("", "")]},
    "the order": lambda given: given | {"inputs": [("c", "d"), ("a", "b")]},
    "max_length": lambda given: given | {"max_length": 13},
    "train_on_inputs": lambda given: given | {"train_on_inputs": True},
    "the format": lambda given: given | {"format": "chat"},
    "a special token": lambda given: given | {"special": {"eos_token": "<|im_end|>", "bos_token": "<s>"}},
    "what the tokenizer adds": lambda given: given | {"template": None},
    "a new token": lambda given: given | {"added": ["cat"]},
    "special tokens split": lambda given: given | {"split": True},
}


def key_of(make_tokenizer, change=lambda given: given, chat_template=CHAT) -> str | None:
    special = {"eos_token": "</s>", "bos_token": "<s>"}
    given = change({"inputs": [("a", "b"), ("c", "d")], "template": "<s> $A", "special": special, "max_length": 12})
    tokenizer = make_tokenizer(given["template"], **given["special"])
    tokenizer.chat_template = chat_template
    tokenizer.add_tokens(given.get("added", []))
    tokenizer.split_special_tokens = given.get("split", False)
    fields = {name: given[name] for name in ("max_length", "train_on_inputs", "format") if name in given}
    config = DataConfig(train=[DataSource(path="x")], **fields)
    return token_key(tokenizer, given["inputs"], config, chat_template if config.format == "chat" else None)


@pytest.mark.parametrize("what", KEYS)
def test_another_key_for_whatever_changes_the_result(what, make_tokenizer):
    assert key_of(make_tokenizer, KEYS[what]) != key_of(make_tokenizer)
    assert key_of(make_tokenizer) == key_of(make_tokenizer)


def test_the_key_says_what_kind_the_rows_are(make_tokenizer):
    """The same pairs are cut as answers, and split as texts."""
    keys = set()
    for form in ("prompt_completion", "text", "chat"):
        part = Part(RowForm(form, None, None), [("", "a")], ["row 1"])
        keys.add(key_of(make_tokenizer, lambda given, part=part: given | {"inputs": part.key()}))
    assert len(keys) == 3


def test_the_key_of_a_conversation_has_the_template_and_the_date_that_it_tells(make_tokenizer, monkeypatch):
    """The date is in the template's text, unless the template asks for it in another way than can be known."""
    dated = CHAT + "{{ strftime_now(messages[0].content) }}"
    keys = [key_of(make_tokenizer, KEYS["the format"], template) for template in (CHAT, CHAT + " ", dated)]
    monkeypatch.setattr(token_cache, "date", type("date", (), {"today": staticmethod(lambda: "tomorrow")}))
    assert key_of(make_tokenizer, KEYS["the format"], dated) not in keys
    assert key_of(make_tokenizer, KEYS["the format"], CHAT) == keys[0]
    assert len(set(keys)) == 3
    assert key_of(make_tokenizer, chat_template=dated) == key_of(make_tokenizer)  # no chat, no template


def test_the_key_has_the_code_and_the_versions(make_tokenizer, monkeypatch):
    before = key_of(make_tokenizer)
    for name, changed in (("read_bytes", lambda path: b""), ("version", lambda name: "0")):
        token_cache._code.cache_clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Path if name == "read_bytes" else token_cache, name, changed)
            assert key_of(make_tokenizer) != before
        token_cache._code.cache_clear()
    assert key_of(make_tokenizer) == before


def test_a_tokenizer_with_code_of_its_own_is_not_trusted(make_tokenizer, bos_tokenizer, folder):
    kind = type("Own", (type(bos_tokenizer),), {"__module__": "transformers_modules.own"})
    tokenizer = make_tokenizer("<s> $A", eos_token="</s>")
    tokenizer.__class__ = kind
    config = DataConfig(train=[DataSource(path="x")])
    assert token_key(tokenizer, [("a", "b")], config, None) is None
    table = TokenTable.of([Encoded([1, 2], [True, True], 0, 1)], 5)
    assert encoded_once(None, lambda: table, print) is table
    assert not folder.exists()


encoded_rows = st.builds(
    lambda row: Encoded([t for t, _ in row], [on for _, on in row], 0, 0),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.booleans()), max_size=6),
)


@given(rows=st.lists(encoded_rows, max_size=6), max_length=st.integers(1, 6))
def test_what_is_read_is_what_was_written(rows, max_length):
    path = cache_dir("tokens") / "a.safetensors"
    table = TokenTable.of(rows, max_length)
    token_cache._write(table, path)
    back = token_cache._mapped(path)
    for name, array in table.arrays().items():
        found = back.arrays()[name]
        assert found.dtype == array.dtype
        assert np.array_equal(found, array)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no file of ours", "a list", "another dtype"])
def test_a_damaged_file_is_encoded_anew_with_a_line_and_put_right(damage, prepare, folder):
    first, _ = prepare(ROWS)
    (file,) = files(folder)
    whole = file.read_bytes()
    file.write_bytes(
        {
            "flip": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
            "cut": whole[:-7],
            "empty": b"",
            "no file of ours": b"not a safetensors file",
            "a list": (2).to_bytes(8, "little") + b"[]",
            "another dtype": whole.replace(b'"I32"', b'"I64"'),
        }[damage]
    )
    said: list[str] = []
    again, count = prepare(ROWS, said)
    assert count == len(ROWS)
    assert again.fingerprint == first.fingerprint
    assert len(said) == 1
    assert said[0].startswith(f"rows are encoded anew: {file} cannot be used: ")
    assert file.read_bytes() == whole


@pytest.mark.parametrize("trouble", ["a file in the way", "a full disk", "no home"])
def test_a_cache_that_cannot_be_used_costs_a_line_and_nothing_else(trouble, prepare, folder, monkeypatch):
    if trouble == "a file in the way":
        folder.parent.write_text("")
    elif trouble == "a full disk":
        folder.mkdir(parents=True)

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
    else:
        monkeypatch.delenv("DUDE_CACHE_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    said: list[str] = []
    prepared, count = prepare(ROWS, said)
    assert count == prepared.train_report.rows == len(ROWS)
    assert len(said) == 1
    assert said[0].startswith("encoded rows are not kept: ")
    assert trouble != "a full disk" or not files(folder)  # nothing half-written stays


def test_the_least_recently_used_files_go_when_there_are_too_many(folder, monkeypatch):
    table = TokenTable.of([Encoded([1] * 1000, [True] * 1000, 0, 1)], 1000)
    for number, name in enumerate("abc"):
        encoded_once(name, lambda: table, print)
        os.utime(folder / f"{name}.safetensors", (number, number))
    size = files(folder)[0].stat().st_size
    monkeypatch.setattr(token_cache, "prune", partial(prune, limit_bytes=3 * size))
    encoded_once("a", pytest.fail, print)
    encoded_once("d", lambda: table, print)
    assert [file.stem for file in files(folder)] == ["a", "c", "d"]
    monkeypatch.setattr(token_cache, "prune", partial(prune, limit_bytes=size // 2))
    encoded_once("e", lambda: table, print)
    assert [file.stem for file in files(folder)] == ["e"]


def test_several_at_once_all_have_the_rows_and_leave_one_file(folder):
    rows = [Encoded([row, 2, 3], [True] * 3, 0, 1) for row in range(500)]
    said: list[str] = []
    with ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(lambda _: encoded_once("a", lambda: TokenTable.of(rows, 3), said.append), range(40)))
    assert len({table.sha256() for table in tables}) == 1
    assert [file.name for file in files(folder)] == ["a.safetensors"]
    assert all(line.startswith("these rows were encoded before") for line in said)


@pytest.mark.parametrize("fails", [False, True])
def test_of_several_ranks_one_encodes_and_none_waits_for_one_that_failed(fails):
    meeting = Barrier(3)

    def rank(number: int) -> int:
        accelerator = SimpleNamespace(is_local_main_process=number == 1, wait_for_everyone=lambda: meeting.wait(30))
        encoded = []

        def encode() -> TokenTable:
            encoded.append(number)
            if fails:
                raise DataError("a row is wrong")
            return TokenTable.of([Encoded([1, 2], [True, True], 0, 1)], 5)

        with suppress(DataError), local_main_first(accelerator):
            encoded_once("a", encode, lambda line: None)
        return len(encoded)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(rank, range(3))) == ([1, 1, 1] if fails else [0, 1, 0])


def test_where_it_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setenv("DUDE_CACHE_DIR", "~/d")
    assert cache_dir("tokens") == Path("/h/d/tokens")
    monkeypatch.setenv("DUDE_CACHE_DIR", "")
    assert cache_dir("tokens") == Path("/x/dude/tokens")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir("tokens") == Path("/h/.cache/dude/tokens")
