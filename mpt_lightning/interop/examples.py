"""The code in a model card that loads an export: what a reader pastes, and the tests run."""

from collections.abc import Iterator
from typing import Literal

from mpt_lightning.backbones.base import Family
from mpt_lightning.checkpoint import PromptCheckpoint
from mpt_lightning.resources import EMBEDDED

Layout = Literal["task", "group", "folders", "prompt_embeds"]


def loading_code(checkpoint: PromptCheckpoint, layout: Layout, family: Family) -> Iterator[str]:
    """Give the card's sections on how to load the folder; see `model_card`."""
    if layout == "prompt_embeds":
        yield from _with_transformers(checkpoint, family)
    else:
        yield from _with_peft(checkpoint, layout, family)
        yield from _with_this_package(checkpoint)


def _block(*lines: str) -> str:
    return "\n".join(["```python", *filter(None, lines), "```"])


def _model_class(family: Family) -> str:
    return "AutoModelForSeq2SeqLM" if family == "seq2seq" else "AutoModelForCausalLM"


def _base(checkpoint: PromptCheckpoint) -> tuple[str, str]:
    """Give the import that a backbone's name needs, and the line that names it."""
    if checkpoint.backbone.startswith(f"{EMBEDDED}/"):
        return "from mpt_lightning.resources import backbone_path", f"base = backbone_path({checkpoint.backbone!r})"
    return "", f"base = {checkpoint.backbone!r}"


def _token_ids(checkpoint: PromptCheckpoint, family: Family) -> list[str]:
    """Give the lines that turn a text into token ids as in training."""
    card = checkpoint.cards.get(checkpoint.tasks[0])
    text = f"{card['input']} {checkpoint.data.get('answer_prefix') or ''}".strip() if card else "a good film"
    bare = ", add_special_tokens=False" if checkpoint.prompt_class == "ContextPrompt" else ""
    line = f'ids = tokenizer({text!r}, return_tensors="pt"{bare})["input_ids"]'
    line += "  # fill the columns in" if card else ""
    if family == "seq2seq" or bare:
        return [line]
    return [line, "ids = ids[:, : -1 if ids[0, -1] == tokenizer.eos_token_id else None]  # the text goes on"]


def _with_peft(checkpoint: PromptCheckpoint, layout: Layout, family: Family) -> Iterator[str]:
    base_import, base = _base(checkpoint)
    model_class, task = _model_class(family), checkpoint.tasks[0]
    group = layout == "group"
    number = f", task_ids=torch.tensor([tasks[{task!r}]])" if group else ""
    yield "## Load in PEFT"
    yield _block(
        "import json\nfrom pathlib import Path\n" if group else "",
        "import torch",
        base_import,
        "from peft import PeftModel",
        f"from transformers import {model_class}, AutoTokenizer\n",
        base,
        f'folder = "{task if layout == "folders" else "."}"  # in this folder',
        "tokenizer = AutoTokenizer.from_pretrained(base)",
        f"model = PeftModel.from_pretrained({model_class}.from_pretrained(base), folder)",
        'tasks = json.loads(Path("tasks.json").read_text())' if group else "",
        *_token_ids(checkpoint, family),
        "options = {'attention_mask': torch.ones_like(ids), 'max_new_tokens': 8, 'do_sample': False}",
        f"tokens = model.generate(input_ids=ids{number}, **options)",
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
    )
    yield "Give PEFT rows of one length per batch: padding on the left changes its results."


def _with_this_package(checkpoint: PromptCheckpoint) -> Iterator[str]:
    yield "## Load in mpt_lightning"
    yield _block(
        "from mpt_lightning import import_peft, load_backbone\n",
        f"backbone = load_backbone({checkpoint.backbone!r})",
        'checkpoint = import_peft(".", backbone)  # this folder',
        f"prompt = checkpoint.prompt(backbone.embeddings).fold({checkpoint.tasks[0]!r})  # [P, H]",
    )
    if checkpoint.prompt_class == "MultitaskPrompt":
        yield "As the source of a new task: `mpt fit --config mpt/target --model.source FOLDER --data TASK`."
    else:
        yield "As a start: `mpt fit ... --model.prompt_init checkpoint --model.init_checkpoint FOLDER`."


def _with_transformers(checkpoint: PromptCheckpoint, family: Family) -> Iterator[str]:
    base_import, base = _base(checkpoint)
    model_class = _model_class(family)
    yield "## Use the embeddings"
    yield (
        "`prompt_embeds.json` says for each task which file holds its prompt `[P, H]`, and how its inputs are written. "
        "The prompt stands before the embedded input."
    )
    yield _block(
        "import json\nfrom pathlib import Path\n\nimport torch",
        base_import,
        "from safetensors.torch import load_file",
        f"from transformers import {model_class}, AutoTokenizer\n",
        base,
        f'task = json.loads(Path("prompt_embeds.json").read_text())["tasks"][{checkpoint.tasks[0]!r}]',
        f"tokenizer, model = AutoTokenizer.from_pretrained(base), {model_class}.from_pretrained(base)",
        *_token_ids(checkpoint, family),
        'prompt = load_file(task["file"])["prompt_embeds"].to(model.dtype)',
        "embeds = torch.cat([prompt, model.get_input_embeddings()(ids[0])])[None]  # [1, P + L, H]",
        "mask = torch.ones(embeds.shape[:2], dtype=torch.long)",
        "tokens = model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=8, do_sample=False)",
        "print(tokenizer.decode(tokens[0], skip_special_tokens=True))",
    )
    if family == "causal":
        yield (
            "vLLM takes the same tensor: `LLM(base, enable_prompt_embeds=True)`, then "
            '`llm.generate({"prompt_embeds": embeds[0]})`.'
        )
