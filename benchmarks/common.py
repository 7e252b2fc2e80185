"""What the benchmarks share: versions, a table, and from the package who runs where, and rounds that alternate."""

from __future__ import annotations

import gzip
import importlib
import os
import platform
import struct
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from types import ModuleType

import numpy as np

from gossamer.bench import alternating as alternating
from gossamer.bench import is_installed as is_installed
from gossamer.bench import machine as machine
from gossamer.bench import median_ratio as median_ratio
from gossamer.bench import quartiles as quartiles
from gossamer.bench import version

PEER = "fasterai"
PEER_PIN = "fasterai==0.4.1"


def versions(*distributions: str) -> str:
    """Versions of Python and of distributions, those that are not installed named as such."""
    found = (f"{name} {version(name) or 'not installed'}" for name in distributions)
    return ", ".join([f"Python {platform.python_version()}", *found])


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
