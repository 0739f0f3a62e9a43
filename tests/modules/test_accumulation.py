"""An optimizer step has the same gradient for any number of micro-batches; `tests/distributed` tests ranks."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from stages import doubled
from torch.utils.data import DataLoader

from mpt_lightning import CPT, Adapters, DePT, FineTuning, MPTSource, MPTTarget, PEFTModule, PrefixTuning, PromptTuning
from mpt_lightning.modules import PromptModule
from mpt_lightning.objectives import IGNORE, token_cross_entropy
from tests.conftest import make_batch
from tests.modules.conftest import TASKS, AnyData

Build = Callable[..., PromptModule]
ADALORA = {"peft_type": "ADALORA", "init_r": 4, "target_r": 2, "tinit": 0, "tfinal": 1, "deltaT": 1}
# Seven rows; their labels have 3, 2, 1, 3, 2, 1 and 3 tokens, their inputs 7, 6, 5, 4, 7, 6 and 5.
WHOLE = {"size": 6, "accumulate_grad_batches": 1}
PARTS = {"size": 2, "accumulate_grad_batches": 3}  # the second step has one micro-batch, since the epoch ends


class Ragged(AnyData):
    """Rows with inputs and labels of unequal length, and a context for CPT."""

    def __init__(self, size: int, tasks: list[str] = TASKS, unlabelled: int = 0) -> None:
        super().__init__(tasks, size)
        batch = make_batch(rows=7, tasks=len(tasks))
        batch["labels"][:unlabelled] = IGNORE
        self.rows = [{name: value[row] for name, value in batch.items()} for row in range(7)]
        self.context = SimpleNamespace(token_ids=[5, 6, 7, 8, 9, 2, 3], token_types=[1, 2, 4, 0, 5, 6, 8])

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.batch_size)


class Steps(L.Callback):
    """Stores the gradients of every step, as the first callback that can read them gets them, and the logged values."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.logged: list[dict[str, float]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
        self.gradients.append({name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None})

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if len(self.logged) < trainer.global_step:
            self.logged.append({name: value.item() for name, value in trainer.callback_metrics.items()})


@pytest.fixture(scope="module")
def build(model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a function that builds a module by name, after training the stages that it needs."""
    folder, t5, gpt2 = tmp_path_factory.mktemp("stages"), model_folder("t5"), model_folder("gpt2")
    cache = str(folder / "cache")
    distilled = {"prompt_length": 4, "hidden_positions": "all", "hidden_layers": "all", "shared_lr": 0.01}

    def saved(name: str, module: Callable[[], PromptModule]) -> str:
        path = folder / f"{name}.ckpt"
        if not path.exists():
            fit(module(), folder, **WHOLE)[1].save_checkpoint(path)
        return str(path)

    def teachers(model: str) -> str:
        return saved(Path(model).name, lambda: PromptTuning(model, prompt_length=4, lr=3.0))

    def source() -> str:
        return saved("source", lambda: MPTSource(t5, teachers(t5), **distilled))

    modules: dict[str, Callable[..., PromptModule]] = {
        "prompt tuning": lambda **o: PromptTuning(t5, prompt_length=4, **o),
        "prompt tuning, causal": lambda **o: PromptTuning(gpt2, prompt_length=4, **o),
        "residual": lambda **o: PromptTuning(
            gpt2, prompt_length=4, reparameterization="residual", network_width=4, **o
        ),
        "mlp": lambda **o: PromptTuning(gpt2, prompt_length=4, reparameterization="mlp", network_width=4, **o),
        "lstm": lambda **o: PromptTuning(gpt2, prompt_length=4, reparameterization="lstm", network_width=4, **o),
        "superposition": lambda **o: PromptTuning(gpt2, prompt_length=4, reparameterization="superposition", **o),
        "source": lambda **o: MPTSource(t5, teachers(t5), **(distilled | o)),
        "source, causal": lambda **o: MPTSource(gpt2, teachers(gpt2), **(distilled | o)),
        "source, cached": lambda **o: MPTSource(gpt2, teachers(gpt2), **(distilled | o | {"teacher_cache": cache})),
        "source, every second step": lambda **o: MPTSource(gpt2, teachers(gpt2), teacher_every=2, **(distilled | o)),
        "target": lambda **o: MPTTarget(t5, source(), **o),
        "cpt, paper": lambda **o: CPT(gpt2, lr=0.01, decay=0.5, epsilon=1.0, **o),
        "cpt, weights": lambda **o: CPT(gpt2, lr=0.01, decay=0.5, epsilon=1.0, normalize="weights", **o),
        "cpt, no context loss": lambda **o: CPT(gpt2, lr=0.01, context_loss=False, **o),
        "lora": lambda **o: PEFTModule(t5, {"peft_type": "LORA", "r": 2}, **o),
        "adalora": lambda **o: PEFTModule(t5, ADALORA, **o),
        "finetuning": lambda **o: FineTuning(t5, **o),
        "adapters": lambda **o: Adapters(gpt2, size=4, **o),
        "dept": lambda **o: DePT(t5, prompt_length=4, rank=2, **o),
        "prefix": lambda **o: PrefixTuning(gpt2, prompt_length=4, **o),
    }
    # With a learning rate near 0, both steps have the gradients of the initial weights, up to rounding.
    slow: dict[str, Any] = {"schedule": "constant", "warmup_steps": 10**9}
    return lambda name, **options: modules[name](**(slow | options))


def fit(
    module: PromptModule, folder: Path, size: int, unlabelled: int = 0, precise: bool = True, **options: Any
) -> tuple[Steps, L.Trainer]:
    """Train for an epoch of two steps, of six rows and of one; the first `unlabelled` rows have no label tokens."""
    tasks = ["one"] if isinstance(module, CPT) else TASKS
    found = Steps()
    L.seed_everything(0)
    run = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, callbacks=[found], default_root_dir=str(folder), **options,
    )  # fmt: skip
    run.fit(doubled(module) if precise else module, datamodule=Ragged(size, tasks, unlabelled))
    return found, run


def assert_equal(one: Steps, other: Steps) -> None:
    """Assert that the gradients of every step and the logged loss terms are equal."""
    assert len(one.gradients) == len(other.gradients) == len(one.logged) == len(other.logged) == 2
    for first, second in zip(one.gradients, other.gradients, strict=True):
        assert first.keys() == second.keys()
        assert any(value.norm() > 0 for value in first.values())
        for name, value in first.items():
            assert (second[name] - value).norm() <= 1e-6 * value.norm() + 1e-12, name
    for logged, others in zip(one.logged, other.logged, strict=True):
        logged.pop("train/row", None)  # a mean over other tokens than CPT's loss
        others.pop("train/row", None)
        assert logged == pytest.approx(others, rel=1e-6)
        assert "train/loss" in logged


METHODS = [
    "prompt tuning", "prompt tuning, causal", "residual", "mlp", "lstm", "superposition", "source", "source, causal",
    "source, cached", "source, every second step", "target", "cpt, paper", "cpt, weights", "cpt, no context loss",
    "lora", "adalora", "finetuning", "adapters", "dept", "prefix",
]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_are_one_batch(method: str, build: Build, tmp_path: Path) -> None:
    assert_equal(*(fit(build(method), tmp_path, **options)[0] for options in (WHOLE, PARTS)))


def test_rows_without_label_tokens_have_no_weight(build: Build, tmp_path: Path) -> None:
    # The first micro-batch, of two rows, has no label tokens.
    assert_equal(*(fit(build("prompt tuning"), tmp_path, unlabelled=2, **options)[0] for options in (WHOLE, PARTS)))


@pytest.mark.parametrize("options", [WHOLE, PARTS], ids=["whole", "parts"])
def test_a_step_without_label_tokens_is_an_error(options: dict[str, int], build: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not finite at step 0, .*\(no row of the step has a label token\)"):
        fit(build("prompt tuning"), tmp_path, unlabelled=6, **options)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_step_of_one_batch_is_the_plain_mean(precision: str, build: Build, tmp_path: Path) -> None:
    """Bit for bit: weights of one do not change the mean."""
    module = build("prompt tuning, causal")
    found, _ = fit(module, tmp_path, precise=False, precision=precision, **WHOLE)
    batch = next(iter(Ragged(6).train_dataloader()))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        loss = token_cross_entropy(module(batch), batch["labels"])
    assert found.logged[0]["train/loss"] == loss.item()
    (gradient,) = torch.autograd.grad(loss, list(module.prompt.parameters()))
    assert torch.equal(found.gradients[0]["prompt.prompt_embeddings"], gradient)
