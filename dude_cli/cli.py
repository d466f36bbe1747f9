"""The command line: parse, call one function of `commands/`, map errors to exit codes."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

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

    key = None if option is None or words[:1] not in (["init"], ["train"]) else key_of_option(option)
    if key is None:
        return None
    (place, word), *_ = [(place, word) for place, word in enumerate(words) if word.partition("=")[0] == option]
    value = word.partition("=")[2] or "".join(words[place + 1 : place + 2])
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

Format = Literal["merged", "peft", "lora"]
ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, or a shipped name: see `dude ls`.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, such as train.learning_rate=1e-4.")
]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Three steps on a tiny random model and generated rows, offline; in RUN-smoke.")
]
BaseModelPath = Annotated[
    str | None, typer.Option("--base-model", help="Where the adapter's base model is now, if it has moved.")
]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Use the adapter on a base with other weights than its own.")
]
Dtype = Annotated[
    str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; as trained, or as saved, if not given.")
]
NumProcesses = Annotated[
    int | None,
    typer.Option("--num-processes", min=1, help="Ranks on this machine; one for each visible GPU if not given."),
]


Verb = Callable[..., None]


def _verb(name: str | None = None, *, if_stopped: str = "") -> Callable[[Verb], Verb]:
    """Make a function a verb: beside its own options it has --json and --quiet, which give its `output`, and --debug.

    What goes wrong in it is told; `if_stopped` says what a signal leaves undone.
    """

    def register(function: Verb) -> Verb:
        @functools.wraps(function)
        def verb(*, json: bool, quiet: bool, debug: bool, **options: Any) -> None:
            output = Output(json, quiet)
            with _reported(output, debug=debug, if_stopped=if_stopped):
                function(**options, output=output)

        own = [option for option in _options(function) if option.name != "output"]
        options = [*own, *_options(_common)]
        verb.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
        verb.__annotations__ = {option.name: option.annotation for option in options}
        return app.command(name)(verb)

    return register


def _options(function: Callable[..., Any]) -> list[inspect.Parameter]:
    found = inspect.signature(function, eval_str=True).parameters.values()
    return [option.replace(kind=inspect.Parameter.KEYWORD_ONLY) for option in found]


def _common(
    json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout, everything else on stderr.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result and errors.")] = False,
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


def _show_version(asked: bool) -> None:
    if asked:
        print(f"dude {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@_verb(if_stopped="the same command starts again")
def init(
    config: ConfigPath,
    overrides: Overrides = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only predict the memory that a training takes; nothing is loaded.")
    ] = False,
    smoke: Smoke = False,
    num_processes: NumProcesses = None,
    *,
    output: Output,
) -> None:
    """Check everything, decompose each target layer, and save the initial adapter."""
    from dude_cli.commands import training

    training.init(
        config,
        overrides or [],
        smoke=smoke,
        estimate=estimate,
        num_processes=num_processes,
        output=output,
    )


@_verb(if_stopped="what was not saved is lost, and the same command starts or continues the run")
def train(
    config: ConfigPath,
    overrides: Overrides = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder that has a run.")] = False,
    allow_changes: Annotated[
        bool,
        typer.Option(
            "--allow-changes",
            help="Continue a run with other settings, rows, ranks or commit of the base; its bytes cannot be repeated.",
        ),
    ] = False,
    smoke: Smoke = False,
    num_processes: NumProcesses = None,
    *,
    output: Output,
) -> None:
    """Train; an interrupted run continues. Prepares first what `dude init` has not."""
    from dude_cli.commands import training

    training.train(
        config,
        overrides or [],
        smoke=smoke,
        overwrite=overwrite,
        num_processes=num_processes,
        allow_changes=allow_changes,
        output=output,
    )


@_verb("eval", if_stopped="the scores written so far stay")
def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|ADAPTER|MODEL]", help="What to score; the newest finished run if not given."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="lm-eval task or group, such as mmlu or gsm8k; may be repeated.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples in the prompt; mmlu and gsm8k: 5 if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first questions of each task.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Sequences per forward.")] = None,
    base: Annotated[bool, typer.Option("--base", help="Score the base model too, and show the difference.")] = False,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--compare",
            metavar="A B",
            help="Compare two runs, adapters, models or result files on the same questions, with a p-value.",
        ),
    ] = None,
    rescore: Annotated[bool, typer.Option("--rescore", help="Score again what was scored before.")] = False,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Local copies DIR/mmlu and DIR/gsm8k; nothing is downloaded.")
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option("--include-path", help="Folder with lm-eval task files of your own.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output", help="Folder for the results; a run's own eval/.")
    ] = None,
    base_model: BaseModelPath = None,
    allow_other_base: AllowOtherBase = False,
    dtype: Dtype = None,
    num_processes: NumProcesses = None,
    *,
    output: Output,
) -> None:
    """Score a run, an adapter or a model with lm-eval, or compare two."""
    from dude_cli.commands import comparing, scoring

    options = scoring.EvalOptions(
        task_names=task or (),
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        data_dir=data_dir,
        include_paths=include_path or (),
        output_dir=output_dir,
        base_model=base_model,
        allow_other_base=allow_other_base,
        dtype=dtype,
        num_processes=num_processes,
        rescore=rescore,
    )
    if compare is not None:
        comparing.compare(compare, options, target_name=target, compare_base=base, output=output)
    else:
        scoring.evaluate(target, options, compare_base=base, output=output)


@_verb()
def generate(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|ADAPTER|MODEL]", help="What answers; the newest finished run if not given."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to answer, - for standard input; may be repeated.")
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Answer line by line.")] = False,
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told before a chat; for runs on chats alone.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer beside the tuned one.")] = False,
    raw: Annotated[
        bool, typer.Option("--raw", help="Send the text exactly as it is, not in the form of the training's prompts.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", min=0, max=1, help="Choose among the likeliest tokens of this share in all.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random choice with a temperature.")] = 0,
    base_model: BaseModelPath = None,
    allow_other_base: AllowOtherBase = False,
    dtype: Dtype = None,
    *,
    output: Output,
) -> None:
    """Answer prompts with a run, an adapter or a model."""
    from dude_cli.commands import answering

    answering.generate(
        target,
        prompt or [],
        interactive=interactive,
        system=system,
        raw=raw,
        compare_base=base,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        dtype=dtype,
        base_model=base_model,
        allow_other_base=allow_other_base,
        output=output,
    )


@_verb(if_stopped="nothing was exported")
def export(
    target: Annotated[str, typer.Argument(metavar="RUN|ADAPTER", help="What to export.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    kind: Annotated[
        Format,
        typer.Option(
            "--format",
            help="merged: a model of its own; peft: an adapter for PEFT, exact; lora: the closest plain LoRA.",
        ),
    ],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Rank of the plain LoRA.")] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            "--max-error",
            min=0.0,
            max=1.0,
            help="Take the lowest rank that leaves out at most this share of the learned change, in every layer.",
        ),
    ] = None,
    base_model: BaseModelPath = None,
    allow_other_base: AllowOtherBase = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Of the merged model: float32, bfloat16 or float16; as trained.")
    ] = None,
    *,
    output: Output,
) -> None:
    """Write a trained adapter for other programs, load it again, and say how exact it is."""
    from dude_cli.commands import exchanging

    exchanging.export(
        target,
        out,
        kind=kind,
        rank=rank,
        max_error=max_error,
        dtype=dtype,
        base_model=base_model,
        allow_other_base=allow_other_base,
        output=output,
    )


@_verb("import", if_stopped="nothing was imported")
def import_adapter(
    folder: Annotated[Path, typer.Argument(metavar="PEFT_FOLDER", help="A LoRA, DoRA or PiSSA adapter of PEFT's.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    base_model: Annotated[
        str | None, typer.Option("--base-model", help="The base model; the one that the adapter names if not given.")
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option("--initial", help="The adapter as it was saved before its training, for a PiSSA start."),
    ] = None,
    quantization: Annotated[
        str | None, typer.Option("--quantization", help="How the base was quantised in the training: nf4 or int8.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="Dtype of the base: float32, bfloat16 or float16; as it was saved.")
    ] = None,
    *,
    output: Output,
) -> None:
    """Make an adapter of dude's from one of PEFT's, to evaluate, continue or export it."""
    from dude_cli.commands import exchanging

    exchanging.import_adapter(
        folder,
        out,
        base_model=base_model,
        initial=initial,
        quantization=quantization,
        dtype=dtype,
        output=output,
    )


@_verb(if_stopped="the same command continues")
def reproduce(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML file, or a shipped name: see `dude ls`.")],
    plan: Annotated[
        bool, typer.Option("--plan", help="Only show the runs and the estimated hours; nothing is read from the hub.")
    ] = False,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="The whole recipe on tiny random models and generated rows, offline.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option("--jobs", min=1, help="Runs at once: one per GPU, or what a CPU has threads for.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output", help="Folder for the runs and the report; runs/reproduce/NAME.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="Local copies of the tasks' data, as for `dude eval`.")
    ] = None,
    *,
    output: Output,
) -> None:
    """Make the runs of a recipe that are missing, score them, and judge the published numbers."""
    from dude_cli.commands import reproducing

    reproducing.reproduce(
        recipe,
        plan_only=plan,
        smoke=smoke,
        jobs=jobs,
        output_dir=output_dir,
        data_dir=data_dir,
        output=output,
    )


@_verb(if_stopped="no report was written")
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, finished or not.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The page, FILE.html; of one run its own report.html, of several ./report.html."),
    ] = None,
    loss: Annotated[
        list[float] | None,
        typer.Option("--loss", help="A loss whose steps and tokens are looked up, in nats per token; may be repeated."),
    ] = None,
    *,
    output: Output,
) -> None:
    """Compare runs on one page: curves, scores with their spread, layers, cost, paired tests."""
    from dude_cli.commands import reporting

    reporting.report(runs, out, loss or [], output=output)


@_verb("ls")
def list_shipped(*, output: Output) -> None:
    """List the shipped configs and recipes."""
    from dude_cli.commands import listing

    listing.list_shipped(output)


@_verb("cp")
def copy_shipped(
    name: Annotated[str, typer.Argument(help="A name that `dude ls` shows.")],
    dest: Annotated[Path, typer.Argument(help="A folder or a new file.")],
    *,
    output: Output,
) -> None:
    """Copy a shipped config or recipe, to edit it."""
    from dude_cli.commands import listing

    listing.copy_shipped(name, dest, output)
