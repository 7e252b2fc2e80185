"""Pictures of schedules, reports and runs; matplotlib is imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gossamer.errors import ArgumentError
from gossamer.report import SparsityReport
from gossamer.rules.schedules import Schedule, as_schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _ACCENT, _SOFT = "#1f3a5f", "#d1495b", "#c9d3df"


def _axes(ax: Axes | None, figsize: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise ArgumentError("plots need matplotlib; install it with: pip install 'gossamer[plots]'") from None
    return plt.subplots(figsize=figsize, layout="constrained")[1]


def _plain(ax: Axes) -> Axes:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    return ax


def plot_schedule(
    *schedules: Schedule | str | Callable[..., Any], sparsity: float = 100, points: int = 401, ax: Axes | None = None
) -> Axes:
    """Draws how sparsity grows over training.

    Args:
        schedules: one or several schedules, names of registered ones, or functions.
        sparsity: percent that is reached at progress 1.
        points: how finely to draw.
        ax: matplotlib axes to draw on; new ones if not given.

    Returns:
        The axes.

    Raises:
        ArgumentError: no schedule, an unknown one, or matplotlib is not installed.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> len(plot_schedule("one_cycle", "agp", sparsity=90).lines)
        2
    """
    if not schedules:
        raise ArgumentError("plot_schedule() was given no schedule; try plot_schedule('one_cycle', 'cos')")
    ax = _plain(_axes(ax, (6, 3.4)))
    at = [i / (points - 1) for i in range(points)]
    for schedule in map(as_schedule, schedules):
        ax.plot(at, [sparsity * schedule(x) for x in at], label=schedule.name, linewidth=2)
    ax.set(xlabel="fraction of training", ylabel="sparsity (%)", xlim=(0, 1))
    ax.legend(frameon=False)
    return ax


def plot_sparsity(report: SparsityReport, ax: Axes | None = None) -> Axes:
    """Draws the sparsity of every layer as a bar, with the whole network's as a line.

    Args:
        report: from `report(model)` or a callback.
        ax: matplotlib axes to draw on; new ones if not given.

    Returns:
        The axes.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> from gossamer.report import LayerSparsity
        >>> len(plot_sparsity(SparsityReport((LayerSparsity("0", "Linear", 4, 1, (2, 2)),))).patches)
        1
    """
    ax = _plain(_axes(ax, (max(6.0, 0.34 * len(report.rows)), 3.6)))
    places = range(len(report.rows))
    ax.bar(places, [r.sparsity for r in report.rows], color=_INK)
    ax.axhline(report.sparsity, color=_ACCENT, linewidth=1.5, label=f"overall {report.sparsity:.2f} %")
    ax.set_xticks(places, [r.layer for r in report.rows], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    ax.set(ylabel="sparsity (%)", ylim=(0, 100))
    ax.legend(frameon=False, loc="upper right", bbox_to_anchor=(1, 1.14))
    return ax


def plot_training(
    history: Sequence[Mapping[str, float]],
    schedule: Schedule | None = None,
    sparsity: float = 100,
    ax: Axes | None = None,
) -> Axes:
    """Draws the sparsity that was counted at the end of every epoch, over the schedule that asked for it.

    Args:
        history: one mapping an epoch, with 'position' (fraction of training) and 'sparsity' (percent).
        schedule: drawn behind, where given.
        sparsity: percent that the schedule reaches at progress 1.
        ax: matplotlib axes to draw on; new ones if not given.

    Returns:
        The axes.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> len(plot_training([{"position": 1.0, "sparsity": 50.0}]).lines)
        1
    """
    ax = _plain(_axes(ax, (6, 3.4)))
    if schedule is not None:
        at = [i / 400 for i in range(401)]
        ax.plot(at, [sparsity * schedule(x) for x in at], color=_SOFT, linewidth=3, label=f"{schedule.name}, asked for")
    ax.plot(
        [h["position"] for h in history],
        [h["sparsity"] for h in history],
        "o",
        color=_ACCENT,
        label="counted at the end of each epoch",
    )
    ax.set(xlabel="fraction of training", ylabel="sparsity (%)", xlim=(0, 1.02), ylim=(0, None))
    ax.legend(frameon=False)
    return ax


def plot_lottery(curves: Mapping[str, Mapping[float, Sequence[float]]], ax: Axes | None = None) -> Axes:
    """Draws scores over the weights that remain, every halving as far as the one before, dense on the left.

    The first curve stands out. Where a point has several scores, the line is their mean and a band spans them.

    Args:
        curves: label → percent of weights that remain → scores.
        ax: matplotlib axes to draw on; new ones if not given.

    Returns:
        The axes.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = plot_lottery({"ticket": {50.0: [0.5, 1.0], 100.0: [0.5]}})
        >>> ax.lines[0].get_xydata().tolist()
        [[100.0, 0.5], [50.0, 0.75]]
    """
    ax = _plain(_axes(ax, (7, 4)))
    ax.set_xscale("log", base=2)
    ticks: set[float] = set()
    for i, (label, points) in enumerate(curves.items()):
        at = sorted(points, reverse=True)
        ticks |= set(at)
        color = (_ACCENT, _INK, "#8a9aab", "#d9a441")[i % 4]
        ax.plot(at, [sum(points[x]) / len(points[x]) for x in at], "o-", color=color, markersize=4, label=label)
        if any(len(scores) > 1 for scores in points.values()):
            ax.fill_between(at, [min(points[x]) for x in at], [max(points[x]) for x in at], color=color, alpha=0.15)
    shown = sorted(ticks, reverse=True)[:: max(1, -(-len(ticks) // 9))]
    ax.set_xticks(shown, [f"{x:.3g}" for x in shown])
    ax.set_xticks([], minor=True)
    ax.invert_xaxis()
    ax.set(xlabel="weights that remain (%)", ylabel="score")
    ax.legend(frameon=False)
    return ax


def plot_sensitivity(
    layers: Sequence[str], sparsities: Sequence[float], drops: Sequence[Sequence[float]], ax: Axes | None = None
) -> Axes:
    """Draws what each layer alone costs at each sparsity, as a heat map with the numbers in it.

    Args:
        layers: names, drawn from the top down.
        sparsities: percentages, drawn from left to right.
        drops: one row a layer, one number a sparsity: by how much the score was worse; nan is left white.
        ax: matplotlib axes to draw on; new ones if not given.

    Returns:
        The axes.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = plot_sensitivity(["a", "b"], [50, 90], [[0.0, 0.1], [0.2, 0.5]])
        >>> [t.get_text() for t in ax.get_yticklabels()], len(ax.texts)
        (['a', 'b'], 4)
    """
    ax = _axes(ax, (2.6 + 0.62 * len(sparsities), 0.9 + 0.27 * len(layers)))
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("drops", ["#f4f6f9", "#e9a6ad", _ACCENT, "#6d1626"])
    highest = max([d for row in drops for d in row if d == d], default=0.0)
    top = highest if highest > 0 else 1.0
    image = ax.imshow(drops, cmap=colours, vmin=0, vmax=top, aspect="auto")
    for y, row in enumerate(drops):
        for x, drop in enumerate(row):
            if drop == drop:
                ink = "white" if drop > 0.55 * top else _INK
                ax.text(x, y, f"{drop:.2g}", ha="center", va="center", fontsize=7, color=ink)
    ax.set_xticks(range(len(sparsities)), [f"{s:g}" for s in sparsities], fontsize=8)
    ax.set_yticks(range(len(layers)), list(layers), fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="sparsity of that layer alone (%)")
    figure: Any = ax.figure
    figure.colorbar(image, ax=ax, label="drop of the score", fraction=0.05, pad=0.02).outline.set_visible(False)
    return ax


def plot_bars(labels: Sequence[str], values: Sequence[float], unit: str, ax: Axes | None = None) -> Axes:
    """Draws values as bars, one below the other; Gossamer's stand out.

    Args:
        labels: one a bar.
        values: one a bar, such as the times of `gossamer bench`.
        unit: of the values.
        ax: matplotlib axes to draw on; new ones if not given.

    Returns:
        The axes.

    Example:
        >>> import matplotlib; matplotlib.use("agg")
        >>> ax = plot_bars(["eager", "gossamer"], [8.0, 2.0], "ms")
        >>> [text.get_text() for text in ax.texts]
        ['8.00 ms', '2.00 ms']
    """
    ax = _axes(ax, (8, 1.1 + 0.42 * len(labels)))
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    for i, (label, value) in enumerate(zip(labels, values, strict=True)):
        ax.barh(i, value, color=_ACCENT if "gossamer" in label.lower() else _INK, height=0.66)
        text = f"{value:.2f} {unit}" if value < 10 else f"{value:.1f} {unit}"
        ax.annotate(text, (value, i), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_yticks(range(len(labels)), list(labels))
    ax.tick_params(axis="y", length=0)
    ax.invert_yaxis()
    ax.set(xlabel=unit, xlim=(0, 1.3 * max(values, default=1)))
    return ax
