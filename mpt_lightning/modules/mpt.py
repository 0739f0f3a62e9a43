"""Multitask prompt tuning (Wang et al., ICLR 2023): source training with teachers, and target adaptation."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from mpt_lightning import objectives
from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.modules.batch import Batch
from mpt_lightning.modules.initialization import check_length, checkpoint_prompts, class_words, initial_prompt
from mpt_lightning.modules.options import PromptInit
from mpt_lightning.modules.teachers import Teachers, read_teachers
from mpt_lightning.prompts import MultitaskPrompt


class _MultitaskModule(PromptModule):
    """What both stages share: a multitask prompt with two learning rates."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Give two groups: the shared prompt, and the task factors (Ponti et al., 2022: slow and fast weights)."""
        _, prompt = self.parts()
        named = dict(prompt.named_parameters())
        factors = [named[name] for name in prompt.task_parameters()]
        shared = [value for name, value in named.items() if name not in prompt.task_parameters()]
        return [
            {"params": shared, "lr": self.hparams["shared_lr"], "name": "shared"},
            {"params": factors, "lr": self.hparams["task_lr"], "name": "task"},
        ]


class MPTSource(_MultitaskModule):
    """Source training of MPT: a shared prompt and low-rank task factors, distilled from teachers.

    Loss: cross-entropy + logits_weight · KL(teacher || student) + hidden_weight · squared error of hidden states.
    The paper gives neither the weights nor the layers; each is an argument, and each term is logged. All three terms
    are means over the rows of an optimizer step, weighted by the rows' label tokens: of the label tokens' cross-entropy
    and KL, and of the mean squared error of a row's compared positions.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model.
        teachers: checkpoint of a PromptTuning run over the source tasks, or one checkpoint per task by name; PEFT
            folders will do. Required unless both weights are 0.
        prompt_length: P, tokens per prompt; the teachers' too.
        rank: R of the task factors; 1 in the paper.
        prompt_init: where the shared prompt starts: sampled vocabulary, the tokens of `init_text`, the class words,
            random, or the mean of the prompts of `init_checkpoint`.
        init_text: the text of prompt_init="text".
        init_checkpoint: the checkpoint of prompt_init="checkpoint".
        factor_init: "ones" starts each task at the shared prompt; "normal" is PEFT's N(0, 0.02).
        shared_lr: learning rate of the shared prompt.
        task_lr: learning rate of the task factors.
        logits_weight: weight of the KL term.
        hidden_weight: weight of the hidden-state term.
        temperature: of the KL term, above 0.
        hidden_layers: the last layer, or all.
        hidden_positions: text tokens, prompt tokens, or all.
        hidden_stacks: encoder, decoder, or both where the model has both.
        teacher_every: distil at every n-th optimizer step; the others have the task loss alone, and cost no teacher
            pass. The terms then count n times, so that on average over the steps the loss is the one above; to let
            them count once, divide both weights by n.
        teacher_cache: folder of a disk cache of what the teachers say of each row. A row that was seen once, in any
            run with the same teacher and settings, needs no teacher pass. The folder must be on a disk of this
            machine. A row takes 8 bytes · teacher_top_k per label token, and 2 bytes · H per token and hidden layer.
        teacher_top_k: with teacher_cache: the likeliest tokens that are kept of each distribution. All others count
            as one, so that the KL term is a lower bound of the whole one; equal to it from the vocabulary's size on.
        **kwargs: see `BuiltModule`.
    """

    def __init__(
        self,
        backbone: str,
        teachers: str | dict[str, str] | None = None,
        prompt_length: int = 100,
        rank: int = 1,
        prompt_init: PromptInit = "vocabulary",
        init_text: str | None = None,
        init_checkpoint: str | None = None,
        factor_init: Literal["ones", "normal"] = "ones",
        shared_lr: float = 0.3,
        task_lr: float = 0.4,
        logits_weight: float = 1.0,
        hidden_weight: float = 1.0,
        temperature: float = 1.0,
        hidden_layers: objectives.Layers = "last",
        hidden_positions: objectives.Positions = "text",
        hidden_stacks: objectives.Stacks = "both",
        teacher_every: int = 1,
        teacher_cache: str | None = None,
        teacher_top_k: int = 64,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)
        if not temperature > 0:
            raise MPTError(f"temperature must be above 0, got {temperature}.")
        self.distils = logits_weight > 0 or hidden_weight > 0
        if teacher_cache is not None and self.hparams["backbone_dropout"]:
            raise MPTError(
                "backbone_dropout=True makes each pass of the teachers another one, so there is nothing to keep in "
                "teacher_cache. Set --model.backbone_dropout to false, or --model.teacher_cache to null."
            )
        # No module and no buffer: neither trained, nor saved, nor sent from rank to rank at every step.
        self.teachers: Teachers | None = None

    def setup(self, stage: str) -> None:
        """Check the teachers before anything is loaded."""
        super().setup(stage)
        if stage == "fit" and self.distils:
            if not self.hparams["teachers"]:
                raise MPTError(
                    "MPTSource distils from teachers, and there are none: set --model.teachers to a checkpoint of a "
                    "PromptTuning run over the same tasks, or set logits_weight and hidden_weight to 0."
                )
            self._teacher_checkpoints()

    def _teacher_checkpoints(self) -> dict[str, PromptCheckpoint]:
        return read_teachers(self.hparams["teachers"], self.tasks, self.hparams["prompt_length"], self.backbone)

    def configure_model(self) -> None:
        """Build the prompt, and load the teachers where a fit begins or goes on."""
        super().configure_model()
        if self._fits() and self.distils and self.teachers is None and self.backbone is not None:
            prompts = []
            for task, teacher in self._teacher_checkpoints().items():
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
        cache = self.hparams["teacher_cache"]
        folder = None if cache is None else Path(cache).expanduser()
        if folder is not None and self._trainer is not None and self.trainer.num_nodes > 1:
            # Processes of one machine share a file; between machines SQLite's locks do not hold.
            folder = folder / f"node{self.trainer.node_rank}"
        self.teachers = Teachers(prompts, self.hparams, folder)

    def on_fit_start(self) -> None:
        """Match the data's tasks with the prompt's, and forget what the teachers kept of another run."""
        super().on_fit_start()
        if self.teachers is not None:
            self.teachers.forget()

    def release(self) -> None:
        """Free the device's memory, and close the teachers' cache."""
        super().release()
        if self.teachers is not None:
            self.teachers.forget()

    def build_prompt(self, backbone: Backbone) -> MultitaskPrompt:
        """Make the shared prompt and one pair of factors per task."""
        options, length = self.hparams, self.hparams["prompt_length"]
        prompt = MultitaskPrompt(
            len(self.tasks), length, backbone.dim, options["rank"], self.tasks, options["factor_init"]
        )
        if options["prompt_init"] == "checkpoint":
            start = checkpoint_prompts(options["init_checkpoint"], backbone, self.tasks, length).mean(dim=0)
        else:
            words = class_words(self.cards, self.tasks)
            start = initial_prompt(options["prompt_init"], backbone, length, options["init_text"], words)
        prompt.initialize(start)
        return prompt

    @property
    def distils_now(self) -> bool:
        """Whether this optimizer step distils: with `teacher_every` n, the n-th one, the 2n-th, ...

        The number of the step decides, which a checkpoint has, and which all micro batches of a step share.
        """
        return self.distils and (self.global_step + 1) % self.hparams["teacher_every"] == 0

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Give the task loss, both distillation terms and their weighted sum."""
        if not self.distils_now:
            loss = super().losses(batch)["loss"]
            return {"loss": loss, "task_loss": loss} if self.distils else {"loss": loss}
        if self.teachers is None:
            raise RuntimeError("the teachers are loaded when a fit begins")
        options = self.hparams
        backbone, prompt = self.parts()
        distinct, rows = self.task_rows(batch).unique(return_inverse=True)
        # The teachers go first: what their pass needs is free again before the student's is kept for its gradients.
        targets = self.teachers.targets(backbone, distinct, rows, batch, self._any_rank if backbone.sharded else bool)
        inputs = (rows, batch["input_ids"], batch["attention_mask"], batch["labels"])
        student = backbone(prompt(distinct), *inputs, hidden_states=options["hidden_weight"] > 0)
        terms = {"task_loss": objectives.token_cross_entropy(student.logits, batch["labels"])}
        terms |= targets.terms(student, rows, batch["labels"])
        loss = terms["task_loss"]
        for name in ("logits", "hidden"):
            if options[f"{name}_weight"] > 0:
                loss = loss + options["teacher_every"] * options[f"{name}_weight"] * terms[f"{name}_loss"]
        return {"loss": loss, **terms}

    def _any_rank(self, decision: bool) -> bool:
        return self.trainer.strategy.reduce_boolean_decision(decision, all=False)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Give the loss of a batch, and log each of its terms."""
        loss = super().training_step(batch, batch_idx)
        results = self.trainer._results
        if self.distils and not self.distils_now and results is not None:
            # Lightning writes a value again at every later step, until it gets a new one.
            for name in ("logits_loss", "hidden_loss"):
                results.pop(f"training_step.train/{name}", None)
        return loss


class MPTTarget(_MultitaskModule):
    """Target adaptation of MPT: starts from a source prompt, trains on the task loss alone.

    With several target tasks, these share one P* and have their own factors (the paper's multi-target setting).

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model: the source run's.
        source: checkpoint of the MPTSource run, or a PEFT folder of the type MULTITASK_PROMPT_TUNING.
        start: "average" takes the mean of the source tasks' factors (the paper's way), "shared" the shared prompt
            alone, any other word is the source task whose factors are taken.
        shared_lr: learning rate of the shared prompt.
        task_lr: learning rate of the task factors.
        prompt_length: P. By default the source's; any other value is refused.
        **kwargs: see `BuiltModule`.
    """

    def __init__(
        self,
        backbone: str,
        source: str,
        start: str = "average",
        shared_lr: float = 0.3,
        task_lr: float = 0.4,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(backbone=backbone, **kwargs)

    def setup(self, stage: str) -> None:
        """Check the source before anything is loaded."""
        super().setup(stage)
        if self._fits() and self.prompt is None:
            self._source()

    def _source(self) -> PromptCheckpoint:
        source = read_checkpoint(self.hparams["source"], "--model.source", folder=True, backbone=self.backbone)
        if source.prompt_class != "MultitaskPrompt":
            raise MPTError(
                f"--model.source {source.path} was saved by {source.stage}, which has no shared prompt. "
                "Give a checkpoint of MPTSource."
            )
        if self.hparams["prompt_length"] is not None:
            check_length(source.path, source.prompt_config["length"], self.hparams["prompt_length"], "--model.source")
        start = self.hparams["start"]
        if start not in ("average", "shared", *source.tasks):
            raise MPTError(
                f"start must be 'average', 'shared' or a source task ({', '.join(source.tasks)}), got {start!r}."
            )
        return source

    def build_prompt(self, backbone: Backbone) -> MultitaskPrompt:
        """Make the targets' prompt from the source's."""
        source = self._source()
        source.check_backbone(backbone.name, backbone.fingerprint, "--model.source")
        trained = source.prompt()
        if not isinstance(trained, MultitaskPrompt):
            raise TypeError("checked in _source")
        return MultitaskPrompt.from_source(trained, self.tasks, self.hparams["start"])
