"""A ticket put to the test: trained as it is, on fresh weights, or with as many masked at random places.

The comparisons of Frankle & Carbin 2019 (arXiv:1803.03635).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ArgumentError, StateError
from gossamer.masks import pack
from gossamer.optimizers import HasState, optimizer_tensors
from gossamer.rules.granularity import expand
from gossamer.search_rates import unit_shape
from gossamer.sparsifier import Sparsifier
from gossamer.tickets import Ticket, ticket_of
from gossamer.weights import check_weights, copy_of, put_weights


class TicketRun:
    """One training of a ticket: keeps zero what the ticket masks, and counts the optimizer's steps.

    A function that trains is given one, and calls `step` after every step of the optimizer.

    Args:
        sparsifier: of the network, with the granularity that the ticket was found with. It gets the ticket's masks.
        ticket: put into the network now; None takes weights and masks as they are.
        round: of the search, 0 for the dense network.
        kind: 'ticket', 'reinit' or 'random_mask'.
        steps_done: optimizer steps that the ticket's weights have behind them.
        after_step: called with the run after every step.

    Raises:
        FileError: the ticket is of another network.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> ticket = Ticket({"weight": torch.tensor([[0.0, 1.0]])}, {"": torch.tensor([[False, True]])})
        >>> run = TicketRun(Sparsifier(net, layer_type=nn.Linear), ticket)
        >>> run.optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        >>> net(torch.ones(1, 2)).sum().backward(); run.optimizer.step(); run.step()
        >>> net.weight.tolist(), run.steps_done
        ([[0.0, 0.5]], 1)
    """

    def __init__(
        self,
        sparsifier: Sparsifier,
        ticket: Ticket | None = None,
        *,
        round: int = 0,
        kind: str = "ticket",
        steps_done: int = 0,
        after_step: Callable[[TicketRun], None] | None = None,
    ) -> None:
        self.round = round
        self.kind = kind
        self.steps_done = steps_done
        self.optimizer: HasState | None = None  # whose state is kept zero under the masks, once it is given
        self._sparsifier = sparsifier
        self._after_step = after_step
        if ticket is not None:
            check_weights(copy_of(sparsifier.model), ticket.weights, "the ticket")
            put_masks(sparsifier, ticket.masks)
            put_weights(sparsifier.model, ticket.weights)
        self._hold()

    def step(self) -> None:
        """Follows one step of the optimizer: what is masked is exactly 0 again, and the optimizer's state there too."""
        self._hold()
        self.steps_done += 1
        if self._after_step is not None:
            self._after_step(self)

    @torch.no_grad()
    def _hold(self) -> None:
        self._sparsifier.apply(optimizer_tensors(self.optimizer))


Train = Callable[[nn.Module, TicketRun], float]
"""Trains a network in place, from the weights that it has to the end, and returns a score: higher is better."""


def train_and_score(train: Train, model: nn.Module, run: TicketRun) -> float:
    """Trains a ticket, and makes sure that it was trained and has a score.

    Args:
        train: does it.
        model: the network that it is given.
        run: the ticket's.

    Raises:
        ArgumentError: what `train` returned is no finite number.
        StateError: `train` never called `run.step()`.

    Example:
        >>> def train(model, run):
        ...     run.step()
        ...     return 0.5
        >>> net = nn.Linear(2, 1)
        >>> train_and_score(train, net, TicketRun(Sparsifier(net, layer_type=nn.Linear)))
        0.5
    """
    began = run.steps_done
    given: Any = train(model, run)
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


def reinitialised(
    sparsifier: Sparsifier, ticket: Ticket, initialise: Callable[[nn.Module], object] | None = None, seed: int = 0
) -> Ticket:
    """A ticket's masks on fresh weights. The network is left as it was, and so are torch's random numbers.

    Args:
        sparsifier: as in `TicketRun`.
        ticket: whose masks.
        initialise: initialises a network in place, as it was before it was ever trained; by default every module's own
            `reset_parameters`. What it leaves alone stays as in the ticket.
        seed: of torch's random numbers while it does.

    Raises:
        ArgumentError: a module has no `reset_parameters`, or `initialise` changes nothing.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> ticket = Ticket({"weight": torch.tensor([[0.0, 9.0]])}, {"": torch.tensor([[False, True]])})
        >>> fresh = reinitialised(Sparsifier(net, layer_type=nn.Linear), ticket).weights["weight"]
        >>> fresh[0, 0].item(), fresh[0, 1].item() == 9
        (0.0, False)
    """
    model = sparsifier.model
    before = copy_of(model)
    devices = sorted({t.device.index for t in before.values() if t.is_cuda})
    try:
        put_weights(model, ticket.weights)  # so that nothing depends on what the network happens to hold
        old = copy_of(model)
        with torch.random.fork_rng(devices), torch.no_grad():
            # Mixed, since the network may well have been built with this very seed, and would get the same weights.
            torch.manual_seed(zlib.crc32(f"reinitialised/{seed}".encode()))
            (initialise or reset_parameters)(model)
        fresh = copy_of(model)
    finally:
        put_weights(model, before)
    if all(torch.equal(fresh[n], old[n]) for n, _ in model.named_parameters()):
        raise ArgumentError(
            f"initialise={initialise!r} left every weight as it was; it must initialise the network that it is given, "
            "in place"
        )
    return _with_masks(sparsifier, fresh, ticket.masks, ticket.epoch)


def random_mask(sparsifier: Sparsifier, ticket: Ticket, dense: Mapping[str, Tensor], seed: int = 0) -> Ticket:
    """As many units masked in each layer as in a ticket, at random places, on the same dense weights.

    Args:
        sparsifier: as in `TicketRun`.
        ticket: whose counts.
        dense: the weights that the ticket was rewound to, before any was masked: those of the ticket of round 0.
        seed: of the places.

    Example:
        >>> net = nn.Linear(8, 1, bias=False)
        >>> mask = torch.arange(8)[None] < 2
        >>> ticket = Ticket({"weight": net.weight.detach() * mask}, {"": mask})
        >>> random_mask(Sparsifier(net, layer_type=nn.Linear), ticket, net.state_dict()).sparsity
        75.0
    """
    masks: dict[str, Tensor] = {}
    for target in sparsifier.targets:
        mask = ticket.masks[target.name]
        cut = unit_shape(sparsifier, target.name)
        _, view, _ = sparsifier.granularity.cut(target.axes, target.view)
        n_units = cut.numel()
        masked = (mask.numel() - int(torch.count_nonzero(mask))) * n_units // mask.numel()
        # From the layer's name and not its place, on the CPU, so that every machine draws the same.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{target.name}".encode()))
        units = torch.ones(n_units, dtype=torch.bool)
        units[torch.randperm(n_units, generator=generator)[:masked]] = False
        masks[target.name] = expand(units.reshape(cut), view).reshape(mask.shape)
    return _with_masks(sparsifier, dense, masks, ticket.epoch)


def put_masks(sparsifier: Sparsifier, masks: Mapping[str, Tensor]) -> None:
    """Gives a sparsifier other masks, and leaves the weights alone.

    Args:
        sparsifier: of the same layers.
        masks: layer name → bool of the weight's shape, True = kept.

    Raises:
        FileError: they are of another network, or cut through units.

    Example:
        >>> sparsifier = Sparsifier(nn.Linear(2, 1), layer_type=nn.Linear)
        >>> put_masks(sparsifier, {"": torch.tensor([[True, False]])}); sparsifier.masks.masked("")
        1
    """
    packed = {f"mask/{n}": pack(m) for n, m in masks.items()}
    shapes = {f"shape/{n}": torch.tensor(m.shape) for n, m in masks.items()}
    sparsifier.load_state_dict({**packed, **shapes, **sparsifier.evidence.state_dict()})


def reset_parameters(model: nn.Module) -> None:
    """Initialises every module of a network by its own `reset_parameters`, in place.

    Raises:
        ArgumentError: a module holds parameters and has no such method; nothing is touched.

    Example:
        >>> net = nn.Linear(1, 1); before = net.weight.item(); reset_parameters(net); net.weight.item() == before
        False
    """
    modules = dict(model.named_modules())
    for name, module in modules.items():
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if own and not callable(getattr(module, "reset_parameters", None)):
            raise ArgumentError(
                f"module {name!r} ({type(module).__name__}) holds {own[0]!r} and has no reset_parameters; give "
                "initialise=, a function that initialises the network in place"
            )
    for module in modules.values():
        reset: Callable[[], object] | None = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()


def _with_masks(
    sparsifier: Sparsifier, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], epoch: int
) -> Ticket:
    before = dict(sparsifier.masks.items())
    put_masks(sparsifier, masks)
    try:
        return ticket_of(sparsifier, weights, epoch)
    finally:
        put_masks(sparsifier, before)
