"""The batches that every module takes, and the check that a batch is one of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mpt_lightning.errors import MPTError

Batch = dict[str, Any]

# Tensors of a batch by key, and their dimensions.
SHAPES = {"input_ids": "BL", "attention_mask": "BL", "labels": "BM", "task_ids": "B"}
_OPTIONAL = {"choices": "BCK", "shares": "BC", "context_examples": "B"}


def check_batch(batch: Any, tasks: Sequence[str]) -> Batch:
    """Check a batch against the contract between DataModules and modules, and return it with `task_ids`.

    A batch is a mapping, from any DataModule. Its tensors, on one device:

    - `input_ids [B, L]`, integers: the text's tokens. -1, -2, ... are places of a prompt's first, second, ... token.
    - `attention_mask [B, L]`: 1 at tokens, 0 at padding, on any side.
    - `labels [B, M]`, integers: the answer's tokens, -100 for padding, which is at the end. For decoder-only models
      too they are the answer alone; the text is in `input_ids`.
    - `task_ids [B]`, integers: each row's place in the DataModule's `tasks` `[T]`, or in the module's if the DataModule
      has none. Optional if there is one task; then they are zeros.
    - `choices [B, C, K]`, for evaluation, and for a loss over the choices (`over`): the tokens of each of C answers,
      padded like labels.
    - `shares [B, C]`, optional: how much each choice is right; by default 1 for the one with the labels' tokens.
    - `context_examples [B]`, optional, CPT's leave-one-out: the row's place in the context, -1 for none.

    Lists of B for evaluation: `references` (accepted answers, each a list of strings; needed if the DataModule has
    `cards`), `texts`, `groups`, `row_ids`. There is one evaluation loader per task, in the order of `tasks`.

    Raises:
        MPTError: If a key is missing, a tensor has another type or shape, or a task id that is on the CPU is not in
            0..T-1. Values on another device are not read, which would make the host wait.
    """
    if not isinstance(batch, Mapping):
        raise _wrong(f"a {type(batch).__name__}", "a mapping")
    batch = dict(batch)
    labels = batch.get("labels")
    if "task_ids" not in batch and len(tasks) == 1 and isinstance(labels, Tensor):
        batch["task_ids"] = torch.zeros(len(labels), dtype=torch.long, device=labels.device)
    if missing := [key for key in SHAPES if key not in batch]:
        several = f" (there are {len(tasks)} tasks: {', '.join(tasks)})" if missing == ["task_ids"] else ""
        raise _wrong(f"no {', '.join(missing)}", f"{', '.join(SHAPES)}{several}")
    sizes: dict[str, int] = {}
    for key, shape in (SHAPES | _OPTIONAL).items():
        if key not in batch:
            continue
        value, expected = batch[key], f"{key} [{', '.join(shape)}]"
        if not isinstance(value, Tensor):
            raise _wrong(f"{key} as a {type(value).__name__}", f"a tensor {expected}")
        if key not in ("attention_mask", "shares") and (value.is_floating_point() or value.dtype == torch.bool):
            raise _wrong(f"{key} of {value.dtype}", f"integers {expected}")
        known = {name: sizes[name] for name in shape if name in sizes}
        if value.ndim != len(shape) or any(
            size != known.get(name, size) for name, size in zip(shape, value.shape, strict=True)
        ):
            given = f" with {', '.join(f'{name}={size}' for name, size in known.items())}" if known else ""
            raise _wrong(f"{key} {list(value.shape)}", f"{expected}{given}")
        sizes |= dict(zip(shape, value.shape, strict=True))
    ids: Tensor = batch["task_ids"]
    if ids.device.type == "cpu" and len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < len(tasks):
        outside = next(number for number in ids.tolist() if not 0 <= number < len(tasks))
        raise _wrong(f"the task id {outside}", f"0 to {len(tasks) - 1}, places in {', '.join(tasks)}")
    return batch


def task_of_loader(tasks: Sequence[str], index: int) -> str:
    """Return the task of an evaluation loader, by its place."""
    if index >= len(tasks):
        raise MPTError(
            f"Got evaluation loader {index + 1}, expected one per task ({', '.join(tasks)}), in this order. Change the "
            "DataModule's loaders, or its `tasks`."
        )
    return tasks[index]


def _wrong(got: str, expected: str) -> MPTError:
    return MPTError(
        f"The batch: got {got}, expected {expected}. Change the DataModule; `mpt_lightning.modules.batch.check_batch` "
        "describes batches."
    )
