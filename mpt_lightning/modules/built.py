"""Building a prompt module, and its checkpoints: what is known before and after training."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from os import PathLike
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from mpt_lightning.backbones import Backbone, load_backbone
from mpt_lightning.backbones.quantization import Quantization
from mpt_lightning.checkpoint import KEY, PromptCheckpoint, read_checkpoint
from mpt_lightning.checkpoint.format import metadata
from mpt_lightning.checkpoint.io import CheckedCheckpointIO
from mpt_lightning.checkpoint.read import parse_checkpoint
from mpt_lightning.checkpoint.state import (
    check_state,
    check_training_state,
    close_finished_epoch,
    keep_trainable,
    trainable,
)
from mpt_lightning.distributed.preemption import ReleaseOnException, SaveOnTermination
from mpt_lightning.distributed.strategy import ShardedStrategy, check_strategy, share_random_numbers
from mpt_lightning.errors import MPTError, find_error
from mpt_lightning.io import one_line
from mpt_lightning.modules import evaluation
from mpt_lightning.modules.options import OptimizerName, ScheduleName, check_options
from mpt_lightning.modules.resume import ResumedRun
from mpt_lightning.prompts import Prompt


class BuiltModule(L.LightningModule, ABC):
    """A prompt in front of a frozen backbone.

    Takes batches `{input_ids [B, L], attention_mask [B, L], labels [B, M], task_ids [B]}` from any DataModule; see
    `mpt_lightning.modules.batch.check_batch`.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model.
        tasks: names of the tasks; by default those of the DataModule.
        backbone_dtype: precision of the frozen weights. Prompts, losses and optimizer stay in fp32.
        backbone_quantization: keep the frozen weights in 4 or 8 bits; needs `pip install mpt_lightning[quantization]`.
        backbone_dropout: keep the backbone's dropout on while prompts train. Off is usually worth several points.
        gradient_checkpointing: recompute the backbone's layers in the backward pass: less memory, more time.
        backbone_compile: compile the backbone's feed-forward networks and norms (`torch.compile`): the first steps take
            long, later ones less than without. Needs a C++ compiler.
        backbone_check: when it loads, compare the backbone with itself on a few tokens, and refuse it if prompts would
            give wrong results.
        optimizer: "adamw" or "adafactor".
        schedule: the learning rate after the warm-up: linearly to 0, constant, or along a cosine to 0.
        warmup_steps: optimizer steps over which the learning rate rises from 0.
        weight_decay: decoupled weight decay of the trained tensors.
        max_new_tokens: longest generated answer, in tokens, for tasks without choices.
        num_beams: beams of the generation; 1 is greedy.
    """

    def __init__(
        self,
        backbone: str,
        tasks: list[str] | None = None,
        backbone_dtype: Literal["float32", "bfloat16"] = "float32",
        backbone_quantization: Quantization | None = None,
        backbone_dropout: bool = False,
        gradient_checkpointing: bool = False,
        backbone_compile: bool = False,
        backbone_check: bool = True,
        optimizer: OptimizerName = "adamw",
        schedule: ScheduleName = "linear",
        warmup_steps: int = 0,
        weight_decay: float = 0.0,
        max_new_tokens: int = 64,
        num_beams: int = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_options(self.hparams)
        self.tasks: list[str] = list(tasks or [])
        self.backbone: Backbone | None = None
        self.prompt: Prompt | None = None
        self.evaluator: evaluation.Evaluator | None = None
        self._encoded: Any = None  # the prompts of all tasks, while evaluating
        # From the data's task ids to this module's: a buffer, so that it moves with the module.
        self.register_buffer("_row_of_task", None, persistent=False)
        self._cards: dict[str, Any] = {}
        self._resumed: ResumedRun | None = None  # what this fit resumes from
        self.restores = False  # whether a fit is being restored from a checkpoint, up to its first step
        self.register_state_dict_post_hook(keep_trainable)

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP leaves alone, at the start and in every step: all but what is trained, which each rank has."""
        frozen = [name for name, value in self.named_parameters(remove_duplicate=False) if not value.requires_grad]
        return [*frozen, *(name for name, _ in self.named_buffers(remove_duplicate=False))]

    @abstractmethod
    def build_prompt(self, backbone: Backbone) -> Prompt:
        """Make the prompt that training starts from, for `self.tasks`."""

    # Whether `adapt` needs the backbone on the CPU. Otherwise weights are loaded straight to the Trainer's device.
    adapts_on_cpu = False

    def adapt(self, backbone: Backbone) -> None:
        """Prepare the backbone that was just loaded; by default it is used as it is."""

    @property
    def cards(self) -> dict[str, Any]:
        """The tasks' cards by name: the DataModule's, else the checkpoint's."""
        module = self._datamodule()
        return dict(getattr(module, "cards", None) or self._cards)

    def _datamodule(self) -> Any:
        return getattr(self._trainer, "datamodule", None) if self._trainer is not None else None

    def _fits(self) -> bool:
        """Whether this is a training run, so that a prompt is needed to start from."""
        return self._trainer is not None and self.trainer.state.fn == "fit"

    def setup(self, stage: str) -> None:
        """Find the task names, and check what can be checked before the backbone is loaded."""
        if not self.hparams["backbone_dropout"]:
            # The backbone is in eval mode because it was asked for.
            warnings.filterwarnings("ignore", "Found .* in eval mode at the start of training")
        if self._trainer is not None and type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            self.trainer.strategy.checkpoint_io = CheckedCheckpointIO()
        if self._trainer is not None:
            check_strategy(self.trainer.strategy, self.hparams["backbone_quantization"], self._datamodule())
        if stage != "fit":
            return
        if not self.tasks:
            self.tasks = list(getattr(self._datamodule(), "tasks", []))
        if not self.tasks:
            raise MPTError(
                "The tasks have no names: the data has no `tasks`. Give the DataModule an attribute `tasks`, or set "
                "the module's `tasks` (--model.tasks): names in the order of the batches' task_ids."
            )

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callbacks for runs that end early."""
        return [SaveOnTermination(), ReleaseOnException()]

    def configure_model(self) -> None:
        """Load the backbone, and make the prompt where a fit begins."""
        if self.backbone is None:
            options = self.hparams
            # Lightning calls this hook with the Trainer's device as the default one.
            with torch.device("cpu") if self.adapts_on_cpu else nullcontext():
                backbone = load_backbone(
                    options["backbone"], options["backbone_dtype"], options["backbone_dropout"],
                    options["gradient_checkpointing"], options["backbone_quantization"],
                    self.trainer.strategy.root_device if self._trainer is not None else None,
                    options["backbone_compile"], options["backbone_check"],
                )  # fmt: skip
            with torch.device("cpu"):  # a seed gives one start on every device
                self.adapt(backbone)
            self.backbone = backbone
        if self._trainer is not None and isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(self.backbone)
        else:
            self.backbone.to(self.device)
        if self.prompt is None and self._fits():
            share_random_numbers(self.trainer.strategy)
            with torch.device("cpu"):
                prompt = self.build_prompt(self.backbone)
            self.prompt = prompt.to(self.device)
            self._check_positions(self.backbone, self.prompt)

    def _check_positions(self, backbone: Backbone, prompt: Prompt) -> None:
        """Refuse rows that cannot fit the backbone, where the data says how long they may get."""
        longest, limit = getattr(self._datamodule(), "max_input_length", None), backbone.max_positions
        if limit is not None and longest is not None and prompt.length + longest > limit:
            before = f"A prompt of {prompt.length} tokens and inputs" if prompt.length else "Inputs"
            raise MPTError(
                f"{before} of up to {longest} need {prompt.length + longest} "
                f"positions, and {backbone.name} has {limit}. Lower --data.max_input_length to "
                f"{max(1, limit - prompt.length)} (less where answers are long)"
                f"{', or --model.prompt_length' if prompt.length else ''}."
            )

    def _match_tasks(self) -> None:
        module = self._datamodule()
        names = self._data_tasks()
        unknown = [name for name in names if name not in self.tasks]
        if unknown:
            raise MPTError(
                f"The data has the task{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}, and the prompt has "
                f"{', '.join(self.tasks)}. Train the prompt on these tasks, or leave them out of the data."
            )
        if self.prompt is not None:
            for name, count in getattr(module, "prompt_slots", {}).items():
                if count != self.prompt.length:
                    raise MPTError(
                        f"The inputs of {name} have places for {count} prompt tokens, and the prompt has "
                        f"{self.prompt.length}. Set --model.prompt_length to {count}, or change the [prompt*N] of "
                        "--data.card.input and --data.answer_prefix."
                    )
        self._row_of_task = torch.tensor([self.tasks.index(name) for name in names], device=self.device)

    def parts(self) -> tuple[Backbone, Prompt]:
        """Give the backbone and the prompt.

        Raises:
            RuntimeError: they are not built yet.
        """
        if self.backbone is None or self.prompt is None:
            raise RuntimeError(
                "The module is not built yet: train it with a Trainer, or use load_from_checkpoint(...)."
            )
        return self.backbone, self.prompt

    def _data_tasks(self) -> list[str]:
        return list(getattr(self._datamodule(), "tasks", self.tasks))

    @classmethod
    def needs_checkpoint(cls, arguments: Mapping[str, Any]) -> bool:
        """Say whether evaluating with these arguments takes a trained prompt."""
        return True

    @classmethod
    def plain_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Give arguments as a checkpoint holds them."""
        return dict(arguments)

    @classmethod
    def check_stage(cls, checkpoint: PromptCheckpoint) -> None:
        """Refuse to go on from another class's checkpoint.

        Raises:
            MPTError: the checkpoint is of another stage; names the argument that takes it.
        """
        if checkpoint.stage != cls.__name__:
            hint = HAND_OVER.get((checkpoint.stage, cls.__name__), "")
            raise MPTError(
                f"--ckpt_path {checkpoint.path} was saved by {checkpoint.stage}, and this run is {cls.__name__}. "
                f"--ckpt_path only takes a checkpoint of the same class.{hint}"
            )

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a trained module; see Lightning's method of the same name.

        Raises:
            MPTError: there is no such file, it is damaged, or another class saved it.
        """
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
                f"{cls.__name__} cannot be made of the arguments in {checkpoint_path}, which is damaged or of another "
                f"version, and of those given here. The cause: {one_line(cause or repr(error))}"
            ) from error

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how to use the tensors: class, backbone, tasks, cards."""
        backbone, prompt = self.parts()
        damaged = [name for name, value in trainable(self).items() if not value.isfinite().all()]
        if damaged:
            raise MPTError(
                f"{', '.join(damaged)} has values that are not finite at step {self.global_step}, so no checkpoint is "
                "written; those written before are whole. Lower the learning rate, raise --model.warmup_steps, or set "
                "--trainer.gradient_clip_val 1."
            )
        cards = {name: evaluation.plain_card(card) for name, card in self.cards.items() if name in prompt.tasks}
        checkpoint[KEY] = metadata(type(self).__name__, backbone.name, backbone.fingerprint, prompt, cards)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint fits, and make a prompt of its shape."""
        found = parse_checkpoint(checkpoint, str(getattr(self._trainer, "ckpt_path", None) or "the checkpoint"))
        self.check_stage(found)
        if self._fits():
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
        self._cards = evaluation.read_cards(found.cards)
        close_finished_epoch(checkpoint)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the trained tensors: every one and none else, whatever `strict` says of the frozen ones."""
        if self.prompt is None:
            # Forking strategies (notebooks) train in other processes and hand this one tensors without their names.
            rank_zero_warn(
                "The module in this process is not built, so it does not take the trained prompt. Load the run's "
                f"checkpoint: {type(self).__name__}.load_from_checkpoint(...)."
            )
            return super().load_state_dict({}, strict=False)
        check_state(self, state_dict)
        return super().load_state_dict(state_dict, strict=False, assign=assign)


HAND_OVER = {
    ("PromptTuning", "MPTSource"): " To distil from these teachers, use --model.teachers.",
    ("MPTSource", "MPTTarget"): " To start target tasks from it, use --model.source.",
    ("PromptTuning", "MPTTarget"): " MPTTarget starts from an MPTSource checkpoint, given as --model.source.",
}
"""Which argument takes a checkpoint of one class into a run of another."""
