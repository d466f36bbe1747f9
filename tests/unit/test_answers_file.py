"""The file of answers: nothing is lost, and nothing of anybody else's is touched."""

from __future__ import annotations

import json
from contextlib import suppress

import pytest

from dude_cli.errors import UsageError
from dude_cli.generation.answers_file import answers_file

SETTINGS = {"adapter": "abc", "sampling": {"seed": 0}}


def record(row: int) -> dict[str, object]:
    return {"row": row, "completion": f" naïve 😀\u2028\n{row}"}


def written(path, *batches, settings=SETTINGS, stop=False):
    """Answer as a command does; with `stop` it is interrupted before the end. Returns the rows that were there."""
    with suppress(KeyboardInterrupt), answers_file(path, print) as answers:
        before = sorted(answers.answers)
        answers.begin(settings)
        for batch in batches:
            answers.add([record(row) for row in batch])
        if stop:
            raise KeyboardInterrupt
        answers.finish()
    return before


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_the_answers_are_in_the_rows_order_and_nothing_else_is_left(tmp_path):
    path = tmp_path / "new/answers.jsonl"
    assert written(path, [3, 1], [2]) == []
    assert lines(path) == [record(1), record(2), record(3)]
    assert list(path.parent.iterdir()) == [path]


def test_what_was_answered_is_kept_and_gone_on_with(tmp_path):
    path, whole = tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    written(path, [3, 1], stop=True)
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl.partial"]
    assert lines(tmp_path / "answers.jsonl.partial")[1:] == [record(3), record(1)]
    assert written(path, [4], stop=True) == [1, 3]
    assert written(path, [2]) == [1, 3, 4]
    written(whole, [4, 3], [2, 1])
    assert path.read_bytes() == whole.read_bytes()
    assert len(list(tmp_path.iterdir())) == 2


def test_each_batch_is_on_disk_before_the_next(tmp_path):
    with answers_file(tmp_path / "a.jsonl", print) as answers:
        answers.begin(SETTINGS)
        answers.add([record(1)])
        assert lines(answers.partial)[1:] == [record(1)]


def test_an_interruption_behind_a_write_loses_nothing(tmp_path, monkeypatch):
    path, syncs = tmp_path / "answers.jsonl", []

    def interrupted(file: int) -> None:
        syncs.append(file)
        if len(syncs) == 2:  # the first one is of the settings
            raise KeyboardInterrupt

    monkeypatch.setattr("dude_cli.generation.answers_file.os.fsync", interrupted)
    with suppress(KeyboardInterrupt), answers_file(path, print) as answers:
        answers.begin(SETTINGS)
        answers.add([record(3)])
    assert answers.answers == {3: record(3)}
    assert written(path, [1], stop=True) == [3]


def test_a_line_without_its_end_is_answered_again(tmp_path):
    path, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    written(path, [3, 1], stop=True)
    partial.write_bytes(partial.read_bytes()[:-5])
    assert written(path, [1], [2]) == [3]
    assert lines(path) == [record(1), record(2), record(3)]
    partial.write_text('{"answers_to')  # the first line itself
    (path).unlink()
    assert written(path, [1]) == []
    assert lines(path) == [record(1)]


def test_it_is_begun_once(tmp_path):
    """What a chat template is told of the time stays."""
    with answers_file(tmp_path / "a.jsonl", print) as first:
        first.begin(SETTINGS)
        first.add([record(1)])
    with answers_file(tmp_path / "a.jsonl", print) as second:
        assert second.begun_at == first.begun_at


def test_answers_to_something_else_are_not_gone_on_with(tmp_path):
    path, partial = tmp_path / "answers.jsonl", tmp_path / "answers.jsonl.partial"
    written(path, [1], stop=True)
    before = partial.read_bytes()
    with pytest.raises(UsageError, match="from a command that differs in: sampling\n") as error:
        written(path, [2], settings=SETTINGS | {"sampling": {"seed": 1}})
    assert error.value.where == str(partial)
    assert partial.read_bytes() == before


@pytest.mark.parametrize(
    "text", ["mine\n", '{"row": 1}\n', '{"answers_to": {}}\n', '{"answers_to": {"begun_at": 3}}\n']
)
def test_somebody_elses_file_is_left_alone(tmp_path, text):
    partial = tmp_path / "answers.jsonl.partial"
    partial.write_text(text)
    with pytest.raises(UsageError, match="this file is in the way"):
        written(tmp_path / "answers.jsonl", [1])
    assert partial.read_text() == text


def test_nothing_is_ever_replaced(tmp_path):
    path = tmp_path / "answers.jsonl"
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="is there already, and nothing is ever replaced"):
        written(path, [1])
    path.unlink()
    with answers_file(path, print) as answers:
        answers.begin(SETTINGS)
        answers.add([record(1)])
        path.write_text("mine")  # while it was answering
        with pytest.raises(UsageError, match="is there already"):
            answers.finish()
    assert path.read_text() == "mine"
    path.unlink()
    assert written(path, [2]) == [1]


def test_two_commands_do_not_write_the_same_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    with answers_file(path, print) as answers:
        answers.begin(SETTINGS)
        with pytest.raises(UsageError, match="another dude command writes these answers"):
            written(path, [1])


def test_without_an_answer_nothing_is_left(tmp_path):
    written(tmp_path / "new/answers.jsonl", stop=True)
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
