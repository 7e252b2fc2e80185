"""Engines side by side: the same outputs first, then turns; and nobody computes while another is timed."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from gossamer import ArgumentError, Sparsifier, runtime
from gossamer.bench import ENGINES, INT8, alternating, compare, is_installed, settle
from gossamer.bench import comparison as module
from gossamer.bench.comparison import Comparison, EngineRow
from gossamer.bench.engines import Engine, Job, _int8_file, _openvino_int8


def small() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.Flatten()
    )
    Sparsifier(net).sparsify_model(80)
    return net.eval()


X = torch.randn(1, 3, 12, 12)
QUICK = [name for name in ENGINES if name != "inductor"]


def test_every_engine_computes_the_same_and_has_a_row() -> None:
    found = compare(small(), X, engines=QUICK, threads=1, rounds=2)
    assert [r.engine for r in found.rows] == QUICK
    for name in ("eager", "channels_last", "onnxruntime", "gossamer"):  # development has these
        assert found[name].note == ""
    for row in found.rows:
        if row.note:
            assert "not installed: pip install" in row.note
            continue
        assert len(row.seconds) == 2
        assert all(0 < s < 10 for s in row.seconds)
        assert row.version[0].isdigit()
        assert row.nbytes is not None
        assert row.nbytes > 0
        assert row.difference is not None
        assert row.difference < (0.1 if row.engine in INT8 else 1e-5)
    assert found["onnxruntime int8"].difference > 0
    assert found["eager"].difference == 0
    assert found["gossamer"].ratio == 1
    assert (found.threads, found.inputs) == (1, ("float32 1×3×12×12",))


def test_inductor_runs() -> None:
    row = compare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4), engines=["inductor"], rounds=1)[
        "inductor"
    ]
    assert row.note == "" or "compiler" in row.note
    assert row.seconds or row.note


def test_sizes_and_zeros_are_counted() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(100, 100, bias=False)).eval()
    with torch.no_grad():
        net[0].weight[10:] = 0
    found = compare(net, torch.randn(1, 100), engines=[], rounds=1)
    assert [r.engine for r in found.rows] == ["eager", "gossamer"]
    assert found.dense_bytes == 40_000
    assert found.sparse_bytes < 10_000
    assert found.sparsity == pytest.approx(90)


def test_a_wrong_engine_is_not_timed_and_a_broken_one_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(job: Job) -> Engine:
        raise RuntimeError("no such operator\nand a long trace")

    engines = {
        **ENGINES,
        "onnxruntime": lambda job: Engine("9", lambda: job.model(*job.examples) * 1.01, 1),
        "openvino": broken,
    }
    monkeypatch.setattr(module, "ENGINES", engines)
    found = compare(small(), X, engines=["onnxruntime", "openvino"], rounds=1)
    assert found["onnxruntime"].seconds == ()
    assert found["onnxruntime"].difference == pytest.approx(0.01, rel=0.1)
    assert "computes something else: off by 1.0e-02" in str(found)
    assert found["openvino"].note == "cannot run it: no such operator"


def test_a_wrong_gossamer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**ENGINES, "gossamer": lambda job: Engine("9", lambda: job.model(*job.examples) + 1, 1)}
    monkeypatch.setattr(module, "ENGINES", wrong)
    with pytest.raises(ArgumentError, match="computes something else"):
        compare(small(), X, engines=[], rounds=1)


def test_the_model_the_layout_and_the_threads_stay_as_they_were() -> None:
    net, before = small(), torch.get_num_threads()
    strides = [p.stride() for p in net.parameters()]
    compare(net, X, engines=["channels_last"], threads=before + 1, rounds=1)
    assert torch.get_num_threads() == before
    assert [p.stride() for p in net.parameters()] == strides


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"engines": ["onnx"]}, "no engine is called 'onnx'. Closest: onnxruntime"),
        ({"rounds": 0}, "rounds=0"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_bad_input(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        compare(small(), X, **given)


def test_nobody_is_timed_while_threads_still_compute() -> None:
    end = time.process_time() + 0.1

    def spin() -> None:
        while time.process_time() < end:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    assert settle(most=30)
    assert not thread.is_alive()


def test_settling_gives_up_on_threads_that_never_rest() -> None:
    stop = threading.Event()

    def spin() -> None:
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        assert not settle(most=0.2)
    finally:
        stop.set()
        thread.join()


def test_another_one_is_first_in_each_round() -> None:
    order: list[str] = []
    jobs = {name: (lambda name=name: order.append(name) or 1.0) for name in "abc"}
    assert alternating(3, jobs, warmup=0) == {name: [1.0] * 3 for name in "abc"}
    assert "".join(order) == "abcbcacab"


def test_the_int8_file_is_in_int8(tmp_path: Path) -> None:
    net = small()
    job = Job(net, runtime.compile(net, X), (X,), 1, tmp_path)
    graph = onnx.load(str(_int8_file(job))).graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {n.op_type for n in graph.node}
    kinds = {i.data_type for i in graph.initializer if len(i.dims) == 4}
    assert kinds == {onnx.TensorProto.INT8}


@pytest.mark.skipif(not is_installed("openvino"), reason="OpenVINO is no part of development")
def test_openvino_rounds_too(tmp_path: Path) -> None:
    net = small()
    engine = _openvino_int8(Job(net, runtime.compile(net, X), (X,), 1, tmp_path))
    with torch.no_grad():
        off = (torch.from_numpy(engine.call()[0]) - net(X)).abs().max()
    assert 0 < off < 0.1 * net(X).abs().max()


ROWS = (
    EngineRow("eager", "2.15.0", (0.004, 0.002, 0.003), 3.0, 46_800_000, 0.0),
    EngineRow("openvino", note="not installed: pip install openvino"),
    EngineRow("gossamer", "0.1.0", (0.001, 0.001, 0.001), 1.0, 5_900_000, 2e-7),
)
TABLE = """\
float32 1×3×8×8; 2 threads; 90.00 % zeros; 46.8 MB dense, 5.9 MB sparse (12.6 %)
on a machine, torch VERSION

Engine    Version     ms/call         Quartiles / Gossamer      File  Off by
----------------------------------------------------------------------------
eager     2.15.0         3.00        2.50..3.50       3.00   46.8 MB       0
openvino  not installed: pip install openvino
gossamer  0.1.0          1.00        1.00..1.00       1.00    5.9 MB   2e-07
"""


def comparison(load: float) -> Comparison:
    return Comparison(ROWS, ("float32 1×3×8×8",), 90.0, 46_800_000, 5_900_000, 2, "a machine", 2, load)


def test_the_table_is_this_one() -> None:
    assert str(comparison(1.0)) == TABLE.strip().replace("VERSION", torch.__version__.partition("+")[0])
    assert "load 7.5 on 2 cores" in str(comparison(7.5)).splitlines()[-1]


def test_json_has_every_round() -> None:
    values = json.loads(comparison(1.0).to_json())
    assert [e["engine"] for e in values["engines"]] == ["eager", "openvino", "gossamer"]
    assert values["engines"][0]["seconds"] == [0.004, 0.002, 0.003]
    assert values["engines"][0]["quartiles_ms"] == pytest.approx([2.5, 3.5])
    assert values["engines"][1]["ms"] is None
    assert (values["dense_bytes"], values["sparse_bytes"], values["threads"]) == (46_800_000, 5_900_000, 2)
    with pytest.raises(ArgumentError, match="Closest: eager"):
        _ = comparison(1.0)["eagre"]


def test_inputs_that_a_compiled_network_does_not_take() -> None:
    fast = runtime.compile(nn.Conv2d(3, 8, 3).eval(), torch.randn(1, 3, 8, 8))
    with pytest.raises(ArgumentError, match="does not run on the example inputs"):
        compare(fast, torch.randn(1, 4, 8, 8), engines=["eager"], rounds=1)
