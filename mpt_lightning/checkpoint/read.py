"""Reading a checkpoint, or a folder that takes the place of one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint.format import FORMAT, KEY, PromptCheckpoint
from mpt_lightning.checkpoint.io import load_plain
from mpt_lightning.checkpoint.peft import import_peft
from mpt_lightning.errors import MPTError


def read_checkpoint(
    path: str, argument: str = "--ckpt_path", *, folder: bool = False, backbone: Backbone | None = None
) -> PromptCheckpoint:
    """Read a checkpoint; nothing in it is executed (`weights_only=True`).

    Args:
        path: The file.
        argument: The argument that named it, for messages.
        folder: Also accept a PEFT folder (see `import_peft`), from which training can start but not resume.
        backbone: The model that a folder of PEFT's own is used with; such a folder has no fingerprint.

    Raises:
        MPTError: If the file does not exist, is damaged, or is not a checkpoint of this version.
    """
    file = Path(path).expanduser()
    if file.is_dir() and folder:
        return import_peft(file, backbone)
    if file.is_dir():
        raise MPTError(
            f"{argument} {path} is a folder, which holds no training state. Expected a .ckpt file; to start a new run "
            "from a PEFT folder, use --model.source, --model.teachers or --model.init_checkpoint."
        )
    if not file.is_file():
        raise MPTError(f"{argument} {path}: there is no such file. Expected a .ckpt file.")
    return parse_checkpoint(load_plain(file, f"{argument} {path}"), str(path))


def parse_checkpoint(content: Any, path: str) -> PromptCheckpoint:
    """Return a loaded file's content as a checkpoint."""
    found = content.get(KEY) if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise MPTError(f"{path} is not a checkpoint of mpt_lightning. Use one that its modules saved.")
    if found.get("format") != FORMAT:
        raise MPTError(
            f"{path} has the checkpoint format {found.get('format')!r}; this version reads {FORMAT}. "
            "Update mpt_lightning."
        )
    checkpoint = PromptCheckpoint(
        path=path,
        state_dict=dict(content["state_dict"]),
        hyper_parameters=dict(content.get("hyper_parameters", {})),
        data=dict(content.get("datamodule_hyper_parameters", {})),
        metrics=_scores(content, Path(path).name),
        **{key: value for key, value in found.items() if key != "format"},
    )
    checkpoint.check_tensors()
    return checkpoint


def _scores(content: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return the scores for which ModelCheckpoint saved a file of this name, by metric."""
    return {
        state["monitor"]: float(score)
        for state in content.get("callbacks", {}).values()
        if state.get("monitor")
        for file, score in state.get("best_k_models", {}).items()
        if Path(file).name == name
    }
