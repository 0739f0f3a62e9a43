"""Masked models: segments, positions, places of the prompt, rows that are refused, precision, and fast paths."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from mpt_lightning.backbones import MaskedBackbone
from mpt_lightning.backbones.load import wrap_model
from mpt_lightning.backbones.sharding import shard
from mpt_lightning.data.formats import MaskedFormat
from mpt_lightning.errors import MPTError
from mpt_lightning.objectives import IGNORE, token_cross_entropy
from tests.backbones.architectures import build_tiny
from tests.backbones.masked import (
    ANSWERS,
    ATTENTION,
    CLS,
    IDS,
    LABELS,
    LOCAL,
    MASK,
    PAD,
    PROMPTS,
    ROWS,
    TEXTS,
    ByHand,
    assert_equal,
    build_tokenizer,
    text,
    wrap,
)

COUNTED = LABELS != IGNORE


@contextmanager
def arguments(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Collect the keyword arguments of a module's calls; positional ones by their number."""
    calls: list[dict[str, Any]] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append({str(number): value for number, value in enumerate(args)} | kwargs)

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield calls
    finally:
        handle.remove()


def train(backbone: MaskedBackbone) -> tuple[Tensor, Tensor]:
    """Return the logits of label tokens and the prompts' gradient of a training pass."""
    prompts = backbone.embeddings.detach()[PROMPTS].clone().requires_grad_()
    logits = backbone.train()(prompts, ROWS, IDS, ATTENTION, LABELS).logits
    token_cross_entropy(logits, LABELS).backward()
    assert prompts.grad is not None
    return logits.detach()[COUNTED], prompts.grad


@pytest.mark.parametrize("second_type", [1, 0])
def test_segments_are_those_of_the_tokenizers_pairs(second_type: int) -> None:
    backbone = wrap("bert")
    backbone.tokenizer = build_tokenizer(second_type)
    (ids,) = MaskedFormat(backbone.tokenizer).inputs(["12 13 [SEP] 14 [MASK] 15"])
    pair = backbone.tokenizer("12 13", "14 [MASK] 15", return_token_type_ids=True)
    assert ids == pair["input_ids"]
    inputs = (backbone.embed(PROMPTS[:1]), torch.tensor([0]), torch.tensor([ids]), torch.ones(1, len(ids)).long())
    with arguments(backbone.model) as calls:
        backbone(*inputs, torch.tensor([[7, 9]]))
    # Four prompt tokens after [CLS], and one more mask.
    expected = [0] * 4 + pair["token_type_ids"] + [second_type]
    assert calls[0].get("token_type_ids", torch.zeros(1, len(expected))).tolist() == [expected]


def test_roberta_has_512_positions_of_514() -> None:
    backbone = wrap_model(build_tiny("roberta", "masked", max_position_embeddings=514, pad_token_id=1), "r").eval()
    assert backbone.max_positions == 512
    backbone.tokenizer = build_tokenizer()
    for length in (508, 509):
        ids, labels = text(length, 500, 300, 0)[None], torch.tensor([[7]])
        # Columns of padding alone take no positions.
        ids = torch.cat([ids, torch.full((1, 9), PAD)], dim=1)
        inputs = (backbone.embed(PROMPTS[:1]), torch.tensor([0]), ids, (torch.arange(length + 9) < length).long()[None])
        if length == 508:
            assert backbone(*inputs, labels).logits.isfinite().all()
        else:
            with pytest.raises(MPTError, match=r"The prompt and text take 513 positions, and r has 512\. Use"):
                backbone(*inputs, labels)


@pytest.mark.parametrize(("kind", "limit"), [("longrope", 32), ("dynamic", 96)])
def test_rotations_that_change_with_length_are_limited(kind: str, limit: int) -> None:
    rope = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 32}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {}
    backbone = wrap("modernbert", rope_scaling=rope | factors)
    assert backbone.max_positions == limit


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_rows_with_and_without_places_for_the_prompt(kind: str) -> None:
    """A batch may mix tasks whose templates place the prompt with others."""
    backbone = wrap(kind)
    ids, mask = IDS.clone(), ATTENTION
    ids[1, 5:9] = torch.tensor([-1, -2, -3, -4])
    inputs = (backbone.embed(PROMPTS), ROWS, ids, mask)
    mixed = backbone(*inputs, LABELS).logits
    for row in range(5):
        alone = backbone(inputs[0], *(tensor[row : row + 1] for tensor in (*inputs[1:], LABELS))).logits
        assert_equal(mixed[row][COUNTED[row]], alone[0][COUNTED[row]])
    ids[1, 8] = 7
    with pytest.raises(MPTError, match=r"places for 3 prompt tokens .*, expected 4, the prompt's"):
        backbone(*inputs, LABELS)


@pytest.mark.parametrize("layers", ["sliding_attention", None])
@pytest.mark.parametrize("length", [3, 8, 20, 50, 92])
def test_every_prompt_token_reaches_any_mask_of_modernbert(length: int, layers: str | None) -> None:
    """Its layers attend to 4 tokens on either side; the last of them only, or all."""
    backbone = wrap("modernbert", **({"layer_types": [layers] * 4} if layers else {}))
    for place in {1, length // 2, length - 2}:
        ids = text(length, place, length - 1, 0)[None]
        prompts = backbone.embed(PROMPTS[:1]).clone().requires_grad_()
        logits = backbone(prompts, torch.tensor([0]), ids, torch.ones_like(ids), torch.tensor([[7]])).logits
        (gradient,) = torch.autograd.grad(logits[0, 0].log_softmax(0)[7], prompts)
        assert (gradient.norm(dim=2) > 1e-3 * gradient.norm()).all()


def test_the_first_token_stays_cls_and_the_answer_is_at_the_mask() -> None:
    """In PEFT 0.21 prompt tokens stand before [CLS], and its classification head reads the first of them."""
    backbone = wrap("bert")
    with arguments(backbone.model) as calls:
        logits = backbone(backbone.embed(PROMPTS), ROWS, IDS, ATTENTION, LABELS).logits
    embeddings = calls[0]["inputs_embeds"]
    assert torch.equal(embeddings[:, 0], backbone.embed(torch.full_like(ROWS, CLS)))
    assert torch.equal(embeddings[:, 1:5], backbone.embed(PROMPTS[ROWS]))
    assert_equal(logits[COUNTED], ByHand(backbone.model, "bert").all(PROMPTS, ROWS))


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "modernbert", "xlm"])
def test_hidden_states_are_those_of_the_prompt_and_of_the_text(kind: str) -> None:
    backbone = wrap(kind)
    layers = 4 if kind == "modernbert" else 2
    hidden = backbone(backbone.embed(PROMPTS), ROWS, IDS, ATTENTION, LABELS, hidden_states=True).hidden
    of_text, of_prompt = hidden["encoder/text"], hidden["encoder/prompt"]
    assert len(of_text.layers) == len(of_prompt.layers) == layers
    for row, (ids, answer) in enumerate(zip(TEXTS, ANSWERS, strict=True)):
        size, place = len(ids) + len(answer) - 1, int((ids == MASK).nonzero())
        with arguments(backbone.model) as calls, torch.no_grad():
            ByHand(backbone.model, kind).logits(PROMPTS[ROWS[row]], ids, answer)
            states = backbone.model(**calls[0], output_hidden_states=True).hidden_states[1:]
        at = place if kind in LOCAL else 1
        for layer, state in enumerate(states):
            assert_equal(of_prompt.layers[layer][row], state[0, at : at + 4])
            text_states = torch.cat([state[0, :at], state[0, at + 4 :]])
            assert_equal(of_text.layers[layer][row][of_text.weight[row] == 1], text_states)
            assert text_states.shape[0] == size


@pytest.mark.parametrize("kind", ["bert", "modernbert", "deberta-v2"])
def test_the_head_runs_at_masks_only(kind: str) -> None:
    backbone = wrap(kind)
    choices = torch.tensor([[[7, IGNORE], [8, IGNORE], [9, 10]]]).expand(5, -1, -1)
    with arguments(backbone.model.get_output_embeddings()) as calls, torch.no_grad():
        inputs = (backbone.embed(PROMPTS), ROWS, IDS, ATTENTION)
        backbone(*inputs, LABELS)
        backbone.score(*inputs, choices[:, :2, :1])
        backbone.score(*inputs, choices)
    # Rows and masks; the last has one pass for two lengths of each row.
    assert [call["0"].shape[:2] for call in calls] == [(5, 2), (5, 1), (10, 2)]


@pytest.mark.parametrize(("masks", "count"), [([], 0), ([2, 4], 2)])
def test_rows_without_a_single_mask_raise(masks: list[int], count: int) -> None:
    backbone = wrap("bert")
    good = text(7, 3, 5, 0)
    bad = good.where(good != MASK, 50).index_fill(0, torch.tensor(masks, dtype=torch.long), MASK)
    inputs = (backbone.embed(PROMPTS[:1]), torch.tensor([0, 0]), torch.stack([good, bad]), torch.ones(2, 7).long())
    labels = torch.tensor([[7], [8]])
    message = f"Row 1 of the batch has {count} masks, and a masked language model answers at one. Change the template"
    for run in (lambda: backbone(*inputs, labels), lambda: backbone.score(*inputs, labels[:, None])):
        with pytest.raises(MPTError, match=message):
            run()
    # A mask that is padding is none.
    hidden = inputs[3].clone()
    hidden[1, 4] = 0
    if count == 2:
        assert backbone(*inputs[:3], hidden, labels).logits.isfinite().all()


@pytest.mark.parametrize("width", [1, 3])
def test_labels_of_padding_alone_have_no_loss(width: int) -> None:
    backbone, labels = wrap("bert"), torch.full((5, width), IGNORE)
    inputs = (backbone.embed(PROMPTS), ROWS, IDS, ATTENTION)
    logits = backbone(*inputs, labels).logits
    assert logits.shape == (5, width, 120)
    assert token_cross_entropy(logits, labels) == 0
    labels[1, 0] = 7
    mixed = backbone(*inputs, labels).logits[1, 0]
    assert_equal(mixed, backbone(*inputs, labels[:, :1]).logits[1, 0])


@pytest.mark.parametrize("count", [0, 2])
def test_rows_without_choices_have_no_scores(count: int) -> None:
    backbone = wrap("bert")
    scores = backbone.score(backbone.embed(PROMPTS), ROWS, IDS, ATTENTION, torch.full((5, count, 1), IGNORE))
    assert torch.equal(scores, torch.full((5, count), float("-inf")))


def test_generation_raises() -> None:
    with pytest.raises(MPTError, match=r"ranks a task's words and writes no text\. Set `choices`"):
        wrap("bert").generate(PROMPTS, ROWS, IDS, ATTENTION)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra", "deberta-v2", "modernbert"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    expected = train(wrap(kind))
    backbone = wrap_model(build_tiny(kind, "masked"), kind, gradient_checkpointing=True)
    backbone.tokenizer = build_tokenizer()
    for found, value in zip(train(backbone), expected, strict=True):
        assert_equal(found, value)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_half_precision_has_small_errors(kind: str) -> None:
    exact = train(wrap(kind, initializer_range=0.05))
    backbone = wrap_model(build_tiny(kind, "masked", initializer_range=0.05).bfloat16(), kind)
    backbone.tokenizer = build_tokenizer()
    for found, value in zip(train(backbone), exact, strict=True):
        assert (found - value).std() < 0.05 * value.std()
    score = backbone.score(backbone.embed(PROMPTS), ROWS, IDS, ATTENTION, LABELS[:, None])
    assert score.dtype == torch.float32


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Trace without generating machine code."""
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_with(self, backend="eager", **options))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
@pytest.mark.usefixtures("eager")
def test_compiled_parts_change_nothing(kind: str) -> None:
    expected = train(wrap(kind))
    backbone = wrap_model(build_tiny(kind, "masked"), kind, check=False, compiled=True)
    assert isinstance(backbone, MaskedBackbone)
    backbone.tokenizer = build_tokenizer()
    for found, value in zip(train(backbone), expected, strict=True):
        assert_equal(found, value)


@pytest.fixture
def mesh(tmp_path) -> Iterator[Any]:
    """Yield a mesh of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_a_sharded_model_changes_nothing(mesh: Any) -> None:
    backbone = wrap("bert")
    expected = train(backbone)
    inputs = (backbone.embed(PROMPTS).detach(), ROWS, IDS, ATTENTION)
    score = backbone.score(*inputs, LABELS[:, None])
    shard(backbone, mesh)
    for found, value in zip(train(backbone), expected, strict=True):
        assert_equal(found, value)
    assert_equal(backbone.score(*inputs, LABELS[:, None]), score)
