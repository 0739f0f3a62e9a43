"""A frozen backbone and the prompt in front of it: the arguments all methods share, and how both are built."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as L
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from mpt_lightning.arguments import NonNegativeFloat, NonNegativeInt, PositiveInt, check_arguments
from mpt_lightning.backbones import Backbone, load_backbone
from mpt_lightning.backbones.base import OVER, Family, Over
from mpt_lightning.backbones.quantization import Quantization, check_quantization
from mpt_lightning.checkpoint.io import CheckedCheckpointIO
from mpt_lightning.checkpoint.state import keep_trainable
from mpt_lightning.data.card import TaskCard
from mpt_lightning.distributed.preemption import ReleaseOnException, SaveOnTermination
from mpt_lightning.distributed.strategy import ShardedStrategy, check_strategy, share_random_numbers
from mpt_lightning.errors import MPTError
from mpt_lightning.modules.optimizers import OptimizerName, ScheduleName
from mpt_lightning.prompts import Prompt


class BackboneModule(L.LightningModule, ABC):
    """A prompt in front of a frozen backbone.

    Takes batches `{input_ids [B, L], attention_mask [B, L], labels [B, M], task_ids [B]}` from any DataModule; see
    `mpt_lightning.modules.batch.check_batch`.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model.
        tasks: Names of the tasks; those of the DataModule by default.
        backbone_dtype: Precision of the frozen weights. Prompts, losses and optimizer stay in fp32.
        backbone_quantization: Keep the frozen weights in 4 or 8 bits; needs `pip install mpt_lightning[quantization]`.
        backbone_dropout: Keep the backbone's dropout on while prompts train. Off is usually worth several points.
        gradient_checkpointing: Recompute the backbone's layers in the backward pass: less memory, more time.
        backbone_compile: Compile the backbone's feed-forward networks and norms (`torch.compile`). The first steps are
            slow, later ones faster than without. Needs a C++ compiler.
        backbone_check: Compare the loaded backbone with itself on a few tokens, and raise if prompts would give wrong
            results.
        optimizer: "adamw" or "adafactor".
        schedule: Learning rate after the warm-up: linear to 0, constant, or along a cosine to 0.
        warmup_steps: Optimizer steps over which the learning rate rises from 0.
        weight_decay: Decoupled weight decay of the trained tensors.
        over: What the loss is a cross-entropy over: the tasks' `choices` (OpenPrompt's way), the default for masked
            models, or the whole `vocabulary`, the default for the others, as in the papers. With few rows and steps
            `choices` learns more; an answer that is generated needs `vocabulary`. MPT's terms are over the vocabulary.
        max_new_tokens: Longest generated answer in tokens, for tasks without choices.
        num_beams: Beams of the generation; 1 is greedy.
    """

    # The method's name, arXiv id and a line on what is trained, for model cards.
    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    # Arguments that decide the trained tensors' shapes: a resumed run must have the checkpoint's values.
    fixed_arguments: ClassVar[tuple[str, ...]] = ("optimizer",)
    # Arguments that are read once, when a new prompt is built: a resumed run uses the checkpoint's values.
    initial_arguments: ClassVar[tuple[str, ...]] = ("tasks",)
    # The families of models that the method works with, and why only these.
    families: ClassVar[tuple[Family, ...]] = get_args(Family)
    family_reason: ClassVar[str] = ""
    # "classification": a new classifier per task answers, instead of the language model's own head.
    head: str | None = None
    # Whether `adapt` needs the backbone on the CPU. Otherwise weights are loaded straight to the Trainer's device.
    adapts_on_cpu = False

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
        warmup_steps: NonNegativeInt = 0,
        weight_decay: NonNegativeFloat = 0.0,
        over: Over | None = None,
        max_new_tokens: PositiveInt = 64,
        num_beams: PositiveInt = 1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_arguments(type(self), self.hparams)
        if backbone_quantization is not None:
            check_quantization(backbone_quantization)
        self.backbone_name = backbone
        self.backbone_dtype = backbone_dtype
        self.backbone_quantization = backbone_quantization
        self.backbone_dropout = backbone_dropout
        self.gradient_checkpointing = gradient_checkpointing
        self.backbone_compile = backbone_compile
        self.backbone_check = backbone_check
        self.optimizer_name = optimizer
        self.schedule = schedule
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.over = over
        self.max_new_tokens = max_new_tokens
        self.num_beams = num_beams
        self.tasks: list[str] = list(tasks or [])
        self.backbone: Backbone | None = None
        self.prompt: Prompt | None = None
        # From the data's task ids to this module's: a buffer, so that it moves with the module.
        self.register_buffer("_row_of_task", None, persistent=False)
        self._cards: dict[str, TaskCard] = {}  # the checkpoint's
        self.register_state_dict_post_hook(keep_trainable)

    @abstractmethod
    def build_prompt(self, backbone: Backbone) -> Prompt:
        """Build the prompt that training starts from, for `self.tasks`."""

    def adapt(self, backbone: Backbone) -> None:
        """Prepare the backbone that was just loaded; by default it is used as it is."""

    @classmethod
    def needs_checkpoint(cls, arguments: Mapping[str, Any]) -> bool:
        """Return whether evaluating takes a checkpoint; it does not if nothing is trained with these arguments."""
        return True

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The names of what DDP never broadcasts: everything that is not trained, since each rank loads it itself."""
        frozen = [name for name, value in self.named_parameters(remove_duplicate=False) if not value.requires_grad]
        return [*frozen, *(name for name, _ in self.named_buffers(remove_duplicate=False))]

    @property
    def cards(self) -> dict[str, TaskCard]:
        """The tasks' cards by name: the DataModule's, else the checkpoint's."""
        return dict(getattr(self._datamodule(), "cards", None) or self._cards)

    def _datamodule(self) -> Any:
        return getattr(self._trainer, "datamodule", None) if self._trainer is not None else None

    def _data_tasks(self) -> list[str]:
        return list(getattr(self._datamodule(), "tasks", self.tasks))

    def _builds_prompt(self) -> bool:
        """Return whether a prompt is built if none was loaded: in a training run, or if there is none to load."""
        return self._trainer is not None and (self.trainer.state.fn == "fit" or not self.needs_checkpoint(self.hparams))

    def setup(self, stage: str) -> None:
        """Find the tasks' names, and check what can be checked before the backbone is loaded."""
        if not self.backbone_dropout:
            # The backbone is in eval mode because it was asked for.
            warnings.filterwarnings("ignore", "Found .* in eval mode at the start of training")
        if self._trainer is not None:
            if type(self.trainer.strategy.checkpoint_io) is TorchCheckpointIO:
                self.trainer.strategy.checkpoint_io = CheckedCheckpointIO()
            check_strategy(self.trainer.strategy, self.backbone_quantization, self._datamodule())
        if not self.needs_checkpoint(self.hparams):
            self.tasks = self._data_tasks()
            if stage == "fit":
                raise MPTError(
                    f"This {type(self).__name__} trains nothing: run `mpt validate` or `mpt test` (in Python "
                    "trainer.validate or trainer.test), or choose another method (--model, --model.method)."
                )
        if stage != "fit":
            return
        self.tasks = self.tasks or self._data_tasks()
        if not self.tasks:
            raise MPTError(
                "The tasks have no names: the data has no `tasks`. Give the DataModule an attribute `tasks`, or set "
                "the module's `tasks` (--model.tasks): names in the order of the batches' task_ids."
            )

    def configure_callbacks(self) -> list[L.Callback]:
        """Return the callbacks for runs that end early."""
        return [SaveOnTermination(), ReleaseOnException()]

    def configure_model(self) -> None:
        """Load the backbone, and build the prompt if a fit begins."""
        if self.backbone is None:
            # Lightning calls this hook with the Trainer's device as the default one.
            with torch.device("cpu") if self.adapts_on_cpu else nullcontext():
                backbone = load_backbone(
                    self.backbone_name,
                    dtype=self.backbone_dtype,
                    dropout=self.backbone_dropout,
                    gradient_checkpointing=self.gradient_checkpointing,
                    quantization=self.backbone_quantization,
                    device=self.trainer.strategy.root_device if self._trainer is not None else None,
                    compiled=self.backbone_compile,
                    check=self.backbone_check,
                )
            if backbone.family not in self.families:
                reason = self.family_reason and f", since {self.family_reason}"
                raise MPTError(
                    f"{type(self).__name__} works with models of the family {' or '.join(self.families)}{reason}, and "
                    f"{backbone.name} is {backbone.family}. Set --model.backbone to another model, or use PromptTuning."
                )
            with torch.device("cpu"):  # a seed gives one start on every device
                self.adapt(backbone)
            self.backbone = backbone
        if self._trainer is not None and isinstance(self.trainer.strategy, ShardedStrategy):
            self.trainer.strategy.shard(self.backbone)
        else:
            self.backbone.to(self.device)
        if self.prompt is None and self._builds_prompt():
            share_random_numbers(self.trainer.strategy)
            with torch.device("cpu"):
                prompt = self.build_prompt(self.backbone)
            self.prompt = prompt.to(self.device)
            self._check_positions(self.backbone, self.prompt)

    def _check_positions(self, backbone: Backbone, prompt: Prompt) -> None:
        """Raise if rows may get too long for the backbone, where the data says how long they may get."""
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
        """Map the data's task ids to the prompt's, and compare the data's prompt slots with the prompt's length."""
        names = self._data_tasks()
        if unknown := [name for name in names if name not in self.tasks]:
            raise MPTError(
                f"The data has the task{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}, and the prompt has "
                f"{', '.join(self.tasks)}. Train the prompt on these tasks, or leave them out of the data."
            )
        if self.prompt is not None:
            for name, count in getattr(self._datamodule(), "prompt_slots", {}).items():
                if count != self.prompt.length:
                    raise MPTError(
                        f"The inputs of {name} have places for {count} prompt tokens, and the prompt has "
                        f"{self.prompt.length}. Set --model.prompt_length to {count}, or change the [prompt*N] of "
                        "--data.card.input and --data.answer_prefix."
                    )
        self._row_of_task = torch.tensor([self.tasks.index(name) for name in names], device=self.device)

    @property
    def over_choices(self) -> bool:
        """Whether the loss is over the tasks' choices; False before the backbone is loaded, unless `over` says so."""
        default = OVER[self.backbone.family] if self.backbone is not None else "vocabulary"
        return self.head is not None or (self.over or default) == "choices"

    def parts(self) -> tuple[Backbone, Prompt]:
        """Return the backbone and the prompt, or raise if they are not built yet."""
        if self.backbone is None or self.prompt is None:
            raise RuntimeError(
                "The module is not built yet: train it with a Trainer, or use load_from_checkpoint(...)."
            )
        return self.backbone, self.prompt
