"""Comparison of a backbone with its bare model, which runs one row of embeddings at a time."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpt_lightning.backbones import Backbone


def assert_equals_bare_model(
    backbone: Backbone, prompts: Any, wholes: Sequence[Tensor], rows: Tensor, ids: Tensor, mask: Tensor, labels: Tensor
) -> Tensor:
    """Assert that forward, ranking and generation equal the bare model on `wholes`, each `[1, S, H]`; return logits."""
    model, seq2seq, written = backbone.model, backbone.family == "seq2seq", []
    options = {} if seq2seq else {"eos_token_id": -1}
    logits = backbone(prompts, rows, ids, mask, labels).logits
    for row, whole in enumerate(wholes):
        answer = labels[row : row + 1]
        made = model.generate(inputs_embeds=whole, max_new_tokens=3, **options)[0]
        if seq2seq:
            expected, made = model(inputs_embeds=whole, labels=answer).logits[0], made[1:]
        else:
            both = torch.cat([whole, model.get_input_embeddings()(answer)], dim=1)
            expected = model(inputs_embeds=both).logits[0, -3:-1]
        torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)
        written.append(made.tolist())
    with torch.no_grad():
        encoded = backbone.encode_prompts(prompts)
        scores = backbone.score(encoded, rows, ids, mask, labels[:, None])
        expected = -torch.nn.functional.cross_entropy(logits.mT, labels, reduction="none").sum(dim=1)
        torch.testing.assert_close(scores[:, 0], expected.to(scores.dtype), rtol=1e-6, atol=1e-6)
        made = backbone.generate(encoded, rows, ids, mask, max_new_tokens=3, do_sample=False, **options)
    assert made.tolist() == written
    return logits
