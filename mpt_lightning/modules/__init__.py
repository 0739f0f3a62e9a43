"""LightningModules, one per method: a prompt, a backbone, an objective and an optimizer, wired together."""

from mpt_lightning.modules.adapters import Adapters
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.cpt import CPT
from mpt_lightning.modules.decomposed import DePT
from mpt_lightning.modules.finetuning import FineTuning
from mpt_lightning.modules.hard_prompt import HardPrompt
from mpt_lightning.modules.mpt import MPTSource, MPTTarget
from mpt_lightning.modules.peft import PEFTModule
from mpt_lightning.modules.prefix_tuning import PrefixTuning
from mpt_lightning.modules.prompt_tuning import PromptTuning

__all__ = [
    "CPT",
    "Adapters",
    "DePT",
    "FineTuning",
    "HardPrompt",
    "MPTSource",
    "MPTTarget",
    "PEFTModule",
    "PrefixTuning",
    "PromptModule",
    "PromptTuning",
]
