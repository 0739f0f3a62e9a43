"""Ways to damage a file's bytes or its content."""

import io
import zipfile
from collections.abc import Callable
from random import Random
from typing import Any

import torch

Damage = Callable[[bytes, Random], bytes]
Change = Callable[[Any], None]


def flip(position: Callable[[bytes, Random], int]) -> Damage:
    """Return a function that flips one bit of one byte."""

    def change(content: bytes, random: Random) -> bytes:
        place = position(content, random)
        return content[:place] + bytes([content[place] ^ (1 << random.randrange(8))]) + content[place + 1 :]

    return change


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def put(*path: Any, value: Any) -> Callable[[Any], None]:
    """Return a function that sets the value at a path of a nested content."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


def drop(*path: Any) -> Callable[[Any], None]:
    """Return a function that deletes the value at a path of a nested content."""

    def change(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change
