"""Training equals a hand-written loop, changes only the prompt, and resumes exactly."""

import copy
from collections.abc import Callable

import lightning.pytorch as L
import pytest
import torch
from transformers import get_scheduler

from mpt_lightning import MPTSource, MPTTarget, PromptTuning, SoftPrompt, load_backbone
from mpt_lightning.modules import PromptModule
from mpt_lightning.modules.distillation import Distillation
from mpt_lightning.objectives import token_cross_entropy
from tests.modules.checks import StopAfter
from tests.modules.conftest import TASKS, AnyData

Folder = Callable[[str], str]
MakeTrainer = Callable[..., L.Trainer]


def fit(module: PromptModule, data: AnyData, trainer: L.Trainer, **options) -> dict[str, torch.Tensor]:
    trainer.fit(module, datamodule=data, **options)
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def saved(module: PromptModule, data: AnyData, trainer: L.Trainer, path) -> str:
    fit(module, data, trainer)
    trainer.save_checkpoint(path)
    return str(path)


@pytest.fixture
def teachers(model_folder: Folder, data: AnyData, trainer: MakeTrainer, tmp_path) -> Callable[[str], str]:
    def make(kind: str) -> str:
        L.seed_everything(1)
        module = PromptTuning(model_folder(kind), prompt_length=4)
        return saved(module, data, trainer(max_epochs=3), tmp_path / f"teachers-{kind}.ckpt")

    return make


@pytest.fixture
def source(model_folder: Folder, data: AnyData, trainer: MakeTrainer, tmp_path, teachers) -> Callable[[str], str]:
    def make(kind: str) -> str:
        L.seed_everything(2)
        module = MPTSource(model_folder(kind), teachers=teachers(kind), prompt_length=4)
        return saved(module, data, trainer(), tmp_path / f"source-{kind}.ckpt")

    return make


@pytest.mark.parametrize("kind", ["t5", "gpt2", "llama"])
def test_prompt_tuning_equals_a_hand_written_loop(
    kind: str, model_folder: Folder, data: AnyData, trainer: MakeTrainer
) -> None:
    module = PromptTuning(model_folder(kind), prompt_length=4, lr=0.1, warmup_steps=2, weight_decay=0.01, tasks=TASKS)
    backbone = load_backbone(model_folder(kind))
    module.prompt = SoftPrompt(3, 4, backbone.dim, TASKS)
    prompt = copy.deepcopy(module.prompt)
    trained = fit(module, data, trainer(max_epochs=2))["prompt.prompt_embeddings"]

    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.1, weight_decay=0.01)
    schedule = get_scheduler("linear", optimizer, 2, 6)
    for _ in range(2):
        for rows in data.train_dataloader():
            logits = backbone(
                prompt.prompt_embeddings, rows["task_ids"], rows["input_ids"], rows["attention_mask"], rows["labels"]
            ).logits
            optimizer.zero_grad()
            token_cross_entropy(logits, rows["labels"]).backward()
            optimizer.step()
            schedule.step()
    torch.testing.assert_close(trained, prompt.prompt_embeddings.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_only_the_prompt_is_trained_and_all_of_it(
    kind: str, model_folder: Folder, data: AnyData, trainer: MakeTrainer, teachers
) -> None:
    module = MPTSource(model_folder(kind), teachers=teachers(kind), prompt_length=4, rank=2)
    trainer(max_steps=1).fit(module, datamodule=data)
    backbone = {name: value.clone() for name, value in module.backbone.model.state_dict().items()}
    before = {name: value.detach().clone() for name, value in module.prompt.named_parameters()}
    trainer(max_epochs=1).fit(module, datamodule=data)
    after = module.backbone.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in backbone.items())
    for name, value in module.prompt.named_parameters():
        assert not torch.equal(value, before[name]), f"{name} did not change"


@pytest.mark.parametrize("stage", ["prompt_tuning", "source", "target"])
def test_resuming_at_an_epochs_end_is_exact_with_any_data(
    stage: str, model_folder: Folder, data: AnyData, trainer: MakeTrainer, teachers, source, tmp_path
) -> None:
    hand_over = {"source": teachers, "target": source}
    path = hand_over[stage]("t5") if stage in hand_over else None

    def module() -> PromptModule:
        L.seed_everything(3)
        if stage == "source":
            return MPTSource(model_folder("t5"), teachers=path, prompt_length=4, optimizer="adafactor")
        if stage == "target":
            return MPTTarget(model_folder("t5"), source=path)
        return PromptTuning(model_folder("t5"), prompt_length=4, warmup_steps=2)

    whole = fit(module(), data, trainer(max_epochs=2))
    # The schedule depends on the run's length, so the first part has the same `max_epochs` and is stopped.
    half = trainer(max_epochs=2, callbacks=[StopAfter(3)])
    fit(module(), data, half)
    assert half.global_step == 3
    half.save_checkpoint(tmp_path / "half.ckpt")
    L.seed_everything(99)
    resumed = fit(module(), data, trainer(max_epochs=2), ckpt_path=str(tmp_path / "half.ckpt"))
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def test_distillation_moves_the_student_towards_the_teachers(
    model_folder: Folder, data: AnyData, trainer: MakeTrainer, teachers
) -> None:
    path = teachers("t5")

    def terms(weight: float) -> dict[str, float]:
        L.seed_everything(0)
        run = trainer(max_epochs=12)
        module = MPTSource(
            model_folder("t5"),
            path,
            prompt_length=4,
            logits_weight=weight,
            hidden_weight=weight,
            shared_lr=0.05,
            task_lr=0.01,
        )
        run.fit(module, datamodule=data)
        module.distils, module.distillation = True, Distillation(logits_weight=1.0, hidden_weight=1.0)
        if module.teacher_prompts is None:
            module.teacher_prompts = torch.stack([t.prompt().fold(n) for n, t in module._read_teachers().items()])
        batch = next(iter(data.train_dataloader()))
        return {name: value.item() for name, value in module.losses(batch).items()}

    without, with_teachers = terms(0.0), terms(5.0)
    assert with_teachers["logits_loss"] < without["logits_loss"]
    assert with_teachers["hidden_loss"] < without["hidden_loss"]


def test_a_student_equal_to_its_teacher_has_no_distillation_loss(
    model_folder: Folder, data: AnyData, trainer: MakeTrainer, teachers
) -> None:
    module = MPTSource(model_folder("llama"), teachers("llama"), prompt_length=4, hidden_positions="all")
    run = trainer(max_steps=1)
    run.fit(module, datamodule=data)
    module.prompt = PromptTuning.load_from_checkpoint(module.hparams["teachers"]).prompt
    terms = module.losses(next(iter(data.train_dataloader())))
    assert terms["logits_loss"].item() == pytest.approx(0, abs=1e-6)
    assert terms["hidden_loss"].item() == 0
    torch.testing.assert_close(terms["loss"], terms["task_loss"], rtol=0, atol=1e-6)


def test_targets_start_where_the_source_ended(
    model_folder: Folder, data: AnyData, trainer: MakeTrainer, source
) -> None:
    path = source("t5")
    trained = MPTSource.load_from_checkpoint(path).prompt
    module = MPTTarget(model_folder("t5"), source=path, shared_lr=0.0, task_lr=0.0)
    fit(module, AnyData(["x", "y"]), trainer(max_steps=1))
    assert module.tasks == ["x", "y"]
    cols, rows = trained.prefix_task_cols.mean(0), trained.prefix_task_rows.mean(0)
    torch.testing.assert_close(module.prompt.fold("y"), (trained.prompt_embeddings * (cols @ rows)).detach())


def test_two_learning_rates(model_folder: Folder, data: AnyData, trainer: MakeTrainer, teachers) -> None:
    module = MPTSource(model_folder("t5"), teachers("t5"), prompt_length=4, shared_lr=0.01, task_lr=0.02)
    run = trainer(max_steps=1)
    run.fit(module, datamodule=data)
    groups = {group["name"]: group for group in run.optimizers[0].param_groups}
    assert groups["shared"]["initial_lr"] == 0.01
    assert groups["task"]["initial_lr"] == 0.02
    assert [p.shape for p in groups["shared"]["params"]] == [(4, 32)]
    assert [tuple(p.shape) for p in groups["task"]["params"]] == [(3, 4, 1), (3, 1, 32)]


@pytest.mark.parametrize("schedule", ["linear", "constant", "cosine"])
@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_every_optimizer_and_schedule_lowers_the_loss(
    optimizer: str, schedule: str, model_folder: Folder, data: AnyData, trainer: MakeTrainer
) -> None:
    losses = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: dict, *_: object) -> None:
            losses.append(float(outputs["loss"]))

    L.seed_everything(0)
    module = PromptTuning(
        model_folder("llama"), prompt_length=4, lr=0.3, optimizer=optimizer, schedule=schedule, warmup_steps=2
    )
    fit(module, data, trainer(max_epochs=15, callbacks=[Record()]))
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_a_non_finite_loss_raises_and_names_the_step(model_folder: Folder, data: AnyData, trainer: MakeTrainer) -> None:
    class Spoil(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: AnyData, *_: object) -> None:
            if trainer.global_step == 1:
                torch.nn.init.constant_(next(module.prompt.parameters()), torch.nan)

    module = PromptTuning(model_folder("t5"), prompt_length=4)
    message = r"loss is not finite at step 1, batch 1 \(loss nan\)\. Rows: three 0, 3, 6; one .*Lower the learning rate"
    with pytest.raises(ValueError, match=message):
        fit(module, data, trainer(callbacks=[Spoil()]))


def test_validation_logs_a_loss_per_task_in_eval_mode(
    model_folder: Folder, data: AnyData, trainer: MakeTrainer
) -> None:
    module = PromptTuning(model_folder("t5"), prompt_length=4)
    run = trainer(limit_val_batches=1.0)
    run.fit(module, datamodule=data)
    assert {f"val/{task}/loss" for task in TASKS} | {"val/loss"} == {
        name for name in run.callback_metrics if name.startswith("val/")
    }
    assert not module.backbone.model.training
    # The mean over the label tokens of one task's rows, over the full batches and the last, partial one.
    rows = [row for row in data.train_dataloader().dataset if int(row["task_ids"]) == 1]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    expected = token_cross_entropy(module(batch), batch["labels"])
    torch.testing.assert_close(run.callback_metrics["val/two/loss"], expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["residual", "mlp", "lstm", "superposition"])
def test_reparameterized_prompts_train_and_resume_exactly(
    kind: str, model_folder: Folder, data: AnyData, trainer: MakeTrainer, tmp_path
) -> None:
    def make() -> PromptTuning:
        L.seed_everything(0)
        return PromptTuning(
            model_folder("llama"), prompt_length=4, reparameterization=kind, network_width=6, lr=0.01,
            schedule="constant",
        )  # fmt: skip

    whole = fit(make(), data, trainer(max_epochs=3))
    first = trainer(max_epochs=1)
    start = fit(make(), data, first)
    assert any(not torch.equal(start[name], value) for name, value in whole.items())
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = fit(make(), data, trainer(max_epochs=3), ckpt_path=str(tmp_path / "first.ckpt"))
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    loaded = PromptTuning.load_from_checkpoint(tmp_path / "first.ckpt")
    assert {name: tuple(value.shape) for name, value in loaded.state_dict().items()} == {
        name: tuple(value.shape) for name, value in whole.items()
    }
    # As teachers and as initial prompts they equal their folded prompts.
    student = PromptTuning(
        model_folder("llama"), prompt_length=4, prompt_init="checkpoint", init_checkpoint=str(tmp_path / "first.ckpt"),
        lr=0.0,
    )  # fmt: skip
    fit(student, data, trainer(max_steps=1))
    torch.testing.assert_close(student.prompt.fold("two"), loaded.prompt.fold("two"))
