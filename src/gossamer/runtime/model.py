"""A network compiled for the CPU: an nn.Module to call, which says what it runs where."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.batchnorm import _BatchNorm

from gossamer.errors import ArgumentError, GossamerWarning, StateError
from gossamer.native import native
from gossamer.runtime.capture import NotCapturedError, capture, copied, is_steady, written
from gossamer.runtime.choice import choose, runs_sparse
from gossamer.runtime.direct import direct
from gossamer.runtime.explain import PlanRow, rows_of, table_of
from gossamer.runtime.inputs import arguments_of, by_place, key_of, kind_of, placed
from gossamer.runtime.layers import Layer
from gossamer.runtime.saved import Example, read, write
from gossamer.runtime.segment import Segment, gather
from gossamer.runtime.unfused import own, replaced

_GRAPHS = 4
"""Captures that a network makes, beside the first, for inputs that need one of their own. Each takes seconds: what
would need yet another runs in PyTorch."""

_KINDS = 64
"""Kinds of inputs that a network knows to be taken by its graph; where there are more, all are looked at anew."""


def compile(model: nn.Module, example_inputs: Any, *, tune: bool = False) -> CompiledModel:
    """Compiles a network for inference on the CPU: layers with many zeros run by what is not zero.

    The network is captured with torch.export, BatchNorms are folded, and each convolution and linear layer becomes one
    operator with the addition and the activation that follow it. A layer that would be faster dense runs dense;
    whatever is not known runs in PyTorch.

    Args:
        model: in eval mode, float32, on the CPU. It is not changed; a copy is kept, so later changes are not seen.
        example_inputs: a tensor, a tuple of the arguments, or a dict of them by name; batch and image sizes may change.
        tune: whether each layer is tried both ways, sparse and dense, on this machine. By default a model of what each
            takes decides, which other work on the machine cannot mislead. `save` keeps what was found.

    Returns:
        A module with the same outputs.

    Raises:
        ArgumentError: the network is no module, is in training mode or on a device, or cannot be captured.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
        >>> fast = compile(net, torch.randn(1, 3, 8, 8))
        >>> x = torch.randn(2, 3, 9, 9)
        >>> torch.allclose(fast(x), net(x), atol=1e-6)
        True
    """
    if not isinstance(model, nn.Module):
        hint = "; give learn.model" if hasattr(model, "model") else ""
        raise ArgumentError(f"compile takes a torch.nn.Module, got a {type(model).__name__}{hint}")
    if isinstance(model, CompiledModel):
        raise ArgumentError("the network is compiled already; call it as it is")
    inside = next((name for name, m in model.named_modules() if isinstance(m, CompiledModel)), None)
    if inside is not None:
        raise ArgumentError(
            f"its part {inside!r} is compiled already, and cannot be taken apart; put in the network that it was "
            "compiled from, and compile the whole"
        )
    if model.training:
        raise ArgumentError("the network is in training mode; compile(model.eval(), …) compiles it for inference")
    elsewhere = next((p.device for p in model.parameters() if p.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ArgumentError(f"the network is on {elsewhere}, and this is for a CPU; give model.cpu()")
    if native() is None:
        _say_once_that_nothing_is_compiled()
    arguments = arguments_of(model, example_inputs)
    kept = own(model)
    return CompiledModel(kept, arguments, tune=tune, is_ours=kept is not model)


def load(path: str | os.PathLike[str]) -> CompiledModel:
    """Reads a compiled network that `CompiledModel.save` wrote.

    Neither the training code nor the network's class is needed.

    Args:
        path: the file.

    Returns:
        The network, ready to be called. Nothing is unpickled, and nothing but PyTorch's own operators can be in it.

    Raises:
        FileError: no such file, not a whole one, one that holds no compiled network, or one of a newer version.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(8, 4), nn.ReLU()).eval()
        >>> path = compile(net, torch.ones(2, 8)).save(Path(tempfile.mkdtemp()) / "net.gossamer")
        >>> torch.allclose(load(path)(torch.ones(3, 8)), net(torch.ones(3, 8)))
        True
    """
    graph, examples = read(path)
    if native() is None:
        _say_once_that_nothing_is_compiled()
    return CompiledModel._of(graph, examples)


@cache
def _say_once_that_nothing_is_compiled() -> None:
    warnings.warn(
        "Gossamer was installed without a C++ compiler, or its compiled part is of another version, so compiled "
        "networks run in PyTorch, no faster; with a compiler: pip install --force-reinstall --no-cache-dir --no-deps "
        "gossamer",
        GossamerWarning,
        stacklevel=3,
    )


class CompiledModel(nn.Module):
    """What `compile` and `load` give.

    Args:
        model: the network; kept, to be captured anew for inputs that the first capture does not cover.
        arguments: example inputs.
        tune: as for `compile`.
        is_ours: whether nobody else has the network, so that it may be cast with this.
    """

    def __init__(
        self, model: nn.Module, arguments: tuple[Any, ...], *, tune: bool = False, is_ours: bool = False
    ) -> None:
        super().__init__()
        self._prepare(model, [Example.of(a) for a in arguments])
        self._is_ours = is_ours
        self._dtypes = [getattr(a, "dtype", None) for a in arguments]
        with torch.no_grad():
            try:
                self._flat = (_flat(model, arguments, tune=tune),)
                self.network: nn.Module = _gathered(self._flat[0])
            except NotCapturedError as error:
                try:
                    with torch.random.fork_rng(devices=[]):
                        model(*arguments)
                except Exception as wrong:
                    raise ArgumentError(f"the network does not run on the example inputs: {wrong}") from wrong
                warnings.warn(
                    f"the network cannot be captured by torch.export ({error}), so its layers run one by one, without "
                    "what follows them",
                    GossamerWarning,
                    stacklevel=4,
                )
                self.network = replaced(model)
        # Somebody else's network may be trained, or changed, after this.
        self._is_as_it_was = (
            is_ours and not self._has_segment and not any(isinstance(m, _BatchNorm) for m in model.modules())
        )

    @classmethod
    def _of(cls, graph: GraphModule, examples: Sequence[Example]) -> CompiledModel:
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._prepare(None, examples)
        self._flat = (graph,)
        self.network = _gathered(graph)
        return self

    is_compiled = True

    @property
    def _has_segment(self) -> bool:
        return any(isinstance(m, Segment) for m in self.network.modules())

    def _prepare(self, model: nn.Module | None, examples: Sequence[Example]) -> None:
        # In tuples, so that they are no parts of this module.
        self._model = (model,)
        self._flat: tuple[GraphModule | None] = (None,)
        self._examples = tuple(examples)
        self._dtypes: list[Any] | None = None
        self._graphs: dict[Any, nn.Module] = {}
        self._ways: dict[Any, Callable[..., Any]] = {}  # for inputs of a kind that the graph took before
        self._is_as_it_was = self._is_ours = False  # whether nothing is gained by the graph; see the arguments
        self.training = False

    @property
    def examples(self) -> tuple[Any, ...]:
        """Inputs as it was compiled for: random numbers, of those shapes."""
        return tuple(e.make() for e in self._examples)

    @property
    def is_steady(self) -> bool:
        """Whether equal inputs give equal results: False for one that changes itself, or draws random numbers."""
        return self._flat[0] is None or is_steady(self._flat[0])

    def save(self, path: str | os.PathLike[str], *, values: str | None = None) -> Path:
        """Writes the network to one file, with weights that are stored without their zeros.

        Args:
            path: the file, such as 'model.gossamer'. It is a safetensors file that `gossamer.load` reads, too.
            values: 'fp16' or 'bf16' stores weights in two bytes each; they are rounded.

        Returns:
            The path.

        Raises:
            StateError: it was not captured as a graph, or has parts that no file can hold.
        """
        graph = self._flat[0]
        if graph is None:
            raise StateError(
                "the network could not be captured as a graph, so there is no network to save without its class; save "
                "the weights with gossamer.save, and compile again after loading them"
            )
        return write(graph, self._examples, path, values=values)

    def reference(self) -> nn.Module:
        """The same network in plain PyTorch, zeros and all: what it is compared with, and what other tools can take.

        Raises:
            StateError: it was not captured as a graph.
        """
        graph = self._flat[0]
        if graph is None:
            raise StateError("the network could not be captured as a graph; take the one that it was made from")
        return copy.deepcopy(graph)

    def __reduce__(self) -> Any:
        raise StateError("a compiled network cannot be pickled or copied; save it with its save, and load that")

    def train(self, mode: bool = True) -> CompiledModel:
        """It is compiled for inference and stays so.

        Raises:
            StateError: `mode` is True.
        """
        if mode:
            raise StateError("a compiled network cannot be trained; train the one that it was made from")
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives.

        Raises:
            ArgumentError: a network that was loaded does not take inputs of these shapes.
        """
        run: Any = self._run
        if torch.compiler.is_exporting() or torch.compiler.is_dynamo_compiling():
            run = self._run_apart if self._has_segment and not torch.compiler.is_exporting() else self._run_plain
        if torch.is_grad_enabled():
            with torch.no_grad():
                return run(args, kwargs)
        return run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model = self._model[0]
        if self._is_as_it_was and model is not None:
            return model(*args, **kwargs)
        kind = None if kwargs else kind_of(args)
        way = self._ways.get(kind)  # at one go: another thread may empty it
        if way is not None:
            return way(*args)
        if model is None:
            args = self._checked(args, kwargs)
            return self._remembered(kind, self.network(*args))
        if self._flat[0] is None:  # the network's own code
            return self.network(*args, **kwargs)
        if kwargs:
            args, kwargs = by_place(model, args, kwargs)
        key = key_of(args, kwargs) if self._graphs else None
        if (key is None or key not in self._graphs) and self._is_alike(args, kwargs):
            try:
                result = self.network(*args)
            except (AssertionError, TypeError, ValueError):
                pass  # the capture's guards: these inputs are of another kind
            else:
                return self._remembered(kind, result)
        return self._graph_for(key_of(args, kwargs), args, kwargs)(*args, **kwargs)

    # What Dynamo would trace here is not the network, but calls of the compiled library.
    _run_apart: Any = torch.compiler.disable(
        _run,
        reason="a network that gossamer.runtime compiled runs in its own engine; leave fullgraph=True out, or compile "
        'the network that it was made from with torch.compile(model, backend="gossamer")',
    )

    def _run_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the network gives by PyTorch's own operators: a program of other compilers has no others."""
        graph, model = self._flat[0], self._model[0]
        if model is not None:
            return model(*args, **kwargs)
        assert graph is not None
        return graph(*self._checked(args, kwargs))

    def _remembered(self, kind: Any, result: Any) -> Any:
        """What the graph gave. The next inputs of that kind are spared its guards."""
        if kind is not None:
            known = list(self._ways.values())  # at one go: another thread may add to it
            way = known[0] if known else _way(self.network)
            if len(known) >= _KINDS:
                self._ways.clear()
            if way is not None:
                self._ways[kind] = way
        return result

    def _is_alike(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether as many arguments of the same dtypes were captured, of which a graph has no guard."""
        if kwargs or len(args) != len(self._examples):
            return False
        return self._dtypes is None or [getattr(a, "dtype", None) for a in args] == self._dtypes

    def _apply(self, fn: Any, recurse: bool = True) -> CompiledModel:
        super()._apply(fn, recurse)
        self._dtypes = None  # of whatever dtype it is now
        self._ways, self._graphs = {}, {}
        if self._is_ours and self._model[0] is not None:
            self._model[0]._apply(fn, recurse)
        else:
            self._is_as_it_was = False
        return self

    def _checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        graph = self._flat[0]
        if graph is not None and (kwargs or len(args) != len(self._examples)):
            args = placed(graph, args, kwargs)
        for i, (given, example) in enumerate(zip(args, self._examples, strict=True)):
            if not example.fits(given):
                got = tuple(given.shape) if isinstance(given, Tensor) else repr(given)
                raise ArgumentError(
                    f"input {i} is {got}, and the file was made for {example}; compile it anew for this"
                )
        return args

    def _graph_for(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
        graph, model = self._graphs.get(key), self._model[0]
        assert model is not None
        if graph is None:
            if key is None or len(self._graphs) >= _GRAPHS:
                return model
            try:
                graph = _gathered(_flat(model, args, kwargs))
            except NotCapturedError:
                graph = model
            self._graphs[key] = graph
        return graph

    def __str__(self) -> str:
        return table_of(self.explain())

    def explain(self, *args: Any) -> list[PlanRow]:
        """What runs where, why, and at what sparsity.

        Args:
            args: inputs; where they are given, each row has its share of the time.

        Returns:
            One row a layer or operator, in order.
        """
        return rows_of(self.network, args)


def _flat(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None, *, tune: bool = False
) -> GraphModule:
    graph = capture(model, args, kwargs)
    if kwargs:
        for module in graph.modules():
            if isinstance(module, Layer):
                module.is_sparse = runs_sparse(module)
    else:
        before = [(tensor, tensor.clone()) for tensor in written(graph)]
        with torch.random.fork_rng(devices=[]):
            choose(graph, args, tune=tune)  # calls it a few times, which nobody is to notice
        for tensor, value in before:
            tensor.copy_(value)
    return graph


def _gathered(flat: GraphModule) -> GraphModule:
    graph = copied(flat)
    gather(graph)
    return graph


def _way(graph: nn.Module) -> Callable[..., Any] | None:
    """What runs a graph without a look at the inputs; None where its inputs or results are unusual containers."""
    found = direct(graph) if isinstance(graph, GraphModule) else None
    if found is None:
        return None
    *inputs, call, output = found.graph.nodes
    segment = found.get_submodule(str(call.target)) if call.op == "call_module" else None
    is_all = isinstance(segment, Segment) and call.args == tuple(inputs) and output.args == (call,)
    return segment.forward if segment is not None and is_all else found.forward
