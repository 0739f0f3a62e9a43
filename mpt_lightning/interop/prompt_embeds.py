"""Prompts as plain embeddings: what vLLM takes as `prompt_embeds` and transformers as `inputs_embeds`."""

from pathlib import Path
from typing import Any

from mpt_lightning.backbones import Backbone
from mpt_lightning.backbones.load import family_of
from mpt_lightning.backbones.pretrained import load_config
from mpt_lightning.checkpoint import PromptCheckpoint
from mpt_lightning.checkpoint.export import digest, write_json
from mpt_lightning.interop.card import CARD, model_card
from mpt_lightning.interop.folder import (
    as_checkpoint,
    only,
    task_paths,
    trained_prompt,
    write_tensors,
)
from mpt_lightning.io import new_folder

INDEX = "prompt_embeds.json"
FORMAT = 1


def export_prompt_embeds(
    checkpoint: PromptCheckpoint | str | Path,
    dest: str | Path,
    task: str | None = None,
    *,
    backbone: Backbone | None = None,
) -> Path:
    """Write each task's prompt as a safetensors file with the one tensor `prompt_embeds` `[P, H]`, fp32.

    `prompt_embeds.json` has the backbone, its tokenizer, and for each task its file, input template, choices, answer
    prefix, and which special tokens its inputs have: "all" that the tokenizer adds, "first" without an end of sequence,
    "none". `README.md` has code that uses them.

    Args:
        checkpoint: a checkpoint, or its path.
        dest: a place that does not exist. The folder appears there whole or not at all.
        task: this task alone.
        backbone: the checkpoint's backbone, where it is loaded already.

    Returns:
        The folder.

    Raises:
        MPTError: there is something at `dest`, the checkpoint cannot be read, or the task or backbone is unknown.
    """
    found = as_checkpoint(checkpoint)
    prompt = trained_prompt(found, backbone)
    if task is not None:
        found = only(found, prompt, task)
    config = backbone.model.config if backbone is not None else load_config(found.backbone)
    special = "all" if family_of(config) == "seq2seq" else "none" if found.prompt_class == "ContextPrompt" else "first"
    files = {name: f"{path}.safetensors" for name, path in task_paths(prompt.tasks).items()}
    with new_folder(dest) as folder:
        for name, file in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / file, {"prompt_embeds": prompt.fold(name).float()})
        index = {
            "format": FORMAT,
            "backbone": found.backbone,
            "fingerprint": found.fingerprint,
            "tokenizer": found.backbone,
            "is_encoder_decoder": config.is_encoder_decoder,
            "dtype": "float32",
            "length": prompt.length,
            "width": prompt.dim,
            "tasks": {
                name: {
                    "file": file,
                    "sha256": digest(folder / file),
                    **_input(found, name),
                    "special_tokens": special,
                }
                for name, file in files.items()
            },
        }
        write_json(folder / INDEX, index)
        card = model_card(found, "prompt_embeds", family=family_of(config))
        (folder / CARD).write_text(card, encoding="utf-8")
    return Path(dest).expanduser()


def _input(checkpoint: PromptCheckpoint, task: str) -> dict[str, Any]:
    """Say how a task's inputs are written; nothing where the checkpoint has no card."""
    card = checkpoint.cards.get(task) or {}
    return {
        "template": card.get("input"),
        "choices": card.get("choices"),
        "answer_prefix": checkpoint.data.get("answer_prefix"),
    }
