"""Runs that the system ends (SIGTERM, SLURM's time limit): a checkpoint is written first."""

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
    """Writes a checkpoint for `--ckpt_path last` when the process gets SIGTERM, and exits.

    The step and the validation after it are finished first, so that the run resumes exactly. Several processes exit
    after the same step, whichever of them got the signal: they agree by one number per step. The package's modules add
    this callback.

    The same holds for the signal that SLURM sends before the time limit (`--signal=SIGUSR1@90`). After it Lightning's
    handler also saves `hpc_ckpt_<n>.ckpt` and requeues the job. Here it runs between two steps: at any other moment its
    ranks might wait for each other forever, and its checkpoint might be of half a step.
    """

    def __init__(self) -> None:
        self._received = self._agreed = 0  # a signal's number

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Replace Lightning's handler, which communicates at any moment; the Trainer restores the old ones."""
        self._received = self._agreed = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, *_requeue_signal(trainer)):
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Agree on the exit."""
        self._agreed = self._received
        if trainer.world_size > 1:
            received = torch.tensor(self._received, device=trainer.strategy.root_device)
            torch.distributed.all_reduce(received, torch.distributed.ReduceOp.MAX)
            self._agreed = int(received)
        _request_exit(trainer, self._agreed > 0)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Postpone the exit: an interrupted validation would resume midway, without the batches already seen."""
        _request_exit(trainer, False)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Request the exit that was postponed."""
        _request_exit(trainer, self._agreed > 0)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save, in every process."""
        if not (self._agreed and isinstance(exception, SIGTERMException)):
            return
        saved = trainer.checkpoint_callback
        folder = saved.dirpath if isinstance(saved, ModelCheckpoint) and saved.dirpath else trainer.default_root_dir
        path = Path(folder) / f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}-terminated.ckpt"
        trainer.save_checkpoint(path)
        rank_zero_info(
            f"Ended by {signal.Signals(self._agreed).name} after step {trainer.global_step}. Saved {path}; resume with "
            "--ckpt_path last."
        )
        if self._agreed != signal.SIGTERM:
            trainer._signal_connector._slurm_sigusr_handler_fn(self._agreed, None)  # type: ignore[arg-type]
            # The first process that exits ends the others (srun --kill-on-bad-exit).
            trainer.strategy.barrier("requeued")


class ReleaseOnException(L.Callback):
    """Frees what a module keeps on the device when a run fails: Lightning calls `teardown` of complete runs only."""

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Call the module's `release`."""
        pl_module.release()


def _requeue_signal(trainer: L.Trainer) -> list[int]:
    """Return the signal that SLURM sends before the time limit, if Lightning handles it; a user's handler stays."""
    number: int | None = getattr(trainer._accelerator_connector.cluster_environment, "requeue_signal", None)
    return [] if number is None or not isinstance(signal.getsignal(number), _HandlersCompose) else [number]


def _request_exit(trainer: L.Trainer, requested: bool) -> None:
    # The loops read it at the end of a step, when their counters fit the weights, and raise SIGTERMException.
    trainer._signal_connector.received_sigterm = requested
