"""Small text files that people write, and what may name a file. Light: `mpt tasks` reads all cards with it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mpt_lightning.errors import MPTError

if TYPE_CHECKING:
    from importlib.abc import Traversable

LONGEST_NAME = 200
"""Bytes; file systems take 255, and suffixes and temporary names need some of them."""
LONGEST_YAML = 1_000_000
_DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


def can_be_path(name: str) -> bool:
    r"""Say whether a name can be a relative path on Linux, macOS and Windows, and cannot lead out of its folder.

    Args:
        name: parts with single `/` between them.

    Example:
        >>> [can_be_path(name) for name in ("glue/sst2", "a/../b", "/etc/x", "a\\b", "con", "x" * 300)]
        [True, False, False, False, False, False]
    """
    # Not printable are control characters, line ends, and halves of surrogate pairs, which cannot be encoded.
    if not name.isprintable() or re.search(r'[\\:*?"<>|]', name) or len(name.encode()) > LONGEST_NAME:
        return False
    # An empty part is a leading, a trailing or a doubled `/`; Windows drops dots and spaces at a part's end.
    parts = name.split("/")
    return all(
        part and part == part.strip() and not part.endswith(".") and part.split(".")[0].casefold() not in _DEVICES
        for part in parts
    )


def read_text(file: Path | Traversable) -> str:
    """Read a text file, with or without a byte order mark.

    Raises:
        MPTError: it is not UTF-8.
        OSError: it cannot be read at all.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MPTError(
            f"{file} is not UTF-8 text ({error.reason} at byte {error.start}). Save it as UTF-8, or give another file."
        ) from None


def parse_yaml(text: str, name: str) -> Any:
    """Read YAML as plain values; tags that stand for anything else are errors.

    Args:
        text: the YAML.
        name: what to call it in the message.

    Raises:
        MPTError: it is none.
    """
    try:
        content = yaml.safe_load(text)
        if _count(content, {}) > LONGEST_YAML:
            raise MPTError(f"its aliases stand for more than {LONGEST_YAML:,} values")
        return content
    except Exception as error:  # PyYAML lets through what its conversions raise: KeyError, ValueError, RecursionError
        raise MPTError(
            f"{name} cannot be read as YAML ({type(error).__name__}: {one_line(error)}). Correct the file."
        ) from None


def _count(value: Any, counted: dict[int, int | None]) -> int:
    """Count the values of a YAML document, with every alias written out."""
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in counted:
        counted[id(value)] = None
        inside = [*value, *value.values()] if isinstance(value, dict) else value
        counted[id(value)] = 1 + sum(_count(item, counted) for item in inside)
    count = counted[id(value)]
    if count is None:
        raise MPTError("a part of it is inside itself")
    return count


def read_yaml(file: Path | Traversable) -> Any:
    """Read a YAML file; see `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(file), str(file))


def one_line(error: object) -> str:
    """Give an error's text in one line, of a length that can be read."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
