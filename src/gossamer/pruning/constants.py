"""Which channels hold the same number whatever goes in?

A network is run once, with a bool beside each number: does it depend on the input?

The shadow follows each operation: a sum depends on its input where one of its terms does, a product does not where one
factor is a constant 0, a convolution looks at which of its weights are zero. What an operation is not known for depends
on all that goes in, so nothing is taken for a constant that is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from gossamer.pruning.inputs import outputs_of

_ATEN = torch.ops.aten
_MOVES = (
    *("cat", "stack", "clone", "contiguous", "flip", "roll", "repeat", "index_select", "index", "reshape"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "_unsafe_view", "_reshape_copy"),
)
"""Operations that only move elements, into new memory: the shadow moves along. Views share it as they share memory."""
_ELEMENTWISE = (
    *("relu", "relu_", "hardtanh", "hardtanh_", "hardswish", "hardswish_", "hardsigmoid", "hardsigmoid_", "silu"),
    *("silu_", "gelu", "elu", "elu_", "leaky_relu", "leaky_relu_", "mish", "softplus", "threshold", "prelu"),
    *("_prelu_kernel", "_to_copy", "celu", "selu", "copy_", "where", "clamp", "add", "add_", "sub", "div", "div_"),
)
"""Operations element by element, beside those that PyTorch tags so."""
_POOLS = (
    *("mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"),
    *("amax", "max_pool2d_with_indices", "max_pool3d_with_indices", "max_pool2d", "adaptive_avg_pool1d"),
    *("adaptive_max_pool2d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d"),
    *("_upsample_nearest_exact2d", "upsample_linear1d", "upsample_trilinear3d", "adaptive_avg_pool2d"),
)
"""Operations that mix elements by weights of one sign: run on the shadow as 0 and 1, they show who took part."""
_RESHAPED = ("as_strided_", "squeeze_", "unsqueeze_", "t_", "transpose_", "swapaxes_", "detach_")
"""Operations that write to a tensor's shape alone."""


@dataclass(frozen=True, eq=False)
class Reading:
    """What a layer reads, channel by channel.

    Args:
        constant: bool, whether a channel holds one and the same number throughout, whatever goes into the network.
        value: that number; of no meaning where there is none.
    """

    constant: Tensor
    value: Tensor


def constant_inputs(twin: nn.Module, layers: Mapping[str, nn.Module], inputs: Sequence[Any]) -> dict[str, Reading]:
    """For each layer, which of the channels that it reads are constant.

    Args:
        twin: a network in evaluation mode; hooks come and go.
        layers: name → convolution or Linear layer in it.
        inputs: arguments of a forward pass.

    Returns:
        Layer name → `Reading`, for each layer that was called.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)).eval()
        >>> _ = nn.init.zeros_(net[0].weight[0]), nn.init.constant_(net[0].bias, 3.0)
        >>> reading = constant_inputs(net, {"1": net[1]}, (torch.ones(1, 2),))["1"]
        >>> reading.constant.tolist(), reading.value[0].item()
        ([True, False], 3.0)
    """
    found: dict[str, Reading] = {}
    mode = _Shadows()

    def look(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            now = _read(arguments[0], mode.of(arguments[0]), module)
            before = found.get(name)
            if before is not None:  # called again: one number for both, or none
                same = before.constant & now.constant & (before.value == now.value)
                now = Reading(same, now.value)
            found[name] = now

        return hook

    handles = [module.register_forward_pre_hook(look(name, module)) for name, module in layers.items()]
    try:
        copies = [i.clone() if isinstance(i, Tensor) else i for i in inputs]
        for item in copies:
            if isinstance(item, Tensor):
                mode.put(item, True)
        with mode:
            outputs_of(twin, copies)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _read(tensor: Tensor, shadow: Tensor | None, module: nn.Module) -> Reading:
    with _no_mode():
        axis = tensor.ndim - 1
        if isinstance(module, _ConvNd):
            axis = tensor.ndim - len(module.kernel_size) - 1
        flat = tensor.detach().movedim(axis, 0).flatten(1)
        depends = torch.zeros_like(flat[:, 0], dtype=torch.bool)
        if shadow is not None:
            depends = shadow.movedim(axis, 0).flatten(1).any(1)
        low, high = flat.amin(1), flat.amax(1)
        return Reading(~depends & (low == high), low)


def _no_mode() -> Any:
    return _disable_current_modes()


class _Shadows(TorchDispatchMode):
    """Runs every operation as it is, and the same on the shadows.

    Shadows belong to memory, not to tensors, so that whatever is written through one view is seen through all others.
    """

    def __init__(self) -> None:
        super().__init__()
        # Address → the memory, held so that the address is not given to another, its shadow, and bytes an element.
        self._shadows: dict[int, tuple[torch.UntypedStorage, Tensor, int]] = {}

    def of(self, tensor: Any) -> Tensor | None:
        """The shadow, a view; None of a constant."""
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            return None
        entry = self._shadows.get(tensor.untyped_storage().data_ptr())
        if entry is None:
            return None
        if entry[2] != tensor.element_size():  # the same bytes, read as another type
            return torch.ones_like(tensor, dtype=torch.bool)
        return entry[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def put(self, tensor: Tensor, shadow: Tensor | bool) -> None:
        """Writes the shadow of a tensor."""
        storage, size = tensor.untyped_storage(), tensor.element_size()
        entry = self._shadows.get(storage.data_ptr())
        if entry is None:
            flat = torch.zeros(storage.nbytes() // size, dtype=torch.bool, device=tensor.device)
            entry = self._shadows[storage.data_ptr()] = (storage, flat, size)
        if entry[2] != size:
            entry[1].fill_(True)
            return
        view = entry[1].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        if isinstance(shadow, Tensor):
            view.copy_(shadow)
        else:
            view.fill_(shadow)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in _RESHAPED:
            return func(*args, **kwargs)
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        written = _written(func, args, kwargs)
        depends = any(self._depends(t) for t in tensors)
        known = self._follow(func, args, kwargs, tensors) if depends else None
        out = func(*args, **kwargs)
        results = [t for t in tree_flatten(out)[0] if isinstance(t, Tensor) and t.layout == torch.strided]
        shadows = [t for t in tree_flatten(known)[0] if isinstance(t, Tensor)]
        places = {t.untyped_storage().data_ptr() for t in tensors if t.layout == torch.strided}
        for i, result in enumerate(results):
            is_written = any(result is t for t in written)
            if not depends:
                if is_written and self.of(result) is not None:
                    self.put(result, False)
            elif is_written or result.untyped_storage().data_ptr() not in places:
                fits = i < len(shadows) and shadows[i].shape == result.shape
                self.put(result, shadows[i] if fits else True)
        for t in written:
            if not any(t is r for r in results):
                self.put(t, depends)
        return out

    def _depends(self, tensor: Any) -> bool:
        shadow = self.of(tensor)
        return shadow is not None and bool(shadow.any())

    def _shadow(self, value: Any) -> Any:
        """The shadow of a value, all False of a constant."""
        if not isinstance(value, Tensor):
            return value
        shadow = self.of(value)
        return torch.zeros_like(value, dtype=torch.bool) if shadow is None else shadow

    def _follow(self, func: Any, args: Any, kwargs: Any, tensors: Sequence[Tensor]) -> Any:
        """The shadow of what an operation gives; None where it is not known, so that all of it depends."""
        name = func.overloadpacket.__name__
        if name in ("fill_", "zero_") and not any(self._depends(t) for t in tensors[1:]):
            return torch.zeros_like(args[0], dtype=torch.bool)
        if name in _MOVES:
            # Only the first argument moves; others may be indices.
            if any(self._depends(t) for t in tree_flatten((args[1:], kwargs))[0]):
                return None
            return func(tree_map(self._shadow, args[0]), *args[1:], **kwargs)
        if name in _POOLS:
            rest = {k: v for k, v in kwargs.items() if k != "dtype"}
            return tree_map(_nonzero, func(self._shadow(args[0]).float(), *args[1:], **rest))
        if name == "constant_pad_nd":
            return func(self._shadow(args[0]), args[1], False)
        if name in ("mul", "mul_"):
            return self._product(args[0], args[1])
        if name == "convolution":
            x, weight, _, *rest = args
            if self._depends(weight):
                return None
            return func(self._shadow(x).float(), (weight != 0).float(), None, *rest) > 0.5
        if name in ("mm", "bmm", "addmm", "linear"):
            return self._matrix_product(name, args)
        if name in ("_native_batch_norm_legit_no_training", "native_batch_norm"):
            is_training = name == "native_batch_norm" and args[5]
            weight = args[1]
            if is_training or weight is None:
                return None if is_training else self._shadow(args[0])
            return self._shadow(args[0]) & (weight != 0).view(1, -1, *[1] * (args[0].ndim - 2))
        if name in ("native_dropout", "dropout"):
            return self._shadow(args[0])
        if torch.Tag.pointwise in func.tags or name in _ELEMENTWISE:
            total = torch.zeros((), dtype=torch.bool, device=tensors[0].device)
            for t in tensors[1:] if name == "copy_" else tensors:
                total = total | self._shadow(t)
            shape = tensors[0].shape if name.endswith("_") else torch.broadcast_shapes(*[t.shape for t in tensors])
            return total.expand(shape)
        return None

    def _product(self, a: Any, b: Any) -> Tensor:
        """A factor that is always 0 makes the other one's shadow vanish."""
        depends_a, depends_b = (torch.as_tensor(self._shadow(t) if isinstance(t, Tensor) else False) for t in (a, b))
        zero_a, zero_b = (torch.as_tensor(t == 0) for t in (a, b))
        return (depends_a & ~(zero_b & ~depends_b)) | (depends_b & ~(zero_a & ~depends_a))

    def _matrix_product(self, name: str, args: Any) -> Tensor:
        bias: Any = None
        if name == "addmm":
            bias, a, b = args[:3]
        elif name == "linear":
            a, b, bias = args[0], args[1].mT, args[2] if len(args) > 2 else None
        else:
            a, b = args[:2]
        depends_a, depends_b = self._shadow(a), self._shadow(b)
        live_a, live_b = depends_a | (a != 0), depends_b | (b != 0)
        out = (depends_a.float() @ live_b.float() > 0.5) | (live_a.float() @ depends_b.float() > 0.5)
        return out if bias is None else out | self._shadow(bias)


def _nonzero(value: Any) -> Any:
    return value != 0 if isinstance(value, Tensor) else value


def _written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The arguments that an operation writes to."""
    written: list[Tensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written += [t for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
    return written
