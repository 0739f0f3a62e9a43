"""`mpt fit|validate|test|predict`: LightningCLI, with a user's mistake as one message."""

import signal
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mpt_lightning.callbacks import PredictionWriter
from mpt_lightning.errors import MPTError, find_error
from mpt_lightning.recipes import MPTCLI


class CommandLine(MPTCLI):
    """MPTCLI with `mpt predict --output`."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument("--output", default="predictions.jsonl", help="The JSONL file to write.")
        return parser

    def _instantiate_trainer(self, config: Any, callbacks: list[L.Callback]) -> L.Trainer:
        if self.subcommand == "predict":
            callbacks = [*callbacks, PredictionWriter(self.config.predict.output)]
        return super()._instantiate_trainer(config, callbacks)


def run(args: Sequence[str]) -> None:
    """Run a trainer command; raise MPTError for a user's mistake, whatever the libraries made of it."""
    try:
        # The process keeps its own arguments: with several devices, Lightning starts the others with the same ones.
        CommandLine(args)
    except SIGTERMException:
        # Its own exit status is that of success.
        raise SystemExit(128 + signal.SIGTERM) from None
    except Exception as error:
        known = find_error(error) or (error if isinstance(error, MisconfigurationException) else None)
        if known is not None:
            raise MPTError(str(known)) from error
        if isinstance(error, OSError) and error.filename and error.strerror:
            raise MPTError(
                f"{error.filename}: {error.strerror}. Check the path, its permissions, and the free disk space."
            ) from error
        raise
