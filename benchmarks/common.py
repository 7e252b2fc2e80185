"""What the benchmarks share: who runs where, versions, rounds that alternate, a table."""

from __future__ import annotations

import gzip
import importlib
import importlib.metadata
import os
import platform
import statistics
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

PEER = "fasterai"
PEER_PIN = "fasterai==0.4.1"


def machine() -> str:
    """The CPU's name, its cores that this process may use, and the threads that torch uses."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_name()}, {usable} cores, {torch.get_num_threads()} threads used, {platform.system()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    simd = {"avx512f", "avx2"} & set(next((line.split() for line in lines if line.startswith("flags")), []))
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({'AVX-512' if 'avx512f' in simd else 'AVX2'})" if simd else name


def versions(*distributions: str) -> str:
    """Versions of Python and of distributions, those that are not installed named as such."""
    found = [f"Python {platform.python_version()}"]
    for name in distributions:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def command() -> str:
    """The command that runs now, folders cut to their last part so that it can be published."""
    words = [f"{Path(w).name}/" if os.sep in w and Path(w).is_dir() else w for w in sys.argv[1:]]
    words = [Path(w).name if os.sep in w.rstrip(os.sep) else w for w in words]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def header(title: str, *distributions: str, peer: bool = True) -> None:
    """Prints what has to stand above any number: what, when, where, of which versions; and if a peer is missing."""
    print(f"# {title}\n")
    print(f"- command: `{command()}`")
    print(f"- date: {date.today().isoformat()}")
    print(f"- machine: {machine()}")
    print(f"- versions: {versions(*distributions)}")
    if peer and not is_installed(PEER):
        print(f"- the peer is not installed: `pip install {PEER_PIN}` adds its columns")
    print(flush=True)


def is_installed(distribution: str) -> bool:
    """Whether a distribution is installed."""
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def peer_module(name: str) -> ModuleType | None:
    """A module of the peer's, or None where it is not installed."""
    return importlib.import_module(f"{PEER}.{name}") if is_installed(PEER) else None


def read_idx(folder: Path, name: str) -> np.ndarray:
    """An array from a file in MNIST's idx format, gzipped (`name` and .gz) or not."""
    packed, plain = folder / f"{name}.gz", folder / name
    if not packed.exists() and not plain.exists():
        raise SystemExit(f"--data {folder}: no {packed.name} there; the four idx files of the data set are needed")
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else plain.read_bytes()
    n_dims = raw[3]
    shape = struct.unpack(f">{n_dims}I", raw[4 : 4 + 4 * n_dims])
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * n_dims).reshape(shape)


CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""Clocks by name. On a machine that others use too, 'cpu' with one thread leaves out the time that they had."""


def alternating(rounds: int, jobs: Mapping[str, Callable[[], float]], warmup: int = 1) -> dict[str, list[float]]:
    """The seconds that each job says it took, round by round: all jobs in every round, another one first each time.

    Whatever slows the machine for a while then slows all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for i in range(-warmup, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            took = jobs[name]()
            if i >= 0:
                seconds[name].append(took)
    return seconds


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of time over base's time of the same round."""
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table whose columns line up; the first one is left-aligned, the others right-aligned."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        first, *others = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join([first, *others]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(columns), rule, *(line(row) for row in cells)])
