"""Which layers stay denser? Shares against the papers' equations, and counts that sum to the network's own."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ArgumentError
from gossamer.rules.densities import Shape, er, erk, uniform_plus


def conv(o: int, i: int, h: int, w: int) -> Shape:
    return Shape("oihw", (o, i, h, w), o * i * h * w)


def linear(o: int, i: int) -> Shape:
    return Shape("oi", (o, i), o * i)


RESNET = [conv(16, 3, 3, 3), *[conv(16, 16, 3, 3)] * 3, conv(32, 16, 3, 3), conv(32, 16, 1, 1), linear(10, 32)]
shapes = st.lists(
    st.one_of(
        st.builds(conv, st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.integers(1, 3)),
        st.builds(linear, st.integers(1, 40), st.integers(1, 40)),
    ),
    min_size=1,
    max_size=6,
)


def paper(sparsity: float, layers: list[Shape], kernel: bool) -> list[float]:
    """Density = ε · (n_in + n_out + kernel) / (n_in · n_out · kernel), ε by halving, none above 1."""
    raw = []
    for layer in layers:
        o, i, *k = layer.lengths
        k = k if kernel else []
        raw.append((o + i + sum(k)) / (o * i * math.prod(k)))
    goal = (1 - sparsity) * sum(s.units for s in layers)
    low, high = 0.0, 1e9
    for _ in range(200):
        middle = (low + high) / 2
        kept = sum(min(1.0, middle * r) * s.units for r, s in zip(raw, layers, strict=True))
        low, high = (middle, high) if kept < goal else (low, middle)
    return [min(1.0, high * r) for r in raw]


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.8, 0.9, 0.98])
@pytest.mark.parametrize(("densities", "kernel"), [(er, False), (erk, True)])
def test_densities_are_those_of_the_papers_equation(densities, kernel, sparsity):
    masked = densities(Fraction(str(sparsity)), RESNET)
    for layer, n, density in zip(RESNET, masked, paper(sparsity, RESNET, kernel), strict=True):
        assert abs(layer.units - n - density * layer.units) <= 1.0


@given(shapes, st.fractions(0, 1))
@pytest.mark.parametrize("densities", [er, erk])
def test_counts_sum_to_the_networks_own_and_no_layer_is_emptied(densities, layers, fraction):
    masked, total = densities(fraction, layers), sum(s.units for s in layers)
    assert sum(masked) == math.floor(fraction * total + Fraction(1, 2))
    assert all(0 <= n <= s.units for n, s in zip(masked, layers, strict=True))
    if total - sum(masked) >= len(layers):
        assert all(n < s.units for n, s in zip(masked, layers, strict=True))


def test_groups_count_as_inputs():
    grouped = Shape("giohw", (2, 4, 3, 3, 3), 2 * 4 * 3 * 9)
    assert er(Fraction(1, 2), [grouped, conv(5, 5, 3, 3)]) == er(Fraction(1, 2), [conv(3, 8, 3, 3), conv(5, 5, 3, 3)])


@pytest.mark.parametrize("percent", [10, 50, 80, 90])
def test_uniform_plus_keeps_the_first_convolution_and_caps_the_last_linear(percent):
    fraction = Fraction(percent, 100)
    masked = uniform_plus(fraction, RESNET)
    assert masked[0] == 0
    assert masked[-1] <= 0.8 * 320
    assert sum(masked) == round(fraction * sum(s.units for s in RESNET))
    shares = [n / s.units for n, s in zip(masked[1:-1], RESNET[1:-1], strict=True)]
    assert max(shares) - min(shares) < 0.01
    assert min(shares) > percent / 100, "they make up for the others"


def test_what_uniform_plus_cannot_make_up_for_is_an_error():
    with pytest.raises(ArgumentError, match=r"at most .* and 99 is asked for"):
        uniform_plus(Fraction(99, 100), RESNET)
    with pytest.raises(ArgumentError, match="at most 0 %"):
        uniform_plus(Fraction(1, 2), [conv(4, 4, 3, 3)])
