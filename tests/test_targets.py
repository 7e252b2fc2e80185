"""Which layers take part? By type, name and pattern; each weight once; what cannot be masked says why."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import plain
from gossamer.errors import ArgumentError, TargetError
from gossamer.targets import find_targets, match_layers, resolve_sparsity


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), Block(), nn.Flatten(), nn.Linear(4, 2))


def names(targets) -> list[str]:
    return [t.name for t in targets]


def test_targets_are_the_layers_of_the_type_in_the_models_order():
    assert names(find_targets(net())) == ["0", "1.conv1", "1.conv2"]
    assert names(find_targets(net(), nn.Linear)) == ["3"]
    assert names(find_targets(net(), (nn.Linear, nn.Conv2d))) == ["0", "1.conv1", "1.conv2", "3"]


def test_names_are_relative_to_the_part_that_is_given():
    assert names(find_targets(net()[1])) == ["conv1", "conv2"]
    assert names(find_targets(nn.Conv2d(1, 1, 1))) == [""]


def test_layers_can_be_left_out_by_name_or_pattern():
    assert names(find_targets(net(), exclude=["0"])) == ["1.conv1", "1.conv2"]
    assert names(find_targets(net(), exclude=["1.*"])) == ["0"]
    assert names(find_targets(net(), exclude="1.conv?")) == ["0"]
    with pytest.raises(TargetError, match=r"exclude.*1\.convv1.*1\.conv1"):
        find_targets(net(), exclude=["1.convv1"])


def test_a_subclass_of_a_layer_counts_as_one():
    class Mine(nn.Conv2d):
        pass

    (target,) = find_targets(nn.Sequential(Mine(1, 2, 3)))
    assert (target.type, target.axes) == ("Mine", "oihw")


@pytest.mark.parametrize(
    ("kind", "axes", "view"),
    [
        ("Linear", "oi", (12, 8)),
        ("Embedding", "oi", (12, 8)),
        ("Conv1d", "oiw", (6, 8, 3)),
        ("Conv2d", "oihw", (6, 8, 2, 3)),
        ("Conv3d", "oidhw", (3, 4, 1, 2, 3)),
        ("Conv2d grouped", "oihw", (6, 4, 3, 3)),
        ("ConvTranspose1d", "iow", (8, 6, 3)),
        ("ConvTranspose2d", "iohw", (8, 6, 2, 3)),
        ("ConvTranspose3d", "iodhw", (4, 3, 1, 2, 3)),
        ("ConvTranspose2d grouped", "giohw", (2, 4, 3, 3, 3)),
    ],
)
def test_every_layer_type_knows_its_axes(kind, axes, view):
    layer = plain.LAYERS[kind]()
    (target,) = find_targets(layer, type(layer))
    assert (target.axes, target.view) == (axes, view)
    assert target.weight is layer.weight


def test_a_tied_weight_takes_part_once():
    encoder, decoder = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    decoder.weight = encoder.weight
    model = nn.Sequential(encoder, decoder)
    assert names(find_targets(model, (nn.Linear, nn.Embedding))) == ["0"]
    shared = nn.Linear(3, 3)
    assert names(find_targets(nn.Sequential(shared, nn.ReLU(), shared), nn.Linear)) == ["0"]


def legacy_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning):
        return weight_norm(layer)


def in_complex_numbers(layer: nn.Module) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.complex64))
    return layer


def lazy(_: nn.Module) -> nn.Module:
    return nn.LazyConv2d(4, 3)


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (legacy_weight_norm, "weight_norm"),
        (spectral_norm, "spectral_norm"),
        (parametrizations.weight_norm, "parametriz"),
        (parametrizations.orthogonal, "parametriz"),
        (lambda layer: prune.l1_unstructured(layer, "weight", 0.5), "prune.remove"),
        (lazy, "lazy"),
        (in_complex_numbers, "floating-point"),
    ],
    ids=["legacy weight_norm", "spectral_norm", "weight_norm", "orthogonal", "torch prune", "lazy", "complex"],
)
def test_a_weight_that_zeros_would_not_last_in_is_refused_with_a_remedy(wrap, said):
    model = nn.Sequential(nn.Conv2d(4, 4, 3), wrap(nn.Conv2d(4, 4, 3)))
    with pytest.raises(TargetError, match=said) as error:
        find_targets(model)
    assert "'1'" in str(error.value)
    assert names(find_targets(model, exclude=["1"])) == ["0"]


def test_an_empty_weight_is_refused():
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(0, 3)
    with pytest.raises(TargetError, match="empty"):
        find_targets(nn.Sequential(empty), nn.Linear)


@pytest.mark.parametrize(
    "bad", [nn.BatchNorm2d, nn.Module, nn.ReLU, "Conv2d", None, (nn.Conv2d, nn.ReLU), nn.Conv2d(1, 1, 1)]
)
def test_a_layer_type_without_a_weight_to_cut_is_refused(bad):
    with pytest.raises(ArgumentError, match=r"layer_type.*Conv2d"):
        find_targets(net(), bad)


def test_what_is_no_model_is_refused():
    with pytest.raises(ArgumentError, match="list"):
        find_targets([nn.Conv2d(1, 1, 1)])


def test_a_model_without_a_target_names_the_layers_that_could_be():
    with pytest.raises(TargetError, match="layer_type=Linear"):
        find_targets(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(TargetError, match="no layer that could be"):
        find_targets(nn.Sequential(nn.ReLU()))


LAYERS = ["0.4.0.conv1", "0.4.0.conv2", "0.5.0.conv1", "fc", "odd[name]"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("fc", ["fc"]),
        ("0.4.*", ["0.4.0.conv1", "0.4.0.conv2"]),
        ("0.*.conv?", ["0.4.0.conv1", "0.4.0.conv2", "0.5.0.conv1"]),
        ("*", LAYERS),
        ("0.[45].0.conv1", ["0.4.0.conv1", "0.5.0.conv1"]),
        ("odd[name]", ["odd[name]"]),  # an exact name is no pattern
    ],
)
def test_a_pattern_stands_for_the_names_it_matches(pattern, found):
    assert match_layers(pattern, LAYERS) == found


def test_a_name_that_matches_nothing_is_answered_with_the_closest():
    with pytest.raises(TargetError, match=r"0\.4\.0\.conv3.*0\.4\.0\.conv[12]"):
        match_layers("0.4.0.conv3", LAYERS)
    with pytest.raises(ArgumentError, match="3"):
        match_layers(3, LAYERS)


def test_one_number_is_for_every_layer_and_a_dict_for_those_it_names():
    assert resolve_sparsity(50, ["a", "b"]) == {"a": Fraction(1, 2), "b": Fraction(1, 2)}
    assert resolve_sparsity({"b": 2.3}, ["a", "b"]) == {"b": Fraction(23, 1000)}


@pytest.mark.parametrize("given", [{"a*": 30, "a1": 70}, {"a1": 70, "a*": 30}])
def test_an_exact_name_beats_a_pattern_in_any_order(given):
    assert resolve_sparsity(given, ["a1", "a2"]) == {"a1": Fraction(7, 10), "a2": Fraction(3, 10)}


def test_patterns_that_disagree_are_refused_and_those_that_agree_are_not():
    with pytest.raises(ArgumentError, match=r"a1.*30 %.*40 %"):
        resolve_sparsity({"a*": 30, "*1": 40}, ["a1", "b1"])
    assert resolve_sparsity({"a*": 30, "*1": 30}, ["a1", "b1"]) == {"a1": Fraction(3, 10), "b1": Fraction(3, 10)}


@pytest.mark.parametrize(("bad", "error"), [({}, ArgumentError), ({"z": 3}, TargetError), ({"a": 101}, ArgumentError)])
def test_a_dict_that_cannot_be_used_is_refused(bad, error):
    with pytest.raises(error):
        resolve_sparsity(bad, ["a", "b"])
