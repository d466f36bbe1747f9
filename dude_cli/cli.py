"""The command line: each verb with its options, which calls one function of `commands/`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dude_cli import __version__
from dude_cli.console import Output
from dude_cli.verbs import app, verb

if TYPE_CHECKING:
    from dude_cli.target import Loading

__all__ = ["app"]

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
ChatTemplate = Annotated[
    str | None, typer.Option("--chat-template", help="File with a chat template in place of the tokenizer's.")
]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option("--chat-template-kwargs", help='Values for names in it, such as "{enable_thinking: false}".'),
]
NumProcesses = Annotated[
    int | None,
    typer.Option("--num-processes", min=1, help="Ranks on this machine; one for each visible GPU if not given."),
]


def _show_version(asked: bool) -> None:
    if asked:
        print(f"dude {__version__}")
        raise typer.Exit


def _loading(
    dtype: str | None, base_model: str | None, allow_other_base: bool, template: str | None, values: str | None
) -> Loading:
    from dude_cli.data.chat_template import parse_values
    from dude_cli.target import Loading

    return Loading(dtype, base_model, allow_other_base, template, parse_values(values))


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@verb(if_stopped="the same command starts again")
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


@verb(if_stopped="what was not saved is lost, and the same command starts or continues the run")
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


@verb("eval", if_stopped="the scores written so far stay")
def evaluate(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|ADAPTER|MODEL]", help="What to score; the newest finished run if not given."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--task", help="lm-eval task or group, such as mmlu or gsm8k; may be repeated.")
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option(
            "--rows",
            metavar="FILE",
            help="Rows of your own with their answers, in the form of the training's, or an entry of data.train in "
            "braces; may be repeated.",
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option("--num-fewshot", min=0, help="Examples in the prompt; mmlu and gsm8k: 5 if not given.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only the first questions of each task.")] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Ask in the model's chat template, each example as two turns.")
    ] = False,
    system_instruction: Annotated[
        str | None, typer.Option("--system-instruction", help="What the system's message says, in a chat template.")
    ] = None,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
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
    """Score a run, an adapter or a model with lm-eval or on rows of your own, or compare two."""
    from dude_cli.commands import comparing, scoring
    from dude_cli.config import given_source

    options = scoring.EvalOptions(
        task_names=task or (),
        rows=[given_source(text, "--rows") for text in rows or ()],
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        batch_size=batch_size,
        data_dir=data_dir,
        include_paths=include_path or (),
        output_dir=output_dir,
        loading=_loading(dtype, base_model, allow_other_base, chat_template, chat_template_kwargs),
        num_processes=num_processes,
        compare_base=base,
        rescore=rescore,
    )
    if compare is not None:
        comparing.compare(compare, options, target_name=target, output=output)
    else:
        scoring.evaluate(target, options, output)


@verb()
def generate(
    target: Annotated[
        str | None,
        typer.Argument(metavar="[RUN|ADAPTER|MODEL]", help="What answers; the newest finished run if not given."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to answer, - for standard input; may be repeated.")
    ] = None,
    interactive: Annotated[bool, typer.Option("--interactive", help="Answer line by line.")] = False,
    rows: Annotated[
        list[str] | None,
        typer.Option("--rows", help="Answer each row of this file, folder or hub data set, in the training's form."),
    ] = None,
    output_file: Annotated[
        Path | None, typer.Option("--output", help="With --rows: a new file, for one line of JSON for each row.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="With --rows: how many are answered at once; 8.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told before a chat; for runs on chats alone.")
    ] = None,
    base: Annotated[bool, typer.Option("--base", help="Show the base model's answer beside the tuned one.")] = False,
    chat_template: ChatTemplate = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
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
    """Answer prompts, or the rows of a data set, with a run, an adapter or a model."""
    from dude_cli.commands import answering

    loading = _loading(dtype, base_model, allow_other_base, chat_template, chat_template_kwargs)
    if rows or not (output_file is None and batch_size is None):
        asked = {"--prompt": prompt, "--interactive": interactive, "--system": system is not None, "--raw": raw}
        answering.generate_rows(
            target,
            rows or [],
            output_file,
            batch_size=batch_size,
            others=[option for option, given in asked.items() if given],
            compare_base=base,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            loading=loading,
            output=output,
        )
        return
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
        loading=loading,
        output=output,
    )


@verb(if_stopped="nothing was exported")
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
    from dude_cli.target import Loading

    exchanging.export(
        target,
        out,
        kind=kind,
        rank=rank,
        max_error=max_error,
        dtype=dtype,
        loading=Loading(None, base_model, allow_other_base),
        output=output,
    )


@verb("import", if_stopped="nothing was imported")
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


@verb(if_stopped="the same command continues")
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


@verb(if_stopped="no report was written")
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


@verb("ls")
def list_shipped(*, output: Output) -> None:
    """List the shipped configs and recipes."""
    from dude_cli.commands import listing

    listing.list_shipped(output)


@verb("cp")
def copy_shipped(
    name: Annotated[str, typer.Argument(help="A name that `dude ls` shows.")],
    dest: Annotated[Path, typer.Argument(help="A folder or a new file.")],
    *,
    output: Output,
) -> None:
    """Copy a shipped config or recipe, to edit it."""
    from dude_cli.commands import listing

    listing.copy_shipped(name, dest, output)
