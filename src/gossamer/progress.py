"""A bar that shows how far something is, where tqdm is installed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any


@contextlib.contextmanager
def bar(show: bool, total: int, done: int = 0, unit: str = "") -> Generator[Callable[[str], None]]:
    """Shows a bar while the block runs.

    Args:
        show: whether to.
        total: how many steps there are.
        done: how many of them were done before.
        unit: what a step is called.

    Yields:
        A function that counts one more step, and shows a text beside the bar.

    Example:
        >>> with bar(False, 2) as advance:
        ...     advance("half of it")
    """
    tqdm: Any = None
    if show:
        with contextlib.suppress(ImportError):
            from tqdm import tqdm
    if tqdm is None:
        yield lambda _: None
        return
    with tqdm(total=total, initial=done, unit=unit) as shown:

        def advance(text: str) -> None:
            shown.set_postfix_str(text, refresh=False)
            shown.update()

        yield advance
