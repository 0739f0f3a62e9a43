"""PEFT's methods that change weights (LoRA, AdaLoRA, IA3, ...) on this package's data, evaluation and checkpoints."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from peft import AdaLoraModel, PeftConfig
from torch import Tensor

from mpt_lightning.arguments import NonNegativeFloat
from mpt_lightning.backbones import Backbone
from mpt_lightning.checkpoint import PromptCheckpoint
from mpt_lightning.errors import MPTError
from mpt_lightning.modules import peft_config as configs
from mpt_lightning.modules.batch import Batch
from mpt_lightning.modules.finetuning import ADAPTATION, AdaptedModule
from mpt_lightning.modules.optimizers import total_steps

# The key under which a checkpoint holds the state of AdaLoRA's rank schedule.
ALLOCATOR = "rank_allocator"
_STATISTICS = ("exp_avg_ipt", "exp_avg_unc")


class PEFTModule(AdaptedModule):
    """A method of PEFT that changes weights: its layers are put into the frozen backbone, and trained.

    Takes every tuner type: `--model.peft_config peft.LoraConfig --model.peft_config.r 8`. The types that train prompts
    have classes of this package. PEFT's layers have dropout in training, the backbone if `backbone_dropout` is set.
    AdaLoRA's rank schedule advances after each optimizer step and is in the checkpoint; without a `total_step` it
    gets the run's.

    Args:
        backbone: Hub id ("google-t5/t5-base") or folder of the frozen model.
        peft_config: A config of PEFT; in Python also a mapping, as in PEFT's adapter_config.json.
        lr: Learning rate.
        **kwargs: See `BackboneModule`.

    Raises:
        MPTError: If the config is of a type that trains prompts, or PEFT rejects it.
    """

    def __init__(
        self,
        backbone: str,
        peft_config: Callable[[], PeftConfig] | PeftConfig,
        lr: NonNegativeFloat = 1e-3,
        **kwargs: Any,
    ) -> None:
        if not callable(peft_config):
            peft_config = configs.plain_config(peft_config)  # type: ignore[assignment]  # for the hyper-parameters
        super().__init__(backbone=backbone, **kwargs)
        # On the command line the argument is a function, and the hyper-parameters are written out.
        self.config = configs.plain_config(self.hparams["peft_config"])
        self.hparams["peft_config"] = self.config
        self.lr = lr
        self._seed: int | None = None
        self._tuner: Any = None

    @classmethod
    def plain_arguments(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return arguments as a checkpoint holds them."""
        return {**arguments, "peft_config": configs.plain_config(arguments["peft_config"])}

    @classmethod
    def check_stage(cls, checkpoint: PromptCheckpoint) -> None:
        """Raise for another class's checkpoint, and for a config that is not PEFT's, since its class is imported."""
        super().check_stage(checkpoint)
        config = checkpoint.hyper_parameters.get("peft_config")
        module = str(config.get("class_path")).rpartition(".")[0] if isinstance(config, Mapping) else ""
        if module not in sys.modules:
            raise MPTError(
                f"{checkpoint.path} is damaged: got peft_config={config!r}, expected a config of PEFT. If its class is "
                "your own, import the module first."
            )

    def adaptation(self) -> dict[str, Any]:
        """Return the config, and the seed of what PEFT draws and does not train."""
        return {"peft_config": self.config, "seed": self._seed}

    def change(self, backbone: Backbone) -> None:
        """Put PEFT's layers into the model."""
        if self._seed is None:
            self._seed = int(torch.randint(2**31, ()))
            if self._trainer is not None:
                self._seed = int(self.trainer.strategy.broadcast(self._seed))
        with torch.random.fork_rng(devices=[]):
            # Some types draw frozen matrices or masks (VeRA, SHiRA): a checkpoint has the seed that draws them again.
            torch.manual_seed(self._seed)
            tuner = configs.build_tuner(configs.build_config(self.config), backbone.model)
        for parameter in backbone.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        # In a tuple, since a tuner is a module: the backbone's weights would have a second name.
        self._tuner = (tuner,)

    @property
    def adapts_on_cpu(self) -> bool:  # type: ignore[override]
        """Whether PEFT needs the weights on the CPU, to start equally on every device."""
        # PEFT draws the starts of some types where the weights are. It moves AdaLoRA's layers there, and PEFT 0.21
        # makes the frozen parameters among them trainable when it moves them.
        return self.config["class_path"] == "peft.AdaLoraConfig" or configs.draws_what_is_frozen(self.config)

    @property
    def adalora(self) -> AdaLoraModel | None:
        """PEFT's AdaLoRA object; None for other types, and before the model is built."""
        tuner = self._tuner[0] if self._tuner else None
        return tuner if isinstance(tuner, AdaLoraModel) else None

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Return the loss; AdaLoRA's has a second term, which keeps the factors of its decomposition orthogonal."""
        terms = super().losses(batch)
        if self.adalora is None:
            return terms
        config: Any = self.adalora.peft_config["default"]
        orthogonal = orthogonality(self.adalora)
        loss = terms["loss"] + config.orth_reg_weight * orthogonal
        return {"loss": loss, "task_loss": terms["loss"].detach(), "orthogonality": orthogonal.detach()}

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Build the optimizer; each of its steps ends with AdaLoRA's update of the ranks."""
        built = super().configure_optimizers()
        if (adalora := self.adalora) is not None:
            self._plan_ranks(adalora.peft_config["default"])
            # Within the optimizer's step, when the gradients still exist and this step is not yet counted.
            built["optimizer"].register_step_post_hook(lambda *_: adalora.update_and_allocate(self.global_step))
        return built

    def _plan_ranks(self, config: Any) -> None:
        """Set AdaLoRA's number of steps, and check its schedule."""
        if configs.needs_total_step(self.config):
            steps = total_steps(self.trainer)
            if steps is None:
                raise MPTError(
                    "AdaLoRA lowers its ranks over the run's steps, whose number max_time, max_epochs=-1 or an "
                    "iterable data set leave open. Set --trainer.max_steps or --model.peft_config.total_step."
                )
            config.total_step = steps
        if config.tinit + config.tfinal >= config.total_step:
            raise MPTError(
                f"AdaLoRA lowers its ranks between step tinit={config.tinit} and tfinal={config.tfinal} steps before "
                f"the end, and the run has {config.total_step}. Lower --model.peft_config.tinit or .tfinal, or train "
                "longer."
            )
        if config.init_r <= config.target_r:
            raise MPTError(
                f"AdaLoRA lowers its ranks from init_r={config.init_r} to target_r={config.target_r}, which must be "
                "less. Raise --model.peft_config.init_r, or lower --model.peft_config.target_r."
            )

    def on_fit_start(self) -> None:
        """Move AdaLoRA's statistics to the device; see `PromptModule` for the rest."""
        super().on_fit_start()
        self._move_statistics(self.device)

    def release(self) -> None:
        """Free the device's memory."""
        super().release()
        self._move_statistics(torch.device("cpu"))

    def _move_statistics(self, device: torch.device) -> None:
        if self.adalora is None:
            return
        allocator: Any = self.adalora.rankallocator  # not a module, so Lightning does not move it
        for name in (*_STATISTICS, "ipt"):
            setattr(allocator, name, {key: value.to(device) for key, value in getattr(allocator, name).items()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the state of AdaLoRA's rank schedule."""
        super().on_save_checkpoint(checkpoint)
        if self.adalora is not None:
            allocator, config = self.adalora.rankallocator, cast(Any, self.adalora.peft_config["default"])
            statistics: dict[str, Any] = {name: dict(getattr(allocator, name)) for name in _STATISTICS}
            checkpoint[ALLOCATOR] = statistics | {"rank_pattern": config.rank_pattern}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Draw again what the checkpoint's run drew, and restore its rank schedule."""
        found = checkpoint.get(ADAPTATION) or {}
        if "seed" in found and found["seed"] != self._seed:
            if self.backbone is not None and configs.draws_what_is_frozen(self.config):
                self.backbone = None
            self._seed = found["seed"]
        super().on_load_checkpoint(checkpoint)
        if self.adalora is not None and ALLOCATOR in checkpoint:
            state = checkpoint[ALLOCATOR]
            for name in _STATISTICS:
                setattr(self.adalora.rankallocator, name, state[name])
            # The value of the last step alone, which the next one replaces; its keys show that there was a step.
            last = state[_STATISTICS[-1]]
            self.adalora.rankallocator.ipt = {key: torch.zeros_like(value) for key, value in last.items()}
            self._move_statistics(self.device)
            cast(Any, self.adalora.peft_config["default"]).rank_pattern = state["rank_pattern"]


def orthogonality(model: AdaLoraModel) -> Tensor:
    """Return the mean distance of AdaLoRA's factors from orthogonal ones, ||A A' - 1|| and ||B' B - 1||, a scalar."""
    distances = []
    for name, factor in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            product = factor @ factor.T if "lora_A" in name else factor.T @ factor
            distances.append(torch.linalg.norm(product - torch.eye(len(product), device=product.device)))
    return torch.stack(distances).mean()
