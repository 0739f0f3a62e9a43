"""One task as a LightningDataModule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from mpt_lightning.data.base import PromptDataModule
from mpt_lightning.data.card import TaskCard, load_card, read_card_file
from mpt_lightning.data.sampling import ShuffleSampler


class TaskDataModule(PromptDataModule):
    """One task.

    Args:
        card: The task: a card's fields, the name of a shipped card (`glue/sst2`) or the path of a card's YAML file.
        options: See `PromptDataModule`.

    Raises:
        ValueError: If there is no such card, or if an option has an impossible value.
    """

    def __init__(self, card: TaskCard | str, **options: Any) -> None:
        super().__init__([load_card(card)], **options)
        self._save_options("card", card, options)

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training batches; the last of an epoch may be smaller."""
        (rows,) = self._rows("train")
        lengths = None
        if self.group_by_length:
            chunks = rows.data.column("input_ids").chunks
            lengths = np.concatenate([chunk.value_lengths().to_numpy() for chunk in chunks])
        sampler = ShuffleSampler(len(rows), self.batch_size, *self._ranks(), seed=self.seed, lengths=lengths)
        return self._train_loader(sampler)


def load_task(name_or_path: str | Path | TaskCard, **options: Any) -> TaskDataModule:
    """Load a task.

    Args:
        name_or_path: Name of a shipped card (`mpt tasks` lists them), path of a card's YAML file, or a card.
        **options: Arguments of `TaskDataModule`; they go before those in the card's file.

    Returns:
        The DataModule.

    Raises:
        ValueError: If there is no such card, or if an option is wrong.

    Example:
        >>> from mpt_lightning import load_task
        >>> load_task("glue/sst2", backbone="google-t5/t5-base", k_shot=16).tasks
        ['glue/sst2']
    """
    if isinstance(name_or_path, TaskCard):
        return TaskDataModule(name_or_path, **options)
    # A card's file may set options of its own, such as a longer input.
    written = dict(read_card_file(name_or_path).get("init_args", {}))
    written.pop("card", None)
    return TaskDataModule(load_card(name_or_path), **{**written, **options})
