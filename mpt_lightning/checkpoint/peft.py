"""PEFT folders as checkpoints: this package's exports, and what PEFT's own `save_pretrained` wrote."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpt_lightning.backbones import Backbone, load_backbone
from mpt_lightning.checkpoint.folder import DESCRIPTION, STATE, for_backbone, read_description, read_json, read_tensors
from mpt_lightning.checkpoint.format import PromptCheckpoint
from mpt_lightning.checkpoint.io import load_plain
from mpt_lightning.checkpoint.validation import check_values
from mpt_lightning.errors import MPTError
from mpt_lightning.prompts import ContextPrompt, MultitaskPrompt, Prompt, SoftPrompt

CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
TASKS = "tasks.json"
STAGE = "PEFT"
"""The stage of a checkpoint that PEFT trained."""
TYPES = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")


def import_peft(folder: str | Path, backbone: Backbone | None = None) -> PromptCheckpoint:
    """Read a PEFT folder as a checkpoint: a start, a source or teachers for this package's modules.

    `export_peft`'s own folders come back bit for bit. Of PEFT's own, PROMPT_TUNING, MULTITASK_PROMPT_TUNING and CPT
    are read, from safetensors or .bin (`weights_only=True`). These say only which model they were made for, so with
    `backbone` their width and kind must agree with it, and another name is a warning: the same model often has two.
    Without `backbone` neither is checked, and the checkpoint's fingerprint is empty.

    Args:
        folder: the folder with `adapter_config.json`, or one with a folder per task that `export_peft` made.
        backbone: the model it is to be used with. A CPT folder of PEFT's needs one; by default the one it names is
            loaded.

    Returns:
        The checkpoint. Tasks of a foreign folder are "0", "1", ... unless its `tasks.json` names them. Its stage is
        "PEFT".

    Raises:
        MPTError: no PEFT folder, a type without a prompt, missing or extra tensors, a damaged file, or another
            backbone.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise MPTError(f"{folder}: there is no such folder. Give a local folder that PEFT or export_peft wrote.")
    if not (path / DESCRIPTION).is_file():
        return _import_foreign(path, backbone)
    found, files = read_description(path)
    if STATE in files:
        state = read_tensors(path / STATE)
    elif ADAPTER in files and found.prompt_class != "SoftPrompt":
        state = read_tensors(path / ADAPTER)
    else:
        parts = [ADAPTER] if ADAPTER in files else files
        tensors = [read_tensors(path / part) for part in parts]
        if not parts or any(set(part) != {"prompt_embeddings"} for part in tensors):
            raise MPTError(f"{path}: expected the tensor prompt_embeddings and no other in {', '.join(parts)}.")
        state = {"prompt_embeddings": torch.stack([part["prompt_embeddings"] for part in tensors])}
    found = found if backbone is None else for_backbone(found, backbone)
    found = replace(found, state_dict={f"prompt.{name}": value for name, value in state.items()})
    found.check_tensors()
    return found


def _import_foreign(folder: Path, backbone: Backbone | None) -> PromptCheckpoint:
    """Read a folder of PEFT's; see `import_peft`."""
    config = _read_config(folder)
    parts = 2 if config["task_type"] == "SEQ_2_SEQ_LM" else 1
    parts = config.get("num_transformer_submodules") or parts
    length, multitask = config["num_virtual_tokens"], config["peft_type"] == "MULTITASK_PROMPT_TUNING"
    tensors = _read_adapter(folder)
    dim = config.get("token_dim") or (tensors["prompt_embeddings"].shape[-1] if "prompt_embeddings" in tensors else 0)
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeddings": (length * parts, dim)}
    tasks, ranks = (config.get("num_tasks") or 1, config.get("num_ranks") or 1) if multitask else (1, 1)
    if multitask:
        shapes["prefix_task_cols"] = (tasks, length * parts, ranks)
        shapes["prefix_task_rows"] = (tasks, ranks, dim)
    _check_tensors(folder, tensors, shapes)
    if parts > 1:
        _tell_of_the_decoder_half(folder, config)
        tensors["prompt_embeddings"] = tensors["prompt_embeddings"][:length]
        if multitask:
            tensors["prefix_task_cols"] = tensors["prefix_task_cols"][:, :length]
    base = config.get("base_model_name_or_path") or ""
    if backbone is None and config["peft_type"] == "CPT":
        if not base:
            raise MPTError(f"{folder} does not name its backbone; give import_peft the argument backbone.")
        try:
            backbone = load_backbone(base)
        except ValueError as error:
            raise MPTError(f"{folder} needs its backbone; give import_peft the argument backbone. {error}") from error
    if backbone is not None:
        _check_backbone(folder, config, base, dim, backbone)
    prompt = _make_prompt(folder, config, tensors, _task_names(folder, tasks), backbone)
    proven = isinstance(prompt, ContextPrompt) and bool((prompt.moves == 0).any())
    if backbone is not None and not proven:
        _tell_of_another_name(folder, base, dim, backbone)
    return PromptCheckpoint(
        path=str(folder),
        stage=STAGE,
        backbone=base if backbone is None else backbone.name,
        fingerprint="" if backbone is None else backbone.fingerprint,
        prompt_class=type(prompt).__name__,
        prompt_config=prompt.config(),
        state_dict={f"prompt.{name}": value for name, value in prompt.state_dict().items()},
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """Read `adapter_config.json`, and check that it describes a prompt."""
    if not (folder / CONFIG).is_file():
        raise MPTError(f"{folder} is no PEFT folder: it has no {CONFIG}. Give the folder that save_pretrained wrote.")
    config: dict[str, Any] = read_json(folder / CONFIG)
    kind = config.get("peft_type")
    if kind not in TYPES:
        raise MPTError(f"{folder} holds the PEFT type {kind!r}; a prompt can be made of {', '.join(TYPES)}.")
    if config.setdefault("task_type", None) not in (None, "CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise MPTError(
            f"{folder} has the task_type {config['task_type']!r}; expected CAUSAL_LM or SEQ_2_SEQ_LM, since a "
            "classification head has no place in these modules."
        )
    sizes = {"num_virtual_tokens": config.get("num_virtual_tokens")}
    optional = ("num_tasks", "num_ranks", "token_dim", "num_transformer_submodules")
    sizes |= {name: config[name] for name in optional if config.get(name) is not None}
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise MPTError(f"{folder / CONFIG} has {name}={size!r}; expected a number of 1 or more.")
    if (sizes.get("num_transformer_submodules") or 1) > (2 if config["task_type"] == "SEQ_2_SEQ_LM" else 1):
        raise MPTError(
            f"{folder / CONFIG} has num_transformer_submodules={sizes['num_transformer_submodules']}; expected 1, or 2 "
            "for an encoder-decoder."
        )
    if not isinstance(config.get("base_model_name_or_path"), str | None):
        raise MPTError(f"{folder / CONFIG} has base_model_name_or_path={config['base_model_name_or_path']!r}.")
    return config


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    """Read the tensors, in fp32; safetensors goes first, as in PEFT."""
    if (folder / ADAPTER).is_file():
        tensors: Any = read_tensors(folder / ADAPTER)
    elif (folder / PICKLED).is_file():
        tensors = load_plain(folder / PICKLED, str(folder / PICKLED))
    else:
        raise MPTError(f"{folder} has no tensors: expected {ADAPTER} or {PICKLED} beside {CONFIG}.")
    if not isinstance(tensors, Mapping) or any(not isinstance(value, Tensor) for value in tensors.values()):
        raise MPTError(f"{folder / PICKLED} holds something else than tensors by name.")
    check_values(tensors, str(folder))
    return {name: value.detach().float() for name, value in tensors.items()}


def _check_tensors(folder: Path, tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    if got != shapes:

        def words(of: dict[str, tuple[int, ...]]) -> str:
            return ", ".join(f"{name} {list(shape)}" for name, shape in sorted(of.items())) or "nothing"

        raise MPTError(f"{folder} does not hold what its {CONFIG} says: got {words(got)}; expected {words(shapes)}.")


def _tell_of_the_decoder_half(folder: Path, config: dict[str, Any]) -> None:
    use = "generate does not use" if config["peft_type"] == "MULTITASK_PROMPT_TUNING" else "neither trains nor uses"
    warnings.warn(
        f"{folder} has rows for the decoder too (num_transformer_submodules=2), which PEFT {use}; the encoder's half "
        "is imported.",
        UserWarning,
        stacklevel=4,
    )


def _check_backbone(folder: Path, config: dict[str, Any], base: str, dim: int, backbone: Backbone) -> None:
    """Refuse a model that cannot be the folder's."""
    kind = "SEQ_2_SEQ_LM" if backbone.family == "seq2seq" else "CAUSAL_LM"
    if dim != backbone.dim or config["task_type"] not in (None, kind):
        raise MPTError(
            f"{folder} was made for {base or 'an unnamed model'!r} ({config['task_type'] or 'any kind'}, embeddings of "
            f"width {dim}), and this run has {backbone.name!r} ({kind}, {backbone.dim}). A prompt fits only the model "
            "it was trained on: set --model.backbone to that model."
        )


def _tell_of_another_name(folder: Path, base: str, dim: int, backbone: Backbone) -> None:
    """Warn where only the name says that the model is another: one model often has several."""
    if base != backbone.name and Path(base).expanduser().resolve() != Path(backbone.name).expanduser().resolve():
        warnings.warn(
            f"{folder} was made for {base or 'an unnamed model'!r}, and this run has {backbone.name!r}. Their widths "
            f"agree ({dim}), and PEFT saves nothing else to compare: make sure that they are one model.",
            UserWarning,
            stacklevel=4,
        )


def _task_names(folder: Path, count: int) -> list[str]:
    """Give the tasks' names in the order of PEFT's task ids."""
    if not (folder / TASKS).is_file():
        return [str(row) for row in range(count)]
    names = read_json(folder / TASKS)
    if sorted(names.values(), key=repr) != sorted(range(count), key=repr):
        raise MPTError(f"{folder / TASKS} must give each of {count} tasks its number, from 0; got {names}.")
    return sorted(names, key=lambda name: names[name])


def _make_prompt(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], tasks: list[str], backbone: Backbone | None
) -> Prompt:
    table = tensors["prompt_embeddings"]
    length, dim = table.shape
    prompt: Prompt
    if config["peft_type"] == "PROMPT_TUNING":
        prompt = SoftPrompt(1, length, dim, tasks)
        prompt.load_state_dict({"prompt_embeddings": table[None]})
    elif config["peft_type"] == "MULTITASK_PROMPT_TUNING":
        prompt = MultitaskPrompt(len(tasks), length, dim, tensors["prefix_task_cols"].shape[2], tasks)
        prompt.load_state_dict(tensors)
    elif backbone is not None:
        prompt = _make_context(folder, config, table, tasks, backbone)
    else:
        raise RuntimeError("checked before")
    return prompt


def _make_context(
    folder: Path, config: dict[str, Any], table: Tensor, tasks: list[str], backbone: Backbone
) -> ContextPrompt:
    """PEFT saves embedding + perturbation in one; the backbone's embeddings tell them apart."""
    ids, types = config.get("cpt_token_ids") or [], config.get("cpt_tokens_type_mask") or []
    if not isinstance(ids, list) or not isinstance(types, list):
        raise MPTError(f"{folder / CONFIG} has cpt_token_ids or cpt_tokens_type_mask that are no lists.")
    if len(ids) != len(table):
        raise MPTError(f"{folder / CONFIG} has {len(ids)} cpt_token_ids; expected {len(table)}, num_virtual_tokens.")
    try:
        prompt = ContextPrompt(
            ids,
            types,
            table.shape[1],
            tasks,
            epsilon=config.get("opt_projection_epsilon"),
            template_epsilon=config.get("opt_projection_format_epsilon"),
        )
        prompt.attach(backbone.embeddings.cpu())
    except ValueError as error:
        raise MPTError(f"{folder / CONFIG} describes no context of {backbone.name!r}. {error}") from error
    delta = table - prompt.embeddings
    frozen = prompt.moves[:, 0] == 0
    if (delta[frozen].norm(dim=1) > 0.02 * prompt.embeddings[frozen].norm(dim=1) + 1e-6).any():
        raise MPTError(
            f"{folder} was made for another backbone than {backbone.name!r}: the embeddings of its labels and "
            "separators, which CPT does not train, are not that model's. Give the backbone it was made for."
        )
    with torch.no_grad():
        prompt.delta_embedding.copy_(delta * prompt.moves)
    return prompt
