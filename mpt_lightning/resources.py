"""The package's own files by name: task cards, recipes, the embedded models and their tasks' rows."""

import difflib
import os
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Literal

from mpt_lightning.errors import MPTError

Kind = Literal["tasks", "configs"]

# The Hub id in the cards of embedded tasks, and the beginning of the embedded models' names.
EMBEDDED = "mpt_lightning/demo"
T5 = f"{EMBEDDED}/t5"
LLAMA = f"{EMBEDDED}/llama"
BERT = f"{EMBEDDED}/bert"


def packaged(kind: Kind, name: str) -> Path | None:
    """Return a shipped task card or recipe by name, with or without ".yaml", or None if it does not exist."""
    name = name.removesuffix(".yaml")
    return _folder(kind) / f"{name}.yaml" if name in packaged_names(kind) else None


def find_file(kind: Kind, name: str, prefix: str = "") -> Path:
    """Return the file `name`, or the shipped one of that name; raise with similar names that begin with `prefix`."""
    file = Path(name) if os.path.isfile(name) else packaged(kind, name)
    if file is None:
        known = [shipped for shipped in packaged_names(kind) if shipped.startswith(prefix)]
        what = "task" if kind == "tasks" else "comparison" if prefix else "recipe"
        near = difflib.get_close_matches(name, known) or known
        raise MPTError(
            f"unknown {what} {name[:200]!r}. Expected a file or one of: {', '.join(near)}. `mpt {kind}` lists all."
        )
    return file


@cache
def packaged_names(kind: Kind) -> list[str]:
    """List the shipped YAML files by name."""
    root = _folder(kind)
    return sorted(file.relative_to(root).with_suffix("").as_posix() for file in root.rglob("*.yaml"))


def backbone_path(name: str) -> str:
    """Return the folder of an embedded model; any other name or folder is returned as it is, with `~` resolved."""
    if name in (T5, LLAMA, BERT):
        return str(_folder("demo") / name.rpartition("/")[2])
    return str(Path(name).expanduser()) if name.startswith("~") else name


def embedded_data(path: str) -> Path | None:
    """Return the folder of an embedded task's rows, or None for any other `path` of a card."""
    return _folder("demo") / "data" if path == EMBEDDED else None


def _folder(package: str) -> Path:
    return Path(str(resources.files(f"mpt_lightning.{package}")))
