"""The order of things: search the rates, choose, run the seeds, score, judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from dude_cli.config import EvalTask
from dude_cli.errors import NumberNotMetError, UsageError
from dude_cli.reproduce.execute import Failures, Job, Slot, Work, run_jobs
from dude_cli.reproduce.plan import Plan, Run
from dude_cli.reproduce.report import Result
from dude_cli.reproduce.verdict import choose_rate, judge, setting_scores
from dude_cli.system import files
from dude_cli.training.init_from import resolve_init_from
from dude_cli.training.resume import changed_settings
from dude_cli.training.run_dir import has_steps


def reproduce(
    plan: Plan,
    places: Sequence[Slot],
    work: Work,
    *,
    data_dir: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Result:
    """Run what is missing of `plan`, and write report.md and report.json to its folder.

    The runs at the chosen rate, and no others, are scored on `evaluation.tasks`.
    """
    recipe, failures = plan.recipe, Failures()

    searched = {run.name for setting in plan.settings for run in setting.search}

    def job(run: Run, tasks: Sequence[EvalTask], *, is_search: bool = False, base: bool = False) -> Job:
        path = plan.folder / "configs" / f"{run.name}.yaml"
        anew = plan.is_smoke and (is_search or run.name not in searched)
        return Job(run, path, tuple(tasks), anew=anew, base=base, data_dir=data_dir)

    development = [] if plan.development_task is None else [plan.development_task]
    search = [job(run, development, is_search=True) for setting in plan.settings for run in setting.search]
    run_jobs(search, places, work, failures, say)
    choices = {setting.name: choose_rate(plan, setting, failures) for setting in plan.settings}

    needs_base = {plan.setting_of(number).name for number in recipe.numbers if number.base}
    final = []
    for setting in plan.settings:
        rate = choices[setting.name].rate
        for index, run in enumerate(setting.final[rate] if rate is not None else ()):
            final.append(job(run, setting.tasks, base=index == 0 and setting.name in needs_base))
    run_jobs(final, places, work, failures, say)

    verdicts = [judge(plan, number, choices[plan.setting_of(number).name]) for number in recipe.numbers]
    scores = {setting.name: setting_scores(setting, choices[setting.name]) for setting in plan.settings}
    result = Result(plan, choices, verdicts, scores, failures)
    files.write_text(plan.folder / "report.md", result.markdown())
    files.write_text(plan.folder / "report.json", json.dumps(result.document(), indent=2, ensure_ascii=False) + "\n")
    return result


def check_runs(plan: Plan) -> None:
    """Raise UsageError for run folders with steps of another config than `plan` has for them, naming what differs.

    As for `dude train`, settings that touch nothing learned may differ. Small runs are made anew in any case.
    """
    if plan.is_smoke:
        return
    runs = [run for setting in plan.settings for run in setting.runs if has_steps(run.folder)]
    changed = {run.name: changed_settings(resolve_init_from(run.config)) for run in runs}
    lines = [f"  {name}: {', '.join(keys)}" for name, keys in changed.items() if keys]
    if lines:
        count = "1 run here is" if len(lines) == 1 else f"{len(lines)} runs here are"
        raise UsageError(
            f"{count} of another config than the recipe has now; different are:\n" + "\n".join(lines),
            where=str(plan.folder),
            fix="give this recipe a folder of its own with --output, or delete the folders of these runs",
        )


def check_result(result: Result) -> None:
    """Raise NumberNotMetError unless every run has succeeded and every required number is met, naming those not met.

    A small run has nothing to meet: it must have succeeded, with a figure for each number.
    """
    smoke = result.plan.is_smoke
    rows = [verdict for verdict in result.verdicts if verdict.word == "not run"] if smoke else result.not_met
    lines = [
        f"{verdict.number.name}: {verdict.word}"
        + ("" if verdict.difference is None or smoke else f" by {verdict.difference:+.4g}")
        + (f" ({verdict.why})" if verdict.why else "")
        for verdict in rows
    ]
    lines += [f"{name}: failed, {message}" for name, message in result.failed.items()]
    if lines:
        raise NumberNotMetError(
            "a run has failed, or a required number is not met:\n" + "\n".join(f"  {line}" for line in lines),
            where=str(result.plan.folder / "report.md"),
            fix="the runs' logs are in logs/ beside it; the same command runs again only what is missing",
        )
