"""Reading a checkpoint, or a folder that can stand for one."""

from collections.abc import Mapping
from pathlib import Path

from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint.format import PromptCheckpoint, parse_checkpoint
from mpt_lightning.checkpoint.io import load_plain
from mpt_lightning.checkpoint.peft import import_peft
from mpt_lightning.errors import MPTError


def read_checkpoint(
    path: str, argument: str = "--ckpt_path", *, folder: bool = False, backbone: Backbone | None = None
) -> PromptCheckpoint:
    """Read a checkpoint; nothing in it is executed (`weights_only=True`).

    Args:
        path: the file.
        argument: the argument that named it, for messages.
        folder: a PEFT folder will do too: an export of this package, or PEFT's own (`interop.import_peft`). Training
            can start from one, and cannot be resumed from one.
        backbone: the model a folder is to be used with; its own check, as PEFT's folders have no fingerprint.

    Raises:
        MPTError: there is no such file, it is cut off, or it is not one of ours.
    """
    file = Path(path).expanduser()
    if file.is_dir() and folder:
        return import_peft(file, backbone)
    if file.is_dir():
        raise MPTError(
            f"{argument} {path} is a folder, which holds no training state. Give the path of a .ckpt file; a PEFT "
            "folder is a start: --model.source, --model.teachers, or --model.init_checkpoint."
        )
    if not file.is_file():
        raise MPTError(f"{argument} {path}: there is no such file. Give the path of a .ckpt file.")
    content = load_plain(file, f"{argument} {path}")
    if not isinstance(content, Mapping):
        raise MPTError(f"{argument} {path} is no checkpoint: it holds a {type(content).__name__}.")
    return parse_checkpoint(content, str(path))
