"""The package's own files by name: task cards, recipes, the embedded models and their tasks' rows."""

import difflib
from importlib import resources
from pathlib import Path
from typing import Literal

from mpt_lightning.errors import MPTError

Kind = Literal["tasks", "configs"]

# The Hub id in the cards of embedded tasks, and the beginning of the embedded models' names.
EMBEDDED = "mpt_lightning/demo"
T5 = f"{EMBEDDED}/t5"
LLAMA = f"{EMBEDDED}/llama"


def packaged(kind: Kind, name: str) -> Path | None:
    """Return a shipped task card or recipe by name, with or without ".yaml", or None if it does not exist."""
    root = Path(str(resources.files(f"mpt_lightning.{kind}")))
    file = (root / (name if name.endswith(".yaml") else f"{name}.yaml")).resolve()
    return file if file.is_file() and root.resolve() in file.parents else None


def find_packaged(kind: Kind, name: str) -> Path:
    """Return a shipped task card or recipe by name; raise with similar names if it does not exist."""
    file = packaged(kind, name)
    if file is None:
        known, what = packaged_names(kind), "recipe" if kind == "configs" else "task"
        near = difflib.get_close_matches(name, known) or known
        raise MPTError(
            f"unknown {what} {name!r}. Expected a file or one of: {', '.join(near)}. `mpt {kind}` lists all."
        )
    return file


def packaged_names(kind: Kind) -> list[str]:
    """List the shipped YAML files by name."""
    root = Path(str(resources.files(f"mpt_lightning.{kind}")))
    return sorted(file.relative_to(root).with_suffix("").as_posix() for file in root.rglob("*.yaml"))


def backbone_path(name: str) -> str:
    """Return the folder of an embedded model; any other name or folder is returned as it is, with `~` resolved."""
    if name in (T5, LLAMA):
        return str(_embedded() / name.rpartition("/")[2])
    return str(Path(name).expanduser()) if name.startswith("~") else name


def embedded_data(path: str) -> Path | None:
    """Return the folder of an embedded task's rows, or None for any other `path` of a card."""
    return _embedded() / "data" if path == EMBEDDED else None


def _embedded() -> Path:
    return Path(str(resources.files("mpt_lightning"))) / "demo"
