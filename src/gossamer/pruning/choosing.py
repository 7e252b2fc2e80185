"""Which units stay? A fraction for each layer → counts → the units of each group that are left."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction

from torch import Tensor

from gossamer.errors import ArgumentError, GossamerWarning
from gossamer.pruning.counting import Competition, fraction_of, rounded, thin
from gossamer.pruning.graph import Group
from gossamer.pruning.scoring import UnitScores
from gossamer.pruning.surgery import Surgeon
from gossamer.rules.allocation import Context, as_fraction, check_target, count
from gossamer.rules.selection import select


class Choice:
    """Chooses the units that go, as a context and a criterion say; what is gone stays gone.

    Args:
        surgeon: knows the groups, and which of their units are left.
        taking: which groups take part.
        scores: of their units.
        context: which of them compete.
        round_to: round the units that a group keeps to the nearest multiple of this.
    """

    def __init__(
        self, surgeon: Surgeon, taking: Sequence[int], scores: UnitScores, context: Context, round_to: int | None
    ) -> None:
        self.taking, self.asked = list(taking), dict[int, int]()
        self._surgeon, self._scores, self._context, self._round_to = surgeon, scores, context, round_to

    @property
    def groups(self) -> list[Group]:
        """Those that take part."""
        return [self._surgeon.groups[i] for i in self.taking]

    @property
    def kept(self) -> list[Tensor]:
        """For each of them, bool over its units: whether it is there still."""
        return [self._surgeon.kept[i] for i in self.taking]

    def choose(self, fractions: Mapping[str, Fraction]) -> list[Tensor | None]:
        """The units that stay, group by group; None where all do.

        Args:
            fractions: layer → the fraction of its filters that is to be gone.
        """
        evidence = self._scores.evidence
        evidence.drop()  # what data says of the network as it was before
        try:
            asked = self._counts(fractions)
            units: list[Tensor | None] = [None] * len(self._surgeon.groups)
            for i, n in asked.items():
                group, kept = self._surgeon.groups[i], self._surgeon.kept[i]
                goal = rounded(group, n, self._round_to)
                if goal > int((~kept).sum()):
                    units[i] = _select(group, kept, self._scores.of(i), goal)
        finally:
            evidence.drop()
        self.asked = asked
        return units

    def _counts(self, fractions: Mapping[str, Fraction]) -> dict[int, int]:
        """How many units of each group are asked to be gone."""
        if not self._context.is_pooled:
            pairs = zip(self.taking, self.groups, strict=True)
            return {i: count(fraction_of(group, fractions), group.n_units) for i, group in pairs}
        among = Competition(self.groups, self.kept, self._context, max(fractions.values()))
        if among.goal == sum(self.asked.values()):
            return self.asked  # as the masks of a global context do not move either, until more units are to go
        counts = among.counts(lambda j: self._scores.of(self.taking[j]))
        return dict(zip(self.taking, counts, strict=True))

    def warn_thin(self) -> None:
        """Warns where competing groups have left one of them next to nothing."""
        found = thin(self.groups, self.kept) if self._context.is_pooled else []
        if found:
            kept = sum(int(k.sum()) for k in self.kept) / sum(g.n_units for g in self.groups)
            warnings.warn(
                f"context '{self._context}' leaves layers nearly empty: {', '.join(found)} filters; "
                f"Context('global', ceiling={100 - 50 * kept:.0f}) bounds it, or take "
                "Context('global', normalization='mean'), or 'local'",
                GossamerWarning,
                stacklevel=4,
            )


def _select(group: Group, kept: Tensor, scores: Tensor, goal: int) -> Tensor:
    """The units that stay, where so many are to be gone, as many from each block."""
    stays = kept.clone()
    for block in range(group.n_blocks):
        inside = group.blocks == block
        stays[inside] = select(scores[inside], kept[inside], goal // group.n_blocks)
    return stays


def check_context(context: Context, sparsity: float | Mapping[str, float]) -> None:
    """Makes sure that filters can compete as a context says, and that it can meet a target.

    Raises:
        ArgumentError: it is for single weights, shares one target and got several, or its bounds lie elsewhere.

    Example:
        >>> check_context(Context("global"), 50)
    """
    if context.m or context.kind == "output":
        raise ArgumentError(f"context {str(context)!r} is for weights; filters compete 'local' or 'global'")
    if not isinstance(sparsity, Mapping):
        check_target(as_fraction(sparsity), context)
    elif context.is_shared:
        raise ArgumentError(
            f"context='{context}' takes one sparsity for the whole network, got a dict; one for each layer needs "
            "context='local'"
        )
