"""Prompts and conversations at the terminal: ask, show the answer as it comes, or tuned and base side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress

from dude_cli.console import Output
from dude_cli.data import Message
from dude_cli.errors import DataError, UsageError
from dude_cli.generation.generate import Answer, Generator, OnText

# Below this many columns two answers side by side are harder to read than one under the other.
TABLE_WIDTH = 72


class Conversation:
    """Questions to a model and, side by side, to its base; each remembers its own answers in a chat.

    `system` is said in front of a chat. Raises UsageError where there is no chat, or the template has no place for it.
    """

    def __init__(self, generator: Generator, *, compare_base: bool, system: str | None = None) -> None:
        if system is not None:
            _check_text(system, "--system")
            _check_system(generator, system)
        self.generator = generator
        self._start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.names = ("base", "tuned") if compare_base else ("tuned",)
        self.asked = 0
        self.reset()

    def reset(self) -> None:
        self._messages: dict[str, list[Message]] = {name: list(self._start) for name in self.names}

    def ask(self, text: str, on_text: OnText = lambda text: None) -> dict[str, Answer]:
        """The answers by name, "base" and "tuned" or that alone; an answer that fails leaves the conversation as is."""
        from dude_cli.adapter import disable_adapters

        question = {"role": "user", "content": text}
        answers = {}
        for name, messages in self._messages.items():
            with disable_adapters(self.generator.model) if name == "base" else nullcontext():
                answers[name] = self.generator.answer([*messages, question], self.asked, on_text)
        self.asked += 1
        if self.generator.form.chat is not None:
            for name, answer in answers.items():
                self._messages[name] += [question, {"role": "assistant", "content": answer.completion}]
        return answers


def answer_prompts(conversation: Conversation, prompts: Sequence[str], output: Output) -> list[dict[str, object]]:
    """Answer each prompt on its own and show it; return what `--json` prints of each."""
    records = []
    for prompt in prompts:
        conversation.reset()
        if len(prompts) > 1 and not output.as_json:
            output.say(f"> {prompt}")
        answers = _ask(conversation, prompt, output)
        tuned = answers["tuned"]
        record = {"prompt": prompt, "text": tuned.prompt.text, "prompt_tokens": len(tuned.prompt.ids), **tuned.record()}
        records.append(record | ({"base": answers["base"].record()} if "base" in answers else {}))
    return records


def converse(conversation: Conversation, output: Output) -> None:
    """Answer line by line until `/quit` or the end of the input; `/reset` forgets what was said."""
    is_chat = conversation.generator.form.chat is not None
    output.say(f"{'/reset starts anew, ' if is_chat else 'each line is on its own; '}/quit or Ctrl-D ends")
    for line in _lines():
        if line == "/quit":
            return
        if line == "/reset":
            conversation.reset()
            output.say("a new conversation")
        elif line:
            try:
                _check_text(line, "--interactive")
                _ask(conversation, line, output)
            except UsageError as error:
                output.err.print(f"error: {error}", highlight=False, soft_wrap=True)


def read_prompt(text: str, *, raw: bool) -> str:
    """A `--prompt`, or for `-` what comes on standard input, without its last line break unless `raw`."""
    if text == "-":
        text = sys.stdin.read()
        text = text if raw else text.removesuffix("\n")
    _check_text(text, "--prompt")
    return text


def _check_system(generator: Generator, system: str) -> None:
    form = generator.form
    if form.chat is None:
        raise UsageError(
            f"only a chat has a system prompt, and here the form of prompts is {form.description}",
            where="--system",
            fix="leave it out, or write it into --prompt",
        )
    question = {"role": "user", "content": "question"}
    fix = "leave --system out, and write it into the first --prompt"
    try:
        text = form.prompt([{"role": "system", "content": system}, question]).text
    except DataError as error:
        form.prompt([question])  # if this is refused too, it is not for the system prompt
        raise UsageError(f"with a system prompt, {error.what}", where="--system", fix=fix) from error
    if system.strip() not in text:
        raise UsageError("the chat template leaves the system prompt out", where="--system", fix=fix)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError("the prompt is not UTF-8 text", where=where, fix="convert it to UTF-8") from error


def _ask(conversation: Conversation, text: str, output: Output) -> dict[str, Answer]:
    """Ask, and show the answer as it comes; two answers, once both are there."""
    if output.as_json:
        return conversation.ask(text)
    if "base" in conversation.names:
        with output.progress.status("answering"):
            answers = conversation.ask(text)
        _show_both(answers, output)
    else:
        answers = _ask_aloud(conversation, text, output)
    for name, answer in answers.items():
        if answer.stop_reason == "length":
            whose = "the answer" if len(answers) == 1 else f"the {name} model's answer"
            output.say(f"{whose} was cut after {answer.new_tokens} tokens; more with --max-new-tokens")
    return answers


def _ask_aloud(conversation: Conversation, text: str, output: Output) -> dict[str, Answer]:
    has_line = False

    def show(piece: str) -> None:
        nonlocal has_line
        has_line = True
        output.write(piece)

    try:
        answers = conversation.ask(text, show)
        has_line = True  # an empty answer is a line too
        return answers
    finally:  # what is said of an interruption starts on a line of its own
        if has_line:
            output.write("\n")


def _show_both(answers: dict[str, Answer], output: Output) -> None:
    from rich.table import Table
    from rich.text import Text

    if output.out.is_terminal and output.out.width >= TABLE_WIDTH:
        table = Table(expand=True)
        for name in answers:
            table.add_column(name, ratio=1)
        table.add_row(*(Text(answer.completion) for answer in answers.values()))
        output.out.print(table)
    else:
        for name, answer in answers.items():
            output.write(f"{name}:\n{answer.completion}\n\n")


def _lines() -> Iterator[str]:
    """The lines of standard input; on a terminal after a prompt sign, with line editing and history."""
    sign = ""
    if sys.stdin.isatty() and sys.stdout.isatty():
        sign = "> "
        with suppress(ImportError):
            import readline  # noqa: F401  # input() uses it once it is loaded
    while True:
        try:
            line = input(sign)
        except BaseException as error:
            if sign:
                print()  # the cursor is still behind the sign
            if isinstance(error, EOFError):
                return
            raise
        yield line.strip()
