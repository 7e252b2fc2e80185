"""What sparsity pays: the accuracy, the file and the time of networks that were trained dense and sparse."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from gossamer import runtime
from gossamer.bench import alternating, seconds
from gossamer.storage.files import save


@dataclass(frozen=True)
class Payment:
    """One network.

    Args:
        run: which training it is from.
        engine: what ran it: 'PyTorch' or 'Gossamer'.
        accuracy: of what that engine computed, from 0 to 1.
        path: the file.
        nbytes: its size.
        ms: side of an image in pixels → milliseconds an image, median.
    """

    run: str
    engine: str
    accuracy: float
    path: Path
    nbytes: int
    ms: Mapping[int, float]


def pay(
    networks: Mapping[str, nn.Module],
    batches: Sequence[tuple[Tensor, Tensor]],
    folder: Path,
    sides: Iterable[int] = (224,),
    rounds: int = 5,
) -> list[Payment]:
    """Saves networks, and times them on one image at a time with one thread, in turns.

    Args:
        networks: run → network, in eval mode, on the CPU. The first is dense and runs in PyTorch, in the faster one of
            its two layouts; the others are compiled.
        batches: images and their classes.
        folder: for a file each.
        sides: of images that are timed, in pixels.
        rounds: how often each has its turn.

    Returns:
        One row a network.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
        >>> batch = (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))
        >>> rows = pay({"dense": net, "sparse": net}, [batch], Path(tempfile.mkdtemp()), sides=[8], rounds=1)
        >>> [row.engine for row in rows], rows[0].accuracy == rows[1].accuracy
        (['PyTorch', 'Gossamer'], True)
    """
    first = next(iter(networks))
    channels = batches[0][0].shape[1]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two would have to wait for each other wherever something else runs
    try:
        with torch.no_grad():
            ready = {
                run: net if run == first else runtime.compile(net, batches[0][0][:1]) for run, net in networks.items()
            }
            accuracies = {run: _accuracy(net, batches) for run, net in ready.items()}
            times = {side: _times(ready, first, torch.randn(1, channels, side, side), rounds) for side in sides}
    finally:
        torch.set_num_threads(threads)
    rows: list[Payment] = []
    for run, net in networks.items():
        path = save(net, folder / _file_name(run))
        engine = "PyTorch" if run == first else "Gossamer"
        ms = {side: found[run] for side, found in times.items()}
        rows.append(Payment(run, engine, accuracies[run], path, path.stat().st_size, ms))
    return rows


def _times(networks: Mapping[str, nn.Module], first: str, x: Tensor, rounds: int) -> dict[str, float]:
    last = x.contiguous(memory_format=torch.channels_last)
    calls = {run: (net, x) for run, net in networks.items()}
    calls["channels last"] = (networks[first], last)  # its output and all between follow the input
    jobs = {run: partial(seconds, partial(net, given)) for run, (net, given) in calls.items()}
    found = alternating(rounds, jobs, warmup=0)
    ms = {run: 1e3 * statistics.median(times) for run, times in found.items()}
    ms[first] = min(ms[first], ms.pop("channels last"))
    return ms


def _accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    right = total = 0
    for images, classes in batches:
        right += int((network(images).argmax(dim=1) == classes).sum())
        total += len(classes)
    return right / total


def _file_name(run: str) -> str:
    words = re.findall(r"[a-z0-9.]+", run.partition(",")[0].lower())
    return "-".join(["network", *words]) + ".safetensors"


def pay_table(rows: Sequence[Payment]) -> str:
    """The rows as text, with the line that says what was measured.

    Example:
        >>> row = Payment("dense", "PyTorch", 0.9, Path("dense.safetensors"), 2_000_000, {28: 1.5})
        >>> print(pay_table([row]).splitlines()[-1])
        dense                PyTorch      90.00%     2.0 MB   100.0%     1.50 ms   1.0×
    """
    sides = list(rows[0].ms)
    head = f"{'Run':<20} {'Runs in':<8} {'Accuracy':>10} {'File':>10} {'of dense':>8}"
    head += "".join(f" {f'{side}×{side} px':>11}       " for side in sides)
    lines = [
        "What it pays, on this machine: one image at a time, one thread, medians, all networks in turns",
        "",
        head.rstrip(),
        "-" * len(head),
    ]
    for row in rows:
        share = 100 * row.nbytes / rows[0].nbytes
        line = f"{row.run:<20} {row.engine:<8} {row.accuracy:>10.2%} {row.nbytes / 1e6:>7.1f} MB {share:>7.1f}%"
        for side in sides:
            line += f" {row.ms[side]:>8.2f} ms {rows[0].ms[side] / row.ms[side]:>5.1f}×"
        lines.append(line)
    return "\n".join(lines)
