"""Networks of some microseconds, where a call costs as much as what is computed: compiled, and eager.

Each network is timed as it is in PyTorch and as `runtime.compile` makes it, in blocks that take turns; the column is
Gossamer's time over PyTorch's, in the median of the rounds: below 1 Gossamer is faster.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from common import alternating, header, median_ratio, table
from gossamer import Sparsifier, runtime

SECONDS = 0.01
"""That a block of calls takes, about."""


def mlp(inputs: int, hidden: int) -> nn.Module:
    sizes = [nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*sizes)


def alone(width: int) -> nn.Module:
    """Layers that each stand alone, since what is between them runs in PyTorch."""
    each = [(nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh()) for _ in range(4)]
    return nn.Sequential(*[layer for layers in each for layer in layers])


def lenet() -> nn.Module:
    convolutions = [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    head = [nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)]
    return nn.Sequential(*convolutions, *head)


def three_convolutions() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o, stride in ((3, 32, 1), (32, 64, 2), (64, 64, 2)):
        layers += [nn.Conv2d(i, o, 3, stride, 1), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETWORKS: Sequence[tuple[str, Callable[[], nn.Module], tuple[int, ...]]] = (
    ("Linear 64", lambda: nn.Sequential(nn.Linear(64, 64)), (1, 64)),
    ("MLP 16-32-32", lambda: mlp(16, 32), (1, 16)),
    ("MLP 784-128-128", lambda: mlp(784, 128), (1, 784)),
    ("MLP 784-300-300", lambda: mlp(784, 300), (1, 784)),
    ("MLP 784-300-300", lambda: mlp(784, 300), (64, 784)),
    ("Linear, LayerNorm 256 × 4", lambda: alone(256), (1, 256)),
    ("Linear, LayerNorm 128 × 4", lambda: alone(128), (16, 128)),
    ("LeNet", lenet, (1, 1, 28, 28)),
    ("three convolutions, 32 px", three_convolutions, (1, 3, 32, 32)),
)


def seconds_of(model: nn.Module, x: Tensor, calls: int) -> float:
    """Of one call, in a block of them."""
    began = time.perf_counter()
    for _ in range(calls):
        model(x)
    return (time.perf_counter() - began) / calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0, 50, 90], metavar="PERCENT")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    header("Small networks", "torch", peer=False)
    rows: list[list[str]] = []
    for name, make, shape in NETWORKS:
        cells: list[str] = []
        for sparsity in options.sparsities:
            torch.manual_seed(0)
            model, x = make().eval(), torch.randn(shape)
            Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(sparsity)
            fast = runtime.compile(model, x)
            with torch.inference_mode():
                calls = max(5, int(SECONDS / seconds_of(model, x, 20)))
                jobs = {
                    kind: (lambda m=m, x=x, calls=calls: seconds_of(m, x, calls))
                    for kind, m in (("eager", model), ("fast", fast))
                }
                times = alternating(options.rounds, jobs, warmup=2)
            if not cells:
                cells.append(f"{1e6 * statistics.median(times['eager']):.0f}")
            cells.append(f"{median_ratio(times['fast'], times['eager']):.2f}")
        rows.append([name, str(shape[0]), *cells])
        print(" ".join(rows[-1]), flush=True)
    columns = ["network", "batch", "PyTorch, µs", *(f"{s:g} %" for s in options.sparsities)]
    print("\n" + table(columns, rows))


if __name__ == "__main__":
    main()
