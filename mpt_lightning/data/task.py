"""One task as a LightningDataModule."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from datasets.arrow_dataset import Dataset
from torch.utils.data import DataLoader

from mpt_lightning.data.cache import drawn_examples
from mpt_lightning.data.card import TaskCard, load_card, read_card_file
from mpt_lightning.data.context import Context, build_context
from mpt_lightning.data.datamodule import PromptDataModule, check_allowed, check_counts
from mpt_lightning.data.rows import Draw, ShotsPer, Split
from mpt_lightning.data.sampling import ShuffleSampler
from mpt_lightning.errors import MPTError

ContextRows = Literal["train", "apart"]


class TaskDataModule(PromptDataModule):
    """One task, and examples of it as a context where one is asked for.

    Args:
        card: The task: a card's fields, the name of a shipped card (`glue/sst2`) or the path of a card's YAML file.
        context_shots: Training rows in the context, drawn and shuffled with `seed`. Unset: no context.
        context_per: Count `context_shots` per `class` or per `task`; `balanced` is per task, evenly over its classes. A
            task without classes counts per task.
        context_rows: Train on the rows of the context (`train`), or leave them out of the training rows and draw
            those from the rest (`apart`).
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
        context_shots: int | None = None,
        context_per: ShotsPer = "class",
        context_rows: ContextRows = "train",
        max_context_length: int | None = None,
        separator: str = "\n",
        **options: Any,
    ) -> None:
        super().__init__([load_card(card)], **options)
        check_counts(context_shots=context_shots, max_context_length=max_context_length)
        check_allowed("context_per", context_per, get_args(ShotsPer))
        check_allowed("context_rows", context_rows, get_args(ContextRows))
        self.context_rows = context_rows
        self.max_context_length = max_context_length
        self.separator = separator
        self._context: Context | None = None
        self._has_context = context_shots is not None
        self._context_draw = Draw(context_shots, context_per, seed=self.seed, options=("context_shots", "context_per"))
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
        chosen: dict[str, Any] = {
            "context_shots": context_shots,
            "context_per": context_per,
            "context_rows": context_rows,
            "max_context_length": max_context_length,
            "separator": separator,
        }
        self._save_options("card", card, {**chosen, **options})

    @property
    def context(self) -> Context | None:
        """The context, which begins with BOS where the tokenizer adds one; None without `context_shots`.

        Raises:
            MPTError: If `setup` has not run.
        """
        if self._has_context and self._context is None:
            raise MPTError("Got no context yet, expected it to be built; call `setup` first.")
        return self._context

    def _load(self, split: Split) -> None:
        # Every stage needs the context, and its errors should come before those of the rows.
        if self._has_context and self._context is None:
            (card,) = self.cards.values()
            drawn = drawn_examples(card, "train", self._context_draw, self.data_root, self.cache_dir)
            ordered = [drawn[place] for place in self._context_order(len(drawn))]
            self._context = build_context(card, ordered, self.encoder, self.separator, self.max_context_length)
        super()._load(split)

    def _context_order(self, size: int) -> np.ndarray:
        # Not the generator of the draw: its permutation would be the same one where all rows are drawn.
        return np.random.default_rng((self.seed, 1)).permutation(size)

    def _train_rows(self) -> Dataset:
        rows = super()._train_rows()
        if not self._has_context:
            return rows
        copies = np.argsort(self._context_order(len(rows))) if self.context_rows == "train" else np.full(len(rows), -1)
        return rows.add_column("context_examples", copies)

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
        MPTError: If there is no such card, or if an option is wrong.

    Example:
        >>> from mpt_lightning import load_task
        >>> load_task("glue/sst2", backbone="google-t5/t5-base", k_shot=16).tasks
        ['glue/sst2']
    """
    if isinstance(name_or_path, TaskCard):
        return TaskDataModule(name_or_path, **options)
    card = load_card(name_or_path)
    # A card's file may set options of its own, such as a longer input.
    written = dict(read_card_file(name_or_path).get("init_args", {}))
    written.pop("card", None)
    return TaskDataModule(card, **{**written, **options})
