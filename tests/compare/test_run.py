"""Which runs are started and what is stored of them; a function replaces the runs."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpt_lightning.compare import run as running
from mpt_lightning.compare.plan import Comparison, Method, Recipe
from mpt_lightning.compare.pool import WorkerPool
from mpt_lightning.compare.results import Outcome, Store
from mpt_lightning.compare.run import DIED, run_all

Answer = Callable[[str], Outcome]


def make(lr: float = 1, **options: Any) -> Comparison:
    methods = {
        "lora": Method("baselines/lora", {"model.lr": lr}),
        "mpt": Method("demo/target", {"model.source": "$source"}),
    }
    prepare = {
        "teachers": Recipe("demo/teachers"),
        "source": Recipe("demo/source", {"model.teachers": "$teachers"}),
    }
    return Comparison(["demo/topic"], [8], methods, [0, 1], prepare=prepare, name="test", **options)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Replace the runs by a function, and return the list of started runs."""
    done: list[str] = []

    def work(words: list[str], folder: Path, trials: list[Any], *, test: bool, keep: bool, **_: Any) -> Outcome:
        place = "/".join(folder.parts[folder.parts.index("runs") + 1 :])
        done.append(place)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "best.ckpt").write_text("")
        records = [{"values": values, "score": 0.5, "loss": 1.0} for values in trials]
        metrics = {"average": len(place) / 100} if test else {}
        outcome = Outcome(commands=[f"mpt fit {' '.join(words)}"], metrics=metrics, trials=records, chosen=trials[0])
        outcome.checkpoint = str(folder / "best.ckpt") if keep else None
        return answers.get(place, lambda ordinary: ordinary)(outcome)

    answers: dict[str, Callable[[Outcome], Outcome]] = {}
    work.answers = answers
    monkeypatch.setattr(running, "work", work)
    monkeypatch.setattr(WorkerPool, "_start", lambda self: ThreadPoolExecutor(self.jobs))
    return done


def set_outcome(place: str, given: Callable[[Outcome], Outcome]) -> None:
    running.work.answers[place] = given


def run_comparison(comparison: Comparison, output: Path, jobs: int = 1) -> Store:
    store = Store(output, comparison.name)
    run_all(comparison, store, Console(quiet=True), jobs)
    return store


def results(comparison: Comparison, store: Store) -> dict[str, Any]:
    return {run.place: store.read(run) for run in [*comparison.prepared_runs(), *comparison.runs()]}


EVERY = {"prepare/teachers", "prepare/source"} | {f"{m}/demo/topic/8/{s}" for m in ("lora", "mpt") for s in (0, 1)}


@pytest.mark.parametrize("jobs", [1, 3])
def test_all_runs_start_once_and_prepared_runs_first(calls: list[str], tmp_path: Path, jobs: int) -> None:
    comparison = make()
    found = results(comparison, run_comparison(comparison, tmp_path, jobs))
    assert set(calls) == EVERY
    assert len(calls) == len(EVERY)
    order = [calls.index(name) for name in ("prepare/teachers", "prepare/source", "mpt/demo/topic/8/0")]
    assert order == sorted(order)
    assert {result.status for result in found.values()} == {"done"}
    source = str(tmp_path / "runs/prepare/source/best.ckpt")
    assert f"--model.source {source}" in found["mpt/demo/topic/8/0"].commands[0]
    assert found["lora/demo/topic/8/1"].value == len("lora/demo/topic/8/1") / 100
    file = json.loads((tmp_path / "results/lora/demo/topic/8/1.json").read_text())
    assert (file["method"], file["task"], file["k"], file["seed"], file["metric"]) == (
        "lora", "demo/topic", 8, 1, "average",
    )  # fmt: skip


def test_a_second_call_runs_what_is_missing(calls: list[str], tmp_path: Path) -> None:
    comparison = make()
    run_comparison(comparison, tmp_path)
    calls.clear()
    run_comparison(comparison, tmp_path)
    assert calls == []
    lost = tmp_path / "results/lora/demo/topic/8/0.json"
    whole = lost.read_text()
    lost.unlink()
    (lost.parent / ".0.json.part").write_text(whole[:40])
    run_comparison(comparison, tmp_path)
    assert calls == ["lora/demo/topic/8/0"]
    assert lost.read_text() == whole
    assert sorted(file.name for file in lost.parent.iterdir()) == ["0.json", "1.json"]
    calls.clear()
    (tmp_path / "results/mpt/demo/topic/8/1.json").write_text(whole[:40])
    run_comparison(comparison, tmp_path)
    assert calls == ["mpt/demo/topic/8/1"]


def test_changed_arguments_run_again(calls: list[str], tmp_path: Path) -> None:
    run_comparison(make(), tmp_path)
    calls.clear()
    run_comparison(make(lr=2), tmp_path)
    assert calls == ["lora/demo/topic/8/0", "lora/demo/topic/8/1"]


@pytest.mark.parametrize("damaged", ["", "{", "null", "3", "[]", "{}"])
def test_a_damaged_result_runs_again(damaged: str, calls: list[str], tmp_path: Path) -> None:
    run_comparison(make(), tmp_path)
    calls.clear()
    (tmp_path / "results/lora/demo/topic/8/1.json").write_text(damaged)
    run_comparison(make(), tmp_path)
    assert calls == ["lora/demo/topic/8/1"]


def test_prepared_runs_are_repeated_if_a_run_needs_them(calls: list[str], tmp_path: Path) -> None:
    comparison = make()
    run_comparison(comparison, tmp_path)
    calls.clear()
    (tmp_path / "runs/prepare/source/best.ckpt").unlink()
    run_comparison(comparison, tmp_path)
    assert calls == []  # every run has its result
    (tmp_path / "results/mpt/demo/topic/8/1.json").unlink()
    run_comparison(comparison, tmp_path)
    assert calls == ["prepare/source", "mpt/demo/topic/8/1"]


def test_a_failure_is_stored_and_repeated(calls: list[str], tmp_path: Path) -> None:
    comparison, place = make(), "lora/demo/topic/8/0"
    set_outcome(place, lambda outcome: Outcome(error="no luck"))
    found = results(comparison, run_comparison(comparison, tmp_path))
    assert (found[place].status, found[place].error, found[place].value) == ("failed", "no luck", None)
    assert {result.status for key, result in found.items() if key != place} == {"done"}
    calls.clear()
    set_outcome(place, lambda outcome: outcome)
    assert results(comparison, run_comparison(comparison, tmp_path))[place].status == "done"
    assert calls == [place]


def test_a_log_file_has_a_line_for_each_run(calls: list[str], tmp_path: Path) -> None:
    set_outcome("lora/demo/topic/8/0", lambda outcome: Outcome(error="no luck"))
    with (tmp_path / "log.txt").open("w") as log:
        run_all(make(), Store(tmp_path / "out", "test"), Console(file=log), jobs=1)
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert "lora/demo/topic/8/0 failed: no luck" in lines
    assert {f"{place} done in 0 s" for place in EVERY - {"lora/demo/topic/8/0"}} <= set(lines)


def test_runs_fail_with_the_prepared_run_they_need(calls: list[str], tmp_path: Path) -> None:
    comparison = make()
    set_outcome("prepare/teachers", lambda outcome: Outcome(error="no luck"))
    found = results(comparison, run_comparison(comparison, tmp_path))
    reason = "prepare/source, which it needs, failed: prepare/teachers, which it needs, failed: no luck"
    assert found["mpt/demo/topic/8/0"].error == reason
    assert found["lora/demo/topic/8/0"].status == "done"
    assert set(calls) == {"prepare/teachers", "lora/demo/topic/8/0", "lora/demo/topic/8/1"}


def test_seeds_of_prepared_runs_take_turns(calls: list[str], tmp_path: Path) -> None:
    """The third seed of a method starts from the first source again, which has its own teachers."""
    seen: dict[str, str] = {}
    methods = {"mpt": Method("demo/target", {"model.source": "$source"})}
    prepare = {
        "teachers": Recipe("demo/teachers", seeds=[5, 6]),
        "source": Recipe("demo/source", {"model.teachers": "$teachers", "data.seed": "$seed"}, [7, 8]),
    }
    comparison = Comparison(["demo/topic"], [8], methods, [0, 1, 2], prepare=prepare, name="test")
    for run in [*comparison.prepared_runs(), *comparison.runs()]:
        set_outcome(run.place, lambda outcome, run=run: seen.update({run.place: outcome.commands[0]}) or outcome)
    run_comparison(comparison, tmp_path)
    assert set(calls) == {f"prepare/{name}" for name in ("teachers/5", "teachers/6", "source/7", "source/8")} | {
        f"mpt/demo/topic/8/{seed}" for seed in (0, 1, 2)
    }
    for place, needed in {
        "prepare/source/7": "prepare/teachers/5", "prepare/source/8": "prepare/teachers/6",
        "mpt/demo/topic/8/0": "prepare/source/7", "mpt/demo/topic/8/1": "prepare/source/8",
        "mpt/demo/topic/8/2": "prepare/source/7",
    }.items():  # fmt: skip
        assert f"runs/{needed}/best.ckpt" in seen[place]
    assert "--seed_everything 8" in seen["prepare/source/8"]
    assert "--data.seed 8" in seen["prepare/source/8"]


@pytest.mark.parametrize("search_tasks", [None, ["demo/voice"]])
def test_trials_are_chosen_on_the_search_tasks(
    calls: list[str], tmp_path: Path, search_tasks: list[str] | None
) -> None:
    """With search tasks their runs choose for all others; without, each run gets every trial."""
    methods = {"lora": Method("baselines/lora", search={"model.lr": [1, 2, 3]})}
    options = {"search_tasks": search_tasks, "search_seeds": [4, 5], "name": "test"}
    comparison = Comparison(["demo/topic"], [8, None], methods, [0], **options)
    scores = {4: (0.1, 0.4, 0.5), 5: (0.9, 0.7, 0.4)}  # means 0.5, 0.55, 0.45
    for seed, found in scores.items():

        def with_scores(outcome: Outcome, found: tuple[float, ...] = found) -> Outcome:
            for record, score in zip(outcome.trials, found, strict=True):
                record["score"] = score
            return outcome

        for k in ("8", "full"):
            set_outcome(f"lora/search/demo/voice/{k}/{seed}", with_scores)
    found = results(comparison, run_comparison(comparison, tmp_path))
    tried = [record["values"] for record in found["lora/demo/topic/8/0"].trials]
    searches = [f"lora/search/demo/voice/{k}/{seed}" for k in ("8", "full") for seed in (4, 5)]
    if search_tasks:
        assert tried == [{"model.lr": 2}]
        assert calls[:4] == searches
        file = tmp_path / "results" / f"{searches[0]}.json"
        assert [record["score"] for record in json.loads(file.read_text())["trials"]] == [0.1, 0.4, 0.5]
        assert json.loads(file.read_text())["metrics"] == {}  # nothing was tested
    else:
        assert tried == [{"model.lr": rate} for rate in (1, 2, 3)]
        assert len(calls) == 2
    calls.clear()
    run_comparison(comparison, tmp_path)
    assert calls == []


def test_a_process_that_dies_is_one_failure(calls: list[str], tmp_path: Path) -> None:
    def die(outcome: Outcome) -> Outcome:
        raise BrokenProcessPool

    set_outcome("lora/demo/topic/8/0", die)
    comparison = make()
    found = results(comparison, run_comparison(comparison, tmp_path))
    assert [key for key, result in found.items() if result.error == DIED] == ["lora/demo/topic/8/0"]


def test_an_unknown_metric_is_a_failure(calls: list[str], tmp_path: Path) -> None:
    comparison = make(metric="$task/f1")
    found = results(comparison, run_comparison(comparison, tmp_path))["lora/demo/topic/8/0"]
    assert found.error == "there is no test metric 'demo/topic/f1'; set `metric` to one of average."


def test_an_interruption_leaves_complete_results(calls: list[str], tmp_path: Path) -> None:
    def interrupt(outcome: Outcome) -> Outcome:
        raise KeyboardInterrupt

    comparison = make()
    set_outcome("lora/demo/topic/8/1", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_comparison(comparison, tmp_path)
    for file in (tmp_path / "results").rglob("*"):
        assert file.is_dir() or json.loads(file.read_text())["status"] == "done"
    assert not (tmp_path / "results/lora/demo/topic/8/1.json").exists()
    set_outcome("lora/demo/topic/8/1", lambda outcome: outcome)
    found = results(comparison, run_comparison(comparison, tmp_path))
    assert {result.status for result in found.values()} == {"done"}
    assert sorted(calls) == sorted([*EVERY, "lora/demo/topic/8/1"])


def test_a_folder_belongs_to_one_comparison_and_one_process(tmp_path: Path) -> None:
    store = Store(tmp_path / "a", "one")
    with pytest.raises(ValueError, match="has the results of the comparison 'one', and this is 'two'"):
        Store(tmp_path / "a", "two")
    for damaged in ("", "null", "{}"):
        (tmp_path / "a" / "comparison.json").write_text(damaged)
        with pytest.raises(ValueError, match="has the results of the comparison None, and this is 'one'"):
            Store(tmp_path / "a", "one")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and contains no comparison"):
        Store(tmp_path / "b", "one")
    with pytest.raises(NotADirectoryError):
        Store(tmp_path / "b" / "thesis.txt", "one")
    with store.locked(), pytest.raises(ValueError, match="Another `mpt compare` is running"), store.locked():
        pass
