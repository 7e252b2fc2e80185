"""How much does each unit matter? Evidence of its layers → scores of their weights → one score a unit."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.errors import ArgumentError, GossamerWarning, TargetError
from gossamer.evidence import Evidence, widen
from gossamer.gathering import gather
from gossamer.pruning.filters import by_filter, filter_target
from gossamer.pruning.surgery import Slice, Surgeon
from gossamer.rules.criteria import OF_DATA, OF_LOSS, Criterion

_OF_INPUTS = OF_DATA - OF_LOSS - {"flow"}


class UnitScores:
    """Scores of the units of groups, by what a criterion says of the layers that were named.

    Args:
        surgeon: knows the groups, and which of their units are left.
        names: of the layers whose weights are judged.
        criterion: says how much a weight matters.
        seed: of the criterion 'random'.
        calibration: data, for criteria that look at gradients or activations.

    Raises:
        ArgumentError: the criterion looks at what a layer reads, and a layer reads several things.
        TargetError: a weight is nan or infinite.

    Example:
        >>> from gossamer.pruning.graph import find_groups
        >>> from gossamer.rules.criteria import large_final
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Conv2d(2, 1, 1))
        >>> with torch.no_grad(): _ = net[0].weight.copy_(torch.tensor([3.0, -4.0]).view(2, 1, 1, 1))
        >>> surgeon = Surgeon(net, find_groups(net, (torch.ones(1, 1, 2, 2),)))
        >>> UnitScores(surgeon, ["0"], large_final).of(0).tolist()
        [3.0, 4.0]
    """

    def __init__(
        self,
        surgeon: Surgeon,
        names: Collection[str],
        criterion: Criterion,
        seed: int = 0,
        calibration: Calibration | None = None,
    ) -> None:
        self.surgeon, self.criterion = surgeon, criterion
        self.targets = {n: filter_target(n, surgeon.model.get_submodule(n)) for n in names}
        looks_at = next((kind for kind in criterion.needs if kind in _OF_INPUTS), None)
        attention = next((n for n, t in self.targets.items() if isinstance(t.module, nn.MultiheadAttention)), None)
        if looks_at is not None and attention is not None:
            raise ArgumentError(
                f"criterion {criterion.name!r} looks at the {looks_at} of a layer, and {attention!r} is an attention, "
                "which reads queries, keys and values; take a criterion of weights or gradients, such as 'taylor', or "
                f"leave it out with exclude=[{attention!r}]"
            )
        look = None if calibration is None else partial(gather, calibration, list(self.targets.values()))
        self.evidence = Evidence(criterion, {n: t.weight for n, t in self.targets.items()}, seed, look)
        self.check_weights()

    def of(self, i: int) -> Tensor:
        """One score a unit of a group: the mean over the weights of all filters that are judged; gone units score 0.

        Args:
            i: which group.

        Raises:
            ArgumentError: the criterion gives something else than scores, or there is data that cannot be used.
            TargetError: the scores are nan, or the data does not reach a layer.
        """
        group, total = self.surgeon.groups[i], None
        for member in group.filters:
            target = self.targets.get(member.name)
            if target is None:
                continue
            evidence = {k: widen(t) for k, t in self.evidence.gather(member.name, target.weight).items()}
            scores = by_filter(target.module, self.criterion.score(evidence))
            alive = self.surgeon.axes[member.name, member.side]
            place = torch.full((member.size,), -1, dtype=torch.int64)
            place[alive] = torch.arange(int(alive.sum()))
            here = alive[member.index]
            unit, position = member.unit[here].to(scores.device), place[member.index[here]].to(scores.device)
            sums = torch.zeros(group.n_units, 2, dtype=scores.dtype, device=scores.device)
            ones = torch.full_like(position, scores.shape[1], dtype=scores.dtype)
            sums.index_add_(0, unit, torch.stack([scores[position].sum(1), ones], 1))
            total = sums if total is None else total + sums.to(total)
        assert total is not None
        means = (total[:, 0] / total[:, 1].clamp(min=1)).cpu()
        if bool(means.isnan().any()):
            self.check_weights()  # which can say in which layer the numbers went wrong
            raise TargetError(
                f"criterion {self.criterion.name!r} gives the filters of {group.name!r} nan, which has no rank; leave "
                f"it out with exclude=[{group.name!r}], or take another criterion"
            )
        return means

    def check_weights(self) -> None:
        """Makes sure that scores can be compared.

        Raises:
            TargetError: a weight is nan or infinite.
        """
        for name, target in self.targets.items():
            if not bool(torch.isfinite(target.weight.detach()).all()):
                raise TargetError(
                    f"layer {name!r} has nan or infinite weights, which no criterion can rank; "
                    "restore a checkpoint from before, or lower the learning rate"
                )

    def warn_unchanged(self) -> None:
        """Warns where the criterion measures change and layers have not changed, so that all of their scores tie."""
        still = [n for n, t in self.targets.items() if self.evidence.unchanged(n, t.weight)]
        if still:
            warnings.warn(
                f"criterion {self.criterion.name!r} measures change, and the weights of {', '.join(still)} have not "
                "changed: all their scores tie, and the first filters go",
                GossamerWarning,
                stacklevel=2,
            )

    def observe(self, factor: Tensor | None = None) -> None:
        """Looks at the gradients of one step, right before the optimizer makes it.

        Args:
            factor: what gradients are multiplied with, 0-d; 0 where the step will do nothing. None for 1.
        """
        self.evidence.observe({n: t.weight for n, t in self.targets.items()}, factor)

    def cut(self, parameter: Tensor, cut: Slice) -> None:
        """Cuts what is remembered of a parameter along with it."""
        name = next((n for n, t in self.targets.items() if t.weight is parameter), None)
        if name is not None:
            for layers in self.evidence.kept.values():
                layers[name] = cut(layers[name])

    def moved(self, i: int) -> None:
        """Takes note that units of a group went."""
        for name in self.surgeon.groups[i].layers:
            if name in self.targets:
                self.evidence.moved(name, self.targets[name].weight)
