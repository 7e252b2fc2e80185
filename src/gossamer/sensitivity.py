"""How much does each layer alone suffer when it becomes sparse, and where are zeros best put then?"""

from __future__ import annotations

import html
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.errors import ArgumentError, FileError, TargetError, closest
from gossamer.placing import cheapest, hull_of, percent_of, whole_units
from gossamer.progress import bar
from gossamer.rules.allocation import as_fraction, count
from gossamer.rules.criteria import Criterion
from gossamer.rules.granularity import Granularity
from gossamer.sparsifier import Sparsifier
from gossamer.storage.states import load_state, save_state
from gossamer.targets import LayerTypes
from gossamer.weights import copy_of, put_weights

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_KIND = "sensitivity"


@dataclass(frozen=True)
class LayerSensitivity:
    """One measurement: one layer made sparse, all others as they were.

    Args:
        layer: the layer's name.
        params: weights in it.
        units: of the granularity that they make.
        sparsity: percent of its units that were masked.
        score: what `evaluate` gave then.
    """

    layer: str
    params: int
    units: int
    sparsity: float
    score: float


@dataclass(frozen=True)
class Sensitivity:
    """How much each layer suffers from each sparsity.

    Args:
        rows: one `LayerSensitivity` a measurement, layer by layer, sparsities rising.
        baseline: the score of the network as it was.
        higher_is_better: whether a high score is a good one.

    Example:
        >>> row = LayerSensitivity("0", 100, 100, 50.0, 0.7)
        >>> Sensitivity((row,), 0.9).drops()["0"]
        {50.0: 0.2}
    """

    rows: tuple[LayerSensitivity, ...]
    baseline: float
    higher_is_better: bool = True

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, in the network's order."""
        return tuple(dict.fromkeys(r.layer for r in self.rows))

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The sparsities that were tried, rising, in percent."""
        return tuple(sorted({r.sparsity for r in self.rows}))

    def drops(self) -> dict[str, dict[float, float]]:
        """Layer → sparsity in percent → by how much the score was worse than the network's own; below 0, better."""
        sign = 1 if self.higher_is_better else -1
        found: dict[str, dict[float, float]] = {}
        for row in self.rows:
            found.setdefault(row.layer, {})[row.sparsity] = round(sign * (self.baseline - row.score), 12)
        return found

    def to_targets(self, sparsity: float) -> dict[str, float]:
        """A target for each layer, such that as many weights are zero as asked, where they cost least.

        What several layers cost together is taken for the sum of what each costs alone. Between two measurements the
        cost runs straight, and it never falls as sparsity grows; where that leaves hollows, the line below them is
        taken, so that a weight more costs more the sparser its layer is. Weights then go wherever the next one costs
        least, and equal costs share. No layer gets a sparsity beyond the highest that was tried.

        Args:
            sparsity: percent of all weights of these layers together that are to be zero.

        Returns:
            Layer name → percent, as `SparsifyCallback(sparsity=…)` takes it: the units that it masks add up to
            `round(s·n/100)` of all weights, halves up, exactly for granularity 'weight', and as nearly as whole units
            allow for others.

        Raises:
            ArgumentError: more than the tried sparsities allow.

        Example:
            >>> rows = [LayerSensitivity("a", 100, 100, 80.0, 0.9), LayerSensitivity("b", 100, 100, 80.0, 0.5)]
            >>> Sensitivity(tuple(rows), 0.9).to_targets(50)
            {'a': 80.0, 'b': 20.0}
        """
        size = {r.layer: (r.params // r.units, r.units) for r in self.rows}  # weights a unit, units
        total = sum(each * n for each, n in size.values())
        budget = count(as_fraction(sparsity), total)
        lines = {layer: self._line(layer, size[layer]) for layer in self.layers}
        most = sum(line[-1][0] for line in lines.values())
        if budget > most:
            raise ArgumentError(
                f"sparsity={sparsity} is more than was measured: with every layer at the highest sparsity that was "
                f"tried, {100 * float(most / total):.4g} % are zero; measure higher ones, or ask for less"
            )
        weights = cheapest(lines, budget)
        counts = whole_units(weights, size, {n: line[-1][0] for n, line in lines.items()}, budget)
        return {layer: percent_of(counts[layer], size[layer][1]) for layer in self.layers}

    def _line(self, layer: str, size: tuple[int, int]) -> list[tuple[Fraction, float]]:
        """Points of masked weights and cost, from none on, on the lower convex hull of what was measured."""
        each, n = size
        worst = 0.0
        points = [(Fraction(0), 0.0)]
        for percent, drop in sorted(self.drops()[layer].items()):
            worst = max(worst, drop)
            masked = Fraction(count(as_fraction(percent), n) * each)
            if masked > points[-1][0]:
                points.append((masked, worst))
        return hull_of(points)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws what each layer costs at each sparsity: a heat map, layers down, sparsities across."""
        from gossamer.plots import plot_sensitivity

        drops = self.drops()
        values = [[drops[layer].get(s, math.nan) for s in self.sparsities] for layer in self.layers]
        return plot_sensitivity(self.layers, self.sparsities, values, ax)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values: 'rows', 'baseline', 'higher_is_better'."""
        rows = [asdict(r) for r in self.rows]
        return {"rows": rows, "baseline": self.baseline, "higher_is_better": self.higher_is_better}

    def to_json(self, indent: int | None = None) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def to_dataframe(self) -> pd.DataFrame:
        """The rows as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed (`pip install pandas`).
        """
        import pandas as pd

        return pd.DataFrame(self.to_dict()["rows"], columns=["layer", "params", "units", "sparsity", "score"])

    def __getitem__(self, layer: str) -> tuple[LayerSensitivity, ...]:
        found = tuple(r for r in self.rows if r.layer == layer)
        if not found:
            raise TargetError(f"no layer is called {layer!r}. {closest(layer, self.layers)}")
        return found

    def __str__(self) -> str:
        head, cells = self._cells()
        width = max(20, *(len(row[0]) for row in cells))
        lines = [f"{row[0]:<{width}}" + "".join(f" {c:>10}" for c in row[1:]) for row in [head, *cells]]
        rule = "-" * len(lines[0])
        return "\n".join(
            [f"Score by sparsity of one layer alone; {self.baseline:.4g} as it is:", rule, lines[0], rule, *lines[1:]]
        )

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        scores = {(r.layer, r.sparsity): f"{r.score:.4g}" for r in self.rows}
        params = {r.layer: f"{r.params:,}" for r in self.rows}
        head = ["Layer", "Params", *(f"{s:g} %" for s in self.sparsities)]
        return head, [[n, params[n], *(scores.get((n, s), "") for s in self.sparsities)] for n in self.layers]

    def _repr_html_(self) -> str:
        head, cells = self._cells()
        top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in cells)
        return f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table><p>{self.baseline:.4g} as it is</p>"


def sensitivity(
    model: nn.Module,
    evaluate: Callable[[nn.Module], float],
    sparsities: Iterable[float] = (50, 70, 80, 90, 95, 99),
    *,
    granularity: str | Granularity = "weight",
    criteria: str | Criterion | Callable[..., Tensor] = "large_final",
    layer_type: LayerTypes = nn.Conv2d,
    exclude: Iterable[str] = (),
    seed: int = 0,
    data: Any = None,
    loss_func: Callable[..., Tensor] | None = None,
    higher_is_better: bool = True,
    file: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measures how a network does with one layer sparse and all others as they are, layer by layer.

    One layer at a time, as Han et al. 2015 (arXiv:1506.02626) measured it, without training in between. Nothing stays
    changed: weights, statistics and mode are put back, also when `evaluate` raises.

    Args:
        model: the network, trained.
        evaluate: network → score: accuracy, or minus the loss, which tells more from fewer examples. It is called
            once for the network as it is, and once for each layer and sparsity.
        sparsities: percentages to try.
        granularity: which weights live and die together.
        criteria: which of them matter.
        layer_type: type of layer to measure, or a tuple of types.
        exclude: names or patterns of layers that are left out.
        seed: of the criterion 'random'.
        data: for criteria that look at gradients or activations: batches, as a `Sparsifier` takes them.
        loss_func: (output, target) → loss, for criteria that look at gradients.
        higher_is_better: whether a high score is a good one; False for a loss.
        file: where each measurement is kept as it is made; the same call goes on from there.
        progress: show a bar, if tqdm is installed.

    Returns:
        The measurements, and what can be made of them.

    Raises:
        ArgumentError: an argument that cannot be used, or `evaluate` gave no finite number.
        TargetError: a layer name that matches nothing, or weights with nan.
        FileError: the file is of another measurement; the message says what differs.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
        >>> x = torch.rand(8, 4)
        >>> found = sensitivity(net, lambda m: -float(m(x).detach().var()), [50], layer_type=nn.Linear, progress=False)
        >>> found.layers, found.sparsities
        (('0', '1'), (50.0,))
    """
    if not callable(evaluate):
        raise ArgumentError(f"evaluate={evaluate!r} is no function; give one from a network to its score")
    if file is not None and not isinstance(file, (str, os.PathLike)):
        raise ArgumentError(f"file={file!r} is no path; give one, such as 'found.safetensors', or None")
    tried = _checked(sparsities)
    sparsifier = Sparsifier(
        model, granularity, "local", criteria, layer_type, exclude=exclude, seed=seed, data=data, loss_func=loss_func
    )
    sparsifier.check_weights()
    own = copy_of(model)
    modes = [(m, m.training) for m in model.modules()]

    def score_of() -> float:
        try:
            return _number(evaluate(model))
        finally:
            put_weights(model, own)
            for module, mode in modes:
                module.training = mode

    jobs = [(t.name, percent) for t in sparsifier.targets for percent in tried]
    settings = _settings(sparsifier, own, higher_is_better)
    path = None if file is None else Path(file)
    done = _load(path, settings)
    baseline = done.get("", {}).get("0.0")
    if baseline is None:
        baseline = score_of()
        done[""] = {"0.0": baseline}
        _save(path, settings, done)
    known = sum(repr(p) in done.get(name, {}) for name, p in jobs)
    with bar(progress, len(jobs), known, "evaluation") as advance:
        for name, percent in jobs:
            if repr(percent) in done.get(name, {}):
                continue
            try:
                sparsifier.sparsify_layer(name, percent)
                score = score_of()
            finally:
                sparsifier.release()
                put_weights(model, own)
            done.setdefault(name, {})[repr(percent)] = score
            _save(path, settings, done)
            advance(f"{name} at {percent:g} %: {score:.4g}")
    units = _units(sparsifier)
    rows = [
        LayerSensitivity(t.name, t.weight.numel(), units[t.name], percent, done[t.name][repr(percent)])
        for t in sparsifier.targets
        for percent in tried
    ]
    return Sensitivity(tuple(rows), baseline, higher_is_better)


def _checked(sparsities: Iterable[float]) -> list[float]:
    if isinstance(sparsities, (str, Mapping)) or not isinstance(sparsities, Iterable):
        raise ArgumentError(f"sparsities={sparsities!r} are no percentages; give several, such as (50, 80, 90)")
    given = sorted({float(100 * as_fraction(s)) for s in sparsities} - {0.0})
    if not given:
        raise ArgumentError("sparsities has none above 0; give several percentages, such as (50, 80, 90)")
    return given


def _number(value: Any) -> float:
    try:
        if isinstance(value, (bool, str, bytes)):
            raise TypeError
        score = float(value.detach() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"evaluate gave {value!r}; it must give one number, such as the accuracy") from None
    if not math.isfinite(score):
        raise ArgumentError(f"evaluate gave {score!r}, with which nothing can be compared; look at what it computes")
    return score


def _units(sparsifier: Sparsifier) -> dict[str, int]:
    dims = {t.name: sparsifier.granularity.spans(t.axes) for t in sparsifier.targets}
    return {t.name: math.prod(1 if i in dims[t.name] else n for i, n in enumerate(t.view)) for t in sparsifier.targets}


def _settings(sparsifier: Sparsifier, own: Mapping[str, Tensor], higher_is_better: bool) -> dict[str, str]:
    digest = 0
    for name in sorted(own):
        digest = zlib.crc32(name.encode(), digest)
        digest = zlib.crc32(own[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes(), digest)
    return {
        "granularity": sparsifier.granularity.name,
        "criteria": sparsifier.criterion.name,
        "seed": str(sparsifier.evidence.seed),
        "higher_is_better": str(higher_is_better),
        "weights of the network": f"{digest:08x}",
    }


def _load(path: Path | None, settings: Mapping[str, str]) -> dict[str, dict[str, float]]:
    if path is None or not path.exists():
        return {}
    state = load_state(path, _KIND)
    for name, here in settings.items():
        there = state.get("settings", {}).get(name)
        if there != here:
            raise FileError(
                f"{os.fspath(path)!r} is of another measurement: {name} is {there} there and {here} here; give another "
                "file, or delete it"
            )
    return state["scores"]


def _save(path: Path | None, settings: Mapping[str, str], scores: Mapping[str, Mapping[str, float]]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_state(path, {"settings": dict(settings), "scores": {n: dict(s) for n, s in scores.items()}}, _KIND)
