"""Folders that appear whole or not at all, and the description of itself that an export carries."""

import hashlib
import json
import os
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace as with_changes
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from mpt_lightning.backbones import Backbone, load_backbone
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.files import LONGEST_NAME, can_be_path, one_line
from mpt_lightning.prompts import Prompt

DESCRIPTION = "mpt_lightning.json"
STATE = "mpt_lightning.safetensors"
"""The trained tensors, where PEFT's file does not hold them as they are."""
FORMAT = 1
FIELDS = (
    "stage", "backbone", "fingerprint", "prompt_class", "prompt_config", "cards", "hyper_parameters", "data", "metrics",
)  # fmt: skip
OWN_SUFFIXES = (".safetensors", ".json", ".md")
"""What an export's own files end with; a task's folder of such a name could be in the place of one."""
# Arguments that are not exported: paths of the machine that trained, and what `cards` contains.
PRIVATE = ("teachers", "source", "init_checkpoint", "cache_dir", "card", "tasks")
# What an export contains in place of a `data_root`: that the data was local, but not where.
LOCAL = "<local files>"


@contextmanager
def new_folder(dest: str | Path, replace: bool = False) -> Iterator[Path]:
    """Give a folder to write to that becomes `dest` when all has been written, and vanishes on an error.

    Args:
        dest: a place that does not exist; its parents are made.
        replace: an earlier export at `dest` gives way; anything else there is refused.

    Raises:
        ValueError: something is at `dest`.
    """
    dest = Path(dest).expanduser()
    if os.path.lexists(dest) and not (replace and (dest / DESCRIPTION).is_file()):
        wanted = f"an export (a folder with {DESCRIPTION})" if replace else "a place that does not exist"
        raise ValueError(f"{dest} exists. Expected {wanted}: remove it, or give another destination.")
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as scratch:
        unfinished, old = Path(scratch) / "new", Path(scratch) / "old"
        unfinished.mkdir()
        yield unfinished
        if os.path.lexists(dest):
            dest.rename(old)
        try:
            unfinished.rename(dest)
        except OSError:
            if old.exists():
                old.rename(dest)
            raise


def task_path(task: str) -> str:
    """Give the path of a task's part of an export: its name, which cannot lead out of the folder.

    Raises:
        ValueError: the name cannot be a path on every system.
    """
    if not can_be_path(task) or any(part.casefold().endswith(OWN_SUFFIXES) for part in task.split("/")):
        raise ValueError(
            f"The task name {task[:300]!r} cannot name a folder: expected parts of letters, digits, '.', '_', '-' and "
            f"spaces with single '/' between them, no '..', at most {LONGEST_NAME} bytes, and no part that ends like "
            f"the export's own files ({', '.join(OWN_SUFFIXES)}). Rename the task, or export it alone with --task."
        )
    return task


def task_paths(tasks: Iterable[str]) -> dict[str, str]:
    """Give each task's path.

    Raises:
        ValueError: two are the same where upper and lower case are, or letters with accents in one piece and in two.
    """
    paths = {task: task_path(task) for task in tasks}
    if len({unicodedata.normalize("NFC", path).casefold() for path in paths.values()}) < len(paths):
        raise ValueError(f"The task names {', '.join(paths)} differ in case alone, and cannot all name folders.")
    return paths


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return load_file(file)
    except Exception as error:  # its own errors, and Python's where a type has no name in torch
        raise ValueError(
            f"{file} cannot be read: it is cut off or damaged ({one_line(error)}). Export or copy the folder anew."
        ) from error


def write_tensors(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, and check that it holds the same bits.

    Raises:
        OSError: it does not.
    """
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    # safetensors' own save_file gives the file mode 0600, whatever the umask.
    file.write_bytes(save(plain, metadata={"format": "pt"}))
    written = read_tensors(file)
    same = written.keys() == plain.keys() and all(
        value.dtype == plain[name].dtype
        and value.shape == plain[name].shape
        and torch.equal(value.view(torch.uint8), plain[name].view(torch.uint8))
        for name, value in written.items()
    )
    if not same:
        raise OSError(f"{file} was not written as it should be. Check the disk.")


def write_json(file: Path, content: Any) -> None:
    """Write plain values."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    """Read plain values.

    Raises:
        ValueError: the file is missing or no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{file} cannot be read as JSON: {one_line(error)}. Export or copy the folder anew."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a JSON object.")
    return content


def write_description(folder: Path, checkpoint: PromptCheckpoint, files: Iterable[str]) -> None:
    """Write what `import_peft` needs beside the tensors, with a digest of each file that it will trust."""
    values = {name: getattr(checkpoint, name) for name in FIELDS}
    for name in ("hyper_parameters", "data"):
        values[name] = {key: value for key, value in values[name].items() if key not in PRIVATE and _is_plain(value)}
    if values["data"].get("data_root") is not None:
        values["data"]["data_root"] = LOCAL
    content = {"format": FORMAT, **values, "files": {name: digest(folder / name) for name in files}}
    write_json(folder / DESCRIPTION, {**content, "sha256": _own_digest(content)})


def read_description(folder: Path) -> tuple[PromptCheckpoint, list[str]]:
    """Read an export's description.

    Returns:
        The checkpoint without its tensors, and the files that hold these.

    Raises:
        ValueError: it is damaged or of a later format, or a file is not what was exported.
    """
    content = read_json(folder / DESCRIPTION)
    if content.get("format") != FORMAT:
        raise ValueError(
            f"{folder} has the export format {content.get('format')!r}; this version reads {FORMAT}. "
            "Update mpt_lightning."
        )
    if set(content) != {"format", *FIELDS, "files", "sha256"} or not isinstance(content["files"], dict):
        raise ValueError(f"{folder / DESCRIPTION} is damaged: it has the fields {', '.join(sorted(content))}.")
    if content.pop("sha256") != _own_digest(content):
        raise ValueError(
            f"{folder / DESCRIPTION} was changed after the export: its own digest does not fit. Export anew; to import "
            "what another program has put there, remove it."
        )
    for name, expected in content["files"].items():
        if not can_be_path(name) or not (folder / name).is_file() or digest(folder / name) != expected:
            raise ValueError(
                f"{folder}: {name} is missing or was changed after the export, so that {DESCRIPTION} no longer "
                f"describes it. Export anew; to import what another program has put there, remove {DESCRIPTION}."
            )
    values = {name: content[name] for name in FIELDS}
    return PromptCheckpoint(path=str(folder), state_dict={}, **values), list(content["files"])


def digest(file: Path) -> str:
    """Give the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _own_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def as_checkpoint(checkpoint: PromptCheckpoint | str | Path) -> PromptCheckpoint:
    """Read a checkpoint, or an exported folder, unless it has been read.

    Raises:
        ValueError: it cannot be read.
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
        ValueError: no prompt of embeddings, another backbone, or one that cannot be loaded.
    """
    checkpoint.check_embeddings("checkpoint")
    if not checkpoint.state_dict or any(not name.startswith("prompt.") for name in checkpoint.state_dict):
        raise ValueError(
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


def for_backbone(checkpoint: PromptCheckpoint, backbone: Backbone) -> PromptCheckpoint:
    """Check that a checkpoint is for this backbone; one that came from PEFT without a fingerprint takes this one's.

    Raises:
        ValueError: it is for another.
    """
    if checkpoint.fingerprint:
        checkpoint.check_backbone(backbone.name, backbone.fingerprint, "The checkpoint")
        return checkpoint
    if (dim := checkpoint.empty_prompt().dim) != backbone.dim:
        raise ValueError(
            f"{checkpoint.path} was made for a model of width {dim}, and {backbone.name!r} has {backbone.dim}. A "
            "prompt fits only the model it was trained on: give that one."
        )
    return with_changes(checkpoint, backbone=backbone.name, fingerprint=backbone.fingerprint)


def only(checkpoint: PromptCheckpoint, prompt: Prompt, task: str) -> PromptCheckpoint:
    """Give the checkpoint of one task.

    Args:
        checkpoint: of this task and others.
        prompt: its prompt; the other tasks are taken out of it.
        task: the one that stays.

    Raises:
        ValueError: there is no such task.
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
