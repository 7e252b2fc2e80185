"""Masks: applied to the bit, counted, packed, and taken back whole or not at all."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import plain
from gossamer import masks as masks_module
from gossamer.errors import FileError
from gossamer.masks import Masks, pack, unpack, zero_at, zero_masked

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@given(st.lists(st.integers(0, 5), min_size=0, max_size=4), st.integers(0, 2**32 - 1))
def test_packing_loses_nothing(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = pack(mask)
    assert packed.numel() == (mask.numel() + 7) // 8
    assert torch.equal(unpack(packed, shape), mask)


def test_packing_goes_by_position_and_not_by_memory():
    mask = torch.rand(2, 3, 4, 5) < 0.5
    assert torch.equal(pack(mask.to(memory_format=torch.channels_last)), pack(mask))
    assert torch.equal(pack(mask.transpose(0, 1)), pack(mask.transpose(0, 1).contiguous()))


def test_the_first_weight_is_in_the_highest_bit():
    assert pack(torch.tensor([True] + [False] * 8)).tolist() == [128, 0]


@pytest.mark.parametrize(
    "bad",
    [
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(2),
        torch.zeros(0, dtype=torch.uint8),
    ],
)
def test_bytes_of_another_shape_are_refused(bad):
    with pytest.raises(FileError, match="layer7"):
        unpack(bad, (9,), "layer7")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "long"])
def test_masked_becomes_plus_zero_and_the_rest_keeps_every_bit(dtype, layout):
    shape = (3, 4, 5, 6) if layout != "long" else (2, masks_module._CHUNK // 2 + 77)
    tensor = torch.randn(shape).to(dtype)
    flat = tensor.view(-1)
    for i, odd in enumerate([math.nan, math.inf, -math.inf, -0.0, -1.0] * 2):
        flat[i] = odd
    mask = torch.rand(shape) < 0.5
    mask.view(-1)[:10] = torch.tensor([True, False]).repeat_interleave(5)
    if layout == "channels_last":
        tensor = tensor.to(memory_format=torch.channels_last)
    if layout == "transposed":
        tensor, mask = tensor.transpose(0, 2), mask.transpose(0, 2)
    before = tensor.clone()
    zero_masked([tensor], mask)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    assert torch.equal(tensor.view(kind), torch.where(mask, before.view(kind), torch.zeros((), dtype=kind)))


def test_tensors_of_several_dtypes_are_masked_together():
    mask = torch.tensor([True, False, True])
    tensors = [torch.ones(3, dtype=d) for d in DTYPES]
    zero_masked(tensors, mask)
    assert all(t.tolist() == [1, 0, 1] for t in tensors)


def test_a_parameter_is_masked_in_place_without_a_trace_in_its_graph():
    weight = torch.nn.Parameter(torch.ones(2))
    zero_masked([weight], torch.tensor([False, True]))
    zero_at([weight], torch.tensor([1]))
    assert weight.tolist() == [0, 0]
    assert weight.requires_grad
    assert weight.grad_fn is None


def test_zero_at_zeroes_these_positions_and_no_other():
    tensors = [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bfloat16)]
    zero_at(tensors, torch.tensor([0, 4]))
    assert all(t.tolist() == [[0, 1, 1], [1, 0, 1]] for t in tensors)


def test_masks_begin_all_true_and_count_what_is_masked():
    masks = Masks({"a": torch.ones(2, 3), "b": torch.ones(4)})
    assert list(masks) == ["a", "b"]
    assert all(bool(m.all()) and m.dtype == torch.bool for m in masks.values())
    masks["a"][0] = False
    assert (masks.masked("a"), masks.masked("b")) == (3, 0)
    masks.replace("b", torch.zeros(4, dtype=torch.bool))
    assert masks.masked("b") == 4


def test_a_mask_follows_its_weight_to_another_device_and_stays_there():
    masks = Masks({"a": torch.ones(2)})
    moved = masks.on("a", torch.device("meta"))
    assert moved.device.type == "meta"
    assert masks["a"] is moved


def test_masks_come_back_from_their_state():
    first, second = (Masks({"a": torch.ones(5, 3), "b": torch.ones(9)}) for _ in range(2))
    first.replace("a", torch.rand(5, 3) < 0.5)
    second.load_state_dict(first.state_dict())
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert plain.bits(first.state_dict()["b"]) == [255, 128]


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.pop("b"),
        lambda s: s.update(c=s["b"]),
        lambda s: s.update(b=s["b"][:1]),
        lambda s: s.update(b=s["b"].float()),
    ],
    ids=["missing", "unknown", "short", "dtype"],
)
def test_masks_of_another_network_are_refused_whole(change):
    masks = Masks({"a": torch.ones(5, 3), "b": torch.ones(9)})
    state = masks.state_dict()
    state["a"] = torch.zeros_like(state["a"])
    change(state)
    with pytest.raises(FileError, match=r"'[bc]'"):
        masks.load_state_dict(state)
    assert masks.masked("a") == 0, "nothing may have been taken over"
