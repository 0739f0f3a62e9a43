"""`mpt demo`, with its runs replaced by known scores."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from mpt_lightning.compare.pool import WorkerPool
from mpt_lightning.compare.results import Result
from mpt_lightning.demo import run
from mpt_lightning.demo.methods import SOURCES, STAGES, TARGETS
from mpt_lightning.prompts import MultitaskPrompt


def known(method: str, tasks: list[str], k: int | None, seed: int, output: Path, source: str = "") -> list[Result]:
    assert Path(source).name == (f"source-{seed}.ckpt" if method == "mpt" else "")
    values = {task: (TARGETS.index(task) + seed) / 10 if task in TARGETS else 0.5 for task in tasks}
    names: dict[str, Any] = {"method": method, "k": k, "seed": seed, "metric": "accuracy", "trained_parameters": 1000}
    return [Result(task=task, value=value, **names) for task, value in values.items()]


@pytest.fixture
def known_results(monkeypatch: pytest.MonkeyPatch) -> None:
    def stages(output: Path, seed: int) -> list[Result]:
        return [result for method in STAGES for result in known(method, SOURCES, None, seed, output)]

    prompt = MultitaskPrompt(2, 3, 4, tasks=["a", "b"])
    monkeypatch.setattr(run, "run_stages", stages)
    monkeypatch.setattr(run, "run", known)
    monkeypatch.setattr(run, "read_checkpoint", lambda path: Mock(prompt=lambda: prompt))
    monkeypatch.setattr(WorkerPool, "_start", lambda self: ThreadPoolExecutor(self.jobs))
    monkeypatch.setenv("COLUMNS", "140")


def test_files_and_tables(known_results: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run.run_demo(tmp_path / "out", seeds=2)
    content: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = content["rows"]
    assert set(rows[0]) == {"method", "task", "k", "seed", "metric", "value", "trained_parameters", "seconds"}
    counts = {
        method: sum(row["method"] == method for row in rows) for method in dict.fromkeys(r["method"] for r in rows)
    }
    assert counts == {
        "teacher": 5 * 2, "mpt_source": 5 * 2, "prompt_tuning": 4 * 3 * 2, "mpt": 4 * 3 * 2,
        "icl": 4 * 2, "context_prompt_tuning": 4 * 2, "instruction_prompt_tuning": 4 * 2, "cpt": 4 * 2,
    }  # fmt: skip
    assert content["environment"]["cores"] >= 1
    assert (tmp_path / "out" / "demo.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.split("│")] for line in printed.splitlines()]
    rows = {line[1]: line[2:-1] for line in lines if len(line) == 10}
    assert {"k = 4, prompt tuning", "k = 4, MPT", "k = 32, MPT", "k = 2, CPT"} < set(rows)
    topic, voice, _, _, average, parameters, _ = rows["k = 16, MPT"]
    assert (topic, voice, parameters) == ("5.0 ± 7.1", "15.0 ± 7.1", "1,000")
    assert average.startswith("20.0 [")
    assert "k = 4, MPT minus prompt tuning: +0.0 [+0.0, +0.0]; 0 wins, 8 ties, 0 losses" in printed
