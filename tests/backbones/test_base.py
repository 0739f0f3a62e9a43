"""Results of a backbone depend on neither padding nor the batch; forward, ranking and generation agree."""

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from mpt_lightning import load_backbone
from mpt_lightning.backbones import Backbone, CausalBackbone, Seq2SeqBackbone
from mpt_lightning.backbones.attention import shared_prefix_attention
from mpt_lightning.backbones.base import align
from mpt_lightning.backbones.packed import group_size
from mpt_lightning.objectives import IGNORE, log_likelihood
from tests.conftest import KINDS, VOCABULARY, build_model, make_batch


@pytest.fixture(params=KINDS)
def backbone(request: pytest.FixtureRequest) -> Backbone:
    cls = Seq2SeqBackbone if request.param == "t5" else CausalBackbone
    return cls(build_model(request.param), request.param).double().eval()


@pytest.fixture
def prompts() -> torch.Tensor:
    return torch.randn(3, 4, 32, dtype=torch.double, generator=torch.Generator().manual_seed(2)).requires_grad_()


def run(backbone: Backbone, prompts: torch.Tensor, batch: dict[str, torch.Tensor], **options: object):
    return backbone(prompts, batch["task_ids"], batch["input_ids"], batch["attention_mask"], batch["labels"], **options)


def test_the_family_is_recognised_and_frozen(model_folder: Callable[[str], str]) -> None:
    for kind in KINDS:
        backbone = load_backbone(model_folder(kind))
        assert isinstance(backbone, Seq2SeqBackbone if kind == "t5" else CausalBackbone)
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
        assert backbone.dim == 32


def test_padding_side_does_not_change_a_result(
    backbone: Backbone, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    counted = batch["labels"] != IGNORE
    right = run(backbone, prompts, batch).logits[counted]
    ids, mask = align(batch["input_ids"], batch["attention_mask"], "left")
    left = run(backbone, prompts, batch | {"input_ids": ids, "attention_mask": mask}).logits[counted]
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_batch_composition_does_not_change_a_row(
    backbone: Backbone, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    together = run(backbone, prompts, batch).logits
    for row in range(len(batch["task_ids"])):
        tokens = int(batch["attention_mask"][row].sum())
        labels = batch["labels"][row]
        alone = backbone(
            prompts[batch["task_ids"][row]][None],
            torch.tensor([0]),
            batch["input_ids"][row : row + 1, :tokens],
            batch["attention_mask"][row : row + 1, :tokens],
            labels[labels != IGNORE][None],
        ).logits[0]
        torch.testing.assert_close(together[row][labels != IGNORE], alone, rtol=1e-9, atol=1e-9)


def test_order_of_rows_and_of_prompts_does_not_matter(
    backbone: Backbone, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    counted = batch["labels"] != IGNORE
    plain = run(backbone, prompts, batch).logits
    order, swap = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 1])
    moved = {name: value[order] for name, value in batch.items()}
    moved["task_ids"] = swap.argsort()[moved["task_ids"]]
    permuted = run(backbone, prompts[swap], moved).logits
    torch.testing.assert_close(permuted[counted[order]], plain[order][counted[order]], rtol=1e-9, atol=1e-9)


def test_scores_are_the_likelihoods_of_a_forward_pass(
    backbone: Backbone, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    choices = torch.randint(3, 100, (5, 3, 3), generator=torch.Generator().manual_seed(3))
    choices[0, 1, 1:] = IGNORE
    choices[2, 2] = IGNORE
    scores = backbone.score(prompts, batch["task_ids"], batch["input_ids"], batch["attention_mask"], choices)
    assert scores[2, 2] == float("-inf")
    for choice in range(3):
        exists = (choices[:, choice] != IGNORE).any(dim=1)
        logits = run(backbone, prompts, batch | {"labels": choices[:, choice]}).logits
        for row in exists.nonzero()[:, 0].tolist():
            tokens = choices[row, choice][choices[row, choice] != IGNORE]
            # The sum over a choice's tokens, not their mean.
            expected = logits[row, : len(tokens)].log_softmax(-1).gather(1, tokens[:, None]).sum()
            torch.testing.assert_close(scores[row, choice], expected, rtol=1e-9, atol=1e-9)


def test_generation_is_the_argmax_of_a_forward_pass(
    backbone: Backbone, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    inputs = (batch["task_ids"], batch["input_ids"], batch["attention_mask"])
    backbone.model.generation_config.eos_token_id = None
    with torch.no_grad():
        tokens = backbone.generate(prompts, *inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert tokens.shape == (5, 5)
        assert torch.equal(run(backbone, prompts, batch | {"labels": tokens}).logits.argmax(-1), tokens)
        beams = backbone.generate(prompts, *inputs, max_new_tokens=5, do_sample=False, num_beams=3, pad_token_id=0)

    def likelihood(labels: torch.Tensor) -> torch.Tensor:
        return log_likelihood(run(backbone, prompts, batch | {"labels": labels}).logits, labels)

    assert (likelihood(beams) >= likelihood(tokens) - 1e-9).float().mean() >= 0.8


def test_encoded_prompts_replace_prompts_in_every_method(
    backbone: Backbone, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    encoded = backbone.encode_prompts(prompts)
    for _ in range(2):  # the encoded prompts do not change
        torch.testing.assert_close(run(backbone, encoded, batch).logits, run(backbone, prompts, batch).logits)
    inputs = (batch["task_ids"], batch["input_ids"], batch["attention_mask"])
    choices = batch["labels"][:, None]
    torch.testing.assert_close(
        backbone.score(encoded, *inputs, choices), backbone.score(prompts, *inputs, choices), rtol=1e-9, atol=1e-9
    )
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        assert torch.equal(
            backbone.generate(encoded, *inputs, **options), backbone.generate(prompts, *inputs, **options)
        )


def test_selected_prompts_are_those_encoded_alone(
    backbone: Backbone, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    chosen = torch.tensor([2, 0])
    some = batch | {"task_ids": torch.tensor([0, 1, 1, 0, 1])}
    selected = backbone.encode_prompts(prompts)[chosen]
    ours, theirs = (run(backbone, p, some, hidden_states=True) for p in (selected, prompts[chosen]))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-9, atol=1e-9)
    for key, segment in theirs.hidden.items():
        torch.testing.assert_close(ours.hidden[key].layers, segment.layers, rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_changes_nothing(
    backbone: Backbone, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    counted = batch["labels"] != IGNORE
    (plain,) = torch.autograd.grad(run(backbone, prompts, batch).logits[counted].square().sum(), prompts)
    kept = type(backbone)(backbone.model, "again", gradient_checkpointing=True).train()
    recomputed = 0

    def count(*_: object) -> None:
        nonlocal recomputed
        recomputed += 1

    layers = [m for m in kept.model.modules() if hasattr(m, "gradient_checkpointing") and m.training]
    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    loss = run(kept, prompts, batch).logits[counted].square().sum()
    (checkpointed,) = torch.autograd.grad(loss, prompts)
    for hook in hooks:
        hook.remove()
    assert layers, "no layer was checkpointed"
    torch.testing.assert_close(checkpointed, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_is_off_unless_asked_for(dropout: bool, batch: dict[str, torch.Tensor]) -> None:
    backbone = Seq2SeqBackbone(build_model("t5"), "t5", dropout=dropout).train()
    prompts = torch.randn(3, 4, 32)
    same = torch.equal(run(backbone, prompts, batch).logits, run(backbone, prompts, batch).logits)
    assert same is not dropout
    assert backbone.model.training is dropout


def test_hidden_states_cover_prompt_and_text(
    backbone: Backbone, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    hidden = run(backbone, prompts, batch, hidden_states=True).hidden
    stack = "encoder" if isinstance(backbone, Seq2SeqBackbone) else "decoder"
    # Each row's prompt counts once, whether it is stored per row or per distinct prompt.
    assert hidden[f"{stack}/prompt"].weight.sum() == 5 * 4
    text = int(batch["attention_mask"].sum())
    labels = int((batch["labels"] != IGNORE).sum())
    if stack == "encoder":
        assert hidden["encoder/text"].weight.sum() == text
        assert hidden["decoder/text"].weight.sum() == labels
    else:
        # A row's last label is not an input, also if another answer is longer.
        assert hidden["decoder/text"].weight.sum() == text + labels - len(batch["labels"])
    assert all(len(segment.layers) == 2 for segment in hidden.values())


def test_bfloat16_weights_take_fp32_prompts(model_folder: Callable[[str], str]) -> None:
    for kind in KINDS:
        backbone = load_backbone(model_folder(kind), dtype="bfloat16")
        prompts = torch.randn(3, 4, 32, requires_grad=True)
        run(backbone, prompts, make_batch()).logits.float().sum().backward()
        assert prompts.grad is not None
        assert prompts.grad.dtype == torch.float32
        assert prompts.grad.abs().sum() > 0


def test_likelihoods_of_half_precision_logits_are_precise() -> None:
    logits = 4 * torch.randn(2, 3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.tensor([[3, 7, -100], [49, 0, 1]])
    exact = log_likelihood(logits.double(), labels)
    assert log_likelihood(logits, labels).dtype == torch.float32
    torch.testing.assert_close(log_likelihood(logits, labels).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("name", "message"), [("./no/such/folder", "does not exist"), ("/no/such", "does not exist")])
def test_a_missing_model_raises(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(name)


def sliding(window: int) -> CausalBackbone:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, sliding_window=window,
    )  # fmt: skip
    return CausalBackbone(MistralForCausalLM(config).double(), "sliding").eval()


def test_a_sliding_window_is_exact_or_refused(prompts: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
    """The window counts columns: beyond it, the tokens that a row attends to would depend on padding."""
    wide, narrow = sliding(64), sliding(10)
    assert (wide.max_positions, narrow.max_positions) == (64, 10)
    logits = run(wide, prompts, batch).logits
    embed = wide.model.get_input_embeddings()
    for row, task in enumerate(batch["task_ids"]):
        text, answer = batch["input_ids"][row][batch["attention_mask"][row] == 1], batch["labels"][row]
        answer = answer[answer != IGNORE]
        alone = torch.cat([prompts[task], embed(text), embed(answer)])[None]
        expected = wide.model(inputs_embeds=alone).logits[0, -len(answer) - 1 : -1]
        torch.testing.assert_close(logits[row, : len(answer)], expected, rtol=1e-9, atol=1e-9)
    inputs = (prompts, batch["task_ids"], batch["input_ids"], batch["attention_mask"])
    for method, extra in ((narrow.forward, (batch["labels"],)), (narrow.score, (batch["labels"][:, None],))):
        with pytest.raises(ValueError, match=r"attends to the last 10 only\. Use shorter texts"):
            method(*inputs, *extra)
    with pytest.raises(ValueError, match="attends to the last 10 only"):
        narrow.generate(*inputs, max_new_tokens=2)


def test_a_batch_that_fills_the_window_is_exact(prompts: torch.Tensor, batch: dict[str, torch.Tensor]) -> None:
    """A batch that fills the window equals the bare model's rows; one more column is refused."""
    inputs = (prompts, batch["task_ids"], batch["input_ids"], batch["attention_mask"])
    columns = prompts.shape[1] + batch["input_ids"].shape[1]
    labels = batch["labels"]
    read = columns + labels.shape[1] - 1  # the last label is not an input
    wide, full = sliding(64), sliding(read)
    counted = labels != IGNORE
    expected = wide(*inputs, labels).logits[counted]
    torch.testing.assert_close(full(*inputs, labels).logits[counted], expected, rtol=1e-9, atol=1e-9)
    ranked = wide.score(*inputs, labels[:, None])
    torch.testing.assert_close(full.score(*inputs, labels[:, None]), ranked, rtol=1e-9, atol=1e-9)
    for method, extra in ((sliding(read - 1).forward, labels), (sliding(read - 1).score, labels[:, None])):
        with pytest.raises(ValueError, match=f"attends to the last {read - 1} only"):
            method(*inputs, extra)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": -1}
    made = sliding(columns + 5).generate(*inputs, max_new_tokens=5, **options)
    embed = wide.model.get_input_embeddings()
    for row, task in enumerate(batch["task_ids"]):
        text = batch["input_ids"][row][batch["attention_mask"][row] == 1]
        alone = torch.cat([prompts[task], embed(text)])[None]
        assert made[row].tolist() == wide.model.generate(inputs_embeds=alone, max_new_tokens=5, **options)[0].tolist()
    with pytest.raises(ValueError, match="only"):
        sliding(columns + 5).generate(*inputs, max_new_tokens=7, **options)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_masked_prompt_tokens_are_not_attended(
    kind: str, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    """With a `prompt_mask` a row does not attend to those tokens, whether or not there are gradients."""
    backbone = CausalBackbone(build_model(kind), kind).double().eval()
    batch = batch | {"task_ids": torch.zeros_like(batch["task_ids"])}
    hidden = torch.ones(len(batch["task_ids"]), 4, dtype=torch.long)
    hidden[0, 1:3] = hidden[3, 3] = 0
    with torch.no_grad():
        evaluated = run(backbone, prompts[:1], batch, prompt_mask=hidden).logits
    trained = run(backbone, prompts[:1], batch, prompt_mask=hidden).logits
    embed, places = backbone.model.get_input_embeddings(), torch.arange(20)[None]
    with torch.no_grad():
        prefix = backbone.model(inputs_embeds=prompts[:1], use_cache=True).past_key_values
    for row, mask in enumerate(hidden):
        text, answer = batch["input_ids"][row][batch["attention_mask"][row] == 1], batch["labels"][row]
        answer = answer[answer != IGNORE]
        whole = torch.cat([embed(text), embed(answer)])[None]
        expected = backbone.model(
            inputs_embeds=whole, past_key_values=copy.deepcopy(prefix), position_ids=places[:, 4 : 4 + whole.shape[1]],
            attention_mask=torch.cat([mask, mask.new_ones(whole.shape[1])])[None],
        ).logits[0, -len(answer) - 1 : -1]  # fmt: skip
        for got in (evaluated, trained):
            torch.testing.assert_close(got[row, : len(answer)], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_one_prompt_for_all_rows_is_not_copied(
    kind: str, prompts: torch.Tensor, batch: dict[str, torch.Tensor]
) -> None:
    """Without gradients rows attend to the prompt itself, with gradients to copies of it."""
    backbone = CausalBackbone(build_model(kind), kind).double().eval()
    batch = batch | {"task_ids": torch.zeros_like(batch["task_ids"])}
    choices = torch.stack([batch["labels"], batch["labels"].flip(0)], dim=1)
    inputs = (batch["task_ids"], batch["input_ids"], batch["attention_mask"])
    copied = run(backbone, prompts[:1], batch).logits
    counted = batch["labels"] != IGNORE
    ranked = backbone.score(prompts[:1], *inputs, choices)
    with torch.no_grad():
        encoded = backbone.encode_prompts(prompts[:1])
        assert backbone._prefix(encoded, batch["task_ids"]).shared is encoded.layers
        together = run(backbone, encoded, batch).logits
        torch.testing.assert_close(together[counted], copied[counted], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(backbone.score(encoded, *inputs, choices), ranked, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind_of_mask", ["bool", "float", "none"])
def test_shared_attention_is_plain_attention_over_prefix_and_own(kind_of_mask: str) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 3, 8), torch.randn(2, 2, 3, 8)
    prefix = (torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8))
    seen = torch.ones(2, 1, 3, 8, dtype=torch.bool)
    seen[..., 5:] = torch.ones(3, 3).tril().bool()
    if kind_of_mask != "none":
        seen[1, 0, :, 5] = False  # padding
    whole = [torch.cat([p.expand(2, -1, -1, -1), own], dim=2) for p, own in zip(prefix, (key, value), strict=True)]
    repeated = [states.repeat_interleave(2, dim=1) for states in whole]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=seen)
    additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    mask = {"bool": seen, "float": additive, "none": None}[kind_of_mask]
    key.shared_prefix = prefix
    got, _ = shared_prefix_attention(None, query, key, value, mask)
    torch.testing.assert_close(got, expected.transpose(1, 2))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize(("count", "length"), [(1, 4), (1, 84), (3, 4)])
def test_one_packed_pass_equals_two(kind: str, count: int, length: int, batch: dict[str, torch.Tensor]) -> None:
    """Logits, hidden states, the prompts' own logits and gradients; also if rows attend in groups."""
    backbone = CausalBackbone(build_model(kind).double(), kind).double().eval()
    more = {name: torch.cat([value, value[:3]]) for name, value in batch.items()}
    more["task_ids"] = more["task_ids"] % count
    given = torch.randn(count, length, 32, dtype=torch.double, generator=torch.Generator().manual_seed(3))
    mask = torch.ones(8, length, dtype=torch.long)
    mask[2, 1:3] = 0  # leave-one-out: a row that does not attend to some of its prompt
    results = []
    for together in (True, False):
        backbone.ways = {"packed"} if together else set()
        prompts = given.clone().requires_grad_()
        output = run(
            backbone, prompts, more, hidden_states=True, prompt_mask=mask, predict_at=torch.tensor([0, length - 1])
        )
        (output.logits[more["labels"] != IGNORE].square().sum() + output.prompt_logits.square().sum()).backward()
        results.append((output, prompts.grad))
    (one, gradient), (two, expected) = results
    counted = more["labels"] != IGNORE
    torch.testing.assert_close(one.logits[counted], two.logits[counted], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.prompt_logits, two.prompt_logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-8)
    assert one.hidden.keys() == two.hidden.keys() == {"decoder/prompt", "decoder/text"}
    for name, segment in one.hidden.items():
        torch.testing.assert_close(segment.weight, two.hidden[name].weight)
        for mine, theirs in zip(segment.layers, two.hidden[name].layers, strict=True):
            where = segment.weight > 0
            torch.testing.assert_close(mine[where], theirs[where], rtol=1e-9, atol=1e-9)


def test_rows_are_grouped_if_their_prompt_is_long() -> None:
    assert [group_size(1, length, 16, 41) for length in (100, 200, 400, 800)] == [1, 1, 2, 4]
    assert group_size(1, 800, 15, 41) == 1  # does not divide
    assert group_size(4, 800, 16, 41) == 1  # rows of different prompts
