from __future__ import annotations

import bz2
import gzip
import json
import lzma
import time
from functools import partial
from pathlib import Path

import pytest

from dude_cli import quickstart
from dude_cli.config import DataSource
from dude_cli.data.columns import Columns
from dude_cli.data.rows import Seen, first_values, read_source
from dude_cli.errors import DataError
from dude_cli.system import cache_dir

ROWS = [{"question": f"What is {i}?", "answer": str(i), "extra": i} for i in range(20)]
COLUMNS = Columns(("question", "answer"))
KEPT = [{"question": row["question"], "answer": row["answer"]} for row in ROWS]


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def write(path: Path, rows: list[dict] = ROWS) -> Path:
    import csv

    import datasets

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path: object, columns: Columns = COLUMNS, **fields: object) -> list[dict]:
    return read_source(DataSource(path=str(path), **fields), columns, Seen()).values


def error_of(path: object, columns: Columns = COLUMNS, **fields: object) -> DataError:
    with pytest.raises(DataError) as caught:
        read(path, columns, **fields)
    error = caught.value
    assert error.what
    assert error.where
    assert error.fix
    return error


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert read("~/rows.jsonl") == read("~/saved") == KEPT
    assert "did you mean" in (error_of("~/row.jsonl").fix or "")


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_format_gives_the_same_rows_and_slices(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}")
    assert read(path) == KEPT
    assert read(path, split="train[:5]") == KEPT[:5]
    assert read(path, split="train[90%:]") == KEPT[18:]
    assert read(path, split="train[-3:]+train[:1]") == KEPT[17:] + KEPT[:1]
    assert read(path, split="train[:1000]") == KEPT


def test_folders_that_load_dataset_or_save_to_disk_made(tmp_path):
    import datasets

    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/train.jsonl")
    write(tmp_path / "folder/test.jsonl", ROWS[:3])
    assert read(tmp_path / "folder") == KEPT
    assert read(tmp_path / "folder", split="test[1:]") == KEPT[1:3]
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "dev": dataset.select(range(3))}).save_to_disk(tmp_path / "several")
    assert read(tmp_path / "one", split="train[10%:]") == KEPT[2:]
    assert read(tmp_path / "several", split="dev[:2]") == KEPT[:2]
    assert "train, dev" in error_of(tmp_path / "several", split="test").fix
    assert "Unknown split" in error_of(tmp_path / "folder", split="nope").what


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ('{"question": "a", "other": "b"}', "column names don't match"),
        ('{"question": ["a"], "answer": "b"}', "TypeError: Couldn't cast array of type list<item: string> to string"),
        ('{"question": "a", "ans', "JSON parse error: Invalid encoding in string. in row 0"),
    ],
)
def test_files_of_a_folder_that_make_no_table_are_told_why(tmp_path, other, what):
    write(tmp_path / "a.jsonl", [{"question": "a", "answer": "b"}])
    (tmp_path / "b.jsonl").write_text(f"{other}\n")
    error = error_of(tmp_path)
    assert error.what.startswith("cannot open the data set: ")
    assert what in error.what
    assert "\n" not in error.what
    assert "each file on its own" in error.fix


def test_the_file_that_datasets_names_is_told(tmp_path, monkeypatch):
    import datasets
    from datasets.exceptions import DatasetGenerationCastError

    def load_dataset(*_: object, **__: object) -> None:
        said = "An error occurred while generating the dataset\n\nAt some point there are 1 new columns\n\n"
        said += "This happened while the json dataset builder was generating data using\n\n/data/b.jsonl"
        raise DatasetGenerationCastError(said) from ValueError("cast")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "1 new columns This happened while" in error_of(tmp_path).what
    assert "/data/b.jsonl" in error_of(tmp_path).what


def test_real_data_folder_opens_by_its_configuration(test_data):
    rows = read(test_data / "gsm8k", name="main", split="train[:10]")
    lines = (test_data / "gsm8k/train.jsonl").read_text().splitlines()[:10]
    assert rows == [json.loads(line) for line in lines]
    error = error_of(test_data / "gsm8k", name="nope")
    assert "'nope'" in error.what
    assert "main" in error.what


def test_a_folder_is_read_as_it_is_now(tmp_path):
    """Of a folder whose README has configurations, `datasets` knows the name and not what is in it."""
    card = "---\nconfigs:\n- config_name: main\n  data_files: [{split: train, path: train.jsonl}]\n---\n"
    for parent in ("one", "two"):
        folder = tmp_path / parent / "data"
        folder.mkdir(parents=True)
        (folder / "README.md").write_text(card)
        write(folder / "train.jsonl", ROWS[:2] if parent == "one" else ROWS[2:4])
    assert read(tmp_path / "one/data", name="main") == KEPT[:2]
    assert read(tmp_path / "two/data", name="main") == KEPT[2:4]
    write(tmp_path / "one/data/train.jsonl", ROWS[4:7])
    assert read(tmp_path / "one/data", name="main") == KEPT[4:7]


def test_of_what_a_folder_was_the_copies_used_least_recently_go(tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE_DIR", str(tmp_path / "cache"))
    folder, copies = tmp_path / "data", tmp_path / "cache/datasets"
    folder.mkdir()
    for count in (1, 2, 3):
        write(folder / "train.jsonl", ROWS[:count])
        assert read(folder) == KEPT[:count]
    assert len(list(copies.iterdir())) == 3
    monkeypatch.setattr(cache_dir, "prune", partial(cache_dir.prune, limit_bytes=1))
    assert read(folder) == KEPT[:3]
    assert len(list(copies.iterdir())) == 3  # another process may be writing one of them
    now = time.time_ns
    monkeypatch.setattr(cache_dir.time, "time_ns", lambda: now() + cache_dir.IN_USE_NS)
    assert read(folder) == KEPT[:3]
    assert list(copies.iterdir()) == [cache_dir.folder_cache(folder)]
    assert read(folder) == KEPT[:3]


def test_the_packages_own_problems_slice_like_any_split(monkeypatch):
    monkeypatch.setattr(
        quickstart, "rows", lambda split: [{"prompt": f"{split} {i}", "completion": "x"} for i in range(10)]
    )
    columns = Columns(("prompt", "completion"))
    assert [row["prompt"] for row in read("embedded:quickstart", columns, split="dev[:20%]")] == ["dev 0", "dev 1"]
    assert "train, dev, test" in error_of("embedded:quickstart", columns, split="nope").fix


def test_csv_cells_stay_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('question,answer\n007,NA\n"a, b",\n"two\nlines",null\n')
    assert [tuple(row.values()) for row in read(path)] == [("007", "NA"), ("a, b", ""), ("two\nlines", "null")]


def test_json_file_with_one_object_a_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read(path) == KEPT


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_compressed_file_has_the_same_rows(tmp_path, suffix, packed):
    path = tmp_path / f"rows{suffix}{packed}"
    content = PACKERS[packed](write(tmp_path / f"rows{suffix}").read_bytes())
    path.write_bytes(content)
    assert read(path) == KEPT
    for damaged in (content[:-20], b"no such file", b""):
        path.write_bytes(damaged)
        assert str(path) in error_of(path).where


def test_tabs_and_lines_of_text(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("question\tanswer\na, b\t 12 \n")
    assert read(path) == [{"question": "a, b", "answer": " 12 "}]
    path = tmp_path / "rows.txt"
    path.write_bytes("\ufeffOnce upon\r\n\n  a time \n".encode())
    assert read(path, Columns(("text",))) == [{"text": "Once upon"}, {"text": "  a time "}]
    assert "no column 'prompt'; the columns are: text" in error_of(path, Columns(("prompt",))).what


def test_optional_columns_may_be_absent_or_null(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"a": "x"}, {"a": "y", "b": None}, {"a": "z", "b": "B"}])
    assert [row["b"] for row in read(path, Columns(("a",), ("b",)))] == ["", "", "B"]


@pytest.mark.parametrize("path", ["*", "a?", "x y", "{}", "a:b"])
def test_what_no_name_on_the_hub_looks_like_is_a_path(path):
    """`datasets` takes a `*` for any data set that is in its cache."""
    assert "no such data file or folder" in error_of(Path(path)).what


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "rows.jsonl")
    error = error_of(tmp_path / "row.jsonl")
    assert "no such data file or folder" in error.what
    assert str(tmp_path / "rows.jsonl") in error.fix


def test_several_files_in_one_name_are_told_to_be_named_each(tmp_path):
    one, two = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl")
    for name in (f"{one},{two}", f"{one}, {two}", f"{one},{one},{two}"):
        error = error_of(name)
        assert f"no such data file or folder: {name}" in error.what
        assert error.fix.startswith("give each on its own: in a config an entry each, on the command line the option")
    for name in (f"{one},{tmp_path}/c.jsonl", f"{one},"):
        assert "each on its own" not in error_of(name).fix
    assert read(write(tmp_path / "a,b.jsonl")) == KEPT


def test_malformed_line_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n\n{"question": \n')
    assert error_of(path).where == f"{path}:3"
    assert error_of(path).what == "not valid JSON: Expecting value, column 14"
    path.write_text("[1, 2]\n")
    assert "list" in error_of(path).what


def test_broken_files_say_what_is_wrong(tmp_path):
    (tmp_path / "rows.json").write_text('[{"question": "a",}]')
    assert f"{tmp_path}/rows.json:1:" in error_of(tmp_path / "rows.json").where
    for suffix in ("json", "jsonl"):  # Python's reader has a depth at which it gives up
        deep = tmp_path / f"deep.{suffix}"
        deep.write_text('{"question": ' + "[" * 100_000 + "]" * 100_000 + "}")
        assert "not valid JSON: maximum recursion depth exceeded" in error_of(deep).what
        assert str(deep) in error_of(deep).where
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really")
    assert "parquet" in error_of(tmp_path / "rows.parquet").what
    (tmp_path / "rows.csv").write_text("question,answer\na,b,c\n")
    assert "more cells" in error_of(tmp_path / "rows.csv").what
    (tmp_path / "latin.jsonl").write_bytes('{"question": "é", "answer": ""}'.encode("latin-1"))
    assert "UTF-8" in error_of(tmp_path / "latin.jsonl").what
    (tmp_path / "rows.xlsx").write_bytes(b"")
    for name in ("rows.xlsx", "rows.parquet.gz", "rows.gz", "rows.jsonl.zip"):
        (tmp_path / name).write_bytes(b"")
        fix = error_of(tmp_path / name).fix
        assert (
            ".jsonl, .json, .csv, .tsv, .txt, .parquet; all but .parquet may be compressed, with .gz, .bz2, .xz" in fix
        )


def test_all_bad_rows_are_counted_and_the_first_five_are_named(tmp_path):
    bad = [{"question": "a", "answer": None}, {"question": ["a"], "answer": "b"}] * 4
    for suffix, place in ((".jsonl", "{path}:{line}"), (".json", "{path}, row {line}")):
        path = write(tmp_path / f"rows{suffix}", [*ROWS[:2], *bad])
        error = error_of(path)
        nothing, a_list = "column 'answer' has no value (null)", "column 'question' is a list, not text"
        named = [
            f"  {place.format(path=path, line=line)}: {(a_list, nothing)[line % 2]}; "
            f"{('write the text to learn into a column of its own', 'fill in or remove such rows')[line % 2]}"
            for line in range(3, 8)
        ]
        assert error.what.splitlines() == ["8 of 10 rows cannot be used:", *named, "  and 3 more"]
        assert error.where == f"{path}, split train"
        assert error.fix == "do what stands behind each row"
        assert place.format(path=path, line=4) == error_of(path, split="train[3:4]").where


def test_what_is_to_be_done_about_all_bad_rows_is_said_once(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"question": "a", "answer": None}] * 2)
    error = error_of(path)
    nothing = "column 'answer' has no value (null)"
    assert error.what.splitlines()[1:] == [f"  {path}:1: {nothing}", f"  {path}:2: {nothing}"]
    assert error.fix == "fill in or remove such rows"


def test_all_broken_lines_are_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": \n\n{"question": "a", "answer": "b"}\n[1]\n')
    error = error_of(path)
    assert "2 of 3 rows cannot be used" in error.what
    assert f"{path}:1: not valid JSON" in error.what
    assert f"{path}:4: a row is a JSON object" in error.what
    (tmp_path / "rows.csv").write_text("question,answer\na,b,c\na,b\na,b,c\n")
    error = error_of(tmp_path / "rows.csv")
    assert f"{tmp_path}/rows.csv:2: more cells" in error.what
    assert f"{tmp_path}/rows.csv:4: more cells" in error.what
    (tmp_path / "rows.json").write_text('[{"question": "a", "answer": "b"}, 1, 2]')
    assert f"{tmp_path}/rows.json, row 3: a row is" in error_of(tmp_path / "rows.json").what


def test_missing_column_names_those_there_and_the_nearest(tmp_path):
    for path in (write(tmp_path / "rows.jsonl"), write(tmp_path / "rows.parquet")):
        error = error_of(path, Columns(("questions",)))
        assert error.what == "no column 'questions'; the columns are: question, answer, extra"
        assert "'question'" in error.fix
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/train.jsonl")
    assert "no column 'prompt'" in error_of(tmp_path / "folder", Columns(("prompt",))).what


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_the_columns_of_a_file_are_those_of_all_of_its_rows(tmp_path, suffix):
    rows = [{"question": "a"}, *ROWS[1:3], {"answer": "b", "more": 1}]
    path = write(tmp_path / f"rows{suffix}", rows)
    error = error_of(path, split="train[:3]")
    assert error.what == "column 'answer' has no value (null)"
    assert error.where in (f"{path}:1", f"{path}, row 1")
    assert "2 of 4 rows cannot be used" in error_of(path).what
    assert error_of(path, Columns(("questions",))).what.endswith("the columns are: question, answer, extra, more")
    seen = Seen()
    read_source(DataSource(path=str(path), split="train[:3]"), Columns(("question",)), seen)
    assert seen.unread == {str(path): ["answer", "extra"]}
    first = first_values(DataSource(path=str(path)))
    assert first == {"question": "a", "answer": "1", "extra": 1, "more": 1}


@pytest.mark.parametrize(
    ("there", "columns", "what", "fix"),
    [
        ("messages", Columns(("prompt", "completion")), "no column 'prompt'", "set data.format: chat, or templates"),
        ("conversations", Columns(("text",)), "no column 'text'", "set data.format: chat, or templates"),
        ("instruction", Columns(("prompt",)), "no column 'prompt'", "set data.format: alpaca, or templates"),
        ("text", Columns(("prompt",)), "no column 'prompt'", "set data.format: text, or templates"),
        ("instruction", Columns(("instruction", "output")), "no column 'output'", "choose another `data.format`, or"),
        ("dialog", Columns(("messages",), are_texts=False), "no column 'messages' or 'conversations'; ", "the name `m"),
    ],
)
def test_a_missing_column_is_told_the_format_that_the_data_have(tmp_path, there, columns, what, fix):
    error = error_of(write(tmp_path / "rows.jsonl", [{there: "a"}]), columns)
    assert what in error.what
    assert fix in error.fix


@pytest.mark.parametrize("where", ["rows.jsonl", "rows.parquet", "folder"])
def test_conversations_have_either_name(tmp_path, where):
    columns = Columns(("messages",), ("tools",), are_texts=False)
    talk = [{"from": "human", "value": "hi"}]
    rows = [{"conversations": talk, "tools": "[]"}, {"conversations": talk, "tools": None}]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/train.jsonl", rows)
    if where != "folder":
        write(tmp_path / where, rows)
    assert read(tmp_path / where, columns) == [{"messages": talk, "tools": "[]"}, {"messages": talk, "tools": ""}]
    both = write(tmp_path / "both.jsonl", [{"messages": "a", "conversations": "b"}, {"conversations": "b"}])
    assert [row["messages"] for row in read(both, columns)] == ["a", "b"]


def talk_with_a_call(**arguments: object) -> dict:
    call = {"type": "function", "function": {"name": "tool", "arguments": arguments}}
    return {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "tool_calls": [call]}]}


@pytest.mark.parametrize("where", ["rows.parquet", "folder", "saved"])
def test_the_arguments_of_one_call_are_not_written_into_another(tmp_path, where):
    """An Arrow table has each field in every object of a column."""
    import datasets

    rows = [talk_with_a_call(city="Rome"), talk_with_a_call(symbol="X")]
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/train.jsonl", rows)
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    if where == "rows.parquet":
        write(tmp_path / where, rows)
    found = read(tmp_path / where, Columns(("messages",), are_texts=False))
    calls = [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in found]
    assert calls == [{"city": "Rome"}, {"symbol": "X"}]
    lines = write(tmp_path / "rows.jsonl", [talk_with_a_call(city=None)])
    assert read(lines, Columns(("messages",), are_texts=False)) == [talk_with_a_call(city=None)]


def test_null_in_a_needed_column_names_the_row(tmp_path):
    path = write(tmp_path / "rows.jsonl", [*ROWS[:2], {"question": "a", "answer": None}])
    error = error_of(path)
    assert error.where == f"{path}:3"
    assert error.what == "column 'answer' has no value (null)"
    missing = write(tmp_path / "missing.jsonl", [{"question": "a", "answer": float("nan")}])
    assert "has no value (NaN)" in error_of(missing).what
    assert read(missing, Columns(("question",), ("answer",))) == [{"question": "a", "answer": ""}]
    short = tmp_path / "rows.csv"
    short.write_text("question,answer\na,b\nc\n")
    assert error_of(short).where == f"{short}:3"


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ([{"role": "user", "content": "hi"}], "is a list, not text"),
        ({"text": ["a"]}, "is an object, not text"),
        ("a cut emoji \ud83d", "half of a surrogate pair at character 13"),
    ],
)
@pytest.mark.parametrize("columns", [COLUMNS, Columns(("question",), ("answer",))], ids=["needed", "optional"])
def test_what_is_no_text_names_the_row(tmp_path, value, what, columns):
    path = write(tmp_path / "rows.jsonl", [*ROWS[:2], {"question": "a", "answer": value}])
    error = error_of(path, columns)
    assert what in error.what
    assert "'answer'" in error.what
    assert error.where == f"{path}:3"


def test_conversations_are_told_their_format(tmp_path):
    for message in ({"role": "user", "content": "hi"}, {"from": "human", "value": "hi"}):
        rows = [{"question": "a", "answer": [message]}]
        assert "data.format: chat" in error_of(write(tmp_path / "rows.jsonl", rows)).fix


def test_conversations_may_be_lists_and_have_whole_characters(tmp_path):
    columns = Columns(("messages",), are_texts=False)
    whole = [{"messages": [{"role": "user", "content": "\ud83d\ude00"}]}]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(whole[0]))
    assert read(path, columns) == [{"messages": [{"role": "user", "content": "\N{GRINNING FACE}"}]}]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "\ud83d"}]}))
    assert "half of a surrogate pair" in error_of(path, columns).what


def test_no_rows_is_an_error(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    assert "no rows" in error_of(tmp_path / "rows.jsonl").what
    assert "no rows" in error_of(write(tmp_path / "more.jsonl"), split="train[20:]").what


def test_bad_split_says_what_splits_there_are(tmp_path):
    path = write(tmp_path / "rows.jsonl")
    assert "the splits there are: train" in error_of(path, split="test").fix
    assert "train[:x]" in error_of(path, split="train[:x]").what


def test_name_and_revision_do_not_fit_a_file(tmp_path):
    assert "remove `name` and `revision`" in error_of(write(tmp_path / "rows.jsonl"), name="main").fix


def test_hub_name_while_offline():
    error = error_of("no-such-owner/no-such-data")
    assert "cannot reach the data set no-such-owner/no-such-data" in error.what
    assert "HF_HUB_OFFLINE" in error.fix


@pytest.mark.parametrize(
    ("raised", "what", "fix"),
    [
        ("Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated.", "is gated", "hf auth login"),
        ("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.", "no such data set", "spelling"),
    ],
)
def test_gated_and_unknown_hub_names(monkeypatch, raised, what, fix):
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    def load_dataset(*_: object, **__: object) -> None:
        raise DatasetNotFoundError(raised)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    error = error_of("a/b")
    assert what in error.what
    assert fix in error.fix


def test_hub_options_reach_load_dataset(monkeypatch):
    import datasets

    seen = {}

    def load_dataset(path: str, name: str | None, **options: object) -> datasets.Dataset:
        seen.update(path=path, name=name, **options)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/data", name="sub", split="test[:3]", revision="v1") == KEPT
    assert seen == {"path": "owner/data", "name": "sub", "split": "test[:3]", "revision": "v1"}


def test_the_commit_of_a_data_set_from_the_hub_is_found(monkeypatch):
    import datasets

    addresses = {f"hf://datasets/owner/data@{'c' * 40}/{name}.parquet": {} for name in ("one", "two")}
    dataset = datasets.Dataset.from_list(ROWS, info=datasets.DatasetInfo(download_checksums=addresses))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset)
    seen = Seen()
    for revision in (None, "v1"):  # of one data set, two revisions may be in one config
        read_source(DataSource(path="owner/data", revision=revision), COLUMNS, seen)
    assert seen.revisions == {"owner/data": "c" * 40, "owner/data@v1": "c" * 40}
