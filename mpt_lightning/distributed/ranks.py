"""Ranks that start and stop together: from the same checkpoint, and when the loss of one of them is not finite.

If one rank stopped alone, the others would wait for its gradients forever. So it finishes the step with gradients of
NaN, which the average over ranks carries to all of them without extra traffic.
"""

from collections.abc import Sequence

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from mpt_lightning.errors import MPTError


def spoil(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Return a loss whose gradient is NaN in all parameters, through the same passes as before."""
    return loss + float("nan") * torch.stack([parameter.sum() for parameter in parameters]).sum()


def stop_together(trainer: L.Trainer, optimizer: Optimizer, fault: str | None) -> None:
    """Raise on every rank if a fault happened on any; called between the gradients' average and the step."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
    if gradients and getattr(trainer.precision_plugin, "scaler", None) is None:
        stops = not torch.nn.utils.get_total_norm(gradients).isfinite()
    else:
        # In float16 gradients overflow in normal operation: here the ranks exchange one number per step.
        stops = trainer.strategy.reduce_boolean_decision(fault is not None, all=False)
    if not stops:
        return
    faults: list[str | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(faults, fault)
    found = [f"Rank {rank}: {text}" for rank, text in enumerate(faults) if text]
    if not found:
        found = [
            f"The gradients are not finite at step {trainer.global_step}, although the losses are. Training has "
            "stopped; earlier checkpoints are intact. Lower the learning rate, or raise --model.warmup_steps."
        ]
    more = f" (The same on {len(found) - 1} more ranks.)" if len(found) > 1 else ""
    raise MPTError(found[0] + more)


def check_one_start(trainer: L.Trainer, step: int | None) -> None:
    """Raise on every rank unless all start from a checkpoint of the same step, or all without a checkpoint (None)."""
    if trainer.world_size == 1:
        return
    steps: list[int | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(steps, step)
    if other := [rank for rank, found in enumerate(steps) if found != steps[0]]:
        starts = ["the beginning" if steps[rank] is None else f"step {steps[rank]}" for rank in (0, other[0])]
        raise MPTError(
            f"Rank 0 starts from {starts[0]}, and rank {other[0]} from {starts[1]}: the machines do not have the same "
            "checkpoints. Put them on a disk that all machines share (dirpath of ModelCheckpoint, "
            "--trainer.default_root_dir), or give --ckpt_path the same file everywhere."
        )
