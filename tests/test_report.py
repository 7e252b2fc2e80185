"""What is sparse? Counted from the weights, whoever put the zeros there."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from gossamer import LayerSparsity, SparsityReport, report
from gossamer.errors import GossamerError, TargetError


def net() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        for weight in (model[0].weight, model[2].weight):
            weight.fill_(1)
        model[0].weight[0] = 0
        model[2].weight[0, 0] = -0.0
        model[2].bias.zero_()
    return model


def test_rows_are_counted_from_the_weights():
    found = report(net(), (nn.Conv2d, nn.Linear))
    assert found.rows == (
        LayerSparsity("0", "Conv2d", 8, 4, (2, 1, 2, 2)),
        LayerSparsity("2", "Linear", 12, 1, (3, 4)),
    )
    assert (found.params, found.zeros, found.sparsity) == (20, 5, 25.0)
    assert (found["0"].sparsity, found["2"].sparsity) == (50.0, pytest.approx(100 / 12))


def test_a_report_is_of_its_moment():
    model = net()
    before = report(model)
    nn.init.zeros_(model[0].weight)
    assert (before.zeros, report(model).zeros) == (4, 8)


def test_only_the_types_that_are_asked_for_are_listed():
    assert [r.layer for r in report(net()).rows] == ["0"]
    with pytest.raises(TargetError):
        report(net(), nn.Embedding)


def test_a_layer_that_is_not_in_it_is_answered_with_the_closest():
    with pytest.raises((GossamerError, KeyError), match="0"):
        report(net())["00"]


def test_the_text_is_the_tutorials_table():
    lines = str(report(net(), (nn.Conv2d, nn.Linear))).splitlines()
    assert lines[0] == "Sparsity Report:"
    assert lines[1] == lines[3] == lines[-2] == "-" * 80
    assert lines[2].split() == ["Layer", "Type", "Params", "Zeros", "Sparsity"]
    assert lines[4].split() == ["0", "Conv2d", "8", "4", "50.00%"]
    assert lines[-1].split() == ["Overall", "all", "20", "5", "25.00%"]


def test_long_numbers_have_separators_and_long_names_keep_the_columns():
    row = LayerSparsity("a" * 45, "Conv2d", 1_179_648, 943_718, (512, 256, 3, 3))
    lines = str(SparsityReport((row,))).splitlines()
    assert "1,179,648" in lines[4]
    assert "943,718" in lines[4]
    assert len(lines[2]) == len(lines[4]) == len(lines[-1])


def test_dict_and_json_say_the_same():
    found = report(net(), (nn.Conv2d, nn.Linear))
    as_dict = found.to_dict()
    assert json.loads(found.to_json()) == json.loads(found.to_json(indent=2)) == as_dict
    assert as_dict["layers"][0] == {
        "layer": "0",
        "type": "Conv2d",
        "params": 8,
        "zeros": 4,
        "shape": [2, 1, 2, 2],
        "sparsity": 50.0,
    }
    assert (as_dict["params"], as_dict["zeros"], as_dict["sparsity"]) == (20, 5, 25.0)


def test_rows_become_a_dataframe():
    pytest.importorskip("pandas")
    frame = report(net(), (nn.Conv2d, nn.Linear)).to_dataframe()
    assert list(frame.columns) == ["layer", "type", "params", "zeros", "sparsity", "shape"]
    assert frame["zeros"].tolist() == [4, 1]


def test_the_notebooks_table_escapes_names():
    text = SparsityReport((LayerSparsity("<b>", "Linear", 1000, 10, (1000, 1)),))._repr_html_()
    assert "&lt;b&gt;" in text
    assert "<b>" not in text
    assert "1,000" in text
    assert "1.00%" in text
    assert text.count("<tr>") == 3


def test_an_empty_report_is_no_error():
    assert SparsityReport(()).sparsity == 0
    assert "Overall" in str(SparsityReport(()))
