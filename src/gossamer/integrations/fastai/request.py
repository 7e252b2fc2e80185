"""What was asked for? The arguments of a SparsifyCallback, checked, and the run that they make of a network."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gossamer.calibration import Calibration
from gossamer.errors import ArgumentError, GossamerWarning
from gossamer.integrations.fastai.data import BATCHES, as_data
from gossamer.methods import Exchange, Method, as_method
from gossamer.rules.allocation import Context, as_context, as_fraction, check_round_to, check_target
from gossamer.rules.criteria import OF_DATA, Criterion, as_criterion
from gossamer.rules.granularity import Granularity, Reduction, as_granularity, as_reduction
from gossamer.rules.normalization import Normalization, as_normalization
from gossamer.rules.schedules import Schedule
from gossamer.sparsifier import Sparsifier
from gossamer.targets import LayerTypes, as_layer_types, as_patterns, resolve_sparsity
from gossamer.training import SparseTraining, schedule_of


@dataclass(frozen=True)
class Request:
    """What a sparse fit shall do, whatever the network. The arguments are those of `SparsifyCallback`.

    Example:
        >>> run = request(50, schedule="lin").run_on(nn.Sequential(nn.Conv2d(3, 8, 3)))
        >>> run.move_to(1.0); run.report().zeros
        True
        108
    """

    sparsity: float | dict[str, float]
    granularity: Granularity
    context: Context
    criteria: Criterion
    schedule: Schedule
    lth: bool
    rewind_epoch: int
    reset_end: bool
    save_tickets: bool
    round_to: int | None
    layer_type: tuple[type[nn.Module], ...]
    exclude: tuple[str, ...]
    seed: int
    keep_zeros: bool
    skip_frozen: bool
    method: Method
    reduction: Reduction
    normalization: Normalization
    data: Any

    def run_on(self, model: nn.Module, calibration: Calibration | None = None) -> SparseTraining:
        """The run on a network. It has no optimizer yet, and has not begun.

        Args:
            model: the network, or a part of it.
            calibration: data, where `takes_data` says so.

        Raises:
            ArgumentError: an argument that does not fit the network, or a target below the zeros that are there.
            TargetError: a layer name that matches nothing, or a layer that cannot be masked.
        """
        sparsifier = Sparsifier(
            model,
            self.granularity,
            self.context,
            self.criteria,
            self.layer_type,
            exclude=self.exclude,
            seed=self.seed,
            skip_frozen=self.skip_frozen,
            reduction=self.reduction,
            normalization=self.normalization,
            data=calibration,
        )
        return SparseTraining(
            sparsifier,
            None,
            self.sparsity,
            self.schedule,
            round_to=self.round_to,
            keep_zeros=self.keep_zeros,
            method=self.method,
            begins=False,
        )

    @property
    def takes_data(self) -> bool:
        """Whether a criterion looks at what the network makes of data."""
        criteria = [self.criteria, *([] if self.method.initial is None else [self.method.initial])]
        return any(kind in OF_DATA for criterion in criteria for kind in criterion.needs)

    @property
    def is_per_layer(self) -> bool:
        """Whether layers have targets of their own."""
        return isinstance(self.sparsity, dict)

    @property
    def moves_at_epochs(self) -> bool:
        """Whether masks move at the ends of epochs only, since each is a round of pruning."""
        return self.lth and not self.schedule.stepwise

    @property
    def rewinding(self) -> dict[str, Any]:
        """What two runs must agree in beside the rules of `SparseTraining`."""
        names = ("lth", "reset_end", "save_tickets", "rewind_epoch")
        return {name: getattr(self, name) for name in names}


def request(
    sparsity: float | Mapping[str, float],
    granularity: str | Granularity = "weight",
    context: str | Context = "local",
    criteria: str | Criterion | Callable[..., Tensor] = "large_final",
    schedule: str | Schedule | Callable[..., Any] | None = None,
    *,
    lth: bool = False,
    rewind_epoch: int = 0,
    reset_end: bool = False,
    save_tickets: bool = False,
    round_to: int | None = None,
    layer_type: LayerTypes = nn.Conv2d,
    exclude: Iterable[str] = (),
    seed: int = 0,
    keep_zeros: bool = True,
    skip_frozen: bool = False,
    method: Method | str | Exchange | None = None,
    reduction: str | Reduction = "mean",
    normalization: str | Normalization = "none",
    data: Any = BATCHES,
) -> Request:
    """Checks the arguments of a `SparsifyCallback`, whose constructor is what calls this.

    Raises:
        ArgumentError: one that cannot be used, whatever the network.

    Example:
        >>> request(50, granularity="filter").granularity.name
        'filter'
    """
    sparsity = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
    how = as_method(method)
    rules = as_granularity(granularity), as_context(context), as_criterion(criteria), schedule_of(schedule, how)
    context = rules[1]
    if isinstance(sparsity, dict):
        named = {name: percent for name, percent in sparsity.items() if name != "*" or not context.is_shared}
        if named or not sparsity:
            resolve_sparsity(named, ["", *(str(name) for name in named)])  # names wait for the network
    for name, percent in sparsity.items() if isinstance(sparsity, dict) else [("*", sparsity)]:
        check_target(as_fraction(percent), context if name == "*" or not context.is_shared else Context("local"))
    check_round_to(round_to, context)
    most = max(sparsity.values(), default=0) if isinstance(sparsity, dict) else sparsity
    if 0 < most < 1:
        warnings.warn(
            f"sparsity={sparsity} is less than one percent; it is a percentage, so 50 means half",
            GossamerWarning,
            stacklevel=3,
        )
    if isinstance(sparsity, dict) and context.is_shared and "*" not in sparsity:
        raise ArgumentError(
            f"a sparsity for each layer needs context='local'; with '{context}' give one number, or add '*' for "
            "what the layers that are not named reach together"
        )
    if lth and how.exchange is not None:
        raise ArgumentError(
            f"lth=True rewinds after each round of pruning, and method {how.name!r} has no rounds; leave one of them "
            "out"
        )
    if isinstance(rewind_epoch, bool) or not isinstance(rewind_epoch, int) or rewind_epoch < 0:
        raise ArgumentError(f"rewind_epoch={rewind_epoch!r} is no epoch; epochs count from 0")
    if rewind_epoch and not (lth or reset_end or save_tickets):
        raise ArgumentError(
            f"rewind_epoch={rewind_epoch} has nothing to rewind; add lth=True, reset_end=True or save_tickets=True"
        )
    return Request(
        sparsity,
        *rules,
        lth,
        rewind_epoch,
        reset_end,
        save_tickets,
        round_to,
        as_layer_types(layer_type),
        as_patterns(exclude),
        seed,
        keep_zeros,
        skip_frozen,
        how,
        as_reduction(reduction),
        as_normalization(normalization),
        as_data(data),
    )
