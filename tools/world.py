"""A small world of English sentences and ten tasks on them, drawn from a seed.

    python -m tools.world      # writes the Parquet files that ship with the package

Nearly every sentence describes an `Event` (who did what to which item, of what colour, where) or expresses an opinion.
A task is a function that returns a row for a random generator and a given label, so that labels are balanced. Its
docstring is the question that the label answers. `SOURCES` has six tasks, `TARGETS` four.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TypeAlias

from datasets import Dataset

Row: TypeAlias = dict[str, str]

PEOPLE = ("girl", "boy", "teacher", "doctor", "farmer", "baker", "singer", "kid")
ANIMALS = ("dog", "cat", "horse", "fox", "duck", "goat", "mouse", "bear")
THINGS = ("cup", "box", "book", "coat", "bag", "lamp", "chair", "ball")
FOODS = ("apple", "cake", "pie", "bread", "plum", "cheese", "pear", "soup")
VERBS = ("found", "carried", "dropped", "spotted", "washed", "moved", "lost", "brought")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "pink")
PLACES = ("park", "garden", "kitchen", "school", "barn", "shop", "forest", "library")
SYNONYMS = {
    "girl": "lass", "doctor": "medic", "kid": "child", "singer": "vocalist", "cup": "mug", "box": "crate",
    "coat": "jacket", "bag": "sack", "carried": "hauled", "spotted": "noticed", "washed": "cleaned",
    "moved": "shifted", "garden": "yard", "shop": "store", "forest": "woods", "barn": "stable",
}  # fmt: skip
KINDS = {word: kind for kind, words in (("person", PEOPLE), ("animal", ANIMALS), ("thing", THINGS), ("food", FOODS))
         for word in words}  # fmt: skip

SLOTS: dict[str, tuple[str, ...]] = {
    "agent": PEOPLE + ANIMALS,
    "verb": VERBS,
    "item": THINGS + FOODS,
    "colour": COLOURS,
    "place": PLACES,
}


@dataclass(frozen=True)
class Event:
    """Who did what to which item, of what colour, and where; an empty colour or place is not mentioned."""

    agent: str
    verb: str
    item: str
    colour: str
    place: str

    def text(self, *, passive: bool = False, place_first: bool = False) -> str:
        """Return the event as one lower-case sentence; spaces separate the words and the full stop."""
        agent, item = f"the {self.agent}", " ".join(f"the {self.colour} {self.item}".split())
        told = f"{item} was {self.verb} by {agent}" if passive else f"{agent} {self.verb} {item}"
        if not self.place:
            return f"{told} ."
        return f"in the {self.place} {told} ." if place_first else f"{told} in the {self.place} ."

    def told(self, rng: Random) -> str:
        """Return the event as a sentence in one of its four word orders."""
        return self.text(passive=rng.random() < 0.5, place_first=rng.random() < 0.3)


def draw_event(rng: Random) -> Event:
    """Draw an event with every slot filled."""
    return Event(*(rng.choice(words) for words in SLOTS.values()))


def change(event: Event, slots: Sequence[str], rng: Random) -> Event:
    """Return the event with another word in each of `slots`."""
    return replace(event, **{s: rng.choice([w for w in SLOTS[s] if w != getattr(event, s)]) for s in slots})


def reword(event: Event, rng: Random) -> Event:
    """Return the event with each word replaced by its synonym, if any, half of the time."""
    words = {slot: getattr(event, slot) for slot in SLOTS}
    return Event(**{s: SYNONYMS[w] if w in SYNONYMS and rng.random() < 0.5 else w for s, w in words.items()})


def shorten(event: Event, keep: str, rng: Random) -> Event:
    """Return the event with less detail: the slot `keep` stays, others may be left out or become their kind."""
    words = {slot: getattr(event, slot) for slot in SLOTS}
    for slot in ("colour", "place"):
        if slot != keep and rng.random() < 0.5:
            words[slot] = ""
    for slot in ("agent", "item"):
        if slot != keep and rng.random() < 0.3:
            words[slot] = KINDS[words[slot]]
    return Event(**words)


GOOD = ("great", "funny", "lovely", "charming", "clever", "superb", "pleasant", "exciting")
BAD = ("awful", "dull", "boring", "clumsy", "silly", "horrible", "tiresome", "weak")
LIKED = ("loved", "liked", "enjoyed", "praised")
LOATHED = ("hated", "disliked", "regretted", "cursed")
WORKS = {
    "film": ("story", "music", "ending", "cast"), "book": ("story", "style", "ending", "cover"),
    "song": ("music", "text", "voice", "rhythm"), "play": ("cast", "stage", "text", "voice"),
}  # fmt: skip
GOODS = {
    "phone": ("screen", "sound", "price", "design"), "hotel": ("room", "staff", "price", "food"),
    "meal": ("food", "staff", "taste", "price"), "car": ("design", "engine", "seat", "sound"),
}  # fmt: skip


def opinion(rng: Random, good: bool, about: Mapping[str, tuple[str, ...]]) -> str:
    """Return an opinion of one of `about`; a third of the adjectives are negated, so that no single word decides."""
    name = rng.choice(list(about))
    part = rng.choice(about[name])
    quality = f"not {rng.choice(BAD if good else GOOD)}" if rng.random() < 1 / 3 else rng.choice(GOOD if good else BAD)
    felt, who = rng.choice(LIKED if good else LOATHED), rng.choice(("i", "we", f"the {rng.choice(PEOPLE)}"))
    return rng.choice((
        f"{who} {felt} the {name} because the {part} was {quality} .",
        f"the {part} of the {name} was {quality} .",
        f"the {part} was {quality} , so {who} {felt} the {name} .",
        f"{who} went for the {name} and the {part} was {quality} .",
    ))  # fmt: skip


def sentiment(rng: Random, label: int) -> Row:
    """Is the opinion of a film, book, song or play good?"""
    return {"sentence": opinion(rng, label == 1, WORKS)}


def advice(rng: Random, label: int) -> Row:
    """Does the opinion recommend a phone, hotel, meal or car?"""
    return {"sentence": opinion(rng, label == 1, GOODS)}


def acceptability(rng: Random, label: int) -> Row:
    """Is the sentence well formed, or are some words shuffled or doubled?"""
    words = (draw_event(rng).told(rng) if rng.random() < 0.6 else opinion(rng, rng.random() < 0.5, WORKS)).split()
    if label == 0:
        start = rng.randrange(len(words) - 5)
        part = words[start : start + 4]
        mess = [word for word in part for _ in (0, 1)] if rng.random() < 0.3 else rng.sample(part, 4)
        words[start : start + 4] = part[::-1] if mess == part else mess
    return {"sentence": " ".join(words)}


def voice(rng: Random, label: int) -> Row:
    """Is the sentence active or passive?"""
    return {"sentence": draw_event(rng).text(passive=label == 1, place_first=rng.random() < 0.3)}


def topic(rng: Random, label: int) -> Row:
    """Is the sentence about animals, food, the weather or a journey?"""
    place, other = rng.choice(PLACES), rng.choice(PLACES)
    when, who = rng.choice(("today", "yesterday", "at noon", "at night")), rng.choice(PEOPLE)
    beast, friend, food, dish = (*rng.sample(ANIMALS, 2), *rng.sample(FOODS, 2))
    storm, ride = rng.choice(("rain", "snow", "wind", "fog", "hail")), rng.choice(("bus", "train", "boat", "truck"))
    return {"sentence": rng.choice((
        (f"the {beast} chased the {friend} in the {place} {when} .", f"the {who} fed the {beast} {when} .",
         f"a {beast} and a {friend} slept in the {place} ."),
        (f"the {who} baked a {food} in the {place} {when} .", f"the {food} and the {dish} tasted fresh {when} .",
         f"the {who} ate the {food} with {dish} {when} ."),
        (f"{storm} fell on the {place} {when} .", f"the {storm} near the {place} was heavy {when} .",
         f"the {who} felt the {storm} in the {place} {when} ."),
        (f"the {ride} left the {place} {when} .", f"the {who} rode a {ride} to the {place} {when} .",
         f"a {ride} brought the {who} from the {place} to the {other} ."),
    )[label])}  # fmt: skip


def paraphrase(rng: Random, label: int) -> Row:
    """Do both sentences mean the same? If not, one of the five parts differs."""
    event = draw_event(rng)
    other = event if label == 1 else change(event, [rng.choice(list(SLOTS))], rng)
    return {"sentence1": event.told(rng), "sentence2": reword(other, rng).told(rng)}


def entailment(rng: Random, label: int) -> Row:
    """Given the first sentence, is the second true (0), unknown (1) or false (2)?"""
    event = draw_event(rng)
    slot = rng.choice(("colour", "place"))
    if label == 1:
        return {"sentence1": replace(event, **{slot: ""}).told(rng), "sentence2": shorten(event, slot, rng).told(rng)}
    other = event if label == 0 else change(event, [slot], rng)
    return {"sentence1": event.told(rng), "sentence2": shorten(other, slot, rng).told(rng)}


def conflict(rng: Random, label: int) -> Row:
    """Do two reports of one event agree, or does the second contradict the first?"""
    event = draw_event(rng)
    slot = rng.choice(("agent", "colour", "place"))
    other = change(event, [slot], rng) if label == 1 else event
    return {"sentence1": event.told(rng), "sentence2": shorten(other, slot, rng).told(rng)}


def similarity(rng: Random, label: int) -> Row:
    """How many of the five parts of two events are the same?"""
    event = draw_event(rng)
    other = change(event, rng.sample(list(SLOTS), 5 - label), rng)
    return {"sentence1": event.told(rng), "sentence2": other.told(rng)}


def question(rng: Random, label: int) -> Row:
    """What colour is one of two items, or where was it? The label is the index in `COLOURS + PLACES`."""
    answer, event = (COLOURS + PLACES)[label], draw_event(rng)
    item = rng.choice([w for w in SLOTS["item"] if w != event.item])
    first = replace(event, **{"colour" if answer in COLOURS else "place": answer})
    colour = rng.choice([w for w in COLOURS if w != first.colour])
    pair = rng.sample([f"the {first.colour} {event.item}", f"the {colour} {item}"], 2)
    asked = f"what colour was the {event.item} ?" if answer in COLOURS else f"where was the {event.item} ?"
    told = f"the {event.agent} {event.verb} {pair[0]} and {pair[1]} in the {first.place} ."
    return {"sentence1": told, "sentence2": asked}


@dataclass(frozen=True)
class Task:
    """A generator of rows and its label words, class 0 first; for a numeric task these are its values."""

    draw: Callable[[Random, int], Row]
    choices: tuple[str, ...]
    numeric: bool = False


SOURCES: dict[str, Task] = {
    "sentiment": Task(sentiment, ("negative", "positive")),
    "acceptability": Task(acceptability, ("wrong", "fine")),
    "paraphrase": Task(paraphrase, ("different", "equal")),
    "entailment": Task(entailment, ("true", "unknown", "false")),
    "question": Task(question, COLOURS + PLACES),
    "similarity": Task(similarity, ("0.0", "1.0", "2.0", "3.0", "4.0", "5.0"), numeric=True),
}
TARGETS: dict[str, Task] = {
    "topic": Task(topic, ("animals", "food", "weather", "travel")),
    "voice": Task(voice, ("active", "passive")),
    "conflict": Task(conflict, ("agree", "clash")),
    "advice": Task(advice, ("avoid", "buy")),
}
TASKS = SOURCES | TARGETS
# Rows of each split that ships with the package.
SHIPPED = {"train": 2000, "validation": 200, "test": 300}


def make_rows(name: str, counts: dict[str, int], seed: int) -> dict[str, list[dict[str, str | int | float]]]:
    """Draw the splits of one task.

    Args:
        name: A key of `TASKS`.
        counts: The number of rows of each split.
        seed: The same seed gives the same rows, regardless of other tasks.

    Returns:
        The rows of each split: the task's text fields and `label`, a class index or, for a numeric task, a number.
        Labels are balanced in each split, and no two rows have the same text.
    """
    task, rng, seen = TASKS[name], Random(f"{seed} {name}"), set()
    splits: dict[str, list[dict[str, str | int | float]]] = {}
    for split, count in counts.items():
        rows: list[dict[str, str | int | float]] = []
        while len(rows) < count:
            label = len(rows) % len(task.choices)
            row = task.draw(rng, label)
            if (key := tuple(row.values())) not in seen:
                seen.add(key)
                rows.append({**row, "label": float(label) if task.numeric else label})
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def write_world(folder: Path) -> None:
    """Write the rows that ship with the package to `<folder>/<task>/<split>.parquet`.

    Args:
        folder: The output folder, created if necessary; existing files are overwritten.
    """
    for name in TASKS:
        for split, rows in make_rows(name, SHIPPED, seed=0).items():
            file = folder / name / f"{split}.parquet"
            file.parent.mkdir(parents=True, exist_ok=True)
            Dataset.from_list(rows).to_parquet(file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the rows of the embedded tasks, from seed 0.")
    parser.add_argument("--output", type=Path, default="mpt_lightning/demo/data/demo", help="default: %(default)s")
    write_world(parser.parse_args().output)
