"""Sparse networks on a CPU: Gossamer beside the dense engines, and PyTorch.

Every engine runs the same network, of the same weights, zeros and all, on the same input (`gossamer bench` does it for
any network). What is claimed is a ratio: Gossamer against the faster of ONNX Runtime and OpenVINO in the same round
(against PyTorch alone where neither is installed). Outputs are compared first. --int8 adds what a user would otherwise
pick, dense and rounded to 8 bits; it is no rival in the ratio, which is of float32.

Sparsity is the same in every convolution and linear layer, the first one and the last among them unless --dense-ends.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision import models

from common import header, median_ratio, quartiles, table
from gossamer import Sparsifier
from gossamer.bench import ENGINES, INT8, compare

RIVALS = ("onnxruntime", "openvino")  # dense, float32

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


Times = dict[str, list[float]]


def measure(name: str, batch: int, sparsity: float, threads: int, given: argparse.Namespace) -> tuple[Times, str]:
    """Seconds of each engine, round by round; and the engines that did not run, with the reason."""
    x, model = example(name, batch), make(name, sparsity, given.dense_ends)
    engines = [e for e in ENGINES if (given.inductor or e != "inductor") and (given.int8 or e not in INT8)]
    found = compare(model, x, engines=engines, threads=threads, rounds=given.rounds)
    missing = "; ".join(f"{r.engine}: {r.note}" for r in found.rows if r.note)
    return {row.engine: list(row.seconds) for row in found.rows if row.seconds}, missing


def row_of(name: str, batch: int, sparsity: float, threads: int, times: Times, given: argparse.Namespace) -> list[str]:
    """A row of the table, of the rounds of all passes; without engines that failed in one."""
    times = {e: seconds for e, seconds in times.items() if len(seconds) == len(times["gossamer"])}
    best = [min(turn) for turn in zip(*(times[e] for e in RIVALS if e in times), strict=True)] or times["eager"]
    ratios = [b / t for b, t in zip(best, times["gossamer"], strict=True)]
    low, high = quartiles(ratios)
    goals = TO_REACH.get((name, batch))
    goal = dict(zip((80, 90, 95), goals, strict=True)).get(int(sparsity)) if goals else None
    ratio = statistics.median(ratios)
    verdict = "" if goal is None else f"{goal:.1f} {'met' if ratio >= goal else 'missed'}"
    others = [f"{median_ratio(times[e], times['gossamer']):.2f}" if e in times else "-" for e in columns(given)]
    row = [f"{name} b{batch}", f"{sparsity:g} %", str(threads), f"{1000 * statistics.median(times['gossamer']):.2f}"]
    return [*row, *others, f"{ratio:.2f}", f"{low:.2f}..{high:.2f}", verdict]


def columns(given: argparse.Namespace) -> list[str]:
    """The engines that have a column."""
    return [e for e in ENGINES if e != "gossamer" and (given.int8 or e not in INT8)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    networks = ["resnet18:1", "resnet18:16", "resnet50:1", "mobilenet_v1:1", "bert_ffn:128"]
    parser.add_argument("--models", nargs="+", default=networks, metavar="NAME:BATCH", help="torchvision's too")
    parser.add_argument("--sparsity", nargs="+", type=float, default=[80, 90, 95])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=4, help="in each pass (%(default)s)")
    parser.add_argument(
        "--passes",
        type=int,
        default=3,
        help="over all rows, so that a bad while of the machine's is in each (%(default)s)",
    )
    parser.add_argument("--dense-ends", action="store_true", help="leave the first and the last layer dense")
    parser.add_argument("--inductor", action="store_true", help="torch.compile too, which takes minutes to compile")
    parser.add_argument("--int8", action="store_true", help="ONNX Runtime and OpenVINO rounded to 8 bits too")
    given = parser.parse_args()
    if given.passes < 1:
        parser.error(f"--passes {given.passes}: at least 1")
    warnings.filterwarnings("ignore")
    header("Inference", "torchvision", "onnxruntime", "openvino", *(["nncf"] if given.int8 else []), peer=False)
    print("Times are those of the engine over Gossamer's; above 1 Gossamer is faster.\n")
    cases = [
        (text.partition(":")[0], int(text.partition(":")[2] or 1), sparsity, threads)
        for text in given.models
        for threads in given.threads
        for sparsity in given.sparsity
    ]
    all_times: list[Times] = [{} for _ in cases]
    said = ""
    for _ in range(given.passes):
        for case, times in zip(cases, all_times, strict=True):
            now, missing = measure(*case, given)
            if "gossamer" not in now:
                raise SystemExit(f"{case}: Gossamer itself did not run: {missing}")
            for engine, seconds in now.items():
                times.setdefault(engine, []).extend(seconds)
            print(" ".join(row_of(*case, now, given)), flush=True)
            if missing != said:
                print(f"  ({missing})" if missing else "  (all engines ran)", flush=True)
            said = missing
    rows = [row_of(*case, times, given) for case, times in zip(cases, all_times, strict=True)]
    names = ("network", "zeros", "threads", "ms", *columns(given))
    print("\n" + table((*names, "best dense", "quartiles", "to reach"), rows))


if __name__ == "__main__":
    main()
