"""A DataModule that does not use this package, with batches as documented, and a quiet Trainer."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.conftest import VOCABULARY

TASKS = ["one", "two", "three"]


class Rows(Dataset):
    """24 rows of three tasks; the answer depends on the task and on the last token."""

    def __init__(self, tasks: int, size: int = 24) -> None:
        generator = torch.Generator().manual_seed(5)
        self.ids = torch.randint(3, VOCABULARY, (size, 6), generator=generator)
        self.tasks = torch.arange(size) % tasks
        self.labels = torch.stack([10 + self.tasks * 2 + self.ids[:, -1] % 2, torch.full((size,), 1)], dim=1)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {
            "input_ids": self.ids[index],
            "attention_mask": torch.ones(6, dtype=torch.long),
            "labels": self.labels[index],
            "task_ids": self.tasks[index],
        }


class AnyData(L.LightningDataModule):
    """A DataModule of a user's own."""

    def __init__(self, tasks: list[str] = TASKS, batch_size: int = 8) -> None:
        super().__init__()
        self.tasks, self.batch_size = list(tasks), batch_size

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Rows(len(self.tasks)), batch_size=self.batch_size)

    def val_dataloader(self) -> list[DataLoader]:
        def of_task(task: int) -> list[int]:
            return [row for row in range(24) if row % len(self.tasks) == task]

        rows = Rows(len(self.tasks))
        return [
            DataLoader(torch.utils.data.Subset(rows, of_task(task)), batch_size=5) for task in range(len(self.tasks))
        ]


@pytest.fixture
def data() -> AnyData:
    return AnyData()


@pytest.fixture
def trainer(tmp_path) -> Callable[..., L.Trainer]:
    def make(**options: Any) -> L.Trainer:
        defaults = {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "limit_val_batches": 0,
            "default_root_dir": str(tmp_path),
        }
        return L.Trainer(**(defaults | options))

    return make
