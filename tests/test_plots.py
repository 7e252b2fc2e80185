"""What is drawn is what was counted."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import pytest

mpl.use("agg")
from matplotlib import pyplot as plt

from gossamer import ArgumentError
from gossamer.plots import plot_schedule, plot_sparsity, plot_training
from gossamer.report import LayerSparsity, SparsityReport
from gossamer.rules.schedules import SCHEDULES, one_cycle

ROWS = SparsityReport((LayerSparsity("a", "Conv2d", 10, 5, (10,)), LayerSparsity("b", "Conv2d", 30, 3, (30,))))


@pytest.fixture(autouse=True)
def _close() -> object:
    yield
    plt.close("all")


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_can_be_drawn(name: str, tmp_path: Path) -> None:
    ax = plot_schedule(name, sparsity=80)
    (line,) = ax.lines
    assert line.get_ydata()[-1] == 80 * SCHEDULES[name](1.0)
    assert line.get_label() == name
    ax.figure.savefig(tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_own_functions_are_drawn_too_and_nothing_is_an_error() -> None:
    assert len(plot_schedule(lambda pos: pos, one_cycle).lines) == 2
    with pytest.raises(ArgumentError, match="no schedule"):
        plot_schedule()


def test_bars_stand_at_the_counted_percents() -> None:
    ax = plot_sparsity(ROWS)
    assert [p.get_height() for p in ax.patches] == [50, 10]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"]
    assert "overall 20.00 %" in ax.get_legend().get_texts()[0].get_text()


def test_a_run_shows_what_was_counted_over_what_was_asked_for() -> None:
    ax = plot_training([{"position": 0.5, "sparsity": 20.0}, {"position": 1.0, "sparsity": 50.0}], one_cycle, 50)
    asked, counted = ax.lines
    assert asked.get_ydata()[-1] == 50
    assert list(counted.get_ydata()) == [20, 50]


def test_given_axes_are_drawn_on() -> None:
    ax = plt.subplots()[1]
    assert plot_sparsity(ROWS, ax=ax) is ax
