"""Resuming with other arguments: overridden values are reported, incompatible ones raise."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping

from mpt_lightning import MPTSource, MPTTarget, PromptTuning
from mpt_lightning.cli.main import main
from mpt_lightning.modules import PromptModule
from tests.modules.checks import StopAfter
from tests.modules.conftest import TASKS, AnyData

MakeTrainer = Callable[..., L.Trainer]
STOP, STEPS = 2, 4


class OtherBetas(PromptTuning):
    def configure_optimizers(self) -> Any:
        made = super().configure_optimizers()
        for group in made["optimizer"].param_groups:
            group["betas"] = (0.5, 0.6)
        return made


class Momentum(PromptTuning):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameter_groups(), momentum=0.9)


# `check_stage` compares the names of classes.
OtherBetas.__name__ = Momentum.__name__ = "PromptTuning"


def make(cls: type[PromptModule], folder: str, path: Path, **options: Any) -> PromptModule:
    if cls is MPTTarget:
        return cls(folder, source=str(path / "MPTSource.ckpt"), **options)
    options = {"prompt_length": 4, **options}
    return cls(folder, **({"logits_weight": 0.0, "hidden_weight": 0.0} | options if cls is MPTSource else options))


@pytest.fixture(scope="module")
def saved(model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of checkpoints made after the second of 4 steps."""
    folder = tmp_path_factory.mktemp("saved")
    for cls in (PromptTuning, MPTSource, MPTTarget):
        trainer = L.Trainer(
            accelerator="cpu", max_steps=STEPS, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0, callbacks=[StopAfter(STOP), EarlyStopping("train/loss")],
        )  # fmt: skip
        trainer.fit(make(cls, model_folder("t5"), folder), datamodule=AnyData())
        trainer.save_checkpoint(folder / f"{cls.__name__}.ckpt")
    return folder


@pytest.fixture
def resume(saved: Path, model_folder: Callable[[str], str], trainer: MakeTrainer) -> Callable[..., PromptModule]:
    def run(cls: type[PromptModule], patience: int = 3, data: AnyData | None = None, **options: Any) -> PromptModule:
        steps = options.pop("max_steps", STEPS)
        module = make(cls, model_folder("t5"), saved, **options)
        fit = trainer(max_epochs=-1, max_steps=steps, callbacks=[EarlyStopping("train/loss", patience=patience)])
        fit.fit(module, datamodule=data or AnyData(), ckpt_path=str(saved / f"{cls.__name__}.ckpt"))
        assert fit.global_step == steps
        return module

    return run


COUNTS, OWN = "the checkpoint's counts", "this run's counts"
OVERRIDDEN = [
    (PromptTuning, {"lr": 0.1}, [f"lr: now 0.1, checkpoint 0.3 ({COUNTS})"]),
    (PromptTuning, {"weight_decay": 0.5}, [f"weight_decay: now 0.5, checkpoint 0 ({COUNTS})"]),
    (PromptTuning, {"prompt_init": "random"}, [f"prompt_init: now 'random', checkpoint 'vocabulary' ({COUNTS})"]),
    (PromptTuning, {"patience": 7}, [f"EarlyStopping.patience: now 7, checkpoint 3 ({COUNTS})"]),
    (OtherBetas, {}, [f"the optimizer's betas of the group prompts: now 0.5, 0.6, checkpoint 0.9, 0.999 ({COUNTS})"]),
    (
        MPTSource,
        {"task_lr": 0.7, "shared_lr": 0.8, "warmup_steps": 1, "max_new_tokens": 3},
        [
            f"shared_lr: now 0.8, checkpoint 0.3 ({COUNTS})",
            f"task_lr: now 0.7, checkpoint 0.4 ({COUNTS})",
            f"warmup_steps: now 1, checkpoint 0 ({OWN})",
            f"max_new_tokens: now 3, checkpoint 64 ({OWN})",
            f"learning rate by the schedule at step 2: now 0.2, 0.266667, checkpoint 0.15, 0.2 ({OWN})",
        ],
    ),
    (MPTTarget, {"start": "one"}, [f"start: now 'one', checkpoint 'average' ({COUNTS})"]),
]


@pytest.mark.parametrize(("cls", "options", "lines"), OVERRIDDEN, ids=[str(case[1]) or "betas" for case in OVERRIDDEN])
def test_what_the_checkpoint_overrides_is_reported_once(
    cls: type[PromptModule], options: dict, lines: list[str], resume: Callable[..., PromptModule]
) -> None:
    with pytest.warns(UserWarning, match="Resuming from .* with other arguments") as told:
        resume(cls, **options)
    (message,) = [str(warning.message) for warning in told if "Resuming" in str(warning.message)]
    found = message.partition(" with other arguments: ")[2].removesuffix(".").split("; ")
    assert sorted(found) == sorted(lines)


@pytest.mark.parametrize("cls", [PromptTuning, MPTSource, MPTTarget])
def test_equal_arguments_are_not_reported(
    cls: type[PromptModule], resume: Callable[..., PromptModule], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        resume(cls)
    assert "Restored all states" in caplog.text
    assert "Resuming" not in caplog.text


def test_a_longer_run_has_its_own_schedule(
    resume: Callable[..., PromptModule], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch"):
        module = resume(PromptTuning, max_steps=8)
    assert f"learning rate by the schedule at step 2: now 0.225, checkpoint 0.15 ({OWN})" in caplog.text
    assert module.trainer.lr_scheduler_configs[0].scheduler.get_last_lr() == [0.0]


def test_the_checkpoints_learning_rate_is_used(resume: Callable[..., PromptModule]) -> None:
    expected = resume(PromptTuning).state_dict()
    with pytest.warns(UserWarning, match="lr: now 0.1"):
        found = resume(PromptTuning, lr=0.1).state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (PromptTuning, {"prompt_length": 9}, "prompt_length: now 9, checkpoint 4. Set"),
        (PromptTuning, {"optimizer": "adafactor"}, "optimizer: now 'adafactor', checkpoint 'adamw'. Set"),
        (PromptTuning, {"reparameterization": "mlp"}, "reparameterization: now 'mlp', checkpoint 'none'. Set"),
        (
            MPTSource,
            {"rank": 2, "prompt_length": 5},
            "prompt_length: now 5, checkpoint 4; rank: now 2, checkpoint 1. Set",
        ),
        (Momentum, {}, "optimizer: now 'SGD', checkpoint 'another class'. Set"),
    ],
)
def test_what_cannot_be_resumed_is_refused(
    cls: type[PromptModule], options: dict, message: str, resume: Callable[..., PromptModule]
) -> None:
    with pytest.raises(ValueError, match=r"cannot be resumed with other arguments .*") as told:
        resume(cls, **options)
    assert message in str(told.value)


def test_task_ids_without_names_keep_their_order(
    saved: Path, model_folder: Callable[[str], str], trainer: MakeTrainer
) -> None:
    """The ids are positions in the module's task list, which the checkpoint's list would otherwise replace."""
    path, loader = str(saved / "PromptTuning.ckpt"), AnyData().train_dataloader()
    run = trainer(max_epochs=-1, max_steps=STEPS)
    same, other = (PromptTuning(model_folder("t5"), prompt_length=4, tasks=tasks) for tasks in (TASKS, TASKS[::-1]))
    run.fit(same, loader, loader, ckpt_path=path)
    with pytest.raises(ValueError, match=r"tasks: now \['three', 'two', 'one'\], checkpoint \['one', 'two', 'three'\]"):
        run.fit(other, loader, loader, ckpt_path=path)


def test_the_command_line_reports_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["mpt"])
    words = [
        *("fit", "--config", "baselines/prompt_tuning", "--config", "trainer/cpu", "--data.cache_dir", "cache"),
        *("--data.k_shot", "2", "--data.max_eval_rows", "4", "--trainer.enable_progress_bar", "false"),
        *("--trainer.enable_model_summary", "false", "--model.prompt_length", "4", "--model.warmup_steps", "0"),
        "--trainer.max_steps",
    ]
    main([*words, "1"])
    path = "runs/baselines/prompt_tuning/last.ckpt"
    rate = torch.load(path, weights_only=True)["hyper_parameters"]["lr"]
    with pytest.warns(UserWarning, match=rf"--model.lr: now 0.007, checkpoint {rate:g} \(the checkpoint's counts\)"):
        main([*words, "2", "--model.lr", "0.007", "--ckpt_path", path])
    with pytest.raises(SystemExit):
        main([*words, "2", "--model.prompt_length", "5", "--ckpt_path", "last"])
    assert "--model.prompt_length: now 5, checkpoint 4. Set the checkpoint's values" in capsys.readouterr().err
