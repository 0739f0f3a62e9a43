"""The embedded default: a small generated world of tasks, and a small T5 and a small Llama pretrained on it."""

from pathlib import Path

from mpt_lightning.demo import world

DATA = "mpt_lightning/demo"
"""The path of the cards whose rows are generated, where others have a Hub id."""
SPLITS = {"train": 2000, "validation": 200, "test": 300}
"""Rows of each split of each task."""
BACKBONE = "mpt_lightning/demo/t5"
"""The name of the embedded model, where others have a Hub id."""
CAUSAL_BACKBONE = "mpt_lightning/demo/llama"
"""The name of the embedded decoder-only model, which learns from examples in its context."""
SOURCES = tuple(f"demo/{name}" for name in world.SOURCES)
TARGETS = tuple(f"demo/{name}" for name in world.TARGETS)


def backbone_path(name: str) -> str:
    """Give the folder of an embedded model; any other name or folder stays what it is, `~` resolved."""
    if name in (BACKBONE, CAUSAL_BACKBONE):
        return str(Path(__file__).parent / name.rpartition("/")[2])
    return str(Path(name).expanduser()) if name.startswith("~") else name
