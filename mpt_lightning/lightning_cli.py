"""The LightningCLI behind `mpt fit|validate|test|predict`."""

import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import lightning.pytorch as L
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

import mpt_lightning.data  # (so that classes are known by their short names)
import mpt_lightning.modules
from mpt_lightning.callbacks import PredictionWriter
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.modules.base import NO_PROMPT, PromptModule

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
        super().parse_arguments(parser, args)
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
        given = options.model.get("init_args")
        self._tell_what_the_checkpoint_overrides(checkpoint, ours.plain_arguments(given.as_dict() if given else {}))

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
    # LightningCLI warns when it is given arguments that are not the process's.
    sys.argv = ["mpt", *args]
    try:
        MPTCLI(predictions=predictions)
    except (ValueError, OSError) as error:
        cause = own_error(error)
        if cause is None:
            raise
        fail(str(cause))


def own_error(error: BaseException) -> BaseException | None:
    """Find the error that this package raised for the user, in a chain of errors that others wrapped around it."""
    link: BaseException | None = error
    while link is not None:
        frames = list(traceback.walk_tb(link.__traceback__))
        raised_in = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
        if isinstance(link, (ValueError, OSError)) and raised_in.startswith("mpt_lightning"):
            return link
        link = link.__cause__ or link.__context__
    return None


def fail(message: str) -> NoReturn:
    """Print one message, and leave."""
    print(f"mpt: error: {message}", file=sys.stderr)
    raise SystemExit(2)
