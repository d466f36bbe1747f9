"""The schema of a recipe: which runs to make, how a rate is chosen, and the numbers to compare them with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dude_cli.config import EvalConfig, Method, Section, find_file, load_sections
from dude_cli.config.schema import LearningRate
from dude_cli.config.section import Contradiction, PositiveInt

PositiveFloat = Annotated[float, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
EVAL_LOSS = "eval_loss"


class Block(Section):
    """Runs that share a base config: every combination of the values below. A list that is left out is the config's."""

    name: str = Field(
        "", description="Goes in front of the names of the runs; needed where two blocks differ in `set`."
    )
    config: str = Field("", description="The base config of this block, if not the recipe's.")
    model: list[str] = Field(default_factory=list, description="Base models, as `model.name_or_path`.")
    method: list[Method] = Field(default_factory=list, description="Methods, as `adapter.method`.")
    rank: list[PositiveInt] = Field(default_factory=list, description="Ranks, as `adapter.rank`.")
    learning_rate: list[LearningRate] = Field(
        default_factory=list, description="Rates, as `train.learning_rate`; of several the best is chosen."
    )
    set: list[str] = Field(default_factory=list, description="Other changes to the config, `key.sub=value`.")
    tasks: list[str] = Field(
        default_factory=list, description="Which of `evaluation.tasks` these runs are scored on; all if left out."
    )


class Selection(Section):
    """How the best of several learning rates is chosen: by the lowest development loss, or a development task."""

    seed: Seed = Field(
        examples=[1], description="The seed of the runs that are compared; one of `seeds` is not repeated."
    )
    task: str | None = Field(
        None, min_length=1, description="lm-eval task on a development split; null: the loss on `data.validation`."
    )
    metric: str | None = Field(None, min_length=1, description="That task's metric and filter; the highest wins.")
    apply_chat_template: bool = Field(False, description="Ask that task's questions in the tokenizer's chat template.")

    def contradictions(self) -> Iterator[Contradiction]:
        if (self.task is None) != (self.metric is None):
            yield "`selection.task` and `selection.metric` belong together: give both or neither", ("task", "metric")


class Of(Section):
    """Which runs a number belongs to: those that agree with every value given here, which must be one setting."""

    block: str | None = Field(None, description="The block's name.")
    model: str | None = Field(None, description="The base model.")
    method: Method | None = Field(None, description="The method.")
    rank: PositiveInt | None = Field(None, description="The rank.")


class Score(Section):
    """One figure of a run: a metric of an lm-eval task."""

    task: str = Field(min_length=1, examples=["gsm8k"], description="lm-eval task or group.")
    metric: str = Field(
        min_length=1,
        examples=["exact_match,strict-match"],
        description="Metric and filter as lm-eval's results name it.",
    )


class Number(Section):
    """A published number, or one of ours, to compare a measured mean with."""

    name: str = Field(min_length=1, examples=["LoRA, GSM8K"], description="The row's name in the report.")
    of: Of = Field(default_factory=Of, description="The runs that it belongs to.")
    base: bool = Field(False, description="It is of the base model, without an adapter.")
    task: str | None = Field(None, min_length=1, description="lm-eval task or group; null for `metric: eval_loss`.")
    metric: str = Field(
        min_length=1,
        examples=["exact_match,none"],
        description="Metric and filter, or `eval_loss` of the development rows.",
    )
    unit: Literal["percent", "nats"] = Field("percent", description="percent: 100 times the metric; nats: as it is.")
    value: float = Field(examples=[53.22], description="The number.")
    spread: float | None = Field(None, ge=0, description="Its own spread, as its source gives it.")
    runs: PositiveInt | None = Field(None, description="How many runs it is the mean of.")
    source: str = Field(min_length=1, examples=["arXiv 2404.02948"], description="Where it was published.")
    place: str = Field("", description="Table, figure or section.")
    tolerance: float | None = Field(
        None, ge=0, description="Largest difference to the measured mean that counts as the same, in `unit`."
    )
    protocol: Literal["known", "unknown"] = Field(
        "known", description="Whether how it was scored is known; if not, it is not comparable."
    )
    unknown: str = Field("", description="What of its set-up its source does not say.")
    required: bool = Field(True, description="Whether the exit code depends on it.")
    beside: Score | None = Field(None, description="Another score of the same runs, shown beside it and not judged.")

    def contradictions(self) -> Iterator[Contradiction]:
        if (self.task is None) != (self.metric == EVAL_LOSS):
            yield f"`metric: {EVAL_LOSS}` has no task, and every other metric has one", ("task", "metric")
        if self.metric == EVAL_LOSS and (self.base or self.unit == "percent"):
            yield f"`metric: {EVAL_LOSS}` is of a trained run, in `unit: nats`", ("metric", "base", "unit")
        if self.protocol == "known" and self.tolerance is None:
            yield "a number whose protocol is known needs a `tolerance`", ("protocol", "tolerance")
        if self.protocol == "unknown" and (self.required or not self.unknown or self.tolerance is not None):
            yield (
                "with `protocol: unknown` a number cannot be met: say what is `unknown`, set `required: false`, and "
                "give no `tolerance`",
                ("protocol", "unknown", "required", "tolerance"),
            )


class ModelSize(Section):
    name: str = Field(min_length=1, examples=["meta-llama/Llama-2-7b-hf"], description="The base model.")
    parameters: PositiveFloat = Field(examples=[6.7e9], description="Its parameters, without the embedding.")


class Budget(Section):
    """What the estimate of `--plan` is made from; nothing is trained by it."""

    device: str = Field(min_length=1, examples=["A100 80 GB"], description="The device that the estimate is for.")
    tflops: PositiveFloat = Field(examples=[120.0], description="Assumed sustained rate, 10^12 operations a second.")
    tokens_per_row: PositiveFloat = Field(examples=[200.0], description="Assumed mean length of a training row.")
    rows: PositiveInt | None = Field(None, description="Training rows; not needed with `train.max_steps`.")
    models: list[ModelSize] = Field(min_length=1, description="Sizes of the base models.")
    evaluation_minutes: float = Field(0.0, ge=0, description="Assumed time to score one run on `evaluation.tasks`.")


class Recipe(Section):
    """One comparison, or one set of published numbers: the whole YAML file."""

    config: str = Field(
        min_length=1, examples=["configs/gsm8k.yaml"], description="The base config: a file or shipped name."
    )
    set: list[str] = Field(default_factory=list, description="Changes to it for every run, `key.sub=value`.")
    matrix: list[Block] = Field(min_length=1, description="The runs to make.")
    seeds: list[Seed] = Field(min_length=1, examples=[[1, 2, 3]], description="Seeds of the runs that are scored.")
    selection: Selection | None = Field(None, description="How one of several learning rates is chosen.")
    evaluation: EvalConfig = Field(description="What the runs at the chosen rate are scored on.")
    numbers: list[Number] = Field(default_factory=list, description="What to compare the scores with.")
    budget: Budget = Field(description="What the estimate of `--plan` is made from.")
    threads: PositiveInt | None = Field(
        None,
        description="CPU threads of each run, so that a result does not depend on how many go at once; null: torch's.",
    )
    notes: list[str] = Field(default_factory=list, description="What a reader of the report must know.")

    def contradictions(self) -> Iterator[Contradiction]:
        if len(set(self.seeds)) < len(self.seeds):
            yield "`seeds` has a value twice", ("seeds",)
        if any(len(block.learning_rate) > 1 for block in self.matrix) and self.selection is None:
            yield "several learning rates need a `selection` that says how one is chosen", ("matrix", "selection")
        tasks = {task.name for task in self.evaluation.tasks}
        if self.selection is not None and self.selection.task in tasks:
            yield (
                f"`selection.task: {self.selection.task}` is among `evaluation.tasks`: a rate is never chosen on what "
                "is reported",
                ("selection.task", "evaluation.tasks"),
            )
        for index, block in enumerate(self.matrix):
            for name in set(block.tasks) - tasks:
                yield f"the task {name} is not in `evaluation.tasks`", (f"matrix.{index}.tasks", "evaluation.tasks")
        names = [number.name for number in self.numbers]
        for index, number in enumerate(self.numbers):
            if number.name in names[:index]:
                yield f"two numbers are called {number.name}", (f"numbers.{index}.name",)
            for key, task in (("task", number.task), ("beside", number.beside and number.beside.task)):
                if task is not None and task not in tasks:
                    yield (
                        f"the task {task} is not in `evaluation.tasks`",
                        (f"numbers.{index}.{key}", "evaluation.tasks"),
                    )


def load_recipe(path: Path) -> tuple[Recipe, Path]:
    """Read the recipe at `path`, or the shipped one of that name; returns it and its file.

    Raises ConfigError with every problem of the file, each with its line and column.
    """
    file = find_file(path, "recipe")
    return load_sections(file, Recipe), file
