"""The content of checkpoints, and errors for those that cannot be loaded."""

import re
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader

from mpt_lightning import MPTSource, MPTTarget, MultitaskDataModule, PromptTuning, TaskDataModule, load_task
from mpt_lightning.checkpoint import KEY, read_checkpoint
from tests.conftest import build_model, build_tokenizer
from tests.modules.conftest import TASKS, AnyData

MakeTrainer = Callable[..., L.Trainer]
EXPECTED = {
    "PromptTuning": {"prompt.prompt_embeddings": (3, 4, 32)},
    "MPTSource": {
        "prompt.prompt_embeddings": (4, 32),
        "prompt.prefix_task_cols": (3, 4, 1),
        "prompt.prefix_task_rows": (3, 1, 32),
    },
    "MPTTarget": {
        "prompt.prompt_embeddings": (4, 32),
        "prompt.prefix_task_cols": (1, 4, 1),
        "prompt.prefix_task_rows": (1, 1, 32),
    },
}


@pytest.fixture(scope="module")
def chain(model_folder: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the path of a checkpoint of each stage."""
    folder, backbone = tmp_path_factory.mktemp("chain"), model_folder("t5")
    paths: dict[str, str] = {}
    for name in EXPECTED:
        if name == "PromptTuning":
            module, data = PromptTuning(backbone, prompt_length=4), AnyData()
        elif name == "MPTSource":
            module, data = MPTSource(backbone, teachers=paths["PromptTuning"], prompt_length=4), AnyData()
        else:
            module, data = MPTTarget(backbone, source=paths["MPTSource"]), AnyData(["new"])
        trainer = L.Trainer(
            accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        paths[name] = str(folder / f"{name}.ckpt")
        trainer.save_checkpoint(paths[name])
    return paths


@pytest.mark.parametrize("name", EXPECTED)
def test_a_checkpoint_contains_trained_tensors_and_a_description(name: str, chain: dict[str, str]) -> None:
    content = torch.load(chain[name], weights_only=True)
    assert {key: tuple(value.shape) for key, value in content["state_dict"].items()} == EXPECTED[name]
    assert not [path for path in content["state_dict"]._metadata if "backbone" in path]
    found = content[KEY]
    assert found["stage"] == name
    assert found["prompt_config"]["tasks"] == (["new"] if name == "MPTTarget" else TASKS)
    assert found["prompt_config"]["length"] == 4
    assert re.fullmatch("[0-9a-f]{12}-[0-9a-f]{12}", found["fingerprint"])
    assert Path(chain[name]).stat().st_size < 32_000


@pytest.mark.parametrize("cls", [PromptTuning, MPTSource, MPTTarget])
def test_loading_needs_neither_teachers_nor_source(cls: type, chain: dict[str, str], tmp_path: Path) -> None:
    alone = tmp_path / "alone.ckpt"
    content = torch.load(chain[cls.__name__], weights_only=True)
    for argument in ("teachers", "source"):
        if argument in content["hyper_parameters"]:
            content["hyper_parameters"][argument] = "/gone.ckpt"
    torch.save(content, alone)
    module = cls.load_from_checkpoint(str(alone))
    for name, value in content["state_dict"].items():
        assert torch.equal(module.state_dict()[name], value)
    assert module.tasks == content[KEY]["prompt_config"]["tasks"]
    logits = module(next(iter(AnyData(module.tasks).train_dataloader())))
    assert torch.isfinite(logits).all()


def damaged(path: str, folder: Path, change: Callable[[dict], None]) -> str:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, folder / "damaged.ckpt")
    return str(folder / "damaged.ckpt")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_file_raises(keep: float, chain: dict[str, str], tmp_path: Path) -> None:
    whole = Path(chain["MPTSource"]).read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(whole[: int(keep if keep >= 1 else keep * len(whole))])
    for attempt in (lambda: MPTSource.load_from_checkpoint(str(cut)), lambda: read_checkpoint(str(cut))):
        with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read: the file .* is cut off or damaged"):
            attempt()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop(KEY), "is not a checkpoint of mpt_lightning"),
        (lambda c: c[KEY].update(format=99), "has the checkpoint format 99; this version reads 1"),
        (lambda c: c["state_dict"].pop("prompt.prefix_task_cols"), "missing: prompt.prefix_task_cols"),
        (lambda c: c["state_dict"].update(other=torch.ones(1)), "not expected: other"),
        (
            lambda c: c["state_dict"].update({"prompt.prompt_embeddings": torch.ones(5, 32)}),
            r"prompt.prompt_embeddings: \[5, 32\] instead of \[4, 32\]",
        ),
    ],
    ids=["foreign", "later format", "missing tensor", "extra tensor", "other shape"],
)
def test_wrong_content_raises(
    change: Callable[[dict], None], message: str, chain: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        MPTSource.load_from_checkpoint(damaged(chain["MPTSource"], tmp_path, change))


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return (open, (str(tmp_path / "sprung"), "w"))

    torch.save({KEY: {}, "state_dict": {}, "trap": Trap()}, tmp_path / "trap.ckpt")
    with pytest.raises(ValueError, match="contains more than tensors and plain values"):
        read_checkpoint(str(tmp_path / "trap.ckpt"))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("resumed", "by", "hint"),
    [
        ("MPTSource", MPTTarget, "use --model.source"),
        ("PromptTuning", MPTSource, "use --model.teachers"),
        ("MPTTarget", PromptTuning, "only takes a checkpoint of the same class"),
    ],
)
def test_another_class_is_refused_with_the_right_argument(
    resumed: str, by: type, hint: str, chain: dict[str, str], trainer: MakeTrainer
) -> None:
    backbone = PromptTuning.load_from_checkpoint(chain["PromptTuning"]).hparams["backbone"]
    arguments = {
        MPTTarget: {"source": chain["MPTSource"]},
        MPTSource: {"teachers": chain["PromptTuning"], "prompt_length": 4},
        PromptTuning: {"prompt_length": 4},
    }[by]
    with pytest.raises(ValueError, match=hint):
        trainer().fit(by(backbone, **arguments), datamodule=AnyData(), ckpt_path=chain[resumed])
    with pytest.raises(ValueError, match=hint):
        by.load_from_checkpoint(chain[resumed])


@pytest.fixture
def other_backbone(tmp_path: Path) -> str:
    torch.manual_seed(9)
    model = build_model("t5")
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "other")
    build_tokenizer("t5").save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_another_backbone_is_refused_everywhere(
    chain: dict[str, str], other_backbone: str, trainer: MakeTrainer, data: AnyData
) -> None:
    for module in (
        MPTTarget(other_backbone, source=chain["MPTSource"]),
        MPTSource(other_backbone, teachers=chain["PromptTuning"], prompt_length=4),
        PromptTuning(other_backbone, prompt_length=4, prompt_init="checkpoint", init_checkpoint=chain["PromptTuning"]),
    ):
        with pytest.raises(ValueError, match=r"was trained on the backbone .* A prompt fits only the model"):
            trainer().fit(module, datamodule=data)
    with pytest.raises(ValueError, match="was trained on the backbone"):
        PromptTuning.load_from_checkpoint(chain["PromptTuning"], backbone=other_backbone)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda b, c: MPTSource(b, prompt_length=4), "and got none: set --model.teachers"),
        (
            lambda b, c: MPTSource(b, teachers={"one": c["PromptTuning"]}, prompt_length=4),
            "The task 'two' has no teacher: --model.teachers names one",
        ),
        (lambda b, c: MPTSource(b, teachers=c["MPTTarget"], prompt_length=4), "'one' has no teacher: .* has new"),
        (
            lambda b, c: MPTSource(b, teachers=c["PromptTuning"], prompt_length=7),
            "has prompts of 4 tokens, and this run has 7. Set --model.prompt_length to 4",
        ),
        (lambda b, c: MPTSource(b, teachers="no.ckpt", prompt_length=4), "--model.teachers no.ckpt: there is no"),
        (
            lambda b, c: MPTTarget(b, source=c["PromptTuning"]),
            r"which has no shared prompt\. Give",
        ),
        (lambda b, c: MPTTarget(b, source=c["MPTSource"], prompt_length=9), "has prompts of 4 tokens"),
        (
            lambda b, c: MPTTarget(b, source=c["MPTSource"], start="four"),
            r"start must be 'average', 'shared' or a source task \(one, two, three\), got 'four'",
        ),
        (lambda b, c: PromptTuning(b, prompt_length=4, prompt_init="text"), "set --model.init_text"),
        (lambda b, c: PromptTuning(b, prompt_length=4, prompt_init="labels"), "needs tasks with choices"),
        (lambda b, c: PromptTuning(b, prompt_length=500), "needs as many to draw from"),
    ],
)
def test_a_wrong_checkpoint_raises_before_training(
    make: Callable, message: str, chain: dict[str, str], trainer: MakeTrainer, data: AnyData
) -> None:
    backbone = PromptTuning.load_from_checkpoint(chain["PromptTuning"]).hparams["backbone"]
    run = trainer()
    with pytest.raises(ValueError, match=message):
        run.fit(make(backbone, chain), datamodule=data)
    assert run.global_step == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps: got -1, expected a whole number at least 0"),
        ({"temperature": 0.0}, "temperature: got 0.0, expected a number above 0"),
        ({"hidden_weight": -1.0}, "hidden_weight: got -1.0, expected a number at least 0"),
        ({"shared_lr": float("nan")}, "shared_lr: got nan, expected a number at least 0"),
        ({"optimizer": "sgd"}, "optimizer: got 'sgd', expected one of adamw, adafactor"),
        ({"schedule": "step"}, "schedule: got 'step', expected one of linear, constant, cosine"),
        ({"hidden_layers": "first"}, "hidden_layers: got 'first', expected one of last, all"),
        ({"prompt_length": 0}, "prompt_length: got 0, expected a whole number at least 1"),
    ],
)
def test_invalid_values_raise(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MPTSource("anything", **arguments)


def test_evaluating_an_untrained_task_raises(
    chain: dict[str, str], trainer: MakeTrainer, model_folder: Callable[[str], str]
) -> None:
    module = PromptTuning(model_folder("t5"), prompt_length=4)
    run = trainer(limit_val_batches=1)
    with pytest.raises(ValueError, match="The data has the task four, and the prompt has one, two, three"):
        run.validate(module, datamodule=AnyData(["one", "four"]), ckpt_path=chain["PromptTuning"], verbose=False)
    with pytest.raises(ValueError, match="There is no trained prompt to evaluate"):
        run.validate(PromptTuning(model_folder("t5")), datamodule=AnyData(), verbose=False)


def test_tasks_are_matched_by_name_not_by_position(
    chain: dict[str, str], trainer: MakeTrainer, model_folder: Callable[[str], str]
) -> None:
    """A DataModule with fewer tasks in another order gives the same result per task."""

    class Shuffled(AnyData):
        def val_dataloader(self):
            loaders = AnyData().val_dataloader()
            rows = [loaders[TASKS.index(task)].dataset for task in self.tasks]
            return [DataLoader(of, batch_size=5, collate_fn=relabel(place)) for place, of in enumerate(rows)]

    def relabel(place: int) -> Callable:
        def run(rows: list) -> dict:
            batch = torch.utils.data.default_collate(rows)
            return batch | {"task_ids": torch.full_like(batch["task_ids"], place)}

        return run

    run = trainer(limit_val_batches=1.0)
    module = PromptTuning.load_from_checkpoint(chain["PromptTuning"])
    run.validate(module, datamodule=AnyData(), verbose=False)
    plain = dict(run.callback_metrics)
    run.validate(module, datamodule=Shuffled(["three", "one"]), verbose=False)
    moved = dict(run.callback_metrics)
    for task in ("one", "three"):
        torch.testing.assert_close(moved[f"val/{task}/loss"], plain[f"val/{task}/loss"])


DEMO = "mpt_lightning/demo/t5"


@pytest.mark.parametrize("mixed", [False, True], ids=["one task", "stochastic mixture"])
def test_resuming_in_mid_epoch_is_exact_with_our_data(mixed: bool, trainer: MakeTrainer, tmp_path: Path) -> None:
    def data() -> TaskDataModule | MultitaskDataModule:
        options = {"batch_size": 8, "max_train_rows": 40, "cache_dir": str(tmp_path / "cache")}
        if mixed:
            return MultitaskDataModule(["demo/topic", "demo/voice", "demo/question"], **options)
        return load_task("demo/topic", **options)

    def run(folder: str, steps: int, ckpt_path: str | None = None) -> tuple[dict, list]:
        seen: list = []

        class Record(L.Callback):
            def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: dict, *_) -> None:
                seen.append(batch["input_ids"].tolist())

        L.seed_everything(4)
        module = PromptTuning(DEMO, prompt_length=4, schedule="constant", warmup_steps=3)
        lightning = trainer(max_epochs=-1, max_steps=steps, callbacks=[Record()])
        lightning.fit(module, datamodule=data(), ckpt_path=ckpt_path)
        lightning.save_checkpoint(tmp_path / folder)
        return module.state_dict(), seen

    whole, rows = run("whole.ckpt", 12)
    for stop in (2, 5, 7):  # within an epoch of five batches, at its end, in the next
        _, before = run("half.ckpt", stop)
        resumed, after = run("resumed.ckpt", 12, str(tmp_path / "half.ckpt"))
        assert before + after == rows, stop
        assert torch.equal(resumed["prompt.prompt_embeddings"], whole["prompt.prompt_embeddings"]), stop


def test_a_checkpoint_contains_the_cards(trainer: MakeTrainer, tmp_path: Path) -> None:
    module = PromptTuning(DEMO, prompt_length=4)
    run = trainer(max_steps=1)
    run.fit(module, datamodule=load_task("demo/topic", max_train_rows=16, cache_dir=str(tmp_path)))
    run.save_checkpoint(tmp_path / "topic.ckpt")
    loaded = PromptTuning.load_from_checkpoint(str(tmp_path / "topic.ckpt"))
    assert loaded.cards["demo/topic"].choices == ["animals", "food", "weather", "travel"]


@pytest.mark.parametrize("cls", [PromptTuning, MPTSource])
def test_prompts_start_from_a_checkpoint(cls: type, chain: dict[str, str], trainer: MakeTrainer) -> None:
    """A task of the checkpoint starts from its prompt, a new task from the mean of all prompts."""
    still = {"lr": 0.0} if cls is PromptTuning else dict.fromkeys(("shared_lr", "logits_weight", "hidden_weight"), 0.0)
    module = cls(
        torch.load(chain["PromptTuning"], weights_only=True)[KEY]["backbone"],
        prompt_length=4,
        prompt_init="checkpoint",
        init_checkpoint=chain["PromptTuning"],
        **still,
    )
    trainer(max_steps=1).fit(module, datamodule=AnyData(["three", "new"]))
    trained = torch.load(chain["PromptTuning"], weights_only=True)["state_dict"]["prompt.prompt_embeddings"]
    expected = torch.stack([trained[TASKS.index("three")], trained.mean(dim=0)])
    torch.testing.assert_close(
        module.prompt.prompt_embeddings.detach(), expected if cls is PromptTuning else expected.mean(dim=0)
    )


def test_rows_too_long_for_the_backbone_raise(model_folder: Callable[[str], str], trainer: MakeTrainer) -> None:
    data = AnyData()
    data.max_input_length = 90
    with pytest.raises(ValueError, match=r"prompt of 10 tokens .* need 100 positions, and .* has 96\. .* to 86"):
        trainer().fit(PromptTuning(model_folder("llama"), prompt_length=10), datamodule=data)
