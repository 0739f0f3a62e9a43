"""What a module saves and how it comes back: the trained tensors, strictly, with what is needed to use them."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from os import PathLike
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_warn

from mpt_lightning.checkpoint import KEY, PromptCheckpoint, read_checkpoint
from mpt_lightning.checkpoint.format import metadata
from mpt_lightning.checkpoint.read import parse_checkpoint
from mpt_lightning.checkpoint.state import check_state, check_training_state, trainable
from mpt_lightning.data.card import TaskCard
from mpt_lightning.errors import MPTError, find_error
from mpt_lightning.io import one_line
from mpt_lightning.modules.backbone import BackboneModule
from mpt_lightning.modules.resume import ResumedRun, close_finished_epoch


class CheckpointedModule(BackboneModule):
    """A module whose checkpoints hold what is trained and never the backbone; see `BackboneModule`."""

    # The arguments that take checkpoints of other classes into a run of this one, by the other class's name.
    hand_over: ClassVar[Mapping[str, str]] = {}
    # The modules by class name, as checkpoints name them.
    classes: ClassVar[dict[str, type["CheckpointedModule"]]] = {}

    # Whether a fit is being restored from a checkpoint, up to its first step.
    restores = False
    _resumed: ResumedRun | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.classes[cls.__name__] = cls

    @classmethod
    def plain_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments as a checkpoint holds them."""
        return dict(arguments)

    @classmethod
    def check_stage(cls, checkpoint: PromptCheckpoint) -> None:
        """Raise if a checkpoint was saved by another class; the message names the argument that takes it."""
        if checkpoint.stage != cls.__name__:
            argument = cls.hand_over.get(checkpoint.stage)
            hint = f" To start from it, use {argument}." if argument else ""
            raise MPTError(
                f"--ckpt_path {checkpoint.path} was saved by {checkpoint.stage}, and this run is {cls.__name__}. "
                f"--ckpt_path only takes a checkpoint of the same class.{hint}"
            )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a trained module; see Lightning's method of the same name."""
        if isinstance(checkpoint_path, str | PathLike):
            cls.check_stage(read_checkpoint(str(checkpoint_path), "checkpoint_path"))
        kwargs["weights_only"] = True
        try:
            return super().load_from_checkpoint(checkpoint_path, *args, **kwargs)
        except Exception as error:  # arguments of any kind go into a class that expects the right ones
            cause = find_error(error)
            if cause is error:
                raise
            raise MPTError(
                f"{cls.__name__} cannot be built from the arguments in {checkpoint_path}, which is damaged or of "
                f"another version, and those given here. The cause: {one_line(cause or repr(error))}"
            ) from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how to use the tensors: class, backbone, tasks, cards."""
        backbone, prompt = self.parts()
        damaged = [name for name, value in trainable(self).items() if not value.isfinite().all()]
        if damaged:
            raise MPTError(
                f"{', '.join(damaged)} has values that are not finite at step {self.global_step}, so no checkpoint is "
                "written; earlier ones are intact. Lower the learning rate, raise --model.warmup_steps, or set "
                "--trainer.gradient_clip_val 1."
            )
        cards = {name: plain_card(card) for name, card in self.cards.items() if name in prompt.tasks}
        checkpoint[KEY] = metadata(type(self).__name__, backbone.name, backbone.fingerprint, prompt, cards)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and build a prompt of its shape."""
        found = parse_checkpoint(checkpoint, str(getattr(self._trainer, "ckpt_path", None) or "the checkpoint"))
        self.check_stage(found)
        if self._trainer is not None and self.trainer.state.fn == "fit":
            check_training_state(checkpoint, found.path)
            self._resumed, self.restores = ResumedRun(self, checkpoint, found), True
        self.configure_model()
        if self.backbone is not None:
            found.check_backbone(self.backbone.name, self.backbone.fingerprint, "--ckpt_path")
            # In the Trainer's precision from the start: a float64 prompt (64-true) must not go through float32.
            in_precision = (
                nullcontext() if self._trainer is None else self.trainer.precision_plugin.module_init_context()
            )
            with in_precision, torch.device("cpu"):
                self.prompt = found.empty_prompt().to(self.device)
            self.prompt.attach(self.backbone.embeddings)
        self.tasks = found.tasks
        self._cards = read_cards(found.cards)
        close_finished_epoch(checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the trained tensors: all of them and no others, whatever `strict` says of the frozen ones."""
        if self.prompt is None:
            # Forking strategies (notebooks) train in other processes and hand this one tensors without their names.
            rank_zero_warn(
                "The module in this process is not built, so it does not take the trained prompt. Load the run's "
                f"checkpoint: {type(self).__name__}.load_from_checkpoint(...)."
            )
            return super().load_state_dict({}, strict=False)
        check_state(self, state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)


def plain_card(card: TaskCard) -> dict[str, Any]:
    """Return a card as plain values that `weights_only` loading accepts."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(card).items()}


def read_cards(cards: Mapping[str, Any]) -> dict[str, TaskCard]:
    """Build cards from a checkpoint's plain values."""
    return {name: TaskCard(**values) for name, values in cards.items()}
