"""Mixed-task inference: `Predictor` compared with PEFT's forward pass over the same rows.

    python benchmarks/predictor.py [--threads 2] [--repeats 15]

64 rows of four tasks, L tokens each, with two one-token answers to rank, one MPT prompt of 100 tokens per task, on a
small Llama with random weights, CPU, fp32. The measured step is the whole of `Predictor.predict`: tokenisation,
ranking, probabilities; the prompts' keys and values are computed beforehand, as in a server. PEFT's step is one forward
pass with `task_ids` over token ids, and the log-probabilities of both answers at the last position.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from measure import RESULTS, Line, alternate, difference, main, small_llama
from peft import MultitaskPromptTuningConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from mpt_lightning import MultitaskPrompt, Predictor, load_backbone
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.tokenize import Encoder

ROWS, PROMPT, TASKS = 64, 100, ["first", "second", "third", "fourth"]
WORDS = ["no", "yes"]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one word per token: w3, w4, ..., and the two answers."""
    special = ["<pad>", "<unk>", "<eos>"]
    words = [*special, *(f"w{i}" for i in range(3, 100)), *WORDS, *(f"w{i}" for i in range(102, 8000))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


def against_peft(length: int, repeats: int) -> Line:
    with tempfile.TemporaryDirectory() as folder:
        small_llama().save_pretrained(folder)
        backbone = load_backbone(folder)
    backbone.tokenizer = tokenizer()
    prompt = MultitaskPrompt(len(TASKS), PROMPT, 288, tasks=TASKS)
    cards = {
        name: TaskCard(name=name, path="none", input="{text}", metrics=["accuracy"], choices=WORDS) for name in TASKS
    }
    predictor = Predictor(backbone, prompt, cards, Encoder(backbone.tokenizer, "causal", 256))
    # The Encoder ends answers with the end-of-text token; users of PEFT compare the first tokens of the words.
    predictor.encoder.format.choices = lambda inputs, choices: [[[100], [101]] for _ in inputs]
    config = MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=PROMPT, num_transformer_submodules=1, num_tasks=len(TASKS)
    )
    reference = get_peft_model(small_llama(), config).eval()
    encoder = reference.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(prompt.prompt_embeddings)
        for name in prompt.task_parameters():
            getattr(encoder, name).copy_(getattr(prompt, name))
    ids = torch.randint(200, 8000, (ROWS, length), generator=torch.Generator().manual_seed(1))
    texts = [" ".join(f"w{i}" for i in row) for row in ids.tolist()]
    names = [TASKS[row % len(TASKS)] for row in range(ROWS)]
    task_ids = torch.arange(ROWS) % len(TASKS)

    def ours() -> Tensor:
        made = predictor.predict(texts, names)
        return torch.tensor([[answer.probabilities[word] for word in WORDS] for answer in made])

    @torch.inference_mode()
    def theirs() -> Tensor:
        logits = reference(input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=task_ids).logits[:, -1]
        return logits.log_softmax(1)[:, [100, 101]].softmax(1)

    note = f"relative difference of the probabilities {difference(ours(), theirs()):.0e}"
    times = alternate(ours, theirs, repeats, f"predict, L={length}")
    title = f"{ROWS} rows of {len(TASKS)} tasks, P={PROMPT} L={length}"
    return Line(title, f"PEFT {peft.__version__} forward", 5.0 if length <= 20 else None, True, *times, note)


def predictions(repeats: int) -> Iterator[Line]:
    for length in (16, 32):
        yield against_peft(length, repeats)


if __name__ == "__main__":
    main("Predictor", {"predictor": predictions}, Path(RESULTS, "predictor.json"))
