"""Prompts and rows in one pass: `[prompt 1, ..., prompt U, row 1, ..., row B]` as one sequence.

Everything except attention treats tokens one by one, so one pass over a long sequence replaces two passes, prompts and
then rows on top of their keys and values. Only attention separates them: prompts attend to themselves, rows to their
prompt and themselves.
"""

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv

from mpt_lightning.backbones.base import Backbone, BackboneOutput
from mpt_lightning.backbones.cache import gather_rows
from mpt_lightning.objectives import Segment


@dataclass
class Layout:
    """The positions of U prompts of P tokens and B rows of S tokens in the sequence of a packed pass.

    Attributes:
        rows: `[B]` each row's prompt, in 0..U-1.
        bias: `[B / G, 1, G·S, P + G·S]`, added to attention scores: 0, or the lowest number for masked tokens.
        group: G, the number of rows that share one copy of their prompt's keys and values.
    """

    prompts: int
    length: int
    rows: Tensor
    bias: Tensor
    group: int

    @property
    def start(self) -> int:
        """The position of the first row."""
        return self.prompts * self.length

    def split(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Split states `[1, U·P + B·S, H]` into prompts `[U, P, H]` and rows `[B, S, H]`."""
        of_prompts, of_rows = states[0, : self.start], states[0, self.start :]
        return of_prompts.unflatten(0, (self.prompts, -1)), of_rows.unflatten(0, (len(self.rows), -1))


# The layout of the packed pass that is running, if any.
LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)


def group_size(prompts: int, length: int, rows: int, tokens: int) -> int:
    """Return G, the number of rows that share one copy of their prompt's keys and values; it divides `rows`, B.

    Attention between the rows of a group is masked, which costs time. Of 1, 2, 4, ... the largest group with at most a
    fifth of the prompt's tokens was the fastest on a CPU (P from 100 to 800, rows of S = 32 and 40 tokens). Rows of
    different prompts form no groups.
    """
    group = 1
    while prompts == 1 and rows % (2 * group) == 0 and 2 * group * tokens * 5 <= 1.1 * length:
        group *= 2
    return group


def row_bias(prompt_mask: Tensor, mask: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """Return a layout's `bias`, given the masks `[B, P]` of the prompts' tokens and `[B, S]` of the rows' tokens."""
    size, tokens = mask.shape
    ahead = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).triu(1)
    of_prompt = (prompt_mask == 0)[:, None].expand(-1, tokens, -1).unflatten(0, (-1, group)).flatten(1, 2)
    own = ((mask == 0)[:, None] | ahead).unflatten(0, (-1, group))
    among = own.new_ones(size // group, group, tokens, group, tokens)
    for row in range(group):
        among[:, row, :, row] = own[:, row]
    hidden = torch.cat([of_prompt, among.flatten(3, 4).flatten(1, 2)], dim=2)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=mask.device)
    return bias.masked_fill_(hidden, torch.finfo(dtype).min)[:, None]


def packed_attention(
    layout: Layout, module: Any, query: Tensor, key: Tensor, value: Tensor, *, dropout: float, scaling: float | None
) -> Tensor:
    """Attend within a packed sequence, `[1, heads, U·P + B·S, D]`; see `shared_prefix_attention`."""
    groups = getattr(module, "num_key_value_groups", 1)
    options: dict[str, Any] = {"dropout_p": dropout, "scale": scaling}
    start, size = layout.start, len(layout.rows) // layout.group
    of_group = layout.rows[:: layout.group]

    def of_prompts(states: Tensor) -> Tensor:
        return states[0, :, :start].unflatten(1, (layout.prompts, -1)).transpose(0, 1)

    def of_rows(states: Tensor) -> Tensor:
        return states[0, :, start:].unflatten(1, (size, -1)).transpose(0, 1)

    keys, values = of_prompts(key), of_prompts(value)
    prompts = functional.scaled_dot_product_attention(
        of_prompts(query), repeat_kv(keys, groups), repeat_kv(values, groups), is_causal=True, **options
    )
    seen_keys, seen_values = (
        repeat_kv(torch.cat([gather_rows(prefix, of_group), of_rows(own)], dim=2), groups)
        for prefix, own in ((keys, key), (values, value))
    )
    rows = functional.scaled_dot_product_attention(
        of_rows(query), seen_keys, seen_values, attn_mask=layout.bias, **options
    )
    joined = [states.transpose(1, 2).flatten(0, 1) for states in (prompts, rows)]  # [tokens, heads, D]
    return torch.cat(joined)[None]


def packed_forward(
    backbone: Backbone,
    prompts: Tensor,
    rows: Tensor,
    tokens: Tensor,
    mask: Tensor,
    *,
    predicted: int,
    hidden_states: bool,
    prompt_mask: Tensor | None,
    predict_at: Tensor | None,
) -> BackboneOutput:
    """Run prompts `[U, P, H]` and rows of tokens `[B, S]`, texts and answers, of a decoder-only model in one pass.

    The model must use `shared_prefix_attention`, and take position ids. Logits are those of the last `predicted`
    columns. See `CausalBackbone.forward` for the other arguments.
    """
    (count, length), (size, width) = prompts.shape[:2], tokens.shape
    seen = mask.new_ones(size, length) if prompt_mask is None else prompt_mask
    group = group_size(count, length, size, width)
    layout = Layout(count, length, rows, row_bias(seen, mask, backbone.dtype, group), group)
    own = torch.arange(length, device=rows.device).repeat(count)
    positions = torch.cat([own, (length + mask.cumsum(dim=1) - 1).clamp(min=0).flatten()])[None]
    embeds = torch.cat([prompts.to(backbone.dtype).flatten(0, 1), backbone.embed(tokens).flatten(0, 1)])[None]
    ends = layout.start + torch.arange(size, device=rows.device)[:, None] * width
    keep = (ends + torch.arange(width - predicted, width, device=rows.device)).flatten()
    if predict_at is not None:
        starts = torch.arange(count, device=rows.device)[:, None] * length
        keep = torch.cat([(starts + predict_at).flatten(), keep])
    token = LAYOUT.set(layout)
    try:
        output = backbone.model(
            inputs_embeds=embeds,
            position_ids=positions,
            use_cache=False,
            logits_to_keep=keep,
            output_hidden_states=hidden_states,
            return_dict=True,
        )
    finally:
        LAYOUT.reset(token)
    asked = len(keep) - size * predicted
    logits = output.logits[0, asked:].unflatten(0, (size, predicted))
    of_prompts = None if predict_at is None else output.logits[0, :asked].unflatten(0, (count, -1))
    result = BackboneOutput(logits, prompt_logits=of_prompts)
    if hidden_states:
        both = [layout.split(states) for states in output.hidden_states[1:]]
        shared_by = torch.bincount(rows, minlength=count)[:, None].expand(-1, length)
        result.hidden = {
            "decoder/prompt": Segment(tuple(pair[0] for pair in both), shared_by),
            "decoder/text": Segment(tuple(pair[1] for pair in both), mask),
        }
    return result
