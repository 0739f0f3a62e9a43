"""A Lightning Trainer on the pretended GPU, and the phases of its run."""

import lightning.pytorch as L
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.strategies import SingleDeviceStrategy

from tests.gpu.pretended import PretendedGPU
from tests.gpu.tensors import DEVICE

QUIET = {
    "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}  # fmt: skip


class PretendedAccelerator(Accelerator):
    """Lightning's interface of an accelerator."""

    def setup_device(self, device): ...

    def teardown(self): ...

    def get_device_stats(self, device):
        return {}

    @staticmethod
    def parse_devices(devices):
        return 1

    @staticmethod
    def get_parallel_devices(devices):
        return [DEVICE]

    @staticmethod
    def auto_device_count():
        return 1

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def name():
        return "pretended"


class Phases(L.Callback):
    """Sets the phase of the waits: "setup fit", "train <global_step>", "validation <loader> <batch>", "save", ...

    Callbacks' hooks run before the module's.
    """

    def __init__(self, gpu: PretendedGPU) -> None:
        self.gpu = gpu

    def setup(self, trainer, module, stage):
        self.gpu.phase = f"setup {stage}"

    def on_train_batch_start(self, trainer, *_):
        self.gpu.phase = f"train {trainer.global_step}"

    on_train_start = on_train_batch_start

    def on_train_end(self, *_):
        self.gpu.phase = "train end"

    def on_save_checkpoint(self, *_):
        self.gpu.phase = "save"


def phase_hook(stage: str, when: str):
    """Return a callback's hook that sets the phase "<stage> <when>", for a batch "<stage> <loader> <batch>"."""

    def hook(self, trainer, module, batch=None, number=0, loader=0):
        self.gpu.phase = f"{stage} {loader} {number}" if when == "batch" else f"{stage} {when}"

    return hook


for _stage in ("validation", "test", "predict"):
    setattr(Phases, f"on_{_stage}_epoch_start", phase_hook(_stage, "start"))
    setattr(Phases, f"on_{_stage}_batch_start", phase_hook(_stage, "batch"))
    setattr(Phases, f"on_{_stage}_epoch_end", phase_hook(_stage, "end"))


def trainer(gpu: PretendedGPU, **options) -> L.Trainer:
    """Return a Trainer on the pretended GPU that is quiet and writes no files unless `options` ask for it."""
    strategy = SingleDeviceStrategy(device=DEVICE, accelerator=PretendedAccelerator())
    callbacks = [*options.pop("callbacks", []), Phases(gpu)]
    return L.Trainer(**(QUIET | options), strategy=strategy, callbacks=callbacks)
