"""The time of training steps and light commands, each as a ratio to a reference in the same run.

    python benchmarks/speed.py [--threads 2] [--repeats 15] [--only causal overhead distillation commands]

The two sides of a comparison alternate, so that a change in the machine's speed affects both. Each round gives one
ratio; the table shows the median over the rounds and the interquartile range. Random weights, CPU, fp32.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import peft
import torch
from measure import RESULTS, Line, Step, alternate, difference, main, small_llama, train_step
from peft import MultitaskPromptTuningConfig, PromptTuningConfig, get_peft_model
from rich.progress import track
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from mpt_lightning import MPTSource, MultitaskPrompt, PromptTuning, SoftPrompt
from mpt_lightning.backbones import Backbone, CausalBackbone, MaskedBackbone, Seq2SeqBackbone
from mpt_lightning.modules import PromptModule
from mpt_lightning.objectives import token_cross_entropy
from mpt_lightning.prompts import Prompt

LENGTH = 100  # P
MASK = 103  # BERT's id of [MASK]
LABELS = 2  # M: a class word and the end token
TASKS = ["first", "second", "third", "fourth"]

Batch = dict[str, Tensor]


# -- models and data -----------------------------------------------------------------------------------------------


def t5_small() -> T5ForConditionalGeneration:
    """Return a model of t5-small's shape: 60 million parameters."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=2048, num_layers=6, num_heads=8, decoder_start_token_id=0
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def bert_base() -> BertForMaskedLM:
    """Return a model of BERT-base's shape: 110 million parameters."""
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig()).eval()


def make_batch(rows: int, length: int, vocabulary: int, tasks: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return {
        "input_ids": torch.randint(3, vocabulary, (rows, length), generator=generator),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "labels": torch.randint(3, vocabulary, (rows, LABELS), generator=generator),
        "task_ids": torch.arange(rows) % tasks,
    }


# -- a causal step against PEFT's ----------------------------------------------------------------------------------


def against_peft(method: type[Prompt], rows: int, length: int, repeats: int) -> Line:
    """Compare a training step on the small Llama with PEFT's, which runs the prompt again for every row."""
    multitask = method is MultitaskPrompt
    tasks = len(TASKS) if multitask else 1  # PEFT's PROMPT_TUNING has one prompt for all rows
    batch = make_batch(rows, length, 8000, tasks)
    options = {"task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH, "num_transformer_submodules": 1}
    config = MultitaskPromptTuningConfig(**options, num_tasks=tasks) if multitask else PromptTuningConfig(**options)
    reference = get_peft_model(small_llama(), config).eval()
    encoder = reference.prompt_encoder["default"]
    backbone, prompt = CausalBackbone(small_llama(), "small Llama").eval(), method(tasks, LENGTH, 288)
    table = prompt.prompt_embeddings
    pairs = [(table, encoder.embedding.weight)]
    if isinstance(prompt, MultitaskPrompt):
        pairs += [(getattr(prompt, name), getattr(encoder, name)) for name in prompt.task_parameters()]
    with torch.no_grad():
        for mine, theirs in pairs:
            theirs.copy_(mine.view_as(theirs))

    def our_loss() -> Tensor:
        distinct, of_row = batch["task_ids"].unique(return_inverse=True)
        inputs = (of_row, batch["input_ids"], batch["attention_mask"], batch["labels"])
        return token_cross_entropy(backbone(prompt(distinct), *inputs).logits, batch["labels"])

    whole = {
        "input_ids": torch.cat([batch["input_ids"], batch["labels"]], dim=1),
        "attention_mask": torch.ones(rows, length + LABELS, dtype=torch.long),
        "labels": torch.cat([torch.full_like(batch["input_ids"], -100), batch["labels"]], dim=1),
    }
    if multitask:
        whole["task_ids"] = batch["task_ids"]

    def peft_loss() -> Tensor:
        return reference(**whole).loss

    losses = our_loss(), peft_loss()
    for loss in losses:
        loss.backward()
    gradients = max(difference(mine.grad.view_as(theirs), theirs.grad) for mine, theirs in pairs)
    note = f"relative difference: loss {difference(*(loss.detach() for loss in losses)):.0e}, gradient {gradients:.0e}"
    theirs = train_step((p for p in reference.parameters() if p.requires_grad), peft_loss)
    name = "MPT" if multitask else "prompt tuning"
    times = alternate(train_step(prompt.parameters(), our_loss), theirs, repeats, f"causal step, {name}")
    title = f"causal {name} step, P={LENGTH} L={length} B={rows}, {tasks} task{'s' if tasks > 1 else ''}"
    return Line(title, f"PEFT {peft.__version__} {config.peft_type.value}", 2.5, True, *times, note)


def causal(repeats: int) -> Iterator[Line]:
    yield against_peft(MultitaskPrompt, rows=32, length=32, repeats=repeats)
    yield against_peft(SoftPrompt, rows=32, length=32, repeats=repeats)


# -- a step through the Trainer against the bare model's -----------------------------------------------------------


class Turns:
    """A training loader that runs the bare model's step between two steps of the Trainer.

    The time from yielding a batch to the request for the next one is a whole step of the Trainer: hooks, logging,
    forward, backward, optimizer, scheduler.
    """

    def __init__(self, batch: Batch, bare: Step, rounds: int) -> None:
        self.batch, self.bare, self.rounds = batch, bare, rounds
        self.times: tuple[list[float], list[float]] = [], []

    def __len__(self) -> int:
        return self.rounds

    def __iter__(self) -> Iterator[Batch]:
        for _ in track(range(self.rounds), description=f"{'Trainer':32}", transient=True):
            begin = time.perf_counter()
            self.bare()
            handed_out = time.perf_counter()
            yield dict(self.batch)
            self.times[0].append(time.perf_counter() - handed_out)
            self.times[1].append(handed_out - begin)


def overhead(repeats: int, rows: int = 8, length: int = 64) -> Iterator[Line]:
    """Compare PromptTuning in a Trainer with transformers' T5 and BERT in a hand-written loop."""
    t5, bert = t5_small().requires_grad_(False), bert_base().requires_grad_(False)
    mask = torch.ones(rows, LENGTH + length, dtype=torch.long)

    def t5_loss(embeds: Tensor, batch: Batch) -> Tensor:
        words = t5.get_input_embeddings()(batch["input_ids"])
        whole = torch.cat([embeds, words], dim=1)
        return t5(inputs_embeds=whole, attention_mask=mask, labels=batch["labels"], use_cache=False).loss

    def bert_loss(embeds: Tensor, batch: Batch) -> Tensor:
        words = bert.get_input_embeddings()(batch["input_ids"])
        whole = torch.cat([words[:, :1], embeds, words[:, 1:]], dim=1)
        states = bert.bert(inputs_embeds=whole, attention_mask=mask).last_hidden_state
        chosen = bert.cls(states[:, -1]).gather(1, batch["choices"][:, :, 0])  # the mask is the last token
        return nn.functional.cross_entropy(chosen, torch.zeros(rows, dtype=torch.long))

    of_t5 = make_batch(rows, length, 32128, len(TASKS))
    of_bert = of_t5 | {"input_ids": of_t5["input_ids"] % 30000 + 200, "labels": torch.full((rows, 1), 300)}
    of_bert["input_ids"][:, -1] = MASK
    of_bert["choices"] = torch.tensor([[[300], [400]]]).expand(rows, -1, -1)
    masked = MaskedBackbone(bert, "BERT-base's shape")
    masked.tokenizer = SimpleNamespace(mask_token_id=MASK, sep_token_id=-1, all_special_ids=[])  # type: ignore[assignment]
    masked.second_type = 0
    yield through_trainer("T5", Seq2SeqBackbone(t5, "t5-small's shape"), of_t5, t5_loss, repeats)
    yield through_trainer("BERT", masked, of_bert, bert_loss, repeats)


def through_trainer(
    kind: str, backbone: Backbone, batch: Batch, loss: Callable[[Tensor, Batch], Tensor], repeats: int
) -> Line:
    """Compare PromptTuning in a Trainer with a loop whose `loss` is given the prompts `[B, P, H]` of the rows."""
    torch.manual_seed(2)
    module = PromptTuning(backbone.name, prompt_init="random", tasks=TASKS, schedule="constant", lr=1e-3)
    module.backbone, module.prompt = backbone, SoftPrompt(4, LENGTH, backbone.dim, TASKS)
    module._check_choices = lambda: None  # type: ignore[method-assign]  # there are no words
    table = nn.Parameter(module.prompt.prompt_embeddings.detach().clone())
    optimizer = torch.optim.AdamW([table], lr=1e-3, weight_decay=0.0)

    def bare() -> None:
        optimizer.zero_grad()
        loss(table[batch["task_ids"]], batch).backward()
        optimizer.step()

    turns = Turns(batch, bare, repeats + 3)
    L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    ).fit(module, turns)  # fmt: skip
    note = f"prompts after the run: relative difference {difference(module.prompt.prompt_embeddings, table):.0e}"
    ours, theirs = (times[3:] for times in turns.times)
    rows, length = batch["input_ids"].shape
    title = f"{kind} step through the Trainer, {backbone.name}, P={LENGTH} L={length} B={rows}"
    return Line(title, "the bare model in a hand-written loop", 1.05, False, ours, theirs, note)


# -- distillation ---------------------------------------------------------------------------------------------------


def source(backbone: Seq2SeqBackbone | CausalBackbone, distil: bool) -> PromptModule:
    weight = 1.0 if distil else 0.0
    module = MPTSource(backbone.name, tasks=TASKS, prompt_init="random", logits_weight=weight, hidden_weight=weight)
    module.backbone = backbone
    module.prompt = module.build_prompt(backbone)
    if distil:
        module.teacher_prompts = torch.rand(len(TASKS), LENGTH, backbone.dim) - 0.5
    return module.train()


def distillation(repeats: int) -> Iterator[Line]:
    """Compare a step of source training with the same step without teachers."""
    cases = [
        (Seq2SeqBackbone(t5_small(), "t5-small's shape"), make_batch(8, 64, 32128, len(TASKS))),
        (CausalBackbone(small_llama(), "small Llama"), make_batch(32, 32, 8000, len(TASKS))),
    ]
    for backbone, batch in cases:
        modules = [source(backbone, distil) for distil in (True, False)]
        steps = [train_step(m.prompt.parameters(), lambda m=m, b=batch: m.losses(b)["loss"]) for m in modules]
        times = alternate(*steps, repeats, f"distillation, {backbone.name}")
        rows, length = batch["input_ids"].shape
        title = f"MPTSource step with teachers, {backbone.name}, P={LENGTH} L={length} B={rows}, 4 tasks"
        yield Line(title, "the same without (both weights 0)", 1.5, False, *times)


# -- light commands -------------------------------------------------------------------------------------------------


def commands(repeats: int) -> Iterator[Line]:
    """Time the commands that must finish within a second."""
    mpt = Path(sys.executable).with_name("mpt")
    for words in (["--help"], ["tasks"], ["configs"]):
        seconds = []
        for _ in range(min(repeats, 7)):
            begin = time.perf_counter()
            subprocess.run([str(mpt), *words], check=True, capture_output=True)
            seconds.append(time.perf_counter() - begin)
        yield Line(f"mpt {' '.join(words)}", "1 second", 1.0, False, seconds, [1.0] * len(seconds))


PARTS = {"causal": causal, "overhead": overhead, "distillation": distillation, "commands": commands}


if __name__ == "__main__":
    main("Speed", PARTS, RESULTS / "speed.json")
