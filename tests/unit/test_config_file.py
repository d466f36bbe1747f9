from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dude_cli.config import Config
from dude_cli.config.hints import FOREIGN
from dude_cli.config.keys import key_paths
from dude_cli.config.read import dump_config, load_config
from dude_cli.errors import ConfigError

Load = Callable[..., Config]
REPOSITORY = Path(__file__).parents[2]
MINIMAL = "model: {name_or_path: m}\ndata: {train: [{path: d.jsonl}]}\n"


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Load a config from its text, as the file x.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)

    def _load(text: str | bytes, *overrides: str) -> Config:
        data = text if isinstance(text, bytes) else text.encode("utf-8")
        Path("x.yaml").write_bytes(data)
        return load_config(Path("x.yaml"), overrides)

    return _load


def problems(load: Load, text: str | bytes, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


# --- values -----------------------------------------------------------------------------------------------------


def test_defaults_and_output_dir(load: Load) -> None:
    config = load(MINIMAL)
    assert config.output_dir == "runs/x"
    assert config.adapter.method == "dude"
    assert config.adapter.scaling == 1.0


def test_the_output_folder_may_be_in_the_home_folder(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert load(MINIMAL + "output_dir: ~/run").output_dir == "/home/me/run"


def test_other_tools_ways_to_shard_name_the_one_that_exists(load: Load) -> None:
    (found,) = problems(load, MINIMAL + "deepspeed: ds.json\n")
    assert "`train.distributed` (`fsdp` shards the base over the GPUs)" in found


def test_quantised_weights_cannot_be_sharded(load: Load) -> None:
    text = MINIMAL.replace("model: {", "model: {quantization: nf4, ") + "train: {distributed: fsdp}\n"
    (found,) = problems(load, text)
    assert "cannot shard the packed weights" in found


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "1E-4", ".0001", "0.0001", "+1e-4"])
def test_a_rate_in_any_notation_is_a_number(load: Load, text: str) -> None:
    assert load(MINIMAL + f"train: {{learning_rate: {text}}}").train.learning_rate == 1e-4


@pytest.mark.parametrize("word", ["no", "off", "yes", "on", "y", "2024-01-01", "null_", "1_000", "0x", "~a"])
def test_words_stay_text(load: Load, word: str) -> None:
    assert load(MINIMAL + f"output_dir: {word}").output_dir == word


@pytest.mark.parametrize("word", ["true", "True", "TRUE"])
def test_true_is_a_boolean(load: Load, word: str) -> None:
    assert load(MINIMAL.replace("]}", f"], packing: {word}}}")).data.packing is True


@pytest.mark.parametrize(("word", "hint"), [("no", "false"), ("off", "false"), ("yes", "true"), ("ON", "true")])
def test_yaml_1_1_booleans_are_errors_with_the_right_word(load: Load, word: str, hint: str) -> None:
    text = MINIMAL.replace("]}", f"], packing: {word}}}")
    assert problems(load, text) == [f'x.yaml:2:43: `data.packing` is "{word}"; wanted true or false; write `{hint}`']


def test_an_anchor_is_copied(load: Load) -> None:
    text = "model: {name_or_path: m}\ndata: {train: &rows [{path: d}], validation: *rows}"
    assert load(text).data.validation == load(text).data.train


# --- one problem each -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x.yaml:1:1: the file is empty"),
        ("# only a comment\n", "x.yaml:1:1: the file is empty"),
        ("- a\n", "x.yaml:1:1: the file is not a mapping"),
        ("just text", "x.yaml:1:1: the file is not a mapping"),
        ("model: [a\n", "x.yaml:2:1: YAML syntax: expected ',' or ']'"),
        ("model:\n\tname: a\n", "x.yaml:2:1: YAML syntax: found character '\\t'"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2:1: YAML syntax: but found another document"),
        (b"a: \xff\n", "x.yaml:1:4: not UTF-8 text"),
        (b"a: b\nc: \x00\n", "x.yaml:2:4: character #x0 is not allowed"),
        (MINIMAL + "seed: !!python/object/apply:os.system [ls]", "x.yaml:3:7: tag `!!python/object/apply:os.system`"),
        (MINIMAL + "output_dir: !!python/name:os.system x", "x.yaml:3:13: tag `!!python/name:os.system`"),
        (MINIMAL + "output_dir: !!timestamp 2020-01-01", "x.yaml:3:13: tag `!!timestamp` is not allowed"),
        (MINIMAL + "seed: !mine 3", "x.yaml:3:7: tag `!mine` is not allowed"),
        (MINIMAL + "seed: 1\nseed: 2", "x.yaml:4:1: duplicate key `seed`, first given on line 3"),
        (MINIMAL + "<<: {seed: 1}", "x.yaml:3:1: merge keys"),
        (MINIMAL + "? [a]\n: b", "x.yaml:3:3: a key must be a word"),
        (MINIMAL + f"seed: {'9' * 5000}", "x.yaml:3:7: `9999999999"),
        (MINIMAL + 'output_dir: "\\ud800"', "x.yaml:3:13: half of a surrogate pair"),
        (MINIMAL + f"output_dir: {'[' * 60}{']' * 60}", "x.yaml:1:1: nested more than 50 levels"),
        ("[" * 2000, "x.yaml:1:1: nested more than 50 levels"),
        (MINIMAL + "seed: &x [*x]", "x.yaml:1:1: nested more than 50 levels deep, or an alias that contains itself"),
    ],
)
def test_a_bad_text_has_its_own_message(load: Load, text: str | bytes, expected: str) -> None:
    found = problems(load, text)
    assert len(found) == 1
    assert found[0].startswith(expected)


def test_an_alias_bomb_is_cheap(load: Load) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 5)]
    assert "more than 10000 values" in problems(load, "\n".join(lines))[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("adapter.rank=-1", "`adapter.rank` is -1; wanted a whole number above 0"),
        ("adapter.rank=8.0", "`adapter.rank` is 8.0; wanted a whole number above 0; write `8`"),
        ("adapter.rank='8'", '`adapter.rank` is "8"; wanted a whole number above 0; write `8`, without quotes'),
        ("data.max_length=1_024", "wanted a whole number above 0; write `1024`, without quotes"),
        ("adapter.method=dued", '`adapter.method` is "dued"; wanted one of `dude`, `dora`, `pissa`, `lora`; did you '
                                "mean `dude`?"),
        ("model.dtype=bf16", "did you mean `bfloat16`?"),
        ("train.learning_rate=.inf", "wanted a number above 0"),
        ("train.learning_rate=.nan", "wanted a number above 0"),
        ("train.learning_rate=2e5", "`train.learning_rate` is 200000.0; wanted a number above 0 and of at most 1000"),
        ("adapter.alpha=1e300", "`adapter.alpha` is 1e+300; wanted a number of at least 1e-06 and of at most 1000000"),
        ("adapter.alpha=1e-300", "wanted a number of at least 1e-06"),
        ("train.report_to=tensorboard", "write `[tensorboard]`"),
        ("data.train=rows.jsonl", "write `[{path: rows.jsonl}]`"),
        ("data.train={path: rows.jsonl}", "start each entry with a dash: `- path: ...`"),
        ("eval.tasks=[gsm8k]", "write `{name: gsm8k}`"),
        ("train=", "`train` is null; wanted a section"),
        ("model.name_or_path=3", "wanted text that is not empty; quote it if it is text"),
        ("data.prompt={question}", 'is a mapping; wanted text, or null; write `"{question}"`, with quotes'),
        ("data.completion={a b}", 'write `"{a b}"`, with quotes'),
        ("data.completion={a: 1}", 'write `"{column}"`, with quotes'),
        ("data.completion={a}", """in a shell such as `'data.prompt="Q: {question}\\nA:"'`"""),
        ("data.validation=2", "or a number above 0 and below 1"),
        ("adapter.target_modules=[]", "wanted text that is not empty, or a list of one or more texts"),
        ("adapter.target_modules=[3]", "`adapter.target_modules.0` is 3; wanted text"),
        ("seed=4294967296", "below 4294967296"),
    ],
)  # fmt: skip
def test_a_wrong_value_says_what_is_wanted(load: Load, override: str, expected: str) -> None:
    found = problems(load, MINIMAL, override)
    assert len(found) == 1
    assert found[0].startswith(f'override "{override}": ')
    assert expected in found[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learnin_rate=3", "unknown key `learnin_rate` in `train`; did you mean `learning_rate`?"),
        ("learning_rate=3", "unknown key `learning_rate` at the top level; did you mean `train.learning_rate`?"),
        ("target_modules=q", "did you mean `adapter.target_modules`?"),
        ("adapter.lora_r=3", "it is axolotl's and TRL's name; here: `adapter.rank`"),
        ("train.per_device_train_batch_size=3", "here: `train.per_device_batch_size`"),
        ("train.gradient_accumulation_steps=3", "global_batch_size / (per_device_batch_size * world size)"),
        ("train.fp16=true", "here: `model.dtype` (`float16`)"),
        ("train.load_best_model_at_end=true", "here: `train.keep` (`best`)"),
        ("train.resume_from_checkpoint=a", "the same `dude train` command goes on with an interrupted run"),
        ("overwrite_output_dir=true", "`dude train --overwrite` starts anew"),
        ("data.train.0.type=alpaca", "it is axolotl's name; here: `data.train.format`"),
        ("data.train.0.max_samples=9", '`split: "train[:1000]"` in an entry of `data.train`'),
        ("data.max_samples=9", '`split: "train[:1000]"` in an entry of `data.train`'),
        ("model.use_flash_attention=true", "here: `model.attn_implementation` (`flash_attention_2`)"),
        ("model.flash_attn=fa2", "here: `model.attn_implementation` (`flash_attention_2`)"),
        ("data.dataset_text_field=body", 'here: `data.completion` (`"{column}"`, with `data.format: text`)'),
        ("data.system_prompt=Hi", "write it into `data.prompt`, or as the first message of each conversation"),
        ("data.roles_to_train=[a]", "of a conversation the assistant's messages are learned"),
        ("data.train.0.pth=3", "unknown key `pth` in `data.train.0`; did you mean `path`?"),
        ("qqqq=3", "the keys here are `model`, `adapter`, `data`, `train`, `eval`, `output_dir`, `seed`"),
    ],
)
def test_an_unknown_key_suggests_the_right_one(load: Load, override: str, expected: str) -> None:
    found = problems(load, MINIMAL, override)
    assert len(found) == 1
    assert expected in found[0]


def test_every_hint_names_a_key_that_exists() -> None:
    keys = {".".join(path) for path in key_paths()}
    assert {ours for _, ours, _ in FOREIGN.values() if ours} <= keys
    assert not set(FOREIGN) & {path[-1] for path in key_paths()}
    assert all(note for _, ours, note in FOREIGN.values() if not ours)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {max_steps: 3, num_train_epochs: 1}", ":3:23: `train.max_steps` and `train.num_train_epochs`"),
        ("train: {per_device_batch_size: 64}", ":3:9: `train.per_device_batch_size` (64) is larger than"),
        ("train: {eval_steps: 3}", ":3:9: `train.eval_steps` needs `data.validation`"),
        ("eval: {tasks: [{name: a}, {name: a}]}", ":3:28: `eval.tasks` names a twice"),
    ],
)
def test_values_that_contradict_each_other(load: Load, text: str, expected: str) -> None:
    found = problems(load, MINIMAL + text)
    assert len(found) == 1
    assert expected in found[0]


def test_the_best_adapter_is_of_evaluations(load: Load) -> None:
    without = problems(load, MINIMAL + "train: {keep: best}")
    assert any("`train.keep: best` needs `data.validation`" in problem for problem in without)
    (problem,) = problems(load, MINIMAL.replace("]}", "], validation: 0.1}") + "train: {keep: best}")
    assert ":3:9: `train.keep: best` chooses between evaluations: give `train.eval_steps` too" in problem


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("prompt: a", "`prompt` needs `completion` beside it"),
        ("completion: a, format: chat", "replace `format: chat`: give one or the other"),
        ("chat_template: a.jinja", "`data.chat_template` is for conversations: it needs `data.format: chat`"),
        ("chat_template_kwargs: {a: 1}", "`data.chat_template_kwargs` is for conversations: it needs `data.format"),
        ("format: chat, chat_template_kwargs: [a]", "is a list; wanted names with their values"),
        ("format: chat, chat_template_kwargs: {a: [1]}", "`data.chat_template_kwargs`: `a` is no single value"),
        ("format: chat, chat_template_kwargs: {a: .inf}", "`data.chat_template_kwargs`: `a` is no single value"),
        ("format: chat, chat_template_kwargs: {a b: 1}", '"a b" is no name in a template; wanted one such as `enable'),
        ("group_by_length: true, shuffle: false", "`data.shuffle: false` keeps it: give one"),
        ('prompt: "{a", completion: b', "`data.prompt`: `{` at character 1 has no partner"),
        ('completion: "{a.b}"', "`data.completion`: `{a.b}` at character 1 is more than a column's name"),
    ],
)
def test_templates_are_checked_without_data(load: Load, keys: str, expected: str) -> None:
    found = problems(load, MINIMAL.replace("]}", f"], {keys}}}"))
    assert len(found) == 1
    assert expected in found[0]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("prompt: a", "x.yaml:2:32: `prompt` needs `completion` beside it"),
        ("format: chat, completion: a", "replace `format: chat`: give one or the other"),
        ('completion: "{a"', "`data.train.0.completion`: `{` at character 1 has no partner"),
        ("format: chats", '`data.train.0.format` is "chats"; wanted one of'),
    ],
)
def test_so_are_those_of_a_data_set(load: Load, keys: str, expected: str) -> None:
    found = problems(load, MINIMAL.replace("}]", f", {keys}}}]"))
    assert len(found) == 1
    assert expected in found[0]


def test_a_data_set_of_conversations_is_what_a_chat_template_is_for(load: Load) -> None:
    given = MINIMAL.replace("}]", ", format: chat}], chat_template: a.jinja")
    assert load(given).data.has_chats


def test_required_keys_come_with_an_example(load: Load) -> None:
    assert problems(load, "seed: 3") == [
        "x.yaml:1:1: `model` is required, for example `model: {name_or_path: meta-llama/Llama-2-7b-hf}`",
        "x.yaml:1:1: `data` is required, for example `data: {train: [{path: meta-math/MetaMathQA}]}`",
    ]
    assert problems(load, "model: {dtype: float32}\ndata:\n  train:\n    - split: train\n") == [
        "x.yaml:1:8: `model.name_or_path` is required, for example `name_or_path: meta-llama/Llama-2-7b-hf`",
        "x.yaml:4:7: `data.train.0.path` is required, for example `path: meta-math/MetaMathQA`",
    ]


def test_a_misspelt_key_is_not_reported_as_missing_too(load: Load) -> None:
    found = problems(load, "modle: {name_or_path: m}\ndata:\n  dataset: d\n  prompt: a\n  completoin: b\n")
    assert [line.split("; ")[0] for line in found] == [
        "x.yaml:1:1: unknown key `modle` at the top level",
        "x.yaml:3:3: unknown key `dataset` in `data`",
        "x.yaml:5:3: unknown key `completoin` in `data`",
    ]


# --- all of them at once ----------------------------------------------------------------------------------------


def test_all_problems_come_at_once_in_order_and_each_once(load: Load) -> None:
    text = """\
model:
  name_or_path: 3
adapter:
  rank: 0
  ranks: 1
data:
  train: [{path: d}]
  prompt: "{a"
  completion: b
  validation: [{path: 3}]
train:
  max_steps: 3
  num_train_epochs: 1
  global_batch_size: no
  per_device_batch_size: 512
  early_stopping_patience: 2
seed: 1
seed: 2
"""
    found = problems(load, text, "train.bogus=1", "adapter.alpha=-1", "nonsense")
    assert [line.split(": ")[0] for line in found] == [
        "x.yaml:2:17",
        "x.yaml:4:9",
        "x.yaml:5:3",
        "x.yaml:8:11",
        "x.yaml:10:23",
        "x.yaml:13:3",  # a rule about two right values is reported beside wrong values
        "x.yaml:14:22",  # and no rule about the wrong one, which is no number to compare 512 with
        "x.yaml:16:3",
        "x.yaml:18:1",
        'override "train.bogus=1"',
        'override "adapter.alpha=-1"',
        'override "nonsense"',
    ]


# --- overrides --------------------------------------------------------------------------------------------------


def test_overrides_win_and_follow_the_same_rules(load: Load) -> None:
    config = load(
        MINIMAL + "train: {learning_rate: wrong}",
        "train.learning_rate=1e-4",
        "data.train.0.path=x=y.jsonl",
        "data.train.1.path=more.jsonl",
        "eval.tasks.0={name: gsm8k, limit: 3}",
        "adapter.svd.algorithm=exact",
        "data.completion={a}",
        "data.completion='{a}'",
        "output_dir=no",
    )
    assert config.train.learning_rate == 1e-4
    assert [source.path for source in config.data.train] == ["x=y.jsonl", "more.jsonl"]
    assert config.eval.tasks[0].limit == 3
    assert config.adapter.svd.algorithm == "exact"
    assert (config.data.completion, config.output_dir) == ("{a}", "no")


def test_a_wrong_value_inside_an_override_is_not_blamed_on_the_file(load: Load) -> None:
    override = "adapter.svd={algorithm: exat}"
    found = problems(load, MINIMAL + "adapter: {svd: {algorithm: exact}}", override)
    assert found[0].startswith(f'override "{override}": `adapter.svd.algorithm` is "exat"')


def test_overrides_can_give_all_that_is_required(load: Load) -> None:
    assert load("seed: 1", "model.name_or_path=m", "data.train.0.path=d").data.train[0].path == "d"


def test_an_override_of_steps_replaces_the_files_epochs(load: Load) -> None:
    epochs, steps = MINIMAL + "train: {num_train_epochs: 2}", MINIMAL + "train: {max_steps: 9}"
    assert load(epochs, "train.max_steps=3").train.max_steps == 3
    assert load(steps, "train.num_train_epochs=3").train.max_steps is None
    assert load(epochs, "train.max_steps=null").train.num_train_epochs == 2
    assert "both say" in problems(load, MINIMAL, "train.max_steps=3", "train.num_train_epochs=3")[0]


def test_two_words_are_one_override(load):
    (problem,) = problems(load, MINIMAL, "train.max_steps", "3", "seed=1")
    assert problem.startswith('override "train.max_steps 3": ')
    assert problem.endswith("write `train.max_steps=3`, as one word")
    assert len(problems(load, MINIMAL, "train.max_steps", "seed=x")) == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train", "wanted `key.sub=value`"),
        ("=3", "wanted `key.sub=value`"),
        ("train..x=3", "wanted `key.sub=value`"),
        ("data.train.2.path=x", "`data.train` has 1 entries, numbered from 0: there is no `data.train.2`"),
        ("data.train.path=x", "`data.train` is a list: name an entry by its number, such as `data.train.0`"),
        ("model.name_or_path.x=3", "`model.name_or_path` is a single value and has no key `x`"),
        ("seed=[1", "YAML syntax"),
        ("data.prompt={a}: {b}", "a key must be a word"),
        ("data.prompt={a}: {b}", "for text, quote the value, in a shell such as `'data.prompt="),
        ("data.prompt=Q: {a}\\nA:", """in a shell such as `'data.prompt="Q: {question}\\nA:"'`"""),
        ("seed=!!int 3 4", "`3 4` cannot be read as int"),
        ("seed={a: 1, a: 2}", "duplicate key `a`"),
    ],
)
def test_a_bad_override_is_explained(load: Load, override: str, expected: str) -> None:
    found = problems(load, MINIMAL, override)
    assert found[0].startswith(f'override "{override}": ')
    assert expected in found[0]


def test_a_template_without_quotes_in_a_file_is_told_of_them(load: Load) -> None:
    text = MINIMAL.replace("data: {", "data: {completion: {answer}, ")
    assert text != MINIMAL
    found = problems(load, text)
    assert len(found) == 1
    assert found[0].endswith('`data.completion` is a mapping; wanted text, or null; write `"{answer}"`, with quotes')


# --- files ------------------------------------------------------------------------------------------------------


def test_a_missing_file_names_the_nearest(load: Load) -> None:
    load(MINIMAL)
    with pytest.raises(ConfigError, match=r"no such config file\n  where: y\.yaml\n  fix:   did you mean x\.yaml"):
        load_config(Path("y.yaml"))
    with pytest.raises(ConfigError, match=r"did you mean configs/gsm8k\.yaml"):
        load_config(Path("config/gsm8k.yml"))


def test_a_folder_is_not_a_config(load: Load) -> None:
    load(MINIMAL)
    with pytest.raises(ConfigError, match=r"this is a folder\n  where: \.\n  fix:   name one of its files: x\.yaml"):
        load_config(Path("."))


def test_a_byte_order_mark_is_allowed(load: Load) -> None:
    assert load(b"\xef\xbb\xbf" + MINIMAL.encode()).model.name_or_path == "m"


def test_the_dump_is_fully_resolved(load: Load, tmp_path: Path) -> None:
    config = load(MINIMAL, "train.max_steps=3", "model.revision='1e-4'", "output_dir='no'")
    text = dump_config(config)
    assert "revision: '1e-4'" in text
    assert "output_dir: 'no'" in text
    assert "warmup_ratio: 0.03" in text
    assert "num_train_epochs" not in text
    assert load(text) == config


@pytest.mark.parametrize("text", ["a\x85", "\u2028", " a\n\n b ", "\x07", "\ufeff", "1:30", "0o7", "=", "naïve 😀"])
def test_the_dump_keeps_unusual_text(load: Load, text: str) -> None:
    config = load(MINIMAL)
    config = config.model_copy(update={"data": config.data.model_copy(update={"completion": text})})
    assert load(dump_config(config)) == config


def test_reading_a_config_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; from dude_cli.config.read import load_config; "
        "load_config(Path('configs/gsm8k.yaml')); "
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate', 'lm_eval', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_reference_page_is_current() -> None:
    script = REPOSITORY / "tools" / "config_reference.py"
    result = subprocess.run(
        [sys.executable, str(script)], cwd=REPOSITORY, capture_output=True, text=True, check=True,
        env={"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    page = (REPOSITORY / "docs" / "config.md").read_text(encoding="utf-8")
    assert result.stdout.rstrip() == page.rstrip(), "run: python tools/config_reference.py docs/config.md"
