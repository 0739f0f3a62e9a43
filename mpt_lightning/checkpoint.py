"""What a checkpoint holds, and reading one: trained tensors and how to use them, never the backbone."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mpt_lightning.prompts import (
    ContextPrompt,
    DecomposedPrompt,
    EmptyPrompt,
    EncodedPrompt,
    MultitaskPrompt,
    PrefixPrompt,
    Prompt,
    SoftPrompt,
    SuperposedPrompt,
)

if TYPE_CHECKING:
    from mpt_lightning.backbones import Backbone

KEY = "mpt_lightning"
FORMAT = 1
PROMPTS: dict[str, type[Prompt]] = {
    kind.__name__: kind
    for kind in (
        SoftPrompt,
        MultitaskPrompt,
        ContextPrompt,
        EncodedPrompt,
        SuperposedPrompt,
        PrefixPrompt,
        DecomposedPrompt,
        EmptyPrompt,
    )
}


@dataclass
class PromptCheckpoint:
    """A checkpoint of this package, read and checked.

    Attributes:
        path: where it was read from.
        stage: the class that trained it: "PromptTuning", "MPTSource", ...
        backbone: Hub id or folder of the frozen model.
        fingerprint: hash of that model's embeddings.
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

    @property
    def tasks(self) -> list[str]:
        """The names of the trained tasks."""
        return list(self.prompt_config["tasks"])

    def empty_prompt(self) -> Prompt:
        """Make a prompt of the checkpoint's class and shape."""
        return PROMPTS[self.prompt_class](**self.prompt_config)

    def prompt(self, embeddings: Tensor | None = None) -> Prompt:
        """Make the trained prompt.

        Args:
            embeddings: [V, H] the backbone's, for prompts that are made of them (CPT).

        Raises:
            ValueError: the checkpoint is of a method that trains the backbone's weights, not a prompt.
        """
        if self.prompt_class == EmptyPrompt.__name__:
            raise ValueError(
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

    def check_backbone(self, name: str, fingerprint: str, argument: str) -> None:
        """Refuse another backbone.

        Args:
            name: the backbone in use.
            fingerprint: its fingerprint.
            argument: the argument that named this checkpoint.

        Raises:
            ValueError: it is another model.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"{argument} {self.path} was trained on the backbone {self.backbone!r} (embeddings "
                f"{self.fingerprint}), but this run has {name!r} (embeddings {fingerprint}). A prompt fits only the "
                "model it was trained on: set --model.backbone to that model, or train the prompt anew."
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
        ValueError: it is not one of this package's, or of a later format.
    """
    found = content.get(KEY)
    if not isinstance(found, Mapping) or "state_dict" not in content:
        raise ValueError(f"{path} is no checkpoint of mpt_lightning. Give one that its modules saved.")
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the checkpoint format {found.get('format')!r}; this version reads {FORMAT}. "
            "Update mpt_lightning."
        )
    values = {key: value for key, value in found.items() if key != "format"}
    if set(values) != {"stage", "backbone", "fingerprint", "prompt_class", "prompt_config", "cards"}:
        raise ValueError(f"{path} is damaged: its description has the fields {', '.join(sorted(values))}.")
    if values["prompt_class"] not in PROMPTS:
        raise ValueError(f"{path} holds a {values['prompt_class']!r}; known are {', '.join(PROMPTS)}.")
    return PromptCheckpoint(
        path=path,
        state_dict=dict(content["state_dict"]),
        hyper_parameters=dict(content.get("hyper_parameters") or {}),
        data=dict(content.get("datamodule_hyper_parameters") or {}),
        metrics=_metrics(content, path),
        **values,
    )


def _metrics(content: Mapping[str, Any], path: str) -> dict[str, float]:
    """Give the scores under which ModelCheckpoint saved the file of this name."""
    states = [s for s in (content.get("callbacks") or {}).values() if isinstance(s, Mapping) and s.get("monitor")]
    return {
        str(state["monitor"]): float(score)
        for state in states
        for file, score in (state.get("best_k_models") or {}).items()
        if Path(file).name == Path(path).name
    }


def read_checkpoint(
    path: str, argument: str = "--ckpt_path", *, folder: bool = False, backbone: "Backbone | None" = None
) -> PromptCheckpoint:
    """Read a checkpoint; nothing in it is executed (`weights_only=True`).

    Args:
        path: the file.
        argument: the argument that named it, for messages.
        folder: a PEFT folder will do too: an export of this package, or PEFT's own (`interop.import_peft`). Training
            can start from one, and cannot be resumed from one.
        backbone: the model a folder is to be used with; its own check, as PEFT's folders have no fingerprint.

    Raises:
        ValueError: there is no such file, it is cut off, or it is not one of ours.
    """
    file = Path(path).expanduser()
    if file.is_dir() and folder:
        # PEFT takes seconds to import, and is needed for folders alone.
        from mpt_lightning.interop.peft import import_peft

        return import_peft(file, backbone)
    if file.is_dir():
        raise ValueError(
            f"{argument} {path} is a folder, which holds no training state. Give the path of a .ckpt file; a PEFT "
            "folder is a start: --model.source, --model.teachers, or --model.init_checkpoint."
        )
    if not file.is_file():
        raise ValueError(f"{argument} {path}: there is no such file. Give the path of a .ckpt file.")
    content = load_plain(file, f"{argument} {path}")
    if not isinstance(content, Mapping):
        raise ValueError(f"{argument} {path} is no checkpoint: it holds a {type(content).__name__}.")
    return parse_checkpoint(content, str(path))


def load_plain(file: Path, name: str) -> Any:
    """Read a file of torch.save's that holds tensors and plain values.

    Args:
        file: the file.
        name: what to call it in the message.

    Raises:
        ValueError: it cannot be read, or holds more than that.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no checkpoint fail anywhere in torch's reader, with any exception
        raise ValueError(
            f"{name} cannot be read: the file ({file.stat().st_size:,} bytes) is cut off or damaged, or holds more "
            "than tensors and plain values. Use another one, such as another checkpoint of the run. "
            f"The cause: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error


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


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Give the trainable parameters by name: what a checkpoint holds."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def keep_trainable(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Drop everything frozen from a state dict; a hook for `register_state_dict_post_hook`.

    A hook rather than an overridden `state_dict`, because it also holds inside a wrapper module.
    """
    kept = {prefix + name for name in trainable(module)}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in kept]:
        del state_dict[name]
    # torch also lists every module, which for a large backbone is longer than a prompt.
    versions = getattr(state_dict, "_metadata", {})
    for path in [p for p in versions if p.startswith(prefix) and not any(k.startswith(f"{p}.") for k in kept)]:
        del versions[path]


def check_state(module: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Compare a state dict with the trainable parameters: every one, none else, equal shapes.

    Raises:
        ValueError: they differ.
    """
    expected = {name: tuple(value.shape) for name, value in trainable(module).items()}
    got = {name: tuple(value.shape) for name, value in state_dict.items()}
    if expected == got:
        return
    missing, extra = sorted(expected.keys() - got.keys()), sorted(got.keys() - expected.keys())
    sizes = [
        f"{name}: {list(got[name])} instead of {list(expected[name])}"
        for name in sorted(expected.keys() & got.keys())
        if got[name] != expected[name]
    ]
    parts = [
        f"missing: {', '.join(missing)}" if missing else "",
        f"not expected: {', '.join(extra)}" if extra else "",
        f"other sizes: {'; '.join(sizes)}" if sizes else "",
    ]
    raise ValueError("The checkpoint's tensors do not fit this model; " + "; ".join(p for p in parts if p) + ".")
