"""Pretrain the demo's small BERT on the world: masked words of its text, and masked answers to questions.

    python -m tools.pretrain_bert --output DIR --steps 4200 --seed 0

The questions are those of the T5's pretraining. No text contains a validation or test row of a demo task.
"""

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from random import Random
from typing import TypeAlias

import torch
from tokenizers import processors
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from tools import pretrain_t5, world
from tools.pretrain_t5 import compared, judged, plain, told_again

SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SPECIAL |= {"mask_token": "[MASK]"}
PAD, CLS, SEP, MASK = 0, 2, 3, 4
WIDTH, POSITIONS = 128, 512
RATE, WARM_UP = 1e-3, 300
# Words of a held-out row that are looked up first; every row has more.
BEGINNING = 4

# The text before the answer, the answer, and the text after it. Without an answer all is plain text.
Drawn: TypeAlias = tuple[str, str, str]


def text(rng: Random) -> Drawn:
    """Draw plain text."""
    return plain(rng), "", ""


def asked(rng: Random) -> Drawn:
    """Draw a question of the T5's pretraining; the answer ends the text."""
    draw = rng.choices((judged, compared, told_again), (0.6, 0.3, 0.1))[0]
    question, answer = draw(rng)
    if rng.random() < 0.3:  # the second sentence as the second segment
        question = question.replace(" sentence2 :", " [SEP] sentence2 :")
    return question, answer, ""


def remarked(rng: Random) -> Drawn:
    """Draw a sentence and a remark on it that contains the answer, as in a pattern of PET."""
    kind = rng.randrange(3)
    if kind == 0:
        good = rng.random() < 0.5
        said = world.opinion(rng, good, rng.choice((world.WORKS, world.GOODS)))
        remark = rng.choice(("{} it was", "{} i think it was", "{} [SEP] it was", "{} [SEP] i think it was"))
        return remark.format(said), rng.choice(world.GOOD if good else world.BAD), "."
    if kind == 1:
        label = rng.randrange(4)
        sentence = world.topic(rng, label)["sentence"]
        return f"{sentence} it is about", ("creatures", "dishes", "sky", "journey")[label], "."
    label = rng.randrange(3)
    first, second = world.entailment(rng, label).values()
    return f"{first} {rng.choice(('[SEP] ', ''))}".rstrip(), ("yes", "may", "no")[label], f", {second}"


MIXTURE: dict[Callable[[Random], Drawn], float] = {text: 0.25, asked: 0.6, remarked: 0.15}


@cache
def held_out() -> dict[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the texts of all validation and test rows, by the first words of their first text."""
    rows = defaultdict(list)
    for name in world.TASKS:
        splits = world.make_rows(name, world.SHIPPED, seed=0)
        for row in splits["validation"] + splits["test"]:
            texts = tuple(str(value) for field, value in row.items() if field != "label")
            rows[tuple(texts[0].split()[:BEGINNING])].append(texts)
    return dict(rows)


def has_held_out(words: list[str]) -> bool:
    """Return whether a text contains all sentences of a validation or test row."""
    rows, whole = held_out(), " ".join(words)
    return any(
        all(sentence in whole for sentence in row)
        for start in range(len(words) - BEGINNING + 1)
        for row in rows.get(tuple(words[start : start + BEGINNING]), ())
    )


def draw_row(rng: Random, draw: Callable[[Random], Drawn], ids: dict[str, int]) -> tuple[list[int], list[int]]:
    """Draw a text of one kind; return its token ids, some of them masked, and labels, -100 where nothing is asked.

    Three quarters of the answers are masked, a single word always, of several words about half. In plain text and in
    the other rows, 15% of the words are asked: 80% of them are masked, 10% replaced, 10% kept (Devlin et al., 2019).
    """
    while True:
        before, answer, after = draw(rng)
        words = f"{before} {answer} {after}".split()
        if not has_held_out(words):
            break
    tokens = [CLS, *(ids[word] for word in words), SEP]
    labels = [-100] * len(tokens)
    places = [place for place, token in enumerate(tokens) if token > MASK]
    if answer and rng.random() < 0.75:
        start, size = 1 + len(before.split()), len(answer.split())
        places = range(start, start + size)
        for place in rng.sample(places, max(1, round(size * rng.uniform(0.3, 0.7)))):
            tokens[place], labels[place] = MASK, tokens[place]
        return tokens, labels
    for place in rng.sample(places, max(1, round(0.15 * len(places)))):
        labels[place], kind = tokens[place], rng.random()
        if kind < 0.9:
            tokens[place] = MASK if kind < 0.8 else rng.randrange(MASK + 1, len(ids))
    return tokens, labels


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Build the T5's tokenizer with the word `label` and BERT's special tokens."""
    t5 = pretrain_t5.make_tokenizer(seed)
    core = json.loads(t5.backend_tokenizer.to_str())
    theirs = {token["content"] for token in core["added_tokens"]}
    words = [word for word in core["model"]["vocab"] if word not in theirs]
    vocabulary = {word: i for i, word in enumerate([*SPECIAL.values(), *words, "label"])}
    core["model"] |= {"vocab": vocabulary, "unk_token": "[UNK]"}
    core["added_tokens"] = []
    tokenizer = type(t5.backend_tokenizer).from_str(json.dumps(core))
    tokenizer.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", CLS), ("[SEP]", SEP)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=POSITIONS, model_input_names=names, **SPECIAL
    )


def make_model(words: int) -> BertForMaskedLM:
    """Build the untrained BERT: four layers of width 128, tied embeddings, no dropout.

    Positions start as sinusoids, which let a head attend to a fixed distance from the first step on.
    """
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=words, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=POSITIONS, type_vocab_size=2, pad_token_id=PAD,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.06,
        )
    )  # fmt: skip
    frequencies = POSITIONS ** -(torch.arange(0, WIDTH, 2) / WIDTH)
    angles = torch.arange(POSITIONS)[:, None] * frequencies
    with torch.no_grad():
        model.bert.embeddings.position_embeddings.weight.copy_(0.06 * torch.cat([angles.sin(), angles.cos()], dim=1))
    return model


def batches(rng: Random, ids: dict[str, int], size: int) -> Iterator[dict[str, Tensor]]:
    """Yield batches endlessly; the rows of eight batches are sorted by length to need little padding.

    In half of the rows, positions skip a random number after [CLS]: there a prompt will stand.
    """
    while True:
        kinds = rng.choices(list(MIXTURE), list(MIXTURE.values()), k=8 * size)
        rows = sorted((draw_row(rng, kind, ids) for kind in kinds), key=lambda row: len(row[0]))
        for start in rng.sample(range(0, 8 * size, size), 8):
            chosen = rows[start : start + size]
            tokens, labels = (
                pad_sequence([torch.tensor(row[side]) for row in chosen], True, padding)
                for side, padding in ((0, PAD), (1, -100))
            )
            most = POSITIONS - tokens.shape[1]
            skipped = torch.tensor([[rng.randrange(most + 1) if rng.random() < 0.5 else 0] for _ in chosen])
            place = torch.arange(tokens.shape[1])
            yield {**inputs(tokens), "position_ids": place + skipped * (place > 0), "labels": labels}


def inputs(tokens: Tensor) -> dict[str, Tensor]:
    """Return the model's arguments for token ids `[B, L]`; the second segment begins after the first separator."""
    separators, mask = tokens == SEP, (tokens != PAD).long()
    types = (separators.cumsum(dim=1) - separators.long()).clamp(max=1) * mask
    return {"input_ids": tokens, "attention_mask": mask, "token_type_ids": types}


def masked_loss(model: BertForMaskedLM, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean cross-entropy in nats over the labels, and the share of labels that the model ranks first."""
    labels = batch.pop("labels")
    asked = labels != -100
    logits = model.cls(model.bert(**batch).last_hidden_state[asked]).float()
    loss = torch.nn.functional.cross_entropy(logits, labels[asked])
    return loss, (logits.argmax(-1) == labels[asked]).float().mean()


def pretrain_masked(output: Path, steps: int, seed: int, batch_size: int = 64) -> None:
    """Train; save the model and the tokenizer to `output`."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer(seed)
    model = make_model(len(tokenizer))
    model.set_attn_implementation("eager")  # twice as fast with bf16 on a CPU as the fused kernel
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words", flush=True)
    ids = tokenizer.get_vocab()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / WARM_UP, 1.0, 2.5 * (1 - n / steps))
    )
    start, running = time.time(), list[float]()
    for step, batch in enumerate(islice(batches(Random(f"{seed} masks"), ids, batch_size), steps), start=1):
        with torch.autocast("cpu", dtype=torch.bfloat16):  # faster where the processor has bf16
            loss, _ = masked_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        running.append(loss.item())
        if step % 250 == 0 or step == steps:
            minutes, mean = round((time.time() - start) / 60, 1), round(sum(running) / len(running), 4)
            scores = evaluate(model, ids, seed)
            print(json.dumps({"step": step, "minutes": minutes, "loss": mean, **scores}), flush=True)
            running.clear()
    for piece in (model, tokenizer):
        piece.save_pretrained(output)


@torch.no_grad()
def evaluate(model: BertForMaskedLM, ids: dict[str, int], seed: int) -> dict[str, tuple[float, float]]:
    """Return, for each kind of row, the loss over the labels of new rows, and the share of them ranked first."""
    scores = {}
    for draw in MIXTURE:
        rng = Random(f"{seed} {draw.__name__} held out")
        tokens, labels = zip(*(draw_row(rng, draw, ids) for _ in range(256)), strict=True)
        padded = pad_sequence([torch.tensor(row) for row in tokens], True, PAD)
        asked = pad_sequence([torch.tensor(row) for row in labels], True, -100)
        loss, right = masked_loss(model, {**inputs(padded), "labels": asked})
        scores[draw.__name__] = (round(loss.item(), 3), round(right.item(), 3))
    return scores


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=4_200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain_masked(arguments.output, arguments.steps, arguments.seed)
