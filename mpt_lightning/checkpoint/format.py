"""The content of a checkpoint: trained tensors and how to use them, never the backbone."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpt_lightning.checkpoint.state import check_finite, check_state
from mpt_lightning.errors import MPTError
from mpt_lightning.prompts import EmptyPrompt, Prompt

# The key of the description in a checkpoint file, and the description's format.
KEY = "mpt_lightning"
FORMAT = 1


@dataclass
class PromptCheckpoint:
    """A checkpoint of this package.

    Attributes:
        path: Where it was read from.
        stage: The class that trained it: "PromptTuning", "MPTSource", ...
        backbone: Hub id or folder of the frozen model.
        fingerprint: Hash of that model's weights; see `mpt_lightning.backbones.fingerprint`.
        prompt_class: "SoftPrompt", "MultitaskPrompt", ...
        prompt_config: That class's arguments.
        state_dict: The trained tensors.
        cards: The tasks' cards by name, as plain values; empty if the data had none.
        hyper_parameters: The module's arguments.
        data: The DataModule's arguments, if it saved them.
        metrics: The score that this file was saved for, by the metric's name; empty if unknown.

    Raises:
        MPTError: If the prompt's class is unknown.
    """

    path: str
    stage: str
    backbone: str
    fingerprint: str
    prompt_class: str
    prompt_config: dict[str, Any]
    state_dict: dict[str, Tensor]
    cards: dict[str, Any] = field(default_factory=dict)
    hyper_parameters: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.prompt_class not in Prompt.classes:
            raise MPTError(
                f"{self.path} contains a {self.prompt_class!r}. Expected one of {', '.join(Prompt.classes)}."
            )

    @property
    def tasks(self) -> list[str]:
        """The names of the trained tasks."""
        return list(self.prompt_config["tasks"])

    def empty_prompt(self) -> Prompt:
        """Build a prompt of the checkpoint's class and shape."""
        return Prompt.classes[self.prompt_class](**self.prompt_config)

    def check_tensors(self) -> None:
        """Raise if a trained tensor is missing, of another shape than described, or not finite."""
        check_finite(self.state_dict, self.path)
        with torch.device("meta"):  # shapes without memory
            described = nn.ModuleDict({"prompt": self.empty_prompt()})
        prompts = {name: value for name, value in self.state_dict.items() if name.startswith("prompt.")}
        check_state(described, prompts, self.path)

    def prompt(self, embeddings: Tensor | None = None) -> Prompt:
        """Build the trained prompt, or raise if there is none, since the method trains weights of the backbone.

        A prompt that depends on the backbone's embeddings `[V, H]` (CPT) needs these.
        """
        if self.prompt_class == EmptyPrompt.__name__:
            raise MPTError(
                f"{self.path} was saved by {self.stage}, which trains weights of the backbone and no prompt. "
                "Use a checkpoint of a method with prompts, such as PromptTuning or MPTSource."
            )
        prompt = self.empty_prompt()
        if embeddings is not None:
            prompt.attach(embeddings.cpu())
        prompt.load_state_dict({name.removeprefix("prompt."): value for name, value in self.state_dict.items()})
        return prompt

    def check_embeddings(self, argument: str) -> None:
        """Raise if the prompts are not embeddings alone; `argument` is the one that named this checkpoint."""
        content = Prompt.classes[self.prompt_class].content
        if content != Prompt.content:
            raise MPTError(
                f"{argument} {self.path} was saved by {self.stage} and contains {content}; expected a prompt of "
                "embeddings alone. Use a checkpoint of PromptTuning, MPTSource, MPTTarget or CPT."
            )

    def check_backbone(self, name: str, fingerprint: str, argument: str) -> None:
        """Raise if the backbone in use is another one, or this checkpoint's fingerprint is of an earlier version.

        Between a quantized and a full-precision backbone the weights of linear layers are not compared, so that a
        prompt of either may be used on the other. `argument` is the one that named this checkpoint.
        """
        if "-" not in self.fingerprint:
            raise MPTError(
                f"{argument} {self.path} was saved by an earlier version, whose fingerprint {self.fingerprint} covers "
                f"the embeddings of {self.backbone!r} alone. Train the prompt again with this version."
            )
        (rest, _, linear), (of_rest, _, of_linear) = fingerprint.partition("-"), self.fingerprint.partition("-")
        if rest != of_rest or (linear != of_linear and "quantized" not in (linear, of_linear)):
            raise MPTError(
                f"{argument} {self.path} was trained on the backbone {self.backbone!r} (fingerprint "
                f"{self.fingerprint}), but this run has {name!r} (fingerprint {fingerprint}): other weights. A prompt "
                "fits only the model it was trained on: set --model.backbone to that model, or train the prompt again."
            )


def metadata(stage: str, backbone: str, fingerprint: str, prompt: Prompt, cards: dict[str, Any]) -> dict[str, Any]:
    """Return the plain values that a checkpoint contains beside the tensors."""
    return {
        "format": FORMAT,
        "stage": stage,
        "backbone": backbone,
        "fingerprint": fingerprint,
        "prompt_class": type(prompt).__name__,
        "prompt_config": prompt.config(),
        "cards": cards,
    }
