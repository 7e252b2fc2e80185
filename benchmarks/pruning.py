"""ResNet-18 at 30, 50 and 70 % of its filters: what it weighs, how fast it is, and how well it does after fine-tuning.

For every seed a dense ResNet-18 (one input channel, ten classes) is trained on Fashion-MNIST; each pruner gets a copy
of it, removes the same share of every layer's filters at once, and all are fine-tuned alike: the same batches in the
same order, the same optimizer, as many epochs. The dense one is fine-tuned too. Speed is measured on 224×224 pixels,
all networks taking turns. Gossamer, fasterai's Pruner and plain torch-pruning, whichever are installed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

import gossamer
from accuracy import Batches, Results, Split, fit, load, spread
from common import CLOCKS, PEER, alternating, header, is_installed, median_ratio, peer_module, table
from gossamer import Pruner
from gossamer.pruning.report import count_macs, count_params


def network() -> nn.Module:
    """ResNet-18 for grey images of ten kinds."""
    model = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    return model


def by_gossamer(model: nn.Module, sparsity: float, example: Tensor) -> nn.Module:
    """Ours, as it comes."""
    return Pruner(model, sparsity, "local", "large_final", example).prune_model()


def by_eights(model: nn.Module, sparsity: float, example: Tensor) -> nn.Module:
    """Ours, in each layer a number of filters that compilers like."""
    return Pruner(model, sparsity, "local", "large_final", example, round_to=8).prune_model()


def by_peer(model: nn.Module, sparsity: float, example: Tensor) -> nn.Module:
    """fasterai's, by the same criterion; its share is a fraction."""
    prune, criteria = peer_module("prune.pruner"), peer_module("core.criteria")
    assert prune is not None
    assert criteria is not None
    with contextlib.redirect_stdout(io.StringIO()):
        prune.Pruner(model, sparsity / 100, "local", criteria.large_final, example_inputs=example).prune_model()
    return model


def by_torch_pruning(model: nn.Module, sparsity: float, example: Tensor) -> nn.Module:
    """torch-pruning's own, with its group magnitude."""
    import torch_pruning as tp

    importance = tp.importance.GroupMagnitudeImportance(p=2)
    tp.pruner.BasePruner(
        model, example, importance, pruning_ratio=sparsity / 100, ignored_layers=[model.fc], round_to=None
    ).step()
    return model


PRUNERS: Mapping[str, Callable[[nn.Module, float, Tensor], nn.Module]] = {
    "gossamer": by_gossamer,
    "gossamer, round_to=8": by_eights,
    PEER: by_peer,
    "torch-pruning": by_torch_pruning,
}


def pruned(who: str, dense: nn.Module, sparsity: float, pixels: int) -> nn.Module:
    """A pruned copy."""
    model = copy.deepcopy(dense).eval()
    return PRUNERS[who](model, sparsity, torch.rand(1, 1, pixels, pixels)).train()


def file_size(model: nn.Module) -> int:
    """Bytes of its weights in one file, as `gossamer.save` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        gossamer.save(model, path)
        return path.stat().st_size


def timed(
    networks: Mapping[str, nn.Module], batch: int, rounds: int, clock: Callable[[], float], is_compiled: bool
) -> dict[str, list[float]]:
    """Milliseconds of a forward pass by network, round by round."""
    x = torch.rand(batch, 1, 224, 224)

    def job(model: Any) -> Callable[[], float]:
        def once() -> float:
            start = clock()
            with torch.inference_mode():
                model(x)
            return 1000 * (clock() - start)

        return once

    torch._dynamo.reset()
    jobs: dict[str, Callable[[], float]] = {}
    for name, model in networks.items():
        model = copy.deepcopy(model).eval()
        jobs[name] = job(torch.compile(model, dynamic=False) if is_compiled else model)
    # All are of one class, and from the ninth on Dynamo would leave them to eager.
    with torch._dynamo.config.patch(recompile_limit=4 * len(jobs), fail_on_recompile_limit_hit=True):
        return alternating(rounds, jobs, warmup=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="Fashion-MNIST's four idx .gz files; else MNIST")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[30, 50, 70], metavar="PERCENT")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="of the dense training")
    parser.add_argument("--fine-tune", type=int, default=1, help="epochs after pruning")
    parser.add_argument("--train", type=int, metavar="N", help="training images to use; by default all")
    parser.add_argument("--test", type=int, metavar="N", help="test images to use; by default all")
    parser.add_argument("--rounds", type=int, default=15, help="of timing")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--no-inductor", action="store_true", help="leave out torch.compile")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="keep every run, and go on from there")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    header("Structured pruning: ResNet-18", "torch", "torch-pruning", "fastai", PEER)
    who = [name for name in PRUNERS if name.startswith("gossamer") or is_installed(name)]
    name, train, test = load(options.data)
    if options.train:
        train = (train[0][: options.train], train[1][: options.train])
    if options.test:
        test = (test[0][: options.test], test[1][: options.test])
    print(f"- data: {name}; {len(train[1]):,} training and {len(test[1]):,} test images used")
    print(
        f"- epochs: {options.epochs} dense, then {options.fine_tune} for every network; {options.seeds} seeds\n",
        flush=True,
    )
    settings = {"data": name, "train": len(train[1]), "epochs": options.epochs, "fine_tune": options.fine_tune}
    results = Results(options.out, settings)
    start = time.perf_counter()
    shown: dict[str, nn.Module] = {}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        dense = network()
        keys = [f"dense/0/{seed}", *(f"{w}/{s:g}/{seed}" for w in who for s in options.sparsities)]
        wanted = [k for k in keys if k not in results.runs]
        if not wanted and seed:
            continue
        fit(dense, (train, test), options.epochs, 3e-3, seed)
        pixels = train[0].shape[-1]
        networks = {"dense/0": dense}
        networks |= {f"{w}/{s:g}": pruned(w, dense, s, pixels) for w in who for s in options.sparsities}
        if not seed:
            shown = {key: copy.deepcopy(model) for key, model in networks.items()}
        for key, model in networks.items():
            if f"{key}/{seed}" in wanted:
                before = fit_nothing(model, test)
                score = fit(copy.deepcopy(model), (train, test), options.fine_tune, 1e-3, seed)
                results.add(f"{key}/{seed}", {"accuracy": score, "before": before})
                print(f"  {key} seed {seed}: {before:.2f} % → {score:.2f} % ({time.perf_counter() - start:.0f} s)")
    print("\n" + weights_table(shown, results, options.seeds) + "\n", flush=True)
    for batch in (1, 16):
        for is_compiled in (False,) if options.no_inductor else (False, True):
            times = timed(shown, batch, options.rounds, CLOCKS[options.clock], is_compiled)
            kind = "inductor" if is_compiled else "eager"
            print(f"Batch {batch}, {kind}, 224×224 pixels, {options.clock} time:\n")
            print(speed_table(times) + "\n", flush=True)


@torch.inference_mode()
def fit_nothing(model: nn.Module, test: Split) -> float:
    """Accuracy in percent as the network is."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in Batches(test))
    model.train()
    return 100 * right / len(test[1])


def weights_table(networks: Mapping[str, nn.Module], results: Results, seeds: int) -> str:
    """Sizes, and accuracy before and after fine-tuning."""
    rows: list[Sequence[object]] = []
    example = (torch.rand(1, 1, 224, 224),)
    dense = networks["dense/0"]
    for key, model in networks.items():
        who, sparsity = key.split("/")
        runs = [results.runs[f"{key}/{seed}"] for seed in range(seeds)]
        after = [r["accuracy"] for r in runs]
        filters = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
        all_filters = sum(m.out_channels for m in dense.modules() if isinstance(m, nn.Conv2d))
        rows.append(
            [
                who,
                sparsity,
                f"{100 * (1 - filters / all_filters):.2f}",
                f"{count_params(model):,}",
                f"{count_macs(model, example) / 1e6:,.0f}",
                f"{file_size(model) / 1e6:.2f}",
                f"{statistics.mean(r['before'] for r in runs):.2f}",
                f"{statistics.mean(after):.2f}",
                f"{spread(after):.2f}",
            ]
        )
    columns = ["pruner", "asked %", "gone %", "parameters", "MMACs", "file MB", "before %", "accuracy %", "std"]
    return table(columns, rows)


def speed_table(times: Mapping[str, Sequence[float]]) -> str:
    """Median milliseconds, and how many times as fast as dense, round by round."""
    rows = [
        [
            *key.split("/"),
            f"{statistics.median(values):.2f}",
            f"{1 / median_ratio(values, times['dense/0']):.2f}",
        ]
        for key, values in times.items()
    ]
    return table(["pruner", "asked %", "ms", "times dense"], rows)


if __name__ == "__main__":
    main()
