"""Multitask prompt tuning (Wang et al., ICLR 2023): source training with teachers, and target adaptation."""

from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from mpt_lightning import objectives
from mpt_lightning.arguments import NonNegativeFloat, PositiveFloat, PositiveInt
from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.batch import Batch
from mpt_lightning.modules.distillation import Distillation, Teachers, read_teachers
from mpt_lightning.modules.initialization import (
    PromptInit,
    check_length,
    checkpoint_prompts,
    class_words,
    initial_prompt,
)
from mpt_lightning.prompts import MultitaskPrompt


class _MultitaskModule(PromptModule):
    """The base of both stages: a multitask prompt with two learning rates."""

    paper = "2303.02861"
    shared_lr: float
    task_lr: float

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return two groups: the shared prompt, and the task factors (Ponti et al., 2022: slow and fast weights)."""
        _, prompt = self.parts()
        named = dict(prompt.named_parameters())
        factors = [named.pop(name) for name in prompt.task_parameters()]
        return [
            {"params": list(named.values()), "lr": self.shared_lr, "name": "shared"},
            {"params": factors, "lr": self.task_lr, "name": "task"},
        ]


class MPTSource(_MultitaskModule):
    """Source training of MPT: a shared prompt and low-rank task factors, distilled from teachers.

    Loss: cross-entropy + logits_weight · KL(teacher || student) + hidden_weight · squared error of hidden states.
    The paper gives neither the weights nor the layers; each is an argument, and each term is logged. All three terms
    are means over the rows of an optimizer step, weighted by the rows' label tokens: of the label tokens' cross-entropy
    and KL, and of the mean squared error of a row's compared positions.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model.
        teachers: Checkpoint of a PromptTuning run over the source tasks, or one checkpoint per task by name; PEFT
            folders work too. Required unless both weights are 0.
        prompt_length: P, tokens per prompt; the teachers' too.
        rank: R of the task factors; 1 in the paper.
        prompt_init: Where the shared prompt starts: sampled vocabulary, the tokens of `init_text`, the class words,
            random, or the mean of the prompts of `init_checkpoint`.
        init_text: The text of prompt_init="text".
        init_checkpoint: The checkpoint of prompt_init="checkpoint".
        factor_init: "ones" starts each task at the shared prompt; "normal" is PEFT's N(0, 0.02).
        shared_lr: Learning rate of the shared prompt.
        task_lr: Learning rate of the task factors.
        logits_weight: Weight of the KL term.
        hidden_weight: Weight of the hidden-state term.
        temperature: Temperature of the KL term.
        hidden_layers: The last layer, or all.
        hidden_positions: Text tokens, prompt tokens, or all.
        hidden_stacks: Encoder, decoder, or both if the model has both.
        teacher_every: Distil at every n-th optimizer step; the others have the task loss alone, and no teacher pass.
            The terms then count n times, so that the loss above is the average over the steps; to let them count once,
            divide both weights by n.
        teacher_cache: Folder of a disk cache of the teachers' output. A row that was computed once, in any run with the
            same teacher and settings, needs no teacher pass. The folder must be on a disk of this machine. A row takes
            8 bytes · teacher_top_k per label token, and 2 bytes · H per token and hidden layer.
        teacher_top_k: Likeliest tokens that the cache keeps of each distribution. All others count as one token, so
            that the KL term is a lower bound of the exact one; they are equal if all tokens are kept.
        **kwargs: See `BackboneModule`.
    """

    title = "Multitask prompt tuning, source training"
    summary = "a prompt that all tasks share, times a low-rank matrix per task, distilled from single-task prompts"
    hand_over: ClassVar = {"PromptTuning": "--model.teachers"}
    fixed_arguments = (*PromptModule.fixed_arguments, "prompt_length", "rank")
    initial_arguments = (
        *PromptModule.initial_arguments, "prompt_init", "init_text", "init_checkpoint", "factor_init",
    )  # fmt: skip

    def __init__(
        self,
        backbone: str,
        teachers: str | dict[str, str] | None = None,
        prompt_length: PositiveInt = 100,
        rank: PositiveInt = 1,
        prompt_init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_checkpoint: str | None = None,
        factor_init: Literal["ones", "normal"] = "ones",
        shared_lr: NonNegativeFloat = 0.3,
        task_lr: NonNegativeFloat = 0.4,
        logits_weight: NonNegativeFloat = 1.0,
        hidden_weight: NonNegativeFloat = 1.0,
        temperature: PositiveFloat = 1.0,
        hidden_layers: objectives.Layers = "last",
        hidden_positions: objectives.Positions = "text",
        hidden_stacks: objectives.Stacks = "both",
        teacher_every: PositiveInt = 1,
        teacher_cache: str | None = None,
        teacher_top_k: PositiveInt = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        self.teacher_paths = teachers
        self.prompt_length, self.rank = prompt_length, rank
        self.prompt_init, self.init_text, self.init_checkpoint = prompt_init, init_text, init_checkpoint
        self.factor_init: Literal["ones", "normal"] = factor_init
        self.shared_lr, self.task_lr = shared_lr, task_lr
        self.distillation = Distillation(
            logits_weight, hidden_weight, temperature, hidden_layers, hidden_positions, hidden_stacks, teacher_top_k
        )
        self.distils = logits_weight > 0 or hidden_weight > 0
        self.teacher_every, self.teacher_cache = teacher_every, teacher_cache
        if teacher_cache is not None and self.backbone_dropout:
            raise MPTError(
                "With backbone_dropout=True every pass of the teachers differs, so that nothing can be kept in "
                "teacher_cache. Set --model.backbone_dropout to false, or --model.teacher_cache to null."
            )
        # Neither a module nor a buffer: not trained, not saved, and not sent from rank to rank at every step.
        self.teachers: Teachers | None = None

    def setup(self, stage: str) -> None:
        """Check the teachers before anything is loaded."""
        super().setup(stage)
        if stage == "fit" and self.distils:
            self._read_teachers()

    def _read_teachers(self) -> dict[str, PromptCheckpoint]:
        if not self.teacher_paths:
            raise MPTError(
                "MPTSource distils from teachers, and got none: set --model.teachers to a checkpoint of a "
                "PromptTuning run over the same tasks, or set logits_weight and hidden_weight to 0."
            )
        return read_teachers(self.teacher_paths, self.tasks, self.prompt_length, self.backbone)

    def configure_model(self) -> None:
        """Build the prompt, and load the teachers if a fit begins or resumes."""
        super().configure_model()
        if self._builds_prompt() and self.distils and self.teachers is None and self.backbone is not None:
            prompts = []
            for task, teacher in self._read_teachers().items():
                teacher.check_backbone(self.backbone.name, self.backbone.fingerprint, "--model.teachers")
                with torch.device("cpu"):
                    prompts.append(teacher.prompt(self.backbone.embeddings).fold(task))
            self.teacher_prompts = torch.stack(prompts)

    @property
    def teacher_prompts(self) -> Tensor | None:
        """The teachers' prompts `[T, P, H]`, in the order of `tasks`; a fit without them reads `teachers`."""
        return None if self.teachers is None else self.teachers.prompts

    @teacher_prompts.setter
    def teacher_prompts(self, prompts: Tensor) -> None:
        folder = None if self.teacher_cache is None else Path(self.teacher_cache).expanduser()
        if folder is not None and self._trainer is not None and self.trainer.num_nodes > 1:
            # Processes of one machine share a file; between machines SQLite's locks do not hold.
            folder = folder / f"node{self.trainer.node_rank}"
        self.teachers = Teachers(prompts, self.distillation, folder, self.backbone_quantization)

    def release(self) -> None:
        """Free the device's memory, and close the teachers' cache."""
        super().release()
        if self.teachers is not None:
            self.teachers.forget()

    def build_prompt(self, backbone: Backbone) -> MultitaskPrompt:
        """Build the shared prompt and one pair of factors per task."""
        length = self.prompt_length
        prompt = MultitaskPrompt(len(self.tasks), length, backbone.dim, self.rank, self.tasks, self.factor_init)
        if self.prompt_init == "checkpoint":
            start = checkpoint_prompts(self.init_checkpoint, backbone, self.tasks, length).mean(dim=0)
        else:
            words = class_words(self.cards, self.tasks, backbone.family)
            start = initial_prompt(self.prompt_init, backbone, length, self.init_text, words)
        prompt.initialize(start)
        return prompt

    @property
    def distils_now(self) -> bool:
        """Whether this optimizer step distils: with `teacher_every` n, the n-th one, the 2n-th, ...

        It depends on the number of the step, which a checkpoint has, and which all micro-batches of a step share.
        """
        return self.distils and (self.global_step + 1) % self.teacher_every == 0

    def row_weights(self, batch: Batch) -> Tensor:
        """Return the number of label tokens of each row `[B]`, which the distillation terms take their means over."""
        return (batch["labels"] != objectives.IGNORE).sum(dim=1) if self.distils else super().row_weights(batch)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the task loss, both distillation terms and their weighted sum."""
        if not self.distils_now:
            loss = super().losses(batch)["loss"]
            return {"loss": loss, "task_loss": loss} if self.distils else {"loss": loss}
        if self.teachers is None:
            raise RuntimeError("the teachers are loaded when a fit begins")
        options = self.distillation
        backbone, prompt = self.parts()
        distinct, rows = self.task_rows(batch).unique(return_inverse=True)
        # The teachers go first: the memory of their pass is free again before the student's is kept for its gradients.
        any_rank = partial(self.trainer.strategy.reduce_boolean_decision, all=False) if backbone.sharded else bool
        targets = self.teachers.targets(backbone, distinct, rows, batch, any_rank)
        inputs = (rows, batch["input_ids"], batch["attention_mask"], batch["labels"])
        student = backbone(prompt(distinct), *inputs, hidden_states=options.hidden_weight > 0)
        terms = {"task_loss": self.task_loss(batch, student.logits)}
        terms |= targets.terms(student, rows, batch["labels"])
        loss = terms["task_loss"]
        for name, weight in (("logits_loss", options.logits_weight), ("hidden_loss", options.hidden_weight)):
            if weight > 0:
                loss = loss + self.teacher_every * weight * terms[name]
        return {"loss": loss, **terms}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch, and log each of its terms."""
        loss = super().training_step(batch, batch_idx)
        results = self.trainer._results
        if self.distils and not self.distils_now and results is not None:
            # Lightning logs a value again at every later step, until it gets a new one.
            for name in ("logits_loss", "hidden_loss"):
                results.pop(f"training_step.train/{name}", None)
        return loss


class MPTTarget(_MultitaskModule):
    """Target adaptation of MPT: starts from a source prompt, trains on the task loss alone.

    Several target tasks share one P* and have separate factors (the paper's multi-target setting).

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model: the source run's.
        source: Checkpoint of the MPTSource run, or a PEFT folder of the type MULTITASK_PROMPT_TUNING.
        start: "average" takes the mean of the source tasks' factors (the paper's way), "shared" the shared prompt
            alone, any other word is the source task whose factors are taken.
        shared_lr: Learning rate of the shared prompt.
        task_lr: Learning rate of the task factors.
        prompt_length: P. The source's by default; any other value is an error.
        **kwargs: See `BackboneModule`.
    """

    title = "Multitask prompt tuning, target adaptation"
    summary = "a prompt transferred from source tasks, times a low-rank matrix per task"
    hand_over: ClassVar = {"MPTSource": "--model.source"}
    fixed_arguments = (*PromptModule.fixed_arguments, "prompt_length")
    initial_arguments = (*PromptModule.initial_arguments, "source", "start")

    def __init__(
        self,
        backbone: str,
        source: str,
        start: str = "average",
        shared_lr: NonNegativeFloat = 0.3,
        task_lr: NonNegativeFloat = 0.4,
        prompt_length: PositiveInt | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        self.source_path, self.start = source, start
        self.shared_lr, self.task_lr = shared_lr, task_lr
        self.prompt_length = prompt_length

    def setup(self, stage: str) -> None:
        """Check the source before anything is loaded."""
        super().setup(stage)
        if self._builds_prompt() and self.prompt is None:
            self._read_source()

    def _read_source(self) -> PromptCheckpoint:
        source = read_checkpoint(self.source_path, "--model.source", folder=True, backbone=self.backbone)
        if source.prompt_class != "MultitaskPrompt":
            raise MPTError(
                f"--model.source {source.path} was saved by {source.stage}, which has no shared prompt. "
                "Give a checkpoint of MPTSource."
            )
        if self.prompt_length is not None:
            check_length(source.path, source.prompt_config["length"], self.prompt_length, "--model.source")
        if self.start not in ("average", "shared", *source.tasks):
            raise MPTError(
                f"start must be 'average', 'shared' or a source task ({', '.join(source.tasks)}), got {self.start!r}."
            )
        return source

    def build_prompt(self, backbone: Backbone) -> MultitaskPrompt:
        """Build the targets' prompt from the source's."""
        source = self._read_source()
        source.check_backbone(backbone.name, backbone.fingerprint, "--model.source")
        trained = cast(MultitaskPrompt, source.prompt())  # checked in `_read_source`
        return MultitaskPrompt.from_source(trained, self.tasks, self.start)
