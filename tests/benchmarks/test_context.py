"""The comparison of CPT and its parts: its file, and the labels of its own tasks."""

from pathlib import Path

import pytest

from benchmarks.context import derive
from mpt_lightning import load_task
from mpt_lightning.compare.plan import read_comparison

FOLDER = Path(derive.__file__).parent


def test_its_file_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER.parents[1])
    runs = read_comparison("benchmarks/context.yaml").runs()
    assert {len(run.trials) for run in runs if run.fit} == {4}
    assert {search.task for run in runs for search in run.searches} == {"context/colour"}


@pytest.mark.parametrize(("sentence", "label"), [("the red cup was found .", 0), ("the yellow cup .", 3)])
def test_a_row_is_labelled_with_its_word(sentence: str, label: int) -> None:
    assert derive.colour({"sentence1": sentence}, "train") == [{"sentence": sentence, "label": label}]


@pytest.mark.parametrize("sentence", ["the cup was found .", "the red cup and the blue book ."])
def test_rows_without_one_word_are_left_out(sentence: str) -> None:
    assert derive.colour({"sentence1": sentence}, "train") == []


def test_a_task_has_rows_of_every_class() -> None:
    card = FOLDER / "tasks" / "act.yaml"
    options = {"context_shots": 4, "dev_shot": 16, "answer_prefix": "label :", "separator": ""}
    data = load_task(card, backbone="mpt_lightning/demo/llama", **options)
    data.setup("fit")
    data.setup("test")
    assert data.context is not None
    assert len(data.context.row_ids) == 4 * 4
    (loader,) = data.test_dataloader()
    assert len(loader.dataset) >= 100
