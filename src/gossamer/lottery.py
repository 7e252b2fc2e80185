"""The search for a lottery ticket: train, mask the least, go back, and again; every round kept and compared.

Iterative magnitude pruning: Frankle & Carbin 2019 (arXiv:1803.03635); going back to a step after the first: Frankle et
al. 2020 (arXiv:1912.05671).
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gossamer.errors import ArgumentError, StateError, TargetError, closest
from gossamer.masks import unpack
from gossamer.plots import plot_lottery
from gossamer.progress import bar
from gossamer.rules.allocation import Context, as_context
from gossamer.rules.criteria import Criterion
from gossamer.rules.granularity import Granularity
from gossamer.search_rates import after_rounds, check_counts, shares_of
from gossamer.search_record import Record, Saved, settings_of
from gossamer.sparsifier import Sparsifier
from gossamer.targets import LayerTypes
from gossamer.tickets import Ticket, ticket_of
from gossamer.trials import TicketRun, put_masks, random_mask, reinitialised
from gossamer.weights import check_weights, copy_of, not_finite, put_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Train = Callable[[nn.Module, TicketRun], float]
"""Trains a network in place, from the weights that it has to the end, and returns a score: higher is better."""

KINDS = ("ticket", "reinit", "random_mask")
"""What can be compared: the ticket; its mask on fresh weights; as many units masked at random, on the same weights."""


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


def find_ticket(
    model: nn.Module,
    train: Train,
    rounds: int = 15,
    rate: float = 20.0,
    *,
    rates: Mapping[str, float] | None = None,
    rewind_step: int = 0,
    granularity: str | Granularity = "weight",
    context: str | Context = "local",
    criteria: str | Criterion | Callable[..., Tensor] = "large_final",
    layer_type: LayerTypes = (nn.Linear, nn.Conv2d),
    exclude: Iterable[str] = (),
    seed: int = 0,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> TicketSearch:
    """Searches for a lottery ticket by iterative magnitude pruning (Frankle & Carbin 2019, arXiv:1803.03635).

    Round 0 trains the dense network. Each round after it masks a share of the units that were left, goes back to the
    first weights, or to those after `rewind_step` steps (Frankle et al. 2020, arXiv:1912.05671), and trains again.
    After k rounds exactly n·(1 - (1 - rate/100)^k) of a layer's n units are masked, halves rounded up. In the end, or
    when something is raised, the network has the weights that it came with.

    Args:
        model: the network, with the weights that training begins with.
        train: called as `train(model, run)` in every round. It trains the model in place, with an optimizer of its own
            that is made anew, calls `run.step()` after each step of it, and returns a score, higher is better.
            `run.steps_done` is where training stands (`rewind_step` at the start of every round but the first),
            `run.round` the round. It seeds what it draws, by the round for instance: nothing else is ever seeded.
            An optimizer given to `run.optimizer` is kept zero under the masks too.
        rounds: how many after the dense one.
        rate: percent of the surviving units that each round masks.
        rates: layer name or pattern → percent, where it is another one. In a global context there is one rate only.
        rewind_step: optimizer step whose weights every round goes back to; 0 is the beginning.
        granularity: which weights live and die together.
        context: which units compete: 'local' or 'global'.
        criteria: how much a weight matters.
        layer_type: type of layer that takes part, or a tuple of types.
        exclude: names or patterns of layers that do not.
        seed: of the criterion 'random'.
        folder: where each round is saved as it ends: its ticket as `ticket_03.safetensors`, and a record of the search,
            from which the same call goes on after an interruption, or with more `rounds`. Nothing can tell whether
            `train` is the same.
        progress: show a bar, if tqdm is installed.

    Returns:
        The rounds, and what can be done with them.

    Raises:
        ArgumentError: an argument that cannot be used; or what `train` returned is no finite number.
        TargetError: a layer name that matches nothing, or weights with nan.
        StateError: `train` never called `run.step()`.
        FileError: the folder holds another search; the message says what differs.

    Example:
        >>> import torch
        >>> net = nn.Linear(10, 1, bias=False)
        >>> def train(model, run):
        ...     run.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     while run.steps_done < 3:
        ...         loss = (model(torch.ones(1, 10)) - 1).square().sum()
        ...         run.optimizer.zero_grad(); loss.backward(); run.optimizer.step(); run.step()
        ...     return -loss.item()
        >>> search = find_ticket(net, train, rounds=2, rate=50, progress=False)
        >>> [row.remaining for row in search.rows]
        [100.0, 50.0, 20.0]
        >>> search.rows[2].ticket.sparsity
        80.0
    """
    if not callable(train):
        raise ArgumentError(f"train={train!r} cannot be called; give a function train(model, run) that returns a score")
    for name, value, least in (("rounds", rounds, 1), ("rewind_step", rewind_step, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(f"{name}={value!r} cannot be used; give a whole number from {least} up")
    if as_context(context).m:
        raise ArgumentError(
            f"context='{context}' fixes the sparsity, so rounds cannot raise it; use 'local' or 'global'"
        )
    if rates and as_context(context).kind == "global":
        raise ArgumentError(
            "rates cannot be used with context='global', in which all layers share one; give rate alone"
        )
    sparsifier = Sparsifier(model, granularity, context, criteria, layer_type, exclude=exclude, seed=seed)
    if sparsifier.report().zeros * 1000 > sparsifier.report().params:
        raise ArgumentError(
            f"the network has {sparsifier.report().sparsity:.2f} % zeros already, and a search starts from a dense "
            "one; give one that is freshly made"
        )
    shares = shares_of(sparsifier, rate, {} if rates is None else rates)
    check_counts(sparsifier, shares, rounds)
    sparsifier.check_weights()
    search = TicketSearch(model, train, sparsifier, shares, rewind_step)
    record = None
    if folder is not None:
        rest = {"rewind_step": rewind_step, "seed": seed}
        record = Record(Path(folder), settings_of(sparsifier, shares, rest))
    search._run(rounds, record, progress)
    return search


class TicketSearch:
    """The rounds of a search, from `find_ticket`.

    Args:
        model: the network, as `train` is given it.
        train: as in `find_ticket`.
        sparsifier: of the network, dense as yet.
        shares: layer name → fraction of its surviving units that a round masks.
        rewind_step: as in `find_ticket`.

    Example:
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
        return self._score(self._start(self.ticket(round), round, "ticket", self.rewind_step))

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

        Args:
            kinds: out of 'ticket' (not trained again, its score is known), 'reinit' (the same masks on fresh weights,
                trained from step 0) and 'random_mask' (as many units masked in each layer, at random, on the weights
                that the ticket goes back to).
            rounds: which, one or several; by default all but the dense one.
            initialise: as in `reinitialised`. Needed for a fair comparison where the network began with other weights
                than its layers' own defaults.
            seed: of the fresh weights and the random masks; every round draws its own.
            progress: as in `find_ticket`.

        Returns:
            One a round and kind.

        Raises:
            ArgumentError: an unknown kind, no such round, or weights that cannot be initialised.
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
        before = copy_of(self._sparsifier.model)
        found: list[Comparison] = []
        try:
            with bar(progress, len(jobs), 0, "training") as advance:
                for round, kind in jobs:
                    row = self.rows[round]
                    score = row.score if kind == "ticket" else self._control(kind, round, initialise, seed)
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

    def _run(self, rounds: int, record: Record | None, progress: bool) -> None:
        sparsifier, model = self._sparsifier, self._sparsifier.model
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
            with bar(progress, rounds + 1, len(self.rows), "training") as advance:
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
            run = self._start(ticket_of(self._sparsifier, self._rewind), round, "ticket", self.rewind_step)
        else:
            run = TicketRun(self._sparsifier, after_step=self._keep)
        began = run.steps_done
        score = self._score(run)
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

    def _start(self, ticket: Ticket, round: int, kind: str, steps_done: int) -> TicketRun:
        return TicketRun(self._sparsifier, ticket, round=round, kind=kind, steps_done=steps_done)

    def _control(self, kind: str, round: int, initialise: Callable[[nn.Module], object] | None, seed: int) -> float:
        ticket, seed = self.ticket(round), zlib.crc32(f"{seed}/{round}".encode())
        if kind == "reinit":
            fresh = reinitialised(self._sparsifier, ticket, initialise, seed)
            return self._score(self._start(fresh, round, kind, 0))
        other = random_mask(self._sparsifier, ticket, self._rewind, seed)
        return self._score(self._start(other, round, kind, self.rewind_step))

    def _score(self, run: TicketRun) -> float:
        began = run.steps_done
        given: Any = self._train(self.model, run)
        try:
            if isinstance(given, (bool, str)):
                raise TypeError
            score = float(given.detach() if isinstance(given, Tensor) else given)
        except (TypeError, ValueError, RuntimeError):
            raise ArgumentError(
                f"train returned {given!r} in round {run.round}; it must return a score, a number that is higher the "
                "better, such as the accuracy"
            ) from None
        if not math.isfinite(score):
            raise ArgumentError(
                f"train returned {score} in round {run.round}; a score must be finite. Lower the learning rate"
            )
        if run.steps_done == began:
            raise StateError(
                "train never called run.step(), so nothing held the masks; call it after every optimizer.step()"
            )
        return score

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
