"""What can be learnt of weights from data? Gradients, curvature and flow of a loss, and what layers are given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from gossamer.calibration import Calibration, n_ranks, over_ranks, undisturbed
from gossamer.errors import ArgumentError, TargetError
from gossamer.evidence import widen
from gossamer.layer_inputs import input_statistics
from gossamer.rules.criteria import OF_LOSS
from gossamer.targets import Target, unwrapped

Gathered = dict[str, Tensor]
"""Layer name → tensor of its weight's shape, float32 or wider."""


def gather(calibration: Calibration, targets: Sequence[Target], kinds: Collection[str]) -> dict[str, Gathered]:
    """Evidence of data, for all layers at once.

    Args:
        calibration: the data and the network.
        targets: the layers.
        kinds: out of `rules.criteria.OF_DATA`.

    Returns:
        Kind → layer name → tensor of the weight's shape.

    Raises:
        ArgumentError: data or a loss that cannot be used.
        TargetError: the data does not reach a layer, or gives it nan.

    Example:
        >>> from gossamer.targets import find_targets
        >>> net = nn.Linear(2, 1, bias=False)
        >>> data = Calibration(net, torch.tensor([[3.0, 0.0], [4.0, 1.0]]))
        >>> gather(data, find_targets(net, nn.Linear), ["input_norm"])["input_norm"][""]
        tensor([[5., 1.]])
    """
    found: dict[str, Gathered] = {}
    ways: dict[str, Callable[[Calibration, Sequence[Target]], Gathered]] = {
        "gradient": gradients,
        "gradient_squared": squared_gradients,
        "hessian_gradient": hessian_gradients,
        "flow": flows,
        "input_norm": partial(input_statistics, kind="input_norm"),
        "input_mean": partial(input_statistics, kind="input_mean"),
        "input_max": partial(input_statistics, kind="input_max"),
    }
    for kind in kinds:
        if kind in OF_LOSS and calibration.loss_func is None:
            raise ArgumentError(f"the criterion looks at the {kind} of a loss; give loss_func=(output, target) → loss")
        with torch.inference_mode(False):  # whose tensors have no gradients
            found[kind] = ways[kind](calibration, targets)
        for name, tensor in found[kind].items():
            if not bool(torch.isfinite(tensor).all()):
                raise TargetError(
                    f"layer {name!r} gets nan or infinity for its {kind} from the data; check the data and the loss, "
                    f"or leave it out with exclude=[{name!r}]"
                )
    return found


def gradients(calibration: Calibration, targets: Sequence[Target]) -> Gathered:
    """∂L/∂w, the mean over the batches.

    Args:
        calibration: the data, the network and the loss.
        targets: the layers.

    Raises:
        TargetError: a layer has no part in the loss.

    Example:
        >>> from gossamer.targets import find_targets
        >>> net = nn.Linear(1, 1, bias=False); _ = nn.init.ones_(net.weight)
        >>> data = Calibration(net, (torch.ones(4, 1), torch.zeros(4, 1)), nn.MSELoss())
        >>> gradients(data, find_targets(net, nn.Linear))
        {'': tensor([[2.]])}
    """
    return _mean_gradients(calibration, targets, lambda batch: [batch], lambda g: g, evaluate=False)


def squared_gradients(calibration: Calibration, targets: Sequence[Target]) -> Gathered:
    """(∂L/∂w)², the mean over the single samples: the diagonal of the empirical Fisher matrix.

    Args:
        calibration: the data, the network and the loss.
        targets: the layers.

    Raises:
        TargetError: a layer has no part in the loss.
    """
    return _mean_gradients(calibration, targets, _samples, torch.square, evaluate=True)


def _mean_gradients(
    calibration: Calibration,
    targets: Sequence[Target],
    parts: Callable[[Any], Iterable[Any]],
    of: Callable[[Tensor], Tensor],
    *,
    evaluate: bool,
) -> Gathered:
    """The mean of a function of the gradients, over the parts of all batches."""
    weights = [t.weight for t in targets]
    sums, n = [torch.zeros_like(widen(w.detach())) for w in weights], 0
    with undisturbed(calibration.model, evaluate=evaluate), _wanting_gradients(weights):
        for part in (one for batch in calibration for one in parts(batch)):
            found = torch.autograd.grad(calibration.loss(part), weights, allow_unused=True)
            _add(sums, [of(g) for g in _dense(found, targets)])
            del found  # before those of the next batch are made
            n += 1
    return {t.name: _mean_over_ranks(s.div_(n)) for t, s in zip(targets, sums, strict=True)}


def hessian_gradients(calibration: Calibration, targets: Sequence[Target]) -> Gathered:
    """H·g, with the mean gradient g and the mean Hessian H of the targets' weights over the batches.

    Args:
        calibration: the data, the network and the loss.
        targets: the layers.

    Raises:
        TargetError: a layer has no part in the loss.
    """
    weights = [t.weight for t in targets]
    first = gradients(calibration, targets)
    sums, n = [torch.zeros_like(widen(w.detach())) for w in weights], 0
    # Of all of PyTorch's ways to compute attention only this one has a second derivative.
    with undisturbed(calibration.model, False), _wanting_gradients(weights), sdpa_kernel(SDPBackend.MATH):
        for batch in calibration:
            found = torch.autograd.grad(calibration.loss(batch), weights, create_graph=True, allow_unused=True)
            product = torch.stack(
                [(first[t.name] * g).sum() for t, g in zip(targets, _dense(found, targets), strict=True)]
            )
            if not product.requires_grad:  # a loss of straight lines, whose Hessian is 0
                n += 1
                continue
            second: Any = torch.autograd.grad(product.sum(), weights, allow_unused=True)
            _add(sums, [torch.zeros_like(w) if g is None else g for g, w in zip(second, weights, strict=True)])
            n += 1
    return {t.name: _mean_over_ranks(s.div_(n)) for t, s in zip(targets, sums, strict=True)}


def flows(calibration: Calibration, targets: Sequence[Target]) -> Gathered:
    """∂R/∂|w|, where R sums the outputs for one input of ones and every parameter and buffer is its magnitude.

    In evaluation mode and in float64, since the flow through many layers leaves the range of float32.

    Args:
        calibration: the data, of which only the first input's shape counts, and the network.
        targets: the layers.

    Raises:
        TargetError: no flow reaches a layer.
    """
    model = unwrapped(calibration.model)
    names = {id(p): name for name, p in model.named_parameters()}
    state = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    # MPS has no float64.
    wide = torch.float32 if any(t.device.type == "mps" for t in state.values()) else torch.float64
    state = {name: t.abs().to(wide) if t.is_floating_point() else t for name, t in state.items()}
    mine = [names[id(t.weight)] for t in targets]
    leaves = [state[name].requires_grad_(True) for name in mine]

    def ones(tensor: Tensor) -> Tensor:
        first = tensor[:1] if tensor.ndim else tensor
        return torch.ones_like(first, dtype=wide) if tensor.is_floating_point() else first

    def run(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(model, state, args, kwargs)

    with undisturbed(calibration.model, evaluate=True), torch.enable_grad():
        batch: Any = pytree.tree_map_only(Tensor, ones, next(iter(calibration)))
        tensors = [t for t in pytree.tree_leaves(calibration.output(batch, run)) if isinstance(t, Tensor)]
        total = torch.stack([t.sum() for t in tensors if t.is_floating_point()]).sum()
        found = torch.autograd.grad(total, leaves, allow_unused=True)
    return {t.name: g for t, g in zip(targets, _dense(found, targets), strict=True)}


def _samples(batch: Any) -> Iterator[Any]:
    """The single samples of a batch, each as a batch of one."""
    tensors = [t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor) and t.ndim]
    size = max((len(t) for t in tensors), default=1)
    for i in range(size):
        # What has another length belongs to all samples.
        yield pytree.tree_map_only(Tensor, lambda t: t[i : i + 1] if t.ndim and len(t) == size else t, batch)  # noqa: B023


def _add(sums: list[Tensor], parts: Sequence[Tensor]) -> None:
    with torch.no_grad():
        own = [p.detach().to(s.dtype) for s, p in zip(sums, parts, strict=True)]
        torch._foreach_add_(sums, own)  # pyright: ignore[reportPrivateImportUsage]


def _dense(found: Sequence[Tensor | None], targets: Sequence[Target]) -> list[Tensor]:
    dense: list[Tensor] = []
    for gradient, target in zip(found, targets, strict=True):
        if gradient is None:
            raise TargetError(
                f"layer {target.name!r} has no part in what the network makes of the data, so it has no gradient; "
                f"leave it out with exclude=[{target.name!r}]"
            )
        dense.append(gradient.to_dense() if gradient.layout != torch.strided else gradient)
    return dense


@contextlib.contextmanager
def _wanting_gradients(weights: Sequence[nn.Parameter]) -> Generator[None]:
    frozen = [w for w in weights if not w.requires_grad]
    try:
        for weight in frozen:
            weight.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _mean_over_ranks(tensor: Tensor) -> Tensor:
    """The same on every rank, so that all choose the same masks."""
    return over_ranks(tensor).div_(n_ranks())
