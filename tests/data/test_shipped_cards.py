"""The shipped cards, tested on rows in the schema of their Hub data sets, and on real data if available.

`fixtures/` has the layout of a data root: `<last part of the Hub id>[/<subset>]/<Hub split>.jsonl`, with invented
rows. `fixtures/expected.yaml` contains the expected input and target of the first row.
"""

import json
import os
from pathlib import Path

import pytest
import yaml

from mpt_lightning.data.card import card_names, load_card, read_card_file
from mpt_lightning.data.examples import read_examples
from mpt_lightning.data.rows import Draw, select_rows, source_rows

FIXTURES = Path(__file__).parent / "fixtures"
DATA_ROOT = Path(os.environ.get("MPT_DATA_ROOT", "no MPT_DATA_ROOT"))
SPLITS = ("train", "validation", "test")
HUB_TASKS = [name for name in card_names() if not name.startswith("demo/")]
EXPECTED = yaml.safe_load((FIXTURES / "expected.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Return a function that loads a split of a task as examples."""
    cache = str(tmp_path_factory.mktemp("cache"))

    def load(name, split, root=FIXTURES, most=None):
        card = load_card(name)
        raw = source_rows(card, split, str(root), cache)
        if most is not None:
            raw = raw.select(range(min(most, len(raw))))
        return list(read_examples(card, select_rows(card, raw, Draw(split))))

    return load


def raw_rows(name, split):
    card = load_card(name)
    file = FIXTURES / card.path.split("/")[-1] / (card.subset or "") / f"{card.splits[split]}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def render(name, example):
    return "".join(text + (example.values[column] if column else "") for text, column in load_card(name).parts)


def test_every_card_has_an_expected_row():
    assert set(EXPECTED) == set(HUB_TASKS)


@pytest.mark.parametrize("name", HUB_TASKS)
def test_card_is_a_data_config_named_like_its_file(name):
    content = read_card_file(name)
    assert set(content) == {"class_path", "init_args"}
    assert content["class_path"] == "mpt_lightning.data.TaskDataModule"
    card = load_card(name)
    assert card.name == name
    assert card.metrics == EXPECTED[name]["metrics"]
    assert card.path.count("/") == 1, "bare Hub ids are redirects"
    assert card.language == "en"
    assert card.citation


@pytest.mark.parametrize("name", HUB_TASKS)
def test_first_row_renders(name, load):
    # Some training rows are held out for validation, so the first row may be in either split.
    rows = [(render(name, row), row.target) for split in ("train", "validation") for row in load(name, split)]
    assert (EXPECTED[name]["text"], EXPECTED[name]["target"]) in rows


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", HUB_TASKS)
def test_every_split_loads(name, split, load):
    card = load_card(name)
    rows = load(name, split)
    assert rows
    for row in rows:
        assert row.target
        assert row.references
        if card.choices:
            assert row.target in card.choices
            assert row.references == [row.target]


@pytest.mark.parametrize("name", HUB_TASKS)
def test_splits_do_not_share_rows(name, load):
    card = load_card(name)
    rows = {split: {row.row_id for row in load(name, split)} for split in SPLITS}
    if card.split_rule == "halved":
        assert not rows["validation"] & rows["test"]
    if card.split_rule == "held_out":
        assert not rows["train"] & rows["validation"]


@pytest.mark.parametrize("name", [name for name in HUB_TASKS if not load_card(name).preprocess])
def test_columns_are_rendered_completely(name, load):
    # The authors' code renders only the first character of two columns, and the first option twice.
    card = load_card(name)
    texts = [render(name, row) for split in ("train", "validation") for row in load(name, split)]
    for row in raw_rows(name, "train"):
        if row[card.label.split(".")[0]] != -1:
            assert any(all(str(row[column]) in text for column in card.columns) for text in texts)


def test_winogrande_shows_both_options(load):
    rows = {row["sentence"]: row for split in ("train", "validation") for row in raw_rows("winogrande", split)}
    for split in SPLITS:
        for example in load("winogrande", split):
            raw = rows[example.values["sentence"]]
            assert raw["option1"] != raw["option2"]
            assert render("winogrande", example).endswith(f"option1: {raw['option1']} option2: {raw['option2']}")
            assert example.target == f"option{raw['answer']}"


def test_every_card_has_its_own_data():
    # The authors' code loads Yelp under the name of Amazon.
    sources = {name: (load_card(name).path, load_card(name).subset) for name in HUB_TASKS}
    assert len(set(sources.values())) == len(sources)
    for name, (path, subset) in sources.items():
        last = name.split("/")[-1]
        aliases = {"nq": "naturalquestionsshortqa", "webnlg": "web_nlg"}
        assert aliases.get(last, last) in (subset, path.split("/")[-1])


def test_stsb_targets_lie_on_the_grid(load):
    targets = {row.target for split in SPLITS for row in load("glue/stsb", split)}
    assert "3.2" in targets, "3.267 becomes 3.2"
    assert all(round(float(target) * 10) % 2 == 0 for target in targets)


def test_multirc_keeps_questions_whole(load):
    groups = {split: {row.group for row in load("super_glue/multirc", split)} for split in SPLITS}
    assert not groups["validation"] & groups["test"]
    assert groups["validation"]
    assert groups["test"]
    sizes = sum(len(load("super_glue/multirc", split)) for split in ("validation", "test"))
    assert sizes == len(raw_rows("super_glue/multirc", "validation"))


def test_scitail_uses_the_official_test_split(load):
    card = load_card("scitail")
    assert (card.split_rule, card.splits["test"]) == ("given", "test")
    assert {row.values["sentence1"] for row in load("scitail", "test")} == {
        row["sentence1"] for row in raw_rows("scitail", "test")
    }


def test_tasks_keep_their_own_metrics():
    # The authors' code evaluates every task with the first task's metrics.
    cards = [load_card(name) for name in ("glue/sst2", "glue/stsb", "glue/cola", "squad", "super_glue/multirc")]
    assert len({tuple(card.metrics) for card in cards}) == len(cards)


def test_squad_reads_the_mapping_of_answers(load):
    (bronze,) = [row for row in load("squad", "test") if "bell" in row.values["question"]]
    assert (bronze.target, bronze.references) == ("bronze", ["bronze", "Bronze"])


def test_record_trains_on_each_answer_and_is_scored_on_all(load):
    train = load("super_glue/record", "train")
    crews = [row.target for row in train if row.values["query"].startswith("The crews")]
    assert crews in ([], ["Iris Holt", "Holt"])
    assert len(train) > len({row.row_id for row in train})
    test = load("super_glue/record", "test")
    assert len(test) == len({row.row_id for row in test})
    assert ["Iris Holt", "Holt"] in [row.references for row in test]


def test_snli_drops_rows_without_a_label(load):
    assert len(load("snli", "train")) == len(raw_rows("snli", "train")) - 1


def test_mnli_validates_on_mismatched_genres():
    splits = load_card("glue/mnli").splits
    assert splits["validation"] == "validation_mismatched"
    assert splits["test"] == "validation_matched"


def test_script_repositories_use_a_parquet_revision():
    revisions = {name: load_card(name).revision for name in HUB_TASKS if load_card(name).revision}
    branch = dict.fromkeys(["sick", "trec", "e2e_nlg", "webnlg"], "refs/convert/parquet")
    assert revisions == {**branch, "winogrande": "refs/pr/6"}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", HUB_TASKS)
def test_real_data_loads(name, split, load):
    card = load_card(name)
    folder = DATA_ROOT / card.path.split("/")[-1] / (card.subset or "")
    if not folder.is_dir():
        pytest.skip(f"no {folder.relative_to(DATA_ROOT)}/ under the folder in MPT_DATA_ROOT")
    rows = load(name, split, root=DATA_ROOT, most=100)
    assert rows
    assert all(row.target and row.references and render(name, row).strip() for row in rows)
