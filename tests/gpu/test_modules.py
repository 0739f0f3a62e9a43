"""Every module on a GPU, from fit to export: results equal the CPU's, and no tensor is left on the device."""

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from mpt_lightning import Predictor
from mpt_lightning.interop import export_peft, export_prompt_embeds, import_peft
from mpt_lightning.modules import MPTSource, PromptModule, PromptTuning
from tests.conftest import build_model, build_tokenizer
from tests.gpu.cases import BRIEF, CASES, FULL, UNTRAINED, Case
from tests.gpu.conftest import ON_CPU, Device, TinyData, collate, row

RUN = {"enable_checkpointing": True, "num_sanity_val_steps": 0}
BATCH = collate([row(0, number) for number in range(3)])
TEXTS = ["the film was good", "dog ran"]
STEPS = 2


def tensors(module: PromptModule) -> dict[str, Tensor]:
    """Return copies on the CPU of all tensors of a module, including the frozen ones."""
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    named.pop("_row_of_task", None)  # depends on the data
    return {name: value.detach().cpu().clone() for name, value in named.items()}


class Start(L.Callback):
    """Stores the tensors at the start of a fit."""

    def on_train_start(self, trainer: L.Trainer, module: PromptModule) -> None:
        self.tensors = tensors(module)


def held(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Yield all tensors that can be reached from an object, except those of the Trainer."""
    seen = set() if seen is None else seen
    if id(thing) in seen or isinstance(thing, L.Trainer | str | type):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, Mapping):
        for value in list(thing.values()):
            yield from held(value, seen)
    elif isinstance(thing, list | tuple | set):
        for value in thing:
            yield from held(value, seen)
    elif hasattr(thing, "__dict__") and not callable(getattr(thing, "__get__", None)):
        yield from held(vars(thing), seen)


def left_on_gpu(module: PromptModule) -> int:
    return sum(tensor.is_cuda for tensor in held(module))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict]:
    """Return a function that returns, for a kind of model, the checkpoints that other runs need."""

    @lru_cache
    def of_kind(kind: str) -> dict[str, str]:
        folder = tmp_path_factory.mktemp(kind)
        made = {"folder": str(folder / "cache"), "backbone": str(folder / "model")}
        build_model(kind, layers=1).save_pretrained(made["backbone"])
        build_tokenizer(kind).save_pretrained(made["backbone"])
        for name, module in (
            ("teachers", PromptTuning(made["backbone"], prompt_length=3)),
            ("source", MPTSource(made["backbone"], prompt_length=3, logits_weight=0, hidden_weight=0)),
        ):
            trainer = ON_CPU.trainer(max_steps=1, limit_val_batches=0)
            trainer.fit(module, datamodule=TinyData())
            made[name] = str(folder / f"{name}.ckpt")
            trainer.save_checkpoint(made[name])
        return made

    return of_kind


def make(case: Case, paths: dict[str, str]) -> PromptModule:
    torch.manual_seed(3)
    return case.make(**paths)


def answers(path: str, device: Device, tasks: list[str]) -> list[Any]:
    """Return a Predictor's probabilities or generated texts for rows of mixed tasks."""
    predictor = Predictor.from_checkpoint(path, device=device.name)
    given = [tasks[number % len(tasks)] for number in range(len(TEXTS))]
    made = predictor.predict(TEXTS, given, max_new_tokens=2)
    return [p.prediction if p.probabilities is None else sorted(p.probabilities.items()) for p in made]


def exported(path: str, module: PromptModule, folder: Path) -> dict[str, Tensor]:
    """Return the prompts of both exports, if the module has a prompt to export."""
    if module.prompt.length == 0 or type(module).__name__ in ("DePT", "PrefixTuning"):
        return {}
    export_prompt_embeds(path, folder / "embeds", backbone=module.backbone)
    found = import_peft(export_peft(path, folder / "peft", backbone=module.backbone), module.backbone)
    prompt = found.prompt(module.backbone.embeddings)
    return {task: prompt.fold(task) for task in prompt.tasks}


def fit(case: Case, device: Device, paths: dict[str, str], folder: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Train for two steps with a checkpoint after each; return the module, and its tensors before and after."""
    start, saved = Start(), ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    module = make(case, paths)
    trainer = device.trainer(max_steps=STEPS, max_epochs=-1, callbacks=[start, saved], **RUN | options)
    trainer.fit(module, datamodule=case.data())
    assert trainer.global_step == STEPS
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert left_on_gpu(module) <= case.kept
    found = {"start": start.tensors, "end": tensors(module), "logged": logged}
    return module, found | {"logits": module(BATCH).detach()}


def evaluate(module: PromptModule, data: TinyData, device: Device) -> dict[str, Any]:
    """Test and predict."""
    trainer = device.trainer()
    found = {"test": trainer.test(module, datamodule=data, verbose=False)}
    found["predictions"] = trainer.predict(module, datamodule=data)
    assert left_on_gpu(module) == 0
    return found


def resume_and_load(case: Case, device: Device, paths: dict[str, str], folder: Path, found: dict[str, Any]) -> None:
    """Resume from the first checkpoint, load the last one, and assert that all tensors equal those of the run."""
    torch.manual_seed(8)
    resumed = case.make(**paths)
    trainer = device.trainer(max_steps=STEPS, max_epochs=-1, limit_val_batches=0)
    trainer.fit(resumed, datamodule=case.data(), ckpt_path=str(folder / "step=1.ckpt"))
    if not case.draws:
        assert_equal(tensors(resumed), found["end"])
    path = str(folder / f"step={STEPS}.ckpt")
    loaded = type(resumed).load_from_checkpoint(path, map_location=device.name).cpu().eval()
    assert_equal(tensors(loaded), found["end"])
    if not case.draws:
        assert_equal(loaded(BATCH), found["logits"])


def assert_equal(got: Any, expected: Any, tolerance: float = 0.0) -> None:
    """Assert that nested results are equal up to a tolerance."""
    if isinstance(expected, Mapping):
        assert sorted(got) == sorted(expected)
        for name in expected:
            assert_equal(got[name], expected[name], tolerance)
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected)
        for ours, theirs in zip(got, expected, strict=True):
            assert_equal(ours, theirs, tolerance)
    elif isinstance(expected, Tensor):
        torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)
    elif isinstance(expected, float):
        assert got == pytest.approx(expected, rel=tolerance, abs=tolerance)
    else:
        assert got == expected


def assert_same_run(on_gpu: dict[str, Any], on_cpu: dict[str, Any], device: Device) -> None:
    """Assert that a run equals the CPU's: initial tensors bit for bit, scores up to the device's tolerance.

    Weights and logits differ more: AdamW's first steps follow the sign of gradients that may be rounding errors.
    """
    assert_equal(on_gpu.pop("start"), on_cpu.pop("start"))
    for name in ("end", "logits", "exported"):
        assert_equal(on_gpu.pop(name, {}), on_cpu.pop(name, {}), 1e-3)
    assert_equal(on_gpu, on_cpu, device.tolerance)


@pytest.mark.parametrize(("name", "kind"), FULL)
def test_a_module_matches_the_cpu_from_fit_to_export(
    name: str, kind: str, device: Device, paths: Any, tmp_path: Path
) -> None:
    case, runs = CASES[name], []
    for run_on in (ON_CPU, device):
        folder = tmp_path / run_on.name
        with run_on():
            module, found = fit(case, run_on, paths(kind), folder, check_val_every_n_epoch=STEPS)
            found |= evaluate(module, case.data(), run_on)
            path = str(folder / f"step={STEPS}.ckpt")
            found["answers"] = answers(path, run_on, case.data().tasks)
            if run_on is device:
                resume_and_load(case, run_on, paths(kind), folder, found)
                module.to(run_on.name)
            found["exported"] = exported(path, module, folder)
            module.cpu()
        runs.append(found)
    assert any(name.startswith("val/") for name in runs[1]["logged"])
    assert_same_run(runs[1], runs[0], device)


# PEFT's SHiRA reads sparse tensors, and PEFT reports the layout of GPT-2's weights.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:fan_in_fan_out is set to")
@pytest.mark.parametrize(("name", "kind"), BRIEF)
def test_a_module_matches_the_cpu_from_fit_to_load(
    name: str, kind: str, device: Device, paths: Any, tmp_path: Path
) -> None:
    case = CASES[name]
    _, on_cpu = fit(case, ON_CPU, paths(kind), tmp_path / "cpu", limit_val_batches=0)
    with device():
        _, on_gpu = fit(case, device, paths(kind), tmp_path / "gpu", limit_val_batches=0)
        resume_and_load(case, device, paths(kind), tmp_path / "gpu", on_gpu)
    if case.draws:
        on_cpu, on_gpu = {"start": on_cpu["start"]}, {"start": on_gpu["start"]}
    assert_same_run(on_gpu, on_cpu, device)


@pytest.mark.parametrize("name", UNTRAINED)
def test_an_untrained_method_matches_the_cpu(name: str, device: Device, paths: Any) -> None:
    case, runs = UNTRAINED[name], []
    for run_on in (ON_CPU, device):
        with run_on():
            runs.append(evaluate(make(case, paths(case.full[0])), case.data(), run_on))
    assert_equal(runs[1], runs[0], device.tolerance)
