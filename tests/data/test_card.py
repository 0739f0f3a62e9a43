import subprocess
import sys

import pytest

from mpt_lightning.data.card import TaskCard, card_names, list_cards, load_card

FIELDS = {"name": "a", "path": "b", "input": "x: {x}", "metrics": ["accuracy"], "choices": ["no", "yes"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "../x"}, r"Task name: got '../x', expected letters.*change `name`"),
        ({"name": "/etc/x"}, r"got '/etc/x'"),
        ({"name": "a//b"}, r"got 'a//b'"),
        ({"name": "a b"}, r"got 'a b'"),
        ({"path": ""}, r"got path='', expected a text"),
        ({"input": "no fields"}, r"got input='no fields', expected a template that names at least one column"),
        ({"input": "open {"}, r"got input='open \{', expected a template like"),
        ({"input": "{}"}, r"expected plain column names"),
        ({"input": "{a.b}"}, r"expected plain column names"),
        ({"input": "{a:>3}"}, r"expected column names without a format"),
        ({"metrics": ["acc"]}, r"got metrics=\['acc'\], expected one or more different names out of accuracy, f1"),
        ({"metrics": []}, r"got metrics=\[\], expected one or more different names"),
        ({"choices": None}, r"got choices=None, expected a value, because the metric 'accuracy' needs it"),
        ({"choices": [False, True]}, r"expected a list of texts \(in YAML, quote words"),
        ({"choices": ["yes", "Yes"]}, r"expected two or more non-empty words"),
        ({"choices": ["a", "b", "c"], "metrics": ["f1"]}, r"expected 2 words"),
        ({"value_range": (0, 5)}, r"either `choices` or `value_range`"),
        ({"choices": None, "value_range": (5, 0), "metrics": ["pearson"]}, r"\[lowest, highest\]"),
        ({"choices": None, "value_range": 5, "metrics": ["pearson"]}, r"got value_range=5, expected \[lowest"),
        ({"choices": None, "value_range": (0, 5), "value_step": 0, "metrics": ["pearson"]}, r"value_step=0"),
        ({"choices": None, "value_range": (0, 5), "value_step": 0.25, "metrics": ["pearson"]}, r"a multiple of 0.1"),
        ({"choices": None, "metrics": ["spearman"]}, r"got value_range=None.*'spearman'"),
        ({"metrics": ["multirc"]}, r"got group=None, expected the column of the question id"),
        ({"truncate": "y"}, r"got truncate='y', expected a column of the template \(x\)"),
        ({"split_rule": "half"}, r"split_rule: got 'half', expected one of given, halved, held_out"),
        ({"unlabelled": "keep"}, r"unlabelled: got 'keep'"),
        ({"empty_text": "no"}, r"empty_text: got 'no'"),
        ({"splits": {"dev": "dev"}}, r"got splits=.*expected a mapping of train, validation and test"),
        ({"splits": {"train": "t"}, "split_rule": "halved"}, r"expected a `validation` split to halve"),
        ({"splits": {"train": "t"}, "split_rule": "held_out"}, r"a `validation` split that becomes test"),
        ({"preprocess": "clean"}, r"expected a dotted path"),
        ({"max_target_length": 0}, r"max_target_length: got 0, expected a whole number at least 1 or null"),
    ],
)
def test_bad_field_names_got_and_expected(change, message):
    with pytest.raises(ValueError, match=message):
        TaskCard(**{**FIELDS, **change})


def test_columns_are_listed_once_in_order():
    assert TaskCard(**{**FIELDS, "input": "a {y} b {x} c {y}"}).columns == ["y", "x"]


def test_literal_braces_stay():
    assert TaskCard(**{**FIELDS, "input": "{{set}} {x}"}).parts == (("{", None), ("set}", None), (" ", "x"))


def test_load_from_file_mapping_and_card(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(
        "class_path: mpt_lightning.data.TaskDataModule\n"
        "init_args:\n  batch_size: 3\n  card:\n    name: mine\n    path: b\n    input: '{x}'\n"
        "    metrics: [pearson]\n    value_range: [0, 5]\n"
    )
    card = load_card(file)
    assert (card.name, card.value_range) == ("mine", (0.0, 5.0))
    assert load_card(str(file)) == card
    assert load_card(FIELDS) == TaskCard(**FIELDS)
    assert load_card(card) is card


def test_unknown_name_suggests_similar_names():
    with pytest.raises(ValueError, match=r"unknown task 'glue/sst'. Expected .*glue/sst2.*`mpt tasks` lists"):
        load_card("glue/sst")


def test_missing_file_is_not_taken_for_a_name():
    with pytest.raises(ValueError, match=r"unknown task 'nowhere/x.yaml'. Expected a file"):
        load_card("nowhere/x.yaml")


def test_name_that_leaves_the_folder_raises():
    with pytest.raises(ValueError, match=r"unknown task '../glue/sst2'"):
        load_card("../glue/sst2")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a\n", r"got list, expected a YAML mapping"),
        ("init_args: {batch_size: 3}\n", r"got no `init_args.card`"),
        (
            "init_args: {card: {name: a, path: b, input: '{x}', metrics: [squad], colour: red}}\n",
            r"unknown keys colour",
        ),
        ("init_args: {card: {name: a, input: '{x}'}}\n", r"got no path, metrics, expected these keys"),
        ("init_args: {card: {name: [}}\n", r"cannot be read as YAML"),
    ],
)
def test_bad_file(tmp_path, content, message):
    file = tmp_path / "card.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_card(file)


def test_shipped_cards_have_the_name_of_their_file():
    assert card_names() == sorted(card_names())
    assert [card.name for card in list_cards().values()] == card_names()


def test_listing_cards_imports_no_heavy_library():
    code = (
        "import sys\nfrom mpt_lightning.data.card import list_cards\nlist_cards()\n"
        "print([m for m in ('torch', 'datasets', 'transformers', 'lightning') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
