"""A report from runs: which sections it has, in which order, and what is said before them."""

from __future__ import annotations

from collections.abc import Sequence

from dude_cli.evaluation.compare import one_line
from dude_cli.report import charts, numbers, score_tables, setup_tables, training_tables
from dude_cli.report.collect import Run
from dude_cli.report.content import Report, Section, Table
from dude_cli.report.paired import Changed, changed_answers, chosen_settings, pairs
from dude_cli.report.settings import METHODS, Setting, group_runs, repeated_seeds

SHOWN_CHANGES = 5
_SHOWN_CHARACTERS = 300


def build_report(runs: Sequence[Run], *, title: str, losses: Sequence[float] = ()) -> Report:
    """Every section that the runs have something for; `losses` are looked up in the curves."""
    settings = group_runs(runs)
    by_evaluation = numbers.uses_evaluations(runs)
    levels = list(losses) or numbers.common_losses(runs, by_evaluation)
    sections = [
        _of("results", "Results", setup_tables.headline_table(settings)),
        _scores(settings),
        *_sweeps(settings),
        Section(
            "curves",
            "Curves",
            "Thick is the mean of a setting's runs, thin one run. Loss, gradient norm and speed are running means "
            "over a twentieth of the logged steps, with the values themselves faint behind.",
            charts=charts.training_charts(settings),
            legend=charts.legend(settings),
        ),
        _of("convergence", "Convergence", training_tables.convergence_table(settings, levels, by_evaluation)),
        _of("stability", "Stability", training_tables.stability_table(settings)),
        _layers(settings),
        _kept(settings),
        _paired(settings),
        _of("cost", "Cost", training_tables.cost_table(settings)),
        _of(
            "setup",
            "Set-up",
            setup_tables.common_table(settings),
            setup_tables.runs_table(settings),
            setup_tables.evaluations_table(settings),
        ),
    ]
    shown = [section for section in sections if _has_content(section)]
    return Report(title, _subtitle(settings), _warnings(settings), shown)


def _of(name: str, title: str, *tables: Table) -> Section:
    return Section(name, title, tables=tables)


def _has_content(section: Section) -> bool:
    return bool(section.charts or section.lists or section.text or any(table.rows for table in section.tables))


def _scores(settings: Sequence[Setting]) -> Section:
    table = score_tables.scores_table(settings)
    if not table.rows:
        return Section("scores", "Scores", "These runs were not evaluated yet: `dude eval RUN --base`.")
    text = "A dot is a run, a diamond the mean of several with one standard deviation, the dashed line the base model."
    return Section("scores", "Scores", text, tables=[table], charts=charts.score_charts(settings))


def _sweeps(settings: Sequence[Setting]) -> list[Section]:
    sections = []
    for key, axis in charts.SWEEPS.items():
        if not all(key in setting.values for setting in settings):
            continue
        drawn, styles = charts.sweep_charts(settings, key)
        if drawn:
            text = (
                "A line joins the means; bars are one standard deviation over runs; the dashed line is the base model."
            )
            sections.append(Section(axis.replace(" ", "-"), axis.capitalize(), text, charts=drawn, legend=styles))
    return sections


def _layers(settings: Sequence[Setting]) -> Section:
    overall = training_tables.layers_table(settings, by_kind=False)
    if not overall.rows:
        return Section("layers", "Layers")
    kinds = training_tables.layers_table(settings, by_kind=True)
    drawn = charts.layer_charts(settings)
    text = "By block of the model, the mean over the block's layers and over the runs."
    return Section("layers", "Layers", text, tables=[overall, kinds], charts=drawn, legend=charts.legend(settings))


def _kept(settings: Sequence[Setting]) -> Section:
    table = score_tables.kept_table(settings)
    text = (
        ""
        if table.rows
        else (
            "Nothing was measured that says it. Score what the training was not for, with the base beside it: "
            "`dude eval RUN --base --task NAME`, with a benchmark, or a loss on the base's own kind of text (a "
            "task of lm-eval such as wikitext), that is not in the config's eval.tasks."
        )
    )
    return Section("kept", "What is kept of the base", text, tables=[table])


def _paired(settings: Sequence[Setting]) -> Section:
    chosen = chosen_settings(settings)
    changes = {heading: lines for changed in changed_answers(chosen) for heading, lines in _change_lists(changed)}
    tables = [score_tables.pairs_table(pairs(chosen))]
    return Section("pairs", "Same questions", _how_chosen(settings, chosen), tables=tables, lists=changes)


def _how_chosen(settings: Sequence[Setting], chosen: Sequence[Setting]) -> str:
    """What is to be said where not all settings are compared."""
    if len(chosen) == len(settings) or not score_tables.all_scores(settings):
        return ""
    has_choice = {setting.method for setting in chosen}
    without = dict.fromkeys(METHODS[setting.method] for setting in settings if setting.method not in has_choice)
    text = (
        f"{len(settings)} settings are too many to compare all of them: of each method the one with the lowest mean "
        "evaluation loss is, and no test score chooses."
    )
    return text + (f" Of {', '.join(without)} none could be chosen, without an evaluation loss." if without else "")


def _change_lists(changed: Changed) -> list[tuple[str, list[str]]]:
    comparison = changed.comparison
    found = []
    for word, changes in (("from wrong to right", comparison.gained), ("from right to wrong", comparison.lost)):
        if comparison.test is None or not changes:
            continue
        if comparison.test.method != "exact McNemar":
            word = {"from wrong to right": "to a better number", "from right to wrong": "to a worse number"}[word]
        heading = (
            f"{changed.label}: {len(changes)} of {comparison.test.n} {word}, base to tuned; "
            f"{comparison.task}, {comparison.metric}"
        )
        lines = [
            "{} — base: {}; tuned: {}; right: {}".format(
                *(one_line(text, _SHOWN_CHARACTERS) for text in (one.question, one.answer_a, one.answer_b, one.target))
            )
            for one in changes[:SHOWN_CHANGES]
        ]
        more = [f"and {len(changes) - SHOWN_CHANGES} more"] if len(changes) > SHOWN_CHANGES else []
        found.append((heading, lines + more))
    return found


def _subtitle(settings: Sequence[Setting]) -> str:
    runs = [run for setting in settings for run in setting.runs]
    models = ", ".join(dict.fromkeys(run.config.model.name_or_path for run in runs))
    methods = ", ".join(dict.fromkeys(METHODS[setting.method] for setting in settings))
    seeds = sorted({run.seed for run in runs})
    return (
        f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} of {len(settings)} "
        f"{'setting' if len(settings) == 1 else 'settings'}: {methods} on {models}; "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}."
    )


def _warnings(settings: Sequence[Setting]) -> list[str]:
    runs = [run for setting in settings for run in setting.runs]
    warnings = []
    for run in runs:
        if run.adapter_sha256 is None:
            last = run.steps[-1]["step"] if run.steps else 0
            warnings.append(f"{run.folder} is not finished: the numbers are those up to step {last}.")
        if run.left_out:
            warnings.append(
                f"{run.folder}/eval: {', '.join(run.left_out)} left out, of another adapter than the run has now: "
                "`dude eval` scores this one."
            )
    for setting in settings:
        for seed in repeated_seeds(setting):
            warnings.append(
                f"{setting.label}: seed {seed} was run more than once. These runs are not independent, so the standard "
                "deviations are too small."
            )
    commits = {run.environment.get("git_commit") for run in runs}
    if len(commits) > 1:
        warnings.append(f"The runs are of {len(commits)} versions of the code: see the commits under Set-up.")
    names: dict[str, set[str]] = {}
    for score in score_tables.all_scores(settings):
        names.setdefault(score.label, set()).add(score.questions)
    for label, forms in names.items():
        if len(forms) > 1:
            warnings.append(
                f"{label} was scored in {len(forms)} forms (prompts, task version, answer length): scores of one "
                "form are compared with each other alone."
            )
    return warnings
