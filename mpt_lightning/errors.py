"""Telling the errors that this package raises for its users from those of the libraries under it."""

import traceback

from lightning.fabric.utilities.exceptions import MisconfigurationException

OWN = (ValueError, OSError, MisconfigurationException)
"""What the package raises for its users."""


def own_error(error: BaseException) -> BaseException | None:
    """Find the error that this package raised for the user, in a chain of errors that others wrapped around it."""
    link: BaseException | None = error
    seen: list[BaseException] = []
    # An error that was taken out of another one's cause and raised again has that one as its context: a circle.
    while link is not None and link not in seen:
        seen.append(link)
        frames = list(traceback.walk_tb(link.__traceback__))
        raised_in = str(frames[-1][0].f_globals.get("__name__", "")) if frames else ""
        if isinstance(link, OWN) and raised_in.startswith("mpt_lightning"):
            return link
        link = link.__cause__ or link.__context__
    return None
