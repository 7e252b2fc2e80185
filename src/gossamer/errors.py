"""What goes wrong, said so that the reader knows how to go on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class GossamerError(Exception):
    """Base of every error that Gossamer raises.

    Example:
        >>> issubclass(ArgumentError, GossamerError)
        True
    """


class ArgumentError(GossamerError, ValueError):
    """An argument has a value that cannot be used; the message names it and what would be accepted."""


class TargetError(GossamerError, ValueError):
    """A layer cannot take part, or a layer name matches nothing."""


class StateError(GossamerError, RuntimeError):
    """A call came at a moment at which it cannot be carried out."""


class FileError(GossamerError, ValueError):
    """A file is not what it should be: truncated, foreign, or of another network."""


class GossamerWarning(UserWarning):
    """Something is legal and probably not what was meant."""


def closest(name: str, options: Iterable[str], most: int = 3) -> str:
    """Ends an error message about an unknown name with the likeliest known ones.

    Args:
        name: what was given.
        options: every name that would have been accepted.
        most: how many of them to list at most.

    Returns:
        A sentence that starts with "Closest:", or lists all options where none is close.

    Example:
        >>> closest("large_finl", ["large_final", "random"])
        'Closest: large_final.'
    """
    names = sorted(set(options))
    near = difflib.get_close_matches(str(name), names, n=most, cutoff=0.5)
    if near:
        return f"Closest: {', '.join(near)}."
    if not names:
        return "There is none to choose from."
    shown = ", ".join(names[:20])
    return f"Known: {shown}{', …' if len(names) > 20 else ''}."


def first_line(error: BaseException | None) -> str:
    """What an error says, in one line.

    Example:
        >>> first_line(ValueError("no.\\nTraceback…")), first_line(KeyError())
        ('no.', 'KeyError')
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0].strip() if lines else type(error).__name__
