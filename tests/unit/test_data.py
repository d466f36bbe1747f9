"""`prepare_data` from files to encoded rows and the report on them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dude_cli.config import DataConfig, DataSource
from dude_cli.data import PreparedData, prepare_data
from dude_cli.data.batches import NOT_LEARNED
from dude_cli.errors import DataError


@pytest.fixture
def prepare(tmp_path, bos_tokenizer):
    def run(
        rows: list[dict], *, tokenizer=bos_tokenizer, seed: int = 0, say=lambda line: None, **fields: object
    ) -> PreparedData:
        validation = fields.get("validation")
        if isinstance(validation, list) and isinstance(validation[0], dict):
            fields["validation"] = [write("validation", validation)]
        return prepare_data(DataConfig(train=[write("rows", rows)], **fields), tokenizer, seed, say)

    def write(name: str, rows: list[dict]) -> DataSource:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataSource(path=str(path))

    return run


def numbered(count: int) -> list[dict]:
    return [{"prompt": f"How many is {i}?", "completion": f" {i} apples"} for i in range(count)]


def test_report_counts_rows_tokens_and_truncation(prepare, bos_tokenizer):
    rows = [*numbered(3), {"prompt": "The cat sat on the mat. " * 20, "completion": " hello"}]
    prepared = prepare(rows, max_length=40)
    report = prepared.train_report
    lengths = [len(bos_tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]
    assert (report.rows, report.truncated_rows, report.rows_without_target) == (4, 1, 0)
    assert report.longest_row == max(lengths)
    assert report.tokens == sum(min(length, 40) for length in lengths) == prepared.train.lengths.sum()
    learned = sum(label != NOT_LEARNED for row in prepared.train for label in row.labels)
    assert report.target_tokens == learned == prepared.train.target_tokens.sum()
    assert (report.max_length, report.packed_sequences) == (40, None)
    assert report.example == [("<s>How many is 0?", False), (" 0 apples</s>", True)]
    assert prepared.validation is None
    assert prepared.validation_report is None


def test_answers_that_lose_their_end_are_counted_and_a_warning_names_them(prepare):
    long_prompt = {"prompt": "The cat sat on the mat. " * 20, "completion": " hello"}
    long_answer = {"prompt": "hello", "completion": " The cat sat on the mat." * 20}
    prepared = prepare([long_prompt, long_answer, *numbered(8)], max_length=40)
    report = prepared.train_report
    assert (report.rows, report.truncated_rows, report.cut_answers) == (10, 2, 1)
    assert prepared.warnings() == [
        "data.train: 1 of 10 rows lose their whole prompt and the end of their answer, with its EOS, "
        "to data.max_length (40); "
        f"the longest row has {report.longest_row} tokens"
    ]
    assert prepare([long_prompt, *numbered(9)], max_length=40).warnings() == []


def test_prompts_that_lose_their_start_are_told(prepare):
    said: list[str] = []
    prepare(
        [{"prompt": "The cat sat on the mat. " * 20, "completion": " hello"}, *numbered(9)],
        max_length=40,
        say=said.append,
    )
    assert said[-1] == "data.train: rows longer than data.max_length (40): 1 lose the start of their prompt"


@pytest.mark.parametrize("lost", [2, 3])
def test_a_tenth_of_the_prompts_may_lose_their_start_and_more_is_a_warning(prepare, lost):
    said: list[str] = []
    long = {"prompt": "The cat sat on the mat. " * 20, "completion": " hello"}
    prepared = prepare([long] * lost + numbered(20 - lost), max_length=40, say=said.append)
    longest = prepared.train_report.longest_row
    assert any("lose the start of their prompt" in line for line in said) == (lost == 2)
    assert prepared.warnings() == [
        f"data.train: {lost} of 20 rows lose the start of their prompt to data.max_length (40); "
        f"the longest row has {longest} tokens"
    ] * (lost == 3)


def test_empty_answers_are_counted_and_a_warning_names_them(prepare, chat_tokenizer):
    told = "data.train: 2 of 4 rows have an empty answer: only its end can be learned"
    empty = [{"prompt": "How many?", "completion": ""}] * 2
    assert prepare([*empty, *numbered(2)]).warnings() == [told]
    assert prepare(numbered(2)).warnings() == []
    templates = {"prompt": "Q: {prompt}", "completion": " {completion}"}  # a space is learned too
    assert prepare([*empty, *numbered(2)], **templates).warnings() == [told]
    (cut,) = prepare([{"prompt": "Why?", "completion": " apples"}], max_length=2).warnings()
    assert "empty" not in cut
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    talks = [
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": answer}]}
        for answer in ("", "46", "", "12")
    ]
    assert prepare(talks, format="chat", tokenizer=tokenizer).warnings() == [told]


def test_a_prompt_that_goes_on_in_the_answer_without_a_space_is_told(prepare):
    rows = [{"prompt": f"How many is {number}", "completion": "apples"} for number in range(3)]
    said: list[str] = []
    prepare(rows, say=said.append)
    assert any("prompt and completion meet in a word, as ' many is 0apples': begin the" in line for line in said)
    for other in ({"prompt": "How many?", "completion": "46"}, {"prompt": "多少", "completion": "四"}):
        said.clear()
        prepare([*rows, other], say=said.append)
        assert not any("meet in a word" in line for line in said)


@pytest.fixture
def mixed(tmp_path, chat_tokenizer):
    """Four data sets, each in a form of its own."""
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " there"}]
    sets = {
        "plain": ([{"prompt": "How many?", "completion": " 46"}], {}),
        "alpaca": ([{"instruction": "Add.", "input": "", "output": "3"}], {"format": "alpaca"}),
        "chat": ([{"messages": talk}], {"format": "chat"}),
        "own": ([{"q": "12", "a": "34"}], {"prompt": "Q: {q}\nA:", "completion": " {a}"}),
        "texts": ([{"text": "The cat sat on the mat. " * 40}], {"format": "text"}),
    }
    for name, (rows, _) in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [DataSource(path=str(tmp_path / f"{name}.jsonl"), **form) for name, (_, form) in sets.items()]
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return sources, tokenizer


def test_each_data_set_may_have_a_form_of_its_own(mixed):
    sources, tokenizer = mixed
    config = DataConfig(train=sources, max_length=250)
    prepared = prepare_data(config, tokenizer, 0)
    # As one by itself, one after the other.
    alone = [
        row
        for source in sources
        for row in prepare_data(DataConfig(train=[source], max_length=250), tokenizer, 0).train
    ]
    assert [row.input_ids for row in prepared.train] == [row.input_ids for row in alone]
    assert [row.labels for row in prepared.train] == [row.labels for row in alone]
    assert [row.source_rows[0] for row in prepared.train][:5] == [0, 1, 2, 3, 4]
    report = prepared.train_report
    assert report.rows > 5
    assert (report.split_documents, report.truncated_rows, report.empty_answers) == (1, 0, 0)
    learned = ["".join(text for text, on in pieces(tokenizer, row) if on) for row in prepared.train]
    assert learned[:4] == [" 46<|im_end|>", "3<|im_end|>", " there<|im_end|>", " 34<|im_end|>"]


def pieces(tokenizer, row):
    return [(tokenizer.decode([token]), label >= 0) for token, label in zip(row.input_ids, row.labels, strict=True)]


def test_the_form_of_the_data_section_is_that_of_the_data_sets_without_one(mixed):
    sources, tokenizer = mixed
    chat, own = sources[2], sources[3]
    bare = DataSource(path=chat.path)
    config = DataConfig(train=[bare, own], validation=[bare], format="chat", chat_template_kwargs={})
    same = DataConfig(train=[chat, own], validation=[chat])
    assert prepare_data(config, tokenizer, 0).fingerprints() == prepare_data(same, tokenizer, 0).fingerprints()
    assert [form.format for form in config.forms()] == ["chat", "prompt_completion"]
    assert DataConfig(train=[own], validation=[chat]).has_chats
    assert not DataConfig(train=[own]).has_chats


def test_columns_that_are_not_read_are_named(prepare):
    said: list[str] = []
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief.", "history": []}
    prepare([row], format="alpaca", say=said.append)
    assert any(line.endswith("columns that are not read: system, history") for line in said)
    said.clear()
    prepare(numbered(2), say=said.append)
    assert not any("not read" in line for line in said)


def test_a_column_that_another_entry_reads_is_not_named(tmp_path, bos_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "How many?", "answer": "46", "why": "12", "id": 1}) + "\n")
    sources = [
        DataSource(path=str(path), prompt="{question}", completion=" {answer}"),
        DataSource(path=str(path), prompt="{question}", completion=" {why}"),
    ]
    said: list[str] = []
    prepare_data(DataConfig(train=sources), bos_tokenizer, 0, said.append)
    assert said == [f"note: {path}: columns that are not read: id"]


def test_validation_rows_that_are_trained_on_are_counted(prepare):
    rows = numbered(10)
    told = "data.validation: 10 of 10 rows are in data.train too: the evaluation loss does not tell of them "
    (warning,) = prepare(rows, validation=rows).warnings()
    assert warning.startswith(told)
    assert prepare(rows, validation=numbered(12)[10:]).warnings() == []
    (warning,) = prepare(rows * 2, validation=0.5, packing=True).warnings()
    assert re.match(r"data.validation: \d+ of 10 rows are in data.train too", warning)


def test_turns_that_a_long_conversation_loses_are_counted_and_a_warning_names_them(prepare, chat_tokenizer):
    turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": " there"}]
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}")
    rows = [{"messages": turns * count} for count in (5, 1, 4)]
    length = prepare([{"messages": turns * 3}], format="chat", tokenizer=tokenizer).train_report.longest_row
    prepared = prepare(rows, format="chat", tokenizer=tokenizer, max_length=length)
    report = prepared.train_report
    assert (report.rows, report.truncated_rows, report.cut_answers) == (3, 2, 0)
    assert (report.shortened_chats, report.lost_turns) == (2, 3)
    assert prepared.warnings() == [
        "data.train: 2 conversations lose their last messages, with 3 turns of the assistant's, "
        f"to data.max_length ({length}); the longest row has {report.longest_row} tokens"
    ]


def test_with_train_on_inputs_a_last_question_that_is_lost_is_told_too(prepare, chat_tokenizer):
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}")
    question, answer = {"role": "user", "content": "hello"}, {"role": "assistant", "content": " there"}
    talks = [
        [question, answer],  # its line break does not fit, and is no loss
        [question, answer, question],
        [question, answer, question, answer | {"weight": 0}],
        [question, answer, question, answer],
        [question, answer, answer | {"weight": 0}],  # what is lost would not be learned
    ]
    rows = [{"messages": talk} for talk in talks]
    longest = {"format": "chat", "tokenizer": tokenizer, "train_on_inputs": True}
    length = prepare(rows[:1], **longest).train_report.longest_row - 1
    report = prepare(rows, **longest, max_length=length).train_report
    assert (report.truncated_rows, report.shortened_chats, report.lost_turns) == (5, 3, 1)
    (warning,) = prepare(rows[:3], **longest, max_length=length).warnings()
    assert warning.startswith(f"data.train: 2 conversations lose their last messages to data.max_length ({length})")
    assert prepare(rows[1:3], format="chat", tokenizer=tokenizer, max_length=length).warnings() == []


def test_conversations_that_lose_the_whole_question_are_counted_and_no_others(prepare, chat_tokenizer):
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    long, short = "The cat sat on the mat. " * 20, "hello"
    talks = [
        [(short, short), (long, None)],  # ends behind its answer
        [(long, short)],  # loses the start of the question
        [(long, short), (short, short)],  # that, and the last turn
        [(short, "The cat sat on the mat. " * 4)],  # loses the question
    ]
    rows = [
        {
            "messages": [
                {"role": role, "content": text}
                for turn in talk
                for role, text in zip(("user", "assistant"), turn, strict=True)
                if text
            ]
        }
        for talk in talks
    ]
    length = prepare(rows[3:], format="chat", tokenizer=tokenizer).train_report.longest_row - 3
    prepared = prepare(rows, format="chat", tokenizer=tokenizer, max_length=length)
    report = prepared.train_report
    assert (report.lost_starts, report.lost_questions, report.cut_answers, report.shortened_chats) == (2, 1, 0, 1)
    starts, lost, shortened = prepared.warnings()
    assert starts.startswith("data.train: 2 of 4 rows lose the start of their prompt to ")
    assert lost.startswith("data.train: 1 conversations lose all of the question in front of their first answer to ")
    assert shortened.startswith("data.train: 1 conversations lose their last messages, with 1 turns")


DOCUMENTS = [{"text": "hello"}, {"text": "The cat sat on the mat. " * 30}, {"text": "How many? " * 20}, {"text": "46"}]


def test_long_texts_are_split_and_no_token_of_them_is_lost(prepare, bos_tokenizer):
    said: list[str] = []
    prepared = prepare(DOCUMENTS, format="text", max_length=20, say=said.append)
    report, train = prepared.train_report, prepared.train
    sources = [row.source_rows[0] for row in train]
    assert sorted(set(sources)) == [0, 1, 2, 3]
    assert sources == sorted(sources)
    assert (report.rows, report.split_documents, report.truncated_rows, report.longest_row) == (len(train), 2, 0, 20)
    assert prepared.warnings() == []
    assert said[-1] == (
        "data.train: texts longer than data.max_length (20): 2, split into rows of at most that length; "
        f"{len(train)} rows in all"
    )
    for index, document in enumerate(DOCUMENTS):
        learned = [label for row in train for label in row.labels if row.source_rows == [index] and label >= 0]
        assert learned == [*bos_tokenizer(document["text"])["input_ids"][1:], bos_tokenizer.eos_token_id]
    whole = prepare(DOCUMENTS, format="text").train_report
    assert whole.target_tokens == report.target_tokens
    assert whole.split_documents == 0


def test_split_texts_of_a_real_tokenizer_are_packed_whole(prepare, test_data):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(test_data / "models/stories260K")
    lines = (test_data / "gsm8k/train.jsonl").read_text().splitlines()[:30]
    rows = [{"text": json.loads(line)["answer"]} for line in lines]
    prepared = prepare(rows, format="text", max_length=48, packing=True, tokenizer=tokenizer)
    assert prepared.train.lengths.max() <= 48
    assert prepared.train_report.target_tokens == sum(len(tokenizer(row["text"])["input_ids"]) for row in rows)


def test_a_text_is_in_the_training_or_held_out_but_not_in_parts(prepare):
    for seed in range(3):
        prepared = prepare(DOCUMENTS * 5, format="text", max_length=20, validation=0.3, seed=seed)
        train, held_out = ({row.source_rows[0] for row in part} for part in (prepared.train, prepared.validation))
        assert not train & held_out
        assert len(held_out) == 6
        assert train | held_out == set(range(20))


def test_a_text_behind_a_prompt_is_cut_as_an_answer_is(prepare):
    prepared = prepare(DOCUMENTS, format="text", prompt="Write.", completion="{text}", max_length=20)
    assert [row.source_rows for row in prepared.train] == [[0], [1], [2], [3]]
    assert prepared.train_report.cut_answers == 2


def test_rows_without_target_are_counted_and_left_out(prepare):
    prepared = prepare([{"text": ""}, {"text": "hello"}, {"text": ""}], format="text", max_length=1 + 5)
    assert prepared.train_report.rows == 3  # after BOS even an empty text has its EOS to learn
    with pytest.raises(DataError, match="none of the 2 rows has a token to learn") as caught:
        prepare(numbered(2), max_length=1)
    assert "max_length" in caught.value.fix


def test_rows_without_target_do_not_shift_the_others(prepare, make_tokenizer):
    tokenizer = make_tokenizer(None, eos_token="</s>")
    prepared = prepare([{"text": ""}, {"text": "hello"}, {"text": ""}], format="text", tokenizer=tokenizer)
    assert (prepared.train_report.rows, prepared.train_report.rows_without_target) == (1, 2)
    assert prepared.train[0].source_rows == [1]


def test_held_out_share_is_apart_and_repeats(prepare):
    rows = numbered(50)
    prepared = prepare(rows, validation=0.1, packing=True, max_length=250)
    train = [row for sequence in prepared.train for row in sequence.source_rows]
    held_out = [row for sequence in prepared.validation for row in sequence.source_rows]
    assert sorted(train + held_out) == list(range(50))
    assert len(held_out) == prepared.validation_report.rows == 5
    again = prepare(rows, validation=0.1, packing=True, max_length=250)
    assert again.fingerprint == prepared.fingerprint
    other = prepare(rows, validation=0.1, packing=True, max_length=64, seed=1)
    assert other.fingerprint != prepared.fingerprint


def test_validation_sources_of_their_own(prepare, tmp_path):
    (tmp_path / "dev.jsonl").write_text('{"prompt": "hello", "completion": " there"}\n')
    prepared = prepare(numbered(3), validation=[DataSource(path=str(tmp_path / "dev.jsonl"))])
    assert prepared.train_report.rows == 3
    assert prepared.validation_report.example == [("<s>hello", False), (" there</s>", True)]


def test_packing_keeps_every_row(prepare):
    rows = numbered(40)
    plain, packed = prepare(rows, max_length=60), prepare(rows, max_length=60, packing=True)
    assert packed.train_report.packed_sequences == len(packed.train) < len(plain.train)
    assert packed.train_report.rows == 40
    assert packed.train.target_tokens.sum() == plain.train.target_tokens.sum()
    assert packed.train.lengths.max() <= 60
    assert packed.fingerprint != plain.fingerprint


def test_chat_rows_and_the_rows_that_are_wrong(prepare, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer(None, eos_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    talk = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "46"}]}
    silent = {"messages": talk["messages"][:1]}
    prepared = prepare([talk, silent], tokenizer=tokenizer, format="chat")
    assert (prepared.train_report.rows, prepared.train_report.rows_without_target) == (1, 1)
    assert prepared.train_report.example[1] == ("46<|im_end|>", True)
    with pytest.raises(DataError) as caught:
        prepare([talk, {"messages": "hello"}], tokenizer=tokenizer, format="chat")
    assert caught.value.where == f"{tmp_path}/rows.jsonl:2"
    with pytest.raises(DataError) as caught:
        prepare([{"messages": []}, talk, *[{"messages": "hello"}] * 1100], tokenizer=tokenizer, format="chat")
    assert "1,101 of 1,102 rows cannot be used" in caught.value.what
    assert f"{tmp_path}/rows.jsonl:6: `messages` is not a conversation: hello\n  and 1,096 more" in caught.value.what
    assert caught.value.where == "data.train"


def test_numbers_become_text_and_alpaca_input_may_be_missing(prepare):
    rows = [{"instruction": "Add 1 and 2.", "output": 3}]
    prepared = prepare(rows, format="alpaca")
    prompt, answer = (text for text, _ in prepared.train_report.example)
    assert answer == "3</s>"
    assert "### Input" not in prompt


def test_real_questions_with_a_real_tokenizer(test_data: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(test_data / "models/stories260K")
    config = DataConfig(
        train=[DataSource(path=str(test_data / "gsm8k/train.jsonl"), split="train[:200]")],
        prompt="Question: {question}\nAnswer:",
        completion=" {answer}",
        max_length=256,
    )
    prepared = prepare_data(config, tokenizer, 0)
    eos = tokenizer.eos_token_id
    assert prepared.train_report.cut_answers == sum(row.labels[-1] != eos for row in prepared.train) > 0
    lines = (test_data / "gsm8k/train.jsonl").read_text().splitlines()[:200]
    assert prepared.train_report.truncated_rows > 0
    for row, line in zip(prepared.train, lines, strict=True):
        assert row.input_ids[0] == tokenizer.bos_token_id
        learned = tokenizer.decode([label for label in row.labels if label != NOT_LEARNED])
        answer = json.loads(line)["answer"]
        if row.labels[-1] == tokenizer.eos_token_id:
            assert learned.lstrip() == answer + "</s>"
        else:
            assert len(row) == 256
            assert answer.startswith(learned.lstrip())
