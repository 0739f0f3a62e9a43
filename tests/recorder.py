"""A callback that records the rows of each step, for runs in separate processes."""

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as L


class Recorder(L.Callback):
    """Appends a line per step to `<folder>/steps.rank<rank>.jsonl`: step, rows and loss."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        line = {"step": trainer.global_step, "rows": batch["row_ids"], "loss": outputs["loss"].item()}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"steps.rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
