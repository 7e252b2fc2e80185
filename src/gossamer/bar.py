"""A progress bar, where tqdm is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def training_bar(progress: bool, total: int, done: int = 0) -> Generator[Callable[[str], None]]:
    """Shows how many of several trainings are done.

    Args:
        progress: whether to show anything.
        total: trainings.
        done: of these, before.

    Yields:
        To be called with a text after each of them.

    Example:
        >>> with training_bar(progress=False, total=2) as advance:
        ...     advance("80 % left: 0.9")
    """
    tqdm: Any = None
    if progress:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm
    if tqdm is None:
        yield lambda _: None
        return
    with tqdm(total=total, initial=done, unit="training") as bar:

        def advance(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        yield advance
