"""`dude init --estimate`: the memory of a training, and nothing else is done."""

from __future__ import annotations

import json

from command import dude_here
from quickstart_config import quickstart_config
from tiny_models import tiny_model


def test_every_part_is_named_and_nothing_is_written(tmp_path):
    config = quickstart_config(tmp_path)
    done = dude_here("init", config, "--estimate", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["training"]) >= {"base weights", "adapter", "gradients", "optimizer", "activations", "loss"}
    for phase in ("init", "training"):
        parts = found[phase]
        assert parts.pop("total") == sum(parts.values())
        assert all(isinstance(size, int) and size >= 0 for size in parts.values())
    assert found["device"] == "cpu"
    assert found["device_bytes"] > 2**30
    assert not (tmp_path / "run").exists()
    shown = dude_here("init", config, "--estimate").stdout
    assert "activations" in shown
    assert "fits" in shown


def test_its_batch_is_the_one_that_the_training_takes(tmp_path):
    """The longest row where the rows are at hand, and what `auto` starts with."""
    config = quickstart_config(tmp_path, global_batch_size="48", per_device_batch_size="auto")
    found = json.loads(dude_here("init", config, "--estimate", "--json").stdout)
    prepared = json.loads(dude_here("init", config, "--json").stdout)
    assert found["length_source"] == "the longest row"
    assert found["batch"]["length"] == prepared["data"]["train"]["longest_row"] < 96
    assert found["batch"]["rows"] == prepared["plan"]["per_device_batch_size"]
    assert prepared["memory"]["training"] == found["training"]


def test_conversations_are_measured_in_the_template_of_the_config(tmp_path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}{{ name }} {{ m.role }}: {{ m.content }}\n{% endfor %}")
    row = {"messages": [{"role": "user", "content": "Ann"}, {"role": "assistant", "content": "12"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    changes = [f"data.train=[{{path: '{tmp_path}/rows.jsonl'}}]", "data.validation=null", "data.format=chat"]
    changes += [f"data.chat_template={tmp_path}/own.jinja", "data.chat_template_kwargs.name=the"]
    config = quickstart_config(tmp_path)
    found = json.loads(dude_here("init", config, "--estimate", "--json", *changes).stdout)
    prepared = json.loads(dude_here("init", config, "--json", *changes).stdout)
    assert found["length_source"] == "the longest row"
    assert found["batch"]["length"] == prepared["data"]["train"]["longest_row"]


def test_it_is_for_as_many_ranks_as_the_training_has(tmp_path):
    done = dude_here(
        "init", quickstart_config(tmp_path, global_batch_size="8"), "--estimate", "--num-processes", "4", "--json"
    )
    batch = json.loads(done.stdout)["batch"]
    assert (batch["rows"], batch["world_size"]) == (2, 4)


def test_rows_on_the_hub_are_not_downloaded_and_weights_not_needed(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path / "shape")
    changes = ["data.train=[{path: meta-math/MetaMathQA}]", "data.validation=null"]
    changes.append(f"model.name_or_path={tmp_path / 'shape'}")
    done = dude_here("init", quickstart_config(tmp_path), "--estimate", "--json", *changes)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["length_source"], found["batch"]["length"]) == ("data.max_length", 96)


def test_mistakes_are_those_of_init(tmp_path):
    config = quickstart_config(tmp_path)
    for change, text in {
        "model.name_or_path=/nowhere": "does not exist",
        "adapter.target_modules=[q_prj]": "q_proj",
        "adapter.rank=4096": "rank 4096 is larger",
    }.items():
        done = dude_here("init", config, "--estimate", change)
        assert done.returncode == 2
        assert text in done.stderr
