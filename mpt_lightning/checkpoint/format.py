"""What a checkpoint holds, and reading one: trained tensors and how to use them, never the backbone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mpt_lightning.checkpoint.validation import TRAINING_STATE, check_state, check_types, check_values, saved_scores
from mpt_lightning.data.card import load_card
from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line
from mpt_lightning.prompts import EmptyPrompt, Prompt

KEY = "mpt_lightning"
# A backbone's fingerprint: `mpt_lightning.backbones.fingerprint` has the meaning of its two parts.
FINGERPRINT = "[0-9a-f]{12}-([0-9a-f]{12}|quantized)"
# That of an earlier version.
EMBEDDINGS_ALONE = "[0-9a-f]{16}"
FORMAT = 1

DESCRIPTION = {
    "stage": str, "backbone": str, "fingerprint": str, "prompt_class": str, "prompt_config": dict, "cards": dict,
    "hyper_parameters": dict, "data": dict, "metrics": dict,
}  # fmt: skip
"""The types of what describes the tensors."""


@dataclass
class PromptCheckpoint:
    """A checkpoint of this package, read and checked.

    Attributes:
        path: where it was read from.
        stage: the class that trained it: "PromptTuning", "MPTSource", ...
        backbone: Hub id or folder of the frozen model.
        fingerprint: hash of that model's weights; see `mpt_lightning.backbones.fingerprint`.
        prompt_class: "SoftPrompt", "MultitaskPrompt" or "ContextPrompt".
        prompt_config: that class's arguments.
        cards: the tasks' cards by name, as plain values; empty where the data had none.
        state_dict: the trained tensors.
        hyper_parameters: the module's arguments.
        data: the DataModule's arguments, where it saved them.
        metrics: the score that this file was saved for, by the metric's name; empty where that is not known.
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
        """Check the description, wherever it was read.

        Raises:
            MPTError: a value is of another type than described above, or no prompt or card can be made of them.
        """
        check_types(vars(self), DESCRIPTION, self.path)
        check_types(self.metrics, dict.fromkeys(self.metrics, float), self.path)
        if self.prompt_class not in Prompt.classes:
            raise MPTError(f"{self.path} holds a {self.prompt_class!r}; known are {', '.join(Prompt.classes)}.")
        tasks = self.prompt_config.get("tasks")
        if not isinstance(tasks, list) or any(not isinstance(task, str) for task in tasks):
            raise MPTError(f"{self.path} is damaged: its tasks are {tasks!r}, expected a list of names.")
        try:
            if self._shapes().config() != self.prompt_config:
                raise MPTError("it is incomplete")
        except Exception as error:  # values of any kind go into a class that expects the right ones
            raise MPTError(
                f"{self.path} is damaged: no {self.prompt_class} can be made of its description ({one_line(error)})."
            ) from error
        for name, card in self.cards.items():
            try:
                load_card(card if isinstance(card, Mapping) else {})
            except ValueError as error:
                raise MPTError(f"{self.path} is damaged: its card of {name!r} is wrong. {error}") from error

    def _shapes(self) -> Prompt:
        # On this device tensors have shapes and no memory, so that a wrong size costs nothing.
        with torch.device("meta"):
            return Prompt.classes[self.prompt_class](**self.prompt_config)

    def check_tensors(self) -> None:
        """Check the trained tensors.

        Raises:
            MPTError: one is missing, of another shape or type than the description says, or not finite.
        """
        check_values(self.state_dict, self.path)
        prompts = {name: value for name, value in self.state_dict.items() if name.startswith("prompt.")}
        try:
            check_state(nn.ModuleDict({"prompt": self._shapes()}), prompts)
        except ValueError as error:
            raise MPTError(f"{self.path} is damaged. {error}") from error

    @property
    def tasks(self) -> list[str]:
        """The names of the trained tasks."""
        return list(self.prompt_config["tasks"])

    def empty_prompt(self) -> Prompt:
        """Make a prompt of the checkpoint's class and shape."""
        return Prompt.classes[self.prompt_class](**self.prompt_config)

    def prompt(self, embeddings: Tensor | None = None) -> Prompt:
        """Make the trained prompt.

        Args:
            embeddings: [V, H] the backbone's, for prompts that are made of them (CPT).

        Raises:
            MPTError: the checkpoint is of a method that trains the backbone's weights, not a prompt.
        """
        if self.prompt_class == EmptyPrompt.__name__:
            raise MPTError(
                f"{self.path} was saved by {self.stage}, which trains weights of the backbone and no prompt. "
                "Give a checkpoint of a method with prompts, such as PromptTuning or MPTSource."
            )
        prompt = self.empty_prompt()
        if embeddings is not None:
            prompt.attach(embeddings.cpu())
        prompt.load_state_dict(
            {name.removeprefix("prompt."): value for name, value in self.state_dict.items()}, strict=True
        )
        return prompt

    def check_embeddings(self, argument: str) -> None:
        """Check that the prompts are embeddings and nothing else, as a start, a teacher and an export need.

        Args:
            argument: the argument that named this checkpoint.

        Raises:
            MPTError: They are not.
        """
        content = Prompt.classes[self.prompt_class].content
        if content != Prompt.content:
            raise MPTError(
                f"{argument} {self.path} was saved by {self.stage} and contains {content}; expected a prompt of "
                "embeddings alone. Give a checkpoint of PromptTuning, MPTSource, MPTTarget or CPT."
            )

    def check_backbone(self, name: str, fingerprint: str, argument: str) -> None:
        """Raise if the backbone is another one.

        Between a quantized and a full-precision backbone the weights of linear layers are not compared, so that a
        prompt of either may be used on the other.

        Args:
            name: the backbone in use.
            fingerprint: its fingerprint.
            argument: the argument that named this checkpoint.

        Raises:
            MPTError: it is another model, or the checkpoint has a fingerprint of an earlier version.
        """
        if re.fullmatch(EMBEDDINGS_ALONE, self.fingerprint):
            raise MPTError(
                f"{argument} {self.path} was saved by an earlier version, whose fingerprint {self.fingerprint} covers "
                f"the embeddings of {self.backbone!r} alone, so that a model with other layers or another head would "
                "pass. Train the prompt again with this version."
            )
        (rest, _, linear), (of_rest, _, of_linear) = fingerprint.partition("-"), self.fingerprint.partition("-")
        if rest != of_rest or (linear != of_linear and "quantized" not in (linear, of_linear)):
            raise MPTError(
                f"{argument} {self.path} was trained on the backbone {self.backbone!r} (fingerprint "
                f"{self.fingerprint}), but this run has {name!r} (fingerprint {fingerprint}): other weights. A prompt "
                "fits only the model it was trained on: set --model.backbone to that model, or train the prompt again."
            )


def metadata(stage: str, backbone: str, fingerprint: str, prompt: Prompt, cards: dict[str, Any]) -> dict[str, Any]:
    """Give the plain values that go into a checkpoint beside the tensors."""
    return {
        "format": FORMAT,
        "stage": stage,
        "backbone": backbone,
        "fingerprint": fingerprint,
        "prompt_class": type(prompt).__name__,
        "prompt_config": prompt.config(),
        "cards": cards,
    }


def parse_checkpoint(content: Mapping[str, Any], path: str) -> PromptCheckpoint:
    """Check a loaded checkpoint's content.

    Raises:
        MPTError: it is not one of this package's, or of a later format.
    """
    found = content.get(KEY)
    if not isinstance(found, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise MPTError(f"{path} is no checkpoint of mpt_lightning. Give one that its modules saved.")
    if found.get("format") != FORMAT:
        raise MPTError(
            f"{path} has the checkpoint format {found.get('format')!r}; this version reads {FORMAT}. "
            "Update mpt_lightning."
        )
    values = {key: value for key, value in found.items() if key != "format"}
    if set(values) != {"stage", "backbone", "fingerprint", "prompt_class", "prompt_config", "cards"}:
        raise MPTError(f"{path} is damaged: its description has the fields {', '.join(sorted(map(str, values)))}.")
    check_types(content, TRAINING_STATE, path)
    for name, form in (
        ("stage", r"[^\W\d]\w*"),
        ("backbone", r".+"),
        ("fingerprint", f"{FINGERPRINT}|{EMBEDDINGS_ALONE}"),
    ):
        if not re.fullmatch(form, str(values[name])):
            raise MPTError(f"{path} is damaged: its {name} is {values[name]!r}.")
    checkpoint = PromptCheckpoint(
        path=path,
        state_dict=dict(content["state_dict"]),
        hyper_parameters=dict(content.get("hyper_parameters") or {}),
        data=dict(content.get("datamodule_hyper_parameters") or {}),
        metrics=saved_scores(content, path),
        **values,
    )
    trained = checkpoint.hyper_parameters.get("_class_path", checkpoint.stage)
    if str(trained).rpartition(".")[2] != checkpoint.stage:
        raise MPTError(f"{path} is damaged: it was saved by {checkpoint.stage}, and its arguments are {trained}'s.")
    checkpoint.check_tensors()
    return checkpoint


def close_finished_epoch(checkpoint: dict[str, Any]) -> None:
    """Let a run that is counted in steps go on with a new epoch where the last one is finished.

    Lightning 2.6 takes such an epoch for an unfinished one, and leaves the next epoch after its first batch.

    Args:
        checkpoint: the whole checkpoint, changed in place.
    """
    loop = checkpoint.get("loops", {}).get("fit_loop", {})
    epochs, batches = loop.get("epoch_progress"), loop.get("epoch_loop.batch_progress")
    if not epochs or not batches or not batches["is_last_batch"]:
        return
    if epochs["current"]["completed"] == epochs["current"]["processed"]:
        batches["is_last_batch"] = False
        batches["current"] = dict.fromkeys(batches["current"], 0)
