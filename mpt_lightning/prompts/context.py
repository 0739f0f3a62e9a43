"""Context-aware prompt tuning (Blau et al., 2024): a context of examples whose embeddings move within small balls."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.prompts.base import PromptOutput, TokenPrompt

Trained = Literal["inputs", "all", "instruction", "nothing"]
EpsilonScale = Literal["width", "embedding"]

# The token type of a free instruction in front of the context.
INSTRUCTION = -1
# The hidden size at which epsilons are not scaled (`peft/tuners/cpt/model.py`).
REFERENCE_WIDTH = 2048


class ContextPrompt(TokenPrompt):
    r"""A context of training examples: its frozen embeddings plus a trained, bounded perturbation `[P, H]`.

    Token types are PEFT's. For the example k, counted from 0: 4k+1 is its input template, 4k+2 its input, 4k+3 its
    output template, 4k+4 its label. 0 separates examples. -1 is our extension: a free instruction before them.

    After an optimizer step `project` pulls each token's perturbation back into its L2 ball. The centre of a ball is the
    backbone's embedding of the token, read from the backbone and never saved, so it cannot move. `forward` does not
    project.

    Args:
        token_ids: [P] the context.
        token_types: [P] as above.
        dim: H.
        tasks: [1] the task's name.
        trained: Which tokens move. "inputs" is CPT: inputs and templates, not labels and separators. "all" is prompt
            tuning that starts from the context, "instruction" is instruction prompt tuning (Singhal et al., 2022),
            "nothing" is in-context learning.
        epsilon: Radius of an input token's ball, times sqrt(H / 2048); None is no bound. With "all" it is the radius of
            labels too.
        template_epsilon: The same for template tokens, separators and the instruction.
        epsilon_scale: "width" as above; with "embedding" the epsilons are relative to the norm of a token's embedding.

    Raises:
        MPTError: If there are no tokens, the lengths differ, a type is below -1, a label comes first, or an epsilon is
            not above 0.

    Example:
        >>> prompt = ContextPrompt([5, 6, 7, 2], [1, 2, 4, 0], dim=8)
        >>> prompt.attach(torch.randn(10, 8))
        >>> prompt(torch.tensor([0])).embeddings.shape
        torch.Size([1, 4, 8])
    """

    moves: Tensor
    radius: Tensor
    label_positions: Tensor
    label_ids: Tensor
    label_distances: Tensor
    examples: Tensor

    def __init__(
        self,
        token_ids: Sequence[int],
        token_types: Sequence[int],
        dim: int,
        tasks: Sequence[str] | None = None,
        trained: Trained = "inputs",
        epsilon: float | None = 0.2,
        template_epsilon: float | None = 0.1,
        epsilon_scale: EpsilonScale = "width",
    ) -> None:
        super().__init__(1, len(token_ids), dim, tasks)
        _check_types(token_ids, token_types)
        for name, value in (("epsilon", epsilon), ("template_epsilon", template_epsilon)):
            if value is not None and not value > 0:
                raise MPTError(f"{name} must be above 0, or none for no bound; got {value}.")
        self.token_ids, self.token_types = list(token_ids), list(token_types)
        self.trained, self.epsilon_scale = trained, epsilon_scale
        self.epsilon, self.template_epsilon = epsilon, template_epsilon
        # Computed on the CPU: sizes depend on values, which tensors on the meta device do not have.
        types, ids = torch.tensor(self.token_types, device="cpu"), torch.tensor(self.token_ids, device="cpu")
        is_label = (types > 0) & (types % 4 == 0)
        moves = {
            "inputs": (types > 0) & ~is_label,
            "all": torch.ones_like(is_label),
            "instruction": types == INSTRUCTION,
            "nothing": torch.zeros_like(is_label),
        }[trained]
        self.delta_embedding = nn.Parameter(torch.zeros(self.length, dim), requires_grad=trained != "nothing")
        # A factor of the forward pass, because copies would lose a gradient hook. Nothing of this is saved: all of it
        # follows from the constructor's arguments and the backbone.
        self._hold("moves", moves[:, None].to(torch.get_default_dtype()))
        self._hold("embeddings", torch.zeros(self.length, dim))
        self._hold("radius", torch.zeros(self.length, 1))
        examples = torch.where(types > 0, (types - 1) // 4, -1)
        self._hold("examples", examples)
        self._hold("label_positions", is_label.nonzero()[:, 0])
        self._hold("label_ids", ids[is_label])
        self._hold("label_distances", (examples.max() + 1 - examples)[is_label])

    def _hold(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value.to(self.delta_embedding.device), persistent=False)

    @property
    def num_examples(self) -> int:
        """The number of examples in the context."""
        return int(self.examples.max()) + 1

    def attach(self, embeddings: Tensor) -> None:
        """Copy the context's embeddings, the centres of the balls, from the backbone's table `[V, H]`."""
        super().attach(embeddings)
        centre = self.embeddings
        kinds = torch.tensor([kind > 0 and kind % 4 in (0, 2) for kind in self.token_types], device=centre.device)
        input_bound, template_bound = (
            torch.tensor(float("inf") if bound is None else bound).to(centre)
            for bound in (self.epsilon, self.template_epsilon)
        )
        radius = torch.where(kinds, input_bound, template_bound)[:, None]
        scale = (self.dim / REFERENCE_WIDTH) ** 0.5
        self.radius.copy_(radius * (scale if self.epsilon_scale == "width" else centre.norm(dim=1, keepdim=True)))

    def forward(self, task_ids: Tensor) -> PromptOutput:
        """Return the context `[U, P, H]`, U times the same one."""
        return PromptOutput((self.attached() + self.delta_embedding * self.moves).expand(len(task_ids), -1, -1))

    @torch.no_grad()
    def project(self) -> None:
        """Pull each perturbation back into its ball, in place, after an optimizer step (CPT section 3)."""
        norm = torch.linalg.vector_norm(self.delta_embedding, dim=1, keepdim=True)
        # Within the ball the factor is exactly 1; an infinite radius never binds.
        self.delta_embedding.mul_(torch.where(norm > self.radius, self.radius / norm, 1.0))

    def visible(self, examples: Tensor) -> Tensor:
        """Return the mask `[B, P]` of the tokens that rows attend to if their own copies are hidden (leave-one-out).

        `examples` `[B]` are the context examples that the rows are copies of, -1 for none.
        """
        own = (self.examples[None] == examples[:, None]) & (examples[:, None] >= 0)
        return (~own).long()

    def add_task(self, task: str, like: str | None = None) -> None:
        """Raise an `MPTError`: a context belongs to one task."""
        raise MPTError(f"A context belongs to one task ({self.tasks[0]}); train another one for {task!r}.")


def _check_types(token_ids: Sequence[int], token_types: Sequence[int]) -> None:
    if len(token_types) != len(token_ids):
        raise MPTError(f"A context needs one type per token: got {len(token_ids)} ids, {len(token_types)} types.")
    if min(token_types) < INSTRUCTION:
        raise MPTError(f"Token types are {INSTRUCTION}, 0 or above; got {min(token_types)}.")
    if token_types[0] > 0 and token_types[0] % 4 == 0:
        raise MPTError("The context starts with a label, which no token predicts. Start with an input or a template.")
