"""The rounds of a search for tickets: train, mask the least, go back, and again; all kept, to train and compare."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gossamer.comparing import KINDS, Comparison, Controls
from gossamer.errors import ArgumentError, TargetError, closest
from gossamer.masks import unpack
from gossamer.plots import plot_lottery
from gossamer.progress import bar
from gossamer.search_rates import after_rounds
from gossamer.search_record import Record, Saved
from gossamer.sparsifier import Sparsifier
from gossamer.tickets import Ticket, ticket_of
from gossamer.trials import TicketRun, Train, put_masks, reinitialised, train_and_score
from gossamer.weights import check_weights, copy_of, not_finite, put_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class TicketRow:
    """One round of a search.

    Args:
        round: 0 for the dense network.
        remaining: weights that the masks keep, in percent of those that take part, counted.
        score: what `train` returned.
        steps: how many optimizer steps that training took.
    """

    round: int
    remaining: float
    score: float
    steps: int
    _make: Callable[[int], Ticket] = field(repr=False, compare=False)

    @property
    def ticket(self) -> Ticket:
        """The ticket that was trained, made anew at every call."""
        return self._make(self.round)


class TicketSearch:
    """The rounds of a search, from `find_ticket`.

    Args:
        model: the network, as `train` is given it.
        train: as in `find_ticket`.
        sparsifier: of the network, dense as yet.
        shares: layer name → fraction of its surviving units that a round masks.
        rewind_step: as in `find_ticket`.

    Example:
        >>> from gossamer.lottery import find_ticket
        >>> def train(model, run):
        ...     run.step()
        ...     return 1 - run.round / 10
        >>> search = find_ticket(nn.Linear(8, 8), train, rounds=3, rate=50, progress=False)
        >>> print(search)
        round  remaining %  score  steps
            0       100.00      1      1
            1        50.00    0.9      1
            2        25.00    0.8      1
            3        12.50    0.7      1
        >>> search.best(at_most=25).round
        2
    """

    def __init__(
        self,
        model: nn.Module,
        train: Train,
        sparsifier: Sparsifier,
        shares: Mapping[str, Fraction],
        rewind_step: int,
    ) -> None:
        self.rows: list[TicketRow] = []
        self.model = model
        self.rewind_step = rewind_step
        self._sparsifier = sparsifier
        self._train = train
        self._shares = shares
        self._rewind: dict[str, Tensor] = {}
        self._record: Record | None = None
        self._masks: list[dict[str, Tensor]] = []  # eight to a byte, one dict a round

    def ticket(self, round: int) -> Ticket:
        """The ticket that a round trained, made anew at every call.

        Args:
            round: 0 gives the dense network.

        Raises:
            ArgumentError: there was no such round.
        """
        self._use(round)
        return ticket_of(self._sparsifier, self._rewind)

    def best(self, at_most: float = 100.0) -> TicketRow:
        """The round with the highest score; the sparser one where two are level.

        Args:
            at_most: percent of weights that may remain.

        Raises:
            ArgumentError: every round left more.
        """
        rows = [row for row in self.rows if row.remaining <= at_most]
        if not rows:
            raise ArgumentError(
                f"at_most={at_most!r}: the last round has {self.rows[-1].remaining:.2f} % left; ask for that"
            )
        return max(rows, key=lambda row: (row.score, row.round))

    def train(self, round: int) -> float:
        """Trains the ticket of a round again; the network has the trained weights then.

        Args:
            round: 0 trains the dense network from the weights that tickets go back to.

        Returns:
            The score, that of the round where `train` gives the same each time.

        Raises:
            ArgumentError: there was no such round.
        """
        return train_and_score(self._train, self.model, self._start(self.ticket(round), round))

    def compare(
        self,
        kinds: Sequence[str] = KINDS,
        rounds: int | Iterable[int] | None = None,
        *,
        initialise: Callable[[nn.Module], object] | None = None,
        seed: int = 0,
        progress: bool = True,
    ) -> list[Comparison]:
        """Trains what tickets are compared with. In the end the network has the weights that it had.

        Where the search has a folder, each score is saved as it is known, and what is there is not trained again, so
        that the same call goes on after an interruption.

        Args:
            kinds: out of 'ticket' (not trained again, its score is known), 'reinit' (the same masks on fresh weights,
                trained from step 0) and 'random_mask' (as many units masked in each layer, at random, on the weights
                that the ticket goes back to).
            rounds: which, one or several; by default all but the dense one.
            initialise: as in `reinitialised`. Needed for a fair comparison where the network began with other weights
                than its layers' own defaults.
            seed: of the fresh weights and the random masks; every round draws its own. Another one is another training.
            progress: as in `find_ticket`.

        Returns:
            One a round and kind.

        Raises:
            ArgumentError: an unknown kind, no such round, or weights that cannot be initialised.
            FileError: the folder has comparisons of another search.
        """
        kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
        for kind in kinds:
            if kind not in KINDS:
                raise ArgumentError(f"kinds: unknown kind {kind!r}. {closest(str(kind), KINDS)}")
        if rounds is None:
            rounds = range(1, len(self.rows))
        jobs = [(round, kind) for round in ((rounds,) if isinstance(rounds, int) else rounds) for kind in kinds]
        for round, _ in jobs:
            self._use(round)
        if "reinit" in kinds and jobs:
            reinitialised(self._sparsifier, self.ticket(jobs[0][0]), initialise, seed)  # fails before hours of training
        controls = Controls(self.model, self._train, self._sparsifier, self._rewind, self.rewind_step)
        scores = {} if self._record is None else self._record.load_scores()
        before = copy_of(self._sparsifier.model)
        found: list[Comparison] = []
        try:
            with bar(progress, len(jobs), unit="training") as advance:
                for round, kind in jobs:
                    row = self.rows[round]
                    what = f"{kind} of round {round}, seed {seed}, by {getattr(initialise, '__qualname__', initialise)}"
                    score = row.score if kind == "ticket" else scores.get(what)
                    if score is None:
                        scores[what] = score = controls.score(kind, round, self.ticket(round), initialise, seed)
                        if self._record is not None:
                            self._record.save_scores(scores)
                    found.append(Comparison(kind, round, row.remaining, score))
                    advance(f"{kind}, {row.remaining:.1f} %: {score:.5g}")
        finally:
            put_weights(self._sparsifier.model, before)
        return found

    def plot(self, compared: Iterable[Comparison] = (), ax: Axes | None = None) -> Axes:
        """Draws scores over the weights that remain.

        Args:
            compared: from `compare`, of one or several seeds; drawn beside the rounds.
            ax: matplotlib axes to draw on; new ones if not given.

        Returns:
            The axes.
        """
        curves: dict[str, dict[float, list[float]]] = {"ticket": {row.remaining: [row.score] for row in self.rows}}
        for one in compared:
            if one.kind != "ticket":
                curves.setdefault(one.kind.replace("_", " "), {}).setdefault(one.remaining, []).append(one.score)
        return plot_lottery(curves, ax)

    def to_dict(self) -> list[dict[str, float]]:
        """The rows, as JSON can hold them."""
        return [{"round": r.round, "remaining": r.remaining, "score": r.score, "steps": r.steps} for r in self.rows]

    def __str__(self) -> str:
        head = f"{'round':>5}  {'remaining %':>11}  {'score':>9}  {'steps':>7}"
        lines = [f"{r.round:>5}  {r.remaining:>11.2f}  {r.score:>9.5g}  {r.steps:>7}" for r in self.rows]
        return "\n".join([head, *lines])

    # -- searching ----------------------------------------------------------------------------------------------------

    def run(self, rounds: int, record: Record | None, progress: bool) -> None:
        """Trains the rounds that are still to come. In the end the network has the weights that it came with.

        Args:
            rounds: how many after the dense one.
            record: where each is saved as it ends, and what those before are read from.
            progress: as in `find_ticket`.

        Raises:
            FileError: the record is of another network.
        """
        sparsifier, model = self._sparsifier, self._sparsifier.model
        self._record = record
        before = copy_of(model)
        saved = record.load(rounds) if record is not None else None
        self._rewind = {} if self.rewind_step else before
        try:
            if saved is not None:
                for weights in (saved.trained, saved.rewind):
                    check_weights(before, weights, f"the search in {str(record.folder)!r}" if record else "the search")
                sparsifier.load_state_dict(saved.state)
                put_weights(model, saved.trained)
                self._rewind, self._masks = saved.rewind, saved.masks
                self.rows = [TicketRow(**row, _make=self.ticket) for row in saved.rows]
            with bar(progress, rounds + 1, len(self.rows), unit="training") as advance:
                for round in range(len(self.rows), rounds + 1):
                    row = self._round(round)
                    if record is not None:
                        record.save_ticket(round, ticket_of(sparsifier, self._rewind))
                        state = sparsifier.state_dict()
                        record.save(Saved(self.to_dict(), self._rewind, copy_of(model), state, self._masks))
                    advance(f"{row.remaining:.1f} % left: {row.score:.5g}")
        finally:
            put_weights(model, before)

    def _round(self, round: int) -> TicketRow:
        if round:
            self._sparsifier.check_weights()
            self._sparsifier.move(after_rounds(self._shares, round))
            run = self._start(ticket_of(self._sparsifier, self._rewind), round)
        else:
            run = TicketRun(self._sparsifier, after_step=self._keep)
        began = run.steps_done
        score = train_and_score(self._train, self.model, run)
        self._check_finite(round)
        if not round and self.rewind_step >= run.steps_done:
            raise ArgumentError(
                f"rewind_step={self.rewind_step}, but training has {run.steps_done} steps; use a step before its end"
            )
        masks = self._sparsifier.masks
        total, masked = sum(m.numel() for m in masks.values()), sum(masks.masked(name) for name in masks)
        row = TicketRow(round, 100 * (total - masked) / total, score, run.steps_done - began, self.ticket)
        self._masks.append(masks.state_dict())
        self.rows.append(row)
        return row

    def _keep(self, run: TicketRun) -> None:
        if run.steps_done == self.rewind_step:
            self._rewind = copy_of(self._sparsifier.model)

    def _start(self, ticket: Ticket, round: int) -> TicketRun:
        return TicketRun(self._sparsifier, ticket, round=round, steps_done=self.rewind_step)

    def _check_finite(self, round: int) -> None:
        """A network that diverged has nothing to rank, and must not be what a search goes on from."""
        broken = not_finite(self.model)
        if broken is not None:
            raise TargetError(
                f"train left nan or infinite weights in {broken!r} in round {round}, which is not kept; lower the "
                "learning rate and search on"
            )

    def _use(self, round: int) -> None:
        if isinstance(round, bool) or not isinstance(round, int) or not 0 <= round < len(self._masks):
            raise ArgumentError(f"there is no round {round!r}; this search has rounds 0 to {len(self._masks) - 1}")
        shapes = {name: mask.shape for name, mask in self._sparsifier.masks.items()}
        put_masks(self._sparsifier, {n: unpack(m, shapes[n], n) for n, m in self._masks[round].items()})
