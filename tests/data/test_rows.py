"""Labels, split rules, and draws of rows from local files."""

import csv
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpt_lightning.data import rows as rows_module
from mpt_lightning.data.examples import read_examples
from mpt_lightning.data.rows import Draw, select_rows, source_rows


@pytest.fixture
def read(tmp_path):
    """Return a function that reads the examples of a split."""

    def read(card, root, split="train", **draw):
        raw = source_rows(card, split, root, str(tmp_path / "cache"))
        return list(read_examples(card, select_rows(card, raw, Draw(split, **draw))))

    return read


def test_class_index_becomes_its_word(make_card, write_split, read):
    root = write_split([{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    first, second = read(make_card(), root)
    assert (first.target, first.references, first.row_id) == ("good", ["good"], 0)
    assert (second.target, second.values, second.row_id) == ("bad", {"text": "b"}, 1)


def test_class_word_is_a_label_too(make_card, write_split, read):
    assert read(make_card(), write_split([{"text": "a", "label": "good"}]))[0].target == "good"


@pytest.mark.parametrize(
    ("value", "target", "reference"),
    [
        (3.799999952316284, "3.8", "3.8"),
        (0.0, "0.0", "0"),
        (5.0, "5.0", "5"),
        (2.533, "2.6", "2.533"),
        (2.5, "2.4", "2.5"),
    ],
)
def test_number_is_written_on_the_grid_and_scored_as_annotated(make_card, write_split, read, value, target, reference):
    card = make_card(choices=None, value_range=(0, 5), metrics=["pearson"])
    (example,) = read(card, write_split([{"text": "a", "label": value}]))
    assert (example.target, example.references) == (target, [reference])


def test_answers_train_on_the_first_and_score_against_all(make_card, write_split, read):
    card = make_card(choices=None, metrics=["squad"], label="answers.text")
    (example,) = read(card, write_split([{"text": "a", "answers": {"text": ["one", "two"]}}]))
    assert (example.target, example.references) == ("one", ["one", "two"])


@pytest.mark.parametrize("suffix", ["parquet", "csv", "json"])
def test_file_formats(make_card, tmp_path, read, suffix):
    folder = tmp_path / "data" / "film" / "small"
    folder.mkdir(parents=True)
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    file = folder / f"train.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif suffix == "csv":
        with file.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        file.write_text(str(rows).replace("'", '"'))
    got = read(make_card(subset="small"), str(tmp_path / "data"))
    assert [example.target for example in got] == ["good", "bad"]


def test_data_root_from_the_environment(make_card, write_split, read, monkeypatch):
    monkeypatch.setenv("MPT_DATA_ROOT", write_split([{"text": "a", "label": 1}]))
    assert len(read(make_card(), None)) == 1


# Invalid input: the message contains the value, the expected one and what to change.


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"text": "a", "label": 2},
            {},
            r"Task 'film', row 1: got label 2, expected 0 to 1 or one of bad, good; change",
        ),
        ({"text": "a", "label": -2}, {}, r"row 1: got label -2, expected 0 to 1"),
        ({"text": "a", "label": -1}, {}, r"row 1: got no label \(-1\) in column 'label'.*`unlabelled: drop`"),
        ({"text": "a", "label": None}, {}, r"row 1: got no label \(None\)"),
        ({"text": " ", "label": 1}, {}, r"row 1: got an empty text in column 'text'.*`empty_text: drop` or `keep`"),
        ({"text": None, "label": 1}, {}, r"row 1: got an empty text in column 'text'"),
        ({"label": 1}, {}, r"row 1: got an empty text in column 'text'"),
        (
            {"text": "a", "label": 6},
            {"choices": None, "value_range": (0, 5), "metrics": ["pearson"]},
            r"row 1: got label 6, expected a number from 0 to 5; change",
        ),
        (
            {"text": "a", "label": []},
            {"choices": None, "metrics": ["squad"]},
            r"row 1: got no label \(\[\]\)",
        ),
    ],
)
def test_bad_row(make_card, write_split, read, row, fields, message):
    good = {"text": "a", "label": ["x"] if isinstance(row["label"], list) else 1}
    with pytest.raises(ValueError, match=message):
        read(make_card(**fields), write_split([good, row]))


def test_column_that_is_not_text(make_card, write_split, read):
    with pytest.raises(ValueError, match=r"row 0: got dict in column 'text', expected text; change `input` or add a"):
        read(make_card(), write_split([{"text": {"a": 1}, "label": 1}]))


def test_rows_to_drop_are_dropped(make_card, write_split, read):
    rows = [{"text": "a", "label": 1}, {"text": "", "label": 1}, {"text": "b", "label": -1}, {"text": "c", "label": 0}]
    got = read(make_card(unlabelled="drop", empty_text="drop"), write_split(rows))
    assert [example.row_id for example in got] == [0, 3]


def test_empty_text_can_be_kept(make_card, write_split, read):
    assert read(make_card(empty_text="keep"), write_split([{"text": "", "label": 1}]))[0].values == {"text": ""}


def test_no_rows_left(make_card, write_split, read):
    with pytest.raises(ValueError, match=r"got no labelled train row with text out of 1"):
        read(make_card(unlabelled="drop"), write_split([{"text": "a", "label": -1}]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input": "{sentence}"}, r"got no column 'sentence', expected one of text, label; change the card"),
        ({"label": "gold"}, r"got no column 'gold', expected one of text, label; change the card"),
        ({"group": "question"}, r"got no column 'question'"),
    ],
)
def test_missing_column_lists_the_others(make_card, write_split, read, fields, message):
    with pytest.raises(ValueError, match=message):
        read(make_card(**fields), write_split([{"text": "a", "label": 1}]))


@pytest.mark.parametrize("name", ["train.jsonl", "train.csv", "train.parquet"])
def test_empty_data_set(make_card, tmp_path, read, name):
    file = tmp_path / "data" / "film" / name
    file.parent.mkdir(parents=True)
    if name.endswith("parquet"):
        pq.write_table(pa.table({"text": pa.array([], pa.string())}), file)
    else:
        file.write_text("text,label\n" if name.endswith("csv") else "")
    with pytest.raises(
        ValueError, match=rf"Task 'film': got .*{name}.* empty.*expected a data set with at least one row"
    ):
        read(make_card(), str(tmp_path / "data"))


def test_damaged_file(make_card, tmp_path, read):
    file = tmp_path / "data" / "film" / "train.parquet"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"train.parquet', which is empty or cannot be read \(Arrow"):
        read(make_card(), str(tmp_path / "data"))


def test_missing_file_names_the_folder(make_card, write_split, read):
    root = write_split([{"text": "a", "label": 1}])
    with pytest.raises(ValueError, match=r"no file for split 'test' in '.*film', expected test\{.parquet,.jsonl"):
        read(make_card(), root, "test")


def test_card_without_the_split(make_card, write_split, read):
    card = make_card(splits={"train": "train"})
    with pytest.raises(ValueError, match=r"got no 'test' split \(its `splits` are train\).*`split_rule: halved`"):
        read(card, write_split([{"text": "a", "label": 1}]), "test")


# Split rules


def test_halves_are_disjoint_and_complete(make_card, write_split, film_rows, read):
    root = write_split(film_rows(11), split="validation")
    card = make_card(split_rule="halved")
    halves = [{example.row_id for example in read(card, root, split)} for split in ("validation", "test")]
    assert [len(half) for half in halves] == [5, 6]
    assert halves[0] | halves[1] == set(range(11))


def test_halves_keep_groups_whole(make_card, write_split, read):
    rows = [{"text": "a", "label": n % 2, "question": f"q{n // 3}"} for n in range(30)]
    root = write_split(rows, split="validation")
    card = make_card(split_rule="halved", group="question", metrics=["multirc"])
    halves = [Counter(example.group for example in read(card, root, split)) for split in ("validation", "test")]
    assert not set(halves[0]) & set(halves[1])
    assert all(count == 3 for half in halves for count in half.values())
    assert sum(halves[0].values()) == 15


def test_one_row_cannot_be_halved(make_card, write_split, film_rows, read):
    root = write_split(film_rows(1), split="validation")
    with pytest.raises(ValueError, match=r"got 1 validation rows, which leave the validation half empty"):
        read(make_card(split_rule="halved"), root, "validation")


@pytest.mark.parametrize(("count", "held_out"), [(50, 5), (3, 1), (12000, 1000)])
def test_held_out_rows_come_from_training(make_card, write_split, film_rows, read, count, held_out):
    write_split(film_rows(count, words=1))
    root = write_split(film_rows(4), split="validation")
    card = make_card(split_rule="held_out")
    parts = {
        split: [example.row_id for example in read(card, root, split)] for split in ("train", "validation", "test")
    }
    assert [len(part) for part in parts.values()] == [count - held_out, held_out, 4]
    assert sorted(parts["train"] + parts["validation"]) == list(range(count))


# Draws


def test_shots_per_class(make_card, write_split, film_rows, read):
    got = read(make_card(), write_split(film_rows(40)), k_shot=4)
    assert Counter(example.target for example in got) == {"bad": 4, "good": 4}


def test_shots_per_task(make_card, write_split, film_rows, read):
    root = write_split(film_rows(40))
    assert len(read(make_card(), root, k_shot=5, shots_per="task")) == 5
    numbers = make_card(choices=None, value_range=(0, 5), metrics=["pearson"])
    assert len(read(numbers, root, k_shot=5)) == 5


@pytest.mark.parametrize(("k_shot", "expected"), [(6, {"bad": 3, "good": 3}), (7, {"bad": 4, "good": 3})])
def test_balanced_shots_are_even_over_classes(make_card, write_split, film_rows, read, k_shot, expected):
    got = read(make_card(), write_split(film_rows(40)), k_shot=k_shot, shots_per="balanced")
    assert Counter(example.target for example in got) == expected


def test_draws_follow_the_seed_and_grow(make_card, write_split, film_rows, read):
    root, card = write_split(film_rows(40)), make_card()
    few, same, other, more = (
        [example.row_id for example in read(card, root, k_shot=k, seed=seed)]
        for k, seed in ((4, 1), (4, 1), (4, 2), (8, 1))
    )
    assert few == same == sorted(few)
    assert few != other
    assert set(few) < set(more)


def test_more_shots_than_rows(make_card, write_split, read):
    rows = [{"text": "a", "label": 1}] * 5 + [{"text": "b", "label": 0}] * 2
    root = write_split(rows)
    with pytest.raises(
        ValueError,
        match=r"got k_shot=4, which needs 4 training rows, but class 'bad' has only 2; lower `k_shot` or set",
    ):
        read(make_card(), root, k_shot=4)
    with pytest.raises(
        ValueError, match=r"got k_shot=8, which needs 8 training rows, but the task has only 7; lower `k_shot`"
    ):
        read(make_card(), root, k_shot=8, shots_per="task")


def test_cap(make_card, write_split, film_rows, read):
    root = write_split(film_rows(40))
    assert len(read(make_card(), root, max_rows=7)) == 7
    assert len(read(make_card(), root, max_rows=100)) == 40


def test_cap_keeps_whole_groups_in_evaluation(make_card, write_split, read):
    rows = [{"text": "a", "label": n % 2, "question": f"q{n // 3}"} for n in range(30)]
    card = make_card(group="question", metrics=["multirc"])
    got = read(card, write_split(rows, split="validation"), "validation", max_rows=10)
    assert list(Counter(example.group for example in got).values()) == [3, 3, 3]


# Preprocess functions


def double(row, split):
    return [{**row, "text": f"{split} {row['text']}"}, {**row, "label": 1 - row["label"]}]


@pytest.fixture
def functions(monkeypatch):
    """Return a function that makes a preprocess function importable, and returns its dotted path."""

    def add(function):
        monkeypatch.setattr(function, "__module__", rows_module.__name__)
        monkeypatch.setattr(function, "__qualname__", "as_written")
        monkeypatch.setattr(rows_module, "as_written", function, raising=False)
        return "mpt_lightning.data.rows.as_written"

    return add


def test_preprocess_makes_rows(make_card, write_split, read, functions):
    got = read(
        make_card(preprocess=functions(double)), write_split([{"text": "a", "label": 1}, {"text": "b", "label": 1}])
    )
    assert [(example.row_id, example.values["text"], example.target) for example in got] == [
        (0, "train a", "good"),
        (0, "a", "bad"),
        (1, "train b", "good"),
        (1, "b", "bad"),
    ]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda row, split: None, r"row 0: got NoneType from .*as_written, expected a list of mappings"),
        (lambda row, split: [1], r"row 0: got list from"),
        (lambda row, split: [], r"got no rows from .*as_written on 1 train rows"),
    ],
)
def test_bad_preprocess(make_card, write_split, read, functions, function, message):
    with pytest.raises(ValueError, match=message):
        read(make_card(preprocess=functions(function)), write_split([{"text": "a", "label": 1}]))


@pytest.mark.parametrize("path", ["no_such_module.clean", "mpt_lightning.data.rows.no_such_function"])
def test_preprocess_that_cannot_be_imported(make_card, write_split, read, path):
    with pytest.raises(ValueError, match=rf"got preprocess='{path}', which cannot be imported .*change `preprocess`"):
        read(make_card(preprocess=path), write_split([{"text": "a", "label": 1}]))
