"""What is sparse? Rows first, text second; every number is counted from the weights."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gossamer.errors import TargetError, closest
from gossamer.targets import LayerTypes, Target, find_targets

if TYPE_CHECKING:
    import pandas as pd

_RULE = "-" * 80


@dataclass(frozen=True)
class LayerSparsity:
    """One row of a report.

    Args:
        layer: the layer's name.
        type: its type.
        params: weights in it.
        zeros: weights that are exactly 0.
        shape: the weight's shape.
    """

    layer: str
    type: str
    params: int
    zeros: int
    shape: tuple[int, ...]

    @property
    def sparsity(self) -> float:
        """Zeros in percent of the weights."""
        return 100 * self.zeros / self.params


@dataclass(frozen=True)
class SparsityReport:
    """What is sparse in a network: a row a layer, and totals.

    Args:
        rows: one `LayerSparsity` a layer, in the model's order.

    Example:
        >>> rep = SparsityReport((LayerSparsity("0", "Linear", 4, 1, (2, 2)),))
        >>> rep.zeros, rep.sparsity, rep["0"].sparsity
        (1, 25.0, 25.0)
    """

    rows: tuple[LayerSparsity, ...]

    @property
    def params(self) -> int:
        """Weights in all rows."""
        return sum(r.params for r in self.rows)

    @property
    def zeros(self) -> int:
        """Zeros in all rows."""
        return sum(r.zeros for r in self.rows)

    @property
    def sparsity(self) -> float:
        """Zeros in percent of all weights."""
        return 100 * self.zeros / self.params if self.params else 0.0

    def __getitem__(self, layer: str) -> LayerSparsity:
        for row in self.rows:
            if row.layer == layer:
                return row
        raise TargetError(f"no layer is called {layer!r}. {closest(layer, (r.layer for r in self.rows))}")

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values: 'layers', a list of rows, and the totals 'params', 'zeros', 'sparsity'."""
        layers = [{**asdict(r), "shape": list(r.shape), "sparsity": r.sparsity} for r in self.rows]
        return {"layers": layers, "params": self.params, "zeros": self.zeros, "sparsity": self.sparsity}

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON.

        Example:
            >>> SparsityReport(()).to_json()
            '{"layers": [], "params": 0, "zeros": 0, "sparsity": 0.0}'
        """
        return json.dumps(self.to_dict(), indent=indent)

    def to_dataframe(self) -> pd.DataFrame:
        """The rows as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed (`pip install pandas`).
        """
        import pandas as pd

        return pd.DataFrame(self.to_dict()["layers"], columns=["layer", "type", "params", "zeros", "sparsity", "shape"])

    def __str__(self) -> str:
        width = max([20, *(len(r.layer) for r in self.rows)])
        lines = ["Sparsity Report:", _RULE, _line("Layer", "Type", "Params", "Zeros", "Sparsity", width), _RULE]
        cells = [(r.layer, r.type, f"{r.params:,}", f"{r.zeros:,}", f"{r.sparsity:.2f}%") for r in self.rows]
        lines += [_line(*row, width) for row in cells]
        lines += [_RULE, _line("Overall", "all", f"{self.params:,}", f"{self.zeros:,}", f"{self.sparsity:.2f}%", width)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = [(r.layer, r.type, "×".join(map(str, r.shape)), r.params, r.zeros, r.sparsity) for r in self.rows]
        cells.append(("Overall", "all", "", self.params, self.zeros, self.sparsity))
        head = "".join(f"<th>{h}</th>" for h in ("Layer", "Type", "Shape", "Params", "Zeros", "Sparsity"))
        body = "".join(
            f"<tr><td>{html.escape(layer)}</td><td>{html.escape(kind)}</td><td>{shape}</td>"
            f"<td>{params:,}</td><td>{zeros:,}</td><td>{percent:.2f}%</td></tr>"
            for layer, kind, shape, params, zeros, percent in cells
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _line(layer: str, kind: str, params: str, zeros: str, sparsity: str, width: int) -> str:
    return f"{layer:<{width}} {kind:<16} {params:>13} {zeros:>13} {sparsity:>10}"


def report_of(targets: Iterable[Target]) -> SparsityReport:
    """The report over targets, counted from their weights now."""
    targets = list(targets)
    weights = [t.weight for t in targets]
    nonzero = [int(torch.count_nonzero(w.detach())) for w in weights]
    return SparsityReport(
        tuple(
            LayerSparsity(t.name, t.type, w.numel(), w.numel() - kept, tuple(w.shape))
            for t, w, kept in zip(targets, weights, nonzero, strict=True)
        )
    )


def report(model: nn.Module, layer_type: LayerTypes = nn.Conv2d) -> SparsityReport:
    """What is sparse in any network, trained here or not.

    Args:
        model: the network.
        layer_type: the types of layer to list.

    Raises:
        TargetError: it has no such layer.

    Example:
        >>> print(report(nn.Sequential(nn.Linear(2, 2)), nn.Linear).rows[0].type)
        Linear
    """
    return report_of(find_targets(model, layer_type))
