"""Data: task cards become LightningDataModules.

Names load on first use, so that `import mpt_lightning.data.card` stays free of torch and datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpt_lightning.data.card import TaskCard as TaskCard
    from mpt_lightning.data.card import card_names as card_names
    from mpt_lightning.data.card import list_cards as list_cards
    from mpt_lightning.data.card import load_card as load_card
    from mpt_lightning.data.collate import PromptCollator as PromptCollator
    from mpt_lightning.data.context import Context as Context
    from mpt_lightning.data.context import build_context as build_context
    from mpt_lightning.data.datamodule import PromptDataModule as PromptDataModule
    from mpt_lightning.data.multitask import MultitaskDataModule as MultitaskDataModule
    from mpt_lightning.data.task import TaskDataModule as TaskDataModule
    from mpt_lightning.data.task import load_task as load_task

_HOMES = {
    "TaskCard": "card",
    "card_names": "card",
    "list_cards": "card",
    "load_card": "card",
    "PromptCollator": "collate",
    "Context": "context",
    "build_context": "context",
    "PromptDataModule": "datamodule",
    "TaskDataModule": "task",
    "load_task": "task",
    "MultitaskDataModule": "multitask",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
