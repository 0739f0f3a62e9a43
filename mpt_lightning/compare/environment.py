"""What a result depends on beside its arguments: the model, the versions and the machine."""

import platform
import re
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING

from mpt_lightning.modules import FineTuning, PEFTModule, PromptModule

PACKAGES = ("mpt_lightning", "torch", "lightning", "transformers", "peft", "datasets")


def describe(module: PromptModule) -> dict[str, Any]:
    """Return plain values: the time, the module's class, its type as PEFT names it, its backbone, versions, machine."""
    device = torch.accelerator.current_accelerator()
    name = torch.cuda.get_device_name() if device is not None and device.type == "cuda" else str(device or "cpu")
    return {
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "module": type(module).__name__,
        "peft_type": peft_type(module),
        "backbone": module.backbone_name,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "system": {
            "system": platform.system(), "release": platform.release(), "machine": platform.machine(),
            "processor": platform.processor(), "accelerator": name,
        },
    }  # fmt: skip


def peft_type(module: PromptModule) -> str | None:
    """Return PEFT's name of a method, such as "LORA"; a name in its style for others, None for fine-tuning."""
    if isinstance(module, FineTuning):
        return None
    if isinstance(module, PEFTModule):
        config = module.config["class_path"].rpartition(".")[2]
        for kind, known in PEFT_TYPE_TO_CONFIG_MAPPING.items():
            if known.__name__ == config:
                return str(kind.value)
    words = re.split(r"(?<=[a-zA-Z])(?=[A-Z][a-z])", type(module).__name__)
    return "_".join(words).upper()
