"""The command line as a user meets it: help, exit codes, errors of four parts, clean output."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command import dude, dude_here, environment

from dude_cli.console import Output
from dude_cli.errors import NumberNotMetError

ROOT = Path(__file__).parents[2]


def test_help_lists_the_verbs_without_importing_torch():
    """Imports are what costs time: torch alone takes seconds."""
    code = (
        "import sys\nsys.argv = ['dude', '--help']\nfrom dude_cli.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'lm_eval', 'numpy', 'pydantic', 'yaml'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert "HEAVY []" in done.stdout
    for verb in ("init", "train", "eval", "generate", "ls", "cp"):
        assert f" {verb} " in done.stdout


@pytest.mark.parametrize("verb", ["init", "train", "eval", "generate", "ls", "cp"])
def test_every_verb_has_help_and_the_common_options(verb):
    done = dude(verb, "--help")
    assert done.returncode == 0
    for option in ("--json", "--quiet", "--debug"):
        assert option in done.stdout


def test_a_config_error_needs_no_torch():
    code = (
        "import sys\nsys.argv = ['dude', 'train', 'nowhere.yaml']\nfrom dude_cli.__main__ import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print('EXIT', stop.code)\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert "EXIT 2" in done.stdout
    assert "HEAVY []" in done.stdout


def test_all_config_problems_come_at_once_with_their_lines(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {name_or_path: x}\nadapter:\n  lora_r: 8\n  method: doda\ndata: {train: [{path: y}]}\n"
        "train:\n  learnin_rate: 1e-4\n  warmup_ratio: 3\n"
    )
    done = dude("train", "c.yaml", "train.max_steps=x", cwd=tmp_path)
    assert done.returncode == 2
    for part in (
        "c.yaml:3:3",
        "adapter.rank",
        "c.yaml:4:",
        "dude",
        "c.yaml:7:3",
        "learning_rate",
        "c.yaml:8:",
        "max_steps",
    ):
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def config(tmp_path: Path, model: str, data: str, **lines: str) -> Path:
    extra = "".join(f"{key}: {value}\n" for key, value in lines.items())
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {{name_or_path: '{model}', dtype: float32}}\ndata: {{train: [{{path: '{data}'}}]}}\n"
        f"train: {{max_steps: 1, global_batch_size: 2}}\noutput_dir: run\n{extra}"
    )
    return path


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "one and", "completion": " two"}\n' * 4)
    return path


def refused(tmp_path: Path, done: subprocess.CompletedProcess[str], code: int, *parts: str) -> None:
    """An error with the documented code, all parts, no traceback, and nothing left behind."""
    assert done.returncode == code, done.stderr
    for part in (*parts, "where:", "fix:"):
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_no_model(tmp_path, rows):
    (tmp_path / "empty").mkdir()
    done = dude_here("train", config(tmp_path, str(tmp_path / "empty"), str(rows)), cwd=tmp_path)
    refused(tmp_path, done, 2, "no config.json")


def test_a_hub_model_while_offline(tmp_path, rows):
    done = dude("train", config(tmp_path, "meta-llama/Llama-2-7b-hf", str(rows)), cwd=tmp_path)
    refused(tmp_path, done, 2, "meta-llama/Llama-2-7b-hf", "hf download")


def test_a_missing_data_file(tmp_path):
    done = dude_here("train", config(tmp_path, "embedded:quickstart", "nowhere.jsonl"), cwd=tmp_path)
    refused(tmp_path, done, 2, "nowhere.jsonl")


def test_a_missing_column_names_those_that_are_there(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    done = dude_here("train", config(tmp_path, "embedded:quickstart", "rows.jsonl"), cwd=tmp_path)
    refused(tmp_path, done, 2, "prompt", "question", "answer")


def test_empty_data(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    done = dude_here("train", config(tmp_path, "embedded:quickstart", "rows.jsonl"), cwd=tmp_path)
    refused(tmp_path, done, 2, "rows.jsonl")


def test_a_rank_too_large(tmp_path, rows):
    path = config(tmp_path, "embedded:quickstart", str(rows), adapter="{rank: 100000}")
    refused(tmp_path, dude_here("train", path, cwd=tmp_path), 2, "rank 100000", "at most")


def test_a_target_that_is_no_layer(tmp_path, rows):
    path = config(tmp_path, "embedded:quickstart", str(rows), adapter="{target_modules: [qproj]}")
    refused(tmp_path, dude_here("init", path, cwd=tmp_path), 2, "qproj", "q_proj")


def test_an_unknown_task_suggests_the_nearest():
    done = dude_here("eval", "embedded:quickstart", "--task", "gsm8")
    assert done.returncode == 2
    assert "gsm8k" in done.stderr
    assert "Traceback" not in done.stderr


def test_eval_without_a_run_says_what_to_do(tmp_path):
    done = dude_here("eval", "--task", "gsm8k", cwd=tmp_path)
    assert done.returncode == 2
    assert "dude train" in done.stderr


def test_a_run_is_scored_into_one_strict_document_and_refused_on_another_base(tmp_path, rows):
    done = dude_here("train", config(tmp_path, "embedded:quickstart", str(rows)), "adapter.rank=2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = dude_here("eval", "run", "--task", "quickstart_choices", "--limit", "1", "--base", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert "samples" not in document
    assert "samples" not in document["base"]
    assert document["n-samples"]["quickstart_choices"]["effective"] == 1
    names = {path.name for path in (tmp_path / "run/eval").iterdir()}  # a full score would have kept its own file
    samples = {f"samples_quickstart_choices.limit-1{side}.jsonl" for side in ("", ".base")}
    assert names == {"quickstart_choices.limit-1.json", *samples}
    assert "Custom kwargs" not in done.stderr

    saved = tmp_path / "run/adapter/adapter_config.json"
    content = json.loads(saved.read_text())
    content["base_model"]["fingerprint"] = "0" * 64
    saved.write_text(json.dumps(content))
    done = dude_here("eval", tmp_path / "run", "--task", "quickstart_choices", "--limit", "2", cwd=tmp_path)
    assert done.returncode == 3
    assert "whose weights are not those of" in done.stderr


def test_debug_shows_the_traceback():
    done = dude("train", "nowhere.yaml", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_usage_error_has_exit_code_2():
    assert dude("trian").returncode == 2
    assert dude("train").returncode == 2


@pytest.mark.parametrize("option", ["--train.max_steps=3", "--max_steps 3", "--max-steps 3"])
def test_an_option_that_is_a_key_is_told_how_to_be_written(option):
    done = dude_here("train", "configs/gsm8k.yaml", *option.split())
    assert done.returncode == 2
    assert "write `train.max_steps=3`" in done.stderr
    assert "fix:" not in dude_here("train", "configs/gsm8k.yaml", "--overwritee").stderr
    assert "fix:" not in dude_here("ls", *option.split()).stderr


@pytest.mark.parametrize(
    ("option", "fix"),
    [
        ("-rank 8", "write `adapter.rank=8`"),
        ("-rank=8", "write `adapter.rank=8`"),
        ("-r 8", "write `adapter.rank=8`"),
        ("-rx 8", None),
        ("-qz", None),
    ],
)
def test_an_unknown_option_with_one_dash_is_a_usage_error(option, fix):
    """Such an option is several of one letter, of which click names the first."""
    done = dude_here("train", "configs/gsm8k.yaml", *option.split())
    assert done.returncode == 2, done.stderr
    assert "No such option" in done.stderr
    assert ("fix:" in done.stderr) == (fix is not None)
    assert fix is None or fix in done.stderr


def error_of(*arguments: object, code: int, cwd: Path | None = None) -> dict[str, Any]:
    """The document that a command prints which fails; what it says to a person is on standard error."""
    done = dude_here(*arguments, "--json", cwd=cwd)
    assert done.returncode == code, done.stderr
    error = json.loads(done.stdout)["error"]
    assert error["exit_code"] == code
    assert error["what"] in done.stderr.replace("\n│ ", "")
    return error


def test_an_error_is_a_document_too(tmp_path, rows, monkeypatch):
    path = config(tmp_path, "embedded:quickstart", str(rows))
    for verb in ("init", "train"):
        problems = error_of(verb, path, "train.max_steps=x", "seed=-1", code=2)["problems"]
        assert [problem["override"] for problem in problems] == ["train.max_steps=x", "seed=-1"]
    path.write_text(path.read_text() + "sed: 1\n")
    (problem,) = error_of("init", path, code=2)["problems"]
    assert (problem["file"], problem["line"], problem["column"]) == (str(path), len(path.read_text().splitlines()), 1)
    error = error_of("eval", "--task", "quickstart_choices", code=2, cwd=tmp_path)
    assert error == {
        "what": "there is no finished run",
        "where": "runs",
        "fix": "train one with `dude train CONFIG`, or name a run, an adapter or a model",
        "exit_code": 2,
    }
    error_of("generate", "--prompt", "x", code=2, cwd=tmp_path)
    error_of("export", "nothing", "out", "--format", "peft", code=2, cwd=tmp_path)
    error_of("import", "nothing", "out", code=3, cwd=tmp_path)
    error_of("report", "nothing", code=2, cwd=tmp_path)
    error_of("reproduce", "nothing.yaml", code=2, cwd=tmp_path)
    error_of("cp", "nothing", "out", code=2, cwd=tmp_path)
    assert error_of("train", "c.yaml", "--max_steps", "3", code=2)["fix"].startswith("write `train.max_steps=3`")
    error_of("export", code=2)
    monkeypatch.setattr("dude_cli.shipped.list_shipped", lambda: 1 / 0)
    assert error_of("ls", code=1)["fix"] == "please report the lines above"


def test_after_a_result_an_error_is_told_to_a_person_alone(monkeypatch):
    def list_then_fail(output: Output) -> None:
        output.result("", {"listed": []})
        raise NumberNotMetError("not met")

    monkeypatch.setattr("dude_cli.commands.listing.list_shipped", list_then_fail)
    done = dude_here("ls", "--json")
    assert (done.returncode, json.loads(done.stdout)) == (6, {"listed": []})
    assert "not met" in done.stderr


def test_the_version_is_the_packages():
    done = dude("--version")
    assert (done.returncode, done.stdout) == (0, f"dude {importlib.metadata.version('dude-cli')}\n")


def test_ls_and_cp(tmp_path):
    listed = json.loads(dude("ls", "--json").stdout)
    names = [entry["name"] for entry in listed]
    assert {"configs/quickstart.yaml", "configs/gsm8k.yaml", "configs/mmlu.yaml", "configs/commonsense.yaml"} <= set(
        names
    )
    assert all(entry["description"] for entry in listed)
    assert dude("cp", "configs/gsm8k.yaml", tmp_path).returncode == 0
    assert (tmp_path / "gsm8k.yaml").read_text() == (ROOT / "configs/gsm8k.yaml").read_text()
    again = dude("cp", "configs/gsm8k.yaml", tmp_path)
    assert again.returncode == 2
    assert "exists already" in again.stderr


@pytest.mark.parametrize("name", ["gsm8k", "mmlu", "commonsense"])
def test_shipped_configs_run_in_smoke_form_offline(name, tmp_path):
    done = dude_here("train", f"configs/{name}.yaml", "--smoke", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 3


def test_a_quiet_evaluation_prints_the_scores_alone(tmp_path):
    """lm-eval prints a line and draws a bar for each error that it bootstraps, such as a perplexity's."""
    task = ("--task", "quickstart_base", "--limit", "4", "--output", tmp_path / "out")
    done = dude_here("eval", "embedded:quickstart", *task, "--quiet", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"]["quickstart_base"]["perplexity_stderr,none"] > 0
    assert done.stderr == ""


def test_quiet_leaves_warnings(tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "How many?", "completion": ""}\n' * 2)
    done = dude_here(
        "init", config(tmp_path, "embedded:quickstart", str(rows)), "adapter.rank=2", "--quiet", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: data.train: 2 of 2 rows have an empty answer")
    assert done.stderr.count("\n") == 1


def test_quiet_prints_the_result_alone(tmp_path, rows):
    done = dude(
        "init", config(tmp_path, "embedded:quickstart", str(rows)), "adapter.rank=2", "--quiet", "--json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["plan"]["total_steps"] == 1
    assert done.stderr == ""
