"""A training that continues from another's adapter starts exactly where that one ended."""

from __future__ import annotations

import json
import shutil

import pytest
from quickstart_config import quickstart_config
from safetensors.torch import load_file
from tiny_models import tiny_model
from training import StopAfter, init_here, train_here

from dude_cli.adapter import AdapterConfig, patch_model, read_adapter_config
from dude_cli.commands import training
from dude_cli.config import ADAPTER_FIXED as FIXED
from dude_cli.config import load_config
from dude_cli.console import Output
from dude_cli.errors import AdapterError, StoppedError, UsageError
from dude_cli.markup import escaped
from dude_cli.training import prepare, start
from dude_cli.training.init_from import resolve_init_from
from dude_cli.training.metrics import read_metrics
from dude_cli.training.smoke import smoke_config

TENSORS = "adapter/adapter.safetensors"
SETTINGS = "rank: 4, alpha: 8, rank_stabilized: true, target_modules: [q_proj, up_proj], exclude_modules: []"


def train(config, *, overwrite):
    options = {"smoke": False, "overwrite": overwrite, "allow_changes": False, "num_processes": None}
    training.train(config, [], **options, output=Output())


def continued(folder, source, *, adapter="", **changes):
    return quickstart_config(folder, adapter=f"{{init_from: '{source}'{adapter}}}", max_steps="4", **changes)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("first")
    train_here(quickstart_config(folder, adapter=f"{{method: dude, {SETTINGS}}}", max_steps="3"))
    return folder / "run"


@pytest.fixture
def source(first, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(first, tmp_path / "source")


def change(source):
    """Another adapter in the same place."""
    shutil.rmtree(source)
    config = quickstart_config(source.parent / "other", adapter=f"{{method: dude, {SETTINGS}}}", max_steps="1")
    train_here(config, f"output_dir={source}")


def result(run_dir) -> bytes:
    return (run_dir / TENSORS).read_bytes()


@pytest.mark.parametrize("method", ["dude", "dora", "pissa", "lora"])
def test_it_starts_where_the_other_ended_and_keeps_what_the_tensors_fix(method, tmp_path):
    one = quickstart_config(tmp_path / "one", adapter=f"{{method: {method}, {SETTINGS}}}", max_steps="3")
    before = train_here(one)
    two = continued(tmp_path / "two", tmp_path / "one/run", adapter=", dropout: 0.1, norm_gradient: exact")
    after = train_here(two)
    assert after["first_eval_loss"] == before["last_eval_loss"] != before["first_eval_loss"]
    assert after["last_eval_loss"] != after["first_eval_loss"]

    old, start, new = (load_file(tmp_path / folder / TENSORS) for folder in ("one/run", "two/run/initial", "two/run"))
    assert all(start[name].equal(old[name]) for name in old)
    assert all(new[name].equal(old[name]) for name in old if "initial" in name)
    assert not any(new[name].equal(old[name]) for name in old if "lora_B" in name)

    written = load_config(tmp_path / "two/run/config.yaml").adapter
    saved = read_adapter_config(tmp_path / "two/run/adapter").config
    for key in FIXED:
        wanted = getattr(load_config(one).adapter, key)
        assert getattr(written, key) == getattr(saved, key) == wanted
    assert (written.init_from, saved.init_from) == (str(tmp_path / "one/run"), None)
    assert (saved.dropout, saved.norm_gradient) == (0.1, "exact")
    sha256 = read_adapter_config(tmp_path / "one/run/adapter").sha256
    source = escaped(f"the adapter of {tmp_path / 'one/run'}, sha256 {sha256}")
    assert source in (tmp_path / "two/run/adapter/README.md").read_text()


def test_values_that_the_adapter_has_otherwise_are_named_all_at_once(first, tmp_path):
    other = ", method: lora, rank: 8, alpha: 8.0, target_modules: [up_proj, q_proj], exclude_modules: [down_proj]"
    with pytest.raises(UsageError) as error:
        resolve_init_from(load_config(continued(tmp_path, first, adapter=other)))
    for part in ("method is lora, and in the adapter dude", "rank is 8, and in the adapter 4", "['down_proj']"):
        assert part in error.value.what
    assert "alpha" not in error.value.what  # the same
    assert "target_modules" not in error.value.what  # in another order
    assert "leave out adapter.method, adapter.rank, adapter.exclude_modules:" in error.value.fix


def test_no_alpha_is_compared_as_the_rank_that_it_stands_for(tmp_path):
    train_here(quickstart_config(tmp_path / "one", max_steps="1"))
    for alpha in ("4", "null"):
        config = load_config(continued(tmp_path / "two", tmp_path / "one/run", adapter=f", alpha: {alpha}"))
        assert resolve_init_from(config).adapter.scaling == 1.0
    with pytest.raises(UsageError, match=r"alpha is 16.0, and in the adapter 4.0"):
        resolve_init_from(load_config(continued(tmp_path / "two", tmp_path / "one/run", adapter=", alpha: 16")))


def test_an_adapter_folder_and_a_checkpoint_will_do(first, tmp_path):
    shutil.copytree(first / "adapter", tmp_path / "somewhere")
    summary = train_here(continued(tmp_path, tmp_path / "somewhere"))
    assert summary["first_eval_loss"] == read_metrics(first)[-1]["eval_loss"]


def test_a_chat_template_that_is_not_taken_over_is_told(tmp_path):
    (tmp_path / "chat.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    row = {"messages": [{"role": "user", "content": "Ann"}, {"role": "assistant", "content": "12"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    chat = [f"data.train=[{{path: '{tmp_path}/rows.jsonl'}}]", "data.validation=null", "data.format=chat"]
    config = quickstart_config(tmp_path, max_steps="1", extra="  save_steps: 1")
    train_here(config, *chat, f"data.chat_template={tmp_path}/chat.jinja")
    saved = tmp_path / "run/adapter/chat_template.jinja"
    checkpoint = tmp_path / "run/checkpoints/step-000001/adapter"  # an adapter like any other
    assert (checkpoint / "chat_template.jinja").read_text() == saved.read_text()
    again = [*chat, f"adapter.init_from={tmp_path}/run", f"output_dir={tmp_path}/second"]
    said: list[str] = []
    with pytest.raises(UsageError, match="no chat template"):
        init_here(config, *again, say=said.append)
    assert any(f"data.chat_template={saved} takes that one" in line for line in said)
    said.clear()
    init_here(config, *again, f"data.chat_template={saved}", say=said.append)
    assert not any("another chat template" in line for line in said)


def test_the_config_that_a_run_writes_starts_it_again(first, tmp_path):
    init_here(continued(tmp_path, first))
    assert init_here(tmp_path / "run/config.yaml").reused


@pytest.mark.parametrize("fate", ["changed", "gone"])
def test_a_run_that_has_begun_goes_on_whatever_became_of_the_source(fate, source, tmp_path, capsys):
    whole, parts = (continued(tmp_path / name, source, extra="  save_steps: 1") for name in ("whole", "parts"))
    train_here(whole)
    with pytest.raises(StoppedError):
        train_here(parts, stop=StopAfter(2))
    change(source) if fate == "changed" else shutil.rmtree(source)
    train_here(parts)
    assert result(tmp_path / "parts/run") == result(tmp_path / "whole/run")
    train(parts, overwrite=False)
    assert "holds this run, finished" in capsys.readouterr().err
    if fate == "gone":
        with pytest.raises(UsageError, match="no folder"):
            training.train(
                parts, [], smoke=False, overwrite=True, allow_changes=False, num_processes=None, output=Output()
            )
        assert result(tmp_path / "parts/run") == result(tmp_path / "whole/run")


def test_a_run_without_steps_notices_a_changed_source(source, tmp_path):
    config = continued(tmp_path / "run_of", source)
    init_here(config)
    change(source)
    summary = train_here(config)
    assert summary["first_eval_loss"] == read_metrics(source)[-1]["eval_loss"]


def test_a_run_without_steps_takes_its_own_copy_of_a_source_that_is_gone(source, tmp_path):
    last = read_metrics(source)[-1]["eval_loss"]
    config = continued(tmp_path / "run_of", source)
    init_here(config)
    shutil.rmtree(source)
    assert train_here(config)["first_eval_loss"] == last


def test_a_start_that_is_not_the_adapter_is_refused_and_not_kept(first, tmp_path, monkeypatch):
    def other_scaling(config, **options):
        found = resolve_init_from(config, **options)
        return found.model_copy(update={"adapter": found.adapter.model_copy(update={"alpha": 9.0})})

    config = other_scaling(load_config(continued(tmp_path, first)))
    monkeypatch.setattr("training.resolve_init_from", lambda _: config)
    with pytest.raises(AdapterError, match="the start is not the adapter of"):
        train_here(tmp_path / "config.yaml")
    assert not (tmp_path / "run/initial").exists()


def test_a_patched_base_is_noticed_also_when_continuing(first, tmp_path, monkeypatch):
    def spoiling(self, *copy, take=start.Start._take_copy):
        take(self, *copy)
        self.model.lm_head.weight.data.mul_(1.01)

    monkeypatch.setattr(start.Start, "_take_copy", spoiling)
    with pytest.raises(AdapterError, match="not the base model with its adapters disabled"):
        train_here(continued(tmp_path, first))


def test_another_base_is_refused(first, tmp_path, monkeypatch):
    def other_model(config, *args, load=prepare.load_model):
        model = load(config, *args)
        model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
        return model

    monkeypatch.setattr(prepare, "load_model", other_model)
    with pytest.raises(AdapterError, match="whose weights are not those of") as error:
        train_here(continued(tmp_path, first))
    assert error.value.fix == "load embedded:quickstart at the same revision"  # a training has no --allow-other-base


def test_what_is_no_adapter_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "runs/gsm8k/adapter").mkdir(parents=True)
    (tmp_path / "runs/gsm8k/config.yaml").write_text("model: {}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "run/adapter"
    own.mkdir(parents=True)
    (own / "adapter_config.json").write_text("{}")
    for source, said in {
        "runs/gsm8": "no folder",
        "runs/gsm8k": "not finished",
        "model": "neither a run nor an adapter",
        "nowhere": "neither a run nor an adapter",
        "run/adapter": "from itself",
    }.items():
        with pytest.raises(UsageError, match=said) as error:
            resolve_init_from(load_config(continued(tmp_path, source)))
        assert error.value.where == f"adapter.init_from: {source}"
        assert error.value.fix


def test_smoke_leaves_it_out(tmp_path):
    assert smoke_config(load_config(continued(tmp_path, "nowhere"))).adapter.init_from is None


def test_the_home_folder_may_be_written_as_a_tilde(first, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(first.parent))
    assert resolve_init_from(load_config(continued(tmp_path, "~/run"))).adapter.init_from == str(first)


def test_patch_model_does_not_pass_over_it():
    with pytest.raises(UsageError, match="makes a new adapter"):
        patch_model(tiny_model("llama"), AdapterConfig(init_from="runs/one"))
