"""What is said during a fit, and in which words?"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from gossamer.errors import GossamerWarning
from gossamer.report import SparsityReport


class Voice:
    """Prints what a fit has to say; or nothing.

    Args:
        verbose: whether to print.

    Example:
        >>> voice = Voice(verbose=True)
        >>> voice.say_once("Hello"); voice.say_once("Hello")
        Hello
    """

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        self.said: set[str] = set()  # what is not said twice
        self.line = ""  # of this epoch, until fastai has printed its row

    def say(self, text: str) -> None:
        """Prints a line."""
        if self.verbose:
            print(text)

    def say_once(self, text: str, topic: str = "") -> None:
        """Prints a line, once a run.

        Args:
            text: the line.
            topic: what is said once, where its words change; by default the words.
        """
        if (topic or text) not in self.said:
            self.said.add(topic or text)
            self.say(text)

    def say_line(self) -> None:
        """Prints the epoch's line, if there is one."""
        if self.line:
            self.say(self.line)
        self.line = ""

    def say_end(
        self, asked: Any, report: SparsityReport, targets: Iterable[str], at_target: bool, shared_unit: str = ""
    ) -> None:
        """Prints what a fit came to.

        Args:
            asked: the sparsity that was asked for.
            report: counted from the weights that the fit leaves.
            targets: names of the layers that have a target.
            at_target: whether the schedule came to its end.
            shared_unit: the granularity, where layers share one target of units that differ in size; else ''.
        """
        if isinstance(asked, dict):
            final = str({r.layer: round(r.sparsity, 2) for r in report.rows if r.layer in targets})
        else:
            final = f"{report.sparsity:.2f}%"
        self.say(f"Final Sparsity: {final}")
        if shared_unit and not isinstance(asked, dict) and abs(report.sparsity - asked) >= 0.005:
            self.say(
                f"The {asked}% asked for count units of granularity {shared_unit!r}, which layers have in different "
                "sizes; all else that is printed counts weights"
            )
        if not at_target:
            self.say(f"The fit ended before its schedule did, so the target of {asked}% is not reached")
        self.say(str(report))


def first_line(method: str, granularity: str, asked: Any) -> str:
    """What is said before the first epoch.

    Example:
        >>> first_line("gradual", "weight", 50), first_line("rigl", "weight", 90)
        ('Pruning of weight until a sparsity of 50%', "Training by method 'rigl' with weight at a sparsity of 90%")
    """
    if method == "gradual":
        return f"Pruning of {granularity} until a sparsity of {asked}%"
    return f"Training by method {method!r} with {granularity} at a sparsity of {asked}%"


def epoch_line(epoch: int, sparsity: float, is_average: bool) -> str:
    """What is said of an epoch.

    Example:
        >>> epoch_line(0, 20.0, is_average=False)
        'Sparsity at the end of epoch 0: 20.00%'
    """
    return f"Sparsity at the end of epoch {epoch}: {'avg=' if is_average else ''}{sparsity:.2f}%"


def zeros_line(zeros: int, of: int) -> str:
    """What is said of zeros that were there before the fit.

    Example:
        >>> zeros_line(1500, of=3000)
        'Keeping the 1,500 zeros that are there (50.00%); keep_zeros=False would let them grow'
    """
    return f"Keeping the {zeros:,} zeros that are there ({100 * zeros / of:.2f}%); keep_zeros=False would let them grow"


def warn_of_denser_weights(sparsity: float) -> None:
    """Says that weights that were loaded at a fit's end are not masked.

    Args:
        sparsity: percent that is zero now.
    """
    warnings.warn(
        f"weights that were loaded after training lack the final masks: {sparsity:.2f} % are zero. "
        "A best checkpoint from before the target does that; use SaveSparseModelCallback, which keeps the best "
        "of those at the target",
        GossamerWarning,
        stacklevel=3,
    )
