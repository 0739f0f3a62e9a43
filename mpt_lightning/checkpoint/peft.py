"""PEFT folders as checkpoints: this package's exports, and what PEFT's own `save_pretrained` wrote."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpt_lightning.backbones import Backbone, load_backbone
from mpt_lightning.checkpoint.export import DESCRIPTION, STATE, for_backbone, read_description, read_json, read_tensors
from mpt_lightning.checkpoint.format import PromptCheckpoint
from mpt_lightning.checkpoint.io import load_plain
from mpt_lightning.checkpoint.state import check_finite
from mpt_lightning.errors import MPTError
from mpt_lightning.prompts import ContextPrompt, MultitaskPrompt, Prompt, SoftPrompt

CONFIG = "adapter_config.json"
ADAPTER = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
TASKS = "tasks.json"
# The stage of a checkpoint that PEFT trained.
STAGE = "PEFT"
TYPES = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")


def import_peft(folder: str | Path, backbone: Backbone | None = None) -> PromptCheckpoint:
    """Read a PEFT folder as a checkpoint: an initialization, a source or teachers for this package's modules.

    `export_peft`'s folders are read bit for bit. Of PEFT's own, PROMPT_TUNING, MULTITASK_PROMPT_TUNING and CPT are
    read, from safetensors or .bin (`weights_only=True`). These name their model and do not identify it, so only their
    width and family are compared with `backbone`, and another name is a warning. Their tasks are "0", "1", ... unless
    `tasks.json` names them, and their stage is "PEFT".

    Args:
        folder: The folder with `adapter_config.json`, or one with a folder per task that `export_peft` wrote.
        backbone: The model that it is used with. Without it, no model is compared, the fingerprint of PEFT's own
            folders is empty, and a CPT folder loads the model it names.

    Raises:
        MPTError: If it is not a folder of these types, is damaged, or is for another backbone.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise MPTError(f"{folder}: there is no such folder. Expected a local folder that PEFT or export_peft wrote.")
    if not (path / DESCRIPTION).is_file():
        return _import_foreign(path, backbone)
    found, files = read_description(path)
    if STATE in files:
        state = read_tensors(path / STATE)
    elif ADAPTER in files and found.prompt_class != "SoftPrompt":
        state = read_tensors(path / ADAPTER)
    else:  # one file per task
        parts = [ADAPTER] if ADAPTER in files else files
        state = {"prompt_embeddings": torch.stack([read_tensors(path / part)["prompt_embeddings"] for part in parts])}
    found = found if backbone is None else for_backbone(found, backbone)
    found = replace(found, state_dict={f"prompt.{name}": value for name, value in state.items()})
    found.check_tensors()
    return found


def _import_foreign(folder: Path, backbone: Backbone | None) -> PromptCheckpoint:
    """Read a folder of PEFT's; see `import_peft`."""
    config = _read_config(folder)
    kind, base = config["peft_type"], config.get("base_model_name_or_path") or ""
    tensors = _read_adapter(folder, config)
    length, dim = tensors["prompt_embeddings"].shape
    if backbone is None and kind == "CPT":
        try:
            backbone = load_backbone(base)
        except (ValueError, OSError) as error:
            raise MPTError(
                f"{folder} needs its backbone {base!r} to be imported; set import_peft's argument backbone. {error}"
            ) from error
    if backbone is not None:
        _check_backbone(folder, config, dim, backbone)
    prompt: Prompt
    if kind == "CPT" and backbone is not None:
        prompt = _context(folder, config, tensors["prompt_embeddings"], backbone)
    elif kind == "MULTITASK_PROMPT_TUNING":
        tasks = _task_names(folder, config["num_tasks"])
        prompt = MultitaskPrompt(len(tasks), length, dim, config["num_ranks"], tasks)
        prompt.load_state_dict(tensors)
    else:
        prompt = SoftPrompt(1, length, dim, _task_names(folder, 1))
        prompt.load_state_dict({"prompt_embeddings": tensors["prompt_embeddings"][None]})
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
        raise MPTError(f"{folder} is not a PEFT folder: it has no {CONFIG}. Expected one that save_pretrained wrote.")
    config = read_json(folder / CONFIG)
    for name, allowed in (("peft_type", TYPES), ("task_type", ("CAUSAL_LM", "SEQ_2_SEQ_LM", None))):
        if config.setdefault(name, None) not in allowed:
            raise MPTError(f"{folder} has the {name} {config[name]!r}. Expected {' or '.join(map(str, allowed))}.")
    if not isinstance(config.get("num_virtual_tokens"), int):
        raise MPTError(f"{folder / CONFIG} has no number as num_virtual_tokens.")
    return config


def _read_adapter(folder: Path, config: dict[str, Any]) -> dict[str, Tensor]:
    """Read the tensors that a configuration describes, in fp32 and without rows for a decoder."""
    if (folder / ADAPTER).is_file():  # goes first, as in PEFT
        tensors: Any = read_tensors(folder / ADAPTER)
    elif (folder / PICKLED).is_file():
        tensors = load_plain(folder / PICKLED, str(folder / PICKLED))
    else:
        raise MPTError(f"{folder} has no tensors. Expected {ADAPTER} or {PICKLED} beside {CONFIG}.")
    check_finite(tensors, str(folder))
    length = config["num_virtual_tokens"]
    parts = config.get("num_transformer_submodules") or (2 if config["task_type"] == "SEQ_2_SEQ_LM" else 1)
    got = {name: list(value.shape) for name, value in sorted(tensors.items())}
    expected = {"prompt_embeddings": [length * parts, config.get("token_dim") or got.get("prompt_embeddings", [0])[-1]]}
    if config["peft_type"] == "MULTITASK_PROMPT_TUNING":
        tasks, rank = config["num_tasks"], config["num_ranks"]
        expected["prefix_task_cols"] = [tasks, length * parts, rank]
        expected["prefix_task_rows"] = [tasks, rank, expected["prompt_embeddings"][1]]
    if got != expected:
        raise MPTError(f"{folder} does not contain what its {CONFIG} describes: got {got}; expected {expected}.")
    tensors = {name: value.detach().float() for name, value in tensors.items()}
    if parts > 1:
        warnings.warn(
            f"{folder} has rows for the decoder too (num_transformer_submodules=2), which PEFT does not use to "
            "generate; the encoder's half is imported.",
            UserWarning,
            stacklevel=4,
        )
        tensors["prompt_embeddings"] = tensors["prompt_embeddings"][:length]
        if "prefix_task_cols" in tensors:
            tensors["prefix_task_cols"] = tensors["prefix_task_cols"][:, :length]
    return tensors


def _check_backbone(folder: Path, config: dict[str, Any], dim: int, backbone: Backbone) -> None:
    """Raise if the backbone cannot be the folder's; warn if only its name differs: one model often has several."""
    base = config.get("base_model_name_or_path") or ""
    task_type = "SEQ_2_SEQ_LM" if backbone.family == "seq2seq" else "CAUSAL_LM"
    if dim != backbone.dim or config["task_type"] not in (None, task_type):
        raise MPTError(
            f"{folder} was made for {base!r} ({config['task_type']}, embeddings of width {dim}), and this run has "
            f"{backbone.name!r} ({task_type}, {backbone.dim}). A prompt fits only the model it was trained on: set "
            "--model.backbone to that model."
        )
    # CPT's frozen tokens identify the backbone.
    if config["peft_type"] != "CPT" and Path(base).expanduser().resolve() != Path(backbone.name).expanduser().resolve():
        warnings.warn(
            f"{folder} was made for {base!r}, and this run has {backbone.name!r}. Their widths agree ({dim}), and PEFT "
            "saves nothing else to compare: make sure that they are one model.",
            UserWarning,
            stacklevel=4,
        )


def _task_names(folder: Path, count: int) -> list[str]:
    """Return the tasks' names in the order of PEFT's task ids."""
    if not (folder / TASKS).is_file():
        return [str(row) for row in range(count)]
    names = read_json(folder / TASKS)
    if sorted(names.values(), key=str) != sorted(range(count), key=str):
        raise MPTError(f"{folder / TASKS} must map each of {count} tasks to its number, from 0; got {names}.")
    return sorted(names, key=lambda name: names[name])


def _context(folder: Path, config: dict[str, Any], table: Tensor, backbone: Backbone) -> ContextPrompt:
    """Split PEFT's sums of embedding and perturbation `[P, H]`, with the backbone's embeddings."""
    ids, types = config.get("cpt_token_ids") or [], config.get("cpt_tokens_type_mask") or []
    if len(ids) != len(table):
        raise MPTError(f"{folder / CONFIG} has {len(ids)} cpt_token_ids; expected {len(table)}, num_virtual_tokens.")
    epsilon, template_epsilon = config.get("opt_projection_epsilon"), config.get("opt_projection_format_epsilon")
    try:
        tasks = _task_names(folder, 1)
        prompt = ContextPrompt(ids, types, table.shape[1], tasks, epsilon=epsilon, template_epsilon=template_epsilon)
        prompt.attach(backbone.embeddings.cpu())
    except MPTError as error:
        raise MPTError(f"{folder / CONFIG} does not describe a context of {backbone.name!r}. {error}") from error
    delta = table - prompt.embeddings
    frozen = prompt.moves[:, 0] == 0
    if (delta[frozen].norm(dim=1) > 0.02 * prompt.embeddings[frozen].norm(dim=1) + 1e-6).any():
        raise MPTError(
            f"{folder} was made for another backbone than {backbone.name!r}: the embeddings of its labels and "
            "separators, which CPT does not train, are not that model's. Use the backbone it was made for."
        )
    with torch.no_grad():
        prompt.delta_embedding.copy_(delta * prompt.moves)
    return prompt
