"""How several ranks start and stop as one: from the same checkpoint, and where the loss of one of them is not finite.

A rank that stops alone leaves the others waiting for its gradients. So it goes on to the end of the step with gradients
of NaN: averaged over the ranks they tell all of them, at no traffic of their own.
"""

from collections.abc import Sequence

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from mpt_lightning.errors import MPTError


def spoil(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Give a loss whose gradient is NaN in every one of the parameters, through the same passes as before."""
    return loss + float("nan") * torch.stack([parameter.sum() for parameter in parameters]).sum()


def stop_together(trainer: L.Trainer, optimizer: Optimizer, fault: str | None) -> None:
    """Stop on every rank, if there is a reason on any; for after the gradients' average and before the step.

    Args:
        trainer: of the run.
        optimizer: of what is trained.
        fault: what happened on this rank.

    Raises:
        MPTError: the gradients are not finite; says what happened on which rank.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if gradients and getattr(trainer.precision_plugin, "scaler", None) is None:
        stops = not torch.nn.utils.get_total_norm(gradients).isfinite()
    else:
        # In float16 an overflow is nothing special, so that gradients say nothing: here it takes one number per step.
        stops = trainer.strategy.reduce_boolean_decision(fault is not None, all=False)
    if not stops:
        return
    faults: list[str | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(faults, fault)
    found = [f"Rank {rank}: {text}" for rank, text in enumerate(faults) if text]
    if not found:
        found = [
            f"The gradients are not finite at step {trainer.global_step}, and the losses are. Training has stopped; "
            "checkpoints written before are whole. Lower the learning rate, or raise --model.warmup_steps."
        ]
    more = f" (The same on {len(found) - 1} more ranks.)" if len(found) > 1 else ""
    raise MPTError(found[0] + more)


def check_one_start(trainer: L.Trainer, step: int | None) -> None:
    """Check that all ranks go on from the same checkpoint, or all begin anew.

    Args:
        trainer: of the run.
        step: that of this rank's checkpoint; None is none.

    Raises:
        MPTError: they do not, on every rank.
    """
    if trainer.world_size == 1:
        return
    steps: list[int | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(steps, step)
    if other := [rank for rank, found in enumerate(steps) if found != steps[0]]:
        starts = ["the beginning" if steps[rank] is None else f"step {steps[rank]}" for rank in (0, other[0])]
        raise MPTError(
            f"Rank 0 goes on from {starts[0]}, and rank {other[0]} from {starts[1]}: the machines do not see the same "
            "checkpoints. Put them on a disk that all machines share (dirpath of ModelCheckpoint, "
            "--trainer.default_root_dir), or give --ckpt_path the same file everywhere."
        )
