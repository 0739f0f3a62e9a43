"""Exporting checkpoints as folders that `PeftModel.from_pretrained` loads."""

import copy
from pathlib import Path
from typing import Any

from peft import MultitaskPromptTuningConfig, PromptTuningConfig, TaskType

from mpt_lightning.backbones import Backbone
from mpt_lightning.backbones.base import Family
from mpt_lightning.backbones.load import family_of
from mpt_lightning.checkpoint import PromptCheckpoint
from mpt_lightning.checkpoint.export import DESCRIPTION, STATE, write_description, write_json
from mpt_lightning.checkpoint.peft import ADAPTER, TASKS
from mpt_lightning.errors import MPTError
from mpt_lightning.interop.card import CARD, SLOTS, Layout, model_card, prompt_place
from mpt_lightning.interop.folder import check_paths, load_trained, only, write_tensors
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
    MULTITASK_PROMPT_TUNING, with `tasks.json` to map task names to PEFT's `task_ids`, and any other prompt of several
    tasks one PROMPT_TUNING folder per task, `dest/<task name>`. Every folder contains what `import_peft` needs to
    return the checkpoint bit for bit, and a model card. Nothing in it refers to the checkpoint's file.

    Args:
        checkpoint: A checkpoint of PromptTuning, MPTSource, MPTTarget or CPT, or its path.
        dest: A path that does not exist. The folder appears there whole or not at all.
        task: Export this task alone.
        backbone: The checkpoint's backbone, if it is loaded already. Otherwise its configuration is read by name, and
            the model itself only for prompts that depend on its embeddings (CPT).
        replace: Replace an earlier export at `dest`.

    Raises:
        MPTError: If `dest` exists, the checkpoint cannot be read, or the task or backbone is unknown, or PEFT would
            put the prompt elsewhere: in a masked language model, or with `[prompt*N]` in the template.
    """
    found, prompt, config = load_trained(checkpoint, task, backbone)
    check_place(family_of(config), prompt_place(found, config) == SLOTS)
    with new_folder(dest, DESCRIPTION if replace else None) as folder:
        if isinstance(prompt, MultitaskPrompt) and task is None:
            options = _shared_options(found, prompt, config)
            MultitaskPromptTuningConfig(**options, num_tasks=prompt.num_tasks, num_ranks=prompt.rank).save_pretrained(
                str(folder)
            )
            write_tensors(folder / ADAPTER, dict(prompt.state_dict()))
            write_json(folder / TASKS, {name: row for row, name in enumerate(prompt.tasks)})
            _finish(folder, found, [ADAPTER, TASKS], "group", config)
        elif prompt.num_tasks == 1:
            _write_task(folder, found, prompt, prompt.tasks[0], config)
        else:
            check_paths(prompt.tasks)
            for name in prompt.tasks:
                (folder / name).mkdir(parents=True)
                _write_task(folder / name, found, copy.deepcopy(prompt), name, config)
            files = [f"{name}/{ADAPTER}" for name in prompt.tasks]
            _finish(folder, found, files if isinstance(prompt, SoftPrompt) else [STATE], "folders", config)
    return Path(dest).expanduser()


def check_place(family: Family, slots: bool) -> None:
    """Raise if PEFT, which puts a prompt before all other tokens, would give other results.

    Args:
        family: The backbone's.
        slots: Whether the prompt's tokens stand at `[prompt*N]` in the template.
    """
    if family == "masked":
        raise MPTError(
            "PEFT has no task type for masked language models, and puts prompts before [CLS], so that its results "
            "would differ. Export embeddings instead: mpt export --to prompt-embeds."
        )
    if slots:
        raise MPTError(
            "The template has places for the prompt ([prompt*N]), and PEFT puts prompts before the text, so that its "
            "results would differ. Export embeddings instead: mpt export --to prompt-embeds."
        )


def _write_task(folder: Path, checkpoint: PromptCheckpoint, prompt: Prompt, task: str, config: Any) -> None:
    """Write one task's prompt as PROMPT_TUNING; the other tasks are removed from `prompt`."""
    alone = only(checkpoint, prompt, task)
    PromptTuningConfig(**_shared_options(checkpoint, prompt, config)).save_pretrained(str(folder))
    write_tensors(folder / ADAPTER, {"prompt_embeddings": prompt.fold(task)})
    files = [ADAPTER] if isinstance(prompt, SoftPrompt) else [ADAPTER, STATE]
    _finish(folder, alone, files, "task", config)


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


def _finish(folder: Path, checkpoint: PromptCheckpoint, files: list[str], layout: Layout, config: Any) -> None:
    """Write what a folder contains besides PEFT's own files."""
    if STATE in files:
        state = {name.removeprefix("prompt."): value for name, value in checkpoint.state_dict.items()}
        write_tensors(folder / STATE, state)
    write_description(folder, checkpoint, files)
    (folder / CARD).write_text(model_card(checkpoint, layout, config=config), encoding="utf-8")
