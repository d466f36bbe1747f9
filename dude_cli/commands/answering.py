"""What `dude generate` does: answer prompts, the lines of a conversation, or the rows of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.config import DataSource, given_source
from dude_cli.console import Output
from dude_cli.errors import UsageError
from dude_cli.target import (
    LoadedTarget,
    Loading,
    Target,
    check_dtype,
    data_config,
    find_target,
    load_target,
    target_tokenizer,
)

if TYPE_CHECKING:
    from dude_cli.data import PromptForm
    from dude_cli.data.row_prompts import RowPrompt
    from dude_cli.generation.answers_file import AnswersFile
    from dude_cli.generation.generate import Sampling


def generate(
    target_name: str | None,
    prompts: Sequence[str],
    *,
    interactive: bool,
    system: str | None,
    raw: bool,
    compare_base: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    loading: Loading,
    output: Output,
) -> None:
    """Answer prompts, or the lines of a conversation, with a run, an adapter or a model."""
    from dude_cli.data import prompt_form
    from dude_cli.generation.conversation import Conversation, answer_prompts, converse, read_prompt
    from dude_cli.generation.generate import Generator, Sampling

    if interactive == bool(prompts):
        what = "--prompt and --interactive exclude each other" if interactive else "there is nothing to answer"
        fix = "give --prompt TEXT, or --prompt - to read it, or --interactive, or --rows FILE"
        raise UsageError(what, where="--prompt", fix=fix)
    if interactive and output.as_json:
        raise UsageError("a conversation is no JSON document", where="--json", fix="give --prompt TEXT with --json")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    sampling.check()
    check_dtype(loading.dtype)
    target = _target(target_name, compare_base=compare_base)
    texts = [read_prompt(text, raw=raw) for text in prompts]
    if loading.changes_chat_template:  # before the model is loaded
        _check_is_chat(prompt_form(target_tokenizer(target, loading), data_config(target), raw=raw))
    output.say(f"answering with {target}")
    loaded = load_target(target, loading)
    form = prompt_form(loaded.tokenizer, data_config(target), raw=raw)
    output.say(f"prompt form: {form.description}")
    generator = Generator(loaded.model, loaded.tokenizer, form, sampling)
    conversation = Conversation(generator, compare_base=compare_base, system=system)
    if interactive:
        converse(conversation, output)
        return
    answers = answer_prompts(conversation, texts, output)
    if output.as_json:
        document = {"target": str(target), "adapter_sha256": loaded.adapter_sha256, "prompt_form": form.description}
        document |= {} if system is None else {"system": system}
        output.result("", document | {"sampling": asdict(sampling), "answers": answers})


def generate_rows(
    target_name: str | None,
    rows: Sequence[str],
    out: Path | None,
    *,
    batch_size: int | None,
    others: Sequence[str],
    compare_base: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    loading: Loading,
    output: Output,
) -> None:
    """Answer each row of a data set, and write the answers to a new file `out`.

    `rows` are the values of that option, and `others` the options against it.
    """
    from dude_cli.data.row_prompts import row_prompts
    from dude_cli.generation.answers_file import answers_file
    from dude_cli.generation.generate import Generator, Sampling
    from dude_cli.generation.rows import BATCH_SIZE, answer_rows, check_rows, summary, summary_lines
    from dude_cli.system.runtime import quiet_libraries

    source, path = _check_rows_options(rows, out, others)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    sampling.check()
    check_dtype(loading.dtype)
    target = _target(target_name, compare_base=compare_base)
    with answers_file(path, output.warn) as answers:
        quiet_libraries()
        tokenizer, trained = target_tokenizer(target, loading), data_config(target)
        form, prompts = row_prompts(source, trained, tokenizer, say=output.say, moment=answers.begun_at)
        if loading.changes_chat_template:
            _check_is_chat(form)
        asked = "1 row" if len(prompts) == 1 else f"{len(prompts)} rows"
        output.say(f"answering {asked} with {target}", f"prompt form: {form.description}")
        loaded = load_target(target, loading)
        generator = Generator(loaded.model, loaded.tokenizer, form, sampling)
        check_rows(generator, prompts, source.path)
        answers.begin(_settings(target, loaded, sampling, prompts, compare_base=compare_base))
        left = [number for number in range(1, len(prompts) + 1) if number not in answers.answers]
        if len(left) < len(prompts):
            output.say(f"{len(prompts) - len(left)} of {len(prompts)} answers are there already")
        try:
            with output.counter("answered") as count:
                count(len(answers.answers), len(prompts))
                for records in answer_rows(
                    generator,
                    prompts,
                    left,
                    batch_size=batch_size or BATCH_SIZE,
                    compare_base=compare_base,
                    say=output.say,
                ):
                    answers.add(records)
                    count(len(answers.answers), len(prompts))
            ordered = answers.finish()
        except BaseException:
            _tell_what_is_kept(answers, len(prompts), output)
            raise
    found = summary(ordered, compare_base=compare_base)
    said = "1 answer is" if len(ordered) == 1 else f"{len(ordered)} answers are"
    shown = [f"{said} in {path}", *summary_lines(found, max_new_tokens)]
    document: dict[str, Any] = {"target": str(target), "adapter_sha256": loaded.adapter_sha256}
    document |= {
        "prompt_form": form.description,
        "sampling": asdict(sampling),
        "data": source.path,
        "output": str(path),
    }
    output.result("\n".join(shown), document | found)


def _check_rows_options(rows: Sequence[str], out: Path | None, others: Sequence[str]) -> tuple[DataSource, Path]:
    """The data set and the file of the answers. Raises UsageError where an option is missing or one too much."""
    if not rows:
        raise UsageError(
            "--output and --batch-size are for the answers to rows", where="--rows", fix="give --rows FILE too"
        )
    if len(rows) > 1:
        raise UsageError(
            f"--rows takes one data set here, and {len(rows)} are given",
            where=f"--rows {', --rows '.join(rows)}",
            fix="give one command for each, with an --output of its own",
        )
    if others:
        raise UsageError(
            f"the rows say what is asked, and so does {', '.join(others)}",
            where=f"--rows, {', '.join(others)}",
            fix="give one; a row's system message belongs into its column `system` or its `messages`",
        )
    if out is None:
        raise UsageError(
            "the answers to rows need a file", where="--output", fix="give one, such as --output answers.jsonl"
        )
    return given_source(rows[0], "--rows"), out.expanduser()


def _settings(
    target: Target, loaded: LoadedTarget, sampling: Sampling, rows: Sequence[RowPrompt], *, compare_base: bool
) -> dict[str, Any]:
    """What the answers depend on, but for the batches, by its name for the user."""
    from dude_cli.generation.rows import prompts_sha256

    return {
        "adapter": loaded.adapter_sha256,
        "model": loaded.base_fingerprint or f"{target}, {getattr(loaded.model.config, '_commit_hash', None)}",
        "dtype": loaded.config.dtype,
        "sampling": asdict(sampling),
        "comparison with the base": compare_base,
        "rows or prompts": prompts_sha256(rows),
    }


def _tell_what_is_kept(answers: AnswersFile, rows: int, output: Output) -> None:
    answers.close()
    if answers.answers:
        kept = f"{len(answers.answers)} of {rows} answers are kept in {answers.partial}"
        output.warn(f"{kept}; the same command goes on from there")


def _target(name: str | None, *, compare_base: bool) -> Target:
    target = find_target(name)
    if compare_base and target.adapter_dir is None:
        raise UsageError(
            "the model has no adapter, so there is no base to compare it with",
            where="--base",
            fix="give a run or an adapter, or leave --base out",
        )
    return target


def _check_is_chat(form: PromptForm) -> None:
    if form.chat is None:
        raise UsageError(
            f"only a chat has a template, and here the form of prompts is {form.description}",
            where="--chat-template, --chat-template-kwargs",
            fix="leave these out",
        )
