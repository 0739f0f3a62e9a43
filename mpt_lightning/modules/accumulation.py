"""The mean of the loss over an optimizer step, whose rows may be in several micro-batches on several ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor


class StepMean:
    """Weighs the batches of an optimizer step by their label tokens, so that each token of the step counts once.

    The loss of a batch is a mean over its label tokens. A mean of these means would weigh a token more in a batch of
    few tokens. Instead the loss of a batch is weighted by the batch's share of all tokens so far, and the gradients of
    the batches before it by theirs. So `.grad` is at any time the gradient of the mean over all tokens so far, and
    after DDP's average over ranks that of the whole step.

    Usage, for each batch: `add`, scale the gradients by `kept` unless it is None, multiply the loss by `share`, and
    `backward`. A new step begins with a new object. The host never waits for the device here.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # [1 + K], the label tokens so far, and over them the sum of each of K terms
        self.share: Tensor | float = 1.0  # of the last batch in all tokens so far
        self.kept: Tensor | None = None  # of all batches before it

    def add(self, terms: Mapping[str, Tensor], tokens: Tensor, last: bool, ranks: int) -> dict[str, Tensor]:
        """Add a batch, and return its terms as means over the step's tokens so far; NaN if a whole step has none.

        `terms` are K scalars, each a mean over the batch's label tokens, with the same names in all batches of a step;
        `tokens` is the number of these tokens, a scalar. With the `last` batch of a step all ranks add up their 1 + K
        sums, so that the result is over their tokens too.
        """
        values = torch.stack([torch.ones_like(terms["loss"]), *terms.values()]).detach()
        tokens = tokens.to(values.dtype)
        before, sums = self._sums, values * tokens
        if before is not None:
            sums = sums + before
        self._sums = sums
        if last and ranks > 1:
            torch.distributed.all_reduce(sums)
        # The first batches of a step may have no label token, the whole step may not.
        count = sums[0] if last else sums[0].clamp(min=torch.finfo(sums.dtype).tiny)
        total = count / ranks if last else count  # DDP divides the sum of the ranks' gradients by their number
        self.share = tokens / total
        self.kept = None if before is None else before[0] / total
        return dict(zip(terms, (sums[1:] / count).unbind(), strict=True))
