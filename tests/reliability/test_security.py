"""Nothing that a run, an adapter or a model brings along runs code or leads a write out of its folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
from command import dude_here
from quickstart_config import quickstart_config
from tiny_models import tiny_model
from training import train_here

from dude_cli import quickstart
from dude_cli.config import ModelConfig
from dude_cli.errors import UsageError
from dude_cli.evaluation import write_results
from dude_cli.model import load_model, load_tokenizer
from dude_cli.system import files
from dude_cli.system.lock import LOCK_FILE
from dude_cli.training.run_dir import PREPARED, TRAINED

TOKEN = "hf_" + "Abc123" * 6


class Code:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["DUDE_TEST_PICKLE"],))


def test_a_pickled_base_is_refused_and_not_read(tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_TEST_PICKLE", str(tmp_path / "ran"))
    tiny_model("llama").save_pretrained(tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    (tmp_path / "model/pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(UsageError, match="no weights in safetensors files, and pickled ones are never read"):
        load_model(ModelConfig(name_or_path=str(tmp_path / "model")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("what", ["model", "tokenizer"])
def test_a_models_own_code_does_not_run_unless_the_config_says_so(what, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(quickstart.MODEL_DIR, folder)
    (folder / "theirs.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Theirs: pass\n")
    changes = {
        "config.json": {"auto_map": {"AutoConfig": "theirs.Theirs"}, "model_type": "theirs"},
        "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["theirs.Theirs"] * 2}, "tokenizer_class": "Theirs"},
    }
    name = "config.json" if what == "model" else "tokenizer_config.json"
    values = json.loads((folder / name).read_text()) | changes[name]
    (folder / name).write_text(json.dumps(values))
    load = load_model if what == "model" else load_tokenizer
    with pytest.raises(UsageError, match=r"needs Python code of its own|cannot be loaded"):
        load(ModelConfig(name_or_path=str(folder)))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", [*PREPARED, *TRAINED, LOCK_FILE])
def test_a_link_in_a_run_folder_is_refused_before_anything_is_written(name, tmp_path):
    config = quickstart_config(tmp_path)
    outside = tmp_path / "outside"
    (tmp_path / "run").mkdir()
    outside.write_text("precious") if "." in name else outside.mkdir()
    (tmp_path / "run" / name).symlink_to(outside)
    for overwrite in ([], ["--overwrite"]):
        done = dude_here("train", config, *overwrite)
        assert done.returncode == 2, done.stderr
        assert f"{name} in it would lead" in done.stderr
    assert outside.is_dir() or outside.read_text() == "precious"
    assert not list(outside.glob("*"))


def test_scores_are_not_written_through_a_link(tmp_path):
    config = quickstart_config(tmp_path, max_steps="1")
    train_here(config)
    (tmp_path / "outside").mkdir()
    (tmp_path / "run/eval").symlink_to(tmp_path / "outside")
    done = dude_here("eval", tmp_path / "run", "--task", "quickstart_choices", "--limit", "1")
    assert done.returncode == 2, done.stderr
    assert "eval in it would lead" in done.stderr


def test_a_task_is_a_file_name_and_no_path(tmp_path):
    results = {"requested": {"../../x": {"limit": None, "names": []}}, "config": {}, "results": {}}
    paths = write_results(results, tmp_path / "run/eval")
    assert [path.parent for path in paths] == [tmp_path / "run/eval"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_planted_link_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    for name in ("config.yaml", ".config.yaml.partial"):
        (tmp_path / name).symlink_to(outside)
    files.write_text(tmp_path / "config.yaml", "new")
    assert not (tmp_path / "config.yaml").is_symlink()
    assert (tmp_path / "config.yaml").read_text() == "new"
    target = tmp_path / "precious"
    target.mkdir()
    (target / "file").write_text("x")
    for name in (".folder.partial", ".folder.old", "folder"):
        (tmp_path / name).symlink_to(target)
    with files.new_folder(tmp_path / "folder") as partial:
        (partial / "file").write_text("y")
    assert outside.read_text() == "precious"
    assert (target / "file").read_text() == "x"
    assert (tmp_path / "folder/file").read_text() == "y"


def test_a_token_is_neither_stored_nor_printed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("sys.argv", ["dude", "train", TOKEN])
    done = dude_here("train", quickstart_config(tmp_path, max_steps="1"), "--debug")
    assert done.returncode == 0, done.stderr
    refused = dude_here("train", tmp_path / "config.yaml", f"model.token={TOKEN}", "--debug")
    assert refused.returncode == 2
    assert "model.token=***" in refused.stderr
    for said in (done.stdout, done.stderr, refused.stdout, refused.stderr):
        assert TOKEN not in said
    places = [tmp_path, os.environ["DUDE_CACHE_DIR"]]
    stored = [path for place in places for path in files.Path(place).rglob("*") if path.is_file()]
    assert "***" in (tmp_path / "run/environment.json").read_text()
    assert not [path for path in stored if TOKEN.encode() in path.read_bytes()]
