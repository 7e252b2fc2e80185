"""Where the engine's time goes, and how far from the machine's limit each kind of layer is.

Layers of one kind (kernel, stride, size of what they give) are one row: their share of the time with one thread, the
multiplications with weights that are not zero that they make in a second, what part of the machine's limit that is, and
how much faster two threads are. The limit is what the engine's own kernel makes where nothing is in its way: full rows,
whole vectors, and inputs that stay in the first-level cache.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common import header, table
from gossamer import runtime
from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.segment import Segment
from inference import example, make

CALLS = 10
ROUNDS = 7


@dataclass(frozen=True)
class Kind:
    """A layer's kind, and its multiplications and additions by weights that are not zero, on one input."""

    text: str
    flops: float


def kinds_of(fast: runtime.CompiledModel, x: Tensor) -> dict[str, Kind]:
    """Of each layer, by its name in the plan."""
    twin, found, handles = fast.reference(), dict[str, Kind](), list[Any]()
    for name, module in twin.named_modules():
        if isinstance(module, Layer):

            def look(layer: Layer, _: Any, y: Tensor, name: str = name) -> None:
                found[name] = _kind(layer, y)

            handles.append(module.register_forward_hook(look))
    with torch.no_grad():
        twin(x)
    return found


def _kind(layer: Layer, y: Tensor) -> Kind:
    each = y.shape[2] * y.shape[3] * len(y) if layer.geometry else y.numel() // y.shape[-1]
    flops = 2.0 * int(torch.count_nonzero(layer.weight)) * each
    if layer.geometry is None:
        return Kind(f"linear, {layer.weight.shape[1]} → {layer.weight.shape[0]}", flops)
    kernel, stride = "×".join(map(str, layer.weight.shape[2:])), max(layer.geometry.stride)
    kind = f"{kernel}{' depthwise' if layer.is_depthwise else ''}{f' /{stride}' if stride > 1 else ''}"
    return Kind(f"{kind}, {y.shape[2]}×{y.shape[3]}", flops)


def seconds_of(fast: runtime.CompiledModel, x: Tensor, threads: int) -> dict[str, float]:
    """Of each row of the plan, in the median of some rounds."""
    torch.set_num_threads(threads)
    taken: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        rows, calls = fast.explain(x), list[float]()
        for _ in range(2 * CALLS):  # PyTorch's threads, which counted zeros, spin on through the first
            began = time.perf_counter()
            fast(x)
            calls.append(time.perf_counter() - began)
        whole = statistics.median(calls[CALLS:])
        for row in rows:
            taken.setdefault(row.name, []).append((row.share or 0.0) / 100 * whole)
    return {name: statistics.median(times) for name, times in taken.items()}


def limit() -> float:
    """Multiplications and additions in a second, of one thread, where nothing is in the way."""
    torch.set_num_threads(1)
    segment = Segment.of(Layer(torch.randn(512, 40, 1, 1), None, Geometry()))
    x = torch.randn(1, 40, 14, 16)
    best = 1e9
    for _ in range(200):
        _, steps = segment.timed(x)
        best = min(best, sum(s for name, s in steps if name == "operator"))
    return 2 * 512 * 40 * 14 * 16 / best


def profile(name: str, batch: int, sparsity: float, most: float) -> list[Sequence[str]]:
    """A row for each kind, those that take longest first."""
    x = example(name, batch)
    fast = runtime.compile(make(name, sparsity, False), x)
    kinds, one, two = kinds_of(fast, x), seconds_of(fast, x, 1), seconds_of(fast, x, 2)
    groups: dict[str, list[str]] = {}
    for row in fast.explain():
        groups.setdefault(kinds[row.name].text if row.name in kinds else row.op, []).append(row.name)
    groups.setdefault("copies, and the call", [n for n in one if not any(n in g for g in groups.values())])
    total = sum(one.values())
    rows: list[tuple[float, Sequence[str]]] = []
    for text, names in groups.items():
        took, shared = (sum(times.get(n, 0.0) for n in names) for times in (one, two))
        if not took:
            continue
        speed = sum(kinds[n].flops for n in names if n in kinds) / took
        cells = (f"{speed / 1e9:.0f}", f"{100 * speed / most:.0f} %") if speed else ("", "")
        rows.append((took, (text, str(len(names)), f"{100 * took / total:.1f} %", *cells, f"{took / shared:.2f}")))
    rows.sort(key=lambda row: -row[0])
    flops = sum(kind.flops for kind in kinds.values())
    all_of_it = (
        f"{flops / total / 1e9:.0f}",
        f"{100 * flops / total / most:.0f} %",
        f"{total / sum(two.values()):.2f}",
    )
    n = sum(map(len, groups.values()))
    return [*(row for _, row in rows), ("all", str(n), f"{1e3 * total:.2f} ms", *all_of_it)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = ["resnet18:1", "resnet18:16", "resnet50:1", "mobilenet_v1:1", "bert_ffn:128"]
    parser.add_argument("--models", nargs="+", default=networks, metavar="NAME:BATCH")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[90])
    given = parser.parse_args()
    warnings.filterwarnings("ignore")
    header("Where the engine's time goes", "torchvision", peer=False)
    most = limit()
    print(f"The limit, one thread: {most / 1e9:.0f} GF/s.\n")
    for text in given.models:
        name, _, batch = text.partition(":")
        for sparsity in given.sparsity:
            print(f"{name}, batch {batch or 1}, {sparsity:g} % zeros:\n")
            names = ("kind", "layers", "of the time", "GF/s", "of the limit", "two threads")
            print(table(names, profile(name, int(batch or 1), sparsity, most)) + "\n", flush=True)


if __name__ == "__main__":
    main()
