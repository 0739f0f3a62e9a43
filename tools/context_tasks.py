"""Classification tasks that the small Llama is pretrained to learn from examples in its context.

They range from single words to relations between two sentences; `tools.pretrain_llama` draws one per row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from random import Random
from typing import TypeAlias

from tools import world
from tools.pretrain_t5 import CODES, LABEL_WORDS, SKILLS
from tools.world import COLOURS, PLACES, SLOTS, Row

Draw: TypeAlias = Callable[[Random, int], Row]

TARGET_WORDS = {word for task in world.TARGETS.values() for word in task.choices}
# Label words do not occur in the sentences, so that a label is never mistaken for text.
POOL = sorted({*LABEL_WORDS, *(word for words in CODES.values() for word in words), "yes", "no", "left", "right",
               "sun", "moon", *(word for skill in SKILLS for word in skill.answers)} - {*COLOURS, *PLACES})  # fmt: skip
GROUPS = (world.PEOPLE, world.ANIMALS, world.THINGS, world.FOODS, world.VERBS, COLOURS, PLACES, world.GOOD, world.BAD,
          world.LIKED, world.LOATHED)  # fmt: skip


@dataclass(frozen=True)
class Distinction:
    """A classification task: `draw` returns a row of a class. If `target`, no label is a target task's label word."""

    draw: Draw
    classes: int
    target: bool = False


def some(rng: Random, most: int) -> int:
    """Draw a number of classes, mostly two."""
    return min(rng.choice((2, 2, 2, 3, 4)), most)


def word(rng: Random) -> Distinction:
    """Draw a task whose classes are single words."""
    words = rng.sample([w for words in GROUPS for w in words], rng.choice((2, 3, 4, 6, 8)))
    return Distinction(lambda rng, label: {"sentence": words[label]}, len(words))


def group(rng: Random) -> Distinction:
    """Draw a task whose classes are kinds of words; another word of any kind may follow."""
    groups = rng.sample(GROUPS, some(rng, 4))
    if rng.random() < 0.5:
        return Distinction(lambda rng, label: {"sentence": rng.choice(groups[label])}, len(groups))
    return Distinction(
        lambda rng, label: {"sentence": f"{rng.choice(groups[label])} {rng.choice(rng.choice(GROUPS))}"}, len(groups)
    )


def valued(rng: Random, slot: str, classes: int) -> Callable[[Random, int], world.Event]:
    """Return a function that draws an event by its class: the word in `slot`, or the kind of that word."""
    words = [[w] for w in rng.sample(SLOTS[slot], classes)]
    if slot in ("agent", "item") and classes == 2 and rng.random() < 0.6:
        words = [list(world.PEOPLE), list(world.ANIMALS)] if slot == "agent" else [[*world.THINGS], [*world.FOODS]]
    return lambda rng, label: replace(world.draw_event(rng), **{slot: rng.choice(words[label])})


def phrase(rng: Random) -> Distinction:
    """Draw a task whose classes differ in one slot of a phrase."""
    slots = sorted(rng.sample(list(SLOTS), rng.choice((1, 2, 2, 3))), key=list(SLOTS).index)
    classes = some(rng, 4)
    draw = valued(rng, rng.choice(slots), classes)

    def row(rng: Random, label: int) -> Row:
        event = draw(rng, label)
        return {"sentence": " ".join(getattr(event, slot) for slot in slots)}

    return Distinction(row, classes)


def slot(rng: Random) -> Distinction:
    """Draw a task whose classes differ in one slot of a sentence."""
    classes = some(rng, 4)
    draw = valued(rng, rng.choice(list(SLOTS)), classes)
    return Distinction(lambda rng, label: {"sentence": draw(rng, label).told(rng)}, classes)


def place_first(rng: Random, label: int) -> Row:
    """Is the place at the end or at the start?"""
    return {"sentence": world.draw_event(rng).text(passive=rng.random() < 0.5, place_first=label == 1)}


def detail(rng: Random, label: int) -> Row:
    """Does the sentence mention the colour, the place, or neither?"""
    event = world.draw_event(rng)
    unsaid = {"colour": {"place": ""}, "place": {"colour": ""}, "": {"colour": "", "place": ""}}
    return {"sentence": replace(event, **unsaid[("colour", "place", "")[label]]).told(rng)}


def about(rng: Random, label: int) -> Row:
    """Is the opinion about a work or about goods?"""
    return {"sentence": world.opinion(rng, rng.random() < 0.5, (world.WORKS, world.GOODS)[label])}


def genre(rng: Random, label: int) -> Row:
    """Is the sentence an event, an opinion or a remark on the world?"""
    if label == 0:
        return {"sentence": world.draw_event(rng).told(rng)}
    if label == 1:
        return about(rng, rng.randrange(2))
    return world.topic(rng, rng.randrange(4))


def opinion(rng: Random, label: int) -> Row:
    """Is the opinion, of a work or of goods, positive?"""
    return {"sentence": world.opinion(rng, label == 1, world.WORKS | world.GOODS)}


def feeling(rng: Random, label: int) -> Row:
    """Is a single quality or feeling positive?"""
    words = (world.GOOD, world.LIKED) if label else (world.BAD, world.LOATHED)
    if rng.random() < 0.4:
        return {"sentence": f"not {rng.choice((world.BAD, world.GOOD)[1 - label])}"}
    return {"sentence": rng.choice(rng.choice(words))}


JUDGED = [
    Distinction(world.voice, 2, target=True), Distinction(world.topic, 4, target=True),
    Distinction(world.sentiment, 2, target=True), Distinction(world.advice, 2, target=True),
    Distinction(opinion, 2, target=True), Distinction(feeling, 2, target=True),
    Distinction(world.acceptability, 2), Distinction(place_first, 2), Distinction(detail, 3), Distinction(about, 2),
    Distinction(genre, 3),
]  # fmt: skip


def judgement(rng: Random) -> Distinction:
    """Draw some classes of one of the tasks in `JUDGED`."""
    whole = rng.choice(JUDGED)
    labels = rng.sample(range(whole.classes), some(rng, whole.classes))
    return replace(whole, draw=lambda rng, label: whole.draw(rng, labels[label]), classes=len(labels))


def matched(rng: Random) -> Distinction:
    """Draw a task on whether two words or phrases agree in one part or in all."""
    slots = sorted(rng.sample(list(SLOTS), rng.choice((1, 1, 2))), key=list(SLOTS).index)
    asked = rng.choice([[s] for s in slots] + [slots])

    def row(rng: Random, label: int) -> Row:
        event = world.draw_event(rng)
        changed = [s for s in slots if s not in asked and rng.random() < 0.5]
        other = world.reword(world.change(event, changed + ([rng.choice(asked)] if label else []), rng), rng)
        return {f"sentence{i}": " ".join(getattr(e, s) for s in slots) for i, e in ((1, event), (2, other))}

    return Distinction(row, 2)
