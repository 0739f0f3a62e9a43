"""`mpt export`, and the callback that exports the best checkpoint."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel

from mpt_lightning import PromptTuning, import_peft, load_task
from mpt_lightning.backbones import Backbone
from mpt_lightning.callbacks import PEFTExport
from mpt_lightning.checkpoint import read_checkpoint
from mpt_lightning.cli.main import main
from mpt_lightning.data import load_card
from tests.interop.conftest import TASKS
from tests.modules.conftest import AnyData

Make = Callable[..., Path]
Load = Callable[[str], Backbone]
MakeTrainer = Callable[..., L.Trainer]


def test_export_from_the_command_line(
    checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = str(checkpoint("llama", "MPTSource"))
    pushed = []
    monkeypatch.setattr("mpt_lightning.interop.push", lambda folder, repo: pushed.append((folder, repo)) or "address")
    main(["export", source, "all", "--to", "peft"])
    main(["export", source, "one", "--to", "peft", "--task", "two", "--push", "me/two"])
    main(["export", source, "embeds", "--to", "prompt-embeds"])
    main(["export", "all", "again", "--to", "prompt-embeds", "--task", "two"])
    assert capsys.readouterr().out.splitlines() == [
        "wrote all", "wrote one", "pushed to address", "wrote embeds", "wrote again",
    ]  # fmt: skip
    assert pushed == [("one", "me/two")]
    assert import_peft("all").tasks == TASKS
    assert import_peft("one").tasks == ["two"]
    assert list(json.loads(Path("again/prompt_embeds.json").read_text())["tasks"]) == ["two"]
    assert Path("embeds/two.safetensors").read_bytes() == Path("again/two.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no.ckpt", "dest"], "checkpoint no.ckpt: there is no such file"),
        (["CKPT", "source"], "source exists. Expected a path that does not exist"),
        (["CKPT", "dest", "--task", "three"], "Unknown task 'three'. This prompt has: glue/one, two"),
        (["source", "dest"], "source is not a PEFT folder: it has no adapter_config.json"),
        (["CKPT", "dest", "--push", "a/b/c"], "dest was not pushed to 'a/b/c'"),
    ],
)
@pytest.mark.parametrize("to", ["peft", "prompt-embeds"])
def test_mistakes_get_one_message(
    words: list[str], message: str, to: str, checkpoint: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    source = str(checkpoint("llama", "PromptTuning"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main(["export", *[source if word == "CKPT" else word for word in words], "--to", to])
    assert leaving.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith(f"mpt: error: {message}")
    assert {path.name for path in tmp_path.iterdir()} == {"source"} | ({"dest"} if "--push" in words else set())


@pytest.mark.parametrize("name", ["best", "{step}"])
@pytest.mark.parametrize("interval", [1, 3])
def test_the_best_checkpoint_is_exported(
    name: str, interval: int, backbones: Load, trainer: MakeTrainer, tmp_path: Path
) -> None:
    """Later, worse checkpoints do not replace it, neither after a validation nor at the end of training."""
    seen: list[bool] = []

    class CheckExport(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: object) -> None:
            best = trainer.checkpoint_callback.best_model_path
            if best:
                exported = import_peft(tmp_path / "runs/prompts").state_dict["prompt.prompt_embeddings"]
                seen.append(torch.equal(exported, read_checkpoint(best).state_dict["prompt.prompt_embeddings"]))

    class Worse(PromptTuning):
        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.log("score", [0.0, 3.0, 2.0, 4.0, 1.0, 0.5][min(self.global_step // interval, 5)])

    best = ModelCheckpoint(tmp_path / "runs", name, monitor="score", mode="max", enable_version_counter=False)
    export = PEFTExport("prompts")
    options = {"limit_val_batches": 1.0, "val_check_interval": interval, "enable_checkpointing": True, "max_epochs": 3}
    module = Worse(backbones("t5").name, prompt_length=4, lr=0.1)
    trainer(callbacks=[CheckExport(), export, best], num_sanity_val_steps=0, **options).fit(
        module, datamodule=AnyData()
    )
    assert len(seen) > 3
    assert all(seen)
    found = import_peft(tmp_path / "runs/prompts")
    expected = read_checkpoint(best.best_model_path)
    assert torch.equal(found.state_dict["prompt.prompt_embeddings"], expected.state_dict["prompt.prompt_embeddings"])
    assert found.metrics == {"score": 4.0}
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {Path(best.best_model_path).name, "prompts"}


def test_the_callback_needs_a_module_with_a_prompt(
    backbones: Load, trainer: MakeTrainer, tmp_path: Path, model_folder: Callable[[str], str]
) -> None:
    module = PromptTuning(backbones("t5").name, prompt_length=4)
    with pytest.raises(ValueError, match="add a ModelCheckpoint"):
        trainer(callbacks=[PEFTExport()]).fit(module, datamodule=AnyData())
    callbacks = [PEFTExport(), ModelCheckpoint(tmp_path)]
    with pytest.raises(ValueError, match="exports prompt modules, and this is BoringModel"):
        trainer(callbacks=callbacks, enable_checkpointing=True).fit(BoringModel(), datamodule=AnyData())
    slots = load_task(replace(load_card("demo/topic"), input="[prompt*4] {sentence}"), batch_size=4)
    with pytest.raises(ValueError, match="The template has places for the prompt"):
        trainer(callbacks=[PEFTExport(), ModelCheckpoint(tmp_path)], enable_checkpointing=True).fit(
            PromptTuning("mpt_lightning/demo/t5", prompt_length=4), slots
        )
    (tmp_path / "runs/peft").mkdir(parents=True)
    (tmp_path / "runs/peft/mine").write_text("mine")
    callbacks = [PEFTExport(), ModelCheckpoint(tmp_path / "runs")]
    with pytest.raises(ValueError, match=r"peft exists\. Expected an export \(a folder with mpt_lightning\.json\)"):
        trainer(callbacks=callbacks, enable_checkpointing=True).fit(module, datamodule=AnyData())
    assert (tmp_path / "runs/peft/mine").read_text() == "mine"
