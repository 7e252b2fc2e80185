"""A pruned network from its file: a fresh one takes the shapes that the weights have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from gossamer.errors import ArgumentError, FileError
from gossamer.pruning.attention import head_count, heads_of, loosen, set_heads
from gossamer.pruning.graph import is_depthwise


def load_pruned(model: nn.Module, state: Mapping[str, Any]) -> nn.Module:
    """Gives a network, made as the dense one was, the shapes and the weights of a pruned one.

    Args:
        model: a fresh network of the same kind; changed in place, its parameters stay the same objects.
        state: what `state_dict()` of the pruned network gave, perhaps through `gossamer.save` and `gossamer.load`.

    Returns:
        The network.

    Raises:
        ArgumentError: the network is none.
        FileError: a name is missing or another, or a shape is none that pruning leaves.

    Example:
        >>> from gossamer.pruning import Pruner
        >>> make = lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        >>> small = Pruner(make(), 50, example_inputs=torch.rand(1, 3, 8, 8)).prune_model()
        >>> load_pruned(make(), small.state_dict())[0].out_channels
        4
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"weights go into a torch.nn.Module, got {model!r}")
    if not isinstance(state, Mapping):
        raise ArgumentError(f"state must be a state_dict, got {state!r}; read a file with gossamer.load(path) first")
    own: dict[str, Any] = {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    odd = sorted(set(own) ^ {n for n, t in state.items() if isinstance(t, Tensor)})
    if odd:
        where = "is not in this network" if odd[0] in state else "is missing there"
        raise FileError(f"the weights are of another network: {odd[0]!r} {where}")
    for name, tensor in own.items():
        there = tuple(state[name].shape)
        if len(there) != tensor.ndim or any(a > b for a, b in zip(there, tensor.shape, strict=True)):
            raise FileError(
                f"the weights are of another network: {name!r} has shape {there} there and {tuple(tensor.shape)} here, "
                "and pruning makes shapes smaller only"
            )
    for prefix, module in model.named_modules():
        _resize_heads(prefix, module, state)  # before the layers in it have their new sizes
        _resize(prefix, module, state)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.shape != state[name].shape:
                parameter.grad = None
                parameter.data = torch.empty(state[name].shape, dtype=parameter.dtype, device=parameter.device)
        for name, buffer in model.named_buffers():
            if name in own and buffer.shape != state[name].shape:
                parent, _, leaf = name.rpartition(".")
                model.get_submodule(parent)._buffers[leaf] = torch.empty(
                    state[name].shape, dtype=buffer.dtype, device=buffer.device
                )
    model.load_state_dict(dict(state))
    return model


def _resize(prefix: str, module: nn.Module, state: Mapping[str, Tensor]) -> None:
    def shape(name: str) -> tuple[int, ...]:
        return tuple(state[f"{prefix}.{name}" if prefix else name].shape)

    if isinstance(module, nn.MultiheadAttention):
        if not heads_of(module):
            return
        rows, width = shape("in_proj_weight")
        if (rows, width) == tuple(module.in_proj_weight.shape):
            return
        loosen(module)
        module.num_heads, module.embed_dim = rows // (3 * module.head_dim), width
        module.kdim = module.vdim = module.out_proj.out_features = width
        module.out_proj.in_features = rows // 3
    elif isinstance(module, _ConvNd):
        first, second = shape("weight")[:2]
        if is_depthwise(module):
            module.in_channels = module.out_channels = module.groups = first
        else:
            given, read = (second, first) if module.transposed else (first, second)
            module.out_channels = given * (module.groups if module.transposed else 1)
            module.in_channels = read * (1 if module.transposed else module.groups)
    elif isinstance(module, nn.Linear):
        rows, columns = shape("weight")
        module.out_features, module.in_features = rows, columns
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = shape("weight")[1]
    elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
        module.normalized_shape = shape("weight")
    elif isinstance(module, nn.GroupNorm) and module.affine:
        module.num_channels = shape("weight")[0]
    elif isinstance(module, nn.PReLU):
        module.num_parameters = shape("weight")[0]
    elif isinstance(module, (_BatchNorm, _InstanceNorm)):
        name = next((n for n in ("weight", "running_mean") if f"{prefix}.{n}" in state or n in state), None)
        if name is not None:
            module.num_features = shape(name)[0]


def _resize_heads(prefix: str, parent: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Heads go as a whole: where an attention's projections have fewer rows, it has as many fewer heads."""
    known = head_count(parent)
    if known is None or isinstance(parent, nn.MultiheadAttention):
        return
    linear = {n: m for n, m in parent.named_children() if isinstance(m, nn.Linear)}
    rows = {n: state[f"{prefix}.{n}.weight" if prefix else f"{n}.weight"].shape[0] for n in linear}
    fewer = [n for n, m in linear.items() if rows[n] < m.out_features]
    # The output projection is the one that reads as many channels less as there are fewer rows.
    columns = {n: state[f"{prefix}.{n}.weight" if prefix else f"{n}.weight"].shape[1] for n in linear}
    for n in fewer:
        for out, m in linear.items():
            whole, left = m.in_features, columns[out]
            if left < whole and rows[n] * whole == left * linear[n].out_features and left * known[1] % whole == 0:
                set_heads(parent, known[1], left * known[1] // whole, whole // known[1])
                return
