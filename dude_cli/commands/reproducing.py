"""What `dude reproduce` does: a recipe's runs, and its verdict."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dude_cli.commands.scoring import EvalOptions, evaluate_tasks
from dude_cli.commands.training import train
from dude_cli.console import Output
from dude_cli.system.lock import alone_in

if TYPE_CHECKING:
    from dude_cli.reproduce import Job


def reproduce(
    recipe_path: Path,
    *,
    plan_only: bool,
    smoke: bool,
    jobs: int | None,
    output_dir: Path | None,
    data_dir: Path | None,
    output: Output,
) -> None:
    """Plan a recipe's runs, make those that are missing, score them, and judge the numbers."""
    from dude_cli import reproduce as recipes
    from dude_cli.report import write_report_if_possible

    recipe, file = recipes.load_recipe(recipe_path)
    folder = output_dir or Path("runs") / "reproduce" / file.stem
    if smoke:
        recipe, folder = recipes.smoke_recipe(recipe), folder.with_name(f"{folder.name}-smoke")
    plan = recipes.make_plan(recipe, file, folder, smoke=smoke)
    if plan_only:
        from rich.console import Group

        recipes.check_runs(plan)
        shown = Group(recipes.plan_table(plan), "", recipes.plan_summary(plan))
        output.result(shown, recipes.plan_document(plan))
        return
    # Two recipes may have runs of one name, and of one recipe both would write the logs and the report.
    with alone_in(folder, output.say, where=str(folder), fix="choose another folder with --output"):
        recipes.check_runs(plan)
        output.say(recipes.plan_summary(plan))
        places = recipes.slots(jobs, recipe.threads)
        result = recipes.reproduce(plan, places, reproduce_run, data_dir=data_dir, say=output.say)
        output.result(recipes.result_table(result), result.document())
        output.say(f"wrote {folder / 'report.md'} and report.json")
        if result.finished:
            write_report_if_possible(result.finished, folder / "runs.html", output.say)
    recipes.check_result(result)


def reproduce_run(job: Job) -> None:
    """One run of a recipe, in a process of its own: `dude train`, then `dude eval` on the tasks that it lacks."""
    from dude_cli.target import find_target

    output = Output()
    if job.anew or not job.run.is_finished:
        train(
            job.config_path,
            [],
            smoke=job.run.is_smoke,
            overwrite=job.anew,
            allow_changes=False,
            num_processes=1,
            output=output,
        )
    missing = job.missing_tasks()
    if missing:
        options = EvalOptions(data_dir=job.data_dir, num_processes=1, compare_base=job.base)
        evaluate_tasks(find_target(str(job.run.folder)), missing, options, output)
