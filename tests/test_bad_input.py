"""Every way to hold it wrong that somebody thought of: the error names what was given and says how to go on."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fastai.callback.schedule import SchedCos
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import plain
from gossamer import (
    CRITERIA,
    ArgumentError,
    Criterion,
    FileError,
    GossamerError,
    GossamerWarning,
    Granularity,
    Pruner,
    Schedule,
    SparseTraining,
    Sparsifier,
    StateError,
    TargetError,
    report,
)
from gossamer.calibration import Calibration
from gossamer.integrations.fastai import SparsifyCallback
from gossamer.rules.allocation import Context
from gossamer.rules.schedules import cos, lin
from gossamer.storage.tensors import load_tensors, save_tensors
from gossamer.tickets import Lottery, Ticket, load_ticket

# -- small builders ---------------------------------------------------------------------------------------------------


class Net(nn.Sequential):
    """Two convolutions, of which the first has one input, and a head; takes 6 × 6 pixels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, width, 3), nn.Conv2d(width, 8, 3)
        self.flat, self.head = nn.Flatten(), nn.Linear(32, 2)


BATCH = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])


def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3))


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4))


def weighing(odd: float) -> Callable[[], nn.Module]:
    """A network with one odd weight."""

    def make() -> nn.Module:
        net = Net()
        with torch.no_grad():
            net.conv2.weight[1, 2, 0, 1] = odd
        return net

    return make


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    """A network whose one layer was made into something else; what torch warns of meanwhile is not ours."""

    def make() -> nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return nn.Sequential(wrap(nn.Linear(8, 4)))

    return make


def with_weight(change: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    """A network whose one weight was made into something else."""

    def wrap(layer: nn.Module) -> nn.Module:
        layer.weight = nn.Parameter(change(layer.weight.detach()), requires_grad=False)
        return layer

    return wrapped(wrap)


def quantized(layer: nn.Module) -> nn.Module:
    return torch.ao.nn.quantized.Linear(8, 4)


def dynamically_quantized(layer: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})


def of_linear(net: nn.Module) -> Sparsifier:
    return Sparsifier(net, layer_type=nn.Linear)


def half(net: nn.Module, sparsity: Any = 50, round_to: Any = None, **rules: Any) -> None:
    Sparsifier(net, **rules).sparsify_model(sparsity, round_to)


def run(net: nn.Module, sparsity: Any = 50, schedule: Any = "lin", total_steps: Any = 4, **more: Any) -> SparseTraining:
    return SparseTraining(Sparsifier(net), more.pop("optimizer", None), sparsity, schedule, total_steps, **more)


def fit(net: nn.Module, callback: SparsifyCallback, epochs: int = 2, **kwargs: Any) -> None:
    pairs = [(torch.randn(1, 6, 6), i % 2) for i in range(4)]
    dls = DataLoaders.from_dsets(pairs, pairs, bs=2, num_workers=0, device="cpu")
    learn = Learner(dls, net, loss_func=nn.CrossEntropyLoss(), path=Path())
    learn.logger = lambda *_: None
    with learn.no_bar():
        learn.fit(epochs, 1e-2, cbs=callback, **kwargs)


def reshaped(net: nn.Module, sparsifier: Sparsifier) -> None:
    """The user puts another weight into the layer, and takes it out again; the call between is the bad one."""
    layer, before = net[0], net[0].weight
    layer.weight = nn.Parameter(torch.ones(4, 8, 3, 3))
    try:
        sparsifier.sparsify_model(50)
    finally:
        layer.weight = before


def turned_nan(net: nn.Module, sparse: SparseTraining) -> None:
    """Training diverges, and is taken back; the call between is the bad one."""
    before = net.conv1.weight.detach().clone()
    with torch.no_grad():
        net.conv1.weight.fill_(math.nan)
        try:
            sparse.step()
        finally:
            net.conv1.weight.copy_(before)


def state(**changes: Any) -> dict[str, Any]:
    """What a run of `Net` saves, with changes."""
    return {**run(Net()).state_dict(), **changes}


def a_ticket() -> Ticket:
    return Ticket(Net().state_dict(), {"conv1": torch.ones(8, 1, 3, 3, dtype=torch.bool)})


def written(content: bytes) -> str:
    Path("file").write_bytes(content)
    return "file"


def ticket_file(tensors: Mapping[str, Tensor | None] | None = None, **metadata: str) -> str:
    """A ticket's file with tensors added, changed or (None) left out, and the same for its metadata."""
    path = a_ticket().save("ticket")
    there, said = load_tensors(path)
    changed = {**there, **(tensors or {})}
    save_tensors(path, {n: t for n, t in changed.items() if t is not None}, {**said, **metadata})
    return "ticket"


def fails(*_: Any) -> Any:
    raise KeyError("mine")


# -- the table --------------------------------------------------------------------------------------------------------


def bad(
    what: str,
    make: Callable[[], nn.Module] | None,
    call: Callable[[Any], Any],
    error: type[GossamerError],
    *words: str,
) -> Any:
    """A row: what is bad; the model; the call; the error; words of its message."""
    return pytest.param(make, call, error, words, id=what)


CALLS = [
    # -- the model
    bad("model: a list", None, lambda _: Sparsifier([nn.Conv2d(1, 1, 1)]), ArgumentError, "got list", "nn.Module"),
    bad("model: None", None, lambda _: Sparsifier(None), ArgumentError, "got NoneType", "nn.Module"),
    bad("model: a class", None, lambda _: Sparsifier(Net), ArgumentError, "got type", "nn.Module"),
    bad("model: empty", nn.Sequential, Sparsifier, TargetError, "no Conv2d layer", "Sequential", "no layer that could"),
    bad("model: no such layer", linear, Sparsifier, TargetError, "no Conv2d layer", "layer_type=Linear"),
    bad("model: all excluded", conv, lambda m: Sparsifier(m, exclude="*"), TargetError, "exclude"),
    bad("report: no such layer", linear, report, TargetError, "no Conv2d layer", "layer_type=Linear"),
    bad("report: an unknown row", Net, lambda m: report(m)["conv9"], TargetError, "'conv9'", "Closest: conv"),
    bad("report: a number for a row", Net, lambda m: report(m)[0], TargetError, "0", "conv1"),
    # -- layers whose weight cannot be masked
    bad("weight: nan", weighing(math.nan), half, TargetError, "'conv2'", "nan or infinite", "checkpoint"),
    bad("weight: infinite", weighing(math.inf), half, TargetError, "'conv2'", "nan or infinite", "checkpoint"),
    bad("weight: -infinite", weighing(-math.inf), half, TargetError, "'conv2'", "nan or infinite", "checkpoint"),
    bad("weight: nan, global", weighing(math.nan), lambda m: half(m, context="global"), TargetError, "'conv2'", "nan"),
    bad("weight: nan, in a run", weighing(math.nan), run, TargetError, "'conv2'", "nan or infinite", "checkpoint"),
    bad(
        "weight: lazy",
        lambda: nn.Sequential(nn.LazyConv2d(4, 3)),
        Sparsifier,
        TargetError,
        "'0' is lazy",
        "run one batch",
    ),
    bad(
        "weight: parametrized",
        wrapped(parametrizations.orthogonal),
        of_linear,
        TargetError,
        "'0'",
        "remove_parametrizations",
        "exclude=['0']",
    ),
    bad(
        "weight: weight_norm",
        wrapped(weight_norm),
        of_linear,
        TargetError,
        "'0'",
        "remove_weight_norm",
        "exclude=['0']",
    ),
    bad(
        "weight: weight_norm, parametrized",
        wrapped(parametrizations.weight_norm),
        of_linear,
        TargetError,
        "'0'",
        "remove_parametrizations",
        "exclude=['0']",
    ),
    bad(
        "weight: spectral_norm", wrapped(spectral_norm), of_linear, TargetError, "'0'", "spectral_norm", "exclude=['0']"
    ),
    bad(
        "weight: pruned by torch",
        wrapped(lambda layer: prune.random_unstructured(layer, "weight", 0.5)),
        of_linear,
        TargetError,
        "'0'",
        "prune.remove",
        "exclude=['0']",
    ),
    bad("weight: quantized", wrapped(quantized), of_linear, TargetError, "no Linear layer", "quantize it after"),
    bad(
        "weight: quantized dynamically",
        wrapped(dynamically_quantized),
        of_linear,
        TargetError,
        "no Linear layer",
        "quantize it after",
    ),
    bad(
        "weight: integer",
        with_weight(lambda w: w.to(torch.int8)),
        of_linear,
        TargetError,
        "'0'",
        "torch.int8",
        "floating-point",
        "exclude=['0']",
    ),
    bad(
        "weight: complex",
        with_weight(lambda w: w.to(torch.complex64)),
        of_linear,
        TargetError,
        "'0'",
        "torch.complex64",
        "floating-point",
        "exclude=['0']",
    ),
    bad("weight: empty", with_weight(lambda w: w[:0]), of_linear, TargetError, "'0'", "(0, 8)", "exclude=['0']"),
    bad("weight: of three axes", with_weight(lambda w: w[None]), of_linear, TargetError, "'0'", "(1, 4, 8)"),
    bad("weight: sparse", with_weight(lambda w: w.to_sparse()), of_linear, TargetError, "'0'", "sparse"),
    bad("weight: float8", with_weight(lambda w: w.to(torch.float8_e4m3fn)), of_linear, TargetError, "'0'", "float8"),
    bad("weight: on meta", wrapped(lambda layer: layer.to("meta")), of_linear, TargetError, "'0'", "meta"),
    bad(
        "weight: of another shape than before",
        conv,
        lambda m: reshaped(m, Sparsifier(m)),
        TargetError,
        "'0'",
        "(4, 8, 3, 3)",
    ),
    bad("weight: nan in the midst of a run", Net, lambda m: turned_nan(m, run(m)), GossamerError, "'conv1'", "nan"),
    # -- layer_type, exclude
    bad("layer_type: a string", Net, lambda m: Sparsifier(m, layer_type="Linear"), ArgumentError, "'Linear'", "nn.Lin"),
    bad("layer_type: no weight", Net, lambda m: Sparsifier(m, layer_type=nn.ReLU), ArgumentError, "ReLU", "Conv2d"),
    bad("layer_type: a norm", Net, lambda m: Sparsifier(m, layer_type=nn.BatchNorm2d), ArgumentError, "BatchNorm2d"),
    bad("layer_type: an empty tuple", Net, lambda m: Sparsifier(m, layer_type=()), ArgumentError, "empty", "Conv2d"),
    bad("layer_type: None", Net, lambda m: Sparsifier(m, layer_type=None), ArgumentError, "None", "Conv2d"),
    bad("layer_type: a number", Net, lambda m: Sparsifier(m, layer_type=3), ArgumentError, "layer_type 3", "Conv2d"),
    bad("layer_type: a layer", Net, lambda m: Sparsifier(m, layer_type=m.conv1), ArgumentError, "Conv2d(1, 8", "use"),
    bad("layer_type: one of two", Net, lambda m: Sparsifier(m, layer_type=(nn.Conv2d, int)), ArgumentError, "int"),
    bad(
        "layer_type: quantized",
        wrapped(quantized),
        lambda m: Sparsifier(m, layer_type=torch.ao.nn.quantized.Linear),
        ArgumentError,
        "layer_type Linear",
        "use one",
    ),
    bad("exclude: a missing name", Net, lambda m: Sparsifier(m, exclude="conv3"), TargetError, "'conv3'", "Closest: c"),
    bad("exclude: a missing pattern", Net, lambda m: Sparsifier(m, exclude=["x*"]), TargetError, "'x*'", "Known: con"),
    bad("exclude: a type", Net, lambda m: Sparsifier(m, exclude=[nn.Conv2d]), ArgumentError, "Conv2d", "no string"),
    bad("exclude: a number", Net, lambda m: Sparsifier(m, exclude=3), ArgumentError, "exclude", "3"),
    bad("exclude: None", Net, lambda m: Sparsifier(m, exclude=None), ArgumentError, "None"),
    # -- criteria
    bad(
        "criteria: one that moves weights",
        Net,
        lambda m: Sparsifier(m, criteria="SparseGPT"),
        ArgumentError,
        "sparsegpt(",
    ),
    # -- granularity
    bad("granularity: unknown", Net, lambda m: Sparsifier(m, "filtr"), ArgumentError, "'filtr'", "Closest: filter"),
    bad("granularity: empty", Net, lambda m: Sparsifier(m, ""), ArgumentError, "''", "Known:"),
    bad("granularity: a number", Net, lambda m: Sparsifier(m, 2), ArgumentError, "granularity 2", "'filter'"),
    bad("granularity: None", Net, lambda m: Sparsifier(m, None), ArgumentError, "granularity None", "'filter'"),
    bad(
        "granularity: not of this layer",
        linear,
        lambda m: Sparsifier(m, "kernel", layer_type=nn.Linear),
        TargetError,
        "'0' (Linear)",
        "'kernel'",
        "All that fit: weight, vector, column, row, filter, layer, block_1x4",
    ),
    bad(
        "granularity: an unknown axis", None, lambda _: Granularity("mine", "oz"), ArgumentError, "'mine'", "'z'", "o,"
    ),
    bad("granularity: no letters", None, lambda _: Granularity("mine", 3), ArgumentError, "'mine'", "3", "o, i"),
    # -- context
    bad("context: unknown", Net, lambda m: Sparsifier(m, context="glob"), ArgumentError, "'glob'", "'global'", "'2:4'"),
    bad("context: a number", Net, lambda m: Sparsifier(m, context=24), ArgumentError, "24", "'local'", "'2:4'"),
    bad("context: None", Net, lambda m: Sparsifier(m, context=None), ArgumentError, "None", "'local'", "'2:4'"),
    bad("context: 4:2", conv, lambda m: Sparsifier(m, context="4:2"), ArgumentError, "'4:2'", "at most M"),
    bad("context: 0:4", conv, lambda m: Sparsifier(m, context="0:4"), ArgumentError, "'0:4'", "at least 1"),
    bad("context: 2:4:8", conv, lambda m: Sparsifier(m, context="2:4:8"), ArgumentError, "'2:4:8'", "N:M"),
    bad("context: made by hand", None, lambda _: Context("glob"), ArgumentError, "'glob'", "'local'"),
    bad("context: n:m made by hand", None, lambda _: Context("n:m", 4, 2), ArgumentError, "4:2", "at most M"),
    bad(
        "context: inputs do not divide",
        Net,
        lambda m: Sparsifier(m, context="2:4"),
        TargetError,
        "'conv1'",
        "blocks of 4",
        "exclude=['conv1']",
    ),
    bad(
        "context: units without inputs",
        conv,
        lambda m: Sparsifier(m, "filter", "2:4"),
        TargetError,
        "'0'",
        "1 units along its inputs do not divide into blocks of 4",
        "granularity='weight', or leave it dense with exclude=['0']",
    ),
    bad(
        "context: beyond 2:4",
        conv,
        lambda m: half(m, 75, context="2:4"),
        ArgumentError,
        "got sparsity 75",
        "pass sparsity=50",
    ),
    bad(
        "context: below 2:4",
        conv,
        lambda m: half(m, 40, context="2:4"),
        ArgumentError,
        "got sparsity 40",
        "pass sparsity=50",
    ),
    # -- criteria
    bad("criteria: unknown", Net, lambda m: Sparsifier(m, criteria="movment"), ArgumentError, "'movment'", "movement"),
    bad("criteria: a number", Net, lambda m: Sparsifier(m, criteria=3), ArgumentError, "got 3", "'large_final'"),
    bad("criteria: None", Net, lambda m: Sparsifier(m, criteria=None), ArgumentError, "got None", "'large_final'"),
    bad(
        "criteria: asks for a gradient",
        Net,
        lambda m: Sparsifier(m, criteria=lambda weight, gradients: weight),
        ArgumentError,
        "'gradients'",
        "Closest: gradient",
    ),
    bad("criteria: without data", Net, lambda m: Sparsifier(m, criteria="wanda"), ArgumentError, "'wanda'", "data="),
    bad(
        "criteria: without a loss", Net, lambda m: Sparsifier(m, criteria="snip"), ArgumentError, "'snip'", "loss_func="
    ),
    bad(
        "criteria: data without a loss",
        Net,
        lambda m: Sparsifier(m, criteria="snip", data=BATCH),
        ArgumentError,
        "'snip'",
        "loss_func=(output, target)",
    ),
    # -- data, reduction, normalization
    bad("data: a number", Net, lambda m: Sparsifier(m, data=3), ArgumentError, "data=3", "a loader"),
    bad("data: a string", Net, lambda m: Sparsifier(m, data="train"), ArgumentError, "'train'", "a loader"),
    bad("data: a generator", Net, lambda m: Sparsifier(m, data=iter([BATCH])), ArgumentError, "once only", "a list"),
    bad("data: none, and a loss", Net, lambda m: Sparsifier(m, loss_func=len), ArgumentError, "without data", "data="),
    bad("data: empty", Net, lambda m: half(m, criteria="wanda", data=[]), ArgumentError, "no batch", "at least one"),
    bad(
        "data: no target",
        Net,
        lambda m: half(m, criteria="snip", data=[BATCH[:1]], loss_func=nn.CrossEntropyLoss()),
        ArgumentError,
        "without a target",
        "(input, target)",
    ),
    bad(
        "data: a second loss",
        Net,
        lambda m: Sparsifier(m, data=Calibration(m, BATCH), loss_func=len),
        ArgumentError,
        "one of its own",
        "leave it out",
    ),
    bad("data: numbers", Net, lambda m: half(m, criteria="wanda", data=[1, 2]), ArgumentError, "batch 1", "a tuple"),
    bad(
        "data: of another shape",
        Net,
        lambda m: half(
            m, criteria="taylor", data=[(torch.ones(2, 3, 6, 6), BATCH[1])], loss_func=nn.functional.cross_entropy
        ),
        ArgumentError,
        "(2, 3, 6, 6)",
        "does not run on data",
    ),
    bad(
        "data: of another shape, for activations",
        Net,
        lambda m: half(m, criteria="wanda", data=torch.ones(2, 1, 3, 3)),
        ArgumentError,
        "(2, 1, 3, 3)",
        "does not run on data",
    ),
    bad(
        "data: targets of another number",
        Net,
        lambda m: half(
            m, criteria="taylor", data=[(BATCH[0], torch.zeros(3).long())], loss_func=nn.functional.cross_entropy
        ),
        ArgumentError,
        "target of shape (3,)",
        "targets that it takes",
    ),
    bad(
        "data: a loss without a gradient",
        Net,
        lambda m: half(m, criteria="taylor", data=[BATCH], loss_func=lambda out, y: (out.detach() - y).sum()),
        ArgumentError,
        "without a gradient",
        ".detach()",
    ),
    bad("data: a loss that is none", Net, lambda m: Calibration(m, BATCH, 3), ArgumentError, "loss_func=3", "CrossEnt"),
    bad("data: for no network", Net, lambda m: Calibration(3, BATCH), ArgumentError, "int", "torch.nn.Module"),
    bad(
        "data: a loss of several numbers",
        Net,
        lambda m: half(m, criteria="snip", data=BATCH, loss_func=nn.CrossEntropyLoss(reduction="none")),
        ArgumentError,
        "shape (2,)",
        ".mean()",
    ),
    bad(
        "data: nan",
        Net,
        lambda m: half(m, criteria="wanda", data=BATCH[0] * math.nan),
        TargetError,
        "'conv1'",
        "nan or infinity",
        "exclude=['conv1']",
    ),
    bad("reduction: unknown", Net, lambda m: Sparsifier(m, reduction="maen"), ArgumentError, "'maen'", "mean"),
    bad("reduction: None", Net, lambda m: Sparsifier(m, reduction=None), ArgumentError, "reduction=None", "l2"),
    bad("normalization: unknown", Net, lambda m: Sparsifier(m, normalization="lam"), ArgumentError, "'lam'", "lamp"),
    bad("normalization: 3", Net, lambda m: Sparsifier(m, normalization=3), ArgumentError, "normalization=3", "lamp"),
    bad(
        "iterations: 0",
        Net,
        lambda m: Sparsifier(m).sparsify_model(50, iterations=0),
        ArgumentError,
        "iterations=0",
        "1",
    ),
    bad(
        "context: shares that do not add up",
        Net,
        lambda m: half(m, context=Context("local", densities=lambda fraction, shapes: [1, 2])),
        ArgumentError,
        "[1, 2]",
        "sum to 324",
    ),
    bad(
        "context: uniform_plus too sparse",
        Net,
        lambda m: half(m, 95, context="uniform_plus", layer_type=(nn.Conv2d, nn.Linear)),
        ArgumentError,
        "'uniform_plus'",
        "at most",
        "'erk'",
    ),
    bad("criteria: no parameter", Net, lambda m: Sparsifier(m, criteria=lambda: 0), ArgumentError, "no argument"),
    bad(
        "criteria: gives one number",
        Net,
        lambda m: half(m, criteria=lambda w: w.abs().mean()),
        ArgumentError,
        "shape ()",
        "(8, 1, 3, 3)",
        "one score a weight",
    ),
    bad(
        "criteria: gives scores of filters",
        Net,
        lambda m: half(m, criteria=lambda w: w.flatten(1).norm(dim=1)),
        ArgumentError,
        "shape (8,)",
        "(8, 1, 3, 3)",
        "one score a weight",
    ),
    bad(
        "criteria: gives no tensor",
        Net,
        lambda m: half(m, criteria=lambda w: w.tolist()[0][0][0][0]),
        ArgumentError,
        "custom",
        "one score a weight",
    ),
    bad("criteria: gives nothing", Net, lambda m: half(m, criteria=lambda w: None), ArgumentError, "gives None", "one"),
    bad(
        "criteria: gives complex scores",
        Net,
        lambda m: half(m, criteria=lambda w: w + 1j),
        ArgumentError,
        "torch.complex64",
        "real",
    ),
    bad(
        "criteria: gives nan",
        Net,
        lambda m: half(m, criteria=lambda w: w / 0 * 0),
        ArgumentError,
        "'custom'",
        "nan",
        "criterion's own arithmetic",
    ),
    bad(
        "criteria: gives nan here and there",
        Net,
        lambda m: half(m, 10, criteria=lambda w: w.log()),
        ArgumentError,
        "'custom'",
        "nan",
        "criterion's own arithmetic",
    ),
    bad(
        "criteria: gives nan, 2:4",
        conv,
        lambda m: half(m, 50, context="2:4", criteria=lambda w: w.log()),
        ArgumentError,
        "'custom'",
        "nan",
        "criterion's own arithmetic",
    ),
    bad(
        "criteria: writes into the weight, and gives nan",
        Net,
        lambda m: half(m, criteria=lambda w: w.log_()),
        ArgumentError,
        "'custom'",
        "nan",
    ),
    bad(
        "criteria: promises to be elementwise, and gives nan",
        Net,
        lambda m: half(m, criteria=Criterion(lambda w: w / 0 * 0, elementwise=True)),
        ArgumentError,
        "nan",
        "criterion's own arithmetic",
    ),
    bad(
        "criteria: promises to be elementwise, and gives nan here and there, 2:4",
        conv,
        lambda m: half(m, 50, context="2:4", criteria=Criterion(lambda w: w.log(), elementwise=True)),
        ArgumentError,
        "'0'",
        "nan",
        "criterion's own arithmetic",
    ),
    bad(
        "normalization: gives nan",
        Net,
        lambda m: half(m, context="global", normalization=lambda scores: scores / 0 * 0),
        ArgumentError,
        "'conv1'",
        "nan",
        "normalization",
    ),
    bad(
        "normalization: gives one number",
        Net,
        lambda m: half(m, context="global", normalization=lambda scores: scores.sum()),
        ArgumentError,
        "shape ()",
        "one score a unit",
    ),
    bad(
        "normalization: gives nothing",
        Net,
        lambda m: half(m, context="global", normalization=lambda scores: None),
        ArgumentError,
        "None",
        "one score a unit",
    ),
    bad(
        "reduction: gives one number",
        Net,
        lambda m: half(m, granularity="filter", reduction=lambda scores, dims: scores.sum()),
        ArgumentError,
        "shape ()",
        "one score a unit",
    ),
    bad(
        "context: densities that are no whole numbers",
        Net,
        lambda m: half(m, context=Context("local", densities=lambda fraction, shapes: [s.units / 2 for s in shapes])),
        ArgumentError,
        ".0",
        "whole numbers",
    ),
    bad(
        "criteria: fails at the second layer",
        Net,
        lambda m: half(m, criteria=lambda w: w if w.shape[1] == 1 else w[0]),
        ArgumentError,
        "(8, 8, 3, 3)",
        "one score a weight",
    ),
    bad(
        "criteria: registered a bare function",
        None,
        lambda _: CRITERIA.register("bare", lambda w: w),
        ArgumentError,
        "Criterion",
    ),
    bad("criteria: a name that is taken", None, lambda _: CRITERIA.register("random", 0), ArgumentError, "'random'"),
    bad(
        "criteria: a name that is none", None, lambda _: CRITERIA.register("a b", 0), ArgumentError, "'a b'", "letters"
    ),
    bad("criteria: made of nothing", None, lambda _: Criterion("large_final"), ArgumentError, "'large_final'", "func"),
    bad("criteria: a number for a name", None, lambda _: CRITERIA.register(3, 0), ArgumentError, "3"),
    # -- sparsity
    bad("sparsity: -1", Net, lambda m: half(m, -1), ArgumentError, "sparsity -1", "percentage", "[0, 100]"),
    bad("sparsity: 101", Net, lambda m: half(m, 101), ArgumentError, "sparsity 101", "percentage", "[0, 100]"),
    bad("sparsity: nan", Net, lambda m: half(m, math.nan), ArgumentError, "sparsity nan", "percentage"),
    bad("sparsity: inf", Net, lambda m: half(m, math.inf), ArgumentError, "sparsity inf", "percentage"),
    bad("sparsity: beyond floats", Net, lambda m: half(m, 10**400), ArgumentError, "sparsity 1000", "[0, 100]"),
    bad("sparsity: a string", Net, lambda m: half(m, "50"), ArgumentError, "sparsity '50'", "percentage"),
    bad("sparsity: bytes", Net, lambda m: half(m, b"50"), ArgumentError, "sparsity b'50'", "percentage"),
    bad("sparsity: True", Net, lambda m: half(m, True), ArgumentError, "sparsity True", "percentage"),
    bad("sparsity: None", Net, lambda m: half(m, None), ArgumentError, "sparsity None", "percentage"),
    bad("sparsity: a list", Net, lambda m: half(m, [50]), ArgumentError, "sparsity [50]", "percentage"),
    bad("sparsity: a tensor of two", Net, lambda m: half(m, torch.ones(2)), ArgumentError, "tensor([1., 1.])", "perc"),
    bad("sparsity: a complex number", Net, lambda m: half(m, 50j), ArgumentError, "sparsity 50j", "percentage"),
    bad("sparsity: an empty dict", Net, lambda m: half(m, {}), ArgumentError, "empty dict", "layer name → percentage"),
    bad("sparsity: an unknown layer", Net, lambda m: half(m, {"conv3": 5}), TargetError, "'conv3'", "Closest: conv"),
    bad("sparsity: a part of a name", Net, lambda m: half(m, {"conv": 5}), TargetError, "'conv'", "Closest: conv"),
    bad("sparsity: another type", Net, lambda m: half(m, {"head": 5}), TargetError, "'head'", "Linear", "layer_type=("),
    bad("sparsity: a number for a name", Net, lambda m: half(m, {0: 50}), ArgumentError, "layer name 0", "no string"),
    bad(
        "sparsity: patterns that conflict",
        Net,
        lambda m: half(m, {"conv*": 30, "*2": 40}),
        ArgumentError,
        "'conv2'",
        "'conv*' (30 %)",
        "'*2' (40 %)",
        "narrow a pattern",
    ),
    bad(
        "sparsity: a dict, global",
        Net,
        lambda m: half(m, {"conv1": 50}, context="global"),
        ArgumentError,
        "global",
        "dict",
        "add '*'",
        "context='local'",
    ),
    bad("sparsity: out of range in a dict", Net, lambda m: half(m, {"conv1": 50, "conv2": 101}), ArgumentError, "101"),
    bad("sparsity: negative in a dict", Net, lambda m: half(m, {"conv*": -0.5}), ArgumentError, "-0.5", "percentage"),
    bad("sparsity: None in a dict", Net, lambda m: half(m, {"conv1": None}), ArgumentError, "None", "percentage"),
    bad("sparsity: a dict in a dict", Net, lambda m: half(m, {"conv1": {}}), ArgumentError, "{}", "percentage"),
    # -- round_to
    bad("round_to: 0", Net, lambda m: half(m, 50, 0), ArgumentError, "round_to=0", "positive integer", "None"),
    bad("round_to: -1", Net, lambda m: half(m, 50, -1), ArgumentError, "round_to=-1", "positive integer", "None"),
    bad("round_to: 2.5", Net, lambda m: half(m, 50, 2.5), ArgumentError, "round_to=2.5", "positive integer", "None"),
    bad("round_to: True", Net, lambda m: half(m, 50, True), ArgumentError, "round_to=True", "positive integer", "None"),
    bad("round_to: a string", Net, lambda m: half(m, 50, "8"), ArgumentError, "round_to='8'", "positive integer"),
    bad("round_to: in a pattern", conv, lambda m: half(m, 50, 4, context="2:4"), ArgumentError, "2:4", "round_to=None"),
    bad(
        "round_to: larger than every layer",
        Net,
        lambda m: half(m, 50, 9, granularity="filter"),
        ArgumentError,
        "round_to=9",
        "8 units",
        "use at most 8",
    ),
    # -- sparsify_layer
    bad("layer: unknown", Net, lambda m: Sparsifier(m).sparsify_layer("conv3", 50), TargetError, "'conv3'", "Closest"),
    bad("layer: another type", Net, lambda m: Sparsifier(m).sparsify_layer(m.head, 50), TargetError, "Linear", "conv1"),
    bad("layer: foreign", Net, lambda m: Sparsifier(m).sparsify_layer(nn.Conv2d(1, 2, 3), 50), TargetError, "conv1, c"),
    bad("layer: no weight", Net, lambda m: Sparsifier(m).sparsify_layer(m.flat, 50), TargetError, "Flatten", "conv1"),
    bad("layer: a number", Net, lambda m: Sparsifier(m).sparsify_layer(0, 50), TargetError, "layer 0", "conv1, conv2"),
    bad(
        "layer: global",
        Net,
        lambda m: Sparsifier(m, context="global").sparsify_layer("conv1", 50),
        ArgumentError,
        "global",
        "context='local'",
    ),
    # -- schedules
    bad("schedule: unknown", Net, lambda m: run(m, schedule="onecycle"), ArgumentError, "'onecycle'", "one_cycle"),
    bad("schedule: a number", Net, lambda m: run(m, schedule=0.5), ArgumentError, "got 0.5", "'one_cycle'"),
    bad("schedule: a factory", Net, lambda m: run(m, schedule=SchedCos), ArgumentError, "SchedCos(0, 1)"),
    bad("schedule: in percent", Net, lambda m: run(m, schedule=SchedCos(0, 50)), ArgumentError, "from 0 to 1"),
    bad("schedule: above 1", Net, lambda m: run(m, schedule=lambda p: 1.5 * p), ArgumentError, "gives 1.", "0 to 1"),
    bad("schedule: below 0", Net, lambda m: run(m, schedule=lambda p: -p), ArgumentError, "gives -0.01", "0 to 1"),
    bad("schedule: nan", Net, lambda m: run(m, schedule=lambda p: math.nan), ArgumentError, "gives nan", "0 to 1"),
    bad("schedule: a string", Net, lambda m: run(m, schedule=lambda p: "0.5"), ArgumentError, "'0.5'", "one number"),
    bad("schedule: a word", Net, lambda m: run(m, schedule=lambda p: "half"), ArgumentError, "'half'", "one number"),
    bad("schedule: nothing", Net, lambda m: run(m, schedule=lambda p: None), ArgumentError, "None", "one number"),
    bad("schedule: two numbers", Net, lambda m: run(m, schedule=lambda p: [0, p]), ArgumentError, "[0, ", "one number"),
    bad("schedule: raises", Net, lambda m: run(m, schedule=fails), ArgumentError, "'fails'", "KeyError", "'mine'", "0"),
    bad("schedule: two parameters", Net, lambda m: run(m, schedule=lambda a, b: a), ArgumentError, "2 arguments"),
    bad("schedule: end before start", None, lambda _: lin.between(0.6, 0.5), ArgumentError, "0.6", "0.5", "length"),
    bad("schedule: end at start", None, lambda _: Schedule(cos, 0.5, 0.5), ArgumentError, "0.5", "no length"),
    bad("schedule: starts before 0", None, lambda _: lin.between(-0.1, 1), ArgumentError, "start_pct=-0.1", "0 to 1"),
    bad("schedule: ends after 1", None, lambda _: lin.between(0, 100), ArgumentError, "end_pct=100", "0 to 1"),
    bad("schedule: starts at nan", None, lambda _: lin.between(math.nan, 1), ArgumentError, "start_pct=nan", "0 to 1"),
    bad("schedule: starts at True", None, lambda _: lin.between(True, 1), ArgumentError, "start_pct=True", "0 to 1"),
    bad("schedule: starts at a string", None, lambda _: lin.between("0", 1), ArgumentError, "start_pct='0'", "0 to 1"),
    # -- runs
    bad("run: a model", Net, lambda m: SparseTraining(m, None, 50), ArgumentError, "got Net", "Sparsifier(model)"),
    bad("run: total_steps 0", Net, lambda m: run(m, total_steps=0), ArgumentError, "total_steps=0", "epochs × len"),
    bad("run: total_steps -1", Net, lambda m: run(m, total_steps=-1), ArgumentError, "total_steps=-1", "epochs × len"),
    bad("run: total_steps 1.5", Net, lambda m: run(m, total_steps=1.5), ArgumentError, "total_steps=1.5", "epochs × "),
    bad("run: restarted for 0", Net, lambda m: run(m).restart(0), ArgumentError, "total_steps=0", "epochs × len"),
    bad("run: sparsity 101", Net, lambda m: run(m, 101), ArgumentError, "sparsity 101", "percentage"),
    bad("run: an unknown layer", Net, lambda m: run(m, {"conv3": 50}), TargetError, "'conv3'", "Closest: conv"),
    bad("run: round_to 2.5", Net, lambda m: run(m, round_to=2.5), ArgumentError, "round_to=2.5", "positive integer"),
    bad("run: optimizer by name", Net, lambda m: run(m, optimizer="adam"), ArgumentError, "'adam'", "optim"),
    bad(
        "run: parameters for an optimizer",
        Net,
        lambda m: run(m, optimizer=m.parameters()),
        ArgumentError,
        "generator",
        "optim",
    ),
    bad("run: no total_steps", Net, lambda m: run(m, total_steps=None).step(), StateError, "total_steps", "position"),
    bad("run: beyond the end", Net, lambda m: run(m).step(1.5), ArgumentError, "1.5", "[0, 1]"),
    bad("run: before the start", Net, lambda m: run(m).move_to(-1), ArgumentError, "-1", "[0, 1]"),
    bad("run: at nan", Net, lambda m: run(m).step(math.nan), ArgumentError, "nan", "[0, 1]"),
    bad("run: at a word", Net, lambda m: run(m).step("half"), ArgumentError, "'half'", "[0, 1]"),
    # -- states of runs
    bad("state: newer", Net, lambda m: run(m).load_state_dict(state(version=99)), FileError, "99", "reads version 1"),
    bad("state: empty", Net, lambda m: run(m).load_state_dict({}), FileError, "None", "reads version 1"),
    bad("state: the model's", Net, lambda m: run(m).load_state_dict(m.state_dict()), FileError, "None", "version 1"),
    bad("state: no dict", Net, lambda m: run(m).load_state_dict("garbage"), FileError, "garbage"),
    bad("state: of parts", Net, lambda m: run(m).load_state_dict({"version": 1}), FileError, "'steps_done'"),
    bad("state: no dict of masks", Net, lambda m: Sparsifier(m).load_state_dict(3), FileError, "3"),
    bad("state: rules of garbage", Net, lambda m: run(m).load_state_dict(state(rules=3)), FileError, "rules"),
    bad("state: masks of garbage", Net, lambda m: run(m).load_state_dict(state(tensors=3)), FileError, "3"),
    bad("state: no masks", Net, lambda m: run(m).load_state_dict(state(tensors={})), FileError, "'conv1'"),
    bad(
        "state: a list for a mask",
        Net,
        lambda m: run(m).load_state_dict(state(tensors={"mask/conv1": [1], "mask/conv2": [1]})),
        FileError,
        "conv1",
    ),
    bad("state: no position", Net, lambda m: run(m).load_state_dict(state(progress="x")), FileError, "'x'"),
    bad("state: half a step", Net, lambda m: run(m).load_state_dict(state(steps_done=1.5)), FileError, "1.5"),
    bad("state: progress 2", Net, lambda m: run(m).load_state_dict(state(progress=2.0)), FileError, "2.0"),
    bad(
        "state: other rules",
        Net,
        lambda m: run(m, schedule="cos").load_state_dict(state()),
        FileError,
        "'lin' there and 'cos' here",
        "as that one was",
    ),
    bad("state: another network", conv, lambda m: run(m).load_state_dict(state()), FileError, "sparsity", "'conv1'"),
    bad(
        "state: another width",
        lambda: Net(width=16),
        lambda m: run(m).load_state_dict(state()),
        FileError,
        "'conv1'",
        "(16, 1, 3, 3)",
    ),
    bad(
        "state: as many weights in another shape",
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3)),
        lambda m: run(m).load_state_dict(run(nn.Sequential(nn.Conv2d(8, 4, 3))).state_dict()),
        FileError,
        "(8, 4, 3, 3)",
    ),
    # -- lottery tickets
    bad("lottery: of a sparsifier", Net, lambda m: Lottery(Sparsifier(m)), ArgumentError, "Sparsifier"),
    bad("lottery: nothing to rewind to", Net, lambda m: Lottery(run(m)).rewind(), StateError, "snapshot()"),
    bad("lottery: no ticket yet", Net, lambda m: Lottery(run(m)).ticket(), StateError, "snapshot()"),
    bad("ticket: another network", conv, lambda m: a_ticket().apply_to(m), FileError, "another network", "'0."),
    bad(
        "ticket: another width",
        lambda: Net(16),
        lambda m: a_ticket().apply_to(m),
        FileError,
        "(8, 1, 3, 3) there",
        "(16, 1, 3, 3) here",
    ),
    bad("ticket: of nothing", Net, lambda m: Ticket({}, {}).apply_to(m), FileError, "'conv1.bias'", "another network"),
    bad("ticket: to a path", None, lambda _: a_ticket().apply_to("net"), ArgumentError, "'net'", "Module"),
    bad(
        "ticket: to a lazy network",
        lambda: nn.Sequential(nn.LazyConv2d(4, 3)),
        lambda m: Ticket(m.state_dict(), {}).apply_to(m),
        FileError,
        "lazy",
    ),
    bad("ticket: no masks", None, lambda _: Ticket({}, {}).sparsity, ArgumentError, "mask"),
    bad(
        "ticket: a mask without a weight",
        None,
        lambda _: Ticket({}, {"conv1": torch.ones(2, dtype=torch.bool)}).save("x"),
        GossamerError,
        "'conv1'",
    ),
    # -- files
    bad(
        "file: missing", None, lambda _: load_ticket("nowhere.safetensors"), FileError, "no file 'nowhere.safetensors'"
    ),
    bad("file: a folder", None, lambda _: load_ticket("."), FileError, "'.'", "folder", "file in it"),
    bad("file: a number", None, lambda _: load_ticket(3), ArgumentError, "3", "path"),
    bad("file: None", None, lambda _: load_ticket(None), ArgumentError, "None", "path"),
    bad("file: with a null", None, lambda _: load_ticket("a\0b"), FileError, "no file 'a\\x00b'"),
    bad("file: empty", None, lambda _: load_ticket(written(b"")), FileError, "'file'", "truncated", "another copy"),
    bad(
        "file: text", None, lambda _: load_ticket(written(b"Dear all,\n")), FileError, "'file'", "another kind", "copy"
    ),
    bad(
        "file: truncated",
        None,
        lambda _: load_ticket(written(Path(ticket_file()).read_bytes()[:-1])),
        FileError,
        "'file'",
        "truncated",
        "another copy",
    ),
    bad(
        "file: with something behind it",
        None,
        lambda _: load_ticket(written(Path(ticket_file()).read_bytes() + b"\0")),
        FileError,
        "'file'",
        "another copy",
    ),
    bad(
        "file: foreign",
        None,
        lambda _: load_ticket(save_tensors("foreign", Net().state_dict(), {"format": "pt"})),
        FileError,
        "'foreign'",
        "no ticket",
        "Ticket.save",
    ),
    bad(
        "file: newer", None, lambda _: load_ticket(ticket_file(version="2")), FileError, "version 2", "install a newer"
    ),
    bad("file: epoch", None, lambda _: load_ticket(ticket_file(epoch="x")), FileError, "'x'", "no number", "copy"),
    bad(
        "file: a mask without its weight",
        None,
        lambda _: load_ticket(ticket_file({"weight/conv1.weight": None})),
        FileError,
        "'conv1'",
        "no weight",
        "another copy",
    ),
    bad(
        "file: a mask of another size",
        None,
        lambda _: load_ticket(ticket_file({"mask/conv1": torch.ones(8, dtype=torch.uint8)})),
        FileError,
        "'conv1'",
        "8 bytes",
        "(8, 1, 3, 3) takes 9",
    ),
    bad(
        "file: a mask of another dtype",
        None,
        lambda _: load_ticket(ticket_file({"mask/conv1": torch.ones(9)})),
        FileError,
        "'conv1'",
        "torch.float32",
        "torch.uint8",
    ),
    bad(
        "file: weights under the masks",
        None,
        lambda _: load_ticket(ticket_file({"mask/conv1": torch.zeros(9, dtype=torch.uint8)})),
        FileError,
        "'conv1'",
        "another copy",
    ),
    bad(
        "file: no masks",
        None,
        lambda _: load_ticket(ticket_file({"mask/conv1": None})),
        FileError,
        "mask",
        "another copy",
    ),
    bad("file: a ticket of another network", conv, lambda m: load_ticket(ticket_file()).apply_to(m), FileError, "'0."),
    # -- fastai, where it is made
    bad("fastai: sparsity 101", None, lambda _: SparsifyCallback(101), ArgumentError, "sparsity 101", "percentage"),
    bad("fastai: sparsity '50'", None, lambda _: SparsifyCallback("50"), ArgumentError, "'50'", "percentage"),
    bad("fastai: sparsity True", None, lambda _: SparsifyCallback(True), ArgumentError, "True", "percentage"),
    bad("fastai: sparsity None", None, lambda _: SparsifyCallback(None), ArgumentError, "None", "percentage"),
    bad("fastai: an empty dict", None, lambda _: SparsifyCallback({}), ArgumentError, "empty dict"),
    bad("fastai: a dict's value", None, lambda _: SparsifyCallback({"conv1": 101}), ArgumentError, "101", "percentage"),
    bad("fastai: a dict's name", None, lambda _: SparsifyCallback({0: 50}), ArgumentError, "name 0"),
    bad(
        "fastai: a dict, global", None, lambda _: SparsifyCallback({"a": 5}, "weight", "global"), ArgumentError, "local"
    ),
    bad("fastai: granularity", None, lambda _: SparsifyCallback(50, "filtr"), ArgumentError, "'filtr'", "filter"),
    bad("fastai: context", None, lambda _: SparsifyCallback(50, context="4:2"), ArgumentError, "'4:2'", "at most M"),
    bad("fastai: beyond 2:4", None, lambda _: SparsifyCallback(75, context="2:4"), ArgumentError, "75", "sparsity=50"),
    bad("fastai: criteria", None, lambda _: SparsifyCallback(50, criteria="rand"), ArgumentError, "'rand'", "random"),
    bad("fastai: schedule", None, lambda _: SparsifyCallback(50, schedule="cosine"), ArgumentError, "'cosine'", "cos"),
    bad("fastai: schedule raises", None, lambda _: SparsifyCallback(50, schedule=fails), ArgumentError, "KeyError"),
    bad("fastai: round_to", None, lambda _: SparsifyCallback(50, round_to=2.5), ArgumentError, "round_to=2.5", "None"),
    bad("fastai: layer_type", None, lambda _: SparsifyCallback(50, layer_type="Linear"), ArgumentError, "nn.Linear"),
    bad("fastai: exclude", None, lambda _: SparsifyCallback(50, exclude=3), ArgumentError, "exclude"),
    bad("fastai: no model", None, lambda _: SparsifyCallback(50, model="body"), ArgumentError, "str", "nn.Module"),
    bad("fastai: a layer of model", Net, lambda m: SparsifyCallback({"c": 5}, model=m), TargetError, "'c'", "Known"),
    bad(
        "fastai: exclude of model", Net, lambda m: SparsifyCallback(5, model=m, exclude="c"), TargetError, "'c'", "Kno"
    ),
    bad(
        "fastai: nan in model", weighing(math.nan), lambda m: SparsifyCallback(50, model=m), TargetError, "'conv2'", "n"
    ),
    bad(
        "fastai: rewind -1", None, lambda _: SparsifyCallback(50, lth=True, rewind_epoch=-1), ArgumentError, "=-1", "0"
    ),
    bad(
        "fastai: rewind True", None, lambda _: SparsifyCallback(50, lth=True, rewind_epoch=True), ArgumentError, "True"
    ),
    bad("fastai: rewind 1.5", None, lambda _: SparsifyCallback(50, lth=True, rewind_epoch=1.5), ArgumentError, "=1.5"),
    bad("fastai: rewind alone", None, lambda _: SparsifyCallback(50, rewind_epoch=1), ArgumentError, "=1", "lth=True"),
    bad("fastai: ticket_dir", None, lambda _: SparsifyCallback(50, ticket_dir=3), ArgumentError, "3"),
    bad("fastai: no report yet", None, lambda _: SparsifyCallback(50).report(), StateError, "has not been in a fit"),
    bad("fastai: nothing to release", None, lambda _: SparsifyCallback(50).release(), StateError, "not been in a fit"),
    bad("fastai: total_epochs 0", None, lambda _: SparsifyCallback(5, total_epochs=0), ArgumentError, "total_epochs=0"),
    bad("fastai: every batch", None, lambda _: SparsifyCallback(5, every="batch"), ArgumentError, "'batch'", "every=5"),
    bad("fastai: resume nothing", None, lambda _: SparsifyCallback(5, resume=True), ArgumentError, "checkpoint='run."),
    bad("fastai: checkpoint", None, lambda _: SparsifyCallback(5, checkpoint=3), ArgumentError, "3"),
    # -- fastai, before the first batch of a fit
    bad("fit: an unknown layer", Net, lambda m: fit(m, SparsifyCallback({"c": 5})), TargetError, "'c'", "Known: conv1"),
    bad(
        "fit: another type", Net, lambda m: fit(m, SparsifyCallback({"head": 5})), TargetError, "'head'", "layer_type=("
    ),
    bad(
        "fit: conflicting patterns",
        Net,
        lambda m: fit(m, SparsifyCallback({"c*": 5, "*2": 6})),
        ArgumentError,
        "'conv2'",
        "narrow",
    ),
    bad("fit: exclude", Net, lambda m: fit(m, SparsifyCallback(5, exclude="x")), TargetError, "'x'", "Known: conv1"),
    bad("fit: 2:4", Net, lambda m: fit(m, SparsifyCallback(50, context="2:4")), TargetError, "exclude=['conv1']"),
    bad(
        "fit: layer_type", Net, lambda m: fit(m, SparsifyCallback(5, layer_type=nn.Conv1d)), TargetError, "Conv2d, Lin"
    ),
    bad("fit: round_to", Net, lambda m: fit(m, SparsifyCallback(5, "filter", round_to=9)), ArgumentError, "at most 8"),
    bad("fit: nan", weighing(math.nan), lambda m: fit(m, SparsifyCallback(5)), TargetError, "'conv2'", "checkpoint"),
    bad("fit: infinite", weighing(-math.inf), lambda m: fit(m, SparsifyCallback(5)), TargetError, "'conv2'", "checkpo"),
    bad(
        "fit: model of another", Net, lambda m: fit(m, SparsifyCallback(5, model=Net())), ArgumentError, "learn.model["
    ),
    bad(
        "fit: rewind beyond it",
        Net,
        lambda m: fit(m, SparsifyCallback(5, lth=True, rewind_epoch=2)),
        ArgumentError,
        "rewind_epoch=2",
        "2 epochs, which count from 0",
    ),
    bad(
        "fit: rewind after the start",
        Net,
        lambda m: fit(m, SparsifyCallback(5, schedule="cos", lth=True, rewind_epoch=1)),
        ArgumentError,
        "rewind_epoch=1 of 2",
        "schedule=cos.between(0.5, 1)",
    ),
    bad(
        "fit: rewind to before it",
        Net,
        lambda m: fit(m, SparsifyCallback(5, schedule="cos", lth=True), start_epoch=1),
        StateError,
        "epoch 0",
        "rewind_epoch=1",
    ),
]


def saved(model: nn.Module) -> bytes:
    """Everything that the model would save, to the bit."""
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(("make", "call", "error", "words"), CALLS)
def test_a_bad_call_says_what_is_bad_and_leaves_the_model_as_it_was(
    make: Callable[[], nn.Module] | None,
    call: Callable[[Any], Any],
    error: type[GossamerError],
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CRITERIA, "_entries", dict(CRITERIA))  # what a row registers goes with it
    model = make() if make is not None else nn.Identity()
    before = saved(model), plain.surface(model)
    with pytest.raises(error) as caught:
        call(model)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
    assert (saved(model), plain.surface(model)) == before


@pytest.mark.parametrize("sparsity", [0.5, {"conv1": 0.25, "conv2": 0.5}])
def test_a_fraction_given_for_a_percentage_is_warned_about(sparsity: Any):
    with pytest.warns(GossamerWarning, match="it is a percentage, so 50 means half"):
        Sparsifier(Net()).sparsify_model(sparsity)
    with pytest.warns(GossamerWarning, match="it is a percentage, so 50 means half"):
        Pruner(Net(), sparsity, example_inputs=BATCH[0])
    with pytest.warns(GossamerWarning, match="it is a percentage, so 50 means half"):
        SparsifyCallback(sparsity)
