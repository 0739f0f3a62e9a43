"""The base class of the DataModules: options, loading, caching, evaluation loaders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from datasets.arrow_dataset import Dataset
from datasets.combine import concatenate_datasets
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from mpt_lightning.arguments import NonNegativeInt, PositiveInt, check_arguments
from mpt_lightning.backbones.base import OVER
from mpt_lightning.data.cache import RowCache
from mpt_lightning.data.card import TaskCard
from mpt_lightning.data.context import Context
from mpt_lightning.data.loader import Choices, PromptCollator, ResumableLoader
from mpt_lightning.data.rows import SPLIT_SEED, Draw, ShotsPer, Split
from mpt_lightning.data.sampling import EvalSampler, GlobalBatchSampler
from mpt_lightning.data.template import apply_pattern, count_slots
from mpt_lightning.data.tokenize import Encoder
from mpt_lightning.data.vocabulary import check_choices, check_targets, warn_of_unknown_inputs
from mpt_lightning.errors import MPTError

_TRAIN_COLUMNS = ["input_ids", "labels", "task_ids", "row_id"]


class PromptDataModule(L.LightningDataModule):
    """One or more tasks as batches of token ids.

    Args:
        cards: The tasks, in the order of their ids.
        backbone: Hub id or local folder of the model whose tokenizer is used. Unset: the module's `backbone`.
        data_root: Folder to read instead of the Hub: `<data_root>/<last part of path>[/<subset>]/<split>.parquet` (or
            .jsonl, .json, .csv). Unset: the environment variable MPT_DATA_ROOT, else the Hub.
        batch_size: Training rows per device and batch.
        eval_batch_size: Evaluation rows per device and batch. Unset: `batch_size`.
        max_input_length: Most tokens of an input; the card names the column that is cut to fit.
        answer_prefix: Words between the input and the answer, such as `label:`; joined with one space, never cut. For
            an encoder-decoder, the end of the encoder's input.
        pattern: Which of the cards' `patterns` is the input, from 0. Unset: the card's `input`.
        k_shot: Number of training rows, drawn with `seed`. Unset: all rows.
        shots_per: Count `k_shot` per `class` or per `task`; `balanced` is per task, evenly over its classes. A task
            without classes counts per task.
        dev_shot: Number of training rows that replace the validation rows, drawn with `seed` and counted like `k_shot`:
            checkpoints are then chosen as from few labelled rows (Perez et al., 2021), and the validation split is
            never read. None of them is a training row, in a training row's group or in the context. Without `k_shot`
            training has all the others. Unset: the validation split.
        max_train_rows: Most training rows per task, drawn with `seed`. Unset: all.
        max_eval_rows: Most validation, test and prediction rows per task, the same for every seed; not those of
            `dev_shot`. Unset: all.
        seed: Seed of draws and of the order of training rows.
        group_by_length: Put rows of similar length into one batch (single task only).
        predict_split: Split that `predict` reads: `train`, `validation` or `test`.
        cache_dir: Folder for cached data. Unset: the default of `datasets`.
        num_workers: Number of processes that load batches; 0 is the main process.

    Raises:
        MPTError: If an option has an impossible value.
    """

    def __init__(
        self,
        cards: Sequence[TaskCard],
        *,
        backbone: str | None = None,
        data_root: str | None = None,
        batch_size: PositiveInt = 32,
        eval_batch_size: PositiveInt | None = None,
        max_input_length: PositiveInt = 256,
        answer_prefix: str = "",
        pattern: int | None = None,
        k_shot: PositiveInt | None = None,
        shots_per: ShotsPer = "class",
        dev_shot: PositiveInt | None = None,
        max_train_rows: PositiveInt | None = None,
        max_eval_rows: PositiveInt | None = None,
        seed: int = 42,
        group_by_length: bool = False,
        predict_split: Split = "test",
        cache_dir: str | None = None,
        num_workers: NonNegativeInt = 0,
    ) -> None:
        check_arguments(PromptDataModule, locals())
        super().__init__()
        # With fewer evaluation rows than devices some device has none.
        self.allow_zero_length_dataloader_with_multiple_devices = True
        if not (names := [card.name for card in cards]) or len(set(names)) < len(names):
            raise MPTError(f"Got tasks {names}, expected one or more different names; change `tasks`.")
        if pattern is not None:
            cards = [apply_pattern(card, pattern) for card in cards]
        self.cards = {card.name: card for card in cards}
        self.backbone = backbone
        self.data_root = data_root
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.max_input_length = max_input_length
        self.answer_prefix = answer_prefix
        self.group_by_length = group_by_length
        self.predict_split: Split = predict_split
        self.seed = seed
        self.cache_dir = cache_dir
        self.num_workers = num_workers
        self._train_draw = Draw("train", k_shot, shots_per, max_train_rows, seed)
        self._dev_draw: Draw | None = None
        if dev_shot is not None:
            self._dev_draw = Draw("validation", dev_shot, shots_per, seed=seed, options=("dev_shot", "shots_per"))
        # The same evaluation rows for every seed, so that a deviation over seeds comes from training alone.
        self._eval_draw = Draw(max_rows=max_eval_rows, seed=SPLIT_SEED)
        self._has_context = False
        self._encoder: Encoder | None = None
        self._splits: dict[Split, list[Dataset]] = {}
        self._warned: set[str] = set()

    def _save_options(self, name: str, cards: Sequence[Any], options: dict[str, Any]) -> None:
        """Save the arguments as primitives; unlogged, since the module may have arguments of the same name."""
        plain = [asdict(card) if isinstance(card, TaskCard) else card for card in cards]
        # With the environment's folder: a model card names a Hub data set only if the rows came from the Hub.
        root = self.data_root or os.environ.get("MPT_DATA_ROOT") or None
        saved = {name: plain if name == "tasks" else plain[0], **options, "data_root": root}
        self.save_hyperparameters(saved, logger=False)

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks; a task's index in the list is its id."""
        return list(self.cards)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Tokenizer of the backbone."""
        return self.encoder.tokenizer

    @property
    def context(self) -> Context | None:
        """Examples that come before every row; None without a context."""
        return None

    @property
    def prompt_slots(self) -> dict[str, int]:
        """Number of slots for a prompt's tokens among the inputs (`[prompt*4]`), by task; only tasks with slots."""
        counts = {name: count_slots(card.input + self.answer_prefix) for name, card in self.cards.items()}
        return {name: count for name, count in counts.items() if count}

    @property
    def encoder(self) -> Encoder:
        """How the backbone reads and writes text."""
        if self._encoder is None:
            module = self.trainer.lightning_module if self.trainer is not None else None
            backbone = self.backbone or getattr(module, "hparams", {}).get("backbone")
            if not backbone:
                raise MPTError(
                    "Got no backbone to take the tokenizer from, expected a Hub id or a folder; set `backbone` of the "
                    "DataModule, or use a module with a hyperparameter `backbone`."
                )
            self._encoder = Encoder.from_backbone(
                str(backbone),
                self.max_input_length,
                answer_prefix=self.answer_prefix,
                with_bos=not self._has_context,
                classifies=getattr(module, "head", None) == "classification",
            )
        return self._encoder

    @property
    def num_train_rows(self) -> int:
        """Training rows of all tasks together, after `setup`."""
        return sum(len(rows) for rows in self._rows("train"))

    def prepare_data(self) -> None:
        """Download and tokenise, once per node."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Read the tokenised rows of a stage (`fit`, `validate`, `test`, `predict`; unset: `fit`) from the cache."""
        if stage is None and self.trainer is not None and self.trainer.state.fn is not None:
            stage = self.trainer.state.fn.value
        evaluated: dict[Any, Split] = {"validate": "validation", "test": "test", "predict": self.predict_split}
        if stage in evaluated:
            self._load(evaluated[stage])
            return
        self._load("train")
        if self.trainer is None or self.trainer.limit_val_batches != 0:
            self._load("validation")

    def _load(self, split: Split) -> None:
        if split in self._splits:
            return
        draw = self._draw(split)
        tables = []
        for name, card in self.cards.items():
            read = card.for_classifier() if self.encoder.classifies else card.for_family(self.encoder.family)
            self.cards[name] = read
        for card in self.cards.values():
            check_choices(card, self.tokenizer, self.encoder.family, self.encoder.classifies)
        for task_id, card in enumerate(self.cards.values()):
            rows = RowCache(self.data_root, self.cache_dir).encoded(card, draw, self.encoder)
            check_targets(card, rows, split, self.encoder)
            if card.name not in self._warned and warn_of_unknown_inputs(card, rows, split, self.encoder):
                self._warned.add(card.name)
            if cut := int(rows.data.column("cut").to_numpy().sum()):
                rank_zero_info(
                    f"{card.name}: {cut:,} of {len(rows):,} {split} rows were cut to "
                    f"max_input_length={self.max_input_length} tokens."
                )
            tables.append(rows.add_column("task_ids", np.full(len(rows), task_id)))
        self._splits[split] = tables

    def _draw(self, split: Split) -> Draw:
        """Return which rows a split has. With `k_shot` training rows are drawn before dev rows, without it after."""
        train, dev = self._train_draw, self._dev_draw
        if dev and train.k_shot:
            dev = replace(dev, beside=train)
        elif dev:
            dev = replace(dev, beside=train.beside)
            train = replace(train, beside=dev)
        if split == "train":
            return train
        return dev if dev and split == "validation" else replace(self._eval_draw, split=split)

    def _rows(self, split: Split) -> list[Dataset]:
        if split not in self._splits:
            raise MPTError(f"Got no '{split}' rows, expected them to be loaded; call `setup` first.")
        return self._splits[split]

    def _ranks(self) -> dict[str, Any]:
        trainer = self.trainer
        return {} if trainer is None else {"num_replicas": trainer.world_size, "rank": trainer.global_rank}

    def _train_rows(self) -> Dataset:
        columns = [*_TRAIN_COLUMNS, "choices", "shares"] if self._trains_on_choices() else _TRAIN_COLUMNS
        return concatenate_datasets(self._rows("train")).select_columns(columns)

    def _trains_on_choices(self) -> bool:
        """Return whether the module's loss is over the tasks' choices, which training batches have then."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        return self.encoder.classifies or (getattr(module, "over", None) or OVER[self.encoder.family]) == "choices"

    def _choices(self, card: TaskCard) -> Choices:
        """Return the ids of a task's choices, if they do not depend on the input and come with the rows."""
        return self.encoder.format.targets(card.words(self.encoder.family) or [])

    def _train_loader(self, sampler: GlobalBatchSampler) -> DataLoader[Any]:
        rows: Any = self._train_rows()
        collator = PromptCollator(self.encoder.pad_id)
        if self._trains_on_choices() and not self.encoder.format.continues:
            collator.choices = dict(enumerate(map(self._choices, self.cards.values())))
        options = self._loading(self.batch_size, collator)
        if getattr(self.trainer, "overfit_batches", 0) > 0:
            # Lightning would replace our sampler by a sequential one, which yields the first task only.
            return DataLoader(rows.select(list(sampler)), **options)
        return ResumableLoader(rows, sampler=sampler, **options)

    def _eval_loaders(self, split: Split) -> list[DataLoader[Any]]:
        loaders: list[DataLoader[Any]] = []
        in_step = getattr(self.trainer and self.trainer.strategy, "ranks_in_step", False)
        tables: list[Any] = self._rows(split)
        for task_id, (card, rows) in enumerate(zip(self.cards.values(), tables, strict=True)):
            collator = PromptCollator(self.encoder.pad_id)
            if not self.encoder.format.continues:
                collator.choices = {task_id: self._choices(card)}
            options = self._loading(self.eval_batch_size, collator)
            sampler = EvalSampler(rows, **self._ranks(), even=in_step)
            loaders.append(DataLoader(rows, sampler=sampler, **options))
        return loaders

    def _loading(self, batch_size: int, collate: PromptCollator) -> dict[str, Any]:
        return {
            "batch_size": batch_size,
            "collate_fn": collate,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """Return one validation loader per task, in the order of `tasks`."""
        return self._eval_loaders("validation")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one test loader per task, in the order of `tasks`."""
        return self._eval_loaders("test")

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader per task over `predict_split`, in the order of `tasks`."""
        return self._eval_loaders(self.predict_split)
