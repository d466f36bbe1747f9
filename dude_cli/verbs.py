"""What all verbs of the command line have in common: their options, and how they end when something goes wrong."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dude_cli import __version__
from dude_cli.console import Output
from dude_cli.errors import DudeError, StoppedError, UsageError, explained
from dude_cli.system.launch import print_document, tell_error
from dude_cli.system.stopping import Interrupted, interrupting_signals


class _Verbs(TyperGroup):
    """All verbs: what is wrong with the options themselves is told as other errors are."""

    def main(self, args: Sequence[str] | None = None, **settings: Any) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        try:
            return super().main(words, **settings)
        except SystemExit as end:
            # Of click's errors, which it has printed with the verb's usage, nothing else is left.
            error: Any = end.__context__
            if hasattr(error, "format_message"):
                fix = _without_dashes(getattr(error, "option_name", None), words)
                if fix is not None:
                    print(f"  fix:   {fix}", file=sys.stderr)
                if "--json" in words:
                    known = UsageError(error.format_message(), where=" ".join(words), fix=fix)
                    print_document(known.document())
            raise


def _without_dashes(option: str | None, words: Sequence[str]) -> str | None:
    """What to write for an option that is a key of the config; None for any other."""
    from dude_cli.config.hints import key_of_option

    if option is None or words[:1] not in (["init"], ["train"]):
        return None
    # Of `-rank` click names `-r`, as if it were several options of one letter.
    is_letter = not option.startswith("--")
    places = [
        place
        for place, word in enumerate(words)
        if word.partition("=")[0] == option or (is_letter and word.startswith(option))
    ]
    if not places:
        return None
    name, _, value = words[places[0]].partition("=")
    key = key_of_option(name)
    if key is None:
        return None
    value = value or "".join(words[places[0] + 1 : places[0] + 2])
    return f"write `{key}={value}`: a key of the config has no dashes, and its value belongs to the same word"


app = typer.Typer(
    name="dude",
    cls=_Verbs,
    help="Fine-tune causal language models with DuDe, DoRA, PiSSA and LoRA adapters, from one YAML file to a score.",
    epilog="Exit codes: 0 ok, 1 bug, 2 usage or config, 3 adapter or checkpoint, 4 diverged, 5 memory or disk, "
    "6 a required number was not met, 75 stopped by a signal.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


Verb = Callable[..., None]


def verb(name: str | None = None, *, if_stopped: str = "") -> Callable[[Verb], Verb]:
    """Make a function a verb: beside its own options it has --json and --quiet, which give its `output`, and --debug.

    What goes wrong in it is told; `if_stopped` says what a signal leaves undone.
    """

    def register(function: Verb) -> Verb:
        @functools.wraps(function)
        def run(*, json: bool, quiet: bool, debug: bool, **options: Any) -> None:
            output = Output(json, quiet)
            with _reported(output, debug=debug, if_stopped=if_stopped):
                function(**options, output=output)

        own = [option for option in _options(function) if option.name != "output"]
        options = [*own, *_options(_common)]
        run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        run.__annotations__ = {option.name: option.annotation for option in options}
        return app.command(name)(run)

    return register


def _options(function: Callable[..., Any]) -> list[inspect.Parameter]:
    found = inspect.signature(function, eval_str=True).parameters.values()
    return [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in found]


def _common(
    json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result, warnings and errors.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """The options of every verb."""


@contextmanager
def _reported(output: Output, *, debug: bool, if_stopped: str) -> Iterator[None]:
    """Tell what went wrong and exit with its code: on standard error, a traceback for a bug and with `debug` alone.

    As JSON on standard output too, where that is asked for and has no result yet.
    """
    trace = ""
    try:
        with interrupting_signals():
            yield
        return
    except BrokenPipeError:  # who read the output is gone, as `head` is after some lines: nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(StoppedError.exit_code) from None
    except Exception as error:
        known = explained(error) or DudeError(
            f"this is a bug in dude {__version__}: {type(error).__name__}: {error}", fix="please report the lines above"
        )
        if debug or explained(error) is None:
            trace = traceback.format_exc()
    except (Interrupted, KeyboardInterrupt):
        known = StoppedError(f"stopped; {if_stopped}" if if_stopped else "stopped")
    tell_error(known, trace, as_json=output.as_json and not output.has_result)
    raise typer.Exit(known.exit_code)
