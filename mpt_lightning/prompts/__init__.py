"""What is trained: plain `nn.Module`s, task ids in, `PromptOutput` out.

Notation used everywhere in the package: **B** rows, **L** input tokens, **M** label tokens, **P** prompt length,
**H** hidden size, **T** tasks, **U** distinct tasks in a batch, **R** rank, **V** vocabulary, **C** choices.
"""

from mpt_lightning.prompts.base import Prompt, PromptOutput
from mpt_lightning.prompts.classifier import ClassifierPrompt
from mpt_lightning.prompts.context import ContextPrompt
from mpt_lightning.prompts.decomposed import DecomposedPrompt
from mpt_lightning.prompts.encoded import EncodedPrompt
from mpt_lightning.prompts.multitask import MultitaskPrompt
from mpt_lightning.prompts.prefix import PrefixPrompt
from mpt_lightning.prompts.soft import EmptyPrompt, SoftPrompt
from mpt_lightning.prompts.superposed import SuperposedPrompt

__all__ = [
    "ClassifierPrompt",
    "ContextPrompt",
    "DecomposedPrompt",
    "EmptyPrompt",
    "EncodedPrompt",
    "MultitaskPrompt",
    "PrefixPrompt",
    "Prompt",
    "PromptOutput",
    "SoftPrompt",
    "SuperposedPrompt",
]
