"""Row functions of the comparison's own tasks: which word does a sentence of the embedded world contain?

Each is `(row, split) -> rows`; a row with none of the words is left out.
"""

from typing import Any

from tools import world

Row = dict[str, Any]


def doer(row: Row, split: str) -> list[Row]:
    """Label an event with its doer: 0 a person, 1 an animal."""
    return _labelled(row["sentence1"], world.PEOPLE, world.ANIMALS)


def item(row: Row, split: str) -> list[Row]:
    """Label an event with its item: 0 a thing, 1 food."""
    return _labelled(row["sentence1"], world.THINGS, world.FOODS)


def act(row: Row, split: str) -> list[Row]:
    """Label an event with its verb, one of four."""
    return _labelled(row["sentence2"], ["found"], ["lost"], ["brought"], ["dropped"])


def place(row: Row, split: str) -> list[Row]:
    """Label an event with its place, one of four."""
    return _labelled(row["sentence1"], ["park"], ["kitchen"], ["school"], ["library"])


def work(row: Row, split: str) -> list[Row]:
    """Label an opinion with its object: 0 a film, 1 a book, 2 a song, 3 a play."""
    return _labelled(row["sentence"], *([word] for word in world.WORKS))


def colour(row: Row, split: str) -> list[Row]:
    """Label an event with its colour, one of four."""
    return _labelled(row["sentence1"], ["red"], ["blue"], ["green"], ["yellow"])


def _labelled(sentence: str, *classes: Any) -> list[Row]:
    words = set(sentence.split())
    labels = [label for label, names in enumerate(classes) if words.intersection(names)]
    return [{"sentence": sentence, "label": labels[0]}] if len(labels) == 1 else []
