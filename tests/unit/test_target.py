"""A target is a run, an adapter or a model; without one, the newest finished run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from exporting import save_base, save_trained

from dude_cli.adapter import AdapterConfig
from dude_cli.config import Config, dump_config
from dude_cli.errors import AdapterError, UsageError
from dude_cli.target import AS_TRAINED, Loading, check_target, data_config, find_target, load_target, target_tokenizer
from dude_cli.training.smoke import smoke_config


def make_run(folder: Path, *, finished_at: int | None) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("model: {}\n")
    if finished_at is not None:
        make_adapter(folder / "adapter")
        os.utime(folder / "adapter" / "adapter_config.json", (finished_at, finished_at))
    return folder


def make_adapter(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"format_version": 1, **config}))
    return folder


def test_without_a_target_the_newest_finished_run_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("runs/old"), finished_at=1_000)
    make_run(Path("runs/sweep/new"), finished_at=3_000)
    make_run(Path("runs/middle"), finished_at=2_000)
    make_run(Path("runs/unfinished"), finished_at=None)
    stray = make_adapter(Path("runs/copied/adapter"))  # no config.yaml beside it: not a run
    os.utime(stray / "adapter_config.json", (9_000, 9_000))

    target = find_target(None)

    assert target.kind == "run"
    assert target.path == Path("runs/sweep/new")
    assert target.adapter_dir == Path("runs/sweep/new/adapter")
    assert "new" in str(target)


def make_smoke_run(folder: Path, *, finished_at: int) -> Path:
    values = {"model": {"name_or_path": "gpt2"}, "data": {"train": [{"path": "rows.jsonl"}]}}
    config = smoke_config(Config.model_validate(values | {"output_dir": str(folder)}))
    run = make_run(Path(config.output_dir), finished_at=finished_at)
    (run / "config.yaml").write_text(dump_config(config))
    return run


def test_a_smoke_run_is_taken_by_its_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    smoke = make_smoke_run(Path("runs/mine"), finished_at=9_000)
    with pytest.raises(UsageError, match=r"no finished run, but for those of --smoke"):
        find_target(None)
    make_run(Path("runs/real-smoke"), finished_at=1_000)  # a name says nothing
    assert find_target(None).path == Path("runs/real-smoke")
    assert find_target(str(smoke)).path == smoke


@pytest.mark.parametrize("make", ["nothing", "unfinished"])
def test_without_a_finished_run_the_error_says_what_to_do(
    tmp_path: Path, make: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if make == "unfinished":
        make_run(Path("runs/one"), finished_at=None)
    with pytest.raises(UsageError, match="dude train CONFIG") as caught:
        find_target(None)
    assert caught.value.exit_code == 2
    assert caught.value.where == "runs"


def test_the_three_kinds_of_folder(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished_at=1_000)
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")

    assert find_target(str(run)).kind == "run"
    adapter = find_target(str(run / "adapter"))
    assert (adapter.kind, adapter.adapter_dir) == ("adapter", run / "adapter")
    plain = find_target(str(model))
    assert (plain.kind, plain.path, plain.adapter_dir) == ("model", model, None)


@pytest.mark.parametrize("name", ["gpt2", "meta-llama/Llama-2-7b-hf", "embedded:quickstart"])
def test_names_that_are_no_folder_are_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    target = find_target(name)
    assert (target.kind, target.name, target.path) == ("model", name, None)


def test_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished_at=None)
    with pytest.raises(UsageError, match=r"not finished.*\n.*\n.*dude train"):
        find_target(str(run))


def test_a_runs_adapters_are_asked_in_the_form_of_the_run(tmp_path: Path) -> None:
    """That of a checkpoint too, and the best one; not one that was put somewhere else."""
    run = make_smoke_run(tmp_path / "run", finished_at=1_000)
    (run / "environment.json").write_text("{}")
    for name in ("checkpoints/step-000002/adapter", "best"):
        make_adapter(run / name)
    stray = make_adapter(tmp_path / "adapter")
    data = data_config(find_target(str(run)))
    assert data is not None
    for name in ("adapter", "checkpoints/step-000002", "checkpoints/step-000002/adapter", "best"):
        assert data_config(find_target(str(run / name))) == data
    assert data_config(find_target(str(stray))) is None


def test_an_unfinished_run_has_checkpoints_that_can_be_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished_at=None)
    for name in ("step-000002", "step-999999", "step-1000000", "step-2000000.broken"):
        make_adapter(run / "checkpoints" / name / "adapter")
    newest = run / "checkpoints" / "step-1000000"
    with pytest.raises(UsageError) as error:
        find_target(str(run))
    assert (error.value.fix or "").endswith(f"; or give its newest checkpoint, {newest}")
    assert find_target(str(newest)).adapter_dir == newest / "adapter"


def test_the_advice_to_finish_a_run_leads_to_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "runs" / "a b", finished_at=None)
    (run / "config.yaml").write_text(
        "model: {name_or_path: m}\ndata: {train: [{path: x}], completion: '{a}'}\noutput_dir: runs/a b\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"`dude train 'runs/a b/config.yaml'`$"):
        find_target("runs/a b")
    monkeypatch.chdir(tmp_path / "runs")
    with pytest.raises(UsageError, match=r"`dude train 'a b/config.yaml' 'output_dir=a b'`$"):
        find_target("a b")


def test_an_adapter_in_pefts_format_is_refused(tmp_path: Path) -> None:
    target = find_target(str(make_adapter(tmp_path / "peft", peft_type="LORA")))
    with pytest.raises(AdapterError, match=r"PEFT's format \(peft_type LORA\)") as error:
        load_target(target)
    assert error.value.fix


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = make_run(tmp_path / "run", finished_at=1_000)
    assert find_target("~/run").path == run
    with pytest.raises(UsageError, match="no folder"):
        find_target("~nobody-of-this-name/run")


def test_a_folder_of_nothing_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a run, nor an adapter, nor a model"):
        find_target(str(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        find_target(str(tmp_path / "file"))


def test_a_mistyped_run_is_not_taken_for_a_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs" / "gsm8k", finished_at=1_000)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no folder `runs/gsm8`(.|\n)*runs/gsm8k"):
        find_target("runs/gsm8")
    with pytest.raises(UsageError, match="no folder"):
        find_target("./gsm8k")


def test_a_base_that_was_a_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one from the hub the adapter has the commit, or the hub's cache has its files."""
    monkeypatch.chdir(tmp_path)
    save_trained(Path("adapter"), save_base(Path("base2"), "llama"), AdapterConfig(rank=2))
    target = find_target("adapter")
    check_target(target, AS_TRAINED)
    Path("base2").rename("moved")
    asked: list[str] = []
    for name in ("load_model", "load_tokenizer", "saved_dtype"):
        monkeypatch.setattr(f"dude_cli.target.{name}", lambda config, *_: asked.append(config.name_or_path))
    for use in (check_target, load_target, target_tokenizer):
        with pytest.raises(UsageError, match="there is no folder `base2` here") as error:
            use(target, AS_TRAINED)
        assert error.value.where == f"{tmp_path}: base2"
        assert error.value.fix == "put it back; or say where it is: --base-model FOLDER, or its name on the hub"
    assert not asked
    check_target(target, Loading(base_model="moved"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "cache/config.json")
    check_target(target, AS_TRAINED)
    assert asked == ["moved", "base2"]
