"""Masked language models (BERT, RoBERTa, ModernBERT, ...): the prompt follows [CLS], the answer is read at [MASK].

Everything here holds for any `AutoModelForMaskedLM` that takes `inputs_embeds` and whose head reads one position at a
time. The check at load time (`probe`) compares each model with its own results, so that another model of the family
needs no code.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForMaskedLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from mpt_lightning.backbones.base import Backbone, BackboneOutput, Inputs, align
from mpt_lightning.backbones.limits import attention_windows
from mpt_lightning.errors import MPTError
from mpt_lightning.objectives import IGNORE, Segment, precise
from mpt_lightning.prompts import PromptOutput


class MaskedBackbone(Backbone):
    """A frozen bidirectional encoder with a masked language model's head; see `Backbone` for the arguments.

    Each row begins with [CLS] and has one [MASK]. The model reads `[CLS] prompt text-with-[MASK] [SEP]`; if some of
    its layers attend to a window of neighbours only (ModernBERT), the prompt stands before the mask instead, where all
    layers read it. For an answer of M tokens the mask stands M times. The text after a separator is the second segment
    of models with token types.
    """

    family = "masked"
    auto_model = AutoModelForMaskedLM

    def __init__(self, model: PreTrainedModel, name: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, name, *args, **kwargs)
        self._local = bool(attention_windows(model.config))
        self._segments = getattr(model.config, "type_vocab_size", 0) > 1
        # While the model is checked, the id that stands for [MASK]; the tokenizer may not be there.
        self._stand_in: int | None = None

    @classmethod
    def takes(cls, config: Any) -> bool:
        """Return whether the model is an encoder with a masked language model's head in transformers."""
        kind = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        return kind and not config.is_encoder_decoder and not getattr(config, "is_decoder", False)

    @property
    def mask_id(self) -> int:
        """The id of the mask."""
        if self._stand_in is not None:
            return self._stand_in
        return int(self.tokenizer.mask_token_id)

    @property
    def max_positions(self) -> int | None:
        """The longest sequence, prompt included; RoBERTa's positions begin after its padding id."""
        size = super().max_positions
        for name, module in self.model.named_modules():
            if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and size:
                return size if module.padding_idx is None else module.num_embeddings - module.padding_idx - 1
        return size

    @contextmanager
    def probing(self, texts: list[Tensor], spare: Tensor) -> Iterator[list[Tensor]]:
        """Yield texts that end with a mask, for which the spare id stands."""
        self._stand_in = int(spare)
        try:
            yield [torch.cat([text[:-1], spare[None]]) for text in texts]
        finally:
            self._stand_in = None

    def bare_logits(
        self, inputs: Callable[[Tensor], dict[str, Tensor]], prompt: Tensor, text: Tensor, answer: Tensor
    ) -> Tensor:
        """See `Backbone.bare_logits`."""
        masks = text[:, -1:].expand_as(answer)
        before = [text[:, :-1], prompt] if self._local else [text[:, :1], prompt, text[:, 1:-1]]
        return self.model(**inputs(torch.cat([*before, masks], dim=1))).logits[:, -answer.shape[1] :]

    def _arrange(self, prompts: PromptOutput, inputs: Inputs, masks: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Put the prompt's tokens and further masks into the rows.

        `masks` `[B]` are the numbers of masks that the rows need; None is one each.

        Returns:
            Ids `[B, S]` with -1, -2, ... for the prompt's tokens, their mask `[B, S]`, and the columns `[B, M]` of the
            masks, repeated where a row has fewer.
        """
        ids, mask = align(*inputs[2:], "right")
        found = (ids == self.mask_id) & (mask == 1)
        if not bool((found.sum(dim=1) == 1).all()):
            counts = found.sum(dim=1).tolist()
            row = next(row for row, count in enumerate(counts) if count != 1)
            raise MPTError(
                f"Row {row} of the batch has {counts[row]} masks, and a masked language model answers at one. Change "
                "the template, or texts that contain the tokenizer's mask."
            )
        place = found.int().argmax(dim=1)
        length = prompts.length
        if length and not bool((ids < 0).any()):
            at = place if self._local else torch.ones_like(place)
            ids, mask = insert(ids, mask, at, torch.full_like(place, length), lambda offset: -1 - offset)
            place = place + length
        most = 1
        if masks is not None and (most := int(masks.max())) > 1:
            ids, mask = insert(ids, mask, place, masks - 1, lambda offset: torch.full_like(offset, self.mask_id))
        if self.max_positions is not None and ids.shape[1] > self.max_positions:
            raise MPTError(
                f"The prompt and text take {ids.shape[1]} positions, and {self.name} has {self.max_positions}. Use "
                "shorter texts (max_input_length) or a shorter prompt."
            )
        columns = place[:, None] + torch.arange(most, device=ids.device)
        return ids, mask, columns if masks is None else columns.minimum((place + masks - 1)[:, None])

    def _run(
        self, inputs: Inputs, masks: Tensor | None = None, hidden_states: bool = False
    ) -> tuple[Any, Tensor, Tensor]:
        """Run the model; return its output with logits `[B, M, V]` at the masks, the ids that it read, and their mask.

        See `_arrange` for `masks`.
        """
        prompts, rows = PromptOutput.of(inputs[0]), inputs[1]
        if prompts.embeddings is None:
            raise MPTError(f"{type(self.model).__name__} takes prompts of embeddings, got keys and values.")
        ids, mask, columns = self._arrange(prompts, inputs, masks)
        embeds = self.embed_among(prompts.embeddings, rows, ids) if prompts.length else self.embed(ids)
        if prompts.shift is not None:
            embeds = self.add_shift(embeds, prompts.shift, rows, mask * (ids >= 0))
        options: dict[str, Any] = {}
        if self._segments and self._stand_in is None:
            separators = ids == self.tokenizer.sep_token_id
            before = separators.cumsum(dim=1) - separators.int()
            options["token_type_ids"] = before.clamp(max=1) * mask
        with keep_columns(self.model.base_model, columns):
            output = self.model(
                inputs_embeds=embeds,
                attention_mask=mask,
                output_hidden_states=hidden_states,
                return_dict=True,
                **options,
            )
        return output, ids, mask

    def forward(
        self,
        prompts: Tensor | PromptOutput,
        rows: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        hidden_states: bool = False,
    ) -> BackboneOutput:
        """Predict the label tokens at the masks; see `Backbone.forward`."""
        masks = (labels != IGNORE).sum(dim=1).clamp(min=1) if labels.shape[1] > 1 else None
        output, ids, mask = self._run((prompts, rows, input_ids, attention_mask), masks, hidden_states)
        logits = output.logits
        if logits.shape[1] < labels.shape[1]:  # of labels that are padding in all rows
            logits = functional.pad(logits, (0, 0, 0, labels.shape[1] - logits.shape[1]))
        result = BackboneOutput(logits)
        if hidden_states:
            # The first state is the embedding, before any layer.
            states, text = output.hidden_states[1:], mask * (ids >= 0)
            result.hidden = {"encoder/text": Segment(states, text)}
            length = PromptOutput.of(prompts).length
            columns = (ids < 0).int().argsort(dim=1, descending=True, stable=True)[:, :length]
            index = columns[..., None].expand(-1, -1, states[0].shape[2])
            of_prompt = tuple(state.gather(1, index) for state in states)
            result.hidden["encoder/prompt"] = Segment(of_prompt, torch.ones_like(columns))
        return result

    def _likelihood(self, inputs: Inputs, of_row: Tensor, labels: Tensor) -> Tensor:
        """See `Backbone._likelihood`; rows run once for each number of tokens that choices have."""
        prompts, *own = inputs
        lengths = (labels != IGNORE).sum(dim=1)
        likelihood = torch.zeros(len(labels), device=labels.device)
        for length in lengths.unique().tolist():
            chosen = (lengths == length).nonzero()[:, 0]
            needed, index = of_row[chosen].unique(return_inverse=True)
            part: Any = (prompts, *(tensor[needed] for tensor in own))
            output, _, _ = self._run(part, torch.full_like(needed, length))
            found = functional.log_softmax(precise(output.logits), dim=-1)
            places = torch.arange(length, device=labels.device)
            of_choices = found[index[:, None], places, labels[chosen, :length]].sum(dim=1)
            likelihood = likelihood.to(of_choices.dtype).index_put((chosen,), of_choices)
        return likelihood

    def generate(
        self, prompts: Tensor | PromptOutput, rows: Tensor, input_ids: Tensor, attention_mask: Tensor, **options: Any
    ) -> Tensor:
        """Raise: a masked language model ranks choices, and writes no text."""
        raise MPTError(
            f"{self.name} is a masked language model, which ranks a task's words and writes no text. Set `choices` on "
            "the card, or use an encoder-decoder or a decoder-only backbone."
        )


def insert(
    ids: Tensor, mask: Tensor, at: Tensor, count: Tensor, content: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Insert `count` `[B]` ids before column `at` `[B]` of right-padded rows `[B, L]`, and extend their mask.

    `content` returns the new ids, given their places 0, 1, ... among the new ones.
    """
    width = ids.shape[1] + int(count.max())
    column = torch.arange(width, device=ids.device).expand(len(ids), -1)
    offset = column - at[:, None]
    new = (offset >= 0) & (offset < count[:, None])
    source = column - offset.clamp(min=0).minimum(count[:, None])
    inside = source.clamp(max=ids.shape[1] - 1)
    wider = ids.gather(1, inside), mask.gather(1, inside) * (source < ids.shape[1])
    return torch.where(new, content(offset), wider[0]), torch.where(new, 1, wider[1])


@contextmanager
def keep_columns(encoder: nn.Module, columns: Tensor) -> Iterator[None]:
    """Let the head read the encoder's states `[B, S, H]` at some columns `[B, M]` only: it has V outputs per state."""

    def gather(_module: nn.Module, _inputs: Any, output: Any) -> None:
        index = columns[..., None].expand(-1, -1, output.last_hidden_state.shape[2])
        output.last_hidden_state = output.last_hidden_state.gather(1, index)

    handle = encoder.register_forward_hook(gather)
    try:
        yield
    finally:
        handle.remove()
