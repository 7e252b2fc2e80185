"""A compiled network in a file: what comes back is what went in, and what was tampered with is an error."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gossamer
from gossamer import ArgumentError, FileError, Sparsifier, StateError, runtime
from gossamer.runtime.saved import Example

_KEY = "gossamer-graph"


class Net(nn.Module):
    """Every operator of the engine, and some of PyTorch's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
        self.depth, self.point = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 1)
        self.squeeze, self.excite = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Any]:
        x = self.stem(x) * scale
        y = self.point(self.depth(x)) + x
        y = y * self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        z = torch.cat([x, y], 1)
        z = nn.functional.layer_norm(z, z.shape[-2:])
        return {"logits": self.head(z.mean((2, 3))), "maps": [x, (y, z.roll(1, 2))]}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    Sparsifier(net, layer_type=(nn.Conv2d, nn.Linear), exclude=["depth"]).sparsify_model(80)
    return net


@pytest.fixture(scope="module")
def path(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    fast = runtime.compile(net, (torch.randn(2, 3, 16, 16), torch.ones(1)))
    return fast.save(tmp_path_factory.mktemp("saved") / "net.gossamer")


def leaves(value: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def test_what_is_loaded_gives_what_the_network_gave_in_the_same_structure(net: nn.Module, path: Path) -> None:
    fast = runtime.load(path)
    for shape in ((2, 3, 16, 16), (1, 3, 16, 16), (5, 3, 24, 20)):
        x, scale = torch.randn(shape), torch.full((1,), 0.7)
        with torch.no_grad():
            got, want = fast(x, scale), net(x, scale)
        assert list(got) == ["logits", "maps"]
        assert isinstance(got["maps"], list)
        assert isinstance(got["maps"][1], tuple)
        for a, b in zip(leaves(got), leaves(want), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_file_is_small_and_holds_the_weights_for_everybody(path: Path) -> None:
    tensors = gossamer.load(path)
    assert any((t == 0).float().mean() > 0.7 for t in tensors.values() if t.ndim == 4)
    assert sum(t.nbytes for t in load_file(path).values()) < sum(t.nbytes for t in tensors.values())
    again = runtime.load(runtime.load(path).save(path.with_name("again.gossamer")))
    x, scale = torch.randn(2, 3, 16, 16), torch.ones(1)
    for a, b in zip(leaves(again(x, scale)), leaves(runtime.load(path)(x, scale)), strict=True):
        assert torch.equal(a, b)


def test_loading_needs_neither_the_class_nor_the_training_code(path: Path) -> None:
    code = (
        "import sys, torch\nfrom gossamer import runtime\n"
        f"fast = runtime.load({str(path)!r})\nprint(fast(torch.ones(2, 3, 16, 16), torch.ones(1))['logits'].shape)\n"
        "print([m for m in sys.modules if 'fastai' in m or m.startswith('gossamer.integrations')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["torch.Size([2, 5])", "[]"]


def test_examples_and_the_plain_network_come_with_it(net: nn.Module, path: Path) -> None:
    fast = runtime.load(path)
    x, scale = fast.examples
    assert (x.shape, scale.shape, x.dtype) == (torch.Size([2, 3, 16, 16]), torch.Size([1]), torch.float32)
    plain = fast.reference()
    with torch.no_grad():
        for a, b in zip(leaves(plain(x, scale)), leaves(net(x, scale)), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_half_precision_values_are_read_as_floats(net: nn.Module, tmp_path: Path) -> None:
    fast = runtime.compile(net, (torch.randn(2, 3, 16, 16), torch.ones(1)))
    half = fast.save(tmp_path / "half.gossamer", values="fp16")
    assert half.stat().st_size < fast.save(tmp_path / "full.gossamer").stat().st_size
    x, scale = torch.randn(2, 3, 16, 16), torch.ones(1)
    for a, b in zip(leaves(runtime.load(half)(x, scale)), leaves(fast(x, scale)), strict=True):
        assert a.dtype == torch.float32
        assert torch.allclose(a, b, rtol=0.05, atol=0.05)


def test_which_layers_run_sparse_is_kept(path: Path) -> None:
    def kinds(fast: Any) -> dict[str, bool]:
        return {n: m.is_sparse for n, m in fast.reference().named_modules() if hasattr(m, "is_sparse")}

    once = runtime.load(path)
    flipped = next(n for n, sparse in kinds(once).items() if sparse)
    once._flat[0].get_submodule(flipped).is_sparse = False
    again = runtime.load(once.save(path.with_name("flipped.gossamer")))
    assert kinds(again)[flipped] is False
    assert [r.runs for r in again.explain() if r.name == flipped] == ["dense"]


def test_inputs_that_the_file_was_not_made_for_are_named(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sum(2) * 2

    path = runtime.compile(Fixed().eval(), torch.ones(2, 3, 4)).save(tmp_path / "fixed.gossamer")
    fast = runtime.load(path)
    assert torch.equal(fast(torch.ones(5, 3, 7)), torch.full((5, 3), 14.0))
    with pytest.raises(ArgumentError, match=r"input 0 is \(2, 5, 4\), and the file was made for \(any, 3, any\)"):
        fast(torch.ones(2, 5, 4))
    with pytest.raises(ArgumentError, match="takes 1 inputs, by place or by name: x; got 2 by place"):
        fast(torch.ones(2, 3, 4), torch.ones(1))


def test_a_loaded_network_is_called_by_the_names_that_the_network_had(tmp_path: Path) -> None:
    class Named(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return input_ids * 2 - attention_mask

    ids, mask = torch.arange(6).view(2, 3), torch.ones(2, 3)
    fast = runtime.load(runtime.compile(Named().eval(), (ids, mask)).save(tmp_path / "named.gossamer"))
    want = ids * 2 - mask
    assert torch.equal(fast(attention_mask=mask, input_ids=ids), want)
    assert torch.equal(fast(ids, attention_mask=mask), want)
    for args, kwargs in (((), {"input_ids": ids}), ((ids,), {"mask": mask}), ((ids, mask), {"input_ids": ids})):
        with pytest.raises(ArgumentError, match="by place or by name: input_ids, attention_mask; got"):
            fast(*args, **kwargs)


def test_a_network_without_a_graph_cannot_be_saved(tmp_path: Path) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            while x.sum() > 0:
                x = self.fc(x) - 1
            return x

    with pytest.warns(gossamer.GossamerWarning, match="cannot be captured"):
        fast = runtime.compile(Loop().eval(), torch.ones(2, 16))
    with pytest.raises(StateError, match="could not be captured as a graph"):
        fast.save(tmp_path / "loop.gossamer")
    with pytest.raises(StateError, match="take the one that it was made from"):
        fast.reference()


# -- files that are not what they should be -------------------------------------------------------------------------


def rewritten(path: Path, to: Path, change: Any) -> Path:
    """The same file with another graph in it."""
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    graph = json.loads(metadata[_KEY])
    changed = change(graph)
    metadata[_KEY] = changed if isinstance(changed, str) else json.dumps(graph if changed is None else changed)
    save_file(load_file(path), to, metadata)
    return to


def call(graph: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in graph["nodes"] if n["op"] == "call")


def layer(graph: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in graph["nodes"] if n["op"] == "layer" and n["geometry"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda g: "{", "damaged graph"),
        (lambda g: "[" * 100_000, "damaged graph"),
        (lambda g: g.update(version=2), "version 2; this Gossamer reads version 1, so install a newer one"),
        (lambda g: call(g).update(of="aten.from_file.default"), "no function that a file may hold"),
        (lambda g: call(g).update(of="aten.add_.Tensor"), "no function that a file may hold"),
        (lambda g: call(g).update(of="prims.add.default"), "no function that a file may hold"),
        (lambda g: call(g).update(of="os.system"), "does not fit"),
        (lambda g: call(g).update(of="aten.__class__.mro"), "does not fit"),
        (lambda g: call(g).update(of="eval"), "does not fit"),
        (lambda g: g["nodes"].pop(0), "does not fit"),
        (lambda g: g["nodes"].pop(), "does not fit"),
        (lambda g: g["nodes"].append({"op": "launch", "name": "x", "as": "x", "in": []}), "does not fit"),
        (lambda g: layer(g).update({"as": "nowhere"}), "does not fit"),
        (lambda g: layer(g).update({"as": "__class__"}), "does not fit"),
        (lambda g: layer(g).update(activation="explode"), "unknown activation 'explode'"),
        (lambda g: layer(g)["geometry"].update(groups=7), "groups divide the out channels"),
        (lambda g: layer(g)["geometry"].update(stride=[0, 1]), "are no sizes"),
        (lambda g: layer(g)["geometry"].update(padding=[-1, 1]), "are no sizes"),
        (lambda g: layer(g)["geometry"].update(dilation=[10**12, 1]), "are no sizes"),
        (lambda g: layer(g).update(expected=10**400), "does not fit"),
        (lambda g: g["inputs"].pop(), "does not fit"),
        (lambda g: g["inputs"][0].update(shape=[-1]), "an input's shape"),
        (lambda g: g["inputs"][0].update(dtype="load"), "an input's dtype"),
    ],
)
def test_a_graph_that_was_tampered_with_is_an_error(path: Path, tmp_path: Path, change: Any, words: str) -> None:
    def changed(graph: Any) -> Any:
        result = change(graph)
        return result if isinstance(result, str) else None

    with pytest.raises(FileError, match=words):
        runtime.load(rewritten(path, tmp_path / "x.gossamer", changed))


def test_a_file_of_tensors_is_no_compiled_network(tmp_path: Path) -> None:
    path = gossamer.save(nn.Linear(3, 2), tmp_path / "w.safetensors")
    with pytest.raises(FileError, match=r"holds tensors and no compiled network; read it with gossamer\.load"):
        runtime.load(path)
    with pytest.raises(FileError):
        runtime.load(tmp_path / "nothing.gossamer")


def test_a_graph_whose_parts_were_exchanged_is_an_error_or_a_network(path: Path, tmp_path: Path) -> None:
    """Values in the JSON are swapped at random: what loads runs, or says in Python's own words what does not fit."""
    rng = random.Random(0)

    def spots(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            found.append((value, key))
            spots(inner, found)
        return found

    def change(graph: Any) -> None:
        found = spots(graph, [])
        (a, i), (b, j) = rng.choice(found), rng.choice(found)
        a[i] = rng.choice([None, -1, 10**9, "x", [], {}, b[j]])

    loaded = 0
    for n in range(150):
        to = rewritten(path, tmp_path / f"{n}.gossamer", lambda g: _mutated(g, change))
        try:
            fast = runtime.load(to)
        except FileError:
            continue
        loaded += 1
        try:
            fast(torch.ones(2, 3, 16, 16), torch.ones(1))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError):
            continue
    assert loaded  # some changes mean nothing


def _mutated(graph: Any, change: Any) -> Any:
    change(graph)
    return graph


@pytest.mark.parametrize(
    ("example", "given", "fits"),
    [
        (Example((2, 3), (True, False), "float32"), torch.ones(7, 3), True),
        (Example((2, 3), (True, False), "float32"), torch.ones(7, 4), False),
        (Example((2, 3), (True, False), "float32"), torch.ones(7), False),
        (Example(None, value=2.0), 2.0, True),
        (Example(None, value=2.0), 3.0, False),
    ],
)
def test_examples_know_what_fits(example: Example, given: Any, fits: bool) -> None:
    assert example.fits(given) is fits


def test_a_network_of_another_dtype_is_not_stored_as_what_it_is_not(tmp_path: Path) -> None:
    fast = runtime.compile(nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(1, 64)).double()
    with pytest.raises(StateError, match=r"float64.*fast\.float\(\)"):
        fast.save(tmp_path / "net.gossamer")
    assert not list(tmp_path.iterdir())
    assert runtime.load(fast.float().save(tmp_path / "net.gossamer"))(torch.zeros(2, 64)).shape == (2, 64)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * 2 if len(x) > 8 else self.fc(x)


def test_sizes_that_the_network_asked_for_are_not_open(tmp_path: Path) -> None:
    fast = runtime.load(runtime.compile(Branching().eval(), torch.ones(4, 8)).save(tmp_path / "net.gossamer"))
    assert fast(torch.ones(4, 8)).shape == (4, 8)
    for rows, columns in ((9, 8), (4, 7)):
        with pytest.raises(ArgumentError, match=r"made for \(4, 8\)"):
            fast(torch.ones(rows, columns))


@pytest.mark.parametrize("given", [{"x": torch.ones(2, 8)}, [torch.ones(2, 8)]])
def test_containers_of_one_tensor_cannot_be_stored(given: Any, tmp_path: Path) -> None:
    class First(nn.Module):
        def forward(self, many: Any) -> Tensor:
            return next(iter(many.values() if isinstance(many, dict) else many)) * 2

    with pytest.raises(StateError, match="lists or dicts"):
        runtime.compile(First().eval(), (given,)).save(tmp_path / "net.gossamer")
