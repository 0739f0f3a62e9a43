"""The tensors of a checkpoint: which are saved, and whether loaded ones fit a module."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mpt_lightning.errors import MPTError


def trainable(module: nn.Module) -> dict[str, Tensor]:
    """Return the trainable parameters by name: what a checkpoint contains."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def keep_trainable(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Remove everything frozen from a state dict; a hook for `register_state_dict_post_hook`.

    Unlike an overridden `state_dict`, a hook also runs when the module is inside a wrapper.
    """
    kept = {prefix + name for name in trainable(module)}
    for name in [name for name in state_dict if name.startswith(prefix) and name not in kept]:
        del state_dict[name]
    # torch also lists every submodule, which for a large backbone takes more space than a prompt.
    versions = getattr(state_dict, "_metadata", {})
    owners = {name[:end] for name in kept for end, letter in enumerate(name) if letter == "."}
    for path in [path for path in versions if path.startswith(prefix) and path not in owners]:
        del versions[path]


def check_state(module: nn.Module, state_dict: Mapping[str, Tensor], path: str = "The checkpoint") -> None:
    """Raise if a state dict does not contain exactly the trainable parameters, each of its shape."""
    expected = {name: list(value.shape) for name, value in trainable(module).items()}
    got = {name: list(value.shape) for name, value in state_dict.items()}
    parts = {
        "missing": [name for name in expected if name not in got],
        "not expected": [name for name in got if name not in expected],
        "other sizes": [
            f"{name}: {got[name]} instead of {size}" for name, size in expected.items() if got.get(name, size) != size
        ],
    }
    differences = [f"{what}: {', '.join(sorted(names))}" for what, names in parts.items() if names]
    if differences:
        raise MPTError(f"{path} does not fit this model. Its tensors differ; {'; '.join(differences)}.")


def check_finite(values: Mapping[str, Any], path: str) -> None:
    """Raise if one of the tensors has NaN or infinite values."""
    for name, value in values.items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise MPTError(
                f"{path} is damaged: {name} has values that are not finite (NaN or infinite). Use another file, such "
                "as an earlier checkpoint of the run."
            )


def check_training_state(content: Mapping[str, Any], path: str) -> None:
    """Raise if a checkpoint lacks what a run needs to resume, or its optimizer has values that are not finite."""
    if missing := [name for name in ("loops", "optimizer_states", "lr_schedulers") if name not in content]:
        raise MPTError(
            f"--ckpt_path {path} cannot be resumed: it lacks {', '.join(missing)}, like a file that was saved with "
            "save_weights_only=True. Use a whole checkpoint, or start a new run from this one: --model.prompt_init "
            "checkpoint, --model.source or --model.teachers."
        )
    for optimizer in content["optimizer_states"]:
        for number, values in optimizer.get("state", {}).items():
            check_finite({f"{name} of parameter {number}": value for name, value in values.items()}, path)
