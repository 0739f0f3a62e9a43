"""What all prompt modules do with their prompt and backbone: train and evaluate."""

from abc import abstractmethod
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.optim import Optimizer

from mpt_lightning import objectives
from mpt_lightning.checkpoint.state import trainable
from mpt_lightning.data.vocabulary import check_choices
from mpt_lightning.distributed import ranks
from mpt_lightning.errors import MPTError
from mpt_lightning.modules import evaluation
from mpt_lightning.modules.accumulation import StepMean
from mpt_lightning.modules.batch import Batch, check_batch, task_of_loader
from mpt_lightning.modules.built import BuiltModule
from mpt_lightning.modules.optimization import make_optimizer, make_schedule, total_steps


class PromptModule(BuiltModule):
    """A prompt in front of a frozen backbone; see `BuiltModule` for the arguments."""

    _fault: str | None = None  # why this rank cannot go on
    _step: StepMean  # of the optimizer step that is being accumulated

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give the optimizer's groups: `params`, `lr` and `name`."""

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of the training loss by name; "loss" is minimised.

        Each is a mean over the batch's `label_tokens`, or does not depend on the batch. So terms and gradients of an
        optimizer step are exactly those of one batch with all its rows (see `StepMean`).
        """
        logits = self(batch)
        return {"loss": objectives.token_cross_entropy(logits, batch["labels"])}

    def label_tokens(self, batch: Batch) -> Tensor:
        """Return the number of label tokens that `losses` takes its means over: the batch's weight in its step."""
        return (batch["labels"] != objectives.IGNORE).sum()

    def on_fit_start(self) -> None:
        """Match the data's tasks with the prompt's."""
        self._fault, self._step = None, StepMean()
        self._match_tasks()
        self._check_choices()
        resumed, self._resumed = self._resumed, None
        ranks.check_one_start(self.trainer, resumed.step if resumed else None)
        if resumed is not None:
            resumed.report(self.trainer)
        if self.trainer.ckpt_path is not None:
            # To count the run's steps Lightning 2.6 makes the training data early, and then does not tell it where the
            # checkpoint was. So it is made again.
            self.trainer.fit_loop._combined_loader = None

    def on_train_start(self) -> None:
        """Note that the run is restored."""
        self.restores = False

    def forward(self, batch: Batch) -> Tensor:
        """Give the logits `[B, M, V]` of the label tokens."""
        backbone, prompt = self.parts()
        distinct, rows = self.task_rows(batch).unique(return_inverse=True)
        prompts = prompt(distinct)
        return backbone(prompts, rows, batch["input_ids"], batch["attention_mask"], batch["labels"]).logits

    def task_rows(self, batch: Batch) -> Tensor:
        """Return the prompt's row `[B]` of each row of the batch, which is checked (`check_batch`)."""
        ids: Tensor = check_batch(batch, self._data_tasks())["task_ids"]
        return ids if self._row_of_task is None else self._row_of_task[ids]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch; log each term as its mean over the optimizer step's label tokens so far."""
        terms, tokens = self.losses(batch), self.label_tokens(batch)
        means = self._step.add(terms, tokens, self._ends_step, self.trainer.world_size)
        loss = terms["loss"]
        if not torch.isfinite(loss * self._step.share):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            values = values if tokens else "no row of the step has a label token"
            self._fault = (
                f"The loss is not finite at step {self.global_step}, batch {batch_idx} ({values}). Rows: "
                f"{self._not_finite(batch)}. Training has stopped; checkpoints written before are whole. Lower the "
                "learning rate, raise --model.warmup_steps, set --trainer.gradient_clip_val 1, or look at these rows."
            )
            if self.trainer.world_size == 1:
                raise MPTError(self._fault)
            loss = ranks.spoil(loss, list(trainable(self).values()))
        size = len(batch["labels"])
        for name, value in means.items():
            self.log(f"train/{name}", value, prog_bar=True, batch_size=size)
        return loss

    @property
    def _ends_step(self) -> bool:
        """Whether the current batch is the last one before the optimizer's step."""
        return not self.trainer.fit_loop._should_accumulate()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add a batch's gradients to those of its optimizer step, each batch weighted by its label tokens.

        This is before all that looks at gradients: callbacks, clipping, the gradient scaler.
        """
        if self._step.kept is not None:
            for parameter in trainable(self).values():
                if parameter.grad is not None:
                    parameter.grad.mul_(self._step.kept)
        # Lightning has divided the loss by `accumulate_grad_batches`, however many batches the step has.
        super().backward(loss * (self._step.share * self.trainer.accumulate_grad_batches), *args, **kwargs)
        if self._ends_step:
            self._step = StepMean()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop, where the loss of any rank was not finite."""
        if self.trainer.world_size > 1:
            ranks.stop_together(self.trainer, optimizer, self._fault)

    @torch.no_grad()
    def _not_finite(self, batch: Batch) -> str:
        """Name the rows whose own loss is not finite, by task; all rows where it is that of none."""
        backbone, _ = self.parts()
        # A sharded backbone makes no pass for one rank alone.
        own = batch["labels"].new_zeros(len(batch["labels"])) if backbone.sharded else torch.stack(
            [objectives.token_cross_entropy(logits[None], labels[None])
             for logits, labels in zip(self(batch), batch["labels"], strict=True)]
        )  # fmt: skip
        bad = [row for row, finite in enumerate(own.isfinite().tolist()) if not finite]
        rows, numbers = self.task_rows(batch).tolist(), batch.get("row_ids")
        found: dict[str, list[int]] = {}
        for row in bad or range(len(own)):
            found.setdefault(self.tasks[rows[row]], []).append(row if numbers is None else numbers[row])
        return "; ".join(f"{task} {', '.join(map(str, sorted(of_task)))}" for task, of_task in found.items())

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Make the optimizer and its schedule, stepped once per optimizer step."""
        options = self.hparams
        optimizer = make_optimizer(options["optimizer"], self.parameter_groups(), options["weight_decay"])
        total = total_steps(self.trainer)
        if options["schedule"] != "constant" and total is not None and options["warmup_steps"] >= total:
            rank_zero_warn(
                f"warmup_steps ({options['warmup_steps']}) is not less than the run's {total} steps, so the learning "
                "rate never reaches its value. Lower --model.warmup_steps or train longer."
            )
        schedule = make_schedule(options["schedule"], optimizer, options["warmup_steps"], total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _check_choices(self) -> None:
        """Check the choices of cards that come with the data, whoever made the DataModule."""
        backbone, _ = self.parts()
        for card in (card for name, card in self.cards.items() if name in self._data_tasks() and card.choices):
            check_choices(card, backbone.tokenizer, backbone.family)

    def _begin_evaluation(self) -> None:
        if self.prompt is None:
            raise MPTError(NO_PROMPT)
        backbone, prompt = self.parts()
        self._match_tasks()
        self._check_choices()
        with torch.no_grad():
            # What depends on the prompts alone is computed once for the whole evaluation.
            self._encoded = backbone.encode_prompts(prompt(torch.arange(prompt.num_tasks, device=self.device)))
        names = self._data_tasks()
        self.evaluator = evaluation.Evaluator(names, self.cards).to(self.device)

    def _evaluate(self, batch: Batch, loaders: Any, batch_idx: int, index: int) -> None:
        backbone, _ = self.parts()
        evaluator = self.evaluator
        if evaluator is None:
            raise RuntimeError("evaluation has not begun")
        rows, task, labels = self.task_rows(batch), task_of_loader(evaluator.tasks, index), batch["labels"]
        counted = evaluation.counted_rows(batch, loaders, batch_idx, index)
        inputs = (self._encoded, rows, batch["input_ids"], batch["attention_mask"])
        if "choices" in batch:
            # The gold answer is scored as one more choice, so that the loss costs no pass of its own.
            scores = backbone.score(*inputs, evaluation.with_gold(batch["choices"], labels))
            texts = evaluation.choice_texts(scores[:, :-1].argmax(dim=1), self.cards.get(task))
            loss = -scores[:counted, -1].sum() / (labels[:counted] != objectives.IGNORE).sum()
        else:
            texts = self.predict_texts(batch, rows, task) if evaluator.has_metrics(task) else []
            loss = objectives.token_cross_entropy(backbone(*inputs, labels).logits[:counted], labels[:counted])
        if counted < len(labels):
            batch, texts = {name: value[:counted] for name, value in batch.items()}, texts[:counted]
        if counted:
            evaluator.update(task, texts, batch)
            evaluator.update_loss(task, loss, int((labels[:counted] != objectives.IGNORE).sum()))

    def _end_evaluation(self, stage: str) -> None:
        if self.evaluator is not None:
            for name, value in self.evaluator.compute().items():
                self.log(f"{stage}/{name}", value, prog_bar=name == "average", sync_dist=True)
        self.release()

    def predict_texts(self, batch: Batch, rows: Tensor, task: str) -> list[str]:
        """Give each row's answer as text: the likeliest choice where there are choices, else generated."""
        backbone, _ = self.parts()
        inputs = (self._encoded, rows, batch["input_ids"], batch["attention_mask"])
        if "choices" in batch:
            best = backbone.score(*inputs, batch["choices"]).argmax(dim=1)
            return evaluation.choice_texts(best, self.cards.get(task))
        options = {"max_new_tokens": self.hparams["max_new_tokens"], "num_beams": self.hparams["num_beams"]}
        return evaluation.generated_texts(backbone, inputs, options)

    def on_validation_epoch_start(self) -> None:
        """Encode the prompts."""
        self._begin_evaluation()

    def on_test_epoch_start(self) -> None:
        """Encode the prompts."""
        self._begin_evaluation()

    def on_predict_epoch_start(self) -> None:
        """Encode the prompts."""
        self._begin_evaluation()

    def on_predict_epoch_end(self) -> None:
        """Free the device's memory."""
        self.release()

    def teardown(self, stage: str) -> None:
        """Free the device's memory."""
        self.release()

    def release(self) -> None:
        """Free what is kept on the device for one evaluation or one run; also called when a run fails."""
        self._encoded = self.evaluator = None

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate a batch of one task."""
        self._evaluate(batch, self.trainer.val_dataloaders, batch_idx, dataloader_idx)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Evaluate a batch of one task."""
        self._evaluate(batch, self.trainer.test_dataloaders, batch_idx, dataloader_idx)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Give one record per row: `task`, `row`, `text`, `prediction`, `gold`."""
        task = task_of_loader(self._data_tasks(), dataloader_idx)
        predictions = self.predict_texts(batch, self.task_rows(batch), task)
        counted = evaluation.counted_rows(batch, self.trainer.predict_dataloaders, batch_idx, dataloader_idx)
        return evaluation.records(task, predictions, batch)[:counted]

    def on_validation_epoch_end(self) -> None:
        """Log `val/<task>/<metric>` and `val/average`."""
        self._end_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log `test/<task>/<metric>` and `test/average`."""
        self._end_evaluation("test")


NO_PROMPT = (
    "There is no trained prompt to evaluate: give --ckpt_path with a checkpoint (in Python: ckpt_path=..., or a "
    "module from load_from_checkpoint)."
)
