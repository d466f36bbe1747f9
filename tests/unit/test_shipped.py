from __future__ import annotations

from pathlib import Path

import pytest

from dude_cli import shipped
from dude_cli.config.read import load_config
from dude_cli.errors import UsageError

CONFIGS = [name for name, _ in shipped.list_shipped() if name.startswith("configs/")]


def test_the_four_configs_are_shipped_with_a_description() -> None:
    listed = dict(shipped.list_shipped())
    assert {"configs/quickstart.yaml", "configs/gsm8k.yaml", "configs/mmlu.yaml", "configs/commonsense.yaml"} <= set(
        listed
    )
    assert all(len(description) > 20 for description in listed.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_loads_from_any_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(Path(name))
    assert config.output_dir == f"runs/{Path(name).stem}"
    assert config.eval.tasks


def test_a_file_of_that_name_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped.copy_shipped("configs/gsm8k.yaml", tmp_path / "gsm8k.yaml")
    (tmp_path / "configs").mkdir()
    mine = (tmp_path / "gsm8k.yaml").read_text(encoding="utf-8").replace("rank: 128", "rank: 4")
    (tmp_path / "configs" / "gsm8k.yaml").write_text(mine, encoding="utf-8")
    assert load_config(Path("configs/gsm8k.yaml")).adapter.rank == 4


def test_gsm8k_is_the_published_setting() -> None:
    config = load_config(Path("configs/gsm8k.yaml"))
    assert (config.adapter.rank, config.adapter.scaling, config.adapter.method) == (128, 1.0, "dude")
    assert len(config.adapter.target_modules) == 7
    train = config.train
    assert (train.learning_rate, train.global_batch_size, train.num_train_epochs) == (2e-5, 128, 1)
    assert (train.lr_scheduler_type, train.warmup_ratio, train.weight_decay) == ("cosine", 0.03, 0)
    assert config.data.train[0].split == "train[:100000]"
    assert (config.data.max_length, config.data.shuffle) == (512, True)  # PiSSA's train.py shuffles
    assert config.data.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{query}\n\n### Response:"
    )
    assert config.data.completion == "{response}\n"


def test_copy_goes_into_a_folder_or_to_a_new_name(tmp_path: Path) -> None:
    source = shipped.find_shipped("configs/mmlu.yaml")
    assert source is not None
    assert shipped.copy_shipped("configs/mmlu.yaml", tmp_path) == tmp_path / "mmlu.yaml"
    assert shipped.copy_shipped("configs/mmlu.yaml", tmp_path / "mine.yaml") == tmp_path / "mine.yaml"
    assert (tmp_path / "mine.yaml").read_bytes() == source.read_bytes()


def test_copy_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mmlu.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match="exists already"):
        shipped.copy_shipped("configs/mmlu.yaml", tmp_path)
    assert (tmp_path / "mmlu.yaml").read_text(encoding="utf-8") == "mine"


def test_copy_of_an_unknown_name_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"did you mean configs/gsm8k\.yaml"):
        shipped.copy_shipped("configs/gms8k.yaml", tmp_path)


def test_copy_into_a_missing_folder_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the copy"):
        shipped.copy_shipped("configs/mmlu.yaml", tmp_path / "no" / "such.yaml")


def test_an_installed_package_has_its_configs_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dude_cli" / "configs").mkdir(parents=True)
    (tmp_path / "dude_cli" / "configs" / "a.yaml").write_text("# An a.\n", encoding="utf-8")
    (tmp_path / "configs").mkdir()  # another package's folder of that name
    (tmp_path / "configs" / "b.yaml").write_text("# A b.\n", encoding="utf-8")
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "dude_cli")
    assert shipped.list_shipped() == [("configs/a.yaml", "An a.")]
