"""CPT compared with PEFT's CPT: a training step, evaluation, and their cost above that of a bare model.

    python benchmarks/cpt.py [--threads 2] [--repeats 15] [--only step floor evaluation]

Both sides alternate (A, B, B, A, ...) in one process; the table shows the median of the rounds' ratios. A small Llama
with random weights, CPU, fp32. The context consists of examples of 20 tokens, one of them the label; rows have L
tokens, no padding, and one label token to predict. Both sides start from the same perturbation.

- **step**: forward, backward, AdamW and the projection (PEFT's is in its next forward pass). Decay 0.95.
- **floor**: our whole step against forward and backward of the bare transformers model with frozen weights, gradients
  to the input embeddings, over P + B·L tokens, with logits and cross-entropy at the step's label positions only.
  No optimizer, no projection, no mask, no cache. There are two variants. "One sequence": all tokens in one causal
  sequence `[1, P + B·L]`, so that, as in a step, later tokens attend to the context; they also attend to earlier rows.
  "Apart": the context `[1, P]` and the rows `[B, L]` in two passes. Rows do not attend to the context, which saves
  B·L·P pairs of attention. An exact CPT step cannot be as fast, so this variant has no goal.
- **evaluation**: two one-token answers are ranked for 256 rows, 32 at a time; at most 5 rounds. This package computes
  the context's keys and values once, within the measured time. PEFT's forward pass repeats the context in every row and
  computes logits at all positions. Rows have L=40 tokens, or L=18, the length of the context's examples.

Peak memory is the growth of the resident set in two steps in a new process, beyond the loaded model (Linux).
"""

import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import peft
import torch
from measure import RESULTS, Line, Step, alternate, difference, main, small_llama, train_step
from peft import CPTConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from mpt_lightning import CPT, ContextPrompt
from mpt_lightning.backbones import CausalBackbone

VOCABULARY, WIDTH, POSITIONS = 8000, 288, 2048
EXAMPLE = [1, 1, *[2] * 14, 3, 3, 4, 0]  # the token types of the first example: 20 tokens
EPSILON, TEMPLATE_EPSILON, DECAY = 0.2, 0.1, 0.95
EVAL_BATCH = 32
PEFT = f"PEFT {peft.__version__} CPT"


@dataclass(frozen=True)
class Shape:
    """P, B and L, and the goal of the speed-up over PEFT."""

    context: int
    rows: int
    length: int = 40
    goal: float | None = None

    def __str__(self) -> str:
        return f"P={self.context} B={self.rows} L={self.length}"


@dataclass
class Run:
    """One side of a comparison: the timed step, and values that must agree on both sides.

    Attributes:
        step: The timed step.
        result: The loss of a training step with its graph, or the scores of an evaluation.
        delta: The perturbation `[P, H]`.
    """

    step: Step
    result: Callable[[], Tensor]
    delta: Tensor


STEPS = [Shape(800, 16, goal=12.0), Shape(400, 8, goal=5.0), Shape(200, 4, goal=3.0)]
# Rows as long as in training, and as long as the context's examples without label and separator.
EVALUATIONS = [Shape(400, 256, goal=20.0), Shape(400, 256, len(EXAMPLE) - 2, goal=20.0)]


def context_of(shape: Shape) -> tuple[list[int], list[int]]:
    """Return the context's token ids and token types."""
    types = [kind and kind + 4 * k for k in range(shape.context // len(EXAMPLE)) for kind in EXAMPLE]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (len(types),), generator=generator).tolist(), types


def rows_of(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return rows `[B, L]` and one label token per row `[B, 1]`."""
    generator = torch.Generator().manual_seed(2)
    whole = torch.randint(3, VOCABULARY, (shape.rows, shape.length + 1), generator=generator)
    return whole[:, :-1], whole[:, -1:]


def start(shape: Shape) -> Tensor:
    """Return the initial perturbation `[P, H]` of both sides; it is within the balls."""
    return torch.randn(shape.context, WIDTH, generator=torch.Generator().manual_seed(3)) * 1e-3


# -- CPT of this package -------------------------------------------------------------------------------------------


def our_module(shape: Shape) -> CPT:
    module = CPT("small Llama", tasks=["task"], epsilon=EPSILON, template_epsilon=TEMPLATE_EPSILON, decay=DECAY)
    prompt = ContextPrompt(*context_of(shape), WIDTH, epsilon=EPSILON, template_epsilon=TEMPLATE_EPSILON)
    module.backbone, module.prompt = CausalBackbone(small_llama(POSITIONS), "small Llama"), prompt
    prompt.attach(module.backbone.embeddings)
    with torch.no_grad():
        prompt.delta_embedding.copy_(start(shape) * prompt.moves)
    return module.train()


def our_training(shape: Shape) -> Run:
    module, (inputs, labels) = our_module(shape), rows_of(shape)
    batch = {
        "input_ids": inputs,
        "attention_mask": torch.ones_like(inputs),
        "labels": labels,
        "task_ids": torch.zeros(shape.rows, dtype=torch.long),
    }

    def loss() -> Tensor:
        return module.losses(batch)["loss"]

    prompt = module.prompt
    return Run(train_step(prompt.parameters(), loss, then=prompt.project), loss, prompt.delta_embedding)


def our_evaluation(shape: Shape) -> Run:
    module, (inputs, labels) = our_module(shape).eval(), rows_of(shape)
    task = torch.zeros(EVAL_BATCH, dtype=torch.long)

    pairs = list(zip(inputs.split(EVAL_BATCH), choices_of(labels)[:, :, None].split(EVAL_BATCH), strict=True))

    @torch.inference_mode()
    def scores() -> Tensor:
        context = module.backbone.encode_prompts(module.prompt(task[:1]))
        return torch.cat([module.backbone.score(context, task, ids, torch.ones_like(ids), of) for ids, of in pairs])

    return Run(scores, scores, module.prompt.delta_embedding)


def choices_of(labels: Tensor) -> Tensor:
    """Return two one-token answers per row `[B, 2]`: the label and the next token id."""
    return torch.cat([labels, (labels + 1) % VOCABULARY], dim=1)


# -- PEFT's --------------------------------------------------------------------------------------------------------


def peft_model(shape: Shape) -> tuple[PeftModel, nn.Parameter]:
    ids, types = context_of(shape)
    config = CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=ids, cpt_tokens_type_mask=types, cpt_mask=[1] * len(ids),
        opt_weighted_loss_type="decay", opt_loss_decay_factor=DECAY,
        opt_projection_epsilon=EPSILON, opt_projection_format_epsilon=TEMPLATE_EPSILON,
    )  # fmt: skip
    model = get_peft_model(small_llama(POSITIONS), config).eval()
    delta = model.prompt_encoder["default"].delta_embedding.weight
    with torch.no_grad():
        moves = torch.tensor([kind % 4 > 0 for kind in types])
        delta.copy_(start(shape) * moves[:, None])
    return model, delta


def peft_training(shape: Shape) -> Run:
    (model, delta), (inputs, labels) = peft_model(shape), rows_of(shape)
    ids = torch.cat([inputs, labels], dim=1)
    mask = torch.ones_like(ids)
    types = torch.cat([torch.full_like(inputs, 2), torch.full_like(labels, 4)], dim=1)

    def loss() -> Tensor:
        # The types are copied because PEFT changes them in place.
        return model(input_ids=ids, attention_mask=mask, labels=ids, input_type_mask=types.clone()).loss

    return Run(train_step([delta], loss), loss, delta)


def peft_evaluation(shape: Shape) -> Run:
    (model, delta), (inputs, labels) = peft_model(shape), rows_of(shape)

    pairs = list(zip(inputs.split(EVAL_BATCH), choices_of(labels).split(EVAL_BATCH), strict=True))

    @torch.inference_mode()
    def scores() -> Tensor:
        logits = [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1] for ids, _ in pairs]
        return torch.cat([last.log_softmax(1).gather(1, of) for last, (_, of) in zip(logits, pairs, strict=True)])

    return Run(scores, scores, delta)


# -- the bare model ------------------------------------------------------------------------------------------------


def floor(shape: Shape, apart: bool) -> Run:
    model, (inputs, labels) = small_llama(POSITIONS).requires_grad_(False), rows_of(shape)
    ids, types = (torch.tensor(values) for values in context_of(shape))
    is_label = (types > 0) & (types % 4 == 0)
    # The positions that predict a label, in the context and at the end of each row.
    of_context = is_label.nonzero()[:, 0] - 1
    of_rows = shape.context + shape.length * torch.arange(1, shape.rows + 1) - 1
    passes = (
        [(ids[None], of_context, ids[is_label]), (inputs, 1, labels[:, 0])]
        if apart
        else [(torch.cat([ids, inputs.flatten()])[None], torch.cat([of_context, of_rows]),
               torch.cat([ids[is_label], labels[:, 0]]))]
    )  # fmt: skip
    table = model.get_input_embeddings()
    embedded = [(table(tokens).requires_grad_(), keep, wanted) for tokens, keep, wanted in passes]

    def loss() -> Tensor:
        return sum(
            functional.cross_entropy(
                model(inputs_embeds=embeds, use_cache=False, logits_to_keep=keep).logits.flatten(0, 1), wanted
            )
            for embeds, keep, wanted in embedded
        )

    def step() -> None:
        for embeds, *_ in embedded:
            embeds.grad = None
        loss().backward()

    return Run(step, loss, embedded[0][0])


# -- peak memory ---------------------------------------------------------------------------------------------------


def resident(what: str) -> float:
    """Return this process's memory in MiB: VmRSS is the current size, VmHWM the maximum since the last reset."""
    return int(re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def growth(build: Callable[[Shape], Run], shape: Shape, threads: int) -> float:
    """Return the growth of this process's memory in two steps, in MiB."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    step = build(shape).step
    # Not ru_maxrss, which a new process inherits from its parent.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    step()
    step()
    return resident("VmHWM") - before


def peak_memory(shape: Shape, *builds: Callable[[Shape], Run]) -> tuple[float, ...]:
    """Return the memory growth of each side in MiB, each measured in a new process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        jobs = [pool.submit(growth, build, shape, torch.get_num_threads()) for build in builds]
        return tuple(job.result() for job in jobs)


# -- parts of the benchmark -----------------------------------------------------------------------------------------


def steps(repeats: int) -> Iterator[Line]:
    """Compare a training step with PEFT's, which runs the context again for every row."""
    for shape in STEPS:
        memory = peak_memory(shape, our_training, peft_training)
        ours, theirs = our_training(shape), peft_training(shape)
        losses = ours.result(), theirs.result()
        for loss in losses:
            loss.backward()
        of_loss = difference(*(loss.detach() for loss in losses))
        note = f"relative difference: loss {of_loss:.0e}, gradient {difference(ours.delta.grad, theirs.delta.grad):.0e}"
        times = alternate(ours.step, theirs.step, repeats, f"step, {shape}")
        yield Line(f"CPT step, {shape}", PEFT, shape.goal, True, *times, note, memory)


def floors(repeats: int) -> Iterator[Line]:
    """Compare a training step with forward and backward of the bare model over as many tokens."""
    for shape in STEPS:
        for name, goal in (("one sequence", 1.15), ("apart", None)):
            build = partial(floor, apart=name == "apart")
            memory = peak_memory(shape, our_training, build)
            times = alternate(our_training(shape).step, build(shape).step, repeats, f"floor, {name}, {shape}")
            yield Line(f"CPT step, {shape}", f"bare model, {name}", goal, False, *times, memory=memory)


def evaluation(repeats: int) -> Iterator[Line]:
    """Compare ranking two answers for 256 rows with PEFT's forward passes."""
    for shape in EVALUATIONS:
        memory = peak_memory(shape, our_evaluation, peft_evaluation)
        ours, theirs = our_evaluation(shape), peft_evaluation(shape)
        scores = ours.result(), theirs.result()
        same = int((scores[0].argmax(dim=1) == scores[1].argmax(dim=1)).sum())
        note = f"relative difference of scores {difference(*scores):.0e}, same answer in {same} of {shape.rows} rows"
        title = f"evaluation of {shape.rows} rows, P={shape.context} L={shape.length}"
        # A PEFT round takes half a minute on one thread.
        times = alternate(ours.step, theirs.step, min(repeats, 5), title)
        yield Line(title, PEFT, shape.goal, True, *times, note, memory)


PARTS = {"step": steps, "floor": floors, "evaluation": evaluation}

if __name__ == "__main__":
    main("CPT", PARTS, RESULTS / "cpt.json")
