"""Multitask and context-aware prompt tuning of one frozen language model, as PyTorch Lightning modules.

Everything public is importable from here and loaded on first use, so that `import mpt_lightning` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mpt_lightning.backbones import load_backbone
    from mpt_lightning.data import MultitaskDataModule, TaskDataModule, load_task
    from mpt_lightning.distributed.strategy import ShardedStrategy
    from mpt_lightning.interop import export_peft, import_peft
    from mpt_lightning.modules import (
        CPT,
        Adapters,
        DePT,
        FineTuning,
        HardPrompt,
        MPTSource,
        MPTTarget,
        PEFTModule,
        PrefixTuning,
        PromptTuning,
    )
    from mpt_lightning.predictor import Predictor
    from mpt_lightning.prompts import ContextPrompt, MultitaskPrompt, SoftPrompt

_HOMES = {
    "SoftPrompt": "mpt_lightning.prompts",
    "MultitaskPrompt": "mpt_lightning.prompts",
    "ContextPrompt": "mpt_lightning.prompts",
    "load_backbone": "mpt_lightning.backbones",
    "PromptTuning": "mpt_lightning.modules",
    "MPTSource": "mpt_lightning.modules",
    "MPTTarget": "mpt_lightning.modules",
    "CPT": "mpt_lightning.modules",
    "PrefixTuning": "mpt_lightning.modules",
    "DePT": "mpt_lightning.modules",
    "PEFTModule": "mpt_lightning.modules",
    "Adapters": "mpt_lightning.modules",
    "FineTuning": "mpt_lightning.modules",
    "HardPrompt": "mpt_lightning.modules",
    "TaskDataModule": "mpt_lightning.data",
    "MultitaskDataModule": "mpt_lightning.data",
    "load_task": "mpt_lightning.data",
    "Predictor": "mpt_lightning.predictor",
    "ShardedStrategy": "mpt_lightning.distributed.strategy",
    "export_peft": "mpt_lightning.interop",
    "import_peft": "mpt_lightning.interop",
}

__all__ = [  # noqa: RUF022  (the order of a reader: prompts, backbones, modules, data, exports)
    "SoftPrompt",
    "MultitaskPrompt",
    "ContextPrompt",
    "load_backbone",
    "PromptTuning",
    "MPTSource",
    "MPTTarget",
    "CPT",
    "PrefixTuning",
    "DePT",
    "PEFTModule",
    "Adapters",
    "FineTuning",
    "HardPrompt",
    "TaskDataModule",
    "MultitaskDataModule",
    "load_task",
    "Predictor",
    "ShardedStrategy",
    "export_peft",
    "import_peft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mpt_lightning' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
