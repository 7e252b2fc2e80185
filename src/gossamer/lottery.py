"""The search for a lottery ticket, asked for in one call.

Iterative magnitude pruning: Frankle & Carbin 2019 (arXiv:1803.03635); going back to a step after the first: Frankle et
al. 2020 (arXiv:1912.05671).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from gossamer.errors import ArgumentError
from gossamer.rules.allocation import Context, as_context
from gossamer.rules.criteria import Criterion
from gossamer.rules.granularity import Granularity
from gossamer.search import TicketSearch
from gossamer.search_rates import check_counts, shares_of
from gossamer.search_record import Record, settings_of
from gossamer.sparsifier import Sparsifier
from gossamer.targets import LayerTypes
from gossamer.trials import Train


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
    if as_context(context).densities is not None:
        raise ArgumentError(
            f"context='{as_context(context)}' gives every layer a target of its own, and a search masks a share of "
            "what is left; use 'local' with rates, or 'global'"
        )
    if rates and as_context(context).is_pooled:
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
    search.run(rounds, record, progress)
    return search
