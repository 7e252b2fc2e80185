"""Each layer alone is measured, nothing stays changed, and what comes of it meets the overall sparsity exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer import ArgumentError, FileError, Sensitivity, Sparsifier, TargetError, report, sensitivity
from gossamer.sensitivity import LayerSensitivity


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 2, 1))


def zeros(model: nn.Module) -> float:
    return float(sum(int((m.weight == 0).sum()) for m in model.modules() if isinstance(m, nn.Conv2d)))


def test_one_layer_at_a_time_is_sparse_and_all_is_put_back():
    model = network()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    seen = []

    def evaluate(m):
        assert m is model
        seen.append([r.zeros for r in report(m).rows])
        m.eval()
        m[1].running_mean += 1
        return zeros(m)

    found = sensitivity(model, evaluate, (50, 25), progress=False)
    assert seen == [[0, 0, 0], [18, 0, 0], [36, 0, 0], [0, 72, 0], [0, 144, 0], [0, 0, 2], [0, 0, 4]]
    assert [(r.layer, r.sparsity, r.score) for r in found.rows] == [
        *[("0", 25.0, 18.0), ("0", 50.0, 36.0), ("3", 25.0, 72.0)],
        *[("3", 50.0, 144.0), ("4", 25.0, 2.0), ("4", 50.0, 4.0)],
    ]
    assert found.baseline == 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())


def test_a_criterion_of_data_is_given_it():
    model, x = network(), torch.rand(4, 1, 8, 8)
    y = torch.rand(4, 2, 4, 4)
    masks = []
    options = {"criteria": "taylor", "data": [(x, y)], "loss_func": nn.functional.mse_loss}
    sensitivity(model, lambda m: masks.append(m[3].weight == 0) or 0.0, [50], progress=False, **options)
    by_hand = Sparsifier(model, **options)
    by_hand.sparsify_layer("3", 50)
    assert torch.equal(masks[2], model[3].weight == 0)
    assert not torch.equal(masks[2], masks[0])


def test_filters_are_measured_with_all_that_dies_with_them():
    def evaluate(m):
        return float((m[1].bias == 0).sum() + (m[1].weight == 0).sum())

    model = network()
    nn.init.ones_(model[1].bias)
    found = sensitivity(model, evaluate, [50], granularity="filter", progress=False)
    assert (found["0"][0].units, found["0"][0].score) == (8, 8.0)


def test_what_was_measured_is_not_measured_again(tmp_path):
    model, calls = network(), []

    def evaluate(m):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return zeros(m)

    file = tmp_path / "deep" / "found.safetensors"
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, evaluate, (50, 90), file=file, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    found = sensitivity(model, evaluate, (50, 90), file=file, progress=False)
    assert len(calls) == 8  # 7, and the one that was broken off
    assert found == sensitivity(model, zeros, (50, 90), progress=False)
    more = sensitivity(model, evaluate, (50, 70, 90), file=file, progress=False)
    assert len(calls) == 11
    assert more.sparsities == (50.0, 70.0, 90.0)
    with torch.no_grad():
        model[0].weight += 1
    with pytest.raises(FileError, match="weights of the network is"):
        sensitivity(model, evaluate, (50, 90), file=file, progress=False)
    with torch.no_grad():
        model[0].weight.copy_(before[0])
    with pytest.raises(FileError, match="criteria is large_final there and small_final here"):
        sensitivity(model, evaluate, (50, 90), criteria="small_final", file=file, progress=False)


def measured(curves: dict[str, tuple[int, list[float]]], sparsities: list[float], higher: bool = True) -> Sensitivity:
    sign = 1 if higher else -1
    rows = [
        LayerSensitivity(name, n, n, s, sign * (1 - drop))
        for name, (n, drops) in curves.items()
        for s, drop in zip(sparsities, drops, strict=True)
    ]
    return Sensitivity(tuple(rows), float(sign), higher)


@pytest.mark.filterwarnings("ignore:.*less than one percent")  # which a small layer gets
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=6), st.floats(0, 95), st.randoms(use_true_random=False))
def test_targets_meet_the_overall_sparsity_exactly(sizes, percent, random):
    curves = {f"l{i}": (n, [random.uniform(-0.1, 1) for _ in range(3)]) for i, n in enumerate(sizes)}
    found = measured(curves, [30, 70, 96])
    model = nn.ModuleDict({name: nn.Linear(n, 1, bias=False) for name, (n, _) in curves.items()})
    for layer in model.values():
        nn.init.uniform_(layer.weight, 1, 2)
    wanted = math.floor(percent * sum(sizes) / 100 + 0.5)
    most = sum(math.floor(96 * n / 100 + 0.5) for n in sizes)
    if wanted > most:
        with pytest.raises(ArgumentError, match="more than was measured"):
            found.to_targets(percent)
        return
    targets = found.to_targets(percent)
    assert list(targets) == list(curves)
    Sparsifier(model, layer_type=nn.Linear).sparsify_model(targets)
    assert report(model, nn.Linear).zeros == wanted
    assert all(
        math.floor(p * n / 100 + 0.5) <= math.floor(0.96 * n + 0.5)
        for p, n in zip(targets.values(), sizes, strict=True)
    )


def test_zeros_go_where_they_cost_least():
    found = measured({"a": (1000, [0.0, 0.1, 0.6]), "b": (1000, [0.1, 0.4, 0.9])}, [50, 80, 90])
    # What a weight more costs: a 0, 1/3000, 1/200; b 1/5000, 1/1000, 1/200.
    assert found.to_targets(25) == {"a": 50.0, "b": 0.0}
    assert found.to_targets(50) == {"a": 50.0, "b": 50.0}
    assert found.to_targets(65) == {"a": 80.0, "b": 50.0}
    assert found.to_targets(85) == {"a": 85.0, "b": 85.0}  # the same costs share
    assert found.to_targets(0) == {"a": 0.0, "b": 0.0}


def test_a_loss_counts_the_other_way_round_and_hollows_are_levelled():
    curves = {"a": (100, [0.5, 0.0, 0.2]), "b": (100, [0.1, 0.1, 0.1])}
    for higher in (True, False):
        found = measured(curves, [50, 80, 90], higher)
        assert found.drops()["a"] == {50.0: 0.5, 80.0: 0.0, 90.0: 0.2}
        # a never costs less than 0.5 from 50 % on, and 90 % of it no more than that; b costs 0.1 throughout.
        assert found.to_targets(45) == {"a": 0.0, "b": 90.0}
        assert found.to_targets(90) == {"a": 90.0, "b": 90.0}


def test_units_of_several_weights_are_met_as_nearly_as_they_can_be():
    rows = [LayerSensitivity("a", 90, 10, 90.0, 0.5), LayerSensitivity("b", 70, 10, 90.0, 0.5)]
    targets = Sensitivity(tuple(rows), 1.0).to_targets(50)
    masked = sum(each * round(targets[n] / 10) for n, each in (("a", 9), ("b", 7)))
    assert abs(masked - 80) <= 4


def test_it_speaks(capsys):
    pytest.importorskip("matplotlib").use("agg")
    found = measured({"a": (1000, [0.0, 0.125]), "b": (2000, [0.25, 0.5])}, [50, 90])
    assert "a                         1,000          1      0.875" in str(found)
    assert "<td>0.875</td>" in found._repr_html_()
    assert found.to_dict()["rows"][0]["layer"] == "a"
    assert list(found.to_dataframe()["score"]) == [1.0, 0.875, 0.75, 0.5]
    ax = found.plot()
    assert [t.get_text() for t in ax.texts] == ["0", "0.12", "0.25", "0.5"]
    assert ax.images[0].get_array().tolist() == [[0.0, 0.125], [0.25, 0.5]]
    with pytest.raises(TargetError, match="no layer is called 'c'"):
        found["c"]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate": 0.5}, "is no function"),
        ({"evaluate": lambda m: "good"}, "must give one number"),
        ({"evaluate": lambda m: math.nan}, "gave nan"),
        ({"sparsities": "90"}, "are no percentages"),
        ({"sparsities": []}, "none above 0"),
        ({"sparsities": [101]}, "outside \\[0, 100\\]"),
        ({"layer_type": nn.Linear}, "no Linear layer"),
        ({"exclude": "9"}, "no layer is called '9'"),
        ({"criteria": "size"}, "unknown criterion"),
        ({"granularity": "filters"}, "unknown granularity"),
        ({"file": 5}, "file=5 is no path"),
    ],
)
def test_bad_input_is_refused(options, message):
    model = network()
    given = {"model": model, "evaluate": zeros, "sparsities": [50], "progress": False, **options}
    with pytest.raises((ArgumentError, TargetError), match=message):
        sensitivity(**given)
    assert zeros(model) == 0
