"""What `dude generate` does: answer prompts, or the lines of a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from dude_cli.console import Output
from dude_cli.errors import UsageError
from dude_cli.target import Loading, data_config, find_target, load_target, target_tokenizer

if TYPE_CHECKING:
    from dude_cli.data import PromptForm


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
        raise UsageError(what, where="--prompt", fix="give --prompt TEXT, or --prompt - to read it, or --interactive")
    if interactive and output.as_json:
        raise UsageError("a conversation is no JSON document", where="--json", fix="give --prompt TEXT with --json")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    sampling.check()
    target = find_target(target_name)
    if compare_base and target.adapter_dir is None:
        raise UsageError(
            "the model has no adapter, so there is no base to compare it with",
            where="--base",
            fix="give a run or an adapter, or leave --base out",
        )
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


def _check_is_chat(form: PromptForm) -> None:
    if form.chat is None:
        raise UsageError(
            f"only a chat has a template, and here the form of prompts is {form.description}",
            where="--chat-template, --chat-template-kwargs",
            fix="leave these out",
        )
