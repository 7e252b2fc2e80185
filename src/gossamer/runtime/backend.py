"""`torch.compile(model, backend="gossamer")`: the engine through PyTorch's own door."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from gossamer.errors import ArgumentError
from gossamer.runtime.model import CompiledModel

_KEPT = 8
"""Sets of weights that a graph keeps a compiled network for: Dynamo runs layers of one make through one graph."""


def gossamer(graph: GraphModule, example_inputs: Sequence[Any], **settings: Any) -> Callable[..., Any]:
    """What PyTorch's entry point 'torch_dynamo_backends' finds under the name 'gossamer'.

    Weights are compiled in, and compiled anew once they have changed. Where gradients are wanted, or the
    network changes itself or draws random numbers (in training mode), the graph runs as it is, in PyTorch.

    Args:
        graph: as Dynamo captured it; parameters and buffers are among its inputs, or its own.
        example_inputs: one a placeholder.
        settings: 'mode' and 'options' of torch.compile; there are none here.

    Returns:
        A function of the same inputs.

    Raises:
        ArgumentError: a setting was given.

    Example:
        >>> net = nn.Linear(4, 2).eval()
        >>> fast = torch.compile(net, backend="gossamer")
        >>> with torch.no_grad():
        ...     bool(torch.allclose(fast(torch.ones(1, 4)), net(torch.ones(1, 4)), atol=1e-6))
        True
    """
    if settings:
        name, value = next(iter(settings.items()))
        raise ArgumentError(f"backend='gossamer' has no {name}={value!r}; leave it out")
    fixed = [i for i, value in enumerate(example_inputs) if _is_fixed(value)]
    free = [i for i in range(len(example_inputs)) if i not in fixed]
    kept: OrderedDict[Any, tuple[Callable[..., Any], Tensor]] = OrderedDict()
    as_it_is = False

    def run(*inputs: Any) -> Any:
        nonlocal as_it_is
        if as_it_is or _wants_gradients(graph, inputs):
            return graph(*inputs)
        weights = [*(inputs[i] for i in fixed), *graph.parameters(), *graph.buffers()]
        key, statistics = tuple(_mark(w) for w in weights), _statistics(weights)
        compiled, of = kept.pop(key, (None, statistics))
        if compiled is None or not torch.equal(of, statistics):
            compiled = _compiled(graph, inputs, fixed, free)
            if isinstance(compiled, CompiledModel) and not compiled.is_steady:  # training mode, without gradients
                as_it_is = True
                return graph(*inputs)
        kept[key] = compiled, statistics
        while len(kept) > _KEPT:
            kept.popitem(last=False)
        return compiled(*[inputs[i] for i in free])

    return torch._dynamo.disable(run)


class _Bound(nn.Module):
    """A graph with some of its inputs given."""

    def __init__(self, graph: GraphModule, inputs: Sequence[Any], fixed: Sequence[int], free: Sequence[int]) -> None:
        super().__init__()
        self.graph, self._free, self._n = graph, free, len(inputs)
        self._numbers = {i: inputs[i] for i in fixed if not isinstance(inputs[i], Tensor)}
        self._tensors = [i for i in fixed if isinstance(inputs[i], Tensor)]
        for i in self._tensors:
            self.register_buffer(f"input{i}", inputs[i].detach())
        self.eval()

    def forward(self, *args: Any) -> Any:
        values: dict[int, Any] = dict(zip(self._free, args, strict=True)) | self._numbers
        values |= {i: getattr(self, f"input{i}") for i in self._tensors}
        return self.graph(*[values[i] for i in range(self._n)])


def _compiled(
    graph: GraphModule, inputs: Sequence[Any], fixed: Sequence[int], free: Sequence[int]
) -> Callable[..., Any]:
    if not free:
        return lambda: graph(*inputs)
    return CompiledModel(_Bound(graph, inputs, fixed, free), tuple(inputs[i] for i in free))


def _is_fixed(value: Any) -> bool:
    return (
        not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or hasattr(value, "_dynamo_static_input_type")
    )


def _mark(value: Any) -> Any:
    return (value.data_ptr(), value._version, value.shape) if isinstance(value, Tensor) else value


def _statistics(values: Sequence[Any]) -> Tensor:
    """The bits of running means and variances, which BatchNorm writes without PyTorch counting it."""
    found = [v.detach() for v in values if isinstance(v, Tensor) and not isinstance(v, nn.Parameter) and v.ndim == 1]
    floats = [v.view(torch.uint8) for v in found if v.is_floating_point() and v.device.type == "cpu"]
    return torch.cat(floats) if floats else torch.empty(0)


def _wants_gradients(graph: GraphModule, inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(v, Tensor) and v.requires_grad for v in (*inputs, *graph.parameters())
    )
