"""One task as a LightningDataModule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets.arrow_dataset import Dataset
from torch.utils.data import DataLoader

from mpt_lightning.arguments import PositiveInt, check_arguments
from mpt_lightning.data.cache import RowCache
from mpt_lightning.data.card import TaskCard, load_card, read_card_file
from mpt_lightning.data.context import Context, build_context
from mpt_lightning.data.datamodule import PromptDataModule
from mpt_lightning.data.rows import Draw, ShotsPer, Split
from mpt_lightning.data.sampling import ShuffleSampler
from mpt_lightning.errors import MPTError


class TaskDataModule(PromptDataModule):
    """One task, optionally with some of its examples as a context.

    Args:
        card: The task: a card's fields, the name of a shipped card (`glue/sst2`) or the path of a card's YAML file.
        context_shots: Training rows in the context, drawn and shuffled with `seed`. Unset: no context.
        context_per: What `context_shots` counts, like `shots_per`.
        context_rows: Train on the rows of the context (`train`; `dev_shot` is then counted like `context_shots`), or
            draw the training rows from the others (`apart`).
        max_context_length: Most tokens of the context. Unset: as many as its examples have.
        separator: Text after each example of the context, a line break by default. Empty: none.
        options: See `PromptDataModule`.

    Raises:
        MPTError: If there is no such card, or if an option has an impossible value.
    """

    def __init__(
        self,
        card: TaskCard | str,
        *,
        context_shots: PositiveInt | None = None,
        context_per: ShotsPer = "class",
        context_rows: Literal["train", "apart"] = "train",
        max_context_length: PositiveInt | None = None,
        separator: str = "\n",
        **options: Any,
    ) -> None:
        chosen = {
            "context_shots": context_shots,
            "context_per": context_per,
            "context_rows": context_rows,
            "max_context_length": max_context_length,
            "separator": separator,
        }
        check_arguments(TaskDataModule, chosen)
        super().__init__([load_card(card)], **options)
        self.context_rows = context_rows
        self.max_context_length = max_context_length
        self.separator = separator
        self._context: Context | None = None
        self._has_context = context_shots is not None
        self._context_draw = Draw(
            "train", context_shots, context_per, seed=self.seed, options=("context_shots", "context_per")
        )
        if self._has_context and context_rows == "apart":
            self._train_draw = replace(self._train_draw, beside=self._context_draw)
        elif self._has_context:
            for option in ("k_shot", "max_train_rows"):
                if options.get(option) is not None:
                    raise MPTError(
                        f"Got {option}={options[option]} with context_rows='train', where the context's rows are the "
                        f"training rows, expected none; unset `{option}`, or set `context_rows` to `apart`."
                    )
            self._train_draw = self._context_draw
            if self._dev_draw is not None:
                self._dev_draw = replace(self._dev_draw, shots_per=context_per, options=("dev_shot", "context_per"))
        self._save_options("card", [card], {**chosen, **options})

    @property
    def context(self) -> Context | None:
        """The context, which begins with BOS if the tokenizer adds one; None without `context_shots`."""
        if self._has_context and self._context is None:
            raise MPTError("Got no context yet, expected it to be built; call `setup` first.")
        return self._context

    def _load(self, split: Split) -> None:
        # Every stage needs the context, and its errors should come before those of the rows.
        if self._has_context and self._context is None:
            (card,) = self.cards.values()
            drawn = RowCache(self.data_root, self.cache_dir).examples(card, self._context_draw)
            ordered = [drawn[index] for index in self._context_order(len(drawn))]
            self._context = build_context(card, ordered, self.encoder, self.separator, self.max_context_length)
        super()._load(split)

    def _context_order(self, size: int) -> np.ndarray:
        # Not the generator of the draw: its permutation would be the same one if all rows are drawn.
        return np.random.default_rng((self.seed, 1)).permutation(size)

    def _train_rows(self) -> Dataset:
        rows = super()._train_rows()
        if not self._has_context:
            return rows
        copies = np.argsort(self._context_order(len(rows))) if self.context_rows == "train" else np.full(len(rows), -1)
        return rows.add_column("context_examples", copies)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return shuffled training batches; the last of an epoch may be smaller."""
        (rows,) = self._rows("train")
        lengths = (
            rows.data.column("input_ids").combine_chunks().value_lengths().to_numpy() if self.group_by_length else None
        )
        sampler = ShuffleSampler(len(rows), self.batch_size, **self._ranks(), seed=self.seed, lengths=lengths)
        return self._train_loader(sampler)


def load_task(name_or_path: str | Path | TaskCard, **options: Any) -> TaskDataModule:
    """Return the DataModule of a card, of the name of a shipped one (`mpt tasks` lists them), or of a YAML file's path.

    `options` are arguments of `TaskDataModule`; they override those in the card's file.

    Raises:
        MPTError: If there is no such card, or if an option is wrong.

    Example:
        >>> from mpt_lightning import load_task
        >>> load_task("glue/sst2", backbone="google-t5/t5-base", k_shot=16).tasks
        ['glue/sst2']
    """
    if isinstance(name_or_path, TaskCard):
        return TaskDataModule(name_or_path, **options)
    card = load_card(name_or_path)
    # A card's file may set options, such as a longer input.
    written = read_card_file(name_or_path).get("init_args", {})
    return TaskDataModule(**{**written, **options, "card": card})
