"""Whole networks, compiled, give what they gave."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from real_networks import MODELS, error, made
from torch import nn
from torch.fx import GraphModule
from twins import needs_library

from gossamer import Sparsifier, runtime
from gossamer.runtime import capture
from gossamer.runtime.segment import Segment

pytestmark = [needs_library, pytest.mark.filterwarnings("ignore")]  # torch.export's own


class Once:
    """torch.export, whose work for one network serves every sparsity of it: its program holds that copy's weights."""

    def __init__(self) -> None:
        self.made: Any = None
        self.real = capture.export
        self.model: Any = None

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.made is None:
            self.model = model
            self.made = self.real(model, *args, **kwargs).run_decompositions({})
        self.model.load_state_dict(model.state_dict())
        return self

    def run_decompositions(self, _: Any) -> Any:
        return self.made


@pytest.mark.parametrize("name", MODELS)
def test_networks_give_what_they_gave(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "export", Once())
    model, example = made(name), MODELS[name][1]()
    batch = torch.cat([MODELS[name][1]() for _ in range(3)])
    convs = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    with torch.no_grad():
        if name == "fastai_unet":  # which learns its shapes from its first batch
            model(batch)
        for sparsity in (0, 50, 90, 99, 100):
            if sparsity:
                Sparsifier(model, layer_type=(nn.Conv1d, nn.Conv2d, nn.Linear)).sparsify_model(sparsity)
            before = {n: zlib.crc32(t.numpy().data) for n, t in model.state_dict().items()}  # BERT-base twice is large
            fast = runtime.compile(model, example)
            for x in [example, batch] if sparsity == 90 else [example]:
                assert error(fast(x), model(x)) < 1e-5, f"at {sparsity} %"
            assert all(zlib.crc32(t.numpy().data) == before[n] for n, t in model.state_dict().items())
            rows = fast.explain()
            assert not any("batch_norm" in row.op for row in rows)
            if isinstance(fast.network, GraphModule):  # fastai's U-Net has hooks, and runs layer by layer
                assert sum(row.op.startswith("conv2d") for row in rows) == convs
            is_sparse = any(row.runs == "sparse" for row in rows)
            if sparsity != 50:  # where it is faster so
                assert is_sparse == (sparsity > 50), f"at {sparsity} %"
            if sparsity > 50:
                segments = [m for m in fast.modules() if isinstance(m, Segment)]
                assert any(way is not None for s in segments for way in s._kept.values())
