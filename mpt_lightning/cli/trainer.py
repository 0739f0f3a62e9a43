"""`mpt fit|validate|test|predict`: a user's mistake ends in one message."""

import signal
from collections.abc import Sequence

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.exceptions import SIGTERMException

from mpt_lightning.callbacks import PredictionWriter
from mpt_lightning.cli.exit import fail
from mpt_lightning.errors import find_error
from mpt_lightning.recipes import MPTCLI


def run(args: Sequence[str], predictions: str | None = None) -> None:
    """Run a trainer command; a user's mistake ends in one message, not in a traceback."""
    # The process keeps its own arguments: with several devices, Lightning starts the others with the same ones.
    try:
        callbacks = [] if predictions is None else [PredictionWriter(predictions)]
        MPTCLI(list(args), trainer_defaults={"callbacks": callbacks} if callbacks else None)
    except SIGTERMException:
        # Its own exit status is that of success.
        raise SystemExit(128 + signal.SIGTERM) from None
    except Exception as error:
        known = find_error(error) or (error if isinstance(error, MisconfigurationException) else None)
        if known is not None:
            fail(str(known))
        if isinstance(error, OSError) and error.filename and error.strerror:
            fail(f"{error.filename}: {error.strerror}. Check the path, what it allows, and the space that is left.")
        raise
