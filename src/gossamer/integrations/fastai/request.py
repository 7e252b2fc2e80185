"""What was asked for? The arguments of a SparsifyCallback, checked, and the run that they make of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from torch import nn

from gossamer.calibration import Calibration
from gossamer.errors import ArgumentError, FileError
from gossamer.integrations.fastai.data import as_data
from gossamer.methods import Method, as_method, schedule_of
from gossamer.rules.allocation import Context, as_context, as_fraction, check_round_to, check_target
from gossamer.rules.criteria import OF_DATA, Criterion, as_criterion
from gossamer.rules.granularity import Granularity, Reduction, as_granularity, as_reduction
from gossamer.rules.normalization import Normalization, as_normalization
from gossamer.rules.schedules import Schedule
from gossamer.sparsifier import Sparsifier
from gossamer.targets import as_layer_types, as_patterns, resolve_sparsity
from gossamer.training import SparseTraining
from gossamer.warning import warn_of_a_fraction


@dataclass(frozen=True)
class Request:
    """What a sparse fit shall do, whatever the network. The arguments are those of `SparsifyCallback`, checked.

    Example:
        >>> from gossamer.integrations.fastai.callback import SparsifyCallback
        >>> asked = SparsifyCallback(50, schedule="lin").asked
        >>> run = asked.run_on(nn.Sequential(nn.Conv2d(3, 8, 3)))
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

    def check_rewinding(self, state: Mapping[str, Any]) -> None:
        """Makes sure that a run agrees.

        Args:
            state: what `rewinding` said of that one.

        Raises:
            FileError: it does not.
        """
        for name, here in self.rewinding.items():
            there = state.get(name)
            if there != here:
                raise FileError(
                    f"the state is of a run with {name}={there!r}, and here it is {here!r}; make the callback as that "
                    "one was"
                )


_READ: Mapping[str, Callable[[Any], Any]] = MappingProxyType(
    {
        "sparsity": lambda sparsity: dict(sparsity) if isinstance(sparsity, Mapping) else sparsity,
        "granularity": as_granularity,
        "context": as_context,
        "criteria": as_criterion,
        "layer_type": as_layer_types,
        "exclude": as_patterns,
        "method": as_method,
        "reduction": as_reduction,
        "normalization": as_normalization,
        "data": as_data,
    }
)
"""What makes of an argument the value that a request holds; the others are held as they are given."""


def request(given: Mapping[str, Any]) -> Request:
    """Checks the arguments of a `SparsifyCallback`, whose constructor is what calls this, and says what they are.

    Args:
        given: name → argument, for each of a request's fields; what else there is belongs to the callback alone.

    Raises:
        ArgumentError: one that cannot be used, whatever the network.
    """
    method = as_method(given["method"])
    read: dict[str, Callable[[Any], Any]] = {**_READ, "schedule": lambda schedule: schedule_of(schedule, method)}
    held = {f.name: read[f.name](given[f.name]) if f.name in read else given[f.name] for f in fields(Request)}
    asked = Request(**held)
    sparsity, context = asked.sparsity, asked.context
    if isinstance(sparsity, dict):
        named = {name: percent for name, percent in sparsity.items() if name != "*" or not context.is_shared}
        if named or not sparsity:
            resolve_sparsity(named, ["", *(str(name) for name in named)])  # names wait for the network
    for name, percent in sparsity.items() if isinstance(sparsity, dict) else [("*", sparsity)]:
        check_target(as_fraction(percent), context if name == "*" or not context.is_shared else Context("local"))
    check_round_to(asked.round_to, context)
    warn_of_a_fraction(sparsity, 3)
    if isinstance(sparsity, dict) and context.is_shared and "*" not in sparsity:
        raise ArgumentError(
            f"a sparsity for each layer needs context='local'; with '{context}' give one number, or add '*' for "
            "what the layers that are not named reach together"
        )
    if asked.lth and asked.method.exchange is not None:
        raise ArgumentError(
            f"lth=True rewinds after each round of pruning, and method {asked.method.name!r} has no rounds; leave one "
            "of them out"
        )
    rewind_epoch = asked.rewind_epoch
    if isinstance(rewind_epoch, bool) or not isinstance(rewind_epoch, int) or rewind_epoch < 0:
        raise ArgumentError(f"rewind_epoch={rewind_epoch!r} is no epoch; epochs count from 0")
    if rewind_epoch and not (asked.lth or asked.reset_end or asked.save_tickets):
        raise ArgumentError(
            f"rewind_epoch={rewind_epoch} has nothing to rewind; add lth=True, reset_end=True or save_tickets=True"
        )
    return asked
