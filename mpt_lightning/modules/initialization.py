"""Where a module's prompts start: the choices of `prompt_init`, applied to a backbone and its tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.options import PromptInit
from mpt_lightning.prompts import init


def initial_prompt(kind: PromptInit, backbone: Backbone, length: int, text: str | None, words: Sequence[str]) -> Tensor:
    """Make the embeddings that one prompt starts from.

    Args:
        kind: "vocabulary": distinct tokens among the most frequent 5,000; "text": the tokens of `text`; "labels":
            the tokens of the class words, then vocabulary; "random": uniform in [-0.5, 0.5].
        backbone: whose embeddings are used.
        length: P.
        text: for "text".
        words: the class words, for "labels".

    Returns:
        [P, H], fp32.

    Raises:
        MPTError: a text or class words are needed and there are none.
    """
    table = backbone.embeddings.float()
    if kind == "random":
        return init.random_uniform(length, backbone.dim)
    tokenizer = backbone.tokenizer
    if kind == "text":
        if not text:
            raise MPTError("prompt_init='text' needs a text: set --model.init_text.")
        return init.from_token_ids(table, tokenizer(text, add_special_tokens=False)["input_ids"], length)
    if kind == "labels":
        if not words:
            raise MPTError("prompt_init='labels' needs tasks with choices; use 'vocabulary' for the others.")
        # A decoder-only model reads an answer behind a space, which can make it other tokens.
        space = " " if backbone.family == "causal" else ""
        ids = [tokenizer(space + word, add_special_tokens=False)["input_ids"] for word in words]
        return init.from_class_labels(table, ids, length)
    return init.sampled_vocabulary(table, length, exclude=tokenizer.all_special_ids)


def initial_prompts(
    options: Mapping[str, Any], backbone: Backbone, cards: Mapping[str, Any], tasks: Sequence[str]
) -> Tensor:
    """Make a start of its own for each task's prompt.

    Args:
        options: a module's arguments: `prompt_init`, `prompt_length` and `init_text`.
        backbone: whose embeddings are used.
        cards: the tasks' cards by name, for their class words.
        tasks: [T] the tasks.

    Returns:
        [T, P, H], fp32.
    """
    kind, length, text = options["prompt_init"], options["prompt_length"], options["init_text"]
    return torch.stack([initial_prompt(kind, backbone, length, text, class_words(cards, [task])) for task in tasks])


def checkpoint_prompts(path: str | None, backbone: Backbone, tasks: Sequence[str], length: int) -> Tensor:
    """Take the prompts of a checkpoint as a start.

    Args:
        path: the checkpoint, or a PEFT folder.
        backbone: the backbone in use, which must be the checkpoint's.
        tasks: the tasks to start. A task that the checkpoint has takes its own prompt, any other the mean of all.
        length: P.

    Returns:
        [T, P, H].

    Raises:
        MPTError: no path, no embeddings (DePT, prefix tuning), another backbone, another length.
    """
    if not path:
        raise MPTError("prompt_init='checkpoint' needs a checkpoint: set --model.init_checkpoint.")
    checkpoint = read_checkpoint(path, "--model.init_checkpoint", folder=True, backbone=backbone)
    checkpoint.check_embeddings("--model.init_checkpoint")
    checkpoint.check_backbone(backbone.name, backbone.fingerprint, "--model.init_checkpoint")
    prompt = checkpoint.prompt(backbone.embeddings)
    check_length(path, prompt.length, length, "--model.init_checkpoint")
    with torch.no_grad():
        known = prompt(torch.arange(prompt.num_tasks)).embeddings_alone()
    return torch.stack([known[prompt.index(t)] if t in prompt.tasks else known.mean(dim=0) for t in tasks])


def check_length(path: str, got: int, expected: int, argument: str) -> None:
    """Refuse a checkpoint of another prompt length.

    Raises:
        MPTError: the lengths differ.
    """
    if got != expected:
        raise MPTError(
            f"{argument} {path} has prompts of {got} tokens, and this run has {expected}. "
            f"Set --model.prompt_length to {got}, or give another checkpoint."
        )


def class_words(cards: Mapping[str, Any], tasks: Sequence[str]) -> list[str]:
    """Give the distinct class words of some tasks, in order."""
    words = [word for task in tasks if task in cards for word in cards[task].choices or []]
    return list(dict.fromkeys(words))
