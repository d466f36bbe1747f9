"""`dude generate` as a user meets it: what goes to standard output, the conversation, the terminal."""

from __future__ import annotations

import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import dude, dude_here, environment
from quickstart_config import quickstart_config
from training import train_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from dude_cli import quickstart
from dude_cli.commands import answering
from dude_cli.config import load_config
from dude_cli.console import Output
from dude_cli.errors import UsageError
from dude_cli.model import load_tokenizer
from dude_cli.target import AS_TRAINED, Loading

# The end of a turn is neither EOS nor in the model's generation config: it has to be learned, and to be known.
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
OPTIONS = {
    "interactive": False,
    "system": None,
    "raw": False,
    "compare_base": False,
    "max_new_tokens": 16,
    "temperature": 0.0,
    "top_p": 1.0,
    "seed": 0,
    "loading": AS_TRAINED,
}


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory) -> Path:
    """A run on conversations that has learned to say "12" and to end its turn."""
    folder = tmp_path_factory.mktemp("chat")
    model = shutil.copytree(quickstart.MODEL_DIR, folder / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": CHAT}))
    questions = [f"Ann has {number} apples" for number in range(16)]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "12"}]} for q in questions]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = quickstart_config(folder, max_steps="40")
    data = [f"data.train=[{{path: '{folder}/rows.jsonl'}}]", "data.validation=null", "data.format=chat"]
    train_here(config, f"model.name_or_path={model}", *data, "train.learning_rate=0.005")
    return folder / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose prompts filled a template."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "rows.jsonl").write_text('{"question": "Ann has 12 apples", "answer": "12"}\n' * 4)
    template = ['data.prompt="Question: {question}\\nAnswer:"', 'data.completion=" {answer}"', "data.validation=null"]
    train_here(quickstart_config(folder, max_steps="1"), f"data.train=[{{path: '{folder}/rows.jsonl'}}]", *template)
    return folder / "run"


def generate(target, *prompts: str, as_json=False, **options) -> None:
    answering.generate(str(target), prompts, **(OPTIONS | options), output=Output(as_json))


def test_one_document_has_all_of_several_answers_and_nothing_else_is_printed(run):
    command = [sys.executable, "-m", "dude_cli", "generate", str(run), "--prompt", "Ann has 3 apples", "--prompt", "-"]
    command += ["--base", "--json", "--max-new-tokens", "3", "--temperature", "0.5", "--seed", "7"]
    done = subprocess.run(command, input="two\nlines\n", env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    saved = json.loads((run / "adapter/adapter_config.json").read_text())
    assert document["adapter_sha256"] == saved["sha256"]
    assert document["sampling"] == {"max_new_tokens": 3, "temperature": 0.5, "top_p": 1.0, "seed": 7}
    first, second = document["answers"]
    assert (first["prompt"], first["text"]) == ("Ann has 3 apples", "Question: Ann has 3 apples\nAnswer:")
    assert second["text"] == "Question: two\nlines\nAnswer:"
    for answer in (first, second, first["base"], second["base"]):
        assert isinstance(answer["completion"], str)
        assert answer["new_tokens"] <= 3
        assert answer["stop_reason"] in ("eos", "length")
    assert first["prompt_tokens"] > 5
    assert done.stderr.splitlines() == [
        f"answering with run {run}",
        'prompt form: the training\'s template, "Question: {question}\\nAnswer:"',
    ]


def test_standard_output_is_the_completion_alone(run, capsys):
    generate(run, "Ann has 12 apples", as_json=True)
    completion = json.loads(capsys.readouterr().out)["answers"][0]["completion"]
    generate(run, "Ann has 12 apples")
    shown = capsys.readouterr()
    assert shown.out == completion + "\n"
    assert "template" in shown.err
    generate(run, "Question: Ann has 12 apples\nAnswer:", raw=True)
    shown = capsys.readouterr()
    assert shown.out == completion + "\n"
    assert "as it is" in shown.err


def test_what_standard_input_gives_is_exact_when_raw(run, capsys, monkeypatch):
    for raw, sent in ((True, "12\n\n"), (False, "Question: 12\n\nAnswer:")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("12\n\n"))
        generate(run, "-", as_json=True, raw=raw)
        assert json.loads(capsys.readouterr().out)["answers"][0]["text"] == sent


def test_a_cut_answer_is_said_to_be_cut(run, capsys):
    generate(run, "Ann has 12 apples", max_new_tokens=1)
    assert "cut after 1 tokens; more with --max-new-tokens" in capsys.readouterr().err
    generate(run, "Ann has 12 apples", "Ann", max_new_tokens=1, compare_base=True)
    shown = capsys.readouterr()
    assert shown.out.count("base:\n") == shown.out.count("tuned:\n") == 2
    assert "> Ann has 12 apples\n" in shown.err
    assert "the base model's answer was cut" in shown.err


def test_a_chat_stops_at_the_end_of_turn_that_it_has_learned(chat_run, capsys):
    generate(chat_run, "Ann has 3 apples", as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert "chat template" in document["prompt_form"]
    (answer,) = document["answers"]
    assert (answer["completion"], answer["stop_reason"]) == (" 12", "eos")
    tokenizer = load_tokenizer(load_config(chat_run / "config.yaml").model)
    assert answer["new_tokens"] == len(tokenizer(" 12", add_special_tokens=False).input_ids) + 1
    generate(chat_run / "adapter", "Ann has 3 apples")  # the tokenizer saved with it has the chat template
    assert capsys.readouterr().out == " 12\n"


def test_a_merged_model_stops_where_its_training_ended_a_turn(chat_run, tmp_path):
    """For a program that knows the model's folder alone."""
    done = dude_here("export", chat_run, tmp_path / "merged", "--format", "merged")
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    prompt = [{"role": "user", "content": "Ann has 3 apples"}]
    given = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**given, max_new_tokens=16, do_sample=False)[0, given["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == " 12<s>"


def test_the_template_of_a_config_with_its_values_is_that_of_the_runs_prompts(tmp_path, capsys):
    """The model's tokenizer has none, and afterwards the file is not needed any more."""
    template = tmp_path / "calm.jinja"
    template.write_text(CHAT.replace("assistant:", "{{ mood }} assistant:"))
    row = {"messages": [{"role": "user", "content": "Ann"}, {"role": "assistant", "content": "12"}]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    data = [f"data.train=[{{path: '{tmp_path}/rows.jsonl'}}]", "data.validation=null", "data.format=chat"]
    data += [f"data.chat_template={template}", "data.chat_template_kwargs.mood=calm"]
    train_here(quickstart_config(tmp_path, max_steps="1"), *data)
    template.unlink()
    generate(tmp_path / "run", "Ann", as_json=True)
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["text"] == "user: Anncalm assistant:"


def test_a_template_can_be_given_to_a_chat_alone(run, chat_run, capsys, tmp_path, monkeypatch):
    template = tmp_path / "own.jinja"
    template.write_text(CHAT.replace("assistant:", "{{ mood }} assistant:"))
    given = Loading(chat_template=str(template), chat_template_kwargs={"mood": "calm"})
    generate(chat_run, "Ann", as_json=True, loading=given)
    (answer,) = json.loads(capsys.readouterr().out)["answers"]
    assert answer["text"] == "user: Anncalm assistant:"
    monkeypatch.setattr("dude_cli.target.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match="only a chat has a template"):
        generate(run, "Ann", loading=given)


def test_a_system_prompt_is_for_chats(run, chat_run, capsys):
    generate(chat_run, "Ann has 3 apples", as_json=True, system="Be brief.")
    document = json.loads(capsys.readouterr().out)
    assert document["system"] == "Be brief."
    assert document["answers"][0]["text"].startswith("system: Be brief.")
    with pytest.raises(UsageError, match="only a chat has a system prompt"):
        generate(run, "Ann has 3 apples", system="Be brief.")


def test_a_conversation_from_a_pipe(chat_run, capsys, monkeypatch):
    lines = ["Ann has 3 apples", "", "/reset", "Ann has 4 apples", "long " * 300, "\udcff", "/quit", "not answered"]
    for ending in (lines, lines[:-2]):  # with /quit, and at the end of the input
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(ending)))
        generate(chat_run, interactive=True)
        shown = capsys.readouterr()
        assert shown.out == " 12\n 12\n"
        assert shown.err.count("a new conversation") == 1
        assert shown.err.count("fit: the model's context of 512") == 1
        assert shown.err.count("the prompt is not UTF-8 text") == 1


def test_a_conversation_at_a_terminal_ends_by_a_signal_with_one_line(chat_run):
    import pty

    leader, follower = pty.openpty()
    command = [sys.executable, "-m", "dude_cli", "generate", str(chat_run), "--interactive"]
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment(TERM="dumb"), start_new_session=True
    )
    os.close(follower)
    seen = read_until(leader, "> ")
    os.write(leader, b"Ann has 3 apples\n")
    seen += read_until(leader, "> ")
    assert seen.endswith("Ann has 3 apples\n 12\n> ")
    time.sleep(0.2)  # Python looks for signals only once it waits for a line
    process.send_signal(2)
    seen = read_until(leader, None)
    assert process.wait(timeout=30) == 75
    assert seen == "\nerror: stopped\n"


def read_until(terminal: int, end: str | None) -> str:
    """What a terminal shows until it ends in `end`, or until the process has left."""
    text, deadline = "", time.monotonic() + 60
    while (end is None or not text.endswith(end)) and time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                text += os.read(terminal, 4096).decode().replace("\r", "")
            except OSError:
                break
    return text


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        ([], {}, "nothing to answer"),
        (["a"], {"interactive": True}, "exclude each other"),
        ([], {"interactive": True, "as_json": True}, "no JSON document"),
        (["a"], {"compare_base": True}, "no adapter"),
        (["a\udcff"], {}, "not UTF-8"),
        (["a"], {"top_p": 0.5}, "does nothing"),
        (["a"], {"temperature": float("inf")}, "temperature is inf"),
        (["a"], {"loading": Loading("int3")}, "unknown dtype"),
        (["a"], {"max_new_tokens": 512}, "and 0 fit"),
    ],
)
def test_what_cannot_be_asked_is_a_usage_error(prompts, options, said, capsys):
    with pytest.raises(UsageError, match=said) as error:
        generate("embedded:quickstart", *prompts, **options)
    assert error.value.where
    assert error.value.fix
    assert capsys.readouterr().out == ""


def test_without_a_run_it_says_what_to_do(tmp_path):
    done = dude("generate", "--prompt", "a", cwd=tmp_path)
    assert done.returncode == 2
    assert "dude train" in done.stderr


def test_a_reader_that_goes_away_ends_it_without_a_word():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "dude_cli", "ls"], env=environment(), stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (75, "")


OPEN_TASK = """
task: open
custom_dataset: !function dude_cli.quickstart.documents.word_problem_splits
output_type: generate_until
test_split: test
doc_to_text: "Ann has 3 apples"
doc_to_target: "12"
generation_kwargs: {until: [], max_gen_toks: 16}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def test_an_evaluation_in_the_chat_template_stops_at_the_end_of_the_turn_too(chat_run, tmp_path):
    """lm-eval knows EOS and the task's strings; a token that only the training taught would not end an answer."""
    (tmp_path / "open.yaml").write_text(OPEN_TASK)
    task = ("--task", "open", "--limit", "3", "--include-path", tmp_path, "--output", tmp_path / "out", "--rescore")
    done = dude_here("eval", chat_run, *task, "--apply-chat-template")
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in (tmp_path / "out/samples_open.chat.limit-3.jsonl").read_text().splitlines()]
    assert [answer["resps"][0][0].strip() for answer in answers] == ["12"] * 3
