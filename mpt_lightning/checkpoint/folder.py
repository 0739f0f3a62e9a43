"""Exported folders as this package reads them: tensors, and the description that an export carries."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint.format import PromptCheckpoint
from mpt_lightning.errors import MPTError
from mpt_lightning.io import can_be_path, one_line

DESCRIPTION = "mpt_lightning.json"
# The trained tensors, where PEFT's file does not hold them as they are.
STATE = "mpt_lightning.safetensors"
FORMAT = 1
FIELDS = (
    "stage", "backbone", "fingerprint", "prompt_class", "prompt_config", "cards", "hyper_parameters", "data", "metrics",
)  # fmt: skip


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        MPTError: it is missing or damaged.
    """
    try:
        return load_file(file)
    except Exception as error:  # its own errors, and Python's where a type has no name in torch
        raise MPTError(
            f"{file} cannot be read: it is cut off or damaged ({one_line(error)}). Export or copy the folder anew."
        ) from error


def read_json(file: Path) -> Any:
    """Read plain values.

    Raises:
        MPTError: the file is missing or no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise MPTError(f"{file} cannot be read as JSON: {one_line(error)}. Export or copy the folder anew.") from error
    if not isinstance(content, dict):
        raise MPTError(f"{file} holds a {type(content).__name__}, expected a JSON object.")
    return content


def read_description(folder: Path) -> tuple[PromptCheckpoint, list[str]]:
    """Read an export's description.

    Returns:
        The checkpoint without its tensors, and the files that hold these.

    Raises:
        MPTError: it is damaged or of a later format, or a file is not what was exported.
    """
    content = read_json(folder / DESCRIPTION)
    if content.get("format") != FORMAT:
        raise MPTError(
            f"{folder} has the export format {content.get('format')!r}; this version reads {FORMAT}. "
            "Update mpt_lightning."
        )
    if set(content) != {"format", *FIELDS, "files", "sha256"} or not isinstance(content["files"], dict):
        raise MPTError(f"{folder / DESCRIPTION} is damaged: it has the fields {', '.join(sorted(content))}.")
    if content.pop("sha256") != content_digest(content):
        raise MPTError(
            f"{folder / DESCRIPTION} was changed after the export: its own digest does not fit. Export anew; to import "
            "what another program has put there, remove it."
        )
    for name, expected in content["files"].items():
        if not can_be_path(name) or not (folder / name).is_file() or digest(folder / name) != expected:
            raise MPTError(
                f"{folder}: {name} is missing or was changed after the export, so that {DESCRIPTION} no longer "
                f"describes it. Export anew; to import what another program has put there, remove {DESCRIPTION}."
            )
    values = {name: content[name] for name in FIELDS}
    return PromptCheckpoint(path=str(folder), state_dict={}, **values), list(content["files"])


def digest(file: Path) -> str:
    """Give the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def content_digest(content: dict[str, Any]) -> str:
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def for_backbone(checkpoint: PromptCheckpoint, backbone: Backbone) -> PromptCheckpoint:
    """Check that a checkpoint is for this backbone; one that came from PEFT without a fingerprint takes this one's.

    Raises:
        MPTError: it is for another.
    """
    if checkpoint.fingerprint:
        checkpoint.check_backbone(backbone.name, backbone.fingerprint, "The checkpoint")
        return checkpoint
    if (dim := checkpoint.empty_prompt().dim) != backbone.dim:
        raise MPTError(
            f"{checkpoint.path} was made for a model of width {dim}, and {backbone.name!r} has {backbone.dim}. A "
            "prompt fits only the model it was trained on: give that one."
        )
    return replace(checkpoint, backbone=backbone.name, fingerprint=backbone.fingerprint)
