"""Multitask and context-aware prompt tuning of one frozen language model, as PyTorch Lightning modules.

Public names are loaded on first use, so that `import mpt_lightning` does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# The modules that define the public names.
_HOMES = {
    "prompts": "SoftPrompt MultitaskPrompt ContextPrompt",
    "backbones": "load_backbone",
    "modules": "PromptTuning MPTSource MPTTarget CPT PrefixTuning DePT PEFTModule Adapters FineTuning HardPrompt",
    "data": "TaskDataModule MultitaskDataModule load_task",
    "predictor": "Predictor",
    "distributed.strategy": "ShardedStrategy",
    "interop": "export_peft import_peft",
}
__all__ = [name for names in _HOMES.values() for name in names.split()]

if TYPE_CHECKING:  # `as` marks a re-export for type checkers
    from mpt_lightning.backbones import load_backbone as load_backbone
    from mpt_lightning.data import MultitaskDataModule as MultitaskDataModule
    from mpt_lightning.data import TaskDataModule as TaskDataModule
    from mpt_lightning.data import load_task as load_task
    from mpt_lightning.distributed.strategy import ShardedStrategy as ShardedStrategy
    from mpt_lightning.interop import export_peft as export_peft
    from mpt_lightning.interop import import_peft as import_peft
    from mpt_lightning.modules import CPT as CPT
    from mpt_lightning.modules import Adapters as Adapters
    from mpt_lightning.modules import DePT as DePT
    from mpt_lightning.modules import FineTuning as FineTuning
    from mpt_lightning.modules import HardPrompt as HardPrompt
    from mpt_lightning.modules import MPTSource as MPTSource
    from mpt_lightning.modules import MPTTarget as MPTTarget
    from mpt_lightning.modules import PEFTModule as PEFTModule
    from mpt_lightning.modules import PrefixTuning as PrefixTuning
    from mpt_lightning.modules import PromptTuning as PromptTuning
    from mpt_lightning.predictor import Predictor as Predictor
    from mpt_lightning.prompts import ContextPrompt as ContextPrompt
    from mpt_lightning.prompts import MultitaskPrompt as MultitaskPrompt
    from mpt_lightning.prompts import SoftPrompt as SoftPrompt


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
