"""The report of run folders: its numbers, its page, its Markdown, and what it says before any number."""

from __future__ import annotations

import json
import re
import shutil
import statistics
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from command import dude, dude_here, environment
from report_runs import scored, write_run

from dude_cli.errors import UsageError
from dude_cli.evaluation import write_results
from dude_cli.report import write_report
from dude_cli.report.build import build_report
from dude_cli.report.collect import read_run
from dude_cli.report.content import Section, Style, Table, text_column
from dude_cli.report.figures import Line, line_chart, thinned
from dude_cli.report.numbers import running_mean, spikes
from dude_cli.report.page import markdown_table
from dude_cli.report.settings import group_runs

BASE = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
RIGHT = {
    ("lora", 1): [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    ("lora", 2): [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    ("dude", 1): [1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0],
    ("dude", 2): [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two methods, two seeds; DuDe ends at the lower loss."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(
            folder / f"{method}-{seed}",
            method=method,
            seed=seed,
            final_loss=(0.5 if method == "dude" else 1.0) + 0.1 * seed,
            right=right,
            base_right=BASE,
        )
        for (method, seed), right in RIGHT.items()
    ]


@pytest.fixture(scope="module")
def written(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str, str]:
    page = tmp_path_factory.mktemp("report") / "all.html"
    document = write_report(runs, page)
    return document, page.read_text(), page.with_suffix(".md").read_text()


def numbers(folders: Sequence[Path], *, losses: Sequence[float] = ()) -> dict[str, Any]:
    """What a report of these runs says, for machines; nothing is drawn."""
    return build_report([read_run(folder) for folder in folders], title="runs", losses=losses).record()


def change_config(run: Path, old: str, new: str) -> None:
    text = (run / "config.yaml").read_text()
    assert old in text
    (run / "config.yaml").write_text(text.replace(old, new))


def rows(document: dict[str, Any], table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(json.dumps(document["tables"][table]["rows"]))
    return found


def test_scores_have_mean_deviation_and_n_and_lm_evals_error_apart(written: tuple[dict[str, Any], str, str]) -> None:
    lora, dude = rows(written[0], "scores")
    assert (lora["setting"], dude["setting"]) == ("LoRA", "DuDe")
    scores = [statistics.fmean(RIGHT["dude", seed]) for seed in (1, 2)]
    assert dude["mean"] == pytest.approx(statistics.fmean(scores))
    assert dude["sd"] == pytest.approx(statistics.stdev(scores))
    assert (dude["n"], dude["stderr"], dude["base"]) == (2, pytest.approx(0.04), pytest.approx(0.25))
    assert rows(written[0], "headline")[1]["eval_loss"]["n"] == 2


def test_what_is_over_the_runs_with_a_base_alone_says_of_how_many(runs: list[Path], tmp_path: Path) -> None:
    without = write_run(tmp_path / "without", seed=3, final_loss=0.8, right=RIGHT["dude", 1])
    lora, dude = rows(numbers([*runs, without]), "scores")
    assert (lora["n"], lora["n_base"]) == (2, 2)
    assert (dude["n"], dude["n_base"], dude["base"]) == (3, 2, pytest.approx(0.25))
    assert all("n_base" not in row for row in rows(numbers(runs), "scores"))


def test_a_loss_is_looked_up_in_every_run_with_its_tokens(runs: list[Path]) -> None:
    document = numbers(runs, losses=[1.2, 0.65])
    found = {(row["loss"], row["setting"]): row for row in rows(document, "convergence")}
    # 0.6 + 2.4 exp(-4 t / 40) is 0.93 at step 20; LoRA's 1.1 + 1.9 exp(-t / 10) is at 1.2 from step 29 on.
    assert found[1.2, "DuDe"]["steps"]["mean"] == 20
    assert found[1.2, "DuDe"]["tokens"]["mean"] == 2000
    assert found[1.2, "LoRA"]["steps"] == {"mean": 30, "sd": None, "n": 1}
    assert (found[1.2, "LoRA"]["reached"], found[1.2, "LoRA"]["runs"]) == (1, 2)
    assert (found[0.65, "LoRA"]["reached"], found[0.65, "LoRA"]["steps"]) == (0, None)


def test_pairs_are_of_the_mean_over_seeds_for_each_question(written: tuple[dict[str, Any], str, str]) -> None:
    found = {(row["a"], row["b"]): row for row in rows(written[0], "pairs")}
    assert set(found) == {("base", "LoRA"), ("base", "DuDe"), ("LoRA", "DuDe")}
    pair = found["LoRA", "DuDe"]
    means = [
        [statistics.fmean(pair) for pair in zip(RIGHT[method, 1], RIGHT[method, 2], strict=True)]
        for method in ("lora", "dude")
    ]
    assert pair["difference"] == pytest.approx(statistics.fmean(means[1]) - statistics.fmean(means[0]))
    assert (pair["lost"], pair["gained"]) == (0, 4)
    assert pair["p_value"] == pytest.approx(2 / 2**4)  # all four changed questions in one direction
    assert all(row["adjusted_p_value"] >= row["p_value"] for row in found.values())


def test_one_run_each_is_tested_by_mcnemar(runs: list[Path]) -> None:
    document = numbers([runs[0], runs[2]])
    pair = next(row for row in rows(document, "pairs") if row["a"] == "LoRA")
    assert (pair["method"], pair["lost"], pair["gained"], pair["p_value"]) == ("exact McNemar", 0, 4, 0.125)


def test_answers_that_changed_are_listed_both_ways(written: tuple[dict[str, Any], str, str]) -> None:
    _, page, markdown = written
    for text in (page, markdown.replace("\\_", "_")):
        assert "LoRA, seed 1: 1 of 8 from wrong to right, base to tuned; sums, acc" in text
        assert "LoRA, seed 1: 1 of 8 from right to wrong, base to tuned; sums, acc" in text
    assert "1 + 1? — base: 7; tuned: 2; right: 2" in page


def test_layers_are_averaged_and_kept_by_kind(written: tuple[dict[str, Any], str, str]) -> None:
    overall = rows(written[0], "layers")[0]
    assert overall["layers"] == 4
    assert overall["direction_change"] == pytest.approx(0.00075)
    assert overall["correlation"]["mean"] == pytest.approx(1.0)
    assert {row["kind"] for row in rows(written[0], "layer_kinds")} == {"q_proj", "up"}


def test_what_the_training_was_not_for_is_what_is_kept(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", right=RIGHT["dude", 1], base_right=BASE, task="reading")
    (kept,) = rows(numbers([run]), "kept")
    assert (kept["base"], kept["tuned"], kept["better"]) == (pytest.approx(0.25), pytest.approx(0.75), "higher")
    other = write_run(tmp_path / "other", right=RIGHT["dude", 1], base_right=BASE)
    assert rows(numbers([other]), "kept") == []


def test_a_rate_against_the_loss_is_drawn_when_it_varies(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"{method}{rate}", method=method, learning_rate=rate)
        for method in ("lora", "dude")
        for rate in (1e-3, 3e-4)
    ]
    document = write_report(folders, tmp_path / "r.html")
    assert [row["setting"] for row in rows(document, "headline")] == [
        "LoRA, lr 3e-4",
        "LoRA, lr 1e-3",
        "DuDe, lr 3e-4",
        "DuDe, lr 1e-3",
    ]
    page = (tmp_path / "r.html").read_text()
    assert '<section id="learning-rate">' in page
    assert {"3e-4", "1e-3"} <= set(re.findall(r">([^<>]*e-\d)</text>", page))


class _Links(HTMLParser):
    """What a page loads, and its ids."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag in ("script", "link", "img", "iframe"):
            self.loaded.append(tag)
        self.loaded += [
            value for key in ("src", "href", "xlink:href") if (value := values.get(key)) and value[0] != "#"
        ]


def test_the_page_needs_nothing_else(written: tuple[dict[str, Any], str, str]) -> None:
    links = _Links()
    links.feed(written[1])
    assert links.loaded == []
    assert "@import" not in written[1]
    assert not re.findall(r"url\((?!#)", written[1])
    assert len(links.ids) == len(set(links.ids)), "an id of one chart would be taken for another's"


def test_charts_have_axes_with_units_and_the_pages_colours(written: tuple[dict[str, Any], str, str]) -> None:
    charts = re.findall(r"<svg[^>]*xmlns:xlink.*?</svg>", written[1], flags=re.DOTALL)
    assert len(charts) >= 10
    for chart in charts:
        root = ElementTree.fromstring(chart)
        assert "width" not in root.attrib
        assert "viewBox" in root.attrib
        texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
        assert len(texts) > 4
        assert "var(--ink)" in chart
        assert not re.search(r"#0[1-9a-f]0", chart)
    words = " ".join(charts)
    for unit in ("loss, nats per token", "optimizer step", "tokens per second", "acc, %", "block of the model"):
        assert f">{unit}</text>" in words


def test_text_from_a_run_cannot_become_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<b>run a&$b$", right=RIGHT["dude", 1], base_right=BASE)
    for samples in (run / "eval").glob("samples*"):
        samples.write_text(samples.read_text().replace("1 + 1?", "<script>alert(1)</script> | # x"))
    write_report([run], tmp_path / "r.html")
    page, markdown = (tmp_path / "r.html").read_text(), (tmp_path / "r.md").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "<b>run" not in page
    assert "\\<script>" in markdown
    assert markdown.startswith("# \\<b>run a\\&\\$b\\$\n")
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in lines)


def test_a_key_in_backticks_is_code_in_markdown_too() -> None:
    note = "`train.eval_steps` is not set, 2 * 3 `is"
    table = Table("t", "T", [text_column("a", "`a` | b")], [{"a": "`c`"}], note)
    lines = markdown_table(table).splitlines()
    assert lines[0] == "| \\`a\\` \\| b |"
    assert lines[2:] == ["| \\`c\\` |", "", "`train.eval_steps` is not set, 2 \\* 3 \\`is"]


def test_the_same_runs_give_the_same_bytes_in_any_order(runs: list[Path], tmp_path: Path) -> None:
    write_report(runs[1:3], tmp_path / "a.html")
    write_report(runs[2:0:-1], tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    assert (tmp_path / "a.md").read_bytes() == (tmp_path / "b.md").read_bytes()


def test_with_early_stopping_the_loss_is_that_of_the_adapter_that_is_kept(tmp_path: Path) -> None:
    """Not the last one's: the adapter, its scores and its layers are those of the kept step."""
    folders = [write_run(tmp_path / "stopped"), write_run(tmp_path / "all", method="lora")]
    change_config(folders[0], "train: {", "train: {eval_steps: 10, early_stopping_patience: 2, ")
    change_config(folders[0], "data: {", "data: {validation: 0.1, ")
    losses = {0: 3.0, 10: 1.5, 20: 1.0, 30: 1.25, 40: 1.75}
    lines = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval_loss" in line:
            line |= {"eval_loss": losses[line["step"]]} | ({"kept": True} if line["step"] <= 20 else {})
    (folders[0] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    document = numbers(folders)
    assert rows(document, "headline")[1]["eval_loss"]["mean"] == 1.0
    plain, stopped = rows(document, "runs")
    assert (stopped["eval_loss"], stopped["steps"], stopped["kept"]) == (1.0, 40, 20)
    assert plain["kept"] is None
    assert "kept" not in rows(numbers(folders[1:]), "runs")[0]
    for name, shown, is_named in (("both", folders, True), ("plain", folders[1:], False)):
        write_report(shown, tmp_path / f"{name}.html")
        for suffix in ("html", "md"):
            assert ("kept step" in (tmp_path / f"{name}.{suffix}").read_text()) == is_named


def test_losses_on_earlier_validation_rows_are_no_part_of_the_curve(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=80)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if "eval_loss" in line:
            line["eval_loss"] = 0.1 if line["step"] < 40 else 1.0
            line |= {"new_rows": True} if line["step"] == 40 else {}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(folder).series("eval_loss") == ([40, 50, 60, 70, 80], [1.0] * 5)
    (row,) = rows(numbers([folder], losses=[0.2]), "convergence")
    assert row["reached"] == 0


def test_an_alpha_that_is_the_rank_is_the_same_written_out(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{seed}", seed=seed) for seed in (1, 2, 3)]
    for folder, alpha in zip(folders[1:], ("4", "8"), strict=True):
        change_config(folder, "rank: 4", f"rank: 4, alpha: {alpha}")
    found = [(setting.label, len(setting.runs)) for setting in group_runs([read_run(folder) for folder in folders])]
    assert found == [("DuDe, alpha 4", 2), ("DuDe, alpha 8", 1)]
    (alone,) = group_runs([read_run(folder) for folder in folders[:2]])
    assert alone.label == "DuDe"


def without_evaluations(run: Path) -> Path:
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "eval_loss" not in line]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return run


def paired_section(folders: Sequence[Path]) -> Section | None:
    sections = build_report([read_run(folder) for folder in folders], title="").sections
    return next((section for section in sections if section.name == "pairs"), None)


def test_of_many_settings_none_is_said_to_be_chosen_that_is_not(tmp_path: Path) -> None:
    rates = [rate * 1e-4 for rate in range(1, 8)]
    many = [
        without_evaluations(write_run(tmp_path / f"{rate:g}", learning_rate=rate, right=RIGHT["dude", 1]))
        for rate in rates
    ]
    section = paired_section(many)
    assert section is not None
    assert section.text == (
        "7 settings are too many to compare all of them: of each method the one with the lowest mean evaluation loss "
        "is, and no test score chooses. Of DuDe none could be chosen, without an evaluation loss."
    )
    # A method's only setting needs no choice.
    lora = without_evaluations(write_run(tmp_path / "lora", method="lora", right=RIGHT["lora", 1], base_right=BASE))
    section = paired_section([*many, lora])
    assert section is not None
    assert "Of DuDe none could be chosen" in section.text
    assert [(row["a"], row["b"]) for row in section.tables[0].rows] == [("base", "LoRA, lr 1e-3")]
    # Without scores there is nothing to choose for.
    for run in many:
        shutil.rmtree(run / "eval")
    assert paired_section(many) is None


def test_a_dollar_is_a_dollar_in_a_figure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", right=RIGHT["dude", 1])
    change_config(run, "rank: 4", "rank: 4, target_modules: '.*q_proj$'")
    change_config(run, "data: {", "data: {prompt: 'Cost $5 {prompt}', completion: '{completion}', ")
    write_report([run, write_run(tmp_path / "other", right=RIGHT["dude", 2])], tmp_path / "r.html")
    texts = " ".join(re.findall(r"<text[^>]*>(.*?)</text>", (tmp_path / "r.html").read_text()))
    assert ".*q_proj$" in texts
    assert "Cost $5 {prompt}" in " ".join(texts.split())


UNLIKE = {
    "plain": ("", ""),
    "long": (
        "data: {validation: 0.1, completion: '{answer}', prompt: \"Answer the\\nquestion below in one word, and in "
        'no other form than that which was asked for: {question}", ',
        "train: {eval_steps: 10, early_stopping_patience: 3, ",
    ),
    "twin": (
        "data: {validation: 0.1, completion: '{answer}', prompt: \"Answer the\\nquestion below in two words, and in "
        'no other form than that which was asked for: {question}", ',
        "train: {eval_steps: 10, early_stopping_patience: 3, lr_scheduler_type: constant, ",
    ),
    "glyphs": ("data: {completion: '答 {answer}', prompt: '問題 कि {question}', ", "train: {"),
}


def test_unlike_runs_have_readable_labels_and_nothing_warns(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, right=RIGHT["dude", 1]) for name in UNLIKE]
    for run, (data, train) in zip(runs[1:], list(UNLIKE.values())[1:], strict=True):
        change_config(run, "data: {", data)
        change_config(run, "train: {", train)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document = write_report(runs, tmp_path / "r.html")
    labels = [row["setting"] for row in rows(document, "headline")]
    assert len(set(labels)) == 4
    assert "DuDe, lr_scheduler_type cosine" in labels
    assert not [label for label in labels if "None" in label or "\n" in label]
    (first, second) = [label for label in labels if "early_stopping_patience 3" in label]
    assert "prompt Answer the question below…as asked for: {question} (1)" in first
    assert "prompt Answer the question below…as asked for: {question} (2)" in second
    charts = re.findall(r"<svg.*?</svg>", (tmp_path / "r.html").read_text(), re.DOTALL)
    chart = next(chart for chart in charts if "acc, %" in chart)
    drawn = " ".join(" ".join(ElementTree.fromstring(chart).itertext()).split())
    for label in labels:
        assert label in drawn


def test_gradients_and_a_loss_of_zero_are_drawn_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | ({"loss": 0.0, "grad_norm": 0.0} if "loss" in line else {}) for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        document = write_report([run], tmp_path / "r.html")
    assert rows(document, "cost")[0]["steps"]["mean"] == 40


def test_what_the_reader_must_know_comes_first(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first", right=RIGHT["dude", 1])
    again = write_run(tmp_path / "again", right=RIGHT["dude", 2], prompt_hashes={"sums": "q" * 64})
    begun = write_run(tmp_path / "begun", seed=2)
    (begun / "adapter" / "adapter_config.json").unlink()
    document = numbers([first, again, begun])
    unfinished, repeated, forms = document["warnings"]
    assert "begun is not finished: the numbers are those up to step 40" in unfinished
    assert "seed 1 was run more than once" in repeated
    assert "sums was scored in 2 forms" in forms
    assert [row["n"] for row in rows(document, "scores")] == [1, 1], "scores of other prompts have no common mean"


@pytest.mark.parametrize("finished", [True, False])
def test_scores_of_another_adapter_are_left_out_and_named(finished: bool, tmp_path: Path) -> None:
    """As an earlier training leaves them that was killed when it took the place of another one."""
    run = write_run(tmp_path / "run", right=RIGHT["dude", 1], adapter_sha256="b" * 64)
    config = run / "adapter" / "adapter_config.json"
    if not finished:
        config.unlink()
    write_results(scored(RIGHT["dude", 2], task="own", adapter_sha256="dude1".ljust(64, "0")), run / "eval")
    document = numbers([run])
    for table, name, shown in (("scores", "score", "own, acc"), ("evaluations", "task", "own")):
        found = rows(document, table) if table in document["tables"] else []
        assert [row[name] for row in found] == ([shown] if finished else [])
    (warning,) = [line for line in document["warnings"] if "left out" in line]
    assert f"{run}/eval: {'' if finished else 'own.json, '}sums.json" in warning


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("metrics.jsonl", "memory.json", "layers.json", "adapter/adapter_config.json"):
        (run / name).unlink()
    document = write_report([run], tmp_path / "r.html")
    assert rows(document, "runs")[0]["steps"] == 0


def test_spikes_and_running_means() -> None:
    calm = [1.0 + 0.01 * (index % 3) for index in range(60)]
    assert spikes(calm) == 0
    assert spikes([*calm[:40], 2.0, *calm[40:]]) == 1
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_a_long_log_is_thinned_without_losing_a_spike() -> None:
    values = [0.0] * 50_000
    values[31_337] = 9.0
    x, y = thinned(list(range(50_000)), values)
    assert len(x) <= 602
    assert (x[y.index(9.0)], x[0], x[-1]) == (31_337, 0, 49_999)


def test_the_command_writes_beside_the_run_and_refuses_what_is_none(runs: list[Path], tmp_path: Path) -> None:
    done = dude_here("report", runs[0], "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["html"] == str(runs[0] / "report.html")
    assert Path(document["markdown"]).read_text().startswith("# lora-1")
    assert dude_here("report", *runs[:2], cwd=tmp_path).stdout.split() == ["report.html", "report.md"]
    assert dude_here("report", tmp_path).returncode == 2
    assert dude_here("report", runs[0], "--out", tmp_path / "r.pdf").returncode == 2
    with pytest.raises(UsageError, match="is no run"):
        write_report([tmp_path], tmp_path / "r.html")


def test_a_report_needs_neither_torch_nor_the_network(runs: list[Path], tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dude_cli.report import write_report; "
        f"write_report([Path({str(runs[0])!r})], Path({str(tmp_path / 'r.html')!r})); "
        "print(sorted({'torch', 'transformers', 'lm_eval', 'datasets', 'requests', 'httpx'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout.strip() == "[]"


def test_where_matplotlib_can_keep_nothing_it_says_nothing(runs: list[Path], tmp_path: Path) -> None:
    """As in a container without a home: it has words about its cache, and about the fonts that it looks for."""
    (tmp_path / "file").touch()
    done = dude("report", runs[0], "--out", tmp_path / "r.html", MPLCONFIGDIR=str(tmp_path / "file" / "cache"))
    assert (done.returncode, done.stderr) == (0, "")


def test_small_numbers_on_an_axis_keep_their_digits() -> None:
    svg = line_chart("c", [Line([0, 1], [0.0024, 0.0126], Style("#000000"))], x_label="x", y_label="y")
    assert {"0.002", "0.004", "0.012"} <= set(re.findall(r">([\d.]+)</text>", svg))


def test_runs_on_other_rows_or_with_other_values_are_other_settings(tmp_path):
    """Whichever comes first: a value that one run's template is given is no key of the other's config."""
    data = 'data: {train: [{path: "embedded:quickstart"}]}'
    changes = {
        "a": data.replace("]}", "], format: chat}"),
        "b": data.replace("]}", "], format: chat, chat_template_kwargs: {enable_thinking: false}}"),
        "c": data.replace("]}", ', {path: rows.jsonl, split: "train[:9]"}], format: chat}'),
    }
    runs = []
    for name, changed in changes.items():
        config = write_run(tmp_path / name) / "config.yaml"
        config.write_text(config.read_text().replace(data, changed))
        runs.append(read_run(tmp_path / name))
    assert len(group_runs(runs[:2])) == len(group_runs(runs[1::-1])) == 2
    labels = {setting.label for setting in group_runs(runs[::2])}
    assert labels == {
        "DuDe, train embedded:quickstart",
        "DuDe, train embedded:quickstart, rows.jsonl train[:9]",
    }
