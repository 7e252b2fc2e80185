"""Data for criteria: batches are run through the network, and it is afterwards as it was before.

Nothing stays behind: hooks are taken off, the mode, buffers, gradients and random numbers are put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from gossamer.errors import ArgumentError, TargetError
from gossamer.evidence import widen
from gossamer.randomness import random_state, restore_random_state
from gossamer.rules.criteria import OF_LOSS
from gossamer.targets import Target, unwrapped

Gathered = dict[str, Tensor]
"""Layer name → tensor of its weight's shape, float32 or wider."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Data, and how to run it through a network.

    Args:
        model: the network that is run, all of it.
        batches: an iterable of batches, gone through anew each time, or one batch. A batch is a tuple or list of inputs
            and, last, the target; the inputs alone, or one tensor, will do where there is no loss; or a dict of keyword
            arguments. Inputs that are themselves a tuple are several arguments.
        loss_func: (output, target) → loss; for a dict, (output, dict) → loss. None where no criterion asks for one.

    Raises:
        ArgumentError: no network, no batches, or a loss that cannot be called.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> Calibration(net, (torch.ones(4, 2), torch.ones(4, 1)), nn.MSELoss()).loss_func
        MSELoss()
    """

    model: nn.Module
    batches: Any
    loss_func: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ArgumentError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if isinstance(self.batches, (str, bytes)) or not isinstance(self.batches, (Tensor, Mapping, Iterable)):
            raise ArgumentError(
                f"data={self.batches!r} is no batch and no iterable of batches; give a loader, a list of "
                "(input, target) pairs, or one such pair"
            )
        if isinstance(self.batches, Iterator):
            raise ArgumentError(
                f"data is a {type(self.batches).__name__}, which can be gone through once only; give a list or a loader"
            )
        if self.loss_func is not None and not callable(self.loss_func):
            raise ArgumentError(
                f"loss_func={self.loss_func!r} cannot be called; give (output, target) → loss, such as "
                "nn.CrossEntropyLoss()"
            )

    def __iter__(self) -> Iterator[Any]:
        """The batches, on the network's device."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        several = self.batches
        if isinstance(several, (Tensor, Mapping)) or (
            isinstance(several, (list, tuple)) and any(isinstance(part, Tensor) for part in several)
        ):
            several = [several]
        empty = True
        for batch in several:
            empty = False
            yield pytree.tree_map_only(Tensor, lambda t: t.to(device), batch)
        if empty:
            raise ArgumentError("data has no batch in it; give at least one, in a list or a loader")

    def output(self, batch: Any, call: Callable[..., Any] | None = None) -> Any:
        """What the network makes of a batch's inputs; `call` takes the network's place."""
        args, kwargs = _inputs(batch)
        return (call or unwrapped(self.model))(*args, **kwargs)

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch, a 0-d tensor.

        Raises:
            ArgumentError: the batch has no target, or the loss is no single number.
        """
        assert self.loss_func is not None
        if not isinstance(batch, Mapping) and (isinstance(batch, Tensor) or len(batch) < 2):
            raise ArgumentError("data has batches without a target, which a loss needs; give (input, target) pairs")
        loss: Any = self.loss_func(self.output(batch), batch if isinstance(batch, Mapping) else batch[-1])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ArgumentError(f"loss_func gives {got}, and a criterion needs one number; reduce it with .mean()")
        return loss.reshape(())


def _inputs(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    inputs = tuple(batch[:-1]) if len(batch) > 1 else tuple(batch)
    return (tuple(inputs[0]) if len(inputs) == 1 and isinstance(inputs[0], (tuple, list)) else inputs), {}


@contextlib.contextmanager
def undisturbed(model: nn.Module, evaluate: bool) -> Generator[None]:
    """Lets a network run, and leaves its mode, its buffers and the random numbers as they were.

    Args:
        model: the network.
        evaluate: whether it runs in evaluation mode; else in the mode that it is in.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> with undisturbed(net, evaluate=False):
        ...     _ = net(torch.randn(4, 2))
        >>> net.training, net.running_mean.tolist()
        (True, [0.0, 0.0])
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    random = random_state()
    if evaluate:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        restore_random_state(random)


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
        "input_norm": partial(_input_statistics, kind="input_norm"),
        "input_mean": partial(_input_statistics, kind="input_mean"),
        "input_max": partial(_input_statistics, kind="input_max"),
    }
    for kind in kinds:
        if kind in OF_LOSS and calibration.loss_func is None:
            raise ArgumentError(f"the criterion looks at the {kind} of a loss; give loss_func=(output, target) → loss")
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
            n += 1
    return {t.name: _mean_over_ranks(s / n) for t, s in zip(targets, sums, strict=True)}


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
    return {t.name: _mean_over_ranks(s / n) for t, s in zip(targets, sums, strict=True)}


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


def _mean_over_ranks(tensor: Tensor) -> Tensor:
    """The same on every rank, so that all choose the same masks."""
    return _over_ranks(tensor, maximum=False) / _ranks()


def _over_ranks(tensor: Tensor, maximum: bool) -> Tensor:
    if _ranks() > 1:
        torch.distributed.all_reduce(
            tensor, torch.distributed.ReduceOp.MAX if maximum else torch.distributed.ReduceOp.SUM
        )
    return tensor


def _ranks() -> int:
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


# -- inputs of layers -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watching(modules: Iterable[nn.Module], look: Callable[[nn.Module, Tensor], None]) -> Generator[None]:
    """Shows the inputs of layers to a function while a network runs; the hooks are gone afterwards.

    Args:
        modules: the layers.
        look: gets a layer and its input.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> with watching([net], lambda module, x: print(x.shape)):
        ...     _ = net(torch.ones(3, 2))
        torch.Size([3, 2])
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with torch.no_grad():
            look(module, args[0] if args else kwargs["input"])

    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_statistics(calibration: Calibration, targets: Sequence[Target], kind: str) -> Gathered:
    """A statistic of all inputs that each weight is multiplied with."""
    owners = {id(m): t for t in targets for m in (t.module, *t.shared_with)}
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}

    def look(module: nn.Module, x: Tensor) -> None:
        name = owners[id(module)].name
        found, n = _statistic(module, x, kind)
        if name not in sums:
            sums[name], counts[name] = found, n
        else:
            sums[name] = torch.maximum(sums[name], found) if kind == "input_max" else sums[name] + found
            counts[name] = counts[name] + n

    modules = [m for t in targets for m in (t.module, *t.shared_with)]
    with undisturbed(calibration.model, evaluate=True), torch.no_grad(), watching(modules, look):
        for batch in calibration:
            calibration.output(batch)
    result: Gathered = {}
    for target in targets:
        if target.name not in sums:
            raise TargetError(
                f"layer {target.name!r} is not reached by the data, so nothing is known of its inputs; leave it out "
                f"with exclude=[{target.name!r}]"
            )
        total = _over_ranks(sums[target.name], maximum=kind == "input_max")
        if kind == "input_norm":
            total = total.sqrt()
        elif kind == "input_mean":
            total = total / _over_ranks(counts[target.name], maximum=False)
        result[target.name] = total.expand(target.weight.shape).contiguous()
    return result


def _statistic(module: nn.Module, x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Σx², Σ|x| or max|x| in a shape that expands to the weight's, and how many inputs there were."""

    def reduce(values: Tensor, dims: tuple[int, ...]) -> Tensor:
        values = widen(values)
        if kind == "input_norm":
            return values.square().sum(dims)
        return values.abs().amax(dims) if kind == "input_max" else values.abs().sum(dims)

    if isinstance(module, nn.Embedding):  # one-hot inputs, of which only the ones count
        counts = torch.bincount(x.reshape(-1), minlength=module.num_embeddings).to(torch.float32)
        found = (counts > 0).float() if kind == "input_max" else counts
        return found[:, None], counts.sum()
    if isinstance(module, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return reduce(rows, (0,)), torch.tensor(float(len(rows)), device=x.device)
    assert isinstance(module, nn.modules.conv._ConvNd)
    if x.ndim == module.weight.ndim - 1:  # without an axis of samples
        x = x[None]
    if module.transposed:
        per_channel = reduce(x, (0, *range(2, x.ndim)))
        n = torch.tensor(float(x.numel() // x.shape[1]), device=x.device)
        return per_channel.view(-1, *[1] * (x.ndim - 1)), n
    taps = [reduce(tap, (0, *range(2, x.ndim))) for tap in _taps(module, x)]
    found = torch.stack(taps, 1).view(module.groups, 1, -1, *module.kernel_size)  # group, output, input, kernel
    outputs = module.out_channels // module.groups
    tap = next(_taps(module, x))
    n = torch.tensor(float(tap.numel() // tap.shape[1]), device=x.device)
    return found.expand(-1, outputs, *found.shape[2:]).reshape(module.weight.shape), n


def _taps(module: Any, x: Tensor) -> Iterator[Tensor]:
    """For each place in a convolution's kernel, what it sees: samples × channels × output positions."""
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    sizes = [
        (n - d * (k - 1) - 1) // s + 1
        for n, d, k, s in zip(x.shape[2:], module.dilation, module.kernel_size, module.stride, strict=True)
    ]
    for place in torch.cartesian_prod(*[torch.arange(k) for k in module.kernel_size]).reshape(-1, len(sizes)).tolist():
        tap = x
        for i, (p, d, s, n) in enumerate(zip(place, module.dilation, module.stride, sizes, strict=True)):
            tap = tap[(slice(None),) * (2 + i) + (slice(p * d, p * d + s * (n - 1) + 1, s),)]
        yield tap


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """What the rows of a layer's weight are multiplied with, as one matrix a group.

    Args:
        module: a Linear, or a convolution that is not transposed.
        x: its input.

    Returns:
        groups × positions × columns, float32; the columns go over the kernel's places first, then over the inputs.

    Example:
        >>> patches(nn.Conv1d(1, 1, 2, bias=False), torch.tensor([[[1.0, 2.0, 3.0]]])).tolist()
        [[[1.0, 2.0], [2.0, 3.0]]]
    """
    if isinstance(module, nn.Linear):
        return x.reshape(1, -1, x.shape[-1]).float()
    assert isinstance(module, nn.modules.conv._ConvNd)
    if x.ndim == module.weight.ndim - 1:
        x = x[None]
    taps = torch.stack(list(_taps(module, x)), 1).float()  # samples × places × channels × positions
    samples, places, channels = taps.shape[:3]
    taps = taps.reshape(samples, places, module.groups, channels // module.groups, -1)
    return taps.permute(2, 0, 4, 1, 3).reshape(module.groups, -1, places * (channels // module.groups))
