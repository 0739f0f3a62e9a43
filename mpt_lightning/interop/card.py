"""Model cards: the README of an export, with code that loads it. The texts are in `templates/`."""

import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any, Literal

from huggingface_hub import ModelCardData
from transformers import PreTrainedConfig

from mpt_lightning.backbones.base import Family
from mpt_lightning.backbones.limits import attention_windows
from mpt_lightning.backbones.load import family_of
from mpt_lightning.backbones.pretrained import load_config, load_tokenizer
from mpt_lightning.checkpoint import PromptCheckpoint
from mpt_lightning.data.formats import MaskedFormat
from mpt_lightning.data.template import MASK, SEPARATOR, count_slots
from mpt_lightning.modules import PromptModule
from mpt_lightning.prompts import ContextPrompt
from mpt_lightning.resources import EMBEDDED

CARD = "README.md"
# The place of prompts whose tasks have slots for them.
SLOTS = "at `[prompt*N]` in the template"
Layout = Literal["task", "group", "folders", "prompt_embeds"]
# Arguments that are listed in a card.
SETTINGS = (
    "lr", "shared_lr", "task_lr", "rank", "method", "epsilon", "template_epsilon", "k_shot", "dev_shot",
    "context_shots", "seed",
)  # fmt: skip


def model_card(
    checkpoint: PromptCheckpoint, layout: Layout | None = None, *, config: PreTrainedConfig | None = None
) -> str:
    """Return the README of an export: YAML for the Hub, what was trained, and code that loads it.

    Args:
        checkpoint: What was exported.
        layout: What the folder contains: "task", one task's prompt for PEFT; "group", a multitask prompt for PEFT;
            "folders", one PEFT folder per task; "prompt_embeds", embeddings. By default what `export_peft` writes.
        config: The backbone's configuration; by default read by the backbone's name.

    Raises:
        MPTError: If the backbone's configuration is needed and cannot be reached.
    """
    if layout is None:
        is_group = checkpoint.prompt_class == "MultitaskPrompt"
        layout = "group" if is_group else "folders" if len(checkpoint.tasks) > 1 else "task"
    config = config or load_config(checkpoint.backbone)
    is_peft = layout != "prompt_embeds" and family_of(config) != "masked"
    method = PromptModule.classes.get(checkpoint.stage, PromptModule)
    summary = f"{method.summary[:1].upper()}{method.summary[1:]}"
    prompt = checkpoint.empty_prompt()
    parameters = sum(value.numel() for value in checkpoint.state_dict.values())
    note = ""
    if isinstance(prompt, ContextPrompt):
        parameters = int(prompt.moves.sum()) * prompt.dim
        note = "The prompt is made of training examples. Their token ids are in this folder, so their text can be read."
    arxiv = f"[arXiv:{method.paper}](https://arxiv.org/abs/{method.paper})"
    text = _fill(
        "card",
        front_matter=_front_matter(checkpoint, is_peft),
        method=method.title or f"A prompt trained by {checkpoint.stage}",
        backbone=checkpoint.backbone,
        summary=f"{summary} ({arxiv}). The model itself is unchanged." if summary else "",
        fingerprint=f" (fingerprint `{checkpoint.fingerprint}`)" if checkpoint.fingerprint else "",
        prompt=f"{checkpoint.prompt_class}, {prompt.length} tokens of width {prompt.dim}",
        num_tasks=prompt.num_tasks,
        parameters=f"{parameters:,}",
        note=note,
        tasks="\n".join(_task(checkpoint, task) for task in checkpoint.tasks),
        settings=_settings(checkpoint),
        scores=_scores(checkpoint),
        code=_code(checkpoint, is_peft, layout, config),
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _fill(template: str, **fields: object) -> str:
    """Return a text of `templates/` with its fields filled in."""
    file = resources.files("mpt_lightning.interop") / "templates" / f"{template}.md"
    return Template(file.read_text(encoding="utf-8")).substitute(fields).strip()


def _front_matter(checkpoint: PromptCheckpoint, is_peft: bool) -> str:
    cards = list(checkpoint.cards.values())
    base = checkpoint.backbone
    values = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        library_name="peft" if is_peft else None,
        tags=["mpt_lightning", "prompt-tuning", *sorted({f"task:{task}" for task in checkpoint.tasks})],
        datasets=sorted({card["path"] for card in cards if _is_from_hub(checkpoint, card)}) or None,
        language=sorted({card["language"] for card in cards if card.get("language")}) or None,
    )
    return str(values.to_yaml())


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None and not Path(name).exists()


def _is_from_hub(checkpoint: PromptCheckpoint, card: Mapping[str, Any]) -> bool:
    """Return whether a task's rows were read from the Hub; False if the checkpoint does not contain where from."""
    data = checkpoint.data
    return "data_root" in data and data["data_root"] is None and card["path"] != EMBEDDED and _is_hub_id(card["path"])


def _task(checkpoint: PromptCheckpoint, task: str) -> str:
    card = checkpoint.cards.get(task)
    if card is None:
        return f"- **{task}**"
    origin = " ".join(filter(None, [card["path"], card.get("subset")]))
    if card["path"] == EMBEDDED:
        origin = f"generated by mpt_lightning ({origin})"
    elif not _is_from_hub(checkpoint, card):
        origin = f"local files, named {origin}"
    answers = ", ".join(card["choices"]) if card.get("choices") else "a number" if card.get("value_range") else "text"
    licence = f", licence {card['licence']}" if card.get("licence") else ""
    return f"- **{task}**: {origin}{licence}; input `{card['input']}`; answers: {answers}"


def _settings(checkpoint: PromptCheckpoint) -> str:
    prefix = checkpoint.data.get("answer_prefix")
    options = checkpoint.data | checkpoint.hyper_parameters
    found = [f"{name} {options[name]}" for name in SETTINGS if options.get(name) is not None]
    lines = [f"After every input stands `{prefix}`." if prefix else "", f"Trained with {', '.join(found)}."]
    return "\n\n".join(lines if found else lines[:1])


def _scores(checkpoint: PromptCheckpoint) -> str:
    if not checkpoint.metrics:
        return ""
    rows = "\n".join(f"| {name} | {score:.4f} |" for name, score in checkpoint.metrics.items())
    return _fill("metrics", rows=rows)


def _code(checkpoint: PromptCheckpoint, is_peft: bool, layout: Layout, config: PreTrainedConfig) -> str:
    """Return the sections on how to load the folder."""
    name, task, family = checkpoint.backbone, checkpoint.tasks[0], family_of(config)
    base = f"\nbase = {name!r}"
    if name.startswith(f"{EMBEDDED}/"):
        base = f"from mpt_lightning.resources import backbone_path\n\nbase = backbone_path({name!r})"
    use = "As a start: `mpt fit ... --model.prompt_init checkpoint --model.init_checkpoint FOLDER`."
    if checkpoint.prompt_class == "MultitaskPrompt":
        use = "As the source of a new task: `mpt fit --config mpt/target --model.source FOLDER --data TASK`."
    fields = {
        "model_class": "AutoModelForSeq2SeqLM" if family == "seq2seq" else "AutoModelForCausalLM",
        "base": base,
        "backbone_name": repr(name),
        "folder": task if layout == "folders" else ".",
        "task": repr(task),
        "ids": _token_ids(checkpoint, family),
        "use": use,
    }
    if is_peft:
        templates = ["peft_group" if layout == "group" else "peft", "mpt_lightning"]
        return "\n\n".join(_fill(template, **fields) for template in templates)
    place = prompt_place(checkpoint, config)
    masked = _masked_fields(checkpoint, place) if family == "masked" else {}
    if place == SLOTS or masked is None:
        return _fill("prompt_embeds_bare", place=place, task=task)
    if masked:
        return _fill("prompt_embeds_masked", **fields, **masked)
    templates = ["prompt_embeds", "vllm"] if family == "causal" else ["prompt_embeds"]
    return "\n\n".join(_fill(template, **fields) for template in templates)


def prompt_place(checkpoint: PromptCheckpoint, config: PreTrainedConfig) -> str:
    """Return where a backbone reads the prompt's embeddings."""
    inputs = [str(card["input"]) for card in checkpoint.cards.values()]
    if any(count_slots(text) for text in [*inputs, checkpoint.data.get("answer_prefix") or ""]):
        return SLOTS
    if family_of(config) != "masked":
        return "before the text"
    return "before the mask" if attention_windows(config) else "after the first token"


def ranked_words(card: Mapping[str, Any]) -> list[str] | None:
    """Return the words that a task ranks, in the order of its classes, or of its lowest and highest value."""
    masked: Any = card.get("masked") or {}
    words: list[str] | None = card.get("choices") or (masked.get("choices") if card.get("value_range") else None)
    return words


def _masked_fields(checkpoint: PromptCheckpoint, place: str) -> dict[str, object] | None:
    """Return how a masked model's input is written, as code; None if it has several masks or many segments."""
    card = checkpoint.cards.get(checkpoint.tasks[0]) or {}
    prefix = checkpoint.data.get("answer_prefix") or ""
    text = f"{card.get('input', 'a good film')} {prefix}".strip()
    text = (text if MASK in text else f"{text} {MASK}").removesuffix(SEPARATOR)
    words = ranked_words(card) or ["yes", "no"]
    ids = MaskedFormat(load_tokenizer(checkpoint.backbone)).targets(words)
    if any(len(own) > 1 for own in ids) or text.count(SEPARATOR) > 1:
        return None
    answer = "choices[int(scores.argmax())]"
    if card.get("value_range"):
        low, high = card["value_range"]
        answer = f"{low} + {high - low} * float(scores.softmax(dim=0)[1])"
    return {
        "segments": f"segments = {[part.strip() for part in text.split(SEPARATOR)]}  # fill the columns in",
        "place": place,
        "at": "mask" if place == "before the mask" else "1",
        "choices": words,
        "choice_ids": [own[0] for own in ids],
        "answer": answer,
    }


def _token_ids(checkpoint: PromptCheckpoint, family: Family) -> str:
    """Return the lines of code that turn a text into token ids as in training."""
    card = checkpoint.cards.get(checkpoint.tasks[0])
    text = f"{card['input']} {checkpoint.data.get('answer_prefix') or ''}".strip() if card else "a good film"
    bare = ", add_special_tokens=False" if checkpoint.prompt_class == "ContextPrompt" else ""
    line = f'ids = tokenizer({text!r}, return_tensors="pt"{bare})["input_ids"]'
    line += "  # fill the columns in" if card else ""
    if family == "seq2seq" or bare:
        return line
    return f"{line}\nids = ids[:, : -1 if ids[0, -1] == tokenizer.eos_token_id else None]  # without the final </s>"
