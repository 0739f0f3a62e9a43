"""Pretrain the demo's small Llama on the world to learn from examples in its context.

    python -m tools.pretrain_llama --output DIR --seed 0

A row is an episode: examples of one task, with label words drawn for the row, so that only the earlier examples
define the task.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TypeAlias

import torch
from tokenizers import processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools import pretrain_t5, world
from tools.context_tasks import (
    POOL,
    TARGET_WORDS,
    Distinction,
    group,
    judgement,
    matched,
    phrase,
    slot,
    word,
)
from tools.pretrain_t5 import compared, judged, layout, plain, told_again

Kind: TypeAlias = Callable[[Random], Distinction] | Callable[[Random], tuple[str, str]] | Callable[[Random], str]


@dataclass(frozen=True)
class Stage:
    """Training steps on one mixture: the lengths of rows in tokens, and the weight of each kind of row."""

    steps: int
    lengths: tuple[int, ...]
    mixture: dict[Kind, float]


ASKED: dict[Kind, float] = {judged: 0.08, compared: 0.08, told_again: 0.04, plain: 0.03}
# The model learns to use examples first on words and then on sentences. Training stops early: after more steps,
# in-context learning reaches 100% on most tasks, which a trained context could not improve.
STAGES = (
    Stage(200, (64,), {word: 0.35, group: 0.4, phrase: 0.2, plain: 0.05}),
    Stage(800, (128,), {word: 0.04, group: 0.12, phrase: 0.18, slot: 0.18, judgement: 0.24, matched: 0.1, **ASKED}),
)  # fmt: skip
RATE = 1e-3
WIDTH, HEAD, THETA = 128, 32, 1e6
TOKENS = 4096
TEXT_WEIGHT = 0.1


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Build the T5's tokenizer with the word `label`, without its sentinels and without `</s>` after a text."""
    t5 = pretrain_t5.make_tokenizer(seed)
    core = json.loads(t5.backend_tokenizer.to_str())
    words = [w for w in core["model"]["vocab"] if w not in pretrain_t5.SENTINELS]
    core["model"]["vocab"] = {word: i for i, word in enumerate([*words, "label"])}
    core["added_tokens"] = [token for token in core["added_tokens"] if token["content"] not in pretrain_t5.SENTINELS]
    tokenizer = type(t5.backend_tokenizer).from_str(json.dumps(core))
    tokenizer.post_processor = processors.TemplateProcessing("$A", "$A $B", [])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=1024
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained Llama: five layers of width 128, tied embeddings, heads initialised by `wire`."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=320, num_hidden_layers=5,
            num_attention_heads=WIDTH // HEAD, num_key_value_heads=WIDTH // HEAD, max_position_embeddings=1024,
            tie_word_embeddings=True, attention_bias=True, pad_token_id=0, bos_token_id=None, eos_token_id=1,
            rope_parameters={"rope_type": "default", "rope_theta": THETA},
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed" in name:
                weight.normal_(0, 0.2)
            elif weight.ndim == 2:
                weight.normal_(0, 0.02 if "o_proj" in name or "down_proj" in name else weight.shape[1] ** -0.5)
        wire(model)
    return model


def wire(model: LlamaForCausalLM) -> None:
    """Initialise some heads as induction heads, which would otherwise take most of the training to appear.

    Heads of the first and third layer attend to earlier words at fixed distances, by the bias of their queries and
    keys. In the third layer they copy the words before a label word to that word; heads of the last two layers attend
    to label words whose copy resembles the current word, and predict them.
    """
    turn = THETA ** -(torch.arange(4) * 2 / HEAD)
    layers = [layer.self_attn for layer in model.model.layers]
    for layer, steps_back in ((0, (1, 2, 3)), (2, (1, 1))):
        for head, back in enumerate(steps_back):
            q, k = layers[layer].q_proj, layers[layer].k_proj
            at = slice(head * HEAD, (head + 1) * HEAD)
            q.weight[at] *= 0.3
            k.weight[at] *= 0.3
            k.bias[head * HEAD : head * HEAD + 4] = 6.0
            q.bias[head * HEAD : head * HEAD + 4] = 6.0 * torch.cos(back * turn)
            q.bias[head * HEAD + HEAD // 2 : head * HEAD + HEAD // 2 + 4] = -6.0 * torch.sin(back * turn)
    spaces = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0].view(4, HEAD, WIDTH)  # two to copy from, two to copy to
    said = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0].view(4, HEAD, WIDTH)
    for head in (0, 1):
        at = slice(head * HEAD, (head + 1) * HEAD)
        layers[2].v_proj.weight[at] = spaces[head]
        layers[2].o_proj.weight[:, at] = spaces[head + 2].T
    for layer, heads in ((3, (0, 1, 2, 3)), (4, (0, 1))):
        for head in heads:
            at = slice(head * HEAD, (head + 1) * HEAD)
            layers[layer].q_proj.weight[at] = spaces[head % 2]
            layers[layer].k_proj.weight[at] = spaces[head % 2 + 2]
            layers[layer].v_proj.weight[at] = said[head]
            layers[layer].o_proj.weight[:, at] = 0.5 * said[head].T


def draw_row(rng: Random, kind: Kind, length: int, ids: dict[str, int]) -> tuple[list[int], list[float]]:
    """Draw `length` tokens of one kind, and the weight of each in the loss.

    An answer weighs 1, text `TEXT_WEIGHT`. The first occurrence of a label word counts as text: it cannot be predicted.
    """
    tokens: list[int] = []
    weights: list[float] = []

    def add(text: str, weight: float = TEXT_WEIGHT) -> None:
        new = [ids[w] for w in text.split()]
        tokens.extend(new)
        weights.extend([weight] * len(new))

    first = kind(rng)
    if isinstance(first, Distinction):
        words = rng.sample([w for w in POOL if not (first.target and w in TARGET_WORDS)], first.classes)
        seen: set[int] = set()
        while len(tokens) < length:
            label = rng.randrange(first.classes)
            add(f"{layout(first.draw(rng, label))} label :")
            add(words[label], 1.0 if label in seen else TEXT_WEIGHT)
            add("</s>")
            seen.add(label)
    while len(tokens) < length:
        drawn = kind(rng)
        source, target = drawn if isinstance(drawn, tuple) else (drawn, "")
        add(f"{source} label :" if target else str(source))
        add(target, 1.0)
        add("</s>")
    return tokens[:length], weights[:length]


def pretrain_causal(output: Path, seed: int) -> None:
    """Train on all stages; save the model and the tokenizer to `output`.

    Prints the share of correct answers by kind of row every 100 steps, and the accuracy in context every 500.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer(seed)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words", flush=True)
    ids, rng = tokenizer.get_vocab(), Random(f"{seed} episodes")
    stages = [stage for stage in STAGES for _ in range(stage.steps)]
    words = [parameter for name, parameter in model.named_parameters() if "embed" in name]
    others = [parameter for name, parameter in model.named_parameters() if "embed" not in name]
    groups = [{"params": others, "lr": RATE}, {"params": words, "lr": 2 * RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / 200, 1.0))
    start, shares = time.time(), dict[str, list[float]]()
    for step, stage in enumerate(stages, start=1):
        length = rng.choice(stage.lengths)
        kinds = rng.choices(list(stage.mixture), list(stage.mixture.values()), k=TOKENS // length)
        rows = [draw_row(rng, kind, length, ids) for kind in kinds]
        tokens, weights = torch.tensor([row[0] for row in rows]), torch.tensor([row[1] for row in rows])[:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16):  # a quarter faster where the processor has bf16
            logits = model(input_ids=tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().mT, tokens[:, 1:], reduction="none")
        ((loss * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        best, answers = logits[:, :-1].argmax(-1) == tokens[:, 1:], weights == 1
        for kind, right, asked in zip(kinds, (best & answers).sum(1).tolist(), answers.sum(1).tolist(), strict=True):
            shares.setdefault(kind.__name__, []).append(right / max(asked, 1))
        if step % 100 == 0:
            means = {name: round(sum(values) / len(values), 3) for name, values in shares.items()}
            minutes = round((time.time() - start) / 60, 1)
            print(json.dumps({"step": step, "minutes": minutes, **means}), flush=True)
            shares.clear()
        if step % 500 == 0:
            scores = {name: evaluate(model, tokenizer, name, 4, 48, seed) for name in world.TASKS}
            print(json.dumps({"in context, 4 per class": scores}), flush=True)
    for piece in (model, tokenizer):
        piece.save_pretrained(output)


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, name: str, shots: int, contexts: int, seed: int
) -> float:
    """Return the accuracy of a task's own label words after `shots` examples per class, over `contexts` contexts."""
    task, ids, rng = world.TASKS[name], tokenizer.get_vocab(), Random(f"{seed} {name} {shots} held out")
    choices = torch.tensor([ids[w] for w in task.choices])
    right = 0
    for _ in range(contexts):
        labels = [label for label in range(len(choices)) for _ in range(shots)]
        if name == "question":  # sixteen classes have as many examples as four
            labels = [rng.randrange(len(choices)) for _ in range(4 * shots)]
        rng.shuffle(labels)
        asked = rng.randrange(len(choices))
        text = " ".join(f"{layout(task.draw(rng, label))} label : {task.choices[label]} </s>" for label in labels)
        text = f"{text} {layout(task.draw(rng, asked))} label :"
        logits: Tensor = model(input_ids=torch.tensor([[ids[w] for w in text.split()]]), logits_to_keep=1).logits
        right += int(logits[0, -1, choices].argmax() == asked)
    return round(right / contexts, 3)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    pretrain_causal(arguments.output, arguments.seed)
