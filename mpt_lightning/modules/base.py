"""The training step, loss and optimizer that all methods share."""

from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer

from mpt_lightning import objectives
from mpt_lightning.checkpoint.state import trainable
from mpt_lightning.distributed import ranks
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.accumulation import StepMean
from mpt_lightning.modules.batch import Batch
from mpt_lightning.modules.evaluation import EvaluatedModule, choice_loss
from mpt_lightning.modules.optimizers import build_optimizer, build_schedule, total_steps


class PromptModule(EvaluatedModule):
    """The base of all methods: a prompt in front of a frozen backbone, trained, evaluated and saved.

    A method implements `build_prompt`, and has a learning rate `lr` or its own `parameter_groups`; `losses`,
    `label_tokens` and `adapt` have defaults. See `BackboneModule` for the arguments.
    """

    # The name of the optimizer's one group.
    group_name: ClassVar[str] = "prompts"
    lr: float
    _fault: str | None = None  # why this rank cannot continue
    _step: StepMean  # of the optimizer step that is being accumulated

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups: `params`, `lr` and `name`. By default one: the prompt, with `self.lr`."""
        _, prompt = self.parts()
        return [{"params": list(prompt.parameters()), "lr": self.lr, "name": self.group_name}]

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the terms of the training loss by name; "loss" is minimised.

        Each is a mean over the batch's `label_tokens`, or does not depend on the batch. So terms and gradients of an
        optimizer step are exactly those of one batch with all its rows (see `StepMean`).
        """
        return {"loss": self.task_loss(batch)}

    def task_loss(self, batch: Batch, logits: Tensor | None = None) -> Tensor:
        """Return the cross-entropy of a batch's answers, over the vocabulary or the tasks' choices (see `over`).

        `logits` `[B, M, V]` are those of the labels, if they were computed already.
        """
        if not self.over_choices:
            return objectives.token_cross_entropy(self(batch) if logits is None else logits, batch["labels"])
        if batch.get("choices") is None:
            raise MPTError(
                "The batch: got no `choices`, expected the tokens of each row's choices, which the loss is over. Add "
                "them to the batches, use tasks with choices, or set --model.over vocabulary."
            )
        choices, weights = batch["choices"], self.row_weights(batch)
        backbone, prompt = self.parts()
        single = logits is not None and logits.shape[1] == choices.shape[2] == 1
        if logits is not None and backbone.sharded:  # all ranks make a further pass, or none
            single = self.trainer.strategy.reduce_boolean_decision(single)
        if logits is not None and single:
            # Single tokens, of which the logits have all that a pass of their own would compute.
            found = functional.log_softmax(objectives.precise(logits[:, 0]), dim=1)
            scores = found.gather(1, choices[..., 0].clamp(min=0))
            scores = scores.masked_fill(choices[..., 0] == objectives.IGNORE, float("-inf"))
            return choice_loss(scores, batch, weights)
        distinct, rows = self.task_rows(batch).unique(return_inverse=True)
        scores = backbone.score(prompt(distinct), rows, batch["input_ids"], batch["attention_mask"], choices)
        return choice_loss(scores, batch, weights)

    def label_tokens(self, batch: Batch) -> Tensor:
        """Return what `losses` takes its means over, the batch's weight in its step: label tokens (`row_weights`)."""
        return self.row_weights(batch).sum()

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits `[B, M, V]` of the label tokens."""
        backbone, prompt = self.parts()
        distinct, rows = self.task_rows(batch).unique(return_inverse=True)
        return backbone(prompt(distinct), rows, batch["input_ids"], batch["attention_mask"], batch["labels"]).logits

    def on_fit_start(self) -> None:
        """Match the data's tasks with the prompt's, and compare a resumed run's arguments with the checkpoint's."""
        self._fault, self._step = None, StepMean()
        self._match_tasks()
        self._check_choices()
        self._check_loss()
        resumed, self._resumed = self._resumed, None
        ranks.check_one_start(self.trainer, resumed.step if resumed else None)
        if resumed is not None:
            resumed.report(self.trainer)
        if self.trainer.ckpt_path is not None:
            # To count the run's steps Lightning 2.6 builds the training data before the checkpoint is restored, and
            # then does not position it. So it is built again.
            self.trainer.fit_loop._combined_loader = None

    def _check_loss(self) -> None:
        """Check that the loss has an answer in each row of the data's tasks; warn if values become words."""
        backbone, _ = self.parts()
        words = {name: card.words(backbone.family) for name, card in self.cards.items() if name in self._data_tasks()}
        if self.over_choices and (without := [name for name, found in words.items() if not found]):
            raise MPTError(
                f"The loss is over the tasks' choices, and the cards of {', '.join(without)} have none. Leave these "
                "tasks out, or set --model.over vocabulary."
            )
        values = [name for name, found in words.items() if found and self.cards[name].value_range is not None]
        if values and not self.over_choices:
            rank_zero_warn(
                f"Over the vocabulary, the values of {', '.join(values)} are learned as the nearer one of two words. "
                "Set --model.over choices, where each word has its share."
            )

    def on_train_start(self) -> None:
        """Record that the run is restored."""
        self.restores = False

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
                f"{self._not_finite(batch)}. Training has stopped; earlier checkpoints are intact. Lower the learning "
                "rate, raise --model.warmup_steps, set --trainer.gradient_clip_val 1, or look at these rows."
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

        Callbacks, clipping and the gradient scaler come later, and receive the weighted gradients.
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
        """Stop if the loss of any rank was not finite."""
        if self.trainer.world_size > 1:
            ranks.stop_together(self.trainer, optimizer, self._fault)

    @torch.no_grad()
    def _not_finite(self, batch: Batch) -> str:
        """Return, by task, the rows whose loss is not finite; all rows if the loss of each single one is finite."""
        backbone, _ = self.parts()
        # A sharded backbone runs on all ranks or none, and a classifier has no logits.
        unknown = backbone.sharded or self.head is not None
        own = batch["labels"].new_zeros(len(batch["labels"])) if unknown else torch.stack(
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
        """Build the optimizer and its schedule, stepped once per optimizer step."""
        optimizer = build_optimizer(self.optimizer_name, self.parameter_groups(), self.weight_decay)
        total = total_steps(self.trainer)
        if self.schedule != "constant" and total is not None and self.warmup_steps >= total:
            rank_zero_warn(
                f"warmup_steps ({self.warmup_steps}) is not less than the run's {total} steps, so the learning rate "
                "never reaches its value. Lower --model.warmup_steps or train longer."
            )
        schedule = build_schedule(self.schedule, optimizer, self.warmup_steps, total)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
