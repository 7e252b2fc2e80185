"""What are tickets compared with? The same masks on fresh weights, and as many units masked at random places.

The comparisons of Frankle & Carbin 2019 (arXiv:1803.03635).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gossamer.sparsifier import Sparsifier
from gossamer.tickets import Ticket
from gossamer.trials import TicketRun, Train, random_mask, reinitialised, train_and_score

KINDS = ("ticket", "reinit", "random_mask")
"""What can be compared: the ticket; its mask on fresh weights; as many units masked at random, on the same weights."""


@dataclass(frozen=True)
class Comparison:
    """One training of `TicketSearch.compare`.

    Args:
        kind: 'ticket', 'reinit' or 'random_mask'.
        round: of the search.
        remaining: as in `TicketRow`.
        score: what `train` returned.
    """

    kind: str
    round: int
    remaining: float
    score: float


@dataclass(frozen=True)
class Controls:
    """Trains what the tickets of a search are compared with.

    Args:
        model: the network, as `train` is given it.
        train: as in `find_ticket`.
        sparsifier: of the network.
        dense: the weights that tickets go back to.
        rewind_step: the optimizer step that these are of.
    """

    model: nn.Module
    train: Train
    sparsifier: Sparsifier
    dense: Mapping[str, Tensor]
    rewind_step: int

    def score(
        self, kind: str, round: int, ticket: Ticket, initialise: Callable[[nn.Module], object] | None, seed: int
    ) -> float:
        """The score of one; the network has the trained weights then.

        Args:
            kind: 'reinit' or 'random_mask'.
            round: of the search.
            ticket: of that round.
            initialise: as in `reinitialised`.
            seed: of the fresh weights or the random mask; every round draws its own.
        """
        seed, done = zlib.crc32(f"{seed}/{round}".encode()), 0
        if kind == "reinit":
            other = reinitialised(self.sparsifier, ticket, initialise, seed)
        else:
            other, done = random_mask(self.sparsifier, ticket, self.dense, seed), self.rewind_step
        run = TicketRun(self.sparsifier, other, round=round, kind=kind, steps_done=done)
        return train_and_score(self.train, self.model, run)
