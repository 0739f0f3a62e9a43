"""CPT equals a loop without a shared prefix, resumes exactly, and avoids known defects of other implementations."""

import copy
from collections.abc import Callable
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from stages import BERT
from torch.nn import functional
from torch.utils.data import DataLoader

from mpt_lightning import CPT, load_backbone, load_task
from mpt_lightning.objectives import IGNORE
from tests.conftest import VOCABULARY, build_tokenizer
from tests.modules.conftest import AnyData, Rows

Folder = Callable[[str], str]
MakeTrainer = Callable[..., L.Trainer]
EXAMPLES = [0, 5, 9]  # the rows in the context
PLACES = {row: place for place, row in enumerate(EXAMPLES)}


class ContextData(AnyData):
    """Rows of one task, three of which are the context; `context_examples` contains their positions in it."""

    def __init__(self, batch_size: int = 8, examples: list[int] = EXAMPLES) -> None:
        super().__init__(["one"], batch_size)
        rows, ids, types = Rows(1), [3], [0]
        for place, row in enumerate(examples):
            text, answer = rows[row]["input_ids"].tolist(), rows[row]["labels"].tolist()
            ids += [*text, *answer, 4]
            types += [4 * place + kind for kind in (1, 2, 2, 2, 2, 3)] + [4 * place + 4] * 2 + [0]
        self.context = SimpleNamespace(token_ids=ids, token_types=types)

    def train_dataloader(self) -> DataLoader:
        rows = Rows(1)
        marked = [rows[n] | {"context_examples": torch.tensor(PLACES.get(n, -1))} for n in range(len(rows))]
        return DataLoader(marked, batch_size=self.batch_size)


def make(folder: str, **options: object) -> CPT:
    return CPT(folder, **({"lr": 0.02, "epsilon": 2.0, "template_epsilon": 1.0, "schedule": "constant"} | options))


def reference_loss(module: CPT, batch: dict, delta: torch.Tensor, leave_one_out: bool = False) -> torch.Tensor:
    """Return the paper's loss, with one plain forward pass over the whole sequence of each row."""
    backbone, prompt = module.backbone, module.prompt
    types = torch.tensor(prompt.token_types)
    moves = ((types > 0) & (types % 4 != 0))[:, None]
    embed = backbone.model.get_input_embeddings()
    context = embed(torch.tensor(prompt.token_ids)) + delta * moves
    total, count = 0.0, 0
    for row in range(len(batch["labels"])):
        text, answer = batch["input_ids"][row], batch["labels"][row]
        whole = torch.cat([context, embed(text), embed(answer)])[None]
        size, start = whole.shape[1], len(context)
        # The context's loss hides no example, so it needs a separate pass.
        logits = backbone.model(inputs_embeds=whole).logits[0]
        for at in ((types > 0) & (types % 4 == 0)).nonzero()[:, 0].tolist():
            weight = 0.9 ** (3 - (int(types[at]) - 1) // 4)
            loss = functional.cross_entropy(logits[at - 1], torch.tensor(prompt.token_ids[at]))
            total, count = total + weight * loss, count + 1
        if leave_one_out and batch["context_examples"][row] >= 0:
            hidden = (types - 1) // 4 == batch["context_examples"][row]
            hidden &= types > 0
            seen = torch.ones(size, size).tril().bool()
            seen[start:, :start] &= ~hidden
            mask = torch.where(seen, 0.0, torch.finfo(whole.dtype).min)[None, None]
            logits = backbone.model(inputs_embeds=whole, attention_mask=mask).logits[0]
        own = logits[start + len(text) - 1 : -1]
        total, count = total + functional.cross_entropy(own, answer, reduction="sum"), count + len(answer)
    return total / count


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("leave_one_out", [False, True])
def test_training_equals_a_loop_without_a_shared_context(
    kind: str, leave_one_out: bool, model_folder: Folder, trainer: MakeTrainer
) -> None:
    module = make(model_folder(kind), decay=0.9, leave_one_out=leave_one_out)
    trainer(max_epochs=2).fit(module, datamodule=ContextData())
    delta = torch.zeros_like(module.prompt.delta_embedding).requires_grad_()
    optimizer = torch.optim.AdamW([delta], lr=0.02, weight_decay=0.0)
    radius = module.prompt.radius[:, 0]
    bound = False
    for _ in range(2):
        for batch in ContextData().train_dataloader():
            optimizer.zero_grad()
            reference_loss(module, batch, delta, leave_one_out).backward()
            optimizer.step()
            with torch.no_grad():
                norm = delta.norm(dim=1)
                bound |= bool((norm > radius).any())
                delta.mul_((radius / norm.clamp(min=1e-12)).clamp(max=1)[:, None])
    assert bound
    torch.testing.assert_close(module.prompt.delta_embedding.detach(), delta.detach(), rtol=1e-3, atol=1e-5)


def test_every_step_projects_every_token_onto_its_ball(model_folder: Folder, trainer: MakeTrainer) -> None:
    """Between steps, callbacks, averages and checkpoints read a projected perturbation."""
    seen = []

    class CheckProjection(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: CPT, *_: object) -> None:
            delta = module.prompt.delta_embedding.detach()
            assert (delta.norm(dim=1) <= module.prompt.radius[:, 0] * (1 + 1e-6)).all()
            seen.append(float(delta.norm()))

    module = make(model_folder("llama"), epsilon=0.5, template_epsilon=0.25, lr=1.0)
    trainer(max_epochs=2, callbacks=[CheckProjection()]).fit(module, datamodule=ContextData())
    assert len(seen) == 6
    delta, radius = module.prompt.delta_embedding.detach().norm(dim=1), module.prompt.radius[:, 0]
    moving = module.prompt.moves[:, 0] > 0
    torch.testing.assert_close(delta[moving], radius[moving])
    assert delta[~moving].max() == 0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_is_exact_and_keeps_the_balls(
    accumulate: int, model_folder: Folder, trainer: MakeTrainer, tmp_path
) -> None:
    folder, options = model_folder("llama"), {"accumulate_grad_batches": accumulate}
    whole = make(folder, epsilon=0.5, template_epsilon=0.25, lr=0.3)
    trainer(max_epochs=4, **options).fit(whole, datamodule=ContextData())
    path = None
    for stop in (1, 2, 3, 4):  # four runs
        part = make(folder, epsilon=0.5, template_epsilon=0.25, lr=0.3)
        run = trainer(max_epochs=stop, **options)
        run.fit(part, datamodule=ContextData(), ckpt_path=path)
        path = str(tmp_path / f"{stop}.ckpt")
        run.save_checkpoint(path)
    assert torch.equal(part.prompt.delta_embedding, whole.prompt.delta_embedding)
    assert torch.equal(part.prompt.embeddings, part.backbone.embeddings[part.prompt.token_ids])
    loaded = CPT.load_from_checkpoint(path)
    row = torch.tensor([0])
    assert torch.equal(loaded.prompt(row).embeddings, whole.prompt(row).embeddings)
    loaded.load_state_dict(torch.load(path, weights_only=True)["state_dict"])  # a second load changes nothing
    assert torch.equal(loaded.prompt(row).embeddings, whole.prompt(row).embeddings)
    content = torch.load(path, weights_only=True)
    assert {name: tuple(value.shape) for name, value in content["state_dict"].items()} == {
        "prompt.delta_embedding": (28, 32)
    }


def test_evaluating_changes_nothing(model_folder: Folder, trainer: MakeTrainer) -> None:
    module = make(model_folder("llama"))
    run = trainer(limit_val_batches=1.0)
    run.fit(module, datamodule=ContextData())
    before = module.prompt.delta_embedding.detach().clone()
    first = run.validate(module, datamodule=ContextData(), verbose=False)
    second = run.validate(module, datamodule=ContextData(), verbose=False)
    assert first == second
    assert torch.equal(module.prompt.delta_embedding, before)
    assert not module.prompt.delta_embedding.is_inference()
    assert module.prompt.delta_embedding.requires_grad


def test_the_batch_is_not_changed(model_folder: Folder, trainer: MakeTrainer) -> None:
    module = make(model_folder("llama"), leave_one_out=True)
    trainer(max_steps=1).fit(module, datamodule=ContextData())
    batch = next(iter(ContextData().train_dataloader()))
    before = copy.deepcopy(batch)
    module.losses(batch)["loss"].backward()
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], before[name]) for name in batch)


def test_two_modules_keep_their_own_settings(model_folder: Folder, trainer: MakeTrainer) -> None:
    """A module's loss depends neither on another module's settings in the same process nor on the task's name."""
    data, losses = ContextData(), {}
    data.tasks = ["some name"]
    modules = {decay: make(model_folder("llama"), decay=decay, lr=0.0) for decay in (1.0, 0.5)}
    for module in modules.values():
        trainer(max_steps=1).fit(module, datamodule=data)
    batch = next(iter(data.train_dataloader()))
    for decay, module in modules.items():
        losses[decay] = module.losses(batch)["loss"].item()
    assert modules[1.0].tasks == ["some name"]
    parts = modules[1.0].losses(batch)
    # Per row, the 6 label tokens of the context count, and the 2 of the row.
    assert losses[1.0] == pytest.approx((6 * parts["context"] + 2 * parts["row"]).item() / 8, rel=1e-5)
    assert losses[0.5] < 0.8 * losses[1.0]


def test_default_arguments_train_on_labels_only(model_folder: Folder, trainer: MakeTrainer) -> None:
    module = CPT(model_folder("llama"))
    trainer(max_steps=2).fit(module, datamodule=ContextData())
    parts = module.losses(next(iter(ContextData().train_dataloader())))
    assert all(torch.isfinite(value) for value in parts.values())
    ids = torch.tensor(module.prompt.token_ids)
    expected = [token for row in EXAMPLES for token in Rows(1)[row]["labels"].tolist()]
    assert module.prompt.label_ids.tolist() == expected
    assert ids[module.prompt.label_positions].tolist() == expected


def test_the_context_is_run_once_per_step_and_evaluation(model_folder: Folder, trainer: MakeTrainer) -> None:
    module = make(model_folder("llama"))
    run = trainer(limit_val_batches=1.0, max_epochs=1, num_sanity_val_steps=0)
    widths, logits = [], []

    class Count(L.Callback):
        def setup(self, trainer: L.Trainer, module: CPT, stage: str) -> None:
            widths.clear()

        def on_fit_start(self, trainer: L.Trainer, module: CPT) -> None:
            model = module.backbone.model
            model.model.layers[0].register_forward_pre_hook(lambda _, given: widths.append(tuple(given[0].shape[:2])))
            model.lm_head.register_forward_hook(lambda _, given, made: logits.append(tuple(made.shape[:2])))

    run.callbacks.append(Count())
    run.fit(module, datamodule=ContextData())
    # Three batches of eight rows, one pass each: the context's 28 tokens, and per row 6 and the first label token.
    assert widths[:3] == [(1, 28 + 8 * 7)] * 3
    assert logits[:3] == [(1, 6 + 8 * 2)] * 3
    # Evaluation: the context once, then five batches of up to five rows.
    assert widths[3:] == [(1, 28), *[(5, 7)] * 4, (4, 7)]


@pytest.mark.parametrize(
    ("method", "moving", "terms"),
    [
        ("cpt", "inputs", {"loss", "row", "context"}),
        ("prompt_tuning", "all", {"loss", "row"}),
        ("instruction", "instruction", {"loss", "row"}),
    ],
)
@pytest.mark.parametrize("epsilon", [0.5, None])
def test_methods_differ_in_trained_tokens_and_loss_terms(
    method: str, moving: str, terms: set[str], epsilon: float | None, model_folder: Folder, trainer: MakeTrainer
) -> None:
    module = make(
        model_folder("llama"), method=method, epsilon=epsilon, template_epsilon=epsilon, instruction_length=3, lr=0.5
    )
    trainer(max_epochs=2).fit(module, datamodule=ContextData())
    types, delta = torch.tensor(module.prompt.token_types), module.prompt.delta_embedding.detach().norm(dim=1)
    expected = {"inputs": (types > 0) & (types % 4 != 0), "all": types > -2, "instruction": types == -1}[moving]
    assert torch.equal(delta > 0, expected)
    assert int((types == -1).sum()) == (3 if method == "instruction" else 0)
    outside = delta > module.prompt.radius[:, 0] * (1 + 1e-6)
    assert not outside.any()
    assert bool((delta > (32 / 2048) ** 0.5 * 0.5 * 1.01).any()) == (epsilon is None)
    assert set(module.losses(next(iter(ContextData().train_dataloader())))) == terms


def test_an_instruction_can_be_given_as_text(model_folder: Folder, trainer: MakeTrainer) -> None:
    module = make(model_folder("llama"), method="instruction", instruction_text="the film was")
    trainer(max_steps=1).fit(module, datamodule=ContextData())
    assert (
        module.prompt.token_ids[:3] == build_tokenizer("llama")("the film was", add_special_tokens=False)["input_ids"]
    )


def test_in_context_learning_needs_no_training(model_folder: Folder, trainer: MakeTrainer) -> None:
    """Its validation loss is that of one pass of the bare model over context, row and label."""
    module = CPT(model_folder("llama"), method="icl")
    results = trainer(limit_val_batches=1.0).validate(module, datamodule=ContextData(), verbose=False)
    assert not [p for p in module.parameters() if p.requires_grad]
    backbone, total, count = load_backbone(model_folder("llama")), 0.0, 0
    context = torch.tensor(ContextData().context.token_ids)
    for row in Rows(1):
        whole = torch.cat([context, row["input_ids"], row["labels"]])
        logits = backbone.model(input_ids=whole[None]).logits[0, -3:-1]
        total += float(functional.cross_entropy(logits, row["labels"], reduction="sum"))
        count += 2
        if count == 48:
            break
    assert results[0]["val/loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ranking_and_generation_equal_a_plain_forward(kind: str, model_folder: Folder, trainer: MakeTrainer) -> None:
    """Choices of one to three tokens, texts of different lengths, padding on either side."""
    module = make(model_folder(kind), lr=0.1)
    trainer(max_epochs=1).fit(module, datamodule=ContextData())
    backbone, prompt = module.backbone, module.prompt
    generator = torch.Generator().manual_seed(4)
    texts = [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in (5, 2, 4)]
    choices = torch.tensor([[[9, 1, IGNORE], [9, 12, 1], [7, IGNORE, IGNORE]]]).expand(3, -1, -1)
    embed = backbone.model.get_input_embeddings()
    with torch.no_grad():
        context = prompt(torch.tensor([0])).embeddings
        expected, written = [], []
        for text in texts:
            scores = []
            for choice in choices[0]:
                answer = choice[choice >= 0]
                whole = torch.cat([context[0], embed(text), embed(answer)])[None]
                logits = backbone.model(inputs_embeds=whole).logits[0, -len(answer) - 1 : -1]
                scores.append(-functional.cross_entropy(logits, answer, reduction="sum"))
            expected.append(torch.stack(scores))
            tokens = []
            for _ in range(4):
                whole = torch.cat([context[0], embed(torch.cat([text, torch.tensor(tokens, dtype=torch.long)]))])[None]
                tokens.append(int(backbone.model(inputs_embeds=whole).logits[0, -1].argmax()))
            written.append(tokens)
        encoded, rows = backbone.encode_prompts(context), torch.zeros(3, dtype=torch.long)
        for side in ("right", "left"):
            ids, mask = torch.zeros(3, 6, dtype=torch.long), torch.zeros(3, 6, dtype=torch.long)
            for row, text in enumerate(texts):
                place = slice(0, len(text)) if side == "right" else slice(6 - len(text), 6)
                ids[row, place], mask[row, place] = text, 1
            got = backbone.score(encoded, rows, ids, mask, choices)
            torch.testing.assert_close(got, torch.stack(expected), rtol=1e-5, atol=1e-5)
            made = backbone.generate(
                encoded, rows, ids, mask, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=-1
            )
            assert made.tolist() == written


def test_bfloat16_weights_leave_loss_and_perturbation_in_fp32(model_folder: Folder, trainer: MakeTrainer) -> None:
    module = make(model_folder("llama"), backbone_dtype="bfloat16", epsilon=0.5, template_epsilon=0.5)
    trainer(max_epochs=2).fit(module, datamodule=ContextData())
    assert module.backbone.model.dtype == torch.bfloat16
    assert module.prompt.delta_embedding.dtype == torch.float32
    batch = next(iter(ContextData().train_dataloader()))
    parts = module.losses(batch)
    assert parts["loss"].dtype == torch.float32
    precise = make(model_folder("llama"), epsilon=0.5, template_epsilon=0.5)
    trainer(max_steps=1).fit(precise, datamodule=ContextData())
    precise.prompt.load_state_dict(module.prompt.state_dict())
    assert parts["loss"].item() == pytest.approx(precise.losses(batch)["loss"].item(), rel=0.02)
    assert (module.prompt.delta_embedding.detach().norm(dim=1) <= module.prompt.radius[:, 0] * (1 + 1e-6)).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon: got 0\.0, expected a number above 0 or null"),
        ({"template_epsilon": -0.1}, "template_epsilon: got -0.1, expected a number above 0"),
        ({"decay": 0.0}, r"decay: got 0\.0, expected a number above 0 and at most 1"),
        ({"decay": 1.1}, "decay: got 1.1, expected a number above 0 and at most 1"),
        ({"method": "cpp"}, "method: got 'cpp', expected one of cpt, prompt_tuning, instruction, icl"),
        ({"normalize": "sum"}, "normalize: got 'sum', expected one of paper, weights"),
        ({"instruction_length": 0}, "instruction_length: got 0, expected a whole number at least 1"),
    ],
)
def test_invalid_arguments_raise(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CPT("gpt2", **options)


def test_mistakes_raise_before_training(model_folder: Folder, trainer: MakeTrainer, tmp_path) -> None:
    long = ContextData(examples=list(range(10)))
    long.max_input_length = 20
    voice = load_task("demo/voice", context_shots=4, cache_dir=str(tmp_path))
    for module, data, message in [
        (make(model_folder("t5")), ContextData(), "since an encoder does not predict .* context, and .* is seq2seq"),
        (make(BERT), ContextData(), "CPT works with models of the family causal, since .*, and .* is masked"),
        (make(BERT), voice, "Got a masked backbone, .* because context-aware"),
        (make(model_folder("llama")), AnyData(["one"]), "the data has no `context`"),
        (make(model_folder("llama")), AnyData(), "the context of one task, and the data has 3"),
        (make(model_folder("llama")), long, r"has 91 tokens \(10 examples\).* more than the 96 .* About 8 such"),
        (make(model_folder("llama"), method="icl"), ContextData(), "trains nothing: run `mpt validate`"),
    ]:
        with pytest.raises(ValueError, match=message):
            trainer().fit(module, datamodule=data)
    module = make(model_folder("llama"))
    run = trainer()
    run.fit(module, datamodule=ContextData())
    run.save_checkpoint(tmp_path / "cpt.ckpt")
    other = ContextData(examples=[0, 5, 10])
    with pytest.raises(ValueError, match="The data's context is not the one that the prompt was trained with"):
        trainer().fit(make(model_folder("llama")), datamodule=other, ckpt_path=str(tmp_path / "cpt.ckpt"))
    with pytest.raises(ValueError, match="There is no trained prompt to evaluate"):
        trainer(limit_val_batches=1).validate(make(model_folder("llama")), datamodule=ContextData())
    plain = ContextData()
    plain.train_dataloader = AnyData(["one"]).train_dataloader
    with pytest.raises(ValueError, match="the batch has no `context_examples`"):
        trainer().fit(make(model_folder("llama"), leave_one_out=True), datamodule=plain)
