"""Training on a masked language model equals a loop written with transformers and torch alone."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from stages import BERT, LONG, T5, doubled
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, BertForMaskedLM, get_scheduler

from mpt_lightning import MPTSource, MPTTarget, MultitaskDataModule, PromptTuning, load_task
from mpt_lightning.data import load_card
from mpt_lightning.errors import MPTError
from mpt_lightning.modules import PromptModule
from mpt_lightning.resources import backbone_path

MakeTrainer = Callable[..., L.Trainer]
WORDS = {"demo/voice": ["active", "passive"], "demo/topic": ["animals", "food", "weather", "travel"]}
TEMPERATURE = 2.0


class Recorder(L.Callback):
    """Stores the prompt that training starts from, and the batches."""

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}
        self.batches: list[dict[str, Any]] = []

    def on_train_start(self, trainer: L.Trainer, module: PromptModule) -> None:
        self.start = copy.deepcopy(module.prompt.state_dict())

    def on_train_batch_start(self, trainer: L.Trainer, module: PromptModule, batch: dict[str, Any], _: int) -> None:
        self.batches.append(batch)


def fit(module: PromptModule, trainer: MakeTrainer, folder: Path) -> Recorder:
    """Train in float64 for two epochs on two tasks with two and four choices; save the checkpoint `<stage>.ckpt`."""
    L.seed_everything(0)
    recorder = Recorder()
    data = MultitaskDataModule(list(WORDS), sampling="all", batch_size=8, max_train_rows=12, cache_dir=str(folder))
    run = trainer(max_epochs=2, callbacks=[recorder])
    run.fit(doubled(module), datamodule=data)
    run.save_checkpoint(folder / f"{type(module).__name__}.ckpt")
    assert len(recorder.batches) > 4
    return recorder


class ByHand:
    """The bare model with embedded prompts after [CLS]."""

    def __init__(self) -> None:
        path = backbone_path(BERT)
        self.model = BertForMaskedLM.from_pretrained(path).double().eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.choices = [self.tokenizer.convert_tokens_to_ids(words) for words in WORDS.values()]

    def __call__(self, prompts: Tensor, batch: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Return each row's logits `[V]` at the mask and last states `[L, H]` of its text, for prompts `[T, P, H]`."""
        logits, states = [], []
        for ids, mask, task in zip(batch["input_ids"], batch["attention_mask"], batch["task_ids"], strict=True):
            ids, prompt = ids[mask == 1], prompts[task]
            (place,) = (ids == self.tokenizer.mask_token_id).nonzero()[:, 0].tolist()
            embeds = self.model.get_input_embeddings()(ids)
            embeds = torch.cat([embeds[:1], prompt, embeds[1:]])
            output = self.model(inputs_embeds=embeds[None], output_hidden_states=True)
            logits.append(output.logits[0, place + len(prompt)])
            last = output.hidden_states[-1][0]
            states.append(torch.cat([last[:1], last[1 + len(prompt) :]]))
        return logits, states

    def task_loss(self, logits: list[Tensor], batch: dict[str, Any]) -> Tensor:
        """Return the mean cross-entropy over the choices of each row's task."""
        losses = []
        for row, task, references in zip(logits, batch["task_ids"].tolist(), batch["labels"], strict=True):
            choices = self.choices[task]
            losses.append(functional.cross_entropy(row[choices], torch.tensor(choices.index(int(references[0])))))
        return torch.stack(losses).mean()


def descend(groups: list[dict[str, Any]], losses: Callable[[dict[str, Any]], Tensor], batches: list) -> None:
    """Take one step of AdamW per batch, with a rate that falls to 0."""
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, 0, len(batches))
    for batch in batches:
        optimizer.zero_grad()
        losses(batch).backward()
        optimizer.step()
        schedule.step()


def parameters(start: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.clone()) for name, value in start.items()}


def assert_equal(module: PromptModule, trained: dict[str, nn.Parameter], start: dict[str, Tensor]) -> None:
    for name, value in module.prompt.state_dict().items():
        assert value.dtype == torch.float64
        assert (value - start[name]).abs().max() > 1e-3
        torch.testing.assert_close(
            value, trained[name].detach(), rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
        )


def folded(prompt: dict[str, nn.Parameter]) -> Tensor:
    return prompt["prompt_embeddings"] * (prompt["prefix_task_cols"] @ prompt["prefix_task_rows"])


@pytest.fixture(scope="module")
def by_hand() -> ByHand:
    return ByHand()


def test_prompt_tuning_equals_a_hand_written_loop(by_hand: ByHand, trainer: MakeTrainer, tmp_path: Path) -> None:
    module = PromptTuning(BERT, prompt_length=5, lr=0.01)
    recorder = fit(module, trainer, tmp_path)
    prompt = parameters(recorder.start)

    def losses(batch: dict[str, Any]) -> Tensor:
        return by_hand.task_loss(by_hand(prompt["prompt_embeddings"], batch)[0], batch)

    descend([{"params": list(prompt.values()), "lr": 0.01}], losses, recorder.batches)
    assert_equal(module, prompt, recorder.start)


def test_source_and_target_equal_hand_written_loops(by_hand: ByHand, trainer: MakeTrainer, tmp_path: Path) -> None:
    """The source distils logits at the mask and the text's last hidden states from the teachers."""
    fit(PromptTuning(BERT, prompt_length=5, lr=0.01), trainer, tmp_path)
    teachers = str(tmp_path / "PromptTuning.ckpt")
    saved = torch.load(teachers, weights_only=True)["state_dict"]["prompt.prompt_embeddings"].double()
    source = MPTSource(
        BERT, teachers, prompt_length=5, shared_lr=0.01, task_lr=0.02, temperature=TEMPERATURE, logits_weight=0.7,
        hidden_weight=0.3,
    )  # fmt: skip
    recorder = fit(source, trainer, tmp_path)
    prompt = parameters(recorder.start)

    def losses(batch: dict[str, Any]) -> Tensor:
        logits, states = by_hand(folded(prompt), batch)
        with torch.no_grad():
            their_logits, their_states = by_hand(saved, batch)
        of_logits, of_states = [], []
        for row, theirs in zip(logits, their_logits, strict=True):
            ours, target = (torch.log_softmax(one / TEMPERATURE, dim=-1) for one in (row, theirs))
            of_logits.append(TEMPERATURE**2 * (target.exp() * (target - ours)).sum())
        for row, theirs in zip(states, their_states, strict=True):
            of_states.append((row - theirs).square().mean())
        terms = 0.7 * torch.stack(of_logits).mean() + 0.3 * torch.stack(of_states).mean()
        return by_hand.task_loss(logits, batch) + terms

    factors = [value for name, value in prompt.items() if "task" in name]
    groups = [{"params": [prompt["prompt_embeddings"]], "lr": 0.01}, {"params": factors, "lr": 0.02}]
    descend(groups, losses, recorder.batches)
    assert_equal(source, prompt, recorder.start)

    target = MPTTarget(BERT, str(tmp_path / "MPTSource.ckpt"), shared_lr=0.01, task_lr=0.02)
    recorder = fit(target, trainer, tmp_path)
    trained = source.prompt.state_dict()
    start = {name: value if name == "prompt_embeddings" else value.mean(dim=0) for name, value in trained.items()}
    for name, value in recorder.start.items():
        torch.testing.assert_close(value, start[name].expand_as(value), rtol=1e-6, atol=1e-7)  # passes through fp32
    adapted = parameters(recorder.start)

    def target_losses(batch: dict[str, Any]) -> Tensor:
        return by_hand.task_loss(by_hand(folded(adapted), batch)[0], batch)

    factors = [value for name, value in adapted.items() if "task" in name]
    groups = [{"params": [adapted["prompt_embeddings"]], "lr": 0.01}, {"params": factors, "lr": 0.02}]
    descend(groups, target_losses, recorder.batches)
    assert_equal(target, adapted, recorder.start)


def test_prompts_can_start_from_the_words_of_a_regression_task(
    by_hand: ByHand, trainer: MakeTrainer, tmp_path: Path
) -> None:
    data = load_task("demo/similarity", batch_size=8, max_train_rows=8, cache_dir=str(tmp_path))
    module = PromptTuning(BERT, prompt_length=4, prompt_init="labels", lr=0.0)
    trainer(max_steps=1).fit(module, datamodule=data)
    words = data.cards["demo/similarity"].words("masked")
    table = by_hand.model.get_input_embeddings().weight.float()
    expected = table[by_hand.tokenizer.convert_tokens_to_ids(words)]
    assert torch.equal(module.prompt.prompt_embeddings[0, :2], expected)


def test_each_row_counts_once_in_a_loss_over_the_choices(trainer: MakeTrainer, tmp_path: Path) -> None:
    """Answers of three tokens weigh as much as answers of one, in training and in validation."""
    data = MultitaskDataModule(LONG, batch_size=8, max_train_rows=8, max_eval_rows=8, cache_dir=str(tmp_path))
    module = PromptTuning(BERT, prompt_length=4, lr=0.0)
    run = trainer(max_steps=1, limit_val_batches=1.0)
    run.fit(module, datamodule=data)
    run.validate(module, datamodule=data, verbose=False)
    for task, loader in zip(data.tasks, data.val_dataloader(), strict=True):
        (batch,) = loader
        batch["task_ids"] = torch.full((8,), data.tasks.index(task))
        backbone, prompt = module.parts()
        inputs = (prompt(torch.arange(2)), batch["task_ids"], batch["input_ids"], batch["attention_mask"])
        with torch.no_grad():
            scores = backbone.score(*inputs, batch["choices"]).log_softmax(dim=1)
            assert float(module.label_tokens(batch)) == 8
            expected = -scores[batch["shares"] == 1].mean()
            torch.testing.assert_close(module.losses(batch)["loss"], expected)
        torch.testing.assert_close(run.callback_metrics[f"val/{task}/loss"], expected)
    assert (batch["labels"] >= 0).sum() == 8
    assert len(set((next(iter(data.val_dataloader()[0]))["labels"] >= 0).sum(dim=1).tolist())) == 2


def test_tasks_without_choices_raise_in_a_loss_over_choices(trainer: MakeTrainer, tmp_path: Path) -> None:
    """Their rows would have a loss of zero."""
    tasks = [
        "demo/voice",
        replace(load_card("demo/advice"), choices=None, label="sentence", metrics=["squad"], patterns=[]),
    ]
    data = MultitaskDataModule(tasks, max_train_rows=4, cache_dir=str(tmp_path))
    with pytest.raises(MPTError, match=r"over the tasks' choices, and the cards of demo/advice have none\. Leave"):
        trainer(max_steps=1).fit(PromptTuning(T5, prompt_length=2, over="choices"), datamodule=data)


def test_values_over_the_vocabulary_end_in_a_warning(trainer: MakeTrainer, tmp_path: Path) -> None:
    data = load_task("demo/similarity", max_train_rows=4, cache_dir=str(tmp_path))
    with pytest.warns(UserWarning, match="the values of demo/similarity are learned as the nearer one of two words"):
        trainer(max_steps=1).fit(PromptTuning(BERT, prompt_length=2, over="vocabulary"), datamodule=data)
