"""Where a module's prompts start: the choices of `prompt_init`, applied to a backbone and its tasks."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from mpt_lightning.backbones import Backbone
from mpt_lightning.backbones.base import Family
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.formats import FORMATS
from mpt_lightning.errors import MPTError
from mpt_lightning.prompts import ClassifierPrompt, init

PromptInit = Literal["vocabulary", "text", "labels", "random", "checkpoint"]


def initial_prompt(kind: PromptInit, backbone: Backbone, length: int, text: str | None, words: Sequence[str]) -> Tensor:
    """Return the embeddings `[P, H]`, in fp32, that one prompt starts from.

    "vocabulary" draws distinct tokens among the most frequent 5,000, "text" takes the tokens of `text`, "labels" those
    of the class words and then vocabulary; "random" is uniform in [-0.5, 0.5].
    """
    if kind == "random":
        return init.random_uniform(length, backbone.dim)
    table, tokenizer = backbone.embeddings.float(), backbone.tokenizer
    if kind == "text":
        if not text:
            raise MPTError("prompt_init='text' needs a text: set --model.init_text.")
        return init.from_token_ids(table, tokenizer(text, add_special_tokens=False)["input_ids"], length)
    if kind == "labels":
        if not words:
            raise MPTError("prompt_init='labels' needs tasks with choices; use 'vocabulary' for the others.")
        return init.from_class_labels(table, FORMATS[backbone.family](tokenizer).words(list(words)), length)
    return init.sampled_vocabulary(table, length, exclude=tokenizer.all_special_ids)


def initial_prompts(
    kind: PromptInit,
    backbone: Backbone,
    length: int,
    text: str | None,
    cards: Mapping[str, TaskCard],
    tasks: Sequence[str],
) -> Tensor:
    """Return a separate start `[T, P, H]` for each task's prompt, with its card's class words; see `initial_prompt`."""
    words = [class_words(cards, [task], backbone.family) for task in tasks]
    return torch.stack([initial_prompt(kind, backbone, length, text, of_task) for of_task in words])


def checkpoint_prompts(path: str | None, backbone: Backbone, tasks: Sequence[str], length: int) -> Tensor:
    """Return the prompts of a checkpoint, or of a PEFT folder, as a start `[T, P, H]`.

    A task that the checkpoint has takes its own prompt, any other the mean of all. The checkpoint must contain
    embeddings of this length, trained on this backbone.
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


def build_classifier(
    backbone: Backbone, cards: Mapping[str, TaskCard], tasks: Sequence[str], length: int = 0
) -> ClassifierPrompt:
    """Build a classifier for each task on a masked model's first token, and prompts of P tokens that start at random.

    Raises:
        MPTError: If the backbone has no first token to read, or a task's classes are unknown.
    """
    if backbone.family != "masked":
        raise MPTError(
            f"head='classification' reads the first token of a masked language model, and {backbone.name} is "
            f"{backbone.family}. Set --model.backbone to a model such as BERT, or leave --model.head unset."
        )
    words = {task: cards[task].words(backbone.family) if task in cards else None for task in tasks}
    if unknown := [task for task, found in words.items() if not found]:
        raise MPTError(
            f"head='classification': the classes of {', '.join(unknown)} are unknown. Expected cards with `choices`."
        )
    hidden = backbone.model.config.hidden_size
    counts = [len(found or []) for found in words.values()]
    return ClassifierPrompt(len(tasks), length, backbone.dim, counts, hidden, list(tasks))


def check_length(path: str, got: int, expected: int, argument: str) -> None:
    """Raise if a checkpoint has prompts of another length."""
    if got != expected:
        raise MPTError(
            f"{argument} {path} has prompts of {got} tokens, and this run has {expected}. "
            f"Set --model.prompt_length to {got}, or give another checkpoint."
        )


def class_words(cards: Mapping[str, TaskCard], tasks: Sequence[str], family: Family) -> list[str]:
    """Return the distinct words that a family's models rank in some tasks, in order."""
    words = [word for task in tasks if task in cards for word in cards[task].words(family) or []]
    return list(dict.fromkeys(words))
