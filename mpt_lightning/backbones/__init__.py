"""What is frozen: a Hugging Face model behind one small interface."""

from mpt_lightning.backbones.base import Backbone, BackboneOutput, EncodedPrompts
from mpt_lightning.backbones.causal import CausalBackbone
from mpt_lightning.backbones.load import load_backbone
from mpt_lightning.backbones.masked import MaskedBackbone
from mpt_lightning.backbones.seq2seq import Seq2SeqBackbone

__all__ = [
    "Backbone",
    "BackboneOutput",
    "CausalBackbone",
    "EncodedPrompts",
    "MaskedBackbone",
    "Seq2SeqBackbone",
    "load_backbone",
]
