"""A recipe as runs: each with its own config and a name that says what it is. Reads the configs and nothing else."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dude_cli.config import Config, EvalTask, load_config
from dude_cli.data.order import steps_per_epoch
from dude_cli.errors import ConfigError
from dude_cli.reproduce.recipe import Block, Number, Recipe
from dude_cli.training.run_dir import has_result
from dude_cli.training.schedule import total_steps
from dude_cli.training.smoke import EVAL_LIMIT


@dataclass(frozen=True)
class Run:
    """One training. `name` is its folder's too; a small one is where `dude train --smoke` puts it."""

    name: str
    config: Config
    is_smoke: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir + ("-smoke" if self.is_smoke else ""))

    @property
    def learning_rate(self) -> float:
        return self.config.train.learning_rate

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def is_finished(self) -> bool:
        return has_result(self.folder)


@dataclass(frozen=True)
class Setting:
    """What is compared: a base config, a model, a method and a rank, with its learning rates and seeds.

    `search` has a run for each rate, none where there is one rate only; `final` has the runs of each rate: those of the
    chosen one are scored on `tasks`.
    """

    name: str
    block: str
    model: str
    method: str
    rank: int
    search: tuple[Run, ...]
    final: dict[float, tuple[Run, ...]]
    tasks: tuple[EvalTask, ...]

    @property
    def rates(self) -> list[float]:
        return list(self.final)

    @property
    def runs(self) -> list[Run]:
        """All that may be made, those of the search too, each once."""
        runs = [*self.search, *itertools.chain.from_iterable(self.final.values())]
        return list({run.name: run for run in runs}.values())


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    name: str
    folder: Path
    settings: tuple[Setting, ...]
    is_smoke: bool = False

    @property
    def development_task(self) -> EvalTask | None:
        """The task that a rate is chosen on; None if it is the development loss."""
        selection = self.recipe.selection
        if selection is None or selection.task is None:
            return None
        return EvalTask(
            name=selection.task,
            limit=EVAL_LIMIT if self.is_smoke else None,
            apply_chat_template=selection.apply_chat_template,
        )

    def setting_of(self, number: Number) -> Setting:
        """The setting that a number belongs to. Raises ConfigError unless there is exactly one."""
        wanted = {key: value for key, value in number.of.model_dump().items() if value is not None}
        found = [
            setting for setting in self.settings if all(getattr(setting, key) == value for key, value in wanted.items())
        ]
        # Runs of one base model at any setting have the same base.
        if found and number.base and len({setting.model for setting in found}) == 1:
            return found[0]
        if len(found) != 1:
            names = ", ".join(setting.name for setting in found or self.settings)
            raise ConfigError(
                f"the number `{number.name}` is of {len(found) or 'none'} of the recipe's settings, not of one",
                where=f"numbers, `of: {wanted}`; " + ("it fits " if found else "there are ") + names,
                fix="give `of` the method, rank, model or block that tells it from the others",
            )
        return found[0]


def make_plan(recipe: Recipe, file: Path, folder: Path, *, smoke: bool = False) -> Plan:
    """Every run that the recipe may need, with its whole config; `smoke` says that each run is to be made small.

    Raises ConfigError for a base config or a change to it that is wrong, for two runs of one name, and for a number
    that is not of exactly one setting.
    """
    several_models = len({model for block in recipe.matrix for model in block.model}) > 1
    settings = [
        setting
        for block in recipe.matrix
        for setting in _settings(recipe, block, file, folder, several_models=several_models, smoke=smoke)
    ]
    names = [setting.name for setting in settings]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two entries of the matrix have the same runs: {', '.join(twice)}",
            where=str(file),
            fix="give blocks that differ in `config` or `set` a `name`",
        )
    plan = Plan(recipe, file.stem, folder, tuple(settings), smoke)
    for number in recipe.numbers:
        setting = plan.setting_of(number)
        if number.task is not None and number.task not in {task.name for task in setting.tasks}:
            raise ConfigError(
                f"the number `{number.name}` needs the task {number.task}, on which its runs are not scored",
                where=f"{file}: the entry of `matrix` for {setting.name}",
                fix="add it to that entry's `tasks`",
            )
    return plan


def _settings(
    recipe: Recipe, block: Block, file: Path, folder: Path, *, several_models: bool, smoke: bool
) -> Iterator[Setting]:
    path = _config_path(block.config or recipe.config, file)
    axes = [
        [f"model.name_or_path={value}" for value in block.model] or [""],
        [f"adapter.method={value}" for value in block.method] or [""],
        [f"adapter.rank={value}" for value in block.rank] or [""],
    ]
    tasks = [task for task in recipe.evaluation.tasks if not block.tasks or task.name in block.tasks]
    evaluation = recipe.evaluation.model_copy(update={"tasks": tasks})
    for values in itertools.product(*axes):
        # A rank is set before `set`, where an alpha that belongs to it may follow.
        changes = [*recipe.set, *filter(None, values), *block.set]
        config = load_config(path, changes)
        rates = block.learning_rate or [config.train.learning_rate]
        parts = [block.name, _slug(config.model.name_or_path) if several_models else ""]
        parts += [config.adapter.method, f"r{config.adapter.rank}"]
        name = "-".join(part for part in parts if part)

        def run(rate: float, seed: int, name: str = name, config: Config = config) -> Run:
            run_name = f"{name}-lr{rate:g}-seed{seed}"
            train = config.train.model_copy(update={"learning_rate": rate})
            own = {"train": train, "seed": seed, "eval": evaluation, "output_dir": str(folder / run_name)}
            return Run(run_name, config.model_copy(update=own), smoke)

        selection = recipe.selection
        search = [run(rate, selection.seed) for rate in rates] if selection is not None and len(rates) > 1 else []
        if search and selection is not None and selection.task is None and search[0].config.data.validation is None:
            raise ConfigError(
                "the learning rate is to be chosen by the development loss, and there are no development rows",
                where=f"{path}: data.validation",
                fix="set data.validation, or give `selection` a task on a development split",
            )
        yield Setting(
            name,
            block.name,
            config.model.name_or_path,
            config.adapter.method,
            config.adapter.rank,
            tuple(search),
            {rate: tuple(run(rate, seed) for seed in recipe.seeds) for rate in rates},
            tuple(evaluation.tasks),
        )


def _config_path(name: str, file: Path) -> Path:
    """A config beside the recipe comes before one in the working folder and a shipped one."""
    beside = file.parent / name
    return beside if beside.is_file() else Path(name)


def _slug(model: str) -> str:
    return re.sub(r"[^\w.]+", "-", model.rpartition("/")[2]).strip("-").lower()


@dataclass(frozen=True)
class Hours:
    """An estimate for one run: hours of training and of scoring on the budget's device; None if unknown."""

    training: float | None
    evaluation: float


def estimate_hours(recipe: Recipe, config: Config) -> Hours:
    """Hours of one run: tokens times operations per token over the assumed rate of the device, plus the scoring.

    A frozen base of N parameters takes 2 N operations per token forward and 2 N for the gradient of the activations,
    and 2 N more where the forward pass is repeated for gradient checkpointing; the adapter's own are left out.
    """
    budget = recipe.budget
    parameters = next((m.parameters for m in budget.models if m.name == config.model.name_or_path), None)
    steps = number_of_steps(recipe, config)
    evaluation = budget.evaluation_minutes / 60
    if parameters is None or steps is None:
        return Hours(None, evaluation)
    rows = min(config.train.global_batch_size, budget.rows or config.train.global_batch_size)
    tokens = steps * rows * min(budget.tokens_per_row, config.data.max_length)
    per_token = (6 if config.train.gradient_checkpointing else 4) * parameters
    return Hours(tokens * per_token / (budget.tflops * 1e12) / 3600, evaluation)


def number_of_steps(recipe: Recipe, config: Config) -> int | None:
    """Optimizer steps, from the config and the budget's number of rows alone; None if that is not enough."""
    if config.train.max_steps is None and recipe.budget.rows is None:
        return None
    return total_steps(config.train, steps_per_epoch(recipe.budget.rows or 0, config.train.global_batch_size))
