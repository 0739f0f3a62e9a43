"""LightningModules: a prompt, a backbone, an objective and an optimizer, wired together."""

from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.cpt import CPT
from mpt_lightning.modules.mpt import MPTSource, MPTTarget
from mpt_lightning.modules.prompt_tuning import PromptTuning

__all__ = ["CPT", "MPTSource", "MPTTarget", "PromptModule", "PromptTuning"]
