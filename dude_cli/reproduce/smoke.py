"""A recipe made small, so that it runs offline in seconds up to its report."""

from __future__ import annotations

from dude_cli.config import EvalTask
from dude_cli.reproduce.recipe import EVAL_LOSS, Recipe
from dude_cli.training.smoke import EVAL_LIMIT

RATES = 2


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The same models, methods and ranks, with two rates, one seed, and tasks whose data come with the package.

    The data of a recipe's tasks are on the hub. In place of one that scores an answer's likelihood (its metric is
    an `acc`) comes `quickstart_choices`, of any other one `quickstart_problems`: two questions each. Those two stay.
    """
    metrics = _metrics(recipe)
    tasks = [_stand_in(task.name, metrics.get(task.name, "")) for task in recipe.evaluation.tasks]
    numbers = []
    for number in recipe.numbers:
        changed: dict[str, object] = {"beside": None}
        if number.task is not None:
            task, metric = _stand_in(number.task, number.metric)
            changed |= {"task": task, "metric": metric}
        if number.beside is not None:
            task, metric = _stand_in(number.beside.task, number.beside.metric)
            changed["beside"] = number.beside.model_copy(update={"task": task, "metric": metric})
        numbers.append(number.model_copy(update=changed))
    selection = recipe.selection
    if selection is not None and selection.task is not None and selection.metric is not None:
        task, metric = _stand_in(selection.task.removesuffix("_dev"), selection.metric)
        selection = selection.model_copy(update={"task": f"{task}_dev", "metric": metric})
    names = dict.fromkeys(task for task, _ in tasks)
    evaluation = recipe.evaluation.model_copy(
        update={"tasks": [EvalTask(name=name, num_fewshot=0, limit=EVAL_LIMIT) for name in names]}
    )
    return recipe.model_copy(
        update={
            "matrix": [
                block.model_copy(update={"learning_rate": block.learning_rate[:RATES], "tasks": []})
                for block in recipe.matrix
            ],
            "seeds": recipe.seeds[:1],
            "selection": selection,
            "evaluation": evaluation,
            "numbers": numbers,
        }
    )


def _metrics(recipe: Recipe) -> dict[str, str]:
    """A metric of each task, as the numbers name them."""
    scored = [number for number in recipe.numbers if number.metric != EVAL_LOSS]
    found = {number.task: number.metric for number in scored if number.task is not None}
    return {number.beside.task: number.beside.metric for number in recipe.numbers if number.beside} | found


def _stand_in(task: str, metric: str) -> tuple[str, str]:
    if task.startswith("quickstart_") and metric:
        return task, metric
    if task == "quickstart_choices" or metric.startswith("acc"):
        return "quickstart_choices", "acc,none"
    return "quickstart_problems", "exact_match,strict-match"
