"""Several tasks, mixed in each training batch."""

from __future__ import annotations

from typing import Annotated, Any

from torch.utils.data import DataLoader

from mpt_lightning.arguments import PositiveFloat, PositiveInt, Range, check_arguments
from mpt_lightning.data.card import TaskCard, load_card
from mpt_lightning.data.datamodule import PromptDataModule
from mpt_lightning.data.sampling import Sampling, TaskMixSampler
from mpt_lightning.errors import MPTError


class MultitaskDataModule(PromptDataModule):
    """Several tasks, mixed in each training batch; evaluation has one loader per task.

    Args:
        tasks: Names of shipped cards (`mpt tasks` lists them), paths of cards' YAML files, or cards.
        sampling: How a batch is drawn. `stochastic`: K ~ U{2..kappa} tasks with probability proportional to their
            rows, the batch split evenly over them. `proportional`, `uniform`, `temperature`: the task of each row is
            drawn. `all`: every task in each batch.
        kappa: Most tasks in a batch with `stochastic`. Unset: all.
        temperature: With `temperature`, probabilities are proportional to rows ** (1 / temperature); 1 is
            proportional, large is uniform.
        size_limit: A task counts as at most so many rows in these probabilities.
        replace: Whether `stochastic` may draw one task twice, which leaves fewer distinct tasks in the batch.
        options: See `PromptDataModule`.

    Raises:
        MPTError: If there is no such card, or if an option has an impossible value.
    """

    def __init__(
        self,
        tasks: list[str | TaskCard],
        *,
        sampling: Sampling = "stochastic",
        kappa: Annotated[int, Range(2)] | None = None,
        temperature: PositiveFloat = 2.0,
        size_limit: PositiveInt = 2**18,
        replace: bool = True,
        **options: Any,
    ) -> None:
        self.mixing: dict[str, Any] = {
            "sampling": sampling,
            "kappa": kappa,
            "temperature": temperature,
            "size_limit": size_limit,
            "replace": replace,
        }
        check_arguments(MultitaskDataModule, {"tasks": tasks, **self.mixing})
        if kappa is not None and kappa > len(tasks) and not replace:
            raise MPTError(
                f"Got kappa={kappa}, expected at most {len(tasks)}, the number of tasks; change `kappa` or `replace`."
            )
        super().__init__([load_card(task) for task in tasks], **options)
        if self.group_by_length:
            raise MPTError(
                "Got group_by_length=True for several tasks, expected False: task sampling decides which rows share a "
                "batch; change `group_by_length`."
            )
        self._save_options("tasks", tasks, {**self.mixing, **options})

    def train_dataloader(self) -> DataLoader[Any]:
        """Return mixed training batches."""
        sizes = [len(rows) for rows in self._rows("train")]
        return self._train_loader(
            TaskMixSampler(sizes, self.batch_size, **self.mixing, **self._ranks(), seed=self.seed)
        )
