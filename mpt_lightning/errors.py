"""The error that a user's mistake ends in."""

from __future__ import annotations


class MPTError(ValueError):
    """A message for the user: what was wrong, what was expected, and what to change.

    Everything that this package raises because of an argument, a file or a machine is of this class.
    """


def find_error(error: BaseException) -> MPTError | None:
    """Return the package's own error in a chain of causes, for libraries that wrap what they call; None without one."""
    link: BaseException | None = error
    seen: set[int] = set()
    # A cause that was raised again has the error it caused as its context: a circle.
    while link is not None and id(link) not in seen:
        if isinstance(link, MPTError):
            return link
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return None
