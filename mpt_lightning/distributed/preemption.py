"""What happens when the system ends a run (SIGTERM, SLURM's time limit): it writes a checkpoint first."""

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.connectors.signal_connector import _HandlersCompose
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException


class SaveOnTermination(L.Callback):
    """Writes a checkpoint that `--ckpt_path last` finds when the process gets SIGTERM, and leaves.

    The step and the validation after it are finished first, so that the run goes on exactly where it was. Several
    processes leave after the same step, whichever of them got the signal: they agree with one number per step.
    The package's modules bring this callback with them.

    The same for the signal that SLURM sends before the time limit (`--signal=SIGUSR1@90`): then Lightning's own handler
    also saves `hpc_ckpt_<n>.ckpt` and has the job requeued, but between two steps. At any other moment its ranks may
    wait for each other for ever, and its checkpoint may be of half a step.
    """

    def __init__(self) -> None:
        self._asked = self._leaves = 0  # a signal's number

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen to SIGTERM, in the place of Lightning's handler, which talks to other processes at any moment.

        The Trainer puts back the handlers from before it when it ends.
        """
        self._asked = self._leaves = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, *_requeue_signal(trainer)):
                signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._asked = number

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Agree on leaving."""
        self._leaves = self._asked
        if trainer.world_size > 1:
            asked = torch.tensor(self._asked, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self._leaves = int(asked)
        _ask_to_leave(trainer, self._leaves > 0)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put it off: a validation left in the middle would go on there, and forget the batches before."""
        _ask_to_leave(trainer, False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave now."""
        _ask_to_leave(trainer, self._leaves > 0)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save, in every process."""
        if not (self._leaves and isinstance(exception, SIGTERMException)):
            return
        saved = trainer.checkpoint_callback
        folder = saved.dirpath if isinstance(saved, ModelCheckpoint) and saved.dirpath else trainer.default_root_dir
        path = Path(folder) / f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}-terminated.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(
            f"Ended by {signal.Signals(self._leaves).name} after step {trainer.global_step}. Saved {path}; "
            "--ckpt_path last goes on from there."
        )
        if self._leaves != signal.SIGTERM:
            trainer._signal_connector._slurm_sigusr_handler_fn(self._leaves, None)  # type: ignore[arg-type]
            # The first process that leaves takes the others with it (srun --kill-on-bad-exit).
            trainer.strategy.barrier("requeued")


class ReleaseOnException(L.Callback):
    """Frees what a module keeps on the device when a run fails: Lightning calls `teardown` of complete runs only."""

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Free it."""
        release: Any = getattr(pl_module, "release", None)
        if release is not None:
            release()


def _requeue_signal(trainer: L.Trainer) -> list[int]:
    """Give SLURM's signal that the time is nearly over, where Lightning listens to it."""
    number: int | None = getattr(trainer._accelerator_connector.cluster_environment, "requeue_signal", None)
    # A handler of the user's own stays: Lightning leaves it alone, too.
    if number is None or not isinstance(signal.getsignal(number), _HandlersCompose):
        return []
    return [number]


def _ask_to_leave(trainer: L.Trainer, leaves: bool) -> None:
    # The loops look at it at the end of a step, when their counters fit the weights, and raise SIGTERMException.
    trainer._signal_connector.received_sigterm = leaves
