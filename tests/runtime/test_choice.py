"""Which layers run sparse: by what both ways should take, and by a trial where one is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer import Sparsifier, runtime
from gossamer.native import native
from gossamer.runtime import choice
from gossamer.runtime.choice import runs_sparse
from gossamer.runtime.layers import Geometry, Layer

pytestmark = pytest.mark.skipif(native() is None, reason="the compiled library was not built")


def network(sparsity: float) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 1)).eval()
    if sparsity:
        Sparsifier(net).sparsify_model(sparsity)
    return net


def kinds(fast: runtime.CompiledModel) -> list[str]:
    return [row.runs for row in fast.explain() if row.op.startswith(("conv2d", "linear"))]


@pytest.mark.parametrize(("sparsity", "wants"), [(0, ["dense"] * 2), (15, ["dense"] * 2), (95, ["sparse"] * 2)])
def test_a_layer_runs_sparse_where_that_should_take_less(sparsity: float, wants: list[str]) -> None:
    assert kinds(runtime.compile(network(sparsity), torch.randn(1, 64, 28, 28))) == wants


@pytest.mark.parametrize(
    ("shape", "kernel", "pixels", "sparsity", "is_sparse"),
    [
        ((512, 512), 3, 1, 50, True),  # most of the kernel meets padding
        ((512, 512), 3, 2, 90, True),
        ((128, 128), 3, 4, 30, False),
        ((256, 256), 3, 4, 90, True),
        ((1000, 512), 0, 1, 50, False),  # a head, which dense takes as long as its weights take to be read
        ((1000, 512), 0, 1, 95, True),
    ],
)
def test_few_pixels(shape: tuple[int, int], kernel: int, pixels: int, sparsity: float, is_sparse: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(shape[1], shape[0], kernel, padding=kernel // 2) if kernel else nn.Linear(shape[1], shape[0])
    Sparsifier(layer, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model(sparsity)
    x = torch.randn(1, shape[1], pixels, pixels) if kernel else torch.randn(1, shape[1])
    assert kinds(runtime.compile(nn.Sequential(layer).eval(), x)) == ["sparse" if is_sparse else "dense"]


def test_the_more_is_zero_the_less_is_expected_to_take() -> None:
    expected = []
    for sparsity in (50, 80, 95):
        fast = runtime.compile(network(sparsity), torch.randn(1, 64, 28, 28))
        expected.append([m.expected for m in fast.reference().modules() if isinstance(m, Layer)])
    for layer in zip(*expected, strict=True):
        assert sorted(layer, reverse=True) == list(layer)


@pytest.mark.parametrize(
    ("measured", "sparsity", "wants"), [(0.5, 50, "sparse"), (3.0, 95, "dense"), (0.95, 15, "dense")]
)
def test_a_trial_overrules_only_what_it_is_sure_of(
    measured: float, sparsity: float, wants: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_tried", lambda *_: measured)
    fast = runtime.compile(network(sparsity), torch.randn(1, 64, 28, 28), tune=True)
    assert set(kinds(fast)) == {wants}
    if sparsity > 20:
        assert all(f"{measured:.2f} of the dense time measured" in row.why for row in fast.explain() if row.sparsity)


def test_a_real_trial_gives_what_the_network_gives_and_is_kept_in_the_file(tmp_path) -> None:
    net, x = network(90), torch.randn(2, 64, 14, 14)
    fast = runtime.compile(net, x, tune=True)
    with torch.no_grad():
        assert torch.allclose(fast(x), net(x), rtol=1e-4, atol=1e-5)
    again = runtime.load(fast.save(tmp_path / "net.gossamer"))
    assert kinds(again) == kinds(fast)
    assert [r.why for r in again.explain()] == [r.why for r in fast.explain()]


def test_without_inputs_the_share_of_zeros_decides() -> None:
    weight = torch.randn(8, 32, 3, 3)
    assert not runs_sparse(Layer(weight, None, Geometry()))
    assert runs_sparse(Layer(weight.where(torch.rand_like(weight) > 0.6, torch.tensor(0.0)), None, Geometry()))
    assert runs_sparse(Layer(torch.randn(8, 1, 3, 3), None, Geometry(groups=8)))


def halves(*, tune: bool = False) -> tuple[nn.Module, runtime.CompiledModel]:
    """Compiled for images for which it is faster sparse."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.Conv2d(128, 128, 3, padding=1)).eval()
    Sparsifier(net).sparsify_model(30)
    return net, runtime.compile(net, torch.randn(1, 128, 28, 28), tune=tune)


def test_inputs_of_another_size_go_to_pytorch_where_that_should_be_faster() -> None:
    net, fast = halves()
    assert kinds(fast) == ["sparse"] * 2
    for size, runs in ((28, "sparse"), (4, "dense"), (60, "sparse")):
        x = torch.randn(1, 128, size, size)
        rows = [row for row in fast.explain(x) if row.op.startswith("conv2d")]
        assert [row.runs for row in rows] == [runs] * 2
        assert 0 < sum(row.share or 0 for row in fast.explain(x)) < 100.01
        with torch.no_grad():
            assert torch.allclose(fast(x), net(x), rtol=1e-4, atol=1e-5)
            assert torch.equal(fast(x), net(x)) == (runs == "dense")


def test_what_a_trial_found_holds_for_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_tried", lambda *_: 0.5)
    _, fast = halves(tune=True)
    rows = fast.explain(torch.randn(1, 128, 4, 4))
    assert [row.runs for row in rows if row.op.startswith("conv2d")] == ["sparse"] * 2


@pytest.mark.parametrize(("threads", "team"), [(1, 0), (2, 0), (2, 1)])
def test_a_last_small_layer_stays_where_going_back_to_pytorch_would_take_longer(
    threads: int, team: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native(), "gossamer_has_team", lambda: team)
    is_alone = threads == 1 or team

    def head(sparsity: float) -> runtime.PlanRow:
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(8, 512, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)
        )
        Sparsifier(net, layer_type=(nn.Conv2d, nn.Linear)).sparsify_model({"0": 90, "4": sparsity})
        [row] = [
            r for r in runtime.compile(net.eval(), torch.randn(1, 8, 24, 24)).explain() if r.op.startswith("linear")
        ]
        return row

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert head(80).runs == "sparse"
        assert head(50).runs == ("dense" if is_alone else "sparse")
        assert ("PyTorch and back" in head(50).why) == (not is_alone)
        assert head(0).runs == "dense"
    finally:
        torch.set_num_threads(before)
