"""Writing exports: folders that appear whole or not at all."""

import unicodedata
from collections.abc import Iterable
from dataclasses import replace as with_changes
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from mpt_lightning.backbones import Backbone, load_backbone
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.checkpoint.export import for_backbone
from mpt_lightning.errors import MPTError
from mpt_lightning.io import LONGEST_NAME, can_be_path
from mpt_lightning.prompts import Prompt

# What an export's own files end with; a task's folder of such a name could be in the place of one.
OWN_SUFFIXES = (".safetensors", ".json", ".md")


def task_path(task: str) -> str:
    """Give the path of a task's part of an export: its name, which cannot lead out of the folder.

    Raises:
        MPTError: the name cannot be a path on every system.
    """
    if not can_be_path(task) or any(part.casefold().endswith(OWN_SUFFIXES) for part in task.split("/")):
        raise MPTError(
            f"The task name {task[:300]!r} cannot name a folder: expected parts of letters, digits, '.', '_', '-' and "
            f"spaces with single '/' between them, no '..', at most {LONGEST_NAME} bytes, and no part that ends like "
            f"the export's own files ({', '.join(OWN_SUFFIXES)}). Rename the task, or export it alone with --task."
        )
    return task


def task_paths(tasks: Iterable[str]) -> dict[str, str]:
    """Give each task's path.

    Raises:
        MPTError: two are the same where upper and lower case are, or letters with accents in one piece and in two.
    """
    paths = {task: task_path(task) for task in tasks}
    if len({unicodedata.normalize("NFC", path).casefold() for path in paths.values()}) < len(paths):
        raise MPTError(f"The task names {', '.join(paths)} differ in case alone, and cannot all name folders.")
    return paths


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    # safetensors' own save_file gives the file mode 0600, whatever the umask.
    file.write_bytes(save(plain, metadata={"format": "pt"}))


def as_checkpoint(checkpoint: PromptCheckpoint | str | Path) -> PromptCheckpoint:
    """Read a checkpoint, or an exported folder, unless it has been read.

    Raises:
        MPTError: it cannot be read.
    """
    if isinstance(checkpoint, PromptCheckpoint):
        return checkpoint
    return read_checkpoint(str(checkpoint), "checkpoint", folder=True)


def trained_prompt(checkpoint: PromptCheckpoint, backbone: Backbone | None = None) -> Prompt:
    """Make the checkpoint's prompt, ready to give embeddings.

    Args:
        checkpoint: the checkpoint.
        backbone: its backbone. Loaded by its name where the prompt is made of the backbone's embeddings (CPT) and none
            is given.

    Raises:
        MPTError: no prompt of embeddings, another backbone, or one that cannot be loaded.
    """
    checkpoint.check_embeddings("checkpoint")
    if not checkpoint.state_dict or any(not name.startswith("prompt.") for name in checkpoint.state_dict):
        raise MPTError(
            f"{checkpoint.path} was saved by {checkpoint.stage}, and holds no prompt to export. Give a checkpoint of "
            "PromptTuning, MPTSource, MPTTarget or CPT."
        )
    needs_embeddings = type(checkpoint.empty_prompt()).attach is not Prompt.attach
    if backbone is None and needs_embeddings:
        # In the precision it was trained with, so that the embeddings are those it was trained around.
        options = checkpoint.hyper_parameters
        backbone = load_backbone(
            checkpoint.backbone, options.get("backbone_dtype", "float32"), check=options.get("backbone_check", True)
        )
    if backbone is None:
        return checkpoint.prompt()
    return for_backbone(checkpoint, backbone).prompt(backbone.embeddings)


def only(checkpoint: PromptCheckpoint, prompt: Prompt, task: str) -> PromptCheckpoint:
    """Give the checkpoint of one task.

    Args:
        checkpoint: of this task and others.
        prompt: its prompt; the other tasks are taken out of it.
        task: the one that stays.

    Raises:
        MPTError: there is no such task.
    """
    prompt.index(task)
    for other in [name for name in prompt.tasks if name != task]:
        prompt.remove_task(other)
    return with_changes(
        checkpoint,
        prompt_config=prompt.config(),
        state_dict={f"prompt.{name}": value for name, value in prompt.state_dict().items()},
        cards={name: card for name, card in checkpoint.cards.items() if name == task},
    )
