"""Prompts as plain embeddings: what vLLM takes as `prompt_embeds` and transformers as `inputs_embeds`."""

from pathlib import Path

from mpt_lightning.backbones import Backbone
from mpt_lightning.backbones.load import family_of
from mpt_lightning.checkpoint import PromptCheckpoint
from mpt_lightning.checkpoint.export import digest, write_json
from mpt_lightning.interop.card import CARD, model_card, prompt_place, ranked_words
from mpt_lightning.interop.folder import check_paths, load_trained, write_tensors
from mpt_lightning.io import new_folder

INDEX = "prompt_embeds.json"
FORMAT = 1


def export_prompt_embeds(
    checkpoint: PromptCheckpoint | str | Path,
    dest: str | Path,
    task: str | None = None,
    *,
    backbone: Backbone | None = None,
) -> Path:
    """Write each task's prompt as a safetensors file with the one tensor `prompt_embeds` `[P, H]`, fp32.

    `prompt_embeds.json` contains the backbone, its tokenizer, the place of the prompt, and for each task its file,
    input template, choices, answer prefix, and the special tokens of its inputs: "all" that the tokenizer adds, "first"
    without an end of sequence, "none". `README.md` has code that uses them.

    See `export_peft` for the arguments and errors.
    """
    found, prompt, config = load_trained(checkpoint, task, backbone)
    family = family_of(config)
    special = "first" if family == "causal" else "all"
    if found.prompt_class == "ContextPrompt":
        special = "none"
    check_paths(prompt.tasks)
    files = {name: f"{name}.safetensors" for name in prompt.tasks}
    cards = {name: found.cards.get(name, {}) for name in files}
    with new_folder(dest) as folder:
        for name, file in files.items():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            write_tensors(folder / file, {"prompt_embeds": prompt.fold(name).float()})
        index = {
            "format": FORMAT,
            "backbone": found.backbone,
            "fingerprint": found.fingerprint,
            "tokenizer": found.backbone,
            "is_encoder_decoder": config.is_encoder_decoder,
            "dtype": "float32",
            "place": prompt_place(found, config),
            "length": prompt.length,
            "width": prompt.dim,
            "tasks": {
                name: {
                    "file": file,
                    "sha256": digest(folder / file),
                    "template": cards[name].get("input"),
                    "choices": ranked_words(cards[name]),
                    "answer_prefix": found.data.get("answer_prefix"),
                    "special_tokens": special,
                }
                for name, file in files.items()
            },
        }
        write_json(folder / INDEX, index)
        (folder / CARD).write_text(model_card(found, "prompt_embeds", config=config), encoding="utf-8")
    return Path(dest).expanduser()
