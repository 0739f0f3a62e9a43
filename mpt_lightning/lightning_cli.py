"""The LightningCLI behind `mpt fit|validate|test|predict`."""

import sys
import traceback
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

import mpt_lightning.data
import mpt_lightning.modules  # noqa: F401  (so that classes are known by their short names)
from mpt_lightning.checkpoint import PromptCheckpoint, read_checkpoint
from mpt_lightning.modules.base import PromptModule


class MPTCLI(LightningCLI):
    """LightningCLI that takes any module and any data, and does not let a checkpoint replace what was asked for."""

    def __init__(self, args: ArgsType = None, **kwargs: Any) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=args,
            seed_everything_default=42,
            auto_configure_optimizers=False,
            save_config_callback=SaveConfigCallback,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"prog": "mpt", "allow_abbrev": False},
            **kwargs,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, then check `--ckpt_path` against the model, since Lightning lets the checkpoint win."""
        super().parse_arguments(parser, args)
        command = self.config.get("subcommand")
        options = self.config.get(command) if command else None
        path = options.get("ckpt_path") if options else None
        if path and path not in ("best", "last", "hpc"):
            self._guard(parser, read_checkpoint(path), options)

    def _guard(self, parser: LightningArgumentParser, checkpoint: PromptCheckpoint, options: Any) -> None:
        model = options.model
        name = model.class_path.rsplit(".", 1)[-1]
        known = {cls.__name__: cls for cls in _subclasses(PromptModule)}
        if name in known and name != checkpoint.stage:
            known[name].check_stage(known[name].__new__(known[name]), checkpoint)
        if name not in known:
            parser.error(f"--ckpt_path {path_of(checkpoint)} was saved by {checkpoint.stage}, not by {name}.")


def path_of(checkpoint: PromptCheckpoint) -> str:
    """Give a checkpoint's path."""
    return checkpoint.path


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*(_subclasses(child) for child in cls.__subclasses__()))


def run(args: Sequence[str]) -> None:
    """Run a trainer command; a user's mistake ends in one message, not in a traceback."""
    try:
        MPTCLI(list(args))
    except (ValueError, OSError) as error:
        if not _is_ours(error):
            raise
        print(f"mpt: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _is_ours(error: BaseException) -> bool:
    """Whether this package raised the error itself, with a message for the user."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and str(frames[-1][0].f_globals.get("__name__", "")).startswith("mpt_lightning")
