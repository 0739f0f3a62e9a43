"""A Lightning strategy for backbones that do not fit one device."""

from datetime import timedelta
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from mpt_lightning.backbones import Backbone
from mpt_lightning.backbones.sharding import shard
from mpt_lightning.errors import MPTError


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 for the frozen backbone, DDP for what is trained.

    The package's modules shard their backbone over all ranks in `configure_model`. The prompt is whole on every rank:
    DDP starts it from rank 0's, and averages its gradients once per optimizer step. Nothing that is saved is sharded,
    so a checkpoint is one file, the same as any other strategy's.

    Args:
        process_group_backend: "nccl" or "gloo"; that of the device by default.
        timeout: How long a rank waits for the others.

    Example:
        >>> trainer = L.Trainer(devices=8, strategy=ShardedStrategy())  # doctest: +SKIP
    """

    # All ranks must make the same passes, in evaluation too.
    ranks_in_step = True

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = default_pg_timeout) -> None:
        super().__init__(1, 1, False, process_group_backend, timeout)

    def setup_environment(self) -> None:
        """Build the mesh of all ranks; by default the devices of a node would be a tensor-parallel group."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, backbone: Backbone) -> None:
        """Shard a backbone over all ranks; see `mpt_lightning.backbones.sharding`."""
        # In the precision that it will run in: it cannot change once parts were gathered.
        self.precision_plugin.convert_module(backbone)
        shard(backbone, self.device_mesh["data_parallel"])

    def setup(self, trainer: L.Trainer) -> None:
        """Wrap the module in DDP for training; DDP ignores the backbone, which is sharded already."""
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self.lightning_module is not None:
            self.model = DistributedDataParallel(self.lightning_module)

    def model_to_device(self) -> None:
        """Move what is not sharded."""
        for part in self.lightning_module.children() if self.lightning_module is not None else ():
            if not isinstance(part, FSDPModule):
                part.to(self.root_device)

    def teardown(self) -> None:
        """Unwrap the module."""
        self.model = self.lightning_module
        super().teardown()

    # The optimizer is built for the checkpoint's prompt, and its state is not sharded.
    restore_checkpoint_after_setup: Any = False
    lightning_restore_optimizer: Any = True
    # Lightning's methods for models that are not sharded: a state dict holds the prompt alone.
    lightning_module_state_dict: Any = Strategy.lightning_module_state_dict
    optimizer_state: Any = Strategy.optimizer_state
    save_checkpoint: Any = Strategy.save_checkpoint
    load_checkpoint: Any = Strategy.load_checkpoint
    load_model_state_dict: Any = Strategy.load_model_state_dict
    load_optimizer_state_dict: Any = Strategy.load_optimizer_state_dict


def share_random_numbers(strategy: Strategy) -> None:
    """Set every rank's random state on the CPU, where prompts are drawn, to that of rank 0.

    DDP broadcasts the parameters alone, and a prompt may draw more than its parameters.
    """
    torch.set_rng_state(strategy.broadcast(torch.get_rng_state()))


def check_strategy(strategy: Strategy, quantization: str | None, data: Any = None) -> None:
    """Raise if a strategy does not fit this package's modules, the backbone's quantization or the DataModule."""
    if isinstance(strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(strategy, ShardedStrategy):
        raise MPTError(
            f"{type(strategy).__name__} has checkpoints that other strategies cannot read, and may split layers "
            "(tensor_parallel_size) or shard what is trained. To share the frozen backbone among all ranks, use "
            "strategy=mpt_lightning.ShardedStrategy(), on the command line --config trainer/sharded."
        )
    if strategy.handles_gradient_accumulation:
        raise MPTError(
            f"{type(strategy).__name__} averages gradients over batches and ranks by itself, whatever their numbers of "
            "label tokens. Use --trainer.strategy ddp, or --config trainer/sharded for a frozen backbone that does not "
            "fit one device."
        )
    if not isinstance(strategy, ShardedStrategy):
        return
    if quantization is not None:
        raise MPTError(
            f"backbone_quantization={quantization!r} cannot be sharded: FSDP gathers weights in the "
            "precision that they are stored in. Leave backbone_quantization unset, with backbone_dtype='bfloat16', or "
            "use --trainer.strategy ddp."
        )
    slots = getattr(data, "prompt_slots", {})
    if 0 < len(slots) < len(getattr(data, "tasks", [])):
        raise MPTError(
            f"The inputs of {', '.join(slots)} have places for the prompt ([prompt*N]), those of the other tasks have "
            "none, and ranks that share a backbone must make the same passes. Give places to all tasks or to none, or "
            "use --trainer.strategy ddp."
        )
