"""Sparse networks on a CPU: Gossamer beside the dense engines, and PyTorch.

Every engine runs the same network, of the same weights, zeros and all, on the same input; each is warmed up, and then
all take turns, another one first in each round. What is claimed is a ratio: Gossamer against the faster of ONNX Runtime
and OpenVINO in the same round (against PyTorch alone where neither is installed). Outputs are compared first.

Sparsity is the same in every convolution and linear layer, the first one and the last among them unless --dense-ends.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision import models

from common import header, is_installed, quartiles, table
from gossamer import Sparsifier, runtime

TO_REACH = {  # times the best dense engine, at 80, 90 and 95 %
    ("resnet18", 1): (2.0, 3.0, 4.0),
    ("resnet18", 16): (3.3, 4.6, 5.5),
    ("resnet50", 1): (1.9, 2.6, 3.6),
    ("mobilenet_v1", 1): (1.5, 2.1, 2.4),
    ("bert_ffn", 128): (3.0, 5.0, 8.0),
}


class MobileNetV1(nn.Sequential):
    """Howard et al. 2017, with the width 1."""

    def __init__(self) -> None:
        widths = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2)]
        widths += [(512, 512, 1)] * 5 + [(512, 1024, 2), (1024, 1024, 1)]
        layers = [self.block(3, 32, 3, 2, 1)]
        for i, o, stride in widths:
            layers += [self.block(i, i, 3, stride, i), self.block(i, o, 1, 1, 1)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 1000))

    @staticmethod
    def block(i: int, o: int, kernel: int, stride: int, groups: int) -> nn.Module:
        conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())


class BertFeedForward(nn.Sequential):
    """The feed-forward half of BERT-base's layers, twelve of them."""

    def __init__(self) -> None:
        layers = [nn.Sequential(nn.Linear(768, 3072), nn.GELU(), nn.Linear(3072, 768)) for _ in range(12)]
        super().__init__(*layers)


def make(name: str, sparsity: float, dense_ends: bool) -> nn.Module:
    torch.manual_seed(0)
    kinds: dict[str, Callable[[], nn.Module]] = {"mobilenet_v1": MobileNetV1, "bert_ffn": BertFeedForward}
    model = kinds.get(name, getattr(models, name, None))().eval()
    layers = [n for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    # Depthwise kernels hold little to leave out, and are left dense wherever this is done for real.
    exclude = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    if dense_ends:
        exclude += [layers[0], layers[-1]]
    Sparsifier(model, layer_type=(nn.Conv2d, nn.Linear), exclude=exclude).sparsify_model(sparsity)
    return model


def example(name: str, batch: int) -> Tensor:
    return torch.randn(batch, 768) if name == "bert_ffn" else torch.randn(batch, 3, 224, 224)


def engines(model: nn.Module, x: Tensor, threads: int, folder: Path, inductor: bool) -> dict[str, Callable[[], Any]]:
    """Name → a call that gives the output as a tensor or array."""
    found: dict[str, Callable[[], Any]] = {"gossamer": (lambda fast: lambda: fast(x))(runtime.compile(model, x))}
    found["eager"] = lambda: model(x)
    if x.ndim == 4:
        last, x_last = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        found["channels_last"] = lambda: last(x_last)
    if inductor:
        compiled = torch.compile(model)
        found["inductor"] = lambda: compiled(x)
    if is_installed("onnx") and is_installed("onnxscript"):
        path = folder / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, external_data=False, verbose=False)
        if is_installed("onnxruntime"):
            found["onnxruntime"] = onnxruntime(path, x, threads)
        if is_installed("openvino"):
            found["openvino"] = openvino(path, x, threads)
    return found


def onnxruntime(path: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Threads that spin while others are timed would slow those.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if threads > 1 else "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)[0]


def openvino(path: Path, x: Tensor, threads: int) -> Callable[[], Any]:
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(str(path), "CPU", settings)
    request, data = compiled.create_infer_request(), x.numpy()
    return lambda: request.infer([data])[compiled.output(0)]


def seconds(call: Callable[[], Any], atleast: float = 0.06) -> float:
    """Of one call, over as many as take a while; the first is not counted, since others have used the caches since."""
    call()
    n, began = 0, time.perf_counter()
    while True:
        call()
        n += 1
        took = time.perf_counter() - began
        if took > atleast:
            return took / n


def measure(name: str, batch: int, sparsity: float, threads: int, given: argparse.Namespace) -> list[str]:
    torch.set_num_threads(threads)
    x, model = example(name, batch), make(name, sparsity, given.dense_ends)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        calls = engines(model, x, threads, Path(folder), given.inductor)
        want = calls["eager"]()
        for engine, call in calls.items():
            off = float((torch.as_tensor(call()) - want).abs().max() / want.abs().max())
            assert off < 1e-4, f"{engine} is off by {off:.1e}"
        times: dict[str, list[float]] = {engine: [] for engine in calls}
        names = list(calls)
        for i in range(given.rounds):
            for engine in names[i % len(names) :] + names[: i % len(names)]:
                times[engine].append(seconds(calls[engine]))
    rivals = [e for e in ("onnxruntime", "openvino") if e in times] or ["eager"]
    best = [min(times[e][i] for e in rivals) for i in range(given.rounds)]
    ratios = [b / t for b, t in zip(best, times["gossamer"], strict=True)]
    low, high = quartiles(ratios)
    goals = TO_REACH.get((name, batch))
    goal = dict(zip((80, 90, 95), goals, strict=True)).get(int(sparsity)) if goals else None
    ratio = statistics.median(ratios)
    verdict = "" if goal is None else f"{goal:.1f} {'met' if ratio >= goal else 'missed'}"
    others = [
        f"{statistics.median(t / g for t, g in zip(times[e], times['gossamer'], strict=True)):.2f}"
        if e in times
        else "-"
        for e in ("eager", "channels_last", "inductor", "onnxruntime", "openvino")
    ]
    ms = statistics.median(times["gossamer"]) * 1e3
    row = [f"{name} b{batch}", f"{sparsity:g} %", str(threads), f"{ms:.2f}", *others]
    return [*row, f"{ratio:.2f}", f"{low:.2f}..{high:.2f}", verdict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = ["resnet18:1", "resnet18:16", "resnet50:1", "mobilenet_v1:1", "bert_ffn:128"]
    parser.add_argument("--models", nargs="+", default=networks, metavar="NAME:BATCH", help="torchvision's too")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[80, 90, 95])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dense-ends", action="store_true", help="leave the first and the last layer dense")
    parser.add_argument("--inductor", action="store_true", help="torch.compile too, which takes minutes to compile")
    given = parser.parse_args()
    os.environ.setdefault("ORT_LOGGING_LEVEL", "3")
    warnings.filterwarnings("ignore")
    header("Inference", "torchvision", "onnxruntime", "openvino", peer=False)
    print("Times are those of the engine over Gossamer's; above 1 Gossamer is faster.\n")
    rows: list[list[str]] = []
    for text in given.models:
        name, _, batch = text.partition(":")
        for threads in given.threads:
            for sparsity in given.sparsity:
                rows.append(measure(name, int(batch or 1), sparsity, threads, given))
                print(" ".join(rows[-1]), flush=True)
    names = ("network", "zeros", "threads", "ms", "eager", "channels_last", "inductor", "onnxruntime", "openvino")
    print("\n" + table((*names, "best dense", "quartiles", "to reach"), rows))


if __name__ == "__main__":
    main()
