"""What a prompt puts before, or adds to, the text of a batch's tasks."""

from dataclasses import dataclass

from torch import Tensor

from mpt_lightning.errors import MPTError


@dataclass
class PromptOutput:
    """The prompts of U tasks.

    Attributes:
        embeddings: `[U, P, H]`, which precede the text's embeddings; None if the prompts are keys and values.
        layers: Per layer the keys and values `[U, heads, P, D]`, which precede the text's; empty if the prompts
            are embeddings.
        shift: `[U, S, H]`, added to the embeddings of the text's first S tokens, or None.
    """

    embeddings: Tensor | None = None
    layers: tuple[tuple[Tensor, Tensor], ...] = ()
    shift: Tensor | None = None

    @classmethod
    def of(cls, prompts: "Tensor | PromptOutput") -> "PromptOutput":
        """Return prompts unchanged, and plain embeddings `[U, P, H]` as an output without anything else."""
        return PromptOutput(prompts) if isinstance(prompts, Tensor) else prompts

    @property
    def length(self) -> int:
        """P, tokens per prompt."""
        if self.layers:
            return self.layers[0][0].shape[2]
        return 0 if self.embeddings is None else self.embeddings.shape[1]

    def __getitem__(self, rows: Tensor) -> "PromptOutput":
        """Return some of the prompts, in the order of `rows` `[N]` in 0..U-1."""
        return PromptOutput(
            None if self.embeddings is None else self.embeddings[rows],
            tuple((keys[rows], values[rows]) for keys, values in self.layers),
            None if self.shift is None else self.shift[rows],
        )

    def embeddings_alone(self) -> Tensor:
        """Return the embeddings `[U, P, H]`.

        Raises:
            MPTError: If they are not all of the output.
        """
        if self.embeddings is None:
            raise MPTError("Expected a prompt of embeddings alone, got keys and values.")
        if self.shift is not None:
            raise MPTError("Expected a prompt of embeddings alone, got one that shifts the text's embeddings too.")
        return self.embeddings
