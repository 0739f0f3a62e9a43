"""What of a module goes into a checkpoint, and what one must hold: values of the right types, finite tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line

TRAINING_STATE = {
    "epoch": int, "global_step": int, "pytorch-lightning_version": str, "loops": dict, "callbacks": dict,
    "optimizer_states": list, "lr_schedulers": list, "hyper_parameters": dict, "datamodule_hyper_parameters": dict,
}  # fmt: skip
"""The types of what Lightning reads, which takes them as given."""


def check_types(values: Mapping[str, Any], expected: Mapping[str, type], path: str) -> None:
    """Check the types of what a file holds, where it holds it.

    Args:
        values: by name.
        expected: each name's type.
        path: the file.

    Raises:
        MPTError: one is of another type, or a mapping whose keys are no texts.
    """
    for name, kind in expected.items():
        value = values.get(name)
        keys = isinstance(value, Mapping) and any(not isinstance(key, str) for key in value)
        if name in values and (not isinstance(value, kind) or isinstance(value, bool) or keys):
            raise MPTError(
                f"{path} is damaged: `{name}` is {one_line(repr(value))}, expected a {kind.__name__}"
                f"{' with texts for keys' if kind is dict else ''}."
            )


def check_values(tensors: Mapping[str, Any], path: str) -> None:
    """Refuse trained values that no training gives.

    Args:
        tensors: by name.
        path: where they were read.

    Raises:
        MPTError: one is no dense tensor of floating-point numbers, or has NaN or infinite ones.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_meta:
            raise MPTError(f"{path} is damaged: {name!r} is a {type(value).__name__}, expected a dense tensor.")
        # A few bytes can stand for terabytes where a stride is 0.
        repeated = any(size > 1 and stride == 0 for size, stride in zip(value.shape, value.stride(), strict=True))
        if not value.is_floating_point() or repeated:
            raise MPTError(
                f"{path} is damaged: {name} is of type {value.dtype}, shape {list(value.shape)} and strides "
                f"{value.stride()}, expected floating-point numbers, each with a place of its own."
            )
        if not value.isfinite().all():
            raise MPTError(
                f"{path} is damaged: {name} has values that are not finite (NaN or infinite). Use another file, such "
                "as an earlier checkpoint of the run."
            )


def check_training_state(content: Mapping[str, Any], path: str) -> None:
    """Check what a run needs to go on, beyond the prompt.

    Raises:
        MPTError: some of it is not there, or the optimizer's values are not finite.
    """
    if missing := [name for name in ("loops", "optimizer_states", "lr_schedulers") if name not in content]:
        raise MPTError(
            f"--ckpt_path {path} cannot be gone on from: it has no {', '.join(missing)}, as a file that was saved with "
            "save_weights_only=True. Give a whole checkpoint, or start a new run from this one: --model.prompt_init "
            "checkpoint, --model.source or --model.teachers."
        )
    for name, callback in content.get("callbacks", {}).items():
        if not isinstance(callback, Mapping):
            raise MPTError(f"{path} is damaged: its state of the callback {name} is {one_line(repr(callback))}.")
    for number, state in enumerate(content["optimizer_states"]):
        of_parameters = state.get("state") if isinstance(state, Mapping) else None
        if not isinstance(of_parameters, Mapping) or any(not isinstance(v, Mapping) for v in of_parameters.values()):
            raise MPTError(f"{path} is damaged: its state of the optimizer {number} is no mapping.")
        for parameter, values in of_parameters.items():
            tensors = {f"{name} of parameter {parameter}": v for name, v in values.items() if isinstance(v, Tensor)}
            check_values({name: value for name, value in tensors.items() if value.is_floating_point()}, path)


def saved_scores(content: Mapping[str, Any], path: str) -> dict[str, float]:
    """Give the scores under which ModelCheckpoint saved the file of this name, by their metrics' names.

    Raises:
        MPTError: the states of the callbacks cannot be read.
    """
    try:
        states = [s for s in (content.get("callbacks") or {}).values() if isinstance(s, Mapping) and s.get("monitor")]
        return {
            str(state["monitor"]): float(score)
            for state in states
            for file, score in (state.get("best_k_models") or {}).items()
            if Path(file).name == Path(path).name
        }
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise MPTError(f"{path} is damaged: its scores cannot be read ({one_line(error)}).") from error


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
        MPTError: they differ.
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
    raise MPTError("The checkpoint's tensors do not fit this model; " + "; ".join(p for p in parts if p) + ".")
