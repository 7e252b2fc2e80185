"""A state comes back as it was, bit for bit, and a file that is none is an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gossamer.errors import ArgumentError, FileError
from gossamer.storage.states import load_state, save_state
from gossamer.storage.tensors import load_tensors, save_tensors

_NUMBERS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
_TREES = st.recursive(
    _NUMBERS,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=20,
)


def equal(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(v, b[k]) for k, v in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


@given(st.dictionaries(st.text() | st.integers(), _TREES))
def test_nested_numbers_and_words_come_back(tmp_path_factory: pytest.TempPathFactory, state: dict[Any, Any]) -> None:
    path = tmp_path_factory.mktemp("states") / "s"
    assert equal(load_state(save_state(path, state)), state)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (torch.randn(3, 5) * 3).to(dtype)
    state = load_state(save_state(tmp_path / "s", {"a": [tensor, tensor[::2].t(), torch.tensor(2.5)]}))
    for got, want in zip(state["a"], [tensor, tensor[::2].t(), torch.tensor(2.5)], strict=True):
        assert torch.equal(got, want)
        assert got.dtype == want.dtype
    assert state["a"][2].shape == ()


def test_arrays_and_numbers_of_numpy_come_back(tmp_path: Path) -> None:
    state = load_state(save_state(tmp_path / "s", {"a": np.arange(4, dtype=np.uint32), "b": np.float64(0.1)}))
    assert np.array_equal(state["a"], np.arange(4))
    assert state["a"].dtype == np.uint32
    assert state["b"] == 0.1


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.LBFGS])
def test_an_optimizer_goes_on_as_if_nothing_had_been(tmp_path: Path, kind: type[torch.optim.Optimizer]) -> None:
    def step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = net(torch.ones(1, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)

    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    first, second = kind(one.parameters(), lr=0.1, **more), kind(other.parameters(), lr=0.3, **more)
    step(one, first)
    state = load_state(save_state(tmp_path / "s", {"model": one.state_dict(), "optimizer": first.state_dict()}))
    other.load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    for net, optimizer in ((one, first), (other, second)):
        step(net, optimizer)
    assert torch.equal(one.weight, other.weight)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"a": {"b": [1, object()]}}, "state['a']['b'][1] is a object"),
        ({"a": {1.5: 2}}, "state['a'] has the key 1.5"),
        ({"a": {True: 2}}, "state['a'] has the key True"),
        ({"a": lambda: 0}, "state['a'] is a function"),
        ({"a": np.array(["x"])}, "state['a'] is an array of <U1"),
    ],
)
def test_what_a_file_cannot_hold_is_named(tmp_path: Path, state: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError) as error:
        save_state(tmp_path / "s", state)
    assert words in str(error.value)
    assert not list(tmp_path.iterdir()), "nothing may be left of it"


def tree(content: Any, **changes: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    text = content if isinstance(content, str) else json.dumps(content)
    head = {"format": "gossamer-state", "version": "1", "kind": "state", "tree": text}
    return {"0": torch.ones(2)}, {**head, **changes}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (tree({"d": []}, format="other"), "holds no state"),
        (tree({"d": []}, version="2"), "version 2"),
        (tree({"d": []}, kind="ticket"), "holds a ticket, and a state is needed"),
        (tree("{"), "header"),
        (tree([]), "no dict"),
        (tree({"t": "1"}), "header"),
        (tree({"x": []}), "header"),
        (tree({}), "header"),
        (tree({"t": "0", "d": []}), "header"),
        (tree({"d": 3}), "header"),
        (tree({"d": [[1]]}), "header"),
        (tree({"d": [[[1], 2]]}), "header"),
        (tree({"d": [["a", {"u": 5}]]}), "header"),
        (tree("[" * 100_000 + "]" * 100_000), "header"),
        (tree({"d": [["a", {"n": "none"}]]}), "header"),
    ],
)
def test_a_file_that_is_no_state_says_so(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(FileError, match=words):
        load_state(save_tensors(tmp_path / "s", *content))


def test_a_state_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="a run is needed"):
        load_state(save_state(tmp_path / "s", {}), kind="run")


def test_truncated_anywhere_it_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    path = save_state(tmp_path / "s", {"a": torch.ones(5), "b": [1, "x"]})
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FileError):
            load_state(path)


def test_the_file_is_plain_safetensors(tmp_path: Path) -> None:
    tensors, metadata = load_tensors(save_state(tmp_path / "s", {"a": torch.ones(5)}))
    assert torch.equal(tensors["0"], torch.ones(5))
    assert json.loads(metadata["tree"]) == {"d": [["a", {"t": "0"}]]}
