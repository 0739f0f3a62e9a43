"""A backbone whose weights are spread over two ranks gives the results of an unsharded one."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from processes import finish, launch, start
from safetensors.torch import load_file
from stages import BERT, LLAMA, LONG, T5, FirstGradient, data, doubled, make, trainer
from torch.distributed.tensor import DTensor
from transformers.modeling_layers import GradientCheckpointingLayer

from mpt_lightning import (
    CPT,
    HardPrompt,
    MPTSource,
    MultitaskDataModule,
    PrefixTuning,
    PromptTuning,
    ShardedStrategy,
    load_backbone,
)
from mpt_lightning.backbones.sharding import shard
from mpt_lightning.callbacks import PEFTExport, PredictionWriter
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.cli.main import main
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.sampling import EvalSampler
from mpt_lightning.distributed.strategy import check_strategy

STAGES = ["source", "cached", "cpt", "checkpointed", "prefix", "masked", "masked_prefix"]
QUIET = {"limit_val_batches": 0, "enable_checkpointing": False}


def build(stage: str, folder: Path, devices: int) -> Any:
    """Build the module and the data of a stage."""
    batch_size = 4 // devices
    if stage in ("source", "cpt"):
        return doubled(make(stage, folder)), data(stage, batch_size, folder)
    if stage == "cached":
        options = {"teacher_cache": str(folder / f"teachers{devices}"), "hidden_positions": "prompt"}
        module = MPTSource(T5, str(folder / "prompt_tuning.ckpt"), prompt_length=4, **options)
        return doubled(module), data("source", batch_size, folder)
    if stage.startswith("masked"):
        # Two rows per batch: a rank has answers of one token or of several, and the other rank the other ones.
        masked = {
            "masked": lambda: MPTSource(BERT, str(folder / "masked.ckpt"), prompt_length=4),
            "masked_prefix": lambda: PrefixTuning(BERT, prompt_length=4),
        }[stage]()
        return doubled(masked), data("source", 2 // devices, folder, tasks=LONG)
    # Prompts first, the rows on top of their keys and values: nobody uses the last block's output.
    module = (
        PrefixTuning(LLAMA, prompt_length=4)
        if stage == "prefix"
        else PromptTuning(LLAMA, prompt_length=4, gradient_checkpointing=True, lr=0.05)
    )
    return doubled(module), data("prompt_tuning", batch_size, folder, answer_prefix="label :")


class Watch(L.Callback):
    """Records the loss of each step over all ranks, and the norm of CPT's perturbation relative to its radius."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ratios: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.losses.append(trainer.callback_metrics["train/loss"].item())
        if isinstance(module, CPT):
            norms = module.prompt.delta_embedding.detach().norm(dim=1, keepdim=True)
            self.ratios.append((norms / module.prompt.radius).max().item())


def train(folder: Path, devices: int, rank: int) -> None:
    """Train and test each stage; write `<stage>.ckpt` and, from each rank, `<stage>.<rank>.pt`."""
    target = folder / str(devices)
    for stage in STAGES:
        L.seed_everything(rank)
        watch, gradient = Watch(), FirstGradient()
        # Two batches per step, and a clipped gradient: both show whether it was averaged once, and when.
        run = trainer(
            devices, ShardedStrategy(), max_epochs=2, num_sanity_val_steps=1, accumulate_grad_batches=2,
            gradient_clip_val=0.01,
            callbacks=[watch, gradient, ModelCheckpoint(dirpath=target, filename=stage)]
            + [PEFTExport()] * (stage == "cpt"),
        )  # fmt: skip
        module, rows = build(stage, folder, devices)
        run.fit(module, datamodule=rows)
        metrics = {name: value for name, value in run.callback_metrics.items() if name.startswith("val/")}
        metrics |= run.test(module, datamodule=rows, verbose=False)[0]
        blocks = [layer for layer in module.backbone.modules() if isinstance(layer, GradientCheckpointingLayer)]
        weights = [weight for block in blocks for weight in block.parameters()]
        held = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in weights]
        found = {
            "losses": watch.losses, "ratios": watch.ratios, "metrics": metrics, "gradient": gradient.values,
            "share": sum(part.numel() for part in held) / sum(weight.numel() for weight in weights),
            "fingerprint": module.backbone.fingerprint, "embeddings": module.backbone.embeddings,
        }  # fmt: skip
        torch.save(found, target / f"{stage}.{rank}.pt")


def answer(folder: Path, devices: int) -> None:
    """Rank choices and generate, with a number of rows that the ranks cannot share evenly; write `<backbone>.jsonl`."""
    for name, backbone, beams in (("t5", T5, 1), ("llama", LLAMA, 2)):
        rows = MultitaskDataModule(
            ["demo/similarity", "demo/topic"], eval_batch_size=2, answer_prefix="label :", max_eval_rows=7,
            cache_dir=str(folder / "cache"),
        )  # fmt: skip
        writer = PredictionWriter(str(folder / str(devices) / f"{name}.jsonl"))
        run, module = trainer(devices, ShardedStrategy(), callbacks=[writer]), HardPrompt(backbone, num_beams=beams)
        run.predict(module, datamodule=rows)
        # The ranks need different numbers of passes for their answers.
        ids, tokens = torch.tensor([[5, 6, 7]]), 2 + 3 * run.global_rank
        written = module.backbone.generate(
            torch.zeros(1, 0, module.backbone.dim), torch.tensor([0]), ids, torch.ones_like(ids),
            max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams, do_sample=False,
        )  # fmt: skip
        assert written.shape == (1, tokens)


def resume(folder: Path, devices: int) -> None:
    """Train for two epochs, and again from the checkpoints of the first one; write `<stage>.<run>.ckpt`."""
    target = folder / str(devices)
    for stage in ("prompt_tuning", "cpt"):
        starts = {"whole": None, "resumed": target, "one": folder / "1"}
        for name, origin in starts.items():
            L.seed_everything(0)
            saving = ModelCheckpoint(dirpath=target, filename=f"{stage}.{{epoch}}", save_top_k=-1)
            run = trainer(devices, ShardedStrategy(), max_epochs=2, limit_val_batches=0, callbacks=[saving])
            path = None if origin is None else origin / f"{stage}.epoch=0.ckpt"
            run.fit(make(stage, folder), datamodule=data(stage, 4 // devices, folder), ckpt_path=path)
            run.save_checkpoint(target / f"{stage}.{name}.ckpt")


def fail(folder: Path, devices: int, rank: int) -> None:
    """Train with a loss that is not finite on the second rank; write each rank's message to a file."""
    module = make("prompt_tuning", folder)
    losses = module.losses
    module.losses = lambda batch: {
        name: value * (float("nan") if module.global_rank == 1 and module.global_step == 1 else 1)
        for name, value in losses(batch).items()
    }
    run = trainer(devices, ShardedStrategy(), max_epochs=1, **QUIET)
    with pytest.raises(ValueError, match="not finite") as error:
        run.fit(module, datamodule=data("prompt_tuning", 2, folder))
    (folder / str(devices) / f"fault.{rank}").write_text(str(error.value))


def do_all(folder: str, devices: int) -> None:
    """Run all of the above once, in one process or in each of several."""
    where, rank = Path(folder), int(os.environ.get("RANK", 0))
    train(where, devices, rank)
    answer(where, devices)
    resume(where, devices)
    if devices > 1:
        fail(where, devices, rank)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharding")
    teachers = {"prompt_tuning": make("prompt_tuning", folder), "masked": PromptTuning(BERT, prompt_length=4)}
    for name, teacher in teachers.items():
        run = trainer(1, max_steps=2, **QUIET)
        run.fit(teacher, datamodule=data("prompt_tuning", 4, folder))
        run.save_checkpoint(folder / f"{name}.ckpt")
    do_all(str(folder), 1)
    launch(do_all, str(folder), 2)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_curve_is_that_of_a_whole_backbone(stage: str, folder: Path) -> None:
    one, *two = (torch.load(folder / f"{name}.pt") for name in (f"1/{stage}.0", f"2/{stage}.0", f"2/{stage}.1"))
    assert len(one["losses"]) >= 4
    assert one["losses"][-1] < one["losses"][0]
    for ranks in two:
        # A rank's loss is weighted by its share of the step's tokens; AdamW amplifies that rounding over the steps.
        torch.testing.assert_close(ranks["losses"], one["losses"], rtol=1e-5, atol=0)
        assert ranks["metrics"].keys() == one["metrics"].keys() > {"val/average", "test/average"}
        for name, value in one["metrics"].items():
            assert float(ranks["metrics"][name]) == pytest.approx(float(value), rel=1e-5), name
        for name, value in one["gradient"].items():
            assert (ranks["gradient"][name] - value).norm() <= 1e-6 * value.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_holds_its_half(stage: str, folder: Path) -> None:
    one, *two = (torch.load(folder / f"{name}.pt") for name in (f"1/{stage}.0", f"2/{stage}.0", f"2/{stage}.1"))
    assert one["share"] == 1
    for ranks in two:
        assert ranks["share"] == pytest.approx(0.5, abs=0.01)
        assert ranks["fingerprint"] == one["fingerprint"]
        assert torch.equal(ranks["embeddings"], one["embeddings"])


@pytest.mark.slow
def test_the_perturbation_is_projected_after_each_step(folder: Path) -> None:
    for name in ("1/cpt.0", "2/cpt.0", "2/cpt.1"):
        ratios = torch.load(folder / f"{name}.pt")["ratios"]
        assert max(ratios) <= 1 + 1e-6
        assert max(ratios) > 1 - 1e-6  # it binds


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_checkpoints_are_those_of_any_other_run(stage: str, folder: Path) -> None:
    one, two = (torch.load(folder / devices / f"{stage}.ckpt", weights_only=True) for devices in "12")
    assert one.keys() == two.keys()
    assert all(name.startswith("prompt.") for name in one["state_dict"])
    for name, value in one["state_dict"].items():
        assert (two["state_dict"][name] - value).norm() <= 1e-5 * value.norm(), name
    assert one["optimizer_states"][0]["state"].keys() == two["optimizer_states"][0]["state"].keys()
    assert one["mpt_lightning"] == two["mpt_lightning"]


@pytest.mark.slow
def test_peft_gets_the_best_context(folder: Path) -> None:
    one, two = (load_file(folder / devices / "peft" / "adapter_model.safetensors") for devices in "12")
    assert one.keys() == two.keys() > set()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["source", "cpt"])
def test_one_process_answers_with_a_checkpoint(stage: str, folder: Path) -> None:
    module = {"source": MPTSource, "cpt": CPT}[stage].load_from_checkpoint(folder / "2" / f"{stage}.ckpt")
    assert not module.backbone.sharded
    tested = trainer(1).test(module, datamodule=data(stage, 4, folder), verbose=False)[0]
    expected = torch.load(folder / "2" / f"{stage}.0.pt")["metrics"]
    for name, value in tested.items():
        assert value == pytest.approx(float(expected[name]), rel=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["prompt_tuning", "cpt"])
def test_resuming_is_exact(stage: str, folder: Path) -> None:
    names = ("whole", "resumed", "one")
    whole, resumed, one = (torch.load(folder / f"2/{stage}.{name}.ckpt", weights_only=True) for name in names)
    assert whole["global_step"] == resumed["global_step"] == one["global_step"] > 0
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name
        assert (one["state_dict"][name] - value).norm() <= 0.02 * value.norm(), (
            name
        )  # one process's first half, in fp32


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(folder: Path) -> None:
    L.seed_everything(0)
    run, path = trainer(1, max_epochs=2, **QUIET), folder / "2" / "prompt_tuning.epoch=0.ckpt"
    run.fit(make("prompt_tuning", folder), datamodule=data("prompt_tuning", 4, folder), ckpt_path=path)
    whole = torch.load(folder / "1" / "prompt_tuning.whole.ckpt", weights_only=True)["state_dict"]
    for name, value in run.lightning_module.state_dict().items():
        assert (whole[name] - value).norm() <= 0.02 * value.norm(), name  # Adam magnifies rounding, in fp32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "llama"])
def test_predictions_are_those_of_one_process(name: str, folder: Path) -> None:
    one, two = ((folder / devices / f"{name}.jsonl").read_text().splitlines() for devices in "12")
    assert [json.loads(line) for line in two] == [json.loads(line) for line in one]
    assert len(one) == 14


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_both_ranks(folder: Path) -> None:
    messages = [(folder / "2" / f"fault.{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1]
    assert messages[0].startswith("Rank 1: The loss is not finite at step 1")


def command(folder: str, words: list[str]) -> None:
    """Run `mpt`; Lightning starts the other ranks by `sys.argv`."""
    os.chdir(folder)
    sys.argv = [str(Path(sys.executable).with_name("mpt")), *words]
    main()


@pytest.mark.slow
def test_the_command_starts_the_other_ranks(tmp_path: Path) -> None:
    words = (
        "fit --config demo/cpt --config trainer/sharded --trainer.accelerator cpu --trainer.devices 2 "
        "--trainer.max_steps 2 --trainer.val_check_interval 2"
    )
    finish(start(command, str(tmp_path), words.split()), seconds=200)
    assert read_checkpoint(str(tmp_path / "runs/demo/cpt/last.ckpt")).stage == "CPT"


@pytest.mark.parametrize(
    ("strategy", "quantization", "message"),
    [
        (ModelParallelStrategy(2, 1), None, r"use strategy=mpt_lightning.ShardedStrategy\(\)"),
        (ModelParallelStrategy(1, 2), None, "tensor_parallel_size"),
        (FSDPStrategy(), None, "ShardedStrategy"),
        (ShardedStrategy(), "4bit", "Leave backbone_quantization unset"),
    ],
)
def test_what_cannot_be_sharded_is_refused(strategy: Any, quantization: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_strategy(strategy, quantization)


@pytest.mark.parametrize("size", [0, 1, 6, 7, 8])
def test_ranks_in_step_have_equally_many_rows_to_answer(size: int) -> None:
    samplers = [EvalSampler(range(size), 3, rank, even=True) for rank in range(3)]
    assert {len(sampler) for sampler in samplers} == {-(-size // 3)}
    counted = [row for sampler in samplers for row in list(sampler)[: len(sampler) - sampler.filling]]
    assert sorted(counted) == list(range(size))


def test_ranks_that_would_make_different_passes_are_refused() -> None:
    card = {"path": "mpt_lightning/demo", "metrics": ["accuracy"], "choices": ["no", "yes"]}
    cards = [{"name": "a", "input": "{sentence} [prompt*2]", **card}, {"name": "b", "input": "{sentence}", **card}]
    rows = MultitaskDataModule([TaskCard(**fields) for fields in cards])
    with pytest.raises(ValueError, match="Give places to all tasks or to none"):
        check_strategy(ShardedStrategy(), None, rows)


def test_a_backbone_that_is_trained_is_refused() -> None:
    backbone = load_backbone(T5)
    backbone.model.lm_head.requires_grad_(True)
    with pytest.raises(ValueError, match=r"--trainer\.strategy ddp"):
        shard(backbone, None)


def test_a_backbone_of_unknown_layers_is_refused() -> None:
    backbone = load_backbone(T5)
    backbone.model = torch.nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="no layers of transformers' own kind"):
        shard(backbone, None)
