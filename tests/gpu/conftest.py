"""The devices of these tests, and small data of two tasks: one with ranked choices, one with generated answers."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from torch.utils.data import DataLoader, default_collate

from mpt_lightning.data.card import TaskCard
from tests.conftest import VOCABULARY
from tests.gpu.pretended import PretendedGPU
from tests.gpu.trainer import QUIET, trainer

TASKS = ["film", "question"]
CARDS = {
    "film": TaskCard("film", "someone/film", "film : {text}", ["accuracy"], choices=["bad", "good"]),
    "question": TaskCard("question", "someone/question", "question : {text}", ["squad"]),
}
CHOICES = torch.tensor([[10, 1, -100], [11, 12, 1]])


def row(task: int, number: int) -> dict:
    generator = torch.Generator().manual_seed(10 * number + task)
    ids, mask = torch.randint(3, VOCABULARY, (6,), generator=generator), torch.ones(6, dtype=torch.long)
    ids[6 - number % 3 :], mask[6 - number % 3 :] = 0, 0
    found = {"input_ids": ids, "attention_mask": mask, "task_ids": torch.tensor(task)}
    if task == 1:
        return found | {"labels": torch.tensor([20 + number % 4, 1, -100]), "references": ["yes"]}
    gold = number % 2
    return found | {"labels": CHOICES[gold], "references": [["bad", "good"][gold]], "choices": CHOICES}


def collate(rows: list[dict]) -> dict:
    return {
        name: [row[name] for row in rows] if name == "references" else default_collate([row[name] for row in rows])
        for name in rows[0]
    }


def loader(rows: list[dict], size: int) -> DataLoader:
    return DataLoader(rows, batch_size=size, collate_fn=collate)


class TinyData(L.LightningDataModule):
    """One training batch, and two evaluation rows per task."""

    max_input_length = 8

    def __init__(self, tasks: list[str] = TASKS) -> None:
        super().__init__()
        self.tasks = tasks
        self.cards = {task: CARDS[task] for task in tasks}

    def train_dataloader(self) -> DataLoader:
        rows = [row(number % len(self.tasks), number) for number in range(4)]
        return loader([{k: v for k, v in one.items() if k != "choices"} for one in rows], 4)

    def val_dataloader(self) -> list[DataLoader]:
        return [loader([row(task, 20 + number) for number in range(2)], 2) for task in range(len(self.tasks))]

    test_dataloader = predict_dataloader = val_dataloader


class ContextData(TinyData):
    """One task, two of whose training rows are CPT's context."""

    def __init__(self) -> None:
        super().__init__(["film"])
        ids, types = [], []
        for place, example in enumerate([row(0, 0), row(0, 1)]):
            ids += [*example["input_ids"][:4].tolist(), 10 + place, 4]
            types += [4 * place + kind for kind in (1, 2, 2, 3, 4)] + [0]
        self.context = SimpleNamespace(token_ids=ids, token_types=types)

    def train_dataloader(self) -> DataLoader:
        examples = [row(0, n) | {"context_examples": torch.tensor(n if n < 2 else -1)} for n in range(4)]
        return loader([{k: v for k, v in one.items() if k != "choices"} for one in examples], 4)


class Device:
    """The device of a test.

    Attributes:
        name: "cpu" or "cuda".
        tolerance: The largest difference of scores from the CPU's.
    """

    def __init__(self, name: str, tolerance: float, open_device=None) -> None:
        self.name, self.tolerance, self._open = name, tolerance, open_device
        self.gpu: PretendedGPU | None = None

    @contextmanager
    def __call__(self) -> Iterator["Device"]:
        """Open the device for the duration of a `with` block."""
        if self._open is None:
            yield self
            return
        with self._open() as self.gpu:
            yield self
        assert not self.gpu.refused

    def trainer(self, **options) -> L.Trainer:
        if self.gpu is not None:
            return trainer(self.gpu, **options)
        return L.Trainer(**(QUIET | {"accelerator": "cpu" if self.name == "cpu" else "gpu", "devices": 1} | options))


ON_CPU = Device("cpu", 0.0)


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Device:
    """Return the pretended GPU or a real one; `pytest -m gpu -n 0` runs the tests on the latter only."""
    if request.param == "pretended":
        return Device("cuda", 1e-6, PretendedGPU)
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False: no real GPU to run on")
    torch.backends.cudnn.allow_tf32 = False
    return Device("cuda", 1e-3)
