"""The methods that `scaling.py` compares, on a T5 of any shape, and rows for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import T5Config, T5ForConditionalGeneration

from mpt_lightning import FineTuning, MPTSource, PEFTModule, PromptTuning
from mpt_lightning.backbones import Seq2SeqBackbone
from mpt_lightning.modules import PromptModule

TASKS = [f"task {index}" for index in range(6)]
PROMPT, LABELS = 100, 4
T5_SMALL = T5Config(
    vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0
)  # fmt: skip
TINY = T5Config(vocab_size=200, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)


def prompt_tuning(backbone: str, **options: Any) -> PromptModule:
    return PromptTuning(backbone, tasks=TASKS, prompt_length=PROMPT, prompt_init="random", **options)


def source(backbone: str, **options: Any) -> PromptModule:
    teachers = str(Path(backbone, "teachers.ckpt"))
    return MPTSource(backbone, teachers, tasks=TASKS, prompt_length=PROMPT, prompt_init="random", **options)


def lora(backbone: str, **options: Any) -> PromptModule:
    return PEFTModule(backbone, {"peft_type": "LORA", "r": 8, "lora_alpha": 16}, tasks=TASKS, **options)


def fine_tuning(backbone: str, **options: Any) -> PromptModule:
    return FineTuning(backbone, tasks=TASKS, **options)


METHODS: dict[str, Callable[..., PromptModule]] = {
    "prompt tuning": prompt_tuning,
    "MPTSource": source,
    "LoRA": lora,
    "fine-tuning": fine_tuning,
}
PROMPTS = ["prompt tuning", "MPTSource"]


def assembled(method: str, model: T5ForConditionalGeneration) -> PromptModule:
    """Build a method's module around a model, without a Trainer."""
    module = METHODS[method]("t5")
    module.backbone = Seq2SeqBackbone(model, "t5")
    module.backbone.fingerprint = "none"  # the hash of the weights, which do not exist on the meta device
    module.adapt(module.backbone)
    module.prompt = module.build_prompt(module.backbone).to(model.device)
    if method == "MPTSource" and model.device.type != "meta":
        module.teacher_prompts = torch.rand(len(TASKS), PROMPT, module.backbone.dim) - 0.5
    return module.train()


class Rows(Dataset):
    """Random rows without padding."""

    def __init__(self, rows: int, length: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randint(3, vocabulary, (rows, length), generator=generator)
        self.labels = torch.randint(3, vocabulary, (rows, LABELS), generator=generator)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {
            "input_ids": self.inputs[index],
            "attention_mask": torch.ones_like(self.inputs[index]),
            "labels": self.labels[index],
            "task_ids": torch.tensor(index % len(TASKS)),
        }


def trained_parameters(config: T5Config) -> dict[str, int]:
    """Return the number of parameters that each method trains, counted on the meta device."""
    counts = {}
    for method in METHODS:
        with torch.device("meta"):
            shape = T5ForConditionalGeneration(config)
        module = assembled(method, shape)
        counts[method] = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    return counts
