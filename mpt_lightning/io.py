"""Files: atomic writing, reading of text and YAML, and what may name a file. Imports neither torch nor datasets."""

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from mpt_lightning.errors import MPTError

# Bytes; file systems take 255, and suffixes and temporary names need some of them.
LONGEST_NAME = 200


def write_file(file: Path, content: str | bytes | memoryview, *, flush: bool = False) -> None:
    """Write a file whole or not at all; an existing one is replaced, and missing folders are created.

    With `flush`, wait until the content is on the disk, so that even a crash of the machine leaves a whole file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.part")
    try:
        with unfinished.open("wb") as stream:
            stream.write(content.encode() if isinstance(content, str) else content)
            if flush:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(unfinished, file)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise


def write_json_lines(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line; see `write_file`."""
    write_file(file, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


@contextmanager
def new_folder(dest: str | Path, replaces: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder that becomes `dest` when the block ends, and is removed if it raises.

    Raise if `dest` exists, unless it is a folder that contains the file `replaces`: such a folder is replaced.
    """
    dest = Path(dest).expanduser()
    if os.path.lexists(dest) and not (replaces and (dest / replaces).is_file()):
        expected = f"an export (a folder with {replaces})" if replaces else "a path that does not exist"
        raise MPTError(f"{dest} exists. Expected {expected}: remove it, or choose another destination.")
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


def can_be_path(name: str) -> bool:
    r"""Return whether a name with single `/` between its parts can be a relative path that stays inside its folder.

    Example:
        >>> [can_be_path(name) for name in ("glue/sst2", "a/../b", "/etc/x", "a\\b", "x" * 300)]
        [True, False, False, False, False]
    """
    # Control characters, line ends and lone surrogates, which UTF-8 cannot encode, are not printable.
    if not name.isprintable() or re.search(r'[\\:*?"<>|]', name) or len(name.encode()) > LONGEST_NAME:
        return False
    return all(part == part.strip() and part.strip(".") for part in name.split("/"))


def read_text(file: Path) -> str:
    """Read a UTF-8 text file, with or without a byte order mark."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MPTError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8.") from None


def read_yaml(file: Path) -> Any:
    """Read a YAML file of plain values; tags for anything else are errors."""
    text = read_text(file)
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML also raises KeyError, ValueError and RecursionError
        raise MPTError(
            f"{file} cannot be read as YAML ({type(error).__name__}: {one_line(error)}). Correct the file."
        ) from None


def one_line(error: object) -> str:
    """Return an error's text as one line of at most 300 characters."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
