"""How is what a file holds told? A row a tensor, totals, and a table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch

from gossamer.errors import ArgumentError, closest


@dataclass(frozen=True)
class StoredTensor:
    """One row of a file's contents.

    Args:
        name: the tensor's.
        shape: its shape.
        dtype: its dtype when loaded.
        stored: 'dense', 'bits' or 'gaps', with the values' dtype where that is another; 'same as …' where it is shared.
        zeros: elements that are exactly 0.
        dense_bytes: what it takes in memory; 0 where it is shared.
        nbytes: what it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    zeros: int
    dense_bytes: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()

    @property
    def share(self) -> float:
        """Bytes in the file in percent of those in memory."""
        return 100 * self.nbytes / self.dense_bytes if self.dense_bytes else 0.0


@dataclass(frozen=True)
class FileContents:
    """What a file holds: a row a tensor, and totals.

    Args:
        path: the file.
        rows: one `StoredTensor` a tensor, in the file's order.
        file_bytes: the whole file, header and all.
    """

    path: str
    rows: tuple[StoredTensor, ...]
    file_bytes: int

    def __getitem__(self, name: str) -> StoredTensor:
        for row in self.rows:
            if row.name == name:
                return row
        raise ArgumentError(f"no tensor {name!r} in {self.path!r}. {closest(name, (r.name for r in self.rows))}")

    @property
    def dense_bytes(self) -> int:
        """What all tensors take in memory."""
        return sum(r.dense_bytes for r in self.rows)

    @property
    def share(self) -> float:
        """The file in percent of the tensors in memory."""
        return 100 * self.file_bytes / self.dense_bytes if self.dense_bytes else 100.0

    def to_json(self) -> str:
        """Rows and totals as JSON."""
        rows = [{**asdict(r), "share": round(r.share, 4)} for r in self.rows]
        totals = {"path": self.path, "file_bytes": self.file_bytes, "dense_bytes": self.dense_bytes}
        return json.dumps({**totals, "share": round(self.share, 4), "tensors": rows}, indent=2)

    def __str__(self) -> str:
        return "\n".join(_table(self))


def _table(what: FileContents) -> Iterable[str]:
    names = [
        (r.name, "×".join(map(str, r.shape)) or "scalar", f"dense {r.dtype}" if r.stored == "dense" else r.stored)
        for r in what.rows
    ]
    titles = ("Tensor", "Shape", "Stored as")
    widths = [max(map(len, column)) for column in zip(titles, *names, strict=True)]
    widths[0] = max(widths[0], 15)

    def line(texts: Iterable[str], zeros: str, dense: str, size: str, share: str) -> str:
        left = "  ".join(f"{text:<{width}}" for text, width in zip(texts, widths, strict=True))
        return f"{left} {zeros:>8} {dense:>13} {size:>13} {share:>8}"

    head = line(titles, "Zeros", "In memory", "In file", "Share")
    yield head
    yield "-" * len(head)
    for r, texts in zip(what.rows, names, strict=True):
        zeros = 100 * r.zeros / r.numel if r.numel else 0.0
        yield line(texts, f"{zeros:.2f}%", f"{r.dense_bytes:,}", f"{r.nbytes:,}", f"{r.share:.2f}%")
    yield "-" * len(head)
    yield line(("File and header", "", ""), "", f"{what.dense_bytes:,}", f"{what.file_bytes:,}", f"{what.share:.2f}%")
