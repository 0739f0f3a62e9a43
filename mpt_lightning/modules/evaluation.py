"""Validation, test and prediction, one task after another: by ranking the choices or by generation."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mpt_lightning import objectives
from mpt_lightning.backbones import Backbone
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.vocabulary import check_choices
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.batch import Batch, check_batch, task_of_loader
from mpt_lightning.modules.checkpointing import CheckpointedModule
from mpt_lightning.modules.evaluator import Evaluator
from mpt_lightning.prompts import ClassifierPrompt

NO_PROMPT = (
    "There is no trained prompt to evaluate: give --ckpt_path with a checkpoint (in Python: ckpt_path=..., or a "
    "module from load_from_checkpoint)."
)


class EvaluatedModule(CheckpointedModule):
    """A module that evaluates and predicts; see `BackboneModule` for the arguments."""

    evaluator: Evaluator | None = None

    def task_rows(self, batch: Batch) -> Tensor:
        """Return the prompt's row `[B]` of each row of the batch, which is checked (`check_batch`)."""
        ids: Tensor = check_batch(batch, self._data_tasks())["task_ids"]
        return ids if self._row_of_task is None else self._row_of_task[ids]

    def release(self) -> None:
        """Free what is kept on the device for one evaluation or one run; also called when a run fails."""
        self.evaluator = None

    def row_weights(self, batch: Batch) -> Tensor:
        """Return how often each row `[B]` counts in a loss: once per label token, or once over its choices."""
        tokens = (batch["labels"] != objectives.IGNORE).sum(dim=1)
        return tokens.clamp(max=1) if self.over_choices and batch.get("choices") is not None else tokens

    def _check_choices(self) -> None:
        """Check the choices of the data's cards, whoever made the DataModule."""
        backbone, prompt = self.parts()
        for name, card in ((name, card) for name, card in self.cards.items() if name in self._data_tasks()):
            if card.choices:
                check_choices(card, backbone.tokenizer, backbone.family, self.head is not None)
            if isinstance(prompt, ClassifierPrompt):
                prompt.check_classes(name, len(card.words(backbone.family) or []))

    def on_validation_epoch_start(self) -> None:
        """Encode the prompts once for the whole evaluation, and reset the metrics."""
        if self.prompt is None:
            raise MPTError(NO_PROMPT)
        backbone, prompt = self.parts()
        self._match_tasks()
        self._check_choices()
        with torch.no_grad():
            encoded = backbone.encode_prompts(prompt(torch.arange(prompt.num_tasks, device=self.device)))
        self.evaluator = Evaluator(self._data_tasks(), self.cards, encoded, self.device)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start

    def _running(self) -> Evaluator:
        if self.evaluator is None:
            raise RuntimeError("evaluation has not begun")
        return self.evaluator

    def _inputs(self, batch: Batch, rows: Tensor) -> tuple[Any, Tensor, Tensor, Tensor]:
        """Return the backbone's arguments for a batch."""
        return self._running().prompts, rows, batch["input_ids"], batch["attention_mask"]

    def _evaluate(self, batch: Batch, loaders: Any, batch_idx: int, index: int) -> None:
        (backbone, _), evaluator = self.parts(), self._running()
        rows, task, labels = self.task_rows(batch), task_of_loader(evaluator.tasks, index), batch["labels"]
        counted = counted_rows(batch, loaders, batch_idx, index)
        inputs, weights = self._inputs(batch, rows), self.row_weights(batch)[:counted]
        if "choices" in batch:
            if self.over_choices:
                scores = backbone.score(*inputs, batch["choices"])
                keys = [key for key in ("labels", "choices", "shares") if key in batch]
                loss = choice_loss(scores[:counted], {key: batch[key][:counted] for key in keys}, weights)
                texts = choice_texts(scores, self.cards.get(task))
            else:
                # The gold answer is scored as one more choice, so that the loss takes no pass of its own.
                scores = backbone.score(*inputs, with_gold(batch["choices"], labels))
                texts = choice_texts(scores[:, :-1], self.cards.get(task))
                loss = -scores[:counted, -1].sum() / weights.sum()
        else:
            texts = self.predict_texts(batch, rows, task) if task in evaluator.metrics else []
            loss = objectives.token_cross_entropy(backbone(*inputs, labels).logits[:counted], labels[:counted])
        if counted < len(labels):
            batch, texts = {name: value[:counted] for name, value in batch.items()}, texts[:counted]
        if counted:
            evaluator.update(task, texts, batch)
            evaluator.update_loss(task, loss, int(weights.sum()))

    def _end_evaluation(self, stage: str) -> None:
        if self.evaluator is not None:
            for name, value in self.evaluator.compute().items():
                self.log(f"{stage}/{name}", value, prog_bar=name == "average", sync_dist=True)
        self.evaluator = None

    def predict_texts(self, batch: Batch, rows: Tensor, task: str) -> list[str]:
        """Return each row's answer: the likeliest choice if the batch has choices, else generated text."""
        backbone, _ = self.parts()
        inputs = self._inputs(batch, rows)
        if "choices" in batch:
            return choice_texts(backbone.score(*inputs, batch["choices"]), self.cards.get(task))
        return generated_texts(backbone, inputs, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate a batch of one task."""
        self._evaluate(batch, self.trainer.val_dataloaders, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate a batch of one task."""
        self._evaluate(batch, self.trainer.test_dataloaders, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Return one record per row: `task`, `row`, `text`, `prediction`, `gold`."""
        task = task_of_loader(self._data_tasks(), dataloader_idx)
        predictions = self.predict_texts(batch, self.task_rows(batch), task)
        counted = counted_rows(batch, self.trainer.predict_dataloaders, batch_idx, dataloader_idx)
        return records(task, predictions, batch)[:counted]

    def on_validation_epoch_end(self) -> None:
        """Log `val/<task>/<metric>` and `val/average`."""
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log `test/<task>/<metric>` and `test/average`."""
        self._end_evaluation("test")

    def teardown(self, stage: str) -> None:
        """Free the device's memory."""
        self.release()


def with_gold(choices: Tensor, labels: Tensor) -> Tensor:
    """Append the gold answers `[B, M]` to the choices `[B, C, M']`, as `[B, C + 1, max(M, M')]`."""
    width = max(choices.shape[2], labels.shape[1])
    columns = [functional.pad(t, (0, width - t.shape[2]), value=objectives.IGNORE) for t in (choices, labels[:, None])]
    return torch.cat(columns, dim=1)


def counted_rows(batch: Mapping[str, Any], loaders: Any, batch_idx: int, dataloader_idx: int) -> int:
    """Return how many of a batch's rows count: the last batch may be filled up with repeated rows (`EvalSampler`)."""
    loader = loaders[dataloader_idx] if isinstance(loaders, list) else loaders
    # Read from the batch sampler: the loader that Lightning builds for prediction has no other sampler.
    filling: int = getattr(getattr(getattr(loader, "batch_sampler", None), "sampler", None), "filling", 0)
    return len(batch["labels"]) - (filling if filling and batch_idx + 1 == len(loader) else 0)


def choice_loss(scores: Tensor, batch: Mapping[str, Any], weights: Tensor) -> Tensor:
    """Return the loss over the choices of B rows, given their scores `[B, C]` and weights `[B]`."""
    found = batch.get("shares")
    shares = objectives.right_choices(batch["choices"], batch["labels"]) if found is None else found
    return objectives.choice_cross_entropy(scores, shares, weights)


def choice_texts(scores: Tensor, card: TaskCard | None) -> list[str]:
    """Return the words of the likeliest classes, given scores `[B, C]`; their numbers if no card names them.

    Of a regression task, whose two choices are the ends of its range, return the values between them.
    """
    if card is not None and card.value_range is not None:
        return [card.value(part) for part in scores.softmax(dim=1)[:, 1].tolist()]
    words = card.choices if card is not None else None
    return [words[index] if words else str(index) for index in scores.argmax(dim=1).tolist()]


def generated_texts(backbone: Backbone, inputs: tuple[Any, ...], **options: Any) -> list[str]:
    """Generate an answer for each row, and return its text without special tokens."""
    tokenizer = backbone.tokenizer
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    tokens = backbone.generate(*inputs, do_sample=False, pad_token_id=padding, **options)
    return [text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def records(task: str, predictions: Sequence[str], batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one plain record per predicted row."""
    size = len(predictions)
    texts, rows = batch.get("texts") or [""] * size, batch.get("row_ids") or list(range(size))
    golds = batch.get("references") or [[]] * size
    return [
        {"task": task, "row": int(row), "text": text, "prediction": prediction, "gold": list(gold)}
        for row, text, prediction, gold in zip(rows, texts, predictions, golds, strict=True)
    ]
