"""Resuming: a run's arguments that differ from the checkpoint's are reported, or an error."""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim.lr_scheduler import LambdaLR

from mpt_lightning.checkpoint import PromptCheckpoint
from mpt_lightning.errors import MPTError
from mpt_lightning.io import one_line

CHECKPOINT, RUN = "the checkpoint's", "this run's"


class Difference(NamedTuple):
    """An argument, by its name as the user typed it, whose value is not the checkpoint's."""

    argument: str
    now: Any
    saved: Any
    counts: str | None  # CHECKPOINT or RUN, whose value the resumed run uses; None if the two do not fit together

    def __str__(self) -> str:
        values = f"{self.argument}: now {_text(self.now)}, checkpoint {_text(self.saved)}"
        return values if self.counts is None else f"{values} ({self.counts} counts)"


class ResumedRun:
    """A checkpoint's arguments and training state, compared with those of the run that resumes from it.

    `module` is the `CheckpointedModule` with this run's arguments; `found` is the parsed `content` of the checkpoint.
    """

    def __init__(self, module: Any, content: Mapping[str, Any], found: PromptCheckpoint) -> None:
        self.path, self.step = found.path, content.get("global_step")
        self._optimizers, self._schedules = content["optimizer_states"], content["lr_schedulers"]
        # Compared now, since Lightning restores the callbacks right after the module; the optimizers follow later.
        self._found = [*_of_module(module, found), *_of_callbacks(module.trainer, content.get("callbacks", {}))]

    def report(self, trainer: L.Trainer) -> None:
        """Report every argument that differs, in one message, once the optimizers are built.

        A longer or shorter run is allowed: the schedule is this run's, so that a linear one falls to 0 at its end; the
        message contains the learning rates of both. An argument that the checkpoint does not fit is an MPTError.
        """
        found = list(self._found)
        with suppress(AttributeError, IndexError, KeyError, TypeError, ValueError):
            # A damaged state has any content; Lightning fails to restore it right after this, with a message.
            found += [*self._of_optimizers(trainer), *self._of_schedules(trainer)]
        if unfit := [difference for difference in found if difference.counts is None]:
            raise MPTError(
                f"{self.path} cannot be resumed with other arguments than it was trained with: "
                f"{'; '.join(map(str, unfit))}. Set the checkpoint's values, or start a new run without --ckpt_path."
            )
        if found:
            inform = rank_zero_warn if any(item.counts == CHECKPOINT for item in found) else rank_zero_info
            inform(f"Resuming from {self.path} with other arguments: {'; '.join(map(str, found))}.")

    def _of_optimizers(self, trainer: L.Trainer) -> Iterator[Difference]:
        explained = {difference.argument.rpartition(".")[2] for difference in self._found}
        if "optimizer" in explained:
            return
        for optimizer, state in zip(trainer.optimizers, self._optimizers, strict=False):
            for now, saved in zip(optimizer.param_groups, state.get("param_groups", []), strict=False):
                if now.keys() - saved.keys() and saved.keys() - now.keys():
                    yield Difference("optimizer", type(optimizer).__name__, "another class", None)
                    return
                for key in sorted(now.keys() & saved.keys() - {"params", "name"}):
                    # A schedule changes `lr` at every step, and keeps the argument as `initial_lr`.
                    scheduled = key == "lr" and "initial_lr" in now
                    name = "lr" if key == "initial_lr" else key
                    known = name in explained or (name == "lr" and any(a.endswith("lr") for a in explained))
                    if not scheduled and not known and now[key] != saved[key]:
                        of = f" of the group {now['name']}" if "name" in now else ""
                        yield Difference(f"the optimizer's {name}{of}", now[key], saved[key], CHECKPOINT)

    def _of_schedules(self, trainer: L.Trainer) -> Iterator[Difference]:
        for config, state in zip(trainer.lr_scheduler_configs, self._schedules, strict=False):
            if not isinstance(config.scheduler, LambdaLR) or not isinstance(state.get("_last_lr"), list):
                continue
            step, rates = state["last_epoch"], config.scheduler.lr_lambdas
            now = [base * rate(step) for base, rate in zip(state["base_lrs"], rates, strict=False)]
            if not all(map(math.isclose, now, state["_last_lr"])):
                yield Difference(f"learning rate by the schedule at step {step}", now, state["_last_lr"], RUN)


def close_finished_epoch(content: dict[str, Any]) -> None:
    """Change a checkpoint, in place, so that a run that is counted in steps resumes after a finished epoch.

    Lightning 2.6 takes such an epoch for an unfinished one, and ends the next epoch after its first batch.
    """
    loop = content.get("loops", {}).get("fit_loop", {})
    epochs, batches = loop.get("epoch_progress"), loop.get("epoch_loop.batch_progress")
    if not epochs or not batches or not batches["is_last_batch"]:
        return
    if epochs["current"]["completed"] == epochs["current"]["processed"]:
        batches["is_last_batch"] = False
        batches["current"] = dict.fromkeys(batches["current"], 0)


def _of_module(module: Any, found: PromptCheckpoint) -> Iterator[Difference]:
    prefix = "--model." if "_instantiator" in module.hparams else ""
    for name, saved in found.hyper_parameters.items():
        if name.startswith("_") or name not in module.hparams:
            continue
        now = module.hparams[name]
        fixed = name in module.fixed_arguments and now is not None and saved is not None
        if name == "tasks":
            saved, now = found.tasks, now or found.tasks
            # Without names in the data, the batches' task_ids index this list, and the prompt's rows the checkpoint's.
            fixed = not hasattr(getattr(module.trainer, "datamodule", None), "tasks")
        read_once = name in module.initial_arguments or name in found.prompt_config
        of_state = read_once or name.endswith("lr") or name == "weight_decay"
        if now != saved:
            yield Difference(f"{prefix}{name}", now, saved, None if fixed else CHECKPOINT if of_state else RUN)


def _of_callbacks(trainer: L.Trainer, states: Mapping[str, Any]) -> Iterator[Difference]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        saved = states.get(callback.state_key)
        # ModelCheckpoint keeps its arguments, and Lightning reports a folder that changed.
        if not saved or isinstance(callback, ModelCheckpoint):
            continue
        now, arguments = callback.state_dict(), inspect.signature(type(callback).__init__).parameters
        for name in sorted(arguments.keys() & now.keys() & saved.keys()):
            if _text(now[name]) != _text(saved[name]):
                yield Difference(f"{type(callback).__name__}.{name}", now[name], saved[name], CHECKPOINT)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple) and all(isinstance(item, float) for item in value):
        return ", ".join(map(_text, dict.fromkeys(value)))
    return one_line(repr(value))
