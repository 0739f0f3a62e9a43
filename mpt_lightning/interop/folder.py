"""What all exports need: loading the trained prompt, checking tasks' file names, and writing tensors."""

import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from mpt_lightning.backbones import Backbone, load_backbone
from mpt_lightning.backbones.pretrained import load_config
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.checkpoint.export import for_backbone
from mpt_lightning.errors import MPTError
from mpt_lightning.io import LONGEST_NAME, can_be_path
from mpt_lightning.prompts import Prompt

# The endings of an export's own files, which a task's folder must not have.
OWN_SUFFIXES = (".safetensors", ".json", ".md")


def check_paths(tasks: Sequence[str]) -> None:
    """Raise if a task's name cannot be its path in an export, or is not unique on every file system."""
    for task in tasks:
        if not can_be_path(task) or any(part.casefold().endswith(OWN_SUFFIXES) for part in task.split("/")):
            raise MPTError(
                f"The task name {task[:300]!r} cannot name a folder. Expected parts of letters, digits, '.', '_', '-' "
                f"and spaces with single '/' between them, no '..', at most {LONGEST_NAME} bytes, and no part that "
                f"ends with {', '.join(OWN_SUFFIXES)}; rename the task, or export it alone with --task."
            )
    if len({unicodedata.normalize("NFC", task).casefold() for task in tasks}) < len(tasks):
        raise MPTError(f"The task names {', '.join(tasks)} differ in case alone, and cannot all name folders.")


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    # safetensors' own save_file sets the file mode 0600, whatever the umask.
    file.write_bytes(save(plain, metadata={"format": "pt"}))


def load_trained(
    checkpoint: PromptCheckpoint | str | Path, task: str | None, backbone: Backbone | None
) -> tuple[PromptCheckpoint, Prompt, Any]:
    """Return a checkpoint and its prompt, of one task if `task` is given, and the backbone's configuration.

    The backbone itself is loaded by its name if it is not given and the prompt depends on its embeddings (CPT).
    """
    if not isinstance(checkpoint, PromptCheckpoint):
        checkpoint = read_checkpoint(str(checkpoint), "checkpoint", folder=True)
    checkpoint.check_embeddings("checkpoint")
    if backbone is None and type(checkpoint.empty_prompt()).attach is not Prompt.attach:
        # In the precision of the training, so that the embeddings are the same.
        options = checkpoint.hyper_parameters
        backbone = load_backbone(
            checkpoint.backbone, options.get("backbone_dtype", "float32"), check=options.get("backbone_check", True)
        )
    if backbone is None:
        prompt, config = checkpoint.prompt(), load_config(checkpoint.backbone)
    else:
        prompt, config = for_backbone(checkpoint, backbone).prompt(backbone.embeddings), backbone.model.config
    return (checkpoint if task is None else only(checkpoint, prompt, task)), prompt, config


def only(checkpoint: PromptCheckpoint, prompt: Prompt, task: str) -> PromptCheckpoint:
    """Return the checkpoint of one task, and remove the others from its prompt."""
    prompt.index(task)  # raises if the task is unknown
    for other in [name for name in prompt.tasks if name != task]:
        prompt.remove_task(other)
    return replace(
        checkpoint,
        prompt_config=prompt.config(),
        state_dict={f"prompt.{name}": value for name, value in prompt.state_dict().items()},
        cards={name: card for name, card in checkpoint.cards.items() if name == task},
    )
