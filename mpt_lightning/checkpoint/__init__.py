"""Checkpoints: trained tensors and how to use them, never the backbone."""

from mpt_lightning.checkpoint.format import KEY, PromptCheckpoint
from mpt_lightning.checkpoint.peft import import_peft
from mpt_lightning.checkpoint.read import read_checkpoint

__all__ = ["KEY", "PromptCheckpoint", "import_peft", "read_checkpoint"]
