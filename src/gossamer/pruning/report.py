"""What was pruned, what was not, and why: rows first, text second; every number is counted from the network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from gossamer.errors import TargetError, closest
from gossamer.pruning.inputs import twin_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LayerPruning:
    """One row of a report.

    Args:
        layer: the layer's name.
        type: its type.
        filters: filters (or attention heads) that it had.
        kept: filters that it has now.
        asked: filters that were to go: those that are zero, or round(s·n/100) of a target.
        why: why another number went; empty where that many did.
    """

    layer: str
    type: str
    filters: int
    kept: int
    asked: int
    why: str = ""

    @property
    def removed(self) -> int:
        """Filters that are gone."""
        return self.filters - self.kept

    @property
    def sparsity(self) -> float:
        """Filters that are gone, in percent."""
        return 100 * self.removed / self.filters


@dataclass(frozen=True)
class PruningReport:
    """What became of each layer's filters, and of the network's size.

    Args:
        rows: one `LayerPruning` a layer, in the network's order.
        params_before: parameters that the network had.
        params: parameters that it has.
        macs_before: multiply-adds of one example before; 0 where they were not counted.
        macs: multiply-adds of one example now.

    Example:
        >>> rep = PruningReport((LayerPruning("0", "Conv2d", 8, 4, 4),), 80, 40)
        >>> rep.filters, rep.kept, rep["0"].sparsity
        (8, 4, 50.0)
    """

    rows: tuple[LayerPruning, ...]
    params_before: int
    params: int
    macs_before: int = 0
    macs: int = 0

    @property
    def filters(self) -> int:
        """Filters that there were."""
        return sum(r.filters for r in self.rows)

    @property
    def kept(self) -> int:
        """Filters that there are."""
        return sum(r.kept for r in self.rows)

    @property
    def left(self) -> tuple[LayerPruning, ...]:
        """The rows of layers of which another number of filters went than was asked for."""
        return tuple(r for r in self.rows if r.removed != r.asked)

    def __getitem__(self, layer: str) -> LayerPruning:
        for row in self.rows:
            if row.layer == layer:
                return row
        raise TargetError(f"no layer is called {layer!r}. {closest(layer, (r.layer for r in self.rows))}")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values: 'layers', a list of rows, and the totals."""
        layers = [{**asdict(r), "removed": r.removed, "sparsity": r.sparsity} for r in self.rows]
        totals = ("filters", "kept", "params_before", "params", "macs_before", "macs")
        return {"layers": layers, **{name: getattr(self, name) for name in totals}}

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_dataframe(self) -> pd.DataFrame:
        """The rows as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed (`pip install pandas`).
        """
        import pandas as pd

        columns = ["layer", "type", "filters", "kept", "removed", "asked", "sparsity", "why"]
        return pd.DataFrame(self.to_dict()["layers"], columns=columns)

    def __str__(self) -> str:
        width = max([20, *(len(r.layer) for r in self.rows)])
        rule = "-" * (width + 60)
        head = ("Layer", "Type", "Filters", "Kept", "Asked to go", "Gone")
        lines = ["Pruning Report:", rule, _line(*head, width), rule]
        lines += [
            _line(r.layer, r.type, f"{r.filters:,}", f"{r.kept:,}", f"{r.asked:,}", f"{r.removed:,}", width)
            + (f"  {r.why}" if r.why else "")
            for r in self.rows
        ]
        asked = sum(r.asked for r in self.rows)
        total = (f"{self.filters:,}", f"{self.kept:,}", f"{asked:,}", f"{self.filters - self.kept:,}")
        lines += [rule, _line("Overall", "all", *total, width)]
        return "\n".join(
            [*lines, *(f"{what}: {before:,} → {now:,} ({share})" for what, before, now, share in self._sizes())]
        )

    def _sizes(self) -> list[tuple[str, int, int, str]]:
        sizes = [("Parameters", self.params_before, self.params), ("Multiply-adds", self.macs_before, self.macs)]
        return [(w, b, n, f"{100 * n / b:.1f} %") for w, b, n in sizes if b]

    def _repr_html_(self) -> str:
        head = ("Layer", "Type", "Filters", "Kept", "Asked to go", "Gone", "Why")
        rows = [(r.layer, r.type, r.filters, r.kept, r.asked, r.removed, r.why) for r in self.rows]
        asked = sum(r.asked for r in self.rows)
        rows.append(("Overall", "all", self.filters, self.kept, asked, self.filters - self.kept, ""))
        cells = [[c if isinstance(c, str) else f"{c:,}" for c in row] for row in rows]
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells)
        sizes = "".join(f"<p>{what}: {before:,} → {now:,} ({share})</p>" for what, before, now, share in self._sizes())
        top = "".join(f"<th>{h}</th>" for h in head)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>{sizes}"


def _line(layer: str, kind: str, filters: str, kept: str, asked: str, gone: str, width: int) -> str:
    return f"{layer:<{width}} {kind:<20} {filters:>8} {kept:>8} {asked:>12} {gone:>8}"


def count_params(model: nn.Module) -> int:
    """Parameters, shared ones once.

    Example:
        >>> count_params(nn.Linear(2, 1))
        3
    """
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, inputs: Sequence[Any]) -> int:
    """Multiply-adds of convolutions and matrix products for one example, counted by PyTorch's own counter.

    Example:
        >>> count_macs(nn.Linear(4, 2), (torch.ones(3, 4),))
        8
    """
    twin = twin_of(model)
    batch = next((i.shape[0] for i in inputs if isinstance(i, Tensor) and i.ndim), 1)
    # With gradients, for without them attention runs as one operation that the counter does not know.
    with FlopCounterMode(display=False) as counter, torch.enable_grad(), torch.random.fork_rng(devices=[]):
        twin(*inputs)
    return counter.get_total_flops() // (2 * batch)


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names in a sentence.

    Example:
        >>> listed(["a", "b", "c", "d"])
        "'a', 'b', 'c' and 1 more"
    """
    shown = ", ".join(repr(name) for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
