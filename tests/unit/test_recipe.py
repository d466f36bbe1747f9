"""Recipes: what may be in one, the runs that it plans, the rate that is chosen, the verdicts."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt
from report_runs import scored
from scipy import stats

from dude_cli import shipped
from dude_cli.config import dump_config
from dude_cli.errors import ConfigError, NumberNotMetError, UsageError
from dude_cli.evaluation import write_results
from dude_cli.reproduce import (
    Plan,
    Recipe,
    Result,
    check_result,
    check_runs,
    load_recipe,
    make_plan,
    plan_document,
    smoke_recipe,
)
from dude_cli.reproduce.execute import Failures
from dude_cli.reproduce.plan import Run, estimate_hours, number_of_steps
from dude_cli.reproduce.scores import Measured, eval_loss
from dude_cli.reproduce.verdict import Choice, OverSeeds, Verdict, choose_rate, judge, over_seeds, setting_scores

RECIPES = [name for name, _ in shipped.list_shipped() if name.startswith("recipes/")]
TEXT = """\
config: configs/quickstart.yaml
matrix:
  - {method: [lora, dude], learning_rate: [1e-3, 2e-3, 4e-3]}
selection: {seed: 1}
seeds: [1, 2, 3]
evaluation: {tasks: [{name: quickstart_problems, num_fewshot: 0}, {name: quickstart_choices}]}
numbers:
  - name: LoRA
    of: {method: lora}
    task: quickstart_problems
    metric: exact_match,strict-match
    value: 50.0
    tolerance: 1.0
    source: ours
budget: {device: CPU core, tflops: 0.03, tokens_per_row: 60, models: [{name: "embedded:quickstart", parameters: 8e5}]}
"""


def plan_of(tmp_path: Path, text: str = TEXT, *, smoke: bool = False) -> Plan:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    recipe, found = load_recipe(file)
    return make_plan(smoke_recipe(recipe) if smoke else recipe, found, tmp_path / "out", smoke=smoke)


def finish(run: Run, *, eval_loss: float | None = None, score: float | None = None, **changes: Any) -> None:
    """Write what a finished run has; `changes` are of its results."""
    (run.folder / "adapter").mkdir(parents=True, exist_ok=True)
    (run.folder / "adapter" / "adapter_config.json").write_text(
        json.dumps({"sha256": f"of {run.name}", "base_model": {"fingerprint": "of the base", "dtype": "float32"}})
    )
    if eval_loss is not None:
        lines = [{"step": 0, "eval_loss": 9.0}, {"step": 1, "loss": 1.0}, {"step": 1, "eval_loss": eval_loss}]
        (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if score is not None:
        name = "quickstart_problems"
        scores = {"exact_match,strict-match": score, "exact_match_stderr,strict-match": 0.02}
        results = scored([1.0], task=name, adapter_sha256=f"of {run.name}", base_fingerprint="of the base")
        write_results(results | {"results": {name: scores}} | changes, run.folder / "eval")


def test_every_problem_of_a_recipe_is_reported_at_once_with_its_line(tmp_path: Path) -> None:
    text = TEXT.replace("seeds: [1, 2, 3]", "seeds: [1, one]").replace("method: [lora, dude]", "methods: [lora, dude]")
    text = text.replace("tolerance: 1.0", "tolerence: 1.0")
    with pytest.raises(ConfigError) as error:
        plan_of(tmp_path, text)
    lines = str(error.value).splitlines()
    assert [line.partition("mine.yaml:")[2].split(":")[0] for line in lines] == ["3", "5", "13"]
    assert "did you mean `method`?" in lines[0].replace("`matrix.0.method`", "`method`")
    assert "did you mean" in lines[2]
    assert "tolerance" in lines[2]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("selection: {seed: 1}\n", "", "several learning rates need a `selection`"),
        (
            "selection: {seed: 1}",
            "selection: {seed: 1, task: quickstart_problems, metric: acc}",
            "a rate is never chosen on what is reported",
        ),
        ("seeds: [1, 2, 3]", "seeds: [1, 1]", "has a value twice"),
        ("seeds: [1, 2, 3]", "seeds: 3", "`seeds` is 3; wanted a list of one or more whole numbers"),
        ("4e-3]", "4e3]", "`matrix.0.learning_rate.2` is 4000.0; wanted a number above 0 and of at most 1000"),
        ("[1e-3, 2e-3, 4e-3]", "1e-3", "learning_rate` is 0.001; wanted a list of numbers"),
        ("    task: quickstart_problems", "    task: gsm8k", "the task gsm8k is not in `evaluation.tasks`"),
        ("    tolerance: 1.0\n", "", "needs a `tolerance`"),
        ("    tolerance: 1.0\n", "    protocol: unknown\n", "with `protocol: unknown` a number cannot be met"),
        ("    metric: exact", "    metric: eval_loss #", "`metric: eval_loss` has no task"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, TEXT.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("of: {method: lora}", "of: {method: dora}", "is of none of the recipe's settings"),
        ("of: {method: lora}", "of: {}", "is of 2 of the recipe's settings"),
        ("learning_rate: [1e-3", "set: [train.max_stops=3], learning_rate: [1e-3", "did you mean `max_steps`"),
        (
            "learning_rate: [1e-3",
            "tasks: [quickstart_choices], learning_rate: [1e-3",
            "`LoRA` needs the task quickstart_problems",
        ),
        ("selection:", "  - {method: [lora]}\nselection:", "two entries of the matrix have the same runs: lora-r16"),
    ],
)
def test_a_recipe_that_does_not_fit_its_configs_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in TEXT
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, TEXT.replace(old, new))


def test_without_development_rows_no_rate_can_be_chosen_by_their_loss(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are no development rows"):
        plan_of(tmp_path, "set: [data.validation=null]\n" + TEXT)


def test_the_runs_have_their_whole_config_and_names_that_say_what_they_are(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    lora, dude = plan.settings
    assert (lora.name, dude.name) == ("lora-r16", "dude-r16")
    assert [run.name for run in lora.search] == [f"lora-r16-lr{rate}-seed1" for rate in ("0.001", "0.002", "0.004")]
    run = dude.final[0.002][2]
    assert (run.name, run.folder) == ("dude-r16-lr0.002-seed3", tmp_path / "out" / "dude-r16-lr0.002-seed3")
    config = run.config
    assert (config.adapter.method, config.train.learning_rate, config.seed) == ("dude", 0.002, 3)
    assert [task.name for task in config.eval.tasks] == ["quickstart_problems", "quickstart_choices"]
    assert plan_document(plan)["runs"] == 2 * (3 + 2)  # the seed of the search is one of the three


def test_runs_of_another_recipe_are_refused_by_name(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    for run in plan.settings[0].runs:
        finish(run)
        (run.folder / "config.yaml").write_text(dump_config(run.config))
    check_runs(plan)
    check_runs(plan_of(tmp_path, "set: [train.logging_steps=7, eval.batch_size=3]\n" + TEXT))  # nothing learned
    other = plan_of(tmp_path, "set: [train.max_steps=30, adapter.alpha=8.0]\n" + TEXT)
    with pytest.raises(UsageError, match="9 runs here are of another config") as error:
        check_runs(other)
    assert "  lora-r16-lr0.002-seed3: adapter.alpha, train.max_steps" in str(error.value)
    assert "dude-r16" not in str(error.value)
    check_runs(plan_of(tmp_path, "set: [train.max_steps=30]\n" + TEXT, smoke=True))  # made anew in any case


def test_the_estimate_is_tokens_times_operations_over_the_assumed_rate(tmp_path: Path) -> None:
    row = plan_document(plan_of(tmp_path))["settings"][0]
    steps, rows, tokens, operations = 500, 32, 60, 4 * 8e5  # no gradient checkpointing there
    assert row["training_hours"] == pytest.approx(5 * steps * rows * tokens * operations / 0.03e12 / 3600)


def test_steps_follow_from_rows_and_epochs(tmp_path: Path) -> None:
    recipe, file = load_recipe(Path("recipes/pissa-table5.yaml"))
    config = make_plan(recipe, file, tmp_path).settings[0].final[2e-5][0].config
    assert number_of_steps(recipe, config) == 782  # 100,000 / 128
    config = config.model_copy(update={"train": config.train.model_copy(update={"num_train_epochs": 3.0})})
    assert number_of_steps(recipe, config) == 3 * 782  # as the trainer does: the last batch of an epoch is a step


def test_hours_are_of_the_rows_that_there_are(tmp_path: Path) -> None:
    recipe, file = load_recipe(Path("recipes/pissa-table5.yaml"))
    config = make_plan(recipe, file, tmp_path).settings[0].final[2e-5][0].config  # a global batch of 128
    few, whole = (
        recipe.model_copy(update={"budget": recipe.budget.model_copy(update={"rows": rows})}) for rows in (16, 128)
    )
    hours = [estimate_hours(one, config).training for one in (few, whole)]
    assert hours[0] == pytest.approx(hours[1] / 8)


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_planned_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, file = load_recipe(Path(name))
    document = plan_document(make_plan(recipe, file, tmp_path / "out"))
    assert document["runs"] > 0
    assert document["hours"] > 0
    assert not (tmp_path / "out").exists()


def test_the_published_figures_are_shipped() -> None:
    expected = {
        "dude-headline": [62.53, 48.35],
        "pissa-table2": [43.23, 53.22, 69.40, 73.31, 74.53, 77.78],
        "pissa-table5": [71.01, 72.38, 76.75, 77.51],
        "dora-commonsense": [77.6, 80.5, 79.7],
        "alpaca-mmlu": [45.7, 47.0, 47.3],
    }
    for name, values in expected.items():
        recipe, _ = load_recipe(Path(f"recipes/{name}.yaml"))
        assert [number.value for number in recipe.numbers] == values
    headline, _ = load_recipe(Path("recipes/dude-headline.yaml"))
    assert all(number.protocol == "unknown" and not number.required for number in headline.numbers)


def test_the_commonsense_recipe_has_the_prompt_of_doras_training(tmp_path: Path) -> None:
    recipe, file = load_recipe(Path("recipes/dora-commonsense.yaml"))
    config = make_plan(recipe, file, tmp_path).settings[2].final[2e-4][0].config
    assert config.data.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
        "\n                ### Instruction:\n                {instruction}\n                \n"
        "                ### Response:\n                "
    )
    assert (config.adapter.alpha, config.adapter.rank, config.data.train_on_inputs) == (64, 32, True)


def test_the_development_loss_is_that_of_the_adapter_that_is_kept(tmp_path: Path) -> None:
    kept, last = TEXT.replace("seeds:", "set: [train.eval_steps=1, train.keep=best]\nseeds:"), TEXT
    for name, text, expected in (("kept", kept, 0.5), ("last", last, 0.7)):
        (tmp_path / name).mkdir()
        run = plan_of(tmp_path / name, text).settings[0].search[0]
        finish(run, eval_loss=0.7)
        with (run.folder / "metrics.jsonl").open("r+") as log:
            earlier = log.read().replace('{"step": 0, "eval_loss": 9.0}', '{"step": 0, "eval_loss": 0.5, "kept": true}')
            log.seek(0)
            log.write(earlier)
        assert eval_loss(run) == Measured(expected)


def test_the_rate_with_the_lowest_development_loss_is_chosen_whatever_the_test_score(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    setting = plan.settings[0]
    for run, loss, score in zip(setting.search, (0.3, 0.2, 0.2), (0.9, 0.1, 0.99), strict=True):
        finish(run, eval_loss=loss, score=score)
    choice = choose_rate(plan, setting, Failures())
    assert choice.rate == 0.002  # of two equal ones the lower rate
    assert not choice.at_edge


def test_no_rate_is_chosen_while_a_run_is_missing_and_one_that_diverged_is_none_to_choose(tmp_path: Path) -> None:
    plan = plan_of(tmp_path)
    setting = plan.settings[0]
    for run in setting.search[:2]:
        finish(run, eval_loss=run.learning_rate)
    assert choose_rate(plan, setting, Failures()).rate is None
    diverged = choose_rate(plan, setting, Failures(diverged={setting.search[2].name}))
    assert diverged.rate == 0.001
    assert diverged.at_edge


def test_a_development_task_is_chosen_by_its_highest_score(tmp_path: Path) -> None:
    selection = 'selection: {seed: 1, task: quickstart_problems, metric: "exact_match,strict-match"}'
    text = TEXT.replace("selection: {seed: 1}", selection).replace("{name: quickstart_problems, num_fewshot: 0}, ", "")
    text = text.replace("    task: quickstart_problems", "    task: quickstart_choices")
    plan = plan_of(tmp_path, text)
    setting = plan.settings[0]
    for run, score in zip(setting.search, (0.3, 0.9, 0.5), strict=True):
        finish(run, score=score)
    assert choose_rate(plan, setting, Failures()).rate == 0.002


def test_mean_and_standard_deviation_are_scipys_and_lm_evals_error_is_kept_apart() -> None:
    values = [0.31, 0.35, 0.36, 0.29]
    summary = over_seeds([Measured(value, 0.01) for value in values], 100.0)
    described = stats.describe([100 * value for value in values])
    assert summary.mean == pytest.approx(described.mean)
    assert summary.sd == pytest.approx(described.variance**0.5)
    assert summary.sd == pytest.approx(statistics.stdev(100 * value for value in values))
    assert (summary.n, summary.stderr) == (4, pytest.approx(1.0))
    assert over_seeds([Measured(0.5)]).sd is None
    assert over_seeds([Measured(0.5, 0.1), Measured(0.5)]).stderr is None


SCORES: dict[str, Any] = {"lora-r16": {}, "dude-r16": {}}


def judged(tmp_path: Path, scores: list[float | None], text: str = TEXT) -> Verdict:
    plan = plan_of(tmp_path, text)
    setting = plan.settings[0]
    for run, score in zip(setting.final[0.002], scores, strict=True):
        finish(run, eval_loss=0.1, score=score)
    return judge(plan, plan.recipe.numbers[0], Choice(0.002, {}))


@pytest.mark.parametrize(
    ("scores", "word"),
    [
        ([0.51, 0.51, 0.51], "reproduced"),  # exactly at the tolerance
        ([0.40, 0.50, 0.60], "reproduced"),
        ([0.512, 0.512, 0.512], "differs"),
        ([0.30, 0.50, 0.77], "differs"),  # noise is no help
        ([0.50, None, 0.50], "not run"),
        ([None, None, None], "not run"),
    ],
)
def test_a_number_is_reproduced_if_the_mean_of_all_seeds_is_within_its_tolerance(
    tmp_path: Path, scores: list[float | None], word: str
) -> None:
    assert judged(tmp_path, scores).word == word


def test_a_number_of_an_unknown_protocol_is_measured_and_not_compared(tmp_path: Path) -> None:
    text = TEXT.replace("    tolerance: 1.0\n", "    protocol: unknown\n    required: false\n    unknown: the model\n")
    verdict = judged(tmp_path, [0.5, 0.5, 0.5], text)
    assert verdict.word == "not comparable"
    assert verdict.measured is not None
    assert verdict.measured.mean == 50


@pytest.mark.parametrize(
    "changes", [{"adapter_sha256": "another"}, {"base_fingerprint": "another"}, {"n-shot": {"quickstart_problems": 5}}]
)
def test_results_of_another_adapter_base_or_prompt_do_not_count(tmp_path: Path, changes: dict[str, Any]) -> None:
    plan = plan_of(tmp_path)
    for run in plan.settings[0].final[0.002]:
        finish(run, eval_loss=0.1, score=0.5, **changes)
    assert judge(plan, plan.recipe.numbers[0], Choice(0.002, {})).word == "not run"


def test_the_exit_is_6_and_names_what_was_not_met(tmp_path: Path) -> None:
    verdict = judged(tmp_path, [0.6, 0.6, 0.6])
    plan = plan_of(tmp_path)
    result = Result(plan, {setting.name: Choice(0.002, {}) for setting in plan.settings}, [verdict], SCORES, Failures())
    with pytest.raises(NumberNotMetError, match=r"LoRA: differs by \+10") as error:
        check_result(result)
    assert error.value.exit_code == 6
    failed = Result(plan, result.choices, [], SCORES, Failures({"lora-r16-lr0.002-seed1": "out of memory"}))
    with pytest.raises(NumberNotMetError, match=r"lora-r16-lr0\.002-seed1: failed, out of memory"):
        check_result(failed)
    check_result(Result(plan, result.choices, [], SCORES, Failures()))


def test_the_report_has_every_score_of_the_chosen_rate_also_without_numbers(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, TEXT.partition("numbers:")[0] + TEXT[TEXT.index("budget:") :])
    for setting in plan.settings:
        for run, score in zip(setting.final[0.002], (0.2, 0.3, 0.4), strict=True):
            finish(run, eval_loss=0.1, score=score)
        finish(setting.final[0.004][0], eval_loss=0.3, score=0.9)
    choices = {setting.name: Choice(0.002, {}) for setting in plan.settings}
    scores = {setting.name: setting_scores(setting, choices[setting.name]) for setting in plan.settings}
    page = Result(plan, choices, [], scores, Failures()).markdown()
    row = "| lora-r16 | 0.002 | quickstart\\_problems exact\\_match,strict-match | 0.3000 | 0.1000 | 3 | 0.0200 |"
    assert row in page
    assert "0.9" not in page


TEXTS = ["a | b\\|c", "*a* _b_ __c__ ~~d~~", "a `b", "``a``", "`a", "<b>[a](b)&amp;$x$", "# a\\", "a\nb\n\n# c\n| d |"]


@pytest.mark.parametrize("text", TEXTS)
def test_no_text_of_a_recipe_is_markup_in_its_report(text: str, tmp_path: Path) -> None:
    """As a reader of Markdown sees it: each text stands there as it is, and the tables are whole."""
    plan = plan_of(tmp_path)
    number = plan.recipe.numbers[0].model_copy(update={"name": text, "source": text, "unknown": text})
    plan = dataclasses.replace(
        plan,
        name=text,
        recipe=plan.recipe.model_copy(update={"notes": [text]}),
        settings=tuple(dataclasses.replace(setting, name=text) for setting in plan.settings),
    )
    verdict = Verdict(number, "not comparable", None, None, text)
    scores = {text: {text: OverSeeds(0.1, None, 1, None)}}
    page = Result(plan, {text: Choice(0.002, {})}, [verdict], scores, Failures({text: text})).markdown()
    shown = " ".join(text.split())
    tokens = MarkdownIt("gfm-like", {"linkify": False}).parse(page)
    lines = [token for token in tokens if token.type == "inline"]
    kinds = {child.type for line in lines for child in line.children or []}
    assert kinds <= {"text", "text_special"}
    texts = ["".join(child.content for child in line.children or []) for line in lines]
    found = [line for line in texts if shown in line]
    # The title, a note, and cells: two of the verdict, the settings' of the rates, two of each one's score.
    once = [f"{shown} ({shown}): {shown}", f"{shown}: {shown}"]
    assert Counter(found) == Counter([*once, *[shown] * (1 + 1 + 2 + 2 + 4)])
    assert page.count("\n## ") == sum(token.type == "heading_open" for token in tokens) - 1


@pytest.mark.parametrize("name", RECIPES)
def test_a_small_recipe_keeps_its_models_methods_and_ranks_and_needs_no_hub(name: str, tmp_path: Path) -> None:
    recipe, file = load_recipe(Path(name))
    small: Recipe = smoke_recipe(recipe)
    whole, plan = make_plan(recipe, file, tmp_path), make_plan(small, file, tmp_path, smoke=True)
    assert [setting.name for setting in plan.settings] == [setting.name for setting in whole.settings]
    names = {task.name for task in small.evaluation.tasks}
    assert names <= {"quickstart_problems", "quickstart_choices"}
    assert all(number.task in names for number in small.numbers if number.task)
    assert all(len(setting.rates) <= 2 for setting in plan.settings)
    assert all(run.folder.name.endswith("-smoke") for setting in plan.settings for run in setting.search)
