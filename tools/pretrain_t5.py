"""Pretrain the demo's small T5 on the world: span corruption of its text, and instructed tasks.

    python -m tools.pretrain_t5 --output DIR --steps 9000 --seed 0

An instruction is a question, followed by the fields in the cards' layout. No answer is a label word of a target task.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, TypeAlias

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from tools import world
from tools.world import Row

SENTINELS = [f"<extra_id_{i}>" for i in range(8)]
LABEL_WORDS = tuple(sorted({word for task in world.TASKS.values() for word in task.choices}))
SAYABLE = (*LABEL_WORDS, "yes", "no", "left", "right", "sun", "moon", "tea", "milk", *world.PEOPLE, *world.ANIMALS)
# Alternative words for the classes 0 to 3, so that a decision does not depend on the words of its answer.
CODES = {
    "letters": ("a", "b", "c", "d"), "numbers": ("one", "two", "three", "four"),
    "shapes": ("circle", "square", "star", "cross"), "tools": ("hammer", "saw", "nail", "rope"),
    "trees": ("oak", "pine", "elm", "birch"), "drinks": ("tea", "milk", "water", "juice"),
    "metals": ("gold", "iron", "tin", "lead"), "flowers": ("rose", "lily", "tulip", "daisy"),
}  # fmt: skip


def shares(slot: str) -> Callable[[Random, int], Row]:
    """Return a task: pairs of events that share `slot` (label 0) or not; each other slot is shared half of the time."""

    def draw(rng: Random, label: int) -> Row:
        event = world.draw_event(rng)
        others = [s for s in world.SLOTS if s != slot and rng.random() < 0.5]
        other = world.change(event, [*others, slot] if label else others, rng)
        return {"sentence1": event.told(rng), "sentence2": world.reword(other, rng).told(rng)}

    return draw


@dataclass(frozen=True)
class Skill:
    """Rows by label, a question about them and its answer per label. Answers are never label words of target tasks."""

    draw: Callable[[Random, int], Row]
    question: str
    answers: tuple[str, ...]


SKILLS = [
    Skill(world.sentiment, "how did the speaker feel ?", ("upset", "pleased")),
    Skill(world.advice, "how did the speaker feel ?", ("upset", "pleased")),
    *2 * [Skill(world.acceptability, "how are the words placed ?", ("badly", "well"))],
    Skill(world.voice, "at which end is the doer ?", ("start", "end")),
    Skill(world.topic, "what is it about ?", ("creatures", "dishes", "sky", "journey")),
    Skill(world.paraphrase, "do they mean the same ?", ("differ", "same")),
    *2 * [Skill(world.entailment, "does the second follow ?", ("must", "may", "cannot"))],
    Skill(world.conflict, "can both be so ?", ("can", "cannot")),
    *(Skill(shares(slot), f"is it the same {name} ?", ("same", "other"))
      for slot, name in zip(world.SLOTS, ("doer", "deed", "object", "colour", "place"), strict=True)),
]  # fmt: skip


def layout(row: Row) -> str:
    """Return the fields in the cards' layout."""
    return " ".join(f"{name} : {text}" for name, text in row.items())


def judged(rng: Random) -> tuple[str, str]:
    """Draw a question about a skill, answered in the skill's words, by yes or no, or in a code."""
    skill = rng.choice(SKILLS)
    label = rng.randrange(len(skill.answers))
    row, answer, kind = layout(skill.draw(rng, label)), skill.answers[label], rng.random()
    if kind < 0.4:
        return f"{skill.question} {row}", answer
    if kind < 0.7:
        offered = answer if rng.random() < 0.5 else rng.choice([a for a in skill.answers if a != answer])
        form = rng.choice(("{} {} ?", "{} is it {} ?", "{} i think {} ."))
        return f"{form.format(skill.question, offered)} {row}", "yes" if offered == answer else "no"
    code = rng.choice(list(CODES))
    return f"{skill.question} {rng.choice(('answer in', 'in', 'use'))} {code} . {row}", CODES[code][label]


def compared(rng: Random) -> tuple[str, str]:
    """Draw a question about which parts of two events are the same, also as words and phrases, which are easier."""
    event = world.draw_event(rng)
    changed = rng.sample(list(world.SLOTS), rng.randrange(6))
    other = world.reword(world.change(event, changed, rng), rng)
    slots = list(world.SLOTS)
    if rng.random() < 0.5:
        slots = sorted(rng.sample(slots, rng.choice((1, 1, 2, 3))), key=slots.index)
        row = layout({f"sentence{i}": " ".join(getattr(e, s) for s in slots) for i, e in ((1, event), (2, other))})
    else:
        row = layout({"sentence1": event.told(rng), "sentence2": other.told(rng)})
    same, kind = [slot for slot in slots if slot not in changed], rng.random()
    if kind < 0.2:
        return f"how many parts are shared ? {row}", ("none", "one", "two", "three", "four", "five")[len(same)]
    if kind < 0.5:
        return f"which parts are shared ? {row}", " ".join(getattr(event, slot) for slot in same) or "none"
    return f"same or other , part by part ? {row}", " ".join("same" if s in same else "other" for s in slots)


def told_again(rng: Random) -> tuple[str, str]:
    """Draw a question about an event: its parts, the other voice, or one detail."""
    event = world.draw_event(rng)
    passive = rng.random() < 0.5
    row = layout({"sentence": world.reword(event, rng).text(passive=passive, place_first=rng.random() < 0.3)})
    kind = rng.randrange(4)
    if kind == 0:
        return f"list the parts . {row}", " ".join(getattr(event, slot) for slot in world.SLOTS)
    if kind == 1:
        row = layout({"sentence": event.text(passive=passive)})
        return f"turn it round . {row}", event.text(passive=not passive)
    if kind == 2:
        slot, words = rng.choice((("agent", "who did it ?"), ("item", "what was it done to ?"),
                                  ("verb", "what was done ?"), ("colour", "which colour ?"),
                                  ("place", "at which place ?")))  # fmt: skip
        return f"{words} {row}", getattr(event, slot)
    choices = world.TASKS["question"].choices
    label = rng.randrange(len(choices))
    return f"answer what is asked . {layout(world.question(rng, label))}", choices[label]


def plain(rng: Random) -> str:
    """Draw plain text: sentences of a task, an event and its paraphrase, or a remark that contains a label word."""
    kind = rng.random()
    if kind < 0.3:
        event = world.draw_event(rng)
        return f"{event.told(rng)} {world.reword(event, rng).told(rng)}"
    if kind < 0.6:
        word, person, thing = rng.choice(SAYABLE), rng.choice(world.PEOPLE), rng.choice(world.THINGS)
        return rng.choice((f"the {person} wrote {word} on the {thing} .", f"the word on the {thing} was {word} .",
                           f"the {person} said {word} and the {rng.choice(world.PEOPLE)} wrote {word} ."))  # fmt: skip
    task = world.TASKS[rng.choice(("sentiment", "advice", "topic", "voice", "question", "entailment"))]
    return " ".join(task.draw(rng, rng.randrange(len(task.choices))).values())


def corrupted(rng: Random) -> tuple[str, str]:
    """Replace up to four short spans of plain text by sentinels; the target is the spans, as in T5's pretraining."""
    words = plain(rng).split()
    source, target, at, used = [], [], 0, 0
    while at < len(words):
        if used < 4 and rng.random() < 0.15:
            length = rng.choice((1, 1, 2, 3))
            source.append(SENTINELS[used])
            target += [SENTINELS[used], *words[at : at + length]]
            at, used = at + length, used + 1
            if at < len(words):  # two spans never touch
                source.append(words[at])
                at += 1
        else:
            source.append(words[at])
            at += 1
    return " ".join(source), " ".join([*target, SENTINELS[used]])


Draw: TypeAlias = Callable[[Random], tuple[str, str]]
MIXTURE: dict[Draw, float] = {corrupted: 0.25, judged: 0.4, compared: 0.25, told_again: 0.1}


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer of the world's words, most frequent first, with T5's special tokens."""
    rng = Random(f"{seed} words")
    texts = [text for draw in MIXTURE for _ in range(10_000) for text in draw(rng)]
    texts += [" ".join(words) for words in (SAYABLE, *CODES.values())]  # words that may be too rare to be drawn
    for name in world.TASKS:
        rows = world.make_rows(name, {"train": 2000}, seed)["train"]
        texts += [layout({field: str(text) for field, text in row.items() if field != "label"}) for row in rows]
    counts = Counter(word for text in texts for word in text.split())
    words = sorted((w for w in counts if w not in SENTINELS), key=lambda w: (-counts[w], w))
    vocabulary = ["<pad>", "</s>", "<unk>", *words, *SENTINELS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d+\.\d+|\w+|[^\w\s]"), behavior="removed", invert=True)
    core.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=SENTINELS, model_max_length=512,
    )  # fmt: skip


def make_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    """Build the untrained T5: three encoder and two decoder layers of width 128, without dropout."""
    shape = {"d_model": 128, "d_kv": 32, "num_heads": 4, "d_ff": 512, "num_layers": 3, "num_decoder_layers": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    options: dict[str, Any] = {"vocab_size": len(tokenizer), "dropout_rate": 0.0, **shape, **special}
    return T5ForConditionalGeneration(T5Config(**options))


def batches(tokenizer: PreTrainedTokenizerFast, rng: Random, size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches endlessly; the rows of eight batches are sorted by length to need little padding."""
    ids = tokenizer.get_vocab()
    draws, weights = list(MIXTURE), list(MIXTURE.values())
    while True:
        texts = [draw(rng) for draw in rng.choices(draws, weights, k=8 * size)]
        pairs = sorted(([[ids[w] for w in text.split()] + [1] for text in pair] for pair in texts),
                       key=lambda pair: len(pair[0]))  # fmt: skip
        for start in rng.sample(range(0, 8 * size, size), 8):
            rows = pairs[start : start + size]
            source, target = (torch.nn.utils.rnn.pad_sequence([torch.tensor(row[side]) for row in rows], True, -100)
                              for side in (0, 1))  # fmt: skip
            yield {"input_ids": source.clamp(min=0), "attention_mask": (source >= 0).long(), "labels": target}


def pretrain(output: Path, steps: int, seed: int, batch_size: int = 64, lr: float = 5e-4) -> None:
    """Train; save the model and the tokenizer to `output`, and every 1,000 steps to `output/step-N`."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words", flush=True)
    # Embeddings have ten times the scale of the weights, so they need a larger learning rate.
    words = [parameter for name, parameter in model.named_parameters() if name == "shared.weight"]
    others = [parameter for name, parameter in model.named_parameters() if name != "shared.weight"]
    groups = [{"params": others, "lr": lr}, {"params": words, "lr": 20 * lr}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 300, 1.0, 2.5 * (1 - n / steps)))
    start, running = time.time(), 0.0
    for step, batch in enumerate(islice(batches(tokenizer, Random(f"{seed} text"), batch_size), steps), start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # a third faster where the processor has bf16
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running += loss.item()
        if step % 250 == 0 or step == steps:
            right = evaluate(model, tokenizer, seed)
            minutes, mean = round((time.time() - start) / 60, 1), round(running / 250, 4)
            print(json.dumps({"step": step, "minutes": minutes, "loss": mean, **right}), flush=True)
            running = 0.0
        if step % 1000 == 0 or step == steps:  # an earlier model may be good enough
            folder = output if step == steps else output / f"step-{step}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


@torch.no_grad()
def evaluate(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Return, for each kind of row, the share of target words that the model ranks first given the words before."""
    scores = {}
    for draw in MIXTURE:
        rng = Random(f"{seed} {draw.__name__} held out")
        texts = [draw(rng) for _ in range(256)]
        batch = tokenizer([a for a, _ in texts], padding=True, return_tensors="pt")
        labels = tokenizer([b for _, b in texts], padding=True, return_tensors="pt")["input_ids"]
        best = model(**batch, labels=labels).logits.argmax(-1)
        scores[draw.__name__] = round(((best == labels) & (labels > 1)).sum().item() / (labels > 1).sum().item(), 3)
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its checkpoints")
    parser.add_argument("--steps", type=int, default=9_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain(arguments.output, arguments.steps, arguments.seed)
