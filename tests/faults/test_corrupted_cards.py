"""Damaged and hostile YAML files of cards, comparisons and recipes are refused with a clear message."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpt_lightning import MultitaskDataModule, TaskDataModule, load_task
from mpt_lightning.cli.main import main
from mpt_lightning.compare.plan import read_comparison
from mpt_lightning.data.card import load_card
from tests.faults.conftest import CARD, Outcome, World
from tests.faults.damage import Change, drop, put

pytestmark = pytest.mark.usefixtures("own_folder")
NAN, INF = float("nan"), float("inf")
RANGE = {"choices": None, "metrics": ["pearson"], "value_range": [0, 5]}
FIELDS: dict[str, list[Any]] = {
    "name": [
        None, 5, "", "../x", "/etc/x", "a//b", "a/", "a b", "a\nb", "a\0b", "..", ".", "a/../b", "a/./b", "a\\..\\b",
        "con:", "x" * 300, "ä", ["film"], {"a": 1},
    ],
    "path": [None, 5, "", "  ", ["x"], "a\0b"],
    "input": [
        None, 5, "", "no column", "{", "}", "{text", "text}", "{}", "{0}", "{text.x}", "{text[0]}", "{text!r}",
        "{text:>9}",
        "{{text}}", ["{text}"], {"text": 1}, "{te\0xt}", "{text} {", "{{text}", True,
    ],
    "metrics": [
        None, "accuracy", [], ["acuracy"], [5], [None], [["accuracy"]], {"accuracy": 1}, ["accuracy", "accuracy"],
        ["pearson"],
        ["multirc"], [{}],
    ],
    "subset": [5, "", "../x", "/x", "a/../../b", "..\\x", ["a"], "a\0"],
    "revision": [5, "", ["a"], True],
    "label": [None, 5, "", ["a"]],
    "choices": [
        [], "negative", ["one"], ["a", "a"], ["a", "A"], ["a", " A "], ["a", ""], ["a", " "], [1, 2], [None, "a"],
        {"a": 1, "b": 2}, [["a"], ["b"]], [True, False], 5, None,
    ],
    "value_range": [[0, 5], 5],
    "splits": [
        None, [], "train", {}, {"dev": "x"}, {"train": 5}, {"train": None}, {"train": "../x"}, {"train": "/etc/passwd"},
        {"train": ""}, {1: "x"}, {"train": ["train"]}, {"train": "train", "test": "a/../../b"},
    ],
    "split_rule": [None, 5, "half", ["given"]],
    "truncate": [5, "other", ["text"], ""],
    "group": [5, "", ["a"]],
    "preprocess": [5, "clean", "a b.c", "lambda: 1", "a.b()", "a..b", ".a", "a.", "a.__class__", "_a.b", "a.b;", []],
    "unlabelled": [None, "keep", 5],
    "empty_text": [None, "no", True],
    "max_target_length": [0, -1, "5", True, 1.5, [5]],
    "patterns": [
        None, 5, "x", [5], [{}], [{"input": 5}], [{"input": "{other}"}], [{"input": "{text}", "choices": ["a"]}],
        [{"input": "{text}", "more": 1}], {"input": "{text}"}, [{"input": "{text}", "choices": [1, 2]}],
        [{"input": "{"}],
    ],
    "masked": [
        5, "x", [], {}, {"input": 5}, {"input": ""}, {"input": "{other} [MASK]"}, {"input": "{text} [MASK] [MASK]"},
        {"input": "it was [MASK]"}, {"input": "{text", "choices": ["a", "b"]}, {"input": "{text}", "more": 1},
        {"input": "{text}", "choices": ["a"]}, {"input": "{text}", "choices": ["a", "A"]},
        {"input": "{text}", "choices": [1, 2]}, {"input": "{text}", "choices": "ab"}, [{"input": "{text}"}],
    ],
    "multi_mask": [None, "perhaps", 5, []],
    "label_names": [5, "ab", ["a"], ["a", "a"], ["a", "b", "c"], [], {"a": 1}],
    "language": [5, ["en"], None],
    "citation": [5, {}],
    "colour": ["red"],
    "Name": ["film"],
}  # fmt: skip
OF_A_RANGE: dict[str, list[Any]] = {
    "value_range": [5, [1], [5, 0], [0, 0], ["a", "b"], [NAN, 1], [0, INF], [0, 1, 2], [True, 5], [None, 1], {}, "05"],
    "masked": [
        {"input": "{text} [MASK]"},
        *(
            {"input": "{text} [MASK]", "choices": words}
            for words in (
                [],
                ["no"],
                ["no", "no"],
                ["no", " "],
                ["no", "so", "yes"],
                [0, 5],
                "no",
                5,
                [["no"], ["yes"]],
            )
        ),
    ],
    "value_step": [0, -1, "x", NAN, INF, 0.25, None, [1], True, 9],
}
CARD_CASES = [
    pytest.param(base | {field: value}, id=f"{field} {number}{' of a range' if base else ''}")
    for base, fields in (({}, FIELDS), (RANGE, OF_A_RANGE))
    for field, values in fields.items()
    for number, value in enumerate(values)
]


@pytest.mark.parametrize("values", CARD_CASES)
def test_a_wrong_field(values: dict[str, Any], tmp_path: Path, outcome: Outcome) -> None:
    """A wrong field is refused in Python, and in a file if YAML can represent it."""
    card = CARD | values
    assert outcome(lambda: load_card(card)) is not None
    (tmp_path / "card.yaml").write_text(yaml.safe_dump({"init_args": {"card": card}}))
    for read in (load_card, load_task, TaskDataModule, lambda path: main(["tasks", path])):
        assert outcome(lambda read=read: read(str(tmp_path / "card.yaml"))) is not None


GOOD = yaml.safe_dump({"class_path": "mpt_lightning.data.TaskDataModule", "init_args": {"card": CARD}})
FILES: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"- a\n- b\n",
    "text": b"a card",
    "number": b"5",
    "date": b"2001-01-01",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "half": GOOD[: len(GOOD) // 2].encode(),
    "tabs": GOOD.replace("  ", "\t").encode(),
    "UTF-16": GOOD.encode("utf-16"),
    "latin-1": GOOD.replace("film", "f\xfclm").encode("latin-1"),
    "zero bytes": GOOD.replace("film", "fi\0lm").encode(),
    "open bracket": GOOD.replace("- negative", "- [negative").encode(),
    "open quote": GOOD.replace("name: film", "name: 'film").encode(),
    "two documents": GOOD.encode() + b"---\n" + GOOD.encode(),
    "deep": b"[" * 600,
    "deep mapping": b"a: {" * 600,
    "undefined alias": b"a: *b\n",
    "merge of a text": b"<<: text\n",
    "list for a key": b"? [a, b]\n: 1\n",
    "unknown tag": GOOD.replace("name: film", "name: !film film").encode(),
    "bad integer": GOOD.encode() + b"x: !!int five\n",
    "bad bool": GOOD.encode() + b"x: !!bool maybe\n",
    "bad float": GOOD.encode() + b"x: !!float five\n",
    "bad date": GOOD.encode() + b"x: 2001-99-99\n",
    "bad timestamp": GOOD.encode() + b"x: !!timestamp five\n",
    "bad binary": GOOD.encode() + b"x: !!binary '\xc3\xbc'\n",
    "no card": b"class_path: mpt_lightning.data.TaskDataModule\ninit_args: {batch_size: 3}\n",
    "card a list": b"init_args: {card: [a]}\n",
    "card a text": b"init_args: {card: glue/sst2}\n",
    "arguments a list": b"init_args: [card]\n",
    "arguments null": b"init_args:\n",
}
TAGS = {
    "apply": "!!python/object/apply:builtins.open [{trap}, w]", "new": "!!python/object/new:builtins.open [{trap}, w]",
    "name": "!!python/name:os.system", "module": "!!python/module:os",
    "system": "!!python/object/apply:os.system ['> {trap}']",
}  # fmt: skip


def readers(content: bytes, world: World, path: Path) -> list[Any]:
    """Return calls of everything that reads a card's file."""
    path.write_bytes(content)
    words = ["--config", str(world.recipes["PromptTuning"]), "--data", str(path)]
    entries = [
        lambda: load_card(str(path)),
        lambda: TaskDataModule(str(path)),
        lambda: load_task(path),
        lambda: MultitaskDataModule([str(path)]),
        lambda: main(["tasks", str(path)]),
    ]
    # On the command line a file may lack a card, which then comes from a recipe or from Python.
    alone = b"init_args: {batch_size" in content or b"card: glue/sst2" in content
    return entries if alone else [*entries, lambda: main(["fit", *words])]


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_card(name: str, world: World, tmp_path: Path, outcome: Outcome) -> None:
    for read in readers(FILES[name], world, tmp_path / "card.yaml"):
        assert outcome(read) is not None


@pytest.mark.parametrize("tag", TAGS)
def test_tags_in_a_card_are_not_run(tag: str, world: World, tmp_path: Path, outcome: Outcome) -> None:
    trap = tmp_path / "sprung"
    content = GOOD.replace("name: film", f"name: {TAGS[tag].format(trap=trap)}").encode()
    for read in readers(content, world, tmp_path / "card.yaml"):
        assert outcome(read) is not None
    assert not trap.exists()


@pytest.mark.parametrize("name", ["nowhere.yaml", "x" * 5000, "a\0b", "../glue/sst2", "/etc/passwd", "glue", "", "."])
def test_a_missing_card(name: str, outcome: Outcome) -> None:
    for read in (load_card, load_task, TaskDataModule):
        assert outcome(lambda read=read: read(name)) is not None


COMPARISON = {"tasks": ["demo/topic"], "shots": [4], "methods": {"prompt": {"recipe": "demo/target"}}}


def comparison_damages() -> Iterator[tuple[str, Change]]:
    for field in COMPARISON:
        yield f"no {field}", drop(field)
    for field, values in {
        "tasks": [None, "demo/topic", [], [5], ["nothing/here"], ["demo/topic", "demo/topic"], {"a": 1}, ["../x"], [5]],
        "shots": [None, 4, [], ["many"], [-1], [4, 4], [1.5], {"a": 1}],
        "seeds": [None, 0, [], ["x"], [0, 0], [None], [0.5]],
        "methods": [
            None, [], {}, "prompt", {"prompt": None}, {"prompt": {}}, {"prompt": {"recipe": "nothing"}},
            {"prompt": {"recipe": 5}}, {"prompt": {"recipe": []}}, {"a/b": {"recipe": "demo/target"}},
            {"../x": {"recipe": "demo/target"}}, {"prepare": {"recipe": "demo/target"}},
            {"prompt": {"recipe": "demo/target", "more": 1}}, {"prompt": {"recipe": "demo/target", "fit": "perhaps"}},
            {"prompt": {"recipe": "demo/target", "arguments": [1]}},
            {"prompt": {"recipe": "demo/target", "shots": ["x"]}},
            {"prompt": {"recipe": "demo/target", "arguments": {"model.lr": "$nothing"}}},
            {"x" * 300: {"recipe": "demo/target"}},
            {"prompt": {"recipe": "demo/target"}, "Prompt": {"recipe": "demo/target"}},
        ],
        "arguments": [5, "x", [1], {"model.lr": "$"}],
        "prepare": [5, [1], {"k": {"recipe": "demo/target"}}, {"a": None}],
        "metric": [5, [1], {}], "name": ["../x", "a/b", "x" * 300, ["x"]], "keep_checkpoints": ["perhaps", 7],
        "few_shot_arguments": [5, [1]], "colour": ["red"],
    }.items():  # fmt: skip
        for number, value in enumerate(values):
            yield f"{field} {number}", put(field, value=value)


@pytest.mark.parametrize("change", [pytest.param(change, id=name) for name, change in comparison_damages()])
def test_a_wrong_comparison(change: Change, tmp_path: Path, outcome: Outcome) -> None:
    content = dict(COMPARISON)
    change(content)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    assert outcome(lambda: read_comparison(str(tmp_path / "mine.yaml"))) is not None
    message = outcome(lambda: main(["compare", str(tmp_path / "mine.yaml")]))
    assert message is not None
    assert "mine.yaml" in message


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_comparison(name: str, tmp_path: Path, outcome: Outcome) -> None:
    (tmp_path / "mine.yaml").write_bytes(FILES[name])
    assert outcome(lambda: main(["compare", str(tmp_path / "mine.yaml")])) is not None


RECIPE_CASES: dict[str, Any] = {
    "an unknown key": {"colour": "red"},
    "a seed as text": {"seed_everything": "x"},
    "trainer a list": {"trainer": [1]},
    "an unknown argument": {"trainer": {"max_stepz": 3}},
    "steps as text": {"trainer": {"max_steps": "three"}},
    "a callback that is none": {"trainer": {"callbacks": [{"class_path": "os.system"}]}},
    "model a number": {"model": 5},
    "a function for a model": {"model": {"class_path": "os.system"}},
    "no such class": {"model": {"class_path": "mpt_lightning.Nothing"}},
    "a class that is no model": {"model": {"class_path": "pathlib.Path", "init_args": {"args": ["x"]}}},
    "another argument": {"model": {"init_args": {"optimiser": "adamw"}}},
    "a length as text": {"model": {"init_args": {"prompt_length": "long"}}},
    "a length below one": {"model": {"init_args": {"prompt_length": 0}}},
    "a backbone that is a number": {"model": {"init_args": {"backbone": 5}}},
    "data a text": {"data": "film"},
    "no tasks": {"data": {"init_args": {"tasks": []}}},
    "tasks that are none": {"data": {"init_args": {"tasks": [5]}}},
    "batches of nothing": {"data": {"init_args": {"batch_size": 0}}},
}


@pytest.mark.parametrize("name", RECIPE_CASES)
def test_a_wrong_recipe(name: str, world: World, tmp_path: Path, outcome: Outcome) -> None:
    (tmp_path / "over.yaml").write_text(yaml.safe_dump(RECIPE_CASES[name]))
    words = ["--config", str(world.recipes["PromptTuning"]), "--config", str(tmp_path / "over.yaml")]
    assert outcome(lambda: main(["fit", *words])) is not None


@pytest.mark.parametrize("name", [*FILES, *TAGS])
def test_a_file_without_a_recipe(name: str, tmp_path: Path, outcome: Outcome) -> None:
    trap = tmp_path / "sprung"
    tagged = f"trainer: {TAGS.get(name, '').format(trap=trap)}\n".encode()
    (tmp_path / "mine.yaml").write_bytes(FILES.get(name, tagged))
    assert outcome(lambda: main(["fit", "--config", str(tmp_path / "mine.yaml")])) is not None
    assert not trap.exists()
