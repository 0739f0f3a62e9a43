"""Prefixes in every layer of masked models, compared with a layer-by-layer forward pass of BERT."""

import pytest
import torch
from torch import Tensor
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    BertConfig,
    DebertaV2Config,
    DistilBertConfig,
    ModernBertConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from mpt_lightning.backbones.load import wrap_model
from mpt_lightning.backbones.masked import MaskedBackbone
from mpt_lightning.errors import MPTError
from mpt_lightning.prompts import PromptOutput

SIZES = {"vocab_size": 60, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 0}
WIDE = SIZES | {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**WIDE),
    "roberta": RobertaConfig(**WIDE | {"pad_token_id": 1}),
    "distilbert": DistilBertConfig(**SIZES, dim=32, n_layers=3, n_heads=4, hidden_dim=48),
    # A window of four tokens on each side in every layer but the first.
    "modernbert": ModernBertConfig(
        **WIDE, local_attention=8, global_attn_every_n_layers=3, cls_token_id=1, sep_token_id=2, bos_token_id=1,
        eos_token_id=2,
    ),
}  # fmt: skip
MASK, LENGTH = 5, 4


def build(config: PreTrainedConfig) -> MaskedBackbone:
    torch.manual_seed(0)
    backbone = wrap_model(AutoModelForMaskedLM.from_config(config).eval().double(), config.model_type)
    assert isinstance(backbone, MaskedBackbone)
    backbone._stand_in = MASK
    return backbone


@pytest.fixture(params=CONFIGS)
def backbone(request: pytest.FixtureRequest) -> MaskedBackbone:
    return build(CONFIGS[request.param])


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Return two rows of different lengths, `[CLS] text [MASK] ... [SEP]`, with one label each."""
    ids = torch.tensor([[9, 17, 18, 19, MASK, 21, 2], [9, 31, MASK, 2, 0, 0, 0]])
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return ids, mask, torch.tensor([[11], [12]])


def prefixes(backbone: MaskedBackbone, count: int = 2) -> PromptOutput:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(count, LENGTH, backbone.dim, generator=generator, dtype=torch.float64)
    pairs = [backbone.keys_and_values(one[None]) for one in embeddings]
    layers = zip(*pairs, strict=True)
    return PromptOutput(
        layers=tuple((torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in layers)
    )


def bert_with_prefix(backbone: MaskedBackbone, ids: Tensor, layers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return BERT's logits `[S, V]` of one row `[S]`, with keys and values `[heads, P, D]` before each layer's own."""
    model = backbone.model
    hidden = model.bert.embeddings(input_ids=ids[None])
    for layer, (keys, values) in zip(model.bert.encoder.layer, layers, strict=True):
        own = layer.attention.self

        def split(states: Tensor, heads: int = len(keys)) -> Tensor:
            return states[0].unflatten(1, (heads, -1)).transpose(0, 1)

        query, key, value = split(own.query(hidden)), split(own.key(hidden)), split(own.value(hidden))
        scores = query @ torch.cat([keys, key], dim=1).transpose(1, 2) / key.shape[2] ** 0.5
        mixed = scores.softmax(dim=2) @ torch.cat([values, value], dim=1)
        attended = layer.attention.output(mixed.transpose(0, 1).flatten(1)[None], hidden)
        hidden = layer.output(layer.intermediate(attended), attended)
    return model.cls(hidden)[0]


def test_logits_and_gradients_equal_a_pass_layer_by_layer() -> None:
    backbone = build(CONFIGS["bert"])
    ids, mask, labels = rows()
    layers = [(k.requires_grad_(), v.requires_grad_()) for k, v in prefixes(backbone).layers]
    order = torch.tensor([1, 0])
    logits = backbone(PromptOutput(layers=tuple(layers)), order, ids, mask, labels).logits
    expected = torch.stack(
        [
            bert_with_prefix(backbone, ids[row, : int(mask[row].sum())], [(k[of], v[of]) for k, v in layers])[
                (ids[row] == MASK).nonzero()[0, 0]
            ]
            for row, of in enumerate(order.tolist())
        ]
    )
    torch.testing.assert_close(logits[:, 0], expected, rtol=0, atol=1e-10)
    tensors = [states for pair in layers for states in pair]
    ours = torch.autograd.grad(logits.logsumexp(2).sum(), tensors)
    theirs = torch.autograd.grad(expected.logsumexp(1).sum(), tensors)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-10)


def test_padding_and_company_change_nothing(backbone: MaskedBackbone) -> None:
    ids, mask, labels = rows()
    given = prefixes(backbone)
    logits = backbone(given, torch.tensor([0, 1]), ids, mask, labels).logits
    left = torch.tensor([[9, 17, 18, 19, MASK, 21, 2], [0, 0, 0, 9, 31, MASK, 2]])
    other = backbone(given, torch.tensor([0, 1]), left, (left != 0).long(), labels).logits
    torch.testing.assert_close(other, logits, rtol=0, atol=1e-10)
    alone = backbone(given[torch.tensor([1])], torch.tensor([0]), ids[1:, :4], mask[1:, :4], labels[1:]).logits
    torch.testing.assert_close(alone[0], logits[1], rtol=0, atol=1e-10)


def test_each_key_and_value_has_an_effect_at_any_length(backbone: MaskedBackbone) -> None:
    for size in (4, 20, 40):
        ids = torch.full((1, size), 17)
        ids[0, 0], ids[0, -1], ids[0, size // 2] = 9, 2, MASK
        given = prefixes(backbone, 1)
        tensors = [states.requires_grad_() for pair in given.layers for states in pair]
        logits = backbone(given, torch.tensor([0]), ids, torch.ones_like(ids), torch.tensor([[3]])).logits
        for gradient in torch.autograd.grad(logits.square().sum(), tensors):
            assert (gradient.abs().amax(dim=(0, 1, 3)) > 0).all()  # of each of the P tokens


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (AlbertConfig(**WIDE, embedding_size=16), "its layers share one set of weights"),
        (DebertaV2Config(**WIDE), "its attention takes no keys and values"),
    ],
)
def test_models_without_prefixes_raise(config: PreTrainedConfig, reason: str) -> None:
    backbone = build(config)
    with pytest.raises(MPTError, match=reason):
        backbone.keys_and_values(torch.zeros(1, 2, backbone.dim, dtype=torch.float64))


def test_gradient_checkpointing_raises() -> None:
    backbone = build(CONFIGS["bert"])
    given = prefixes(backbone)
    backbone.gradient_checkpointing = True
    with pytest.raises(MPTError, match="gradient_checkpointing false"):
        backbone(given, torch.tensor([0, 1]), *rows())
