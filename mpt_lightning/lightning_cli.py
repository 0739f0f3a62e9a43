"""The LightningCLI behind `mpt fit|validate|test|predict`."""

import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException

import mpt_lightning.data  # (so that classes are known by their short names)
import mpt_lightning.modules
from mpt_lightning.callbacks import PredictionWriter
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.cli import fail
from mpt_lightning.errors import own_error
from mpt_lightning.files import one_line
from mpt_lightning.modules.base import NO_PROMPT, PromptModule

LAUNCHERS = "lightning.fabric.plugins.environments"
RESTORES = "lightning.pytorch.trainer.connectors.checkpoint_connector"
TASK_MODULES = (mpt_lightning.data.TaskDataModule, mpt_lightning.data.MultitaskDataModule)


class Parser(LightningArgumentParser):
    """A parser whose errors are one message, without two pages of usage before it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Leave with the message; the package's own where it is the cause."""
        cause = own_error(ex) if ex is not None else None
        fail(str(cause) if cause is not None else " ".join(message.split()))


class MPTCLI(LightningCLI):
    """LightningCLI that takes any module and any data, and does not let a checkpoint replace what was asked for.

    Args:
        args: the arguments; those of the process by default.
        predictions: the file that `predict` writes.
        **kwargs: see `LightningCLI`.
    """

    def __init__(self, args: ArgsType = None, predictions: str | None = None, **kwargs: Any) -> None:
        if predictions is not None:
            kwargs.setdefault("trainer_defaults", {})["callbacks"] = [PredictionWriter(predictions)]
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            parser_class=Parser,
            parser_kwargs={"prog": "mpt", "allow_abbrev": False},
            **kwargs,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then check `--ckpt_path` against the model, since Lightning lets the checkpoint win."""
        # LightningCLI warns of arguments that are not the process's own.
        own, sys.argv = sys.argv, sys.argv[:1]
        try:
            super().parse_arguments(parser, args)
        finally:
            sys.argv = own
        command = self.config.get("subcommand")
        options = self.config.get(command) if command else None
        if options is None or options.get("model") is None:
            return
        name = options.model.class_path.rsplit(".", 1)[-1]
        ours = {cls.__name__: cls for cls in _subclasses(PromptModule)}.get(name)  # type: ignore[type-abstract]
        path = options.get("ckpt_path")
        if ours is not None and command != "fit" and not path and ours.needs_checkpoint(options.model.init_args):
            fail(NO_PROMPT)
        if ours is None or not path or path in ("best", "last", "hpc"):
            return
        checkpoint = read_checkpoint(path)
        ours.check_stage(checkpoint)
        if command == "fit":
            return
        given = options.model.get("init_args")
        self._tell_what_the_checkpoint_overrides(checkpoint, ours.plain_arguments(given.as_dict() if given else {}))

    def _parse_ckpt_path(self) -> None:
        """Keep the arguments of a run that resumes: the module reports where the checkpoint's count instead."""
        if self.config.get("subcommand") != "fit":
            super()._parse_ckpt_path()

    @rank_zero_only
    def _tell_what_the_checkpoint_overrides(self, checkpoint: PromptCheckpoint, given: dict[str, Any]) -> None:
        differ = [
            f"{key}={value!r} instead of {given[key]!r}"
            for key, value in checkpoint.hyper_parameters.items()
            if key in given and given[key] != value
        ]
        if differ:
            print(f"mpt: the checkpoint's arguments are used: {', '.join(differ)}", file=sys.stderr)


def _subclasses(cls: type[PromptModule]) -> set[type[PromptModule]]:
    return {cls}.union(*(_subclasses(child) for child in cls.__subclasses__()))


def run(args: Sequence[str], predictions: str | None = None) -> None:
    """Run a trainer command; a user's mistake ends in one message, not in a traceback."""
    # The process keeps its own arguments: with several devices, Lightning starts the others with the same ones.
    try:
        MPTCLI(list(args), predictions)
    except SIGTERMException:
        # Its own exit status is that of success.
        raise SystemExit(128 + signal.SIGTERM) from None
    except Exception as error:
        message = own_error(error) or _restoring_error(error) or _lightnings_error(error)
        if message is not None:
            fail(str(message))
        if isinstance(error, OSError) and error.filename and error.strerror:
            fail(f"{error.filename}: {error.strerror}. Check the path, what it allows, and the space that is left.")
        raise


def _lightnings_error(error: Exception) -> str | None:
    """Give what Lightning says of arguments that do not fit the machine, or the launcher: torchrun, srun."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if str(frame.f_globals.get("__name__")).startswith(LAUNCHERS):
        return f"{error} The launcher's numbers and --trainer.num_nodes and --trainer.devices must be the same."
    return str(error) if isinstance(error, MisconfigurationException) else None


def _restoring_error(error: Exception) -> str | None:
    """Say that a checkpoint does not fit, where Lightning failed to restore it: it takes what it reads as given."""
    if RESTORES not in {frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__)}:
        return None
    return (
        f"--ckpt_path: the run's state in the checkpoint cannot be restored here ({type(error).__name__}: "
        f"{one_line(error)}). It is damaged, or was saved by another version or with other arguments. Use another "
        "checkpoint of the run, or begin a new one without --ckpt_path."
    )
