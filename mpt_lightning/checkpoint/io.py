"""Checkpoint files: written atomically, and checked when they are read."""

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line, write_file


class CheckedCheckpointIO(TorchCheckpointIO):
    """Writes a temporary file and renames it; checks the archive's checksums when it reads.

    The package's modules use it instead of Lightning's own plugin, unless the Trainer was given another one. Remote
    paths ("s3://...") are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file whole or not at all; an existing one is replaced."""
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        buffer = BytesIO()
        torch.save(checkpoint, buffer)
        try:
            write_file(Path(path), buffer.getbuffer(), flush=True)
        except OSError as error:
            raise MPTError(
                f"The checkpoint {path} ({buffer.tell():,} bytes) cannot be written: {error.strerror}; earlier ones "
                "are whole. Make room, or choose another folder (dirpath of ModelCheckpoint, "
                "--trainer.default_root_dir), and resume with --ckpt_path last."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Read a file; nothing in it is executed, whatever `weights_only` is."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return load_plain(Path(path), str(path))


def load_plain(file: Path, name: str) -> Any:
    """Read tensors and plain values from a file that `torch.save` wrote; `name` is for the error message."""
    try:
        # torch does not compare the checksums: a flipped bit would be another weight.
        with zipfile.ZipFile(file) as archive:
            # Of a part marked as a folder (0x10) torch reads nothing, and leaves its tensor uninitialized.
            folders = [part.filename for part in archive.infolist() if part.external_attr & 0x10]
            damaged = archive.testzip() or next(iter(folders), None)
        if damaged is not None:
            raise MPTError(f"its part {damaged} does not fit its checksum or its type")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # for bytes that are not a checkpoint torch's reader raises any exception
        raise MPTError(
            f"{name} cannot be read: the file ({file.stat().st_size:,} bytes) is cut off or damaged, or contains more "
            "than tensors and plain values. Use another one, such as an earlier checkpoint of the run. "
            f"The cause: {one_line(error) or type(error).__name__}"
        ) from error
