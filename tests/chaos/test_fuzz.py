"""Mutated configs, data files, adapter folders and run folders: one error of ours, or it works; never a traceback.

`make chaos` runs the long form. A failure names its seed and number, and DUDE_CHAOS_SEED repeats it.
"""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pytest
from command import dude_here
from quickstart_config import quickstart_config
from training import train_here

from dude_cli import quickstart, report, shipped
from dude_cli.adapter import AdapterConfig, load_adapter, patch_model, save_adapter, unpatch_model
from dude_cli.config import DataConfig, ModelConfig
from dude_cli.data import prepare_data
from dude_cli.errors import DudeError
from dude_cli.evaluation.tasks import offline
from dude_cli.model import load_model, load_tokenizer
from dude_cli.training import prepare

IS_LONG = os.environ.get("DUDE_CHAOS") == "long"
SEED = int(os.environ.get("DUDE_CHAOS_SEED", "1"))
CONFIGS, DATA_FILES, ADAPTERS, RUNS = (2000, 2000, 500, 60) if IS_LONG else (60, 40, 12, 2)
LIMIT_S = 60  # for one of them

VALUES = [
    "", "null", "~", "true", "no", "0", "-1", "1", "2", "3.5", "1e-4", "1e308", "1e999", "-0.0", ".nan", ".inf", "0x10",
    str(2**31), str(2**63), str(2**64), "9" * 400, "[]", "{}", "[1, 2]", "[[]]", "{a: b}", "''", '"\\0"', '"\\u2028"',
    "auto", "all-linear", "dude", "lora", "float16", "cosine", "nf4", "q_proj", "'['", "'(('", "'*'", "'.*'",
    "../../outside", "/etc/passwd", "~/x", "~nobody/x", "/dev/null", "/proc/self/mem", "a/b/c", "x.jsonl", ".",
    "embedded:quickstart", "embedded:nothing", "'{prompt}'", "'{'", "'{}'", "'{prompt.__class__}'", "'%s'",
    "train[:1]", "train[:0]", "'train[:-1]'", "train[90%:]", "dev", "test+dev", "'train['",
    "!!python/object/apply:os.system [touch outside]", "&a [*a]", "*b", "<<: {a: 1}", "- x", "|\n  x", "? x", "# x",
    "gsm8k", "chat", "text", "alpaca", "0.5", "1.0", "ünï", "\N{PILE OF POO}",
]  # fmt: skip


def mutated_text(text: str, choose: random.Random) -> str:
    """A few changes of a YAML text: of a value, a line, or some characters."""
    for _ in range(choose.choice([1, 1, 2, 3])):
        lines = text.split("\n")
        at = choose.randrange(len(lines))
        kind = choose.random()
        if kind < 0.6:  # one value of a block or flow mapping
            places = list(re.finditer(r"(?<=: )[^\s,}\]{\[][^,}\]\n]*", text))
            if places:
                place = choose.choice(places)
                text = text[: place.start()] + choose.choice(VALUES) + text[place.end() :]
            continue
        if kind < 0.7:
            del lines[at]
        elif kind < 0.8:
            lines.insert(at, choose.choice(lines))
        elif kind < 0.9:
            lines[at] = " " * choose.randint(0, 3) + lines[at]
        else:
            cut = choose.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:cut] + choose.choice(VALUES) + lines[at][cut + choose.randint(0, 3) :]
        text = "\n".join(lines)
    return text


def mutated_bytes(data: bytes, choose: random.Random) -> bytes:
    for _ in range(choose.choice([1, 1, 1, 2, 3])):
        at, kind = choose.randrange(len(data) + 1), choose.random()
        some = bytes(choose.randrange(256) for _ in range(choose.randint(1, 4)))
        if kind < 0.4:
            data = data[:at] + some + data[at + len(some) :]
        elif kind < 0.6:
            data = data[:at] + some + data[at:]
        elif kind < 0.8:
            data = data[:at] + data[at + choose.randint(1, 40) :]
        elif kind < 0.9:
            data = data[:at]
        else:
            data = data[:at] + choose.choice(VALUES).encode() + data[at:]
    return data


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    """A name that is not here is an error at once, as for the commands of the other tests."""
    with offline():
        yield


class _Slow(BaseException):
    pass


class Writes:
    """The paths that Python code writes to, makes, renames or deletes while `on`; an audit hook stays for good."""

    # Where the arguments of an event have the paths, and the descriptor of the folder that a relative one is in.
    EVENTS: ClassVar = {"os.mkdir": ((0, 2),), "os.remove": ((0, 1),), "os.rmdir": ((0, 1),), "os.symlink": ((1, 2),)}
    EVENTS |= {"os.rename": ((0, 2), (1, 3))}

    def __init__(self) -> None:
        self.on, self.paths = False, list[str]()
        sys.addaudithook(self.look)

    def look(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.add(args[0], -1)
        for path, folder in self.EVENTS.get(event, ()):
            self.add(args[path], args[folder])

    def add(self, path: Any, folder: int) -> None:
        if isinstance(path, str | bytes | os.PathLike):
            name = os.fsdecode(path)
            parent = os.readlink(f"/proc/self/fd/{folder}") if folder >= 0 and not os.path.isabs(name) else ""
            self.paths.append(os.path.realpath(os.path.join(parent, name)))


WRITES = Writes()


@contextmanager
def watched(folder: Path, *allowed: Path) -> Iterator[None]:
    """Within, a write to any place but these is an error, and so is taking too long. `folder` is the current one."""

    def too_slow(*_: object) -> None:
        raise _Slow(f"longer than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(LIMIT_S)
    there = set(folder.iterdir())
    WRITES.paths.clear()
    WRITES.on = True
    try:
        yield
    finally:
        WRITES.on = False
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    places = [str(place.resolve()) for place in (*allowed, Path(os.environ["DUDE_CACHE_DIR"]))]
    places += ["/dev/null", "/dev/shm", f"/proc/{os.getpid()}/clear_refs"]
    places += [str(Path(datasets.config.HF_DATASETS_CACHE).resolve())]  # the cache of Hugging Face's libraries
    outside = [path for path in WRITES.paths if not any(f"{path}/".startswith(f"{place}/") for place in places)]
    # Python's temporary folder is where libraries put what they delete again.
    assert not [
        path for path in outside if os.path.dirname(path) != tempfile.gettempdir() and "__pycache__" not in path
    ]
    assert set(folder.iterdir()) - there <= set(allowed)


def explained(code: int, said: str) -> bool:
    return code in (0, 2, 3, 4, 5) and "Traceback" not in said


def test_mutated_configs(tmp_path, monkeypatch):
    """Those that are right train for a step. Other models than the embedded one are not here, which is an error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model = load_model(ModelConfig(name_or_path=quickstart.NAME, dtype="float32"))
    loaded = prepare.load_model

    def quick(config, device):
        if (config.name_or_path, config.dtype, config.quantization) != (quickstart.NAME, "float32", None):
            return loaded(config, device)
        return unpatch_model(model)

    # What a config does not change is done once: the weights, the embedded rows; the report of a run is left out.
    monkeypatch.setattr(prepare, "load_model", quick)
    monkeypatch.setattr(quickstart, "rows", functools.cache(quickstart.rows))
    monkeypatch.setattr(report, "write_report_if_possible", lambda *_: None)
    texts = [path.read_text() for name, _ in shipped.list_shipped() if (path := shipped.find_shipped(name))]
    texts = [text for text in texts if "model:" in text]
    tiny = quickstart_config(tmp_path / "tiny", rows="8", per_device_batch_size="1").read_text()
    file, run = tmp_path / "config.yaml", tmp_path / "run"
    codes: dict[int, int] = {}
    for number in range(CONFIGS):
        choose = random.Random(f"{SEED} config {number}")
        text = mutated_text(tiny if choose.random() < 0.7 else choose.choice(texts), choose)
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        short = ["train.max_steps=1", "train.global_batch_size=2"] if choose.random() < 0.9 else ["train.max_steps=1"]
        with watched(tmp_path, run):
            done = dude_here("train", file, f"output_dir={run}", *short)
        what = f"DUDE_CHAOS_SEED={SEED}, config {number}:\n{text}\n{done.stderr}"
        assert explained(done.returncode, done.stderr), what
        codes[done.returncode] = codes.get(done.returncode, 0) + 1
        shutil.rmtree(run, ignore_errors=True)
    print(f"\nDUDE_CHAOS_SEED={SEED}, {CONFIGS} mutated configs, by exit code: {dict(sorted(codes.items()))}")
    assert codes[0] > CONFIGS / 50
    assert codes[2] > CONFIGS / 4


def test_mutated_data_files(tmp_path):
    rows = [{"prompt": f"How much is {n} + {n}?", "completion": f" {n + n}", "text": "é" * n} for n in range(1, 9)]
    write_rows(tmp_path, rows)
    tokenizer = load_tokenizer(ModelConfig(name_or_path=quickstart.NAME))
    originals = {path.suffix: path.read_bytes() for path in tmp_path.iterdir()}
    formats = ["prompt_completion"] * 3 + ["text"] * 3 + ["alpaca", "chat"]
    results = {"read": 0, "refused": 0}
    for number in range(DATA_FILES):
        choose = random.Random(f"{SEED} data {number}")
        suffix = choose.choice(sorted(originals))
        path = tmp_path / f"mutated{suffix}"
        path.write_bytes(mutated_bytes(originals[suffix], choose))
        config = DataConfig.model_validate({"train": [{"path": str(path)}], "format": choose.choice(formats)})
        try:
            with watched(tmp_path):
                prepare_data(config, tokenizer, 1)
            results["read"] += 1
        except DudeError:
            results["refused"] += 1
        except BaseException as error:
            shutil.copy(path, tmp_path.parent / path.name)
            raise AssertionError(f"DUDE_CHAOS_SEED={SEED}, data {number}: {path.read_bytes()!r}") from error
    print(f"\nDUDE_CHAOS_SEED={SEED}, {DATA_FILES} mutated data files: {results}")
    assert min(results.values()) > DATA_FILES / 20


def write_rows(folder: Path, rows: list[dict[str, str]]) -> None:
    import csv

    import pyarrow
    import pyarrow.parquet

    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "a.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    with (folder / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_mutated_adapter_folders(tmp_path):
    """One that is loaded all the same computes what it did: the change was in a place that has no meaning."""
    import torch

    base = load_model(ModelConfig(name_or_path=quickstart.NAME, dtype="float32"))
    model = patch_model(base, AdapterConfig(rank=2))
    save_adapter(model, tmp_path / "good")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}
    unpatch_model(model)
    results = {"loaded": 0, "refused": 0}
    for number in range(ADAPTERS):
        choose = random.Random(f"{SEED} adapter {number}")
        folder = tmp_path / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        path = folder / choose.choice(["adapter_config.json", "adapter_config.json", "adapter.safetensors"])
        path.write_bytes(mutated_bytes(path.read_bytes(), choose))
        try:
            with watched(tmp_path):
                load_adapter(model, folder)
        except DudeError:
            results["refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"DUDE_CHAOS_SEED={SEED}, adapter {number}, {path}") from error
        found = model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        unpatch_model(model)
        results["loaded"] += 1
    print(f"\nDUDE_CHAOS_SEED={SEED}, {ADAPTERS} mutated adapter folders: {results}")
    assert results["refused"] > ADAPTERS / 2


def test_mutated_run_folders(tmp_path):
    """An unfinished run of which any file is damaged: it goes on, starts anew or says what is wrong."""
    config = quickstart_config(tmp_path, max_steps="2", rows="8", extra="  save_steps: 1")
    train_here(config)
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.copytree(tmp_path / "run", tmp_path / "good")
    names = sorted(path.relative_to(tmp_path / "good") for path in (tmp_path / "good").rglob("*") if path.is_file())
    codes: dict[int, int] = {}
    for number in range(RUNS):
        choose = random.Random(f"{SEED} run {number}")
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "good", tmp_path / "run")
        for name in choose.sample(names, 2):
            (tmp_path / "run" / name).write_bytes(mutated_bytes((tmp_path / "good" / name).read_bytes(), choose))
        with watched(tmp_path, tmp_path / "run"):
            done = dude_here("train", config)
        assert explained(done.returncode, done.stderr), f"DUDE_CHAOS_SEED={SEED}, run {number}: {done.stderr}"
        codes[done.returncode] = codes.get(done.returncode, 0) + 1
    print(f"\nDUDE_CHAOS_SEED={SEED}, {RUNS} mutated run folders, by exit code: {dict(sorted(codes.items()))}")
