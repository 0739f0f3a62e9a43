"""Exported folders: the tensors, and the description beside them that makes a checkpoint of them again."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint.format import PromptCheckpoint
from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line

DESCRIPTION = "mpt_lightning.json"
# The trained tensors, if PEFT's file does not contain them as they are.
STATE = "mpt_lightning.safetensors"
FORMAT = 1
FIELDS = [field.name for field in fields(PromptCheckpoint) if field.name not in ("path", "state_dict")]
# Arguments that are not exported: paths of the machine that trained, and what `cards` contains.
PRIVATE = ("teachers", "source", "init_checkpoint", "cache_dir", "card", "tasks")
# What an export contains instead of a `data_root`: that the data was local, but not where.
LOCAL = "<local files>"


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file."""
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises its own errors, and Python's for a type unknown to torch
        raise MPTError(
            f"{file} cannot be read: it is cut off or damaged ({one_line(error)}). Export or copy the folder again."
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError(f"it is a {type(content).__name__}")
        return content
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise MPTError(
            f"{file} cannot be read as a JSON object: {one_line(error)}. Export or copy the folder again."
        ) from error


def write_json(file: Path, content: Any) -> None:
    """Write plain values as JSON."""
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def write_description(folder: Path, checkpoint: PromptCheckpoint, files: Iterable[str]) -> None:
    """Write what `read_description` needs, with a digest of each file, since safetensors files have no checksum."""
    values = {name: getattr(checkpoint, name) for name in FIELDS}
    for name in ("hyper_parameters", "data"):
        values[name] = {key: value for key, value in values[name].items() if key not in PRIVATE and _is_plain(value)}
    if values["data"].get("data_root") is not None:
        values["data"]["data_root"] = LOCAL
    digests = {name: digest(folder / name) for name in files}
    write_json(folder / DESCRIPTION, {"format": FORMAT, **values, "files": digests})


def _is_plain(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def read_description(folder: Path) -> tuple[PromptCheckpoint, list[str]]:
    """Return an export's checkpoint without its tensors, and the names of the files that contain these."""
    content = read_json(folder / DESCRIPTION)
    if content.get("format") != FORMAT:
        raise MPTError(
            f"{folder} has the export format {content.get('format')!r}; this version reads {FORMAT}. "
            "Update mpt_lightning."
        )
    for name, expected in content["files"].items():
        if not (folder / name).is_file() or digest(folder / name) != expected:
            raise MPTError(
                f"{folder}: {name} is missing or was changed after the export. Export again; to import what another "
                f"program wrote there, remove {DESCRIPTION}."
            )
    values = {name: content[name] for name in FIELDS}
    return PromptCheckpoint(path=str(folder), state_dict={}, **values), list(content["files"])


def for_backbone(checkpoint: PromptCheckpoint, backbone: Backbone) -> PromptCheckpoint:
    """Check that a checkpoint is for a backbone; one from PEFT has no fingerprint, and gets that of the backbone."""
    if checkpoint.fingerprint:
        checkpoint.check_backbone(backbone.name, backbone.fingerprint, "The checkpoint")
        return checkpoint
    if (dim := checkpoint.empty_prompt().dim) != backbone.dim:
        raise MPTError(
            f"{checkpoint.path} was made for a model of width {dim}, and {backbone.name!r} has {backbone.dim}. A "
            "prompt fits only the model it was trained on: use that one."
        )
    return replace(checkpoint, backbone=backbone.name, fingerprint=backbone.fingerprint)
