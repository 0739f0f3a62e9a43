"""Callbacks: predictions as JSONL, the last checkpoint, an export of the best one for PEFT, a picture of prompts."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, ModelCheckpoint
from torch.nn import functional

from mpt_lightning.errors import MPTError
from mpt_lightning.io import write_json_lines
from mpt_lightning.modules.base import PromptModule
from mpt_lightning.prompts import Prompt, PromptOutput


class PredictionWriter(BasePredictionWriter):
    """Writes the records of `predict`, one JSON object per line: task, row, text, prediction, gold.

    Each rank writes its rows to a file of its own; at the end rank 0 joins them in the order of tasks and rows.

    Args:
        path: The file. It must not exist.
    """

    def __init__(self, path: str = "predictions.jsonl") -> None:
        super().__init__(write_interval="batch")
        self.path = Path(path)

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.name}.rank{rank}")

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise if the file exists, before any work is done."""
        if stage != "predict":
            return
        if self.path.exists():
            raise MPTError(f"{self.path} exists; remove it, or choose another file.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._part(trainer.global_rank).write_text("", encoding="utf-8")

    def write_on_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, prediction: Any, *_: Any, **__: Any
    ) -> None:
        """Append a batch's records."""
        with self._part(trainer.global_rank).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in prediction)

    def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Join the ranks' parts."""
        trainer.strategy.barrier()
        if not trainer.is_global_zero:
            return
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        if missing := [str(part) for part in parts if not part.is_file()]:
            raise MPTError(
                f"The answers of other ranks are missing: {', '.join(missing)}. Set --output to a file on a disk that "
                "all machines share."
            )
        # Not splitlines(), which also splits at line separators within a text.
        lines = "".join(part.read_text(encoding="utf-8") for part in parts).split("\n")
        records = [json.loads(line) for line in lines if line]
        order = {task: place for place, task in enumerate(dict.fromkeys(record["task"] for record in records))}
        records.sort(key=lambda record: (order[record["task"]], record["row"]))
        write_json_lines(self.path, records)
        for part in parts:
            part.unlink()


class LastCheckpoint(ModelCheckpoint):
    """Saves the newest checkpoint, `last.ckpt`, for `--ckpt_path last`, beside the best one of a ModelCheckpoint.

    It is saved after every validation and after the last step. (In Lightning 2.6 ModelCheckpoint's own `save_last`
    saves only when the monitored score improves.)

    Args:
        dirpath: The folder; by default the logger's, or the Trainer's `default_root_dir`.
        every_n_train_steps: Save after so many steps instead.
        train_time_interval: Save after so much time instead.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
    ) -> None:
        super().__init__(
            dirpath,
            self.CHECKPOINT_NAME_LAST,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            enable_version_counter=False,
        )

    def on_train_batch_end(self, trainer: L.Trainer, *rest: Any) -> None:
        """Save when due, and after the last step unless a validation follows it."""
        super().on_train_batch_end(trainer, *rest)
        loop = trainer.fit_loop
        is_last = trainer.global_step == trainer.estimated_stepping_batches
        # A checkpoint saved before that validation would resume as a finished run, without it.
        is_last = is_last and not loop.epoch_loop._should_check_val_fx(loop._data_fetcher)  # type: ignore[arg-type]
        if is_last and self.dirpath and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.save_checkpoint(Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")


class PEFTExport(L.Callback):
    """Exports the best checkpoint for PEFT to a folder beside it, whenever ModelCheckpoint saves a better one.

    The export runs before the next batch or at the end of training, and replaces the former folder by renaming.

    Args:
        folder: Its name, in the best checkpoint's folder.
        task: Export this task alone; by default all.
    """

    def __init__(self, folder: str = "peft", task: str | None = None) -> None:
        self.folder, self.task = folder, task
        self._exported: tuple[str, int] | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Raise if there is no ModelCheckpoint, or the module is not a prompt module."""
        if stage != "fit" or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            raise MPTError("PEFTExport exports what a ModelCheckpoint saves: add a ModelCheckpoint.")
        if not isinstance(pl_module, PromptModule):
            raise MPTError(f"PEFTExport exports prompt modules, and this is {type(pl_module).__name__}.")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise if the backbone is trained, or a prompt of anything else than embeddings."""
        prompt = pl_module.prompt if isinstance(pl_module, PromptModule) else None
        if prompt is not None and prompt.content != Prompt.content:
            raise MPTError(
                f"PEFTExport exports prompts of embeddings, and {type(pl_module).__name__} trains {prompt.content}. "
                "Remove PEFTExport from the callbacks."
            )
        if isinstance(pl_module, PromptModule) and pl_module.backbone is not None:
            from mpt_lightning.interop.peft import check_place

            slots = getattr(trainer.datamodule, "prompt_slots", {})  # type: ignore[attr-defined]
            check_place(pl_module.backbone.family, bool(slots))

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Export what was saved since the last batch."""
        self._export(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export what was saved last."""
        self._export(trainer, pl_module)

    def _export(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        saved = trainer.checkpoint_callback
        if not trainer.is_global_zero or not isinstance(saved, ModelCheckpoint) or not isinstance(module, PromptModule):
            return
        best = Path(saved.best_model_path)
        if not best.is_file():  # nothing has been saved yet
            return
        version = (str(best), best.stat().st_mtime_ns)
        if version != self._exported:
            from mpt_lightning.interop import export_peft

            # One rank alone cannot read a sharded backbone's embeddings: the export loads the backbone if needed.
            backbone = None if module.backbone is None or module.backbone.sharded else module.backbone
            export_peft(best, best.parent / self.folder, self.task, backbone=backbone, replace=True)
            self._exported = version


def prompt_similarity(prompt: Prompt) -> torch.Tensor:
    """Return the cosine similarity of the tasks' prompts, `[T, T]`, in -1..1.

    DePT's prompts are compared by their embeddings, without the shift; prefixes by the keys and values of all layers.
    """
    with torch.no_grad():
        device = next(prompt.parameters()).device
        output: PromptOutput = prompt(torch.arange(prompt.num_tasks, device=device))
        states = [states for layer in output.layers for states in layer]
        compared = states if output.embeddings is None else [output.embeddings]
        flat = functional.normalize(torch.cat([part.flatten(1) for part in compared], dim=1), dim=1)
        return (flat @ flat.T).clamp(-1, 1).float().cpu()


class SimilarityPicture(L.Callback):
    """Draws the cosine similarity of the tasks' prompts when training ends.

    Args:
        path: The PNG file; relative paths are under the Trainer's `default_root_dir`.
    """

    def __init__(self, path: str = "prompt_similarity.png") -> None:
        self.path = path

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw and save."""
        prompt = pl_module.prompt if isinstance(pl_module, PromptModule) else None
        if not trainer.is_global_zero or prompt is None or prompt.length == 0:  # 0: a method without prompts
            return
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 5), layout="constrained")
        draw_similarity(figure.add_subplot(), prompt)
        file = Path(trainer.default_root_dir) / self.path
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)


def draw_similarity(axes: Any, prompt: Prompt) -> None:
    """Draw the similarity of a prompt's tasks on matplotlib axes."""
    values = prompt_similarity(prompt).numpy()
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(prompt.num_tasks), prompt.tasks, rotation=45, ha="right")
    axes.set_yticks(range(prompt.num_tasks), prompt.tasks)
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if abs(value) > 0.8 else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_title("Cosine similarity of the tasks' prompts")
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
