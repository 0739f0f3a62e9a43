"""Data: task cards become LightningDataModules.

Names load on first use, so that `import mpt_lightning.data.card` imports neither torch nor datasets.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# The modules that define the public names.
_HOMES = {
    "card": "TaskCard card_names list_cards load_card",
    "context": "Context build_context",
    "datamodule": "PromptDataModule",
    "loader": "PromptCollator",
    "task": "TaskDataModule load_task",
    "multitask": "MultitaskDataModule",
}
__all__ = [name for names in _HOMES.values() for name in names.split()]

if TYPE_CHECKING:  # `as` marks a re-export for type checkers
    from mpt_lightning.data.card import TaskCard as TaskCard
    from mpt_lightning.data.card import card_names as card_names
    from mpt_lightning.data.card import list_cards as list_cards
    from mpt_lightning.data.card import load_card as load_card
    from mpt_lightning.data.context import Context as Context
    from mpt_lightning.data.context import build_context as build_context
    from mpt_lightning.data.datamodule import PromptDataModule as PromptDataModule
    from mpt_lightning.data.loader import PromptCollator as PromptCollator
    from mpt_lightning.data.multitask import MultitaskDataModule as MultitaskDataModule
    from mpt_lightning.data.task import TaskDataModule as TaskDataModule
    from mpt_lightning.data.task import load_task as load_task


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
