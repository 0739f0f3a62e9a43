"""The numbers of a report equal values computed by hand."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from mpt_lightning.compare import picture
from mpt_lightning.compare.formats import escape_latex, to_latex
from mpt_lightning.compare.plan import Comparison, Method, Recipe
from mpt_lightning.compare.report import Report
from mpt_lightning.compare.results import Outcome, Result, Store
from mpt_lightning.compare.statistics import resampled_means, resampled_trimmed_means
from mpt_lightning.compare.tables import difference_table, trial_table

TASKS = ["demo/topic", "demo/voice"]
# Scores [task][seed]; None stands for a missing result.
VALUES: dict[str, list[list[float | str | None]]] = {
    "lora": [[0.5, 0.7, 0.9], [0.6, 0.6, 0.3]],
    "ia3": [[0.25, "out of luck", 0.75], [0.5, 0.5, None]],
    "head": [["broken"] * 3, [None] * 3],
}


ENVIRONMENT = {
    "created": "2026-01-02T03:04:05+00:00", "module": "PEFTModule", "peft_type": "LORA", "backbone": "some/model",
    "parameters": 10_000, "versions": {"python": "3.11.2", "torch": "2.13.0", "mpt_lightning": "0.1.0"},
    "system": {"system": "Linux", "accelerator": "cpu"},
}  # fmt: skip


def build(tmp_path: Path, values: dict[str, Any], search: dict[str, Any] | None = None, **options: Any) -> Report:
    """Return the report of a comparison at k = 16 with the values [task][seed] of each method."""
    methods = {name: Method(f"baselines/{name}", search=search or {}) for name in values}
    if "hard_prompt" in methods:
        methods["hard_prompt"] = Method("baselines/hard_prompt", shots=[0], seeds=[7], fit=False)
    options = {"shots": [16], "seeds": [0, 1, 2], **options}
    comparison = Comparison(TASKS, methods=methods, name="mine", **options)
    store = Store(tmp_path / "out", "mine")
    for run in comparison.runs():
        place = 0 if run.method == "hard_prompt" else comparison.seeds.index(int(run.seed or 0))
        value = values[run.method][TASKS.index(str(run.task))][place]
        if run.k is None or value is None:
            continue
        if isinstance(value, str):
            store.write(run, Result.of(run, Outcome(error=value)))
            continue
        costs: dict[str, Any] = {
            "trained_parameters": 1000 * len(run.method), "checkpoint_bytes": 2048, "steps": 3,
            "seconds_per_step": 0.01 * (1 + place), "peak_memory_bytes": 2**20 * 5, "seconds": 1.0,
            "environment": ENVIRONMENT,
        }  # fmt: skip
        if run.trials != ({},):
            costs["trials"] = [{"values": run.trials[n], "score": 0.5 + n / 10, "loss": 1.0} for n in range(2)]
            costs["chosen"] = run.trials[place % 2]
        store.write(run, Result.of(run, Outcome(metrics={"average": value}, **costs), "average"))
    return Report(comparison, store, "mpt compare mine.yaml")


@pytest.fixture
def report(tmp_path: Path) -> Report:
    return build(tmp_path, VALUES, shots=[16, None])


def test_means_and_deviations_over_seeds(report: Report) -> None:
    lora = report.scores.xs("lora", level="method").xs("16", level="k")
    assert list(lora.index) == [*TASKS, "average"]
    assert tuple(lora.loc["demo/topic", ["mean", "standard_deviation"]]) == pytest.approx((0.7, 0.2))
    # Seeds' means over tasks: 0.55, 0.65, 0.6.
    assert tuple(lora.loc["average", ["mean", "standard_deviation"]]) == pytest.approx((0.6, 0.05))
    costs = ["trained_parameters", "checkpoint_bytes", "seconds_per_step"]
    assert tuple(lora.loc["average", costs]) == pytest.approx((4000, 2048, 0.02))
    values = np.array(VALUES["lora"])
    low, high = 100 * np.percentile(resampled_means(values), [2.5, 97.5])
    iqm_low, iqm_high = 100 * np.percentile(resampled_trimmed_means(values), [2.5, 97.5])
    assert list(report.table(16).loc["lora"])[2:] == [
        f"60.0 [{low:.1f}, {high:.1f}]", f"{100 * (0.5 + 0.6 + 0.6 + 0.7) / 4:.1f} [{iqm_low:.1f}, {iqm_high:.1f}]",
        "4,000", "2", "20.0", "5",
    ]  # fmt: skip


def test_missing_and_failed_runs_are_reported(report: Report) -> None:
    table = report.table(16)
    assert list(table.columns[:4]) == [*TASKS, "average", "interquartile mean"]
    assert list(table.loc["ia3"])[:2] == ["50.0 ± 35.4 (2/3)", "50.0 ± 0.0 (2/3)"]
    assert table.loc["ia3", "average"].startswith("50.0 [")
    assert table.loc["ia3", "average"].endswith("] (4/6)")
    assert list(table.loc["head"])[:4] == ["failed", "missing", "failed", ""]
    assert {tuple(row) for row in report.table(None).to_numpy()} == {("missing",) * 3 + ("",) * 5}
    assert [error for _, error in report.failures] == ["out of luck", *["broken"] * 3]
    assert report.progress == "10 of 36 runs done; 4 failed; 22 missing."


def test_files(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "FORMATS", ("png",))  # others take seconds
    files = {file.name: file for file in report.write(tmp_path)}
    pictures = {"report_shots.png", "report_parameters.png"}
    assert set(files) == {"report.csv", "report.md", "report.tex", *pictures}
    assert all(files[name].stat().st_size > 4_000 for name in pictures)
    with files["report.csv"].open(newline="") as file:
        rows = {(row["method"], row["k"], row["task"]): row for row in csv.DictReader(file)}
    assert len(rows) == 3 * 2 * 3
    row = rows["ia3", "16", "demo/topic"]
    assert float(row["mean"]) == pytest.approx(0.5)
    assert float(row["standard_deviation"]) == pytest.approx(0.5**0.5 / 2)
    assert [row[f"runs_{what}"] for what in ("done", "expected", "failed")] == ["2", "3", "1"]
    assert rows["lora", "full", "average"]["mean"] == ""
    assert float(rows["lora", "16", "average"]["low"]) < 0.6
    lines = files["report.md"].read_text().splitlines()
    assert lines[0] == "# mine: test/average"
    assert any(line.startswith("| lora | 70.0 ± 20.0 | 50.0 ± 17.3 | 60.0 [") for line in lines)
    assert {"## k = 16", "## full data", "- ia3/demo/topic/16/1: out of luck"} <= set(lines)


def test_how_the_runs_were_made(report: Report) -> None:
    assert report.facts == [
        "Command: mpt compare mine.yaml",
        "Backbone: some/model",
        "Versions: python 3.11.2, torch 2.13.0, mpt_lightning 0.1.0",
        "Machine: cpu",
        "Steps: 3",
        "Seeds: 0, 1, 2",
        "Runs: 10 of 36 runs done; 4 failed; 22 missing.",
        "Selection: the checkpoint with the best score on k further training rows (full data: as many as the largest "
        "k). Test rows are read once, after these choices.",
    ]


@pytest.mark.parametrize(
    ("options", "selection"),
    [
        ({"dev": None}, "the checkpoint with the best score on the validation split."),
        ({"dev": 50}, "the checkpoint with the best score on 50 further training rows (counted like k)."),
        ({"select": "last"}, "the last checkpoint."),
        ({"prepare": {"source": Recipe("demo/source")}}, "the checkpoint with the best score on k further training "
         "rows; for source, the checkpoint with the best score on the validation rows of their own tasks."),
        ({"search": {}}, "the checkpoint with the best score on k further training rows; hyperparameters by 2 trials "
         "for each method, by the score on k further training rows of the same run."),
        ({"search": {}, "search_tasks": ["demo/advice"], "select": "last"}, "the last checkpoint; hyperparameters by 2 "
         "trials for each method, by the score on k further training rows of demo/advice."),
    ],
)  # fmt: skip
def test_what_selected(options: dict[str, Any], selection: str, tmp_path: Path) -> None:
    searches = {"model.lr": [0.1, 0.2]} if options.pop("search", None) is not None else {}
    methods = {"lora": Method("baselines/lora", search=searches)}
    report = Report(Comparison(TASKS, [16], methods, **options), Store(tmp_path / "out", ""))
    assert report.selection == selection + " Test rows are read once, after these choices."


def test_terminal(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.print(Console(width=160))
    text = capsys.readouterr().out
    for line in ("mine: test/average", "k = 16", "] (4/6)", "ia3/demo/topic/16/1: out of luck", "Backbone: some/model"):
        assert line in text


def test_hard_prompts_are_a_line_at_every_k(tmp_path: Path) -> None:
    values = {"hard_prompt": [[0.4], [0.5]], "lora": [[0.5, 0.6, 0.7], [0.4, 0.4, 0.4]]}
    report = build(tmp_path, values, shots=[16, 32], control="lora")
    assert report.shots == [16, 32]
    assert report.table(32).loc["hard_prompt (k = 0)", TASKS].tolist() == ["40.0", "50.0"]
    difference = report.differences.loc["32", "hard_prompt"]
    assert difference["difference"] == pytest.approx((-0.2 + 0.1) / 2)
    assert (difference["wins"], difference["losses"]) == (3, 3)
    assert set(report.scores.loc["0"].index.unique("method")) == {"hard_prompt"}  # the file has no copies


def test_differences_are_a_table(tmp_path: Path) -> None:
    values = {"lora": [[0.5, 0.6, 0.7], [0.4, 0.4, 0.4]], "ia3": [[0.6, 0.6, 0.6], [0.5, 0.4, 0.3]]}
    report = build(tmp_path, values, shots=[16, None], control="lora")
    (table,) = [part.table for part in report.sections if part.title == "k = 16: differences to lora"]
    row = table.loc["ia3"]
    low, high = 100 * np.percentile(resampled_means(np.array([[0.1, 0, -0.1], [0.1, 0, -0.1]])), [2.5, 97.5])
    assert row["difference"] == f"+0.0 [{low:+.1f}, {high:+.1f}]"
    assert list(row)[1:4] == ["2/2/2", "2", "1.000"]
    assert "full data: differences to lora" in {part.title for part in report.sections}
    assert "- lora has no result here." in report.markdown()
    assert "There are 2 tasks: with fewer than ten" in report.markdown()


def test_verdicts_name_the_smallest_possible_p() -> None:
    rows = [
        {"verdict": "not enough tasks to tell", "tasks": 4, "differing": 4, "least_p": 0.125, "least_p_holm": 0.125},
        {"verdict": "not enough tasks to tell", "tasks": 9, "differing": 6, "least_p": 1 / 32, "least_p_holm": 3 / 32},
        {"verdict": "higher", "tasks": 8, "differing": 8, "least_p": 2 / 256, "least_p_holm": 2 / 256},
    ]
    numbers = {
        "difference": 0.1,
        "low": 0.05,
        "high": 0.2,
        "wins": 1,
        "ties": 2,
        "losses": 3,
        "p": 0.25,
        "p_holm": 1e-9,
    }
    table = difference_table(pd.DataFrame([{**numbers, **row} for row in rows]))
    assert table["verdict"].tolist() == [
        "not enough tasks to tell (n = 4: smallest possible p .125)",
        "not enough tasks to tell (6 of 9 differ: smallest possible p .031, with Holm's correction .094)",
        "higher",
    ]
    assert table.iloc[0].tolist()[:5] == ["+10.0 [+5.0, +20.0]", "1/2/3", "4", ".250", "< .001"]


def test_an_earlier_report_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "FORMATS", ("png",))
    values = {"lora": [[0.5, 0.6, 0.7], [0.4, 0.4, 0.4]], "ia3": [[0.6, 0.6, 0.6], [0.5, 0.4, 0.3]]}
    for name, options in (("first", {"control": "lora", "search": {"model.lr": [1, 2]}}), ("second", {})):
        files = build(tmp_path / name, values, **options).write(tmp_path)
        assert set(files) == set(tmp_path.glob("report*"))
    assert len(files) == 5


def test_seeds_of_prepared_runs_and_methods_are_listed(tmp_path: Path) -> None:
    methods = {
        "lora": Method("baselines/lora"),
        "hard": Method("baselines/hard_prompt", shots=[0], seeds=[7], fit=False),
    }
    plan = Comparison(TASKS, [16], methods, [3, 4], prepare={"source": Recipe("demo/source", seeds=[0, 1])})
    assert Report(plan, Store(tmp_path / "out", "")).seeds == "3, 4; source 0, 1; hard 7"


def test_chosen_values_and_every_trial(tmp_path: Path) -> None:
    values = {"lora": [[0.5, 0.6, 0.7], [0.4, 0.4, 0.4]]}
    report = build(tmp_path, values, {"model.lr": [0.1, 0.2]})
    (table,) = [part.table for part in report.sections if part.title.endswith("chosen hyperparameters")]
    assert table.loc["lora"].tolist() == ["some/model", "3", "model.lr 0.1 (4), 0.2 (2)"]
    trials = trial_table(report.results, report.store)
    assert len(trials) == 2 * 3 * 2
    first = trials[(trials["task"] == "demo/voice") & (trials["seed"] == 1)]
    assert first[["model.lr", "score", "chosen"]].to_numpy().tolist() == [[0.1, 0.5, False], [0.2, 0.6, True]]


def test_failed_trials_are_counted_and_listed(tmp_path: Path) -> None:
    values = {"lora": [[0.5, 0.6, 0.7], [0.4, 0.4, 0.4]]}
    report = build(tmp_path, values, {"model.lr": [0.1, 0.2]})
    assert not any(fact.startswith("Failed trials") for fact in report.facts)
    run, result = report.results[0]
    result.trials[1].update(score=float("nan"), error="The loss is not finite.")
    report.store.write(run, result)
    report = Report(report.comparison, report.store)
    assert "Failed trials: 1; they are not chosen, and report_trials.csv has their errors" in report.facts
    assert report.trials["error"].tolist()[:2] == [pytest.approx(float("nan"), nan_ok=True), "The loss is not finite."]


def test_trials_of_search_tasks_are_listed_once(tmp_path: Path) -> None:
    values = {"lora": [[0.5, 0.6, 0.7], [0.4, 0.4, 0.4]]}
    report = build(tmp_path, values, {"model.lr": [0.1, 0.2]}, search_tasks=["demo/advice"])
    (search,) = {run.searches for run, _ in report.results}
    trials = [{"values": {"model.lr": rate}, "score": rate, "loss": 1.0} for rate in (0.1, 0.2)]
    report.store.write(search[0], Result.of(search[0], Outcome(trials=trials)))
    (chosen, result), *_, (missing, _) = report.results
    assert result.chosen == {"model.lr": 0.1}
    table = trial_table([(chosen, result), (missing, Result.of(missing, Outcome()))], report.store)
    assert table[["task", "model.lr", "score", "chosen"]].to_numpy().tolist() == [
        ["demo/advice", 0.1, 0.1, True],
        ["demo/advice", 0.2, 0.2, False],
    ]


def test_latex_reads_every_character_as_itself(report: Report, tmp_path: Path) -> None:
    assert escape_latex("a_b & 50% {x} #1 $ ~ ^ \\ < ±") == (
        r"a\_b \& 50\% \{x\} \#1 \$ \textasciitilde{} \textasciicircum{} \textbackslash{} $<$ $\pm$"
    )
    assert escape_latex("+1.0 [-0.5, -2] p-tuning k-1") == "+1.0 [$-$0.5, $-$2] p-tuning k-1"
    text = to_latex(report.sections)
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 3
    assert r"method & demo/topic & demo/voice & average & interquartile mean & trained parameters" in text
    assert r"lora & 70.0 $\pm$ 20.0 & 50.0 $\pm$ 17.3 & 60.0 [" in text
