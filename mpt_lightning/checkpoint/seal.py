"""A digest of a whole file inside the file: the comment of the zip archive that `torch.save` makes.

Any reader of such archives reads a sealed one. torch itself does not check what it reads: a changed bit is a changed
weight.
"""

import hashlib
import struct
import zipfile
from pathlib import Path

from mpt_lightning.errors import MPTError

MARK = b"sha256:"
COMMENT_SIZE = len(MARK) + 64
CHUNK = 1 << 20


def seal(archive: memoryview) -> bytes:
    """Give an archive with a comment that holds the digest of all before it.

    Args:
        archive: a zip file without a comment; its last two bytes are the comment's length.
    """
    content = bytes(archive[:-2]) + struct.pack("<H", COMMENT_SIZE)
    return content + MARK + hashlib.sha256(content).hexdigest().encode()


def check_seal(file: Path) -> None:
    """Compare a file with its seal; one that was saved without a seal, with the archive's own checksums.

    Args:
        file: what `torch.save` wrote.

    Raises:
        MPTError: it is not as it was written.
        zipfile.BadZipFile: it is no archive.
    """
    size = file.stat().st_size - COMMENT_SIZE
    with file.open("rb") as stream:
        digest, left = hashlib.sha256(), max(size, 0)
        while chunk := stream.read(min(CHUNK, left)):
            digest.update(chunk)
            left -= len(chunk)
        comment = stream.read()
    if comment == MARK + digest.hexdigest().encode():
        return
    with zipfile.ZipFile(file) as archive:
        if comment.startswith(MARK) or archive.comment:
            raise MPTError("its content is not what was written: the digest at its end does not fit")
        if comment[-22:-18] != b"PK\x05\x06" or comment[-2:] != b"\0\0":
            raise MPTError("its end is not what was written: bytes are missing there, or too many")
        damaged = archive.testzip()
    if damaged is not None:
        raise MPTError(f"its part {damaged} is not what was written: the checksum does not fit")
