"""lm-eval's official gsm8k and mmlu on local copies of the real data, with a small real model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dude_cli.adapter import AdapterConfig, patch_model
from dude_cli.config import EvalTask
from dude_cli.errors import UsageError
from dude_cli.evaluation import EvalRequest, evaluate, results_table

GSM8K = EvalTask(name="gsm8k", num_fewshot=1, limit=3)
ANATOMY = EvalTask(name="mmlu_anatomy", num_fewshot=1, limit=4)
IN_CHAT = {"apply_chat_template": True}
# A template with BOS, roles, and the date, as Llama 3's have them.
TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}\n"
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A model this small is many times slower on several threads when other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_dir(test_data: Path) -> Path:
    return test_data / "models" / "stories260K"


@pytest.fixture
def model(model_dir: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)


@pytest.fixture
def tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model_dir)


def patched(model: PreTrainedModel) -> PreTrainedModel:
    """`model` with an adapter that has moved: a stand-in for training that changes answers."""
    patch_model(model, AdapterConfig(method="dude", rank=4))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def directly(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path, folder: Path, task: EvalTask
) -> dict[str, Any]:
    """What lm-eval itself gives for the same questions."""
    benchmark = task.name.partition("_")[0]
    official = "gsm8k/gsm8k.yaml" if benchmark == "gsm8k" else f"mmlu/default/{task.name}.yaml"
    config: dict[str, Any] = {
        "include": str(Path(lm_eval.tasks.__file__).parent / official),
        "dataset_path": str(test_data / benchmark),
    }
    if benchmark == "gsm8k":
        config["fewshot_config"] = {"sampler": "first_n"}
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(config))
    return lm_eval.simple_evaluate(
        apply_chat_template=task.apply_chat_template,
        fewshot_as_multiturn=task.apply_chat_template,
        system_instruction=task.system_instruction,
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=[task.name],
        task_manager=lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False),
        num_fewshot=task.num_fewshot,
        limit=task.limit,
    )


@pytest.mark.parametrize("task", [GSM8K, ANATOMY], ids=lambda task: task.name)
def test_prompts_and_scores_are_those_of_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path, tmp_path: Path, task: EvalTask
) -> None:
    theirs = directly(model, tokenizer, test_data, tmp_path, task)
    ours = evaluate(model, tokenizer, EvalRequest((task,), data_dir=test_data))

    assert ours["results"] == theirs["results"]
    assert ours["versions"] == theirs["versions"]
    assert ours["n-shot"] == theirs["n-shot"]
    assert ours["n-samples"] == theirs["n-samples"]
    for key in ("prompt_hash", "doc_hash", "target_hash", "resps", "filtered_resps", "filter"):
        assert [s[key] for s in ours["samples"][task.name]] == [s[key] for s in theirs["samples"][task.name]], key
    for key in ("generation_kwargs", "filter_list", "metric_list", "doc_to_text", "output_type", "description"):
        assert ours["configs"][task.name].get(key) == theirs["configs"][task.name].get(key), key


@pytest.mark.parametrize("system", [None, "Answer briefly."], ids=["", "with system"])
@pytest.mark.parametrize("task", [GSM8K, ANATOMY], ids=lambda task: task.name)
def test_in_the_chat_template_too_they_are_those_of_lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    test_data: Path,
    tmp_path: Path,
    task: EvalTask,
    system: str | None,
) -> None:
    task = task.model_copy(update={**IN_CHAT, "system_instruction": system})
    tokenizer.chat_template = TEMPLATE
    ours = evaluate(model, tokenizer, EvalRequest((task,), data_dir=test_data))
    assert tokenizer.chat_template == TEMPLATE
    # lm-eval's own run tells a template the present day.
    tokenizer.chat_template = TEMPLATE.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    theirs = directly(model, tokenizer, test_data, tmp_path, task)

    prompt = ours["prompt_examples"][task.name]
    assert prompt.startswith("<s>26 Jul 2024\n<" + (f"system>{system}" if system else ""))
    assert prompt.endswith("<assistant>")
    assert prompt.count("</assistant>") == 1  # the example's answer is a turn
    assert ours["results"] == theirs["results"]
    for key in ("prompt_hash", "doc_hash", "target_hash", "resps", "filtered_resps", "filter"):
        assert [s[key] for s in ours["samples"][task.name]] == [s[key] for s in theirs["samples"][task.name]], key


@pytest.mark.parametrize("change", ["refused", "not looked at", "written"])
def test_a_description_that_the_chat_template_leaves_out_is_told(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path, change: str
) -> None:
    without = "{% if m.role == 'system' %}" + ("{{ raise_exception('no') }}" if change == "refused" else "")
    tokenizer.chat_template = TEMPLATE
    if change != "written":
        tokenizer.chat_template = TEMPLATE.replace("<{{ m.role }}>", without + "{% else %}<{{ m.role }}>", 1).replace(
            "{% endfor %}", "{% endif %}{% endfor %}"
        )
    told: list[str] = []
    request = EvalRequest((ANATOMY.model_copy(update={**IN_CHAT, "limit": 1}),), data_dir=test_data)
    results = evaluate(model, tokenizer, request, log=told.append)
    description = "The following are multiple choice questions"
    assert (description in results["prompt_examples"]["mmlu_anatomy"]) == (change == "written")
    assert any("its description is left out" in line for line in told) == (change != "written")


def test_the_whole_of_mmlu(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path) -> None:
    messages: list[str] = []
    request = EvalRequest((EvalTask(name="mmlu", num_fewshot=1, limit=1),), data_dir=test_data)
    results = evaluate(model, tokenizer, request, log=messages.append)

    subjects = [name for name in results["results"] if name not in results["groups"]]
    assert len(subjects) == 57
    assert set(results["groups"]) == {"mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"}
    assert results["groups"]["mmlu"]["sample_len"] == 57
    assert results["groups"]["mmlu"]["acc,none"] == pytest.approx(
        np.mean([results["results"][name]["acc,none"] for name in subjects])
    )
    assert results["n-shot"]["mmlu"] == 1
    assert "scoring mmlu: 57 questions" in messages
    labels = [str(cell).strip() for cell in results_table(results).columns[0].cells]
    assert labels == ["mmlu", "stem", "other", "social sciences", "humanities"]


def test_base_beside_tuned(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path) -> None:
    task = EvalTask(name="mmlu_anatomy", num_fewshot=1, limit=12)
    plain = evaluate(model, tokenizer, EvalRequest((task, GSM8K), data_dir=test_data))
    patched(model)
    results = evaluate(model, tokenizer, EvalRequest((task, GSM8K), data_dir=test_data, compare_base=True))

    def answers(part: dict[str, Any]) -> list[Any]:
        return [sample["resps"] for name in ("mmlu_anatomy", "gsm8k") for sample in part["samples"][name]]

    assert answers(results["base"]) == answers(plain)  # bit for bit: log-likelihoods and texts
    assert answers(results) != answers(plain)
    assert results["base"]["results"] == plain["results"]
    assert results["prompt_hashes"] == plain["prompt_hashes"]

    pairs = zip(results["base"]["samples"]["mmlu_anatomy"], results["samples"]["mmlu_anatomy"], strict=True)
    change = np.array([after["acc"] - before["acc"] for before, after in pairs])
    assert len(set(change)) > 1
    found = results["difference"]["mmlu_anatomy"]
    assert found["acc,none"] == pytest.approx(change.mean())
    assert found["acc_stderr,none"] == pytest.approx(change.std(ddof=1) / math.sqrt(12))


def test_a_plain_model_has_no_base_to_compare_with(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path
) -> None:
    with pytest.raises(UsageError, match="no adapter"):
        evaluate(model, tokenizer, EvalRequest((ANATOMY,), data_dir=test_data, compare_base=True))


def test_model_tokenizer_and_environment_are_left_as_they_were(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path
) -> None:
    patched(model).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tokenizer.pad_token = None
    tokenizer.padding_side = "right"
    environment = dict(os.environ)

    evaluate(model, tokenizer, EvalRequest((ANATOMY, GSM8K), data_dir=test_data, compare_base=True))

    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tokenizer.pad_token, tokenizer.padding_side) == (None, "right")
    assert dict(os.environ) == environment


def test_prompts_that_are_cut_are_counted(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path
) -> None:
    biology = EvalTask(name="mmlu_high_school_biology", num_fewshot=1, limit=12)

    def rows(file: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (test_data / file).read_text(encoding="utf-8").splitlines()]

    def question(row: dict[str, Any]) -> str:
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", row["choices"], strict=True))
        return f"{row['question'].strip()}\n{choices}\nAnswer:"

    def length(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    # Written out by hand from the benchmarks' definition: the answer is " A", of which the last token is not fed.
    example = rows("mmlu/dev/high_school_biology.jsonl")[0]
    head = "The following are multiple choice questions (with answers) about high school biology.\n\n"
    start = f"{head}{question(example)} {'ABCD'[example['answer']]}\n\n"
    lengths = [
        length(start + question(row) + " A") for row in rows("mmlu/test/high_school_biology.jsonl")[: biology.limit]
    ]
    context = sorted(lengths)[6] - 1  # one prompt just fits
    cut = sum(n > context + 1 for n in lengths)
    assert 0 < cut < 6

    shot = rows("gsm8k/train.jsonl")[0]
    start = f"Question: {shot['question']}\nAnswer: {shot['answer']}\n\n"
    texts = [f"{start}Question: {row['question']}\nAnswer:" for row in rows("gsm8k/test.jsonl")[: GSM8K.limit]]
    room = context - min(256, context // 2)

    model.config.max_position_embeddings = context
    messages: list[str] = []
    request = EvalRequest((biology, GSM8K), data_dir=test_data)
    results = evaluate(model, tokenizer, request, log=messages.append)

    assert results["prompts_cut"][biology.name] == cut
    assert results["prompts_cut"]["gsm8k"] == sum(length(text) > room for text in texts) > 0
    assert f"{biology.name}: {cut} prompts lost their start to fit the context of {context} tokens" in messages


@pytest.mark.parametrize(("context", "used"), [(512, 256), (300, 150)])
def test_answers_are_shortened_only_where_the_context_cannot_hold_them(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path, context: int, used: int
) -> None:
    model.config.max_position_embeddings = context
    results = evaluate(model, tokenizer, EvalRequest((GSM8K,), data_dir=test_data))
    assert results["max_gen_toks"] == {"gsm8k": {"official": 256, "used": used}}
    assert results["configs"]["gsm8k"]["generation_kwargs"].get("max_gen_toks", 256) == used
    lengths = [len(tokenizer(s["resps"][0][0])["input_ids"]) for s in results["samples"]["gsm8k"]]
    assert max(lengths) <= used + 2  # a text may be cut into a token or two more than it was generated in


def test_the_batch_size_is_used_and_the_result_says_what_was_done(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path
) -> None:
    batches: list[int] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    request = EvalRequest((GSM8K, ANATOMY), data_dir=test_data, batch_size=3)
    results = evaluate(model, tokenizer, request, adapter_sha256="abc")
    assert max(batches) == 3
    assert results["fewshot_sampler"]["gsm8k"].startswith("first_n (set by dude")
    assert results["fewshot_sampler"]["mmlu_anatomy"] == "first_n"
    assert results["adapter_sha256"] == "abc"
    assert results["config"]["batch_size"] == 3
    assert results["config"]["model_dtype"] == "torch.float32"
    assert list(results["requested"]) == ["gsm8k", "mmlu_anatomy"]


def test_two_evaluations_agree(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test_data: Path) -> None:
    request = EvalRequest((GSM8K, ANATOMY), data_dir=test_data)
    first, second = (evaluate(model, tokenizer, request) for _ in range(2))
    changing = {"date", "total_evaluation_time_seconds"}
    assert {k: v for k, v in first.items() if k not in changing} == {
        k: v for k, v in second.items() if k not in changing
    }


OFFLINE_SCRIPT = """
import socket, sys
from pathlib import Path

def refuse(self, address, *rest):
    if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1"):
        print("CONNECTED", address, file=sys.stderr)
        raise OSError(f"no network in this test: {address}")
    return connect(self, address, *rest)

def refuse_lookup(host, *rest, **more):
    print("LOOKED UP", host, file=sys.stderr)
    raise socket.gaierror("no network in this test")

connect = socket.socket.connect
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse_lookup

from transformers import AutoModelForCausalLM, AutoTokenizer
from dude_cli.config import EvalTask
from dude_cli.errors import UsageError
from dude_cli.evaluation import EvalRequest, evaluate, results_json

data = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(data / "models/stories260K", local_files_only=True)
tokenizer = AutoTokenizer.from_pretrained(data / "models/stories260K", local_files_only=True)
tasks = (EvalTask(name="gsm8k", num_fewshot=1, limit=2), EvalTask(name="mmlu_anatomy", num_fewshot=1, limit=2))
with_data = EvalRequest(tasks, data_dir=data if sys.argv[2] == "data" else None)
try:
    sys.stdout.write(results_json(evaluate(model, tokenizer, with_data)))
except UsageError as error:
    sys.exit(str(error))

# A data dir means no network, for a task whose data are not in it too.
folder = Path(sys.argv[3])
folder.mkdir()
(folder / "elsewhere.yaml").write_text("{task: elsewhere, dataset_path: openai/gsm8k, dataset_name: main}")
elsewhere = EvalRequest((EvalTask(name="elsewhere"),), data_dir=data, include_paths=(folder,))
try:
    evaluate(model, tokenizer, elsewhere)
except UsageError as error:
    print("ELSEWHERE", error, file=sys.stderr)
"""


def run_offline(test_data: Path, cache: Path, how: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    return subprocess.run(
        [sys.executable, "-c", OFFLINE_SCRIPT, str(test_data), how, str(cache / "tasks")],
        env={**kept, "HF_HOME": str(cache), "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "variables", [{}, {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}], ids=["unset", "offline"]
)
def test_no_connection_is_tried_and_stdout_is_one_document(
    test_data: Path, tmp_path: Path, variables: dict[str, str]
) -> None:
    done = run_offline(test_data, tmp_path, "data", **variables)
    assert done.returncode == 0, done.stderr
    assert "CONNECTED" not in done.stderr
    assert "LOOKED UP" not in done.stderr
    assert "ELSEWHERE the data of the task `elsewhere` are not on this machine" in done.stderr
    document = json.loads(done.stdout)
    assert set(document["results"]) == {"gsm8k", "mmlu_anatomy"}
    assert "building contexts" not in done.stderr.lower()
    assert "WARNING" not in done.stderr


def test_offline_without_a_copy_the_error_comes_at_once(test_data: Path, tmp_path: Path) -> None:
    done = run_offline(test_data, tmp_path, "nothing", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "gsm8k" in done.stderr
    assert "--data-dir" in done.stderr
    assert "Traceback" not in done.stderr
    assert "CONNECTED" not in done.stderr
    assert done.stdout == ""
