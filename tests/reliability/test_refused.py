"""A run that is no longer the same is not continued by accident: what differs is named, and one flag allows it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import datetime
from types import SimpleNamespace

import pytest
from command import dude_here
from quickstart_config import quickstart_config
from training import StopAfter, init_here, train_here

from dude_cli import quickstart, target
from dude_cli.config import load_config
from dude_cli.errors import StoppedError, UsageError
from dude_cli.model import load_tokenizer
from dude_cli.training import forecast, prepare
from dude_cli.training.checkpoint import Origin, checkpoints, read_state
from dude_cli.training.metrics import read_metrics
from dude_cli.training.resume import changed_settings, is_finished_run

EXTRA = "  save_steps: 2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train_here(quickstart_config(folder, max_steps="4", rows="16", extra=EXTRA))
    return folder / "run"


@pytest.fixture
def unfinished(trained, tmp_path):
    """A copy of the run after step 2 of 4."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    config = quickstart_config(tmp_path, max_steps="4", rows="16", extra=EXTRA)
    before = tmp_path / "run/config.yaml"
    before.write_text(before.read_text().replace(str(trained), str(tmp_path / "run")))
    return config


def test_other_settings_are_named_and_a_flag_allows_them(unfinished, tmp_path):
    changes = ["train.learning_rate=2e-3", "data.max_length=80", "train.save_steps=1"]
    refused = dude_here("train", unfinished, *changes)
    assert refused.returncode == 2
    assert "different are: data.max_length, train.learning_rate\n" in refused.stderr
    assert "--allow-changes" in refused.stderr
    allowed = dude_here("train", unfinished, *changes, "--allow-changes")
    assert allowed.returncode == 0, allowed.stderr
    assert "continuing with other settings: data.max_length, train.learning_rate" in allowed.stderr
    assert "continuing after step 2" in allowed.stderr
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert len(rates) == 4


@pytest.mark.parametrize("change", ["adapter.rank=2", "adapter.method=dora", "adapter.alpha=8.0"])
def test_what_the_tensors_were_made_with_is_never_allowed(change, unfinished):
    refused = dude_here("train", unfinished, change, "--allow-changes")
    assert refused.returncode == 2
    assert f"different are: {change.partition('=')[0]}\n" in refused.stderr
    assert "--allow-changes" not in refused.stderr


def test_a_finished_run_says_so_and_is_not_changed(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    done = dude_here("train", tmp_path / "run/config.yaml", f"output_dir={tmp_path / 'run'}")
    assert done.returncode == 0
    assert "holds this run, finished; --overwrite starts anew" in done.stderr
    refused = dude_here(
        "train", tmp_path / "run/config.yaml", f"output_dir={tmp_path / 'run'}", "seed=9", "--allow-changes"
    )
    assert refused.returncode == 2
    assert "holds a finished run of another config; different are: seed" in refused.stderr
    assert f"adapter.init_from={tmp_path / 'run'}" in refused.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_each_thing_that_a_run_depends_on_is_named():
    before = Origin(1, "a" * 40, {"data.train": "x", "data.validation": "y"})
    assert before.differences(before) == []
    assert before.differences(Origin(2, "b" * 40, {"data.train": "z"})) == [
        "data.train (other rows)",
        "data.validation (other rows)",
        f"model.revision (commit {'a' * 40}, now {'b' * 40})",
        "world size (1, now 2)",
    ]
    chat = Origin(1, None, {"data.train": "x", "data.chat_template": "y"})
    assert chat.differences(Origin(1, None, {"data.train": "z", "data.chat_template": "w"})) == [
        "data.chat_template (another text)"
    ]
    assert chat.differences(Origin(1, None, {"data.train": "z", "data.chat_template": "y"})) == [
        "data.train (other rows)"
    ]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("adapter.target_modules=[q_porj]", "`q_porj` matches no linear layer"),
        (
            "adapter.target_modules='q_proj,v_proj'",
            r"`q_proj,v_proj` is one name[\s\S]*write a list: \[q_proj, v_proj\]",
        ),
        ("adapter.rank=500", "rank 500 is larger than"),
    ],
)
def test_what_does_not_fit_the_base_is_told_before_the_data_are_read(change, what, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "prepare_data", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(UsageError, match=what):
        init_here(quickstart_config(tmp_path), change)


def test_a_vocabulary_that_is_too_small_is_told_before_the_data_are_read(tmp_path, monkeypatch):
    def with_more_tokens(config):
        tokenizer = load_tokenizer(config)
        tokenizer.add_tokens([f"<{number}>" for number in range(100)])
        return tokenizer

    monkeypatch.setattr(prepare, "load_tokenizer", with_more_tokens)
    monkeypatch.setattr(prepare, "prepare_data", lambda *_: pytest.fail("the data were read"))
    with pytest.raises(UsageError, match=r"the tokenizer has \d+ tokens and the model embeddings for"):
        init_here(quickstart_config(tmp_path))


def test_a_template_file_that_was_edited_meanwhile_is_named(tmp_path):
    template, rows = tmp_path / "chat.jinja", tmp_path / "rows.jsonl"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    talk = {"messages": [{"role": "user", "content": "Ann"}, {"role": "assistant", "content": "12"}]}
    rows.write_text(json.dumps(talk) + "\n")
    config = quickstart_config(tmp_path, max_steps="2", extra="  save_steps: 1")
    settings = [f"data.train=[{{path: '{rows}'}}]", "data.validation=null", "data.format=chat"]
    settings.append(f"data.chat_template={template}")
    with pytest.raises(StoppedError):
        train_here(config, *settings, stop=StopAfter(1))
    template.write_text(template.read_text().replace(": ", " says "))
    with pytest.raises(UsageError, match=r"different are: data\.chat_template \(another text\)\n"):
        train_here(config, *settings)


def test_another_number_of_ranks_is_refused_before_the_model_is_loaded(unfinished, tmp_path, monkeypatch):
    """Here the checkpoint is one of two ranks."""
    shutil.rmtree(tmp_path / "run/checkpoints")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "Origin", lambda count, *rest: Origin(2, *rest))
        train_here(unfinished)
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "load_model", lambda *_: pytest.fail("the model was loaded"))
        with pytest.raises(UsageError, match=r"different are: world size \(2, now 1\)"):
            init_here(unfinished)
    said = []
    train_here(unfinished, allow_changes=True, say=said.append)
    assert "continuing although different are: world size (2, now 1)" in said
    assert read_state(checkpoints(tmp_path / "run")[0]).origin.world_size == 1


def recording(load, revisions):
    """`load`, which adds the commit that it is asked for to `revisions`."""
    return lambda config, *device: (revisions.append(config.revision), load(config, *device))[1]


def test_a_begun_run_stays_on_its_commit_and_another_one_is_refused(unfinished, tmp_path, monkeypatch):
    shutil.rmtree(tmp_path / "run/checkpoints")
    monkeypatch.setattr(prepare, "hub_commit", lambda config: "a" * 40)
    revisions = []
    for name in ("load_tokenizer", "load_model"):
        monkeypatch.setattr(prepare, name, recording(getattr(prepare, name), revisions))
    train_here(unfinished)
    assert json.loads((tmp_path / "run/environment.json").read_text())["model_revision"] == "a" * 40
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000004")
    monkeypatch.setattr(prepare, "hub_commit", lambda config: "b" * 40)  # the branch has moved on
    train_here(unfinished)
    assert revisions == ["a" * 40] * 4
    shutil.rmtree(tmp_path / "run/adapter")
    with pytest.raises(UsageError, match=r"model.revision \(commit a{40}, now b{40}\)"):
        train_here(unfinished, "model.revision=other")


def test_a_run_keeps_the_date_that_its_rows_tell(tmp_path, monkeypatch):
    """Llama 3.2's chat template tells the date."""
    model = shutil.copytree(quickstart.MODEL_DIR, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    chat = "{{ strftime_now('%d %b %Y') }}{% for m in messages %}\n{{ m.role }}: {{ m.content }}{% endfor %}"
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": chat}))
    messages = [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    changes = [f"model.name_or_path={model}", f"data.train=[{{path: '{tmp_path}/rows.jsonl'}}]"]
    changes += ["data.validation=null", "data.format=chat"]
    config = quickstart_config(tmp_path, max_steps="4")

    def set_day(day: int) -> None:
        now = datetime(2026, 3, day)
        monkeypatch.setattr(prepare, "datetime", SimpleNamespace(now=lambda: now, fromisoformat=datetime.fromisoformat))

    set_day(1)
    with pytest.raises(StoppedError):
        train_here(config, *changes, stop=StopAfter(2))
    set_day(2)
    for _ in range(2):  # what is written when it goes on is the first day too
        assert init_here(config, *changes).data.train_report.example[0][0].startswith("01 Mar 2026")
    assert train_here(config, *changes)["steps"] == 4
    anew = load_config(config, changes)
    assert prepare._moment(anew, overwrite=True) == datetime(2026, 3, 2)
    other = init_here(config, *changes, f"output_dir={tmp_path}/other")
    assert other.data.train_report.example[0][0].startswith("02 Mar 2026")


def test_the_commits_of_data_sets_are_kept(tmp_path, monkeypatch):
    prepare_data = prepare.prepare_data
    commits = {"owner/data": "c" * 40}
    monkeypatch.setattr(prepare, "prepare_data", lambda *given: replace(prepare_data(*given), revisions=commits))
    init_here(quickstart_config(tmp_path))
    assert json.loads((tmp_path / "run/environment.json").read_text())["data_revisions"] == commits


def test_what_does_not_touch_what_is_learned_may_change(unfinished):
    changes = ["logging_steps=3", "save_steps=1", "save_total_limit=5", "report_to=[tensorboard]"]
    changes += ["per_device_batch_size=1", "distributed=fsdp", "distributed_timeout_s=60"]
    config = load_config(unfinished, [f"train.{change}" for change in changes])
    assert changed_settings(config) == []
    assert not is_finished_run(config)


def test_a_run_is_loaded_on_the_commit_that_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "hub_commit", lambda config: "a" * 40)
    train_here(quickstart_config(tmp_path, max_steps="1"))
    revisions = []
    monkeypatch.setattr(target, "load_model", recording(target.load_model, revisions))
    target.load_target(target.find_target(str(tmp_path / "run")))
    assert revisions == ["a" * 40]


def test_an_evaluation_in_a_chat_template_that_is_not_there_is_told_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "load_model", lambda *_: pytest.fail("the model was loaded"))
    task = "eval.tasks=[{name: gsm8k, apply_chat_template: true}]"
    with pytest.raises(UsageError, match=r"eval\.tasks: gsm8k, apply_chat_template"):
        train_here(quickstart_config(tmp_path), task)


def test_a_base_that_was_a_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quickstart.MODEL_DIR, "base2")
    config = quickstart_config(tmp_path, max_steps="4", rows="16", extra=EXTRA)
    with pytest.raises(StoppedError):
        train_here(config, "model.name_or_path=base2", stop=StopAfter(3))
    (tmp_path / "base2").rename("moved")
    monkeypatch.setattr(prepare, "hub_commit", lambda config: pytest.fail("the hub was asked"))
    done = dude_here("train", config, "model.name_or_path=base2")
    assert done.returncode == 2
    assert "there is no folder `base2` here" in done.stderr
    assert "where: model.name_or_path: base2" in done.stderr
    monkeypatch.undo()
    done = dude_here("train", config, f"model.name_or_path={tmp_path / 'moved'}", "--allow-changes")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [("init",), ("init", "--estimate"), ("train",)], ids=" ".join)
def test_nor_is_that_of_a_run_that_was_prepared_alone(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quickstart.MODEL_DIR, "base2")
    config = quickstart_config(tmp_path, max_steps="1", rows="4")
    init_here(config, "model.name_or_path=base2")
    (tmp_path / "base2").rename("moved")
    for module, name in ((prepare, "hub_commit"), (forecast, "load_tokenizer")):
        monkeypatch.setattr(module, name, lambda config: pytest.fail("the hub was asked"))
    done = dude_here(*command, config, "model.name_or_path=base2")
    assert done.returncode == 2
    assert "there is no folder `base2` here, where the adapter's base model was" in done.stderr
    assert "fix:   put it back; or say where it is: model.name_or_path=FOLDER\n" in done.stderr
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    done = dude_here(*command, config, "model.name_or_path=moved")
    assert done.returncode == 0, done.stderr


def test_a_damaged_config_of_a_run_without_steps_is_written_anew(tmp_path):
    config = quickstart_config(tmp_path, max_steps="1", rows="4")
    init_here(config)
    written = tmp_path / "run/config.yaml"
    before = written.read_text()
    written.write_text("{")
    init_here(config)
    assert written.read_text() == before
