"""The numbers of a report equal values computed by hand."""

import csv
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpt_lightning.compare.plan import Comparison, Method
from mpt_lightning.compare.report import Report
from mpt_lightning.compare.results import Outcome, Result, Store

TASKS = ["demo/topic", "demo/voice"]
# Scores [task][seed]; None stands for a missing result.
VALUES: dict[str, list[list[float | str | None]]] = {
    "lora": [[0.5, 0.7, 0.9], [0.6, 0.6, 0.3]],
    "ia3": [[0.25, "out of luck", 0.75], [0.5, 0.5, None]],
    "head": [["broken"] * 3, [None] * 3],
}


@pytest.fixture
def report(tmp_path: Path) -> Report:
    methods = {name: Method(f"baselines/{name}") for name in VALUES}
    comparison = Comparison(TASKS, [16, None], methods, [0, 1, 2], name="mine")
    store = Store(tmp_path / "out", "mine")
    for run in comparison.runs():
        value = VALUES[run.method][TASKS.index(str(run.task))][int(run.seed or 0)]
        if run.k is None or value is None:
            continue
        if isinstance(value, str):
            store.write(run, Result.of(run, Outcome(error=value)))
            continue
        costs: dict[str, Any] = {
            "trained_parameters": 1000 * len(str(run.method)), "checkpoint_bytes": 2048, "steps": 3,
            "seconds_per_step": 0.01 * (1 + int(run.seed or 0)), "peak_memory_bytes": 2**20 * 5, "seconds": 1.0,
        }  # fmt: skip
        store.write(run, Result.of(run, Outcome(metrics={"average": value}, **costs), "average"))
    return Report(comparison, store)


def test_means_and_deviations_over_seeds(report: Report) -> None:
    lora = report.scores.loc["16", "lora"]
    assert list(lora.index) == [*TASKS, "average"]
    assert tuple(lora.loc["demo/topic", ["mean", "standard_deviation"]]) == pytest.approx((0.7, 0.2))
    # Seeds' means over tasks: 0.55, 0.65, 0.6.
    assert tuple(lora.loc["average", ["mean", "standard_deviation"]]) == pytest.approx((0.6, 0.05))
    costs = ["trained_parameters", "checkpoint_bytes", "seconds_per_step"]
    assert tuple(lora.loc["average", costs]) == pytest.approx((4000, 2048, 0.02))
    assert list(report.table(16).loc["lora"])[2:] == ["60.0 ± 5.0", "4,000", "2", "20.0", "5"]


def test_missing_and_failed_runs_are_reported(report: Report) -> None:
    table = report.table(16)
    assert list(table.columns[:3]) == [*TASKS, "average"]
    assert list(table.loc["ia3"])[:3] == ["50.0 ± 35.4 (2/3)", "50.0 ± 0.0 (2/3)", "37.5 (1/3)"]
    assert list(table.loc["head"])[:3] == ["failed", "missing", "failed"]
    assert {tuple(row) for row in report.table(None).to_numpy()} == {("missing",) * 3 + ("",) * 4}
    assert [error for _, error in report.failures] == ["out of luck", *["broken"] * 3]
    assert report.progress == "10 of 36 runs done; 4 failed; 22 missing."


def test_files(report: Report, tmp_path: Path) -> None:
    files = report.write(tmp_path)
    assert [file.name for file in files] == ["report.csv", "report.md", "report.png"]
    assert files[2].stat().st_size > 10_000
    with files[0].open(newline="") as file:
        rows = {(row["method"], row["k"], row["task"]): row for row in csv.DictReader(file)}
    assert len(rows) == 3 * 2 * 3
    row = rows["ia3", "16", "demo/topic"]
    assert float(row["mean"]) == pytest.approx(0.5)
    assert float(row["standard_deviation"]) == pytest.approx(0.5**0.5 / 2)
    assert [row[f"seeds_{what}"] for what in ("done", "expected", "failed")] == ["2", "3", "1"]
    assert rows["lora", "full", "average"]["mean"] == ""
    markdown = files[1].read_text()
    assert markdown.startswith("# mine: test/average\n")
    assert "| lora | 70.0 ± 20.0 | 50.0 ± 17.3 | 60.0 ± 5.0 | 4,000 | 2 | 20.0 | 5 |" in markdown.splitlines()
    assert "## k = 16" in markdown
    assert "## full data" in markdown
    assert "- ia3/demo/topic/16/1: out of luck" in markdown.splitlines()


def test_terminal(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    report.print(Console(width=160))
    text = capsys.readouterr().out
    assert "mine: test/average, k = 16" in text
    assert "37.5 (1/3)" in text
    assert "failed: ia3/demo/topic/16/1: out of luck" in text
