"""PEFT folders both ways: a checkpoint becomes what `PeftModel.from_pretrained` loads, and such a folder a checkpoint.

PEFT loads without checking that all tensors are there, so both ways check the exact set of keys themselves.
"""

import copy
from pathlib import Path
from typing import Any

from peft import MultitaskPromptTuningConfig, PromptTuningConfig, TaskType
from torch import Tensor

from mpt_lightning.backbones import Backbone
from mpt_lightning.backbones.load import family_of
from mpt_lightning.backbones.pretrained import load_config
from mpt_lightning.checkpoint import PromptCheckpoint
from mpt_lightning.checkpoint.export import DESCRIPTION, STATE, write_description, write_json
from mpt_lightning.checkpoint.peft import ADAPTER, TASKS
from mpt_lightning.interop.card import CARD, Layout, model_card
from mpt_lightning.interop.folder import (
    as_checkpoint,
    only,
    task_paths,
    trained_prompt,
    write_tensors,
)
from mpt_lightning.io import new_folder
from mpt_lightning.prompts import MultitaskPrompt, Prompt, SoftPrompt


def export_peft(
    checkpoint: PromptCheckpoint | str | Path,
    dest: str | Path,
    task: str | None = None,
    *,
    backbone: Backbone | None = None,
    replace: bool = False,
) -> Path:
    """Write a checkpoint as a folder that PEFT loads, with equal logits and generations.

    A task's prompt becomes PROMPT_TUNING, folded to `[P, H]`. Without `task` a `MultitaskPrompt` becomes
    MULTITASK_PROMPT_TUNING, with `tasks.json` to say which of PEFT's `task_ids` each task is, and any other prompt of
    several tasks one PROMPT_TUNING folder per task, `dest/<task name>`. Every folder holds what `import_peft` needs to
    give the checkpoint back bit for bit, and a model card. Nothing in it refers to the checkpoint's file.

    Args:
        checkpoint: a checkpoint of PromptTuning, MPTSource, MPTTarget or CPT, or its path.
        dest: a place that does not exist. The folder appears there whole or not at all.
        task: this task alone.
        backbone: the checkpoint's backbone, where it is loaded already. Otherwise its configuration is read by name,
            and the model itself only for prompts made of its embeddings (CPT).
        replace: replace an earlier export at `dest`.

    Returns:
        The folder.

    Raises:
        MPTError: there is something at `dest`, the checkpoint cannot be read, or the task or backbone is unknown.
    """
    found = as_checkpoint(checkpoint)
    prompt = trained_prompt(found, backbone)
    if task is not None:
        prompt.index(task)
    config = backbone.model.config if backbone is not None else load_config(found.backbone)
    with new_folder(dest, DESCRIPTION if replace else None) as folder:
        if task is not None or (prompt.num_tasks == 1 and not isinstance(prompt, MultitaskPrompt)):
            _write_task(folder, found, prompt, prompt.tasks[0] if task is None else task, config)
        elif isinstance(prompt, MultitaskPrompt):
            _write_group(folder, found, prompt, config)
        else:
            for name, path in task_paths(prompt.tasks).items():
                (folder / path).mkdir(parents=True)
                _write_task(folder / path, found, copy.deepcopy(prompt), name, config)
            files = [f"{path}/{ADAPTER}" for path in task_paths(prompt.tasks).values()]
            _finish(folder, found, files if isinstance(prompt, SoftPrompt) else [STATE], "folders", config)
    return Path(dest).expanduser()


def _write_task(folder: Path, checkpoint: PromptCheckpoint, prompt: Prompt, task: str, config: Any) -> None:
    """Write one task's prompt as PROMPT_TUNING; the other tasks are taken out of `prompt`."""
    alone = only(checkpoint, prompt, task)
    PromptTuningConfig(**_shared_options(checkpoint, prompt, config)).save_pretrained(str(folder))
    write_tensors(folder / ADAPTER, {"prompt_embeddings": prompt.fold(task)})
    files = [ADAPTER] if isinstance(prompt, SoftPrompt) else [ADAPTER, STATE]
    _finish(folder, alone, files, "task", config)


def _write_group(folder: Path, checkpoint: PromptCheckpoint, prompt: MultitaskPrompt, config: Any) -> None:
    """Write all tasks as MULTITASK_PROMPT_TUNING, whose tensors have our names."""
    options = _shared_options(checkpoint, prompt, config)
    MultitaskPromptTuningConfig(**options, num_tasks=prompt.num_tasks, num_ranks=prompt.rank).save_pretrained(
        str(folder)
    )
    write_tensors(folder / ADAPTER, dict(prompt.state_dict()))
    write_json(folder / TASKS, {name: row for row, name in enumerate(prompt.tasks)})
    _finish(folder, checkpoint, [ADAPTER, TASKS], "group", config)


def _shared_options(checkpoint: PromptCheckpoint, prompt: Prompt, config: Any) -> dict[str, Any]:
    return {
        "task_type": TaskType.SEQ_2_SEQ_LM if family_of(config) == "seq2seq" else TaskType.CAUSAL_LM,
        "base_model_name_or_path": checkpoint.backbone,
        "inference_mode": True,
        "num_virtual_tokens": prompt.length,
        "token_dim": prompt.dim,
        # PEFT's default for an encoder-decoder is 2: rows for the decoder, which `generate` does not use.
        "num_transformer_submodules": 1,
        "num_layers": getattr(config, "num_hidden_layers", None),
        "num_attention_heads": getattr(config, "num_attention_heads", None),
    }


def _finish(
    folder: Path,
    checkpoint: PromptCheckpoint,
    files: list[str],
    layout: Layout,
    config: Any,
) -> None:
    if STATE in files:
        write_tensors(folder / STATE, _own_names(checkpoint.state_dict))
    write_description(folder, checkpoint, files)
    card = model_card(checkpoint, layout, family=family_of(config))
    (folder / CARD).write_text(card, encoding="utf-8")


def _own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("prompt."): value for name, value in state.items()}
