"""How checkpoints get to the disk and back: whole or not at all, and checked when they are read."""

from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mpt_lightning.checkpoint.seal import check_seal, seal
from mpt_lightning.errors import MPTError
from mpt_lightning.io import write_file


class CheckedCheckpointIO(TorchCheckpointIO):
    """Writes to a temporary name beside the file, then renames; seals each file, and checks the seal when it reads.

    The package's modules put it in the place of Lightning's own, unless the Trainer was given another one. Remote
    paths ("s3://...") are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write a file, whole or not at all; one of the same name is replaced in an instant.

        Raises:
            OSError: it cannot be written: no space, no permission.
        """
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target, buffer = Path(path), BytesIO()
        torch.save(checkpoint, buffer)
        try:
            write_file(target, seal(buffer.getbuffer()), flush=True)
        except OSError as error:
            raise MPTError(
                f"The checkpoint {target} ({buffer.tell():,} bytes) cannot be written: {error.strerror}. Training has "
                "stopped; checkpoints written before are whole. Make room, or give another folder (dirpath of "
                "ModelCheckpoint, --trainer.default_root_dir), and go on with --ckpt_path last."
            ) from error

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a file; nothing in it is executed, whatever `weights_only` says.

        Raises:
            MPTError: it cannot be read, or is not as it was written.
        """
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        content: dict[str, Any] = load_plain(Path(path), str(path))
        return content


def load_plain(file: Path, name: str) -> Any:
    """Read a file of torch.save's that holds tensors and plain values.

    Args:
        file: the file.
        name: what to call it in the message.

    Raises:
        MPTError: it cannot be read, is not as it was written, or holds more than that.
    """
    try:
        check_seal(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint fail anywhere in torch's reader, with any exception
        raise MPTError(
            f"{name} cannot be read: the file ({file.stat().st_size:,} bytes) is cut off or damaged, or holds more "
            "than tensors and plain values. Use another one, such as another checkpoint of the run. "
            f"The cause: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
