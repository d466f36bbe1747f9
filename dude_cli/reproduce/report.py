"""What a recipe gives, as one table for a person and one document for a machine; and the plan before it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.markup import escaped, table_row
from dude_cli.reproduce.execute import Failures
from dude_cli.reproduce.plan import Plan, Setting, estimate_hours
from dude_cli.reproduce.recipe import EVAL_LOSS
from dude_cli.reproduce.verdict import Choice, OverSeeds, Verdict

if TYPE_CHECKING:
    from rich.table import Table

RULE = (
    "A number is reproduced if the mean over all seeds is within its tolerance, which the recipe states. ± of a "
    "published number is its own spread; sd is the standard deviation over the seeds (n - 1); question se is lm-eval's "
    "standard error over the questions."
)


@dataclass(frozen=True)
class Result:
    """Everything that is reported; it has no time and no path, so equal runs give equal reports."""

    plan: Plan
    choices: dict[str, Choice]
    verdicts: list[Verdict]
    scores: dict[str, dict[str, OverSeeds]]
    failures: Failures

    @property
    def not_met(self) -> list[Verdict]:
        return [verdict for verdict in self.verdicts if verdict.number.required and not verdict.is_met]

    @property
    def failed(self) -> dict[str, str]:
        """What has not succeeded, by name, with why.

        A rate of a search that diverged is a result; a run outside of it is not, nor is a setting that has no other.
        """
        searched = {run.name for setting in self.plan.settings for run in setting.search}
        diverged = dict.fromkeys(self.failures.diverged - searched, "diverged, and is not tried again with this config")
        without_rate = {
            name: "diverged at each learning rate of its search"
            for name, choice in self.choices.items()
            if choice.values and choice.diverged == choice.values.keys()
        }
        return dict(sorted((self.failures.messages | diverged | without_rate).items()))

    @property
    def finished(self) -> list[Path]:
        """The folders of the runs that are there, those of the search too, each once."""
        return [run.folder for setting in self.plan.settings for run in setting.runs if run.is_finished]

    def document(self) -> dict[str, Any]:
        """The result for machines."""
        return {
            "recipe": self.plan.name,
            "rule": RULE,
            "notes": self.plan.recipe.notes,
            "numbers": [_verdict_document(verdict) for verdict in self.verdicts],
            "settings": [self._setting_document(setting) for setting in self.plan.settings],
            "failed": self.failed,
            "diverged": sorted(self.failures.diverged),
        }

    def _setting_document(self, setting: Setting) -> dict[str, Any]:
        choice = self.choices[setting.name]
        runs = () if choice.rate is None else setting.final[choice.rate]
        return {
            "name": setting.name,
            "model": setting.model,
            "method": setting.method,
            "rank": setting.rank,
            "learning_rate": choice.rate,
            "at_edge": choice.at_edge,
            "development": {f"{rate:g}": value for rate, value in choice.values.items()},
            "runs": [run.name for run in runs],
            "scores": {name: asdict(summary) for name, summary in self.scores[setting.name].items()},
        }

    def markdown(self) -> str:
        """The result as a page."""
        recipe = self.plan.recipe
        parts = [f"# {escaped(self.plan.name)}", ""]
        if self.verdicts:
            parts += [
                *_markdown_table(VERDICT_COLUMNS, [verdict_cells(verdict) for verdict in self.verdicts]),
                "",
                RULE,
                "",
            ]
        unknown = [verdict.number for verdict in self.verdicts if verdict.number.unknown]
        if unknown:
            parts += ["Not known of the published set-ups:", ""]
            lines = [f"{number.name} ({number.source}): {number.unknown}" for number in unknown]
            parts += [*_bullets(lines), ""]
        searched = [setting for setting in self.plan.settings if setting.search]
        if searched:
            what = "loss" if recipe.selection is None or recipe.selection.task is None else str(recipe.selection.task)
            seed = recipe.selection.seed if recipe.selection is not None else ""
            parts += [f"## Learning rates, by development {escaped(what)} (seed {seed})", ""]
            parts += [*_markdown_table(*self._rates(searched)), ""]
        parts += ["## Scores at the chosen rate", "", *_markdown_table(*self.score_rows()), ""]
        if self.failed:
            parts += ["## Failed runs", ""]
            parts += [*_bullets(f"{name}: {message}" for name, message in self.failed.items()), ""]
        if recipe.notes:
            parts += ["## Notes", "", *_bullets(recipe.notes), ""]
        return "\n".join(parts)

    def score_rows(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows of every figure of every setting, as lm-eval gives it."""
        rows = []
        for setting in self.plan.settings:
            rate = self.choices[setting.name].rate
            label = [setting.name, "-" if rate is None else f"{rate:g}"]
            for name, summary in self.scores[setting.name].items() or [("-", None)]:
                cells = ["-"] * 4
                if summary is not None:
                    spreads = [summary.mean, summary.sd, summary.stderr]
                    mean, sd, stderr = ("-" if value is None else f"{value:.4f}" for value in spreads)
                    cells = [mean, sd, str(summary.n), stderr]
                rows.append([*label, name, *cells])
        return ["setting", "rate", "figure", "mean", "sd", "n", "question se"], rows

    def _rates(self, settings: list[Setting]) -> tuple[list[str], list[list[str]]]:
        rates = sorted({rate for setting in settings for rate in setting.rates})
        rows = []
        for setting in settings:
            choice = self.choices[setting.name]
            cells = [_rate_cell(choice, rate) for rate in rates]
            best = (
                "-" if choice.rate is None else f"{choice.rate:g}" + (" (edge of the grid)" if choice.at_edge else "")
            )
            rows.append([setting.name, *cells, best])
        return ["setting", *(f"{rate:g}" for rate in rates), "chosen"], rows


VERDICT_COLUMNS = [
    *("number", "published", "measured", "sd", "n", "question se", "difference", "tolerance", "verdict", "beside"),
    "source",
]

# A terminal has room for these; report.md has all.
SCREEN_COLUMNS = ["number", "published", "measured", "sd", "n", "tolerance", "verdict"]


def verdict_cells(verdict: Verdict) -> list[str]:
    """One row of the table, under `VERDICT_COLUMNS`; percentages have two decimals, losses four."""
    number, measured = verdict.number, verdict.measured
    digits = 4 if number.metric == EVAL_LOSS else 2

    def shown(value: float | None, sign: str = "") -> str:
        return "-" if value is None else f"{value:{sign}.{digits}f}"

    spread = "" if number.spread is None else f" ± {shown(number.spread)}"
    beside = "-"
    if number.beside is not None and verdict.beside is not None:
        beside = f"{number.beside.task} {number.beside.metric}: {shown(verdict.beside.mean)}"
    word = verdict.word + (f" ({verdict.why})" if verdict.why and verdict.word == "not run" else "")
    return [
        number.name,
        f"{shown(number.value)}{spread}",
        shown(measured.mean if measured else None),
        shown(measured.sd if measured else None),
        "-" if measured is None else str(measured.n),
        shown(measured.stderr if measured else None),
        shown(verdict.difference, "+"),
        shown(number.tolerance),
        word,
        beside,
        f"{number.source}, {number.place}" if number.place else number.source,
    ]


def result_table(result: Result) -> Table:
    """The verdicts on the screen; the scores of a recipe that has no numbers."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    columns, rows = result.score_rows()
    if result.verdicts:
        columns = SCREEN_COLUMNS
        places = [VERDICT_COLUMNS.index(column) for column in columns]
        rows = [[verdict_cells(verdict)[place] for place in places] for verdict in result.verdicts]
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def plan_table(plan: Plan) -> Table:
    """The runs with their estimated hours, by setting; the rate of the scored ones is not known before the search."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("runs", "rates", "seeds", "training h", "scoring h", "finished"):
        table.add_column(heading, overflow="fold", justify="left" if heading == "runs" else "right")
    for row in plan_document(plan)["settings"]:
        table.add_row(
            row["name"],
            " ".join(f"{rate:g}" for rate in row["learning_rates"]),
            " ".join(map(str, row["seeds"])),
            _hours(row["training_hours"]),
            _hours(row["evaluation_hours"]),
            f"{row['finished']} of {row['runs']}",
        )
    return table


def plan_document(plan: Plan) -> dict[str, Any]:
    """What `dude reproduce --plan --json` prints: runs and hours by setting, the estimate's assumptions and its sum."""
    settings = [_setting_plan(plan, setting) for setting in plan.settings]
    training = [row["training_hours"] for row in settings]
    evaluation = sum(row["evaluation_hours"] for row in settings)
    return {
        "recipe": plan.name,
        "folder": str(plan.folder),
        "runs": sum(row["runs"] for row in settings),
        "hours": None if None in training else sum(training) + evaluation,
        "budget": plan.recipe.budget.model_dump(),
        "settings": settings,
        "numbers": [number.model_dump() for number in plan.recipe.numbers],
    }


def plan_summary(plan: Plan) -> str:
    """What the plan comes to, and what the estimate is made from."""
    document, budget = plan_document(plan), plan.recipe.budget
    hours = "unknown" if document["hours"] is None else _hours(document["hours"])
    rows = "" if budget.rows is None else f"{budget.rows:,} rows of "
    return (
        f"{document['runs']} runs, about {hours} hours of one {budget.device}. An estimate, not a measurement: {rows}"
        f"{budget.tokens_per_row:g} tokens a row, {budget.tflops:g} TFLOP/s sustained, "
        f"{budget.evaluation_minutes:g} minutes of scoring a run are assumed.\nin {plan.folder}"
    )


def _setting_plan(plan: Plan, setting: Setting) -> dict[str, Any]:
    # Whichever rate is chosen: the seed of the search is not run twice.
    final = setting.final[setting.rates[0]]
    searched = {run.name for run in setting.search}
    added = [run for run in final if run.name not in searched]
    hours = estimate_hours(plan.recipe, final[0].config)
    count = len(setting.search) + len(added)
    return {
        "name": setting.name,
        "learning_rates": setting.rates,
        "seeds": [run.seed for run in final],
        "runs": count,
        "finished": min(count, sum(run.is_finished for run in setting.runs)),
        "training_hours": None if hours.training is None else count * hours.training,
        "evaluation_hours": len(final) * hours.evaluation,
    }


def _hours(hours: float | None) -> str:
    return "unknown" if hours is None else f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}"


def _rate_cell(choice: Choice, rate: float) -> str:
    if rate in choice.diverged:
        return "diverged"
    value = choice.values.get(rate)
    return "-" if value is None else f"{value:.4f}"


def _verdict_document(verdict: Verdict) -> dict[str, Any]:
    return {
        **verdict.number.model_dump(),
        "verdict": verdict.word,
        "why": verdict.why,
        "measured": _summary(verdict.measured),
        "measured_beside": _summary(verdict.beside),
        "difference": verdict.difference,
    }


def _summary(summary: OverSeeds | None) -> dict[str, Any] | None:
    return None if summary is None else asdict(summary)


def _markdown_table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [table_row(columns), "| " + " | ".join(["---"] * len(columns)) + " |", *map(table_row, rows)]


def _bullets(lines: Iterable[str]) -> list[str]:
    return [f"- {escaped(line)}" for line in lines]
