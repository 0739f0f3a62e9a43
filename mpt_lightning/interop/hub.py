"""The Hugging Face Hub: a model card written from a checkpoint, and uploading an export."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData

from mpt_lightning.backbones.load import load_config
from mpt_lightning.checkpoint import PromptCheckpoint
from mpt_lightning.demo import DATA
from mpt_lightning.interop.examples import Layout, loading_code
from mpt_lightning.prompts import ContextPrompt

CARD = "README.md"
METHODS = {
    "PromptTuning": ("Prompt tuning", "2104.08691", "a free prompt per task before the input of a frozen model"),
    "MPTSource": (
        "Multitask prompt tuning, source training", "2303.02861",
        "a prompt that all tasks share, times a low-rank matrix per task, distilled from single-task prompts",
    ),
    "MPTTarget": (
        "Multitask prompt tuning, target adaptation", "2303.02861",
        "a prompt transferred from source tasks, times a low-rank matrix per task",
    ),
    "CPT": (
        "Context-aware prompt tuning", "2410.17222",
        "a context of training examples whose embeddings were trained within small balls",
    ),
}  # fmt: skip


def model_card(
    checkpoint: PromptCheckpoint, layout: Layout | None = None, *, is_encoder_decoder: bool | None = None
) -> str:
    """Write the README of an export: YAML for the Hub, what was trained, and code that loads it.

    Args:
        checkpoint: what was exported.
        layout: what the folder is: "task", one task's prompt for PEFT; "group", a multitask prompt for PEFT; "folders",
            one PEFT folder per task; "prompt_embeds", embeddings. By default what `export_peft` makes of it.
        is_encoder_decoder: the backbone's kind; by default read from its configuration.

    Raises:
        ValueError: the backbone's configuration is needed and cannot be reached.
    """
    if layout is None:
        layout = "folders" if len(checkpoint.tasks) > 1 else "task"
        if checkpoint.prompt_class == "MultitaskPrompt":
            layout = "group"
    if is_encoder_decoder is None:
        is_encoder_decoder = bool(load_config(checkpoint.backbone).is_encoder_decoder)
    sections = [
        f"---\n{_front_matter(checkpoint)}\n---",
        *_description(checkpoint),
        *_tasks(checkpoint),
        *_scores(checkpoint),
        *loading_code(checkpoint, layout, is_encoder_decoder),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(checkpoint: PromptCheckpoint) -> str:
    cards = list(checkpoint.cards.values())
    data = sorted({card["path"] for card in cards if _is_hub_id(card["path"]) and card["path"] != DATA})
    base = checkpoint.backbone
    values = ModelCardData(
        base_model=base if _is_hub_id(base) and not Path(base).exists() else None,
        library_name="peft",
        tags=["mpt_lightning", "prompt-tuning", *sorted({f"task:{task}" for task in checkpoint.tasks})],
        datasets=data or None,
        language=sorted({card["language"] for card in cards if card.get("language")}) or None,
    )
    return str(values.to_yaml())


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"([\w.-]+/)?\w[\w.-]*", name) is not None


def _description(checkpoint: PromptCheckpoint) -> Iterator[str]:
    name, paper, text = METHODS.get(checkpoint.stage, (f"A prompt trained by {checkpoint.stage}", "", ""))
    prompt = checkpoint.empty_prompt()
    trained = sum(value.numel() for value in checkpoint.state_dict.values())
    if isinstance(prompt, ContextPrompt):
        trained = int(prompt.moves.sum()) * prompt.dim
    yield f"# {name} for {checkpoint.backbone}"
    if text:
        link = f"[arXiv:{paper}](https://arxiv.org/abs/{paper})"
        yield f"{text[0].upper()}{text[1:]} ({link}). The model itself is unchanged."
    rows = {
        "Method": name,
        "Backbone": f"`{checkpoint.backbone}`"
        + (f" (embeddings `{checkpoint.fingerprint}`)" if checkpoint.fingerprint else ""),
        "Prompt": f"{checkpoint.prompt_class}, {prompt.length} tokens of width {prompt.dim}",
        "Tasks": str(prompt.num_tasks),
        "Trained parameters": f"{trained:,}",
    }
    yield "| | |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    if isinstance(prompt, ContextPrompt):
        yield "The prompt is made of training examples. Their token ids are in this folder, so their text can be read."


def _tasks(checkpoint: PromptCheckpoint) -> Iterator[str]:
    yield "## Tasks and data"
    lines = []
    for task in checkpoint.tasks:
        card = checkpoint.cards.get(task)
        if card is None:
            lines.append(f"- **{task}**")
            continue
        data = " ".join(filter(None, [card["path"], card.get("subset")]))
        answers = (
            ", ".join(card["choices"]) if card.get("choices") else "a number" if card.get("value_range") else "text"
        )
        licence = f", licence {card['licence']}" if card.get("licence") else ""
        lines.append(f"- **{task}**: {data}{licence}; input `{card['input']}`; answers: {answers}")
    yield "\n".join(lines)
    prefix = checkpoint.data.get("answer_prefix")
    if prefix:
        yield f"After every input stands `{prefix}`."
    options = {
        **checkpoint.hyper_parameters,
        **{k: checkpoint.data.get(k) for k in ("k_shot", "context_shots", "seed")},
    }
    names = (
        "lr",
        "shared_lr",
        "task_lr",
        "rank",
        "method",
        "epsilon",
        "template_epsilon",
        "k_shot",
        "context_shots",
        "seed",
    )
    found = [f"{name} {options[name]}" for name in names if options.get(name) is not None]
    if found:
        yield f"Trained with {', '.join(found)}."


def _scores(checkpoint: PromptCheckpoint) -> Iterator[str]:
    if checkpoint.metrics:
        lines = [f"| {name} | {score:.4f} |" for name, score in checkpoint.metrics.items()]
        yield "## Metrics"
        yield "| metric | value |\n|---|---|\n" + "\n".join(lines)
        yield "The score by which this checkpoint was chosen, on validation data."


def push(folder: str | Path, repo_id: str, *, private: bool | None = None) -> str:
    """Upload an export to the Hub; makes the repository where there is none.

    Args:
        folder: what `export_peft` or `export_prompt_embeds` wrote.
        repo_id: "user/name".
        private: for a new repository; by default the account's setting. One that exists stays as it is.

    Returns:
        The repository's address.

    Raises:
        ValueError: no export, no such repository, no permission, or no connection.
    """
    path = Path(folder).expanduser()
    if not (path / CARD).is_file():
        raise ValueError(f"{folder} is no export: it has no {CARD}. Give a folder that `mpt export` wrote.")
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=path, commit_message="Upload with mpt_lightning")
    except Exception as error:  # the network's own errors have no base class that huggingface_hub exports
        raise ValueError(
            f"{folder} was not pushed to {repo_id!r}: {_first_line(error)}. Check the repository's name, `hf auth "
            "login` and the connection; the folder itself is whole."
        ) from error
    return str(address)


def _first_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
