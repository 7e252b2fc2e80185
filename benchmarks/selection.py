"""One-shot selection on ResNet-50, each layer by itself and all together: Gossamer, torch.nn.utils.prune, the peer.

Every round starts from the same weights (restored, not timed) and a fresh object; what is timed is the call that
chooses and masks. Making the object is timed by itself. Exact means that every layer (local) or the network (global)
has round(s·n/100) zeros and that these are the lowest magnitudes, ties by position, as a stable sort finds them.

In the same rounds, three passes over the weights are timed: three times in turn, torch sums up every layer's weight,
which reads each weight once and writes nothing. Selection has to look whether the weights are finite, to find the
threshold, and to write masks and weights.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils import prune

from common import CLOCKS, PEER, alternating, header, median_ratio, peer_module, quartiles, table
from gossamer.sparsifier import Sparsifier

TIMES_FASTER = 5.0  # than the peer, at least
PASSES = "three reads of the weights"
TIMES_PASSES = 2.0  # at most


def convolutions(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Conv2d)]


class Ours:
    """Gossamer's one-shot sparsifier."""

    name = "gossamer"

    def make(self, model: nn.Module, context: str) -> Any:
        return Sparsifier(model, "weight", context, "large_final")

    def run(self, made: Any, sparsity: float) -> None:
        made.sparsify_model(sparsity)

    def clean(self, made: Any) -> None:
        """Nothing is left on the model."""


class Torch:
    """torch.nn.utils.prune: l1_unstructured a layer, or global_unstructured."""

    name = "torch.nn.utils.prune"

    def make(self, model: nn.Module, context: str) -> Any:
        return [(m, "weight") for m in convolutions(model)], context

    def run(self, made: Any, sparsity: float) -> None:
        pairs, context = made
        if context == "global":
            prune.global_unstructured(pairs, pruning_method=prune.L1Unstructured, amount=sparsity / 100)
        else:
            for module, name in pairs:
                prune.l1_unstructured(module, name, amount=sparsity / 100)

    def clean(self, made: Any) -> None:
        for module, name in made[0]:
            if prune.is_pruned(module):
                prune.remove(module, name)


class Peer:
    """The peer's one-shot sparsifier."""

    name = PEER

    def __init__(self) -> None:
        self.sparse, self.criteria = peer_module("sparse.all"), peer_module("core.criteria")

    def make(self, model: nn.Module, context: str) -> Any:
        return self.sparse.Sparsifier(model, "weight", context, self.criteria.large_final)

    def run(self, made: Any, sparsity: float) -> None:
        made.sparsify_model(sparsity / 100)

    def clean(self, made: Any) -> None:
        made._clean_buffers()


def wanted(weights: list[Tensor], context: str, sparsity: float) -> list[Tensor]:
    """Which weights are to go, by a stable sort."""
    groups = [weights] if context == "global" else [[w] for w in weights]
    goes: list[Tensor] = []
    for group in groups:
        scores = torch.cat([w.abs().flatten() for w in group])
        count = int(Fraction(str(sparsity)) * len(scores) / 100 + Fraction(1, 2))
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[torch.argsort(scores, stable=True)[:count]] = True
        goes += [c.view(w.shape) for c, w in zip(chosen.split([w.numel() for w in group]), group, strict=True)]
    return goes


def compare(context: str, sparsity: float, rounds: int, now: Callable[[], float]) -> list[list[object]]:
    """Rows of the table for one context."""
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    layers = convolutions(model)
    original = [m.weight.detach().clone() for m in layers]
    goes = wanted(original, context, sparsity)
    n_goes = sum(int(g.sum()) for g in goes)
    tools: list[Any] = [Ours(), Torch(), *([Peer()] if peer_module("sparse.all") else [])]
    making: dict[str, list[float]] = {t.name: [] for t in tools}
    exact: dict[str, tuple[int, bool]] = {}

    def job(tool: Any) -> Callable[[], float]:
        def once() -> float:
            for module, weight in zip(layers, original, strict=True):
                module.weight.detach().copy_(weight)
            start = now()
            made = tool.make(model, context)
            ready = now()
            tool.run(made, sparsity)
            done = now()
            masked = [m.weight.detach() == 0 for m in layers]
            is_set = all(bool(torch.equal(a, b)) for a, b in zip(masked, goes, strict=True))
            exact[tool.name] = sum(int(m.sum()) for m in masked), is_set
            tool.clean(made)
            making[tool.name].append(ready - start)
            return done - ready

        return once

    def passes() -> float:
        for module, weight in zip(layers, original, strict=True):  # as before the others, so that caches are alike
            module.weight.detach().copy_(weight)
        start = now()
        for _ in range(3):
            for module in layers:
                module.weight.detach().sum()
        return now() - start

    seconds = alternating(rounds, {**{t.name: job(t) for t in tools}, PASSES: passes})
    reads = seconds.pop(PASSES)
    rows: list[list[object]] = []
    for name, times in seconds.items():
        ratios = [t / o for t, o in zip(times, seconds[Ours.name], strict=True)]
        low, high = quartiles(ratios)
        found, is_set = exact[name]
        rows.append(
            [
                context,
                name,
                f"{median_ratio(times, seconds[Ours.name]):.2f}",
                f"{low:.2f}..{high:.2f}",
                f"{median_ratio(times, reads):.2f}",
                f"{1000 * statistics.median(times):.0f}",
                f"{1000 * statistics.median(making[name]):.0f}",
                f"{found:,}",
                f"{found - n_goes:+,}" if found != n_goes else "exact",
                "same" if is_set else "another",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, all tools in each (%(default)s)")
    parser.add_argument("--sparsity", type=float, default=50, help="percent (%(default)s)")
    parser.add_argument("--context", nargs="+", choices=["local", "global"], default=["local", "global"], help="(both)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="wall, or cpu time (use one thread) (%(default)s)"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)

    header("One-shot selection", "gossamer", PEER, "torch", "torchvision", "numpy")
    total = sum(m.weight.numel() for m in convolutions(torchvision.models.resnet50()))
    print(
        f"ResNet-50, random weights, {total:,} in convolutions, {args.sparsity:g} %, {args.rounds} rounds, "
        f"{args.clock} clock\n",
        flush=True,
    )
    rows = [row for context in args.context for row in compare(context, args.sparsity, args.rounds, CLOCKS[args.clock])]
    columns = ["context", "tool", "time / ours", "quartiles", "time / three reads"]
    columns += ["median ms", "making it, ms", "zeros", "count", "set"]
    print(table(columns, rows))
    print("\nSet: whether the zeros are those of a stable sort.")
    print("Three reads: torch's sum of every layer's weight, three times in turn, with as many threads.")
    for row in rows:
        if row[1] == Ours.name:
            met = float(str(row[4])) <= TIMES_PASSES
            print(
                f"{row[0]}: {row[4]} times three reads of the weights; target at most {TIMES_PASSES:g}: "
                f"{'met' if met else 'MISSED'}."
            )
        if row[1] == PEER:
            met = float(str(row[2])) >= TIMES_FASTER
            print(
                f"{row[0]}: {row[2]} times faster than the peer; target {TIMES_FASTER:g}: {'met' if met else 'MISSED'}."
            )


if __name__ == "__main__":
    main()
