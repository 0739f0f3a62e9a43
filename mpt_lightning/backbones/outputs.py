"""The outputs of a backbone: predictions, and encoded prompts."""

from dataclasses import dataclass, field

from torch import Tensor

from mpt_lightning.objectives import Segment
from mpt_lightning.prompts import PromptOutput


@dataclass
class BackboneOutput:
    """The result of a forward pass.

    Attributes:
        logits: `[B, M, V]`, position m predicts label token m.
        hidden: Hidden states by "<stack>/<part>": encoder/prompt, encoder/text and decoder/text of an
            encoder-decoder, decoder/prompt and decoder/text of a decoder-only model. Empty unless requested.
        prompt_logits: `[U, N, V]` at the requested positions of the prompts, or None.
    """

    logits: Tensor
    hidden: dict[str, Segment] = field(default_factory=dict)
    prompt_logits: Tensor | None = None


@dataclass
class EncodedPrompts(PromptOutput):
    """Prompts after a pass through a decoder-only model, with the keys and values of all layers.

    Attributes:
        hidden: Per layer the hidden states `[U, P, H]`; empty if the prompts were keys and values.
        logits: `[U, N, V]` at the requested positions, or None.
    """

    hidden: tuple[Tensor, ...] = ()
    logits: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "EncodedPrompts":
        """Return some of the prompts, in the order of `rows` `[N]` in 0..U-1, without their logits."""
        part = super().__getitem__(rows)
        hidden = tuple(states[rows] for states in self.hidden)
        return EncodedPrompts(part.embeddings, part.layers, part.shift, hidden)
