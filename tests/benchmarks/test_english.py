"""The comparison on English tasks: its file, and the labels of its own tasks."""

from pathlib import Path

import pytest

from benchmarks.english import derive
from mpt_lightning.compare.plan import read_comparison
from mpt_lightning.data import load_card

FOLDER = Path(derive.__file__).parent
MEANING = "name[Cotto], eatType[coffee shop], priceRange[£20-25], customer rating[1 out of 5], near[Ranch]"


def test_its_file_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    comparison = read_comparison("benchmarks/english/few.yaml")
    runs = comparison.runs()
    assert {len(run.trials) for run in runs if run.fit} == {4}
    sources = {load_card(task).name for task in comparison.prepare["source"].arguments["data.tasks"]}
    tuning = {search.task for run in runs for search in run.searches}
    assert len(sources) == 6
    assert len(tuning) == 3
    assert not (sources & tuning) | ((sources | tuning) & {run.task for run in runs})


@pytest.mark.parametrize(
    ("name", "label"), [("price", [1]), ("rating", [0]), ("area", []), ("family", []), ("food", [])]
)
def test_a_description_has_the_label_of_its_meaning(name: str, label: list[int]) -> None:
    row = {"meaning_representation": MEANING, "human_reference": "Cotto is a coffee shop."}
    assert [found["label"] for found in getattr(derive, name)(row, "train")] == label


@pytest.mark.parametrize(("answer", "label"), [("1976", 1), ("two hundred", 1), ("the Rhine", 0), ("someone", 0)])
def test_numbers_among_answers(answer: str, label: int) -> None:
    assert derive.number({"answers": {"text": [answer]}}, "train")[0]["label"] == label


@pytest.mark.parametrize(("title", "label"), [("Oxygen", [1]), ("Warsaw", [0]), ("Doctor_Who", [])])
def test_topics_of_articles(title: str, label: list[int]) -> None:
    assert [found["label"] for found in derive.topic({"title": title}, "train")] == label
