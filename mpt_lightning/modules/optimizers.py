"""Optimizers and schedules for prompts, by name."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_scheduler
from transformers.optimization import Adafactor

from mpt_lightning.errors import MPTError

OptimizerName = Literal["adamw", "adafactor"]
ScheduleName = Literal["linear", "constant", "cosine"]

_SCHEDULES = {"linear": "linear", "constant": "constant_with_warmup", "cosine": "cosine"}


def build_optimizer(name: OptimizerName, groups: Sequence[dict[str, Any]], weight_decay: float) -> Optimizer:
    """Build an optimizer; Adafactor with unscaled learning rates, as in prompt tuning (Lester et al., 2021, app. A)."""
    if name == "adamw":
        return torch.optim.AdamW(groups, weight_decay=weight_decay)
    return Adafactor(groups, weight_decay=weight_decay, scale_parameter=False, relative_step=False, warmup_init=False)


def total_steps(trainer: L.Trainer) -> int | None:
    """Return the number of optimizer steps of the whole run; None if only time or the data ends it."""
    steps = trainer.estimated_stepping_batches
    # Lightning counts infinitely many, or -1 for an iterable data set without max_steps.
    return int(steps) if 0 <= steps < math.inf else None


def build_schedule(name: ScheduleName, optimizer: Optimizer, warmup_steps: int, total_steps: int | None) -> LRScheduler:
    """Build a learning rate schedule, stepped after every optimizer step; `total_steps` is None if unknown."""
    if total_steps is None and name != "constant":
        raise MPTError(
            f"schedule={name!r} needs the number of the run's steps, which max_time, max_epochs=-1 or an iterable data "
            "set leave open. Set --trainer.max_steps, or --model.schedule constant."
        )
    return get_scheduler(_SCHEDULES[name], optimizer, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
