"""A compiled network as one file: its weights as Gossamer stores them, and its graph as JSON in the header.

What can be in a graph is what is listed here: operators of the engine, and functions of PyTorch's ATen that change
nothing. So reading a file, and running what it holds, computes and does nothing else.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_unflatten

from gossamer.errors import FileError, StateError
from gossamer.runtime.activations import ACTIVATIONS
from gossamer.runtime.layers import Geometry, Layer
from gossamer.runtime.planes import Add, Concat, Flatten, MaxPool, Mean, Scale
from gossamer.runtime.segment import OPERATORS
from gossamer.storage.files import load, save_with, text_of

_KEY, _VERSION = "gossamer-graph", 1

_FUNCTIONS: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {
        f.__name__: f
        for f in (
            *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv),
            *(
                operator.mod,
                operator.neg,
                operator.pow,
                operator.eq,
                operator.ne,
                operator.lt,
                operator.le,
                operator.gt,
            ),
            *(operator.ge, torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not),
        )
    }
)
"""Of numbers, such as sizes."""

_NAMED: Mapping[type, tuple[str, Mapping[str, Any]]] = MappingProxyType(
    {
        torch.dtype: ("dtype", {n: v for n, v in vars(torch).items() if isinstance(v, torch.dtype)}),
        torch.memory_format: (
            "memory_format",
            {n: v for n, v in vars(torch).items() if isinstance(v, torch.memory_format)},
        ),
        torch.layout: ("layout", {n: v for n, v in vars(torch).items() if isinstance(v, torch.layout)}),
    }
)


@dataclass(frozen=True)
class Example:
    """What an input is like.

    Args:
        shape: of the example; None for an input that is no tensor.
        free: which axes may have other sizes.
        dtype: of its elements.
        value: of an input that is no tensor.

    Example:
        >>> example = Example((2, 3, 8, 8), (True, False, True, True), "float32")
        >>> example.fits(torch.ones(5, 3, 9, 9)), example.fits(torch.ones(5, 4, 8, 8))
        (True, False)
        >>> print(example)
        (any, 3, any, any) of float32
    """

    shape: tuple[int, ...] | None
    free: tuple[bool, ...] = ()
    dtype: str = ""
    value: Any = None

    @classmethod
    def of(cls, given: Any) -> Example:
        """Of an input, with no axis free."""
        if not isinstance(given, Tensor):
            return cls(None, value=given)
        return cls(tuple(given.shape), (False,) * given.ndim, str(given.dtype).removeprefix("torch."))

    def make(self) -> Any:
        """An input like it, of random numbers."""
        if self.shape is None:
            return self.value
        dtype = getattr(torch, self.dtype)
        return torch.randn(self.shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(self.shape, dtype=dtype)

    def fits(self, given: Any) -> bool:
        """Whether the network takes an input."""
        if self.shape is None:
            return bool(given == self.value)
        return (
            isinstance(given, Tensor)
            and given.ndim == len(self.shape)
            and all(free or n == m for n, m, free in zip(given.shape, self.shape, self.free, strict=True))
        )

    def __str__(self) -> str:
        if self.shape is None:
            return repr(self.value)
        sizes = ", ".join("any" if free else str(n) for n, free in zip(self.shape, self.free, strict=True))
        return f"({sizes}) of {self.dtype}"


def write(
    graph: GraphModule, examples: Sequence[Example], path: str | os.PathLike[str], *, values: str | None = None
) -> Path:
    """Writes a graph of operators.

    Args:
        graph: as `capture` gives it.
        examples: its inputs.
        path: the file.
        values: as for `gossamer.save`.

    Raises:
        StateError: it has a part that no file can hold.
    """
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if len(inputs) != len(examples) or any(isinstance(e.value, (list, tuple, dict)) for e in examples):
        raise StateError("a network whose inputs are lists or dicts cannot be saved; give it tensors, one an argument")
    freed = [Example(e.shape, _free(n, e), e.dtype, e.value) for n, e in zip(inputs, examples, strict=True)]
    tensors: dict[str, Tensor] = {}
    nodes = [row for n in graph.graph.nodes if (row := _row(graph, n, tensors)) is not None]
    text = json.dumps(
        {"version": _VERSION, "inputs": [asdict(e) for e in freed], "nodes": nodes}, separators=(",", ":")
    )
    return save_with(tensors, path, {_KEY: text}, values=values)


def read(path: str | os.PathLike[str]) -> tuple[GraphModule, list[Example]]:
    """Reads what `write` wrote.

    Raises:
        FileError: no such file, not a whole one, one that holds no compiled network, or one of a newer version.
    """
    tensors, text, where = load(path), text_of(path, _KEY), repr(os.fspath(path))
    if text is None:
        raise FileError(
            f"{where} holds tensors and no compiled network; read it with gossamer.load, or write one with "
            "runtime.compile(model, x).save(path)"
        )
    try:
        content: Any = json.loads(text)
        version = content["version"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FileError(f"{where} has a damaged graph; take another copy") from None
    if version != _VERSION:
        raise FileError(
            f"{where} is a compiled network of version {version!r}; this Gossamer reads version {_VERSION}, so install "
            "a newer one"
        )
    try:
        examples = [_example(e) for e in content["inputs"]]
        graph = _Reader(tensors).graph(content["nodes"])
        if sum(n.op == "placeholder" for n in graph.graph.nodes) != len(examples):
            raise ValueError("inputs")
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RuntimeError) as error:
        raise FileError(f"{where} has a graph that does not fit its tensors ({error}); take another copy") from None
    return graph, examples


# -- writing ----------------------------------------------------------------------------------------------------------


def _free(node: Node, example: Example) -> tuple[bool, ...]:
    shape = getattr(node.meta.get("val"), "shape", None)
    return example.free if shape is None else tuple(_is_open(n) for n in shape)


def _is_open(size: int | torch.SymInt) -> bool:
    """Whether a size may change. One that the network asked for in an `if` is still a symbol, but of one value."""
    return not isinstance(size, int) and size.node.maybe_as_int() is None


def _row(graph: GraphModule, node: Node, tensors: dict[str, Tensor]) -> dict[str, Any] | None:
    if node.op == "placeholder":
        return {"name": node.name, "op": "input"}
    if node.op == "output":
        codegen: Any = graph.graph._codegen
        flat = list(node.args[0]) if isinstance(node.args[0], (tuple, list)) else [node.args[0]]
        spec = getattr(getattr(codegen, "pytree_info", None), "out_spec", None)
        tree = node.args[0] if spec is None else tree_unflatten(flat, spec)
        return {"op": "output", "value": _plain(tree)}
    if node.op == "get_attr":
        value: Any = graph
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not isinstance(value, Tensor):
            raise StateError(
                f"the network has a constant {node.target!r} of type {type(value).__name__}; it cannot be saved"
            )
        tensors[str(node.target)] = value
        return {"name": node.name, "op": "tensor", "of": str(node.target)}
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target))
        if isinstance(module, OPERATORS):
            arguments = [a.name for a in node.args if isinstance(a, Node)]
            return {"name": node.name, "op": module.kind, "as": str(node.target), "in": arguments} | _settings(
                module, str(node.target), tensors
            )
        if not node.users:  # the capture's guards
            return None
    elif node.op == "call_function":
        name = _function_name(node.target)
        if name is not None:
            kwargs = {k: _plain(v) for k, v in node.kwargs.items()}
            return {"name": node.name, "op": "call", "of": name, "args": _plain(node.args), "kwargs": kwargs}
    raise StateError(f"the network calls {node.target}, which no file can hold; save the weights with gossamer.save")


def _settings(module: nn.Module, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(module, Layer):
        if module.weight.dtype != torch.float32:
            raise StateError(
                f"layer {name!r} is {module.weight.dtype}, and compiled networks are stored as float32; call "
                "fast.float() before, and save(path, values='fp16') for a file of half the size"
            )
        tensors[f"{name}.weight"] = module.weight
        if module.bias is not None:
            tensors[f"{name}.bias"] = module.bias
        return {
            "bias": module.bias is not None,
            "geometry": None if module.geometry is None else asdict(module.geometry),
            "activation": module.activation,
            "add_last": module.add_last,
            "sparse": module.is_sparse,
            "expected": module.expected,
            "measured": module.is_measured,
        }
    if isinstance(module, MaxPool):
        return {n: getattr(module, n) for n in ("kernel", "stride", "padding", "ceil")}
    if isinstance(module, Add):
        return {"activation": module.activation}
    return {"keep": module.keep} if isinstance(module, Mean) else {}


def _function_name(target: Any) -> str | None:
    if isinstance(target, torch._ops.OpOverload):
        return str(target) if _is_allowed(target) else None
    name = getattr(target, "__name__", "")
    return name if _FUNCTIONS.get(name) is target else None


def _is_allowed(target: torch._ops.OpOverload) -> bool:
    """ATen's functions that change nothing, and read no file."""
    schema = target._schema
    return target.namespace == "aten" and not schema.is_mutable and not any("file" in a.name for a in schema.arguments)


def _plain(value: Any) -> Any:
    """As JSON has it. Whatever JSON has no word for is a dict of one key."""
    if isinstance(value, Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (tuple, list)):
        items = [_plain(v) for v in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, dict):
        return {"dict": [[_plain(k), _plain(v)] for k, v in cast("dict[Any, Any]", value).items()]}
    if isinstance(value, slice):
        return {"slice": [_plain(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    for kind, (name, _) in _NAMED.items():
        if isinstance(value, kind):
            return {name: str(value).removeprefix("torch.")}
    raise StateError(
        f"the network gives, or has as a constant, a {type(value).__name__}, which no file can hold; let it give "
        "tensors and numbers, in tuples, lists or dicts"
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def _example(row: Mapping[str, Any]) -> Example:
    shape = row["shape"]
    if shape is not None:
        if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in shape):
            raise ValueError("an input's shape")
        if not isinstance(getattr(torch, row["dtype"]), torch.dtype) or len(row["free"]) != len(shape):
            raise ValueError("an input's dtype")
        return Example(tuple(shape), tuple(bool(f) for f in row["free"]), row["dtype"])
    return Example(None, value=row["value"])


class _Reader:
    """Puts a graph together from its rows."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._nodes: dict[str, Node] = {}
        self._graph = Graph()
        self._root = nn.Module()

    def graph(self, rows: Sequence[Mapping[str, Any]]) -> GraphModule:
        for row in rows:
            made = self._node(row)
            if made is not None:
                self._nodes[row["name"]] = made
        if [row["op"] for row in rows].count("output") != 1 or rows[-1]["op"] != "output":
            raise ValueError("its last node is its output")
        if len(self._nodes) != len(rows) - 1:
            raise ValueError("nodes of one name")
        graph = GraphModule(self._root, self._graph)
        graph.graph.lint()
        return graph

    def _node(self, row: Mapping[str, Any]) -> Node | None:
        op = row["op"]
        if op == "input":
            return self._graph.placeholder(_identifier(row["name"]))
        if op == "output":
            self._graph.output(self._value(row["value"]))
            return None
        if op == "tensor":
            name = f"tensor_{len(self._nodes)}"
            self._root.register_buffer(name, self._tensors[row["of"]])
            return self._graph.get_attr(name)
        if op == "call":
            args, kwargs = self._value(row["args"]), {k: self._value(v) for k, v in row["kwargs"].items()}
            node = self._graph.call_function(_function(row["of"]), tuple(args), kwargs)
            node.meta["val"] = torch.empty(0)  # so that a plan lists it
            return node
        name = _identifier(row["as"])
        if name not in self._root._modules:
            self._root.add_module(name, _operator(row, self._tensors))
        return self._graph.call_module(name, tuple(self._nodes[n] for n in row["in"]))

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(v) for v in cast("list[Any]", value)]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = cast("dict[str, Any]", value).items()
        if kind == "node":
            return self._nodes[content]
        if kind == "tuple":
            return tuple(self._value(v) for v in content)
        if kind == "dict":
            return {self._value(k): self._value(v) for k, v in content}
        if kind == "slice":
            return slice(*[self._value(v) for v in content])
        if kind == "device":
            return torch.device("cpu")
        return next(words[content] for name, words in _NAMED.values() if name == kind)


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"{name!r} is no name")
    return name


def _function(name: str) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    space, function, overload = name.split(".")
    target = getattr(getattr(torch.ops.aten, _identifier(function)), _identifier(overload)) if space == "aten" else None
    if not isinstance(target, torch._ops.OpOverload) or not _is_allowed(target):
        raise ValueError(f"{name!r} is no function that a file may hold")
    return target


def _operator(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> nn.Module:
    kind = row["op"]
    if kind == "layer":
        name, geometry = row["as"], row["geometry"]
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"] if row["bias"] else None
        shape = None
        if geometry is not None:
            pairs = (_numbers(geometry[n], low) for n, low in (("stride", 1), ("padding", 0), ("dilation", 1)))
            shape = Geometry(*pairs, groups=_numbers([geometry["groups"], 1], 1)[0])
        if weight.dtype != torch.float32 or (bias is not None and bias.dtype != torch.float32):
            raise ValueError("a layer's weight is not float32")
        layer = Layer(
            weight, bias, shape, row["activation"], add_last=bool(row["add_last"]), is_sparse=bool(row["sparse"])
        )
        layer.expected = None if row["expected"] is None else float(row["expected"])
        layer.is_measured = bool(row["measured"])
        return layer
    if kind == "max_pool":
        pairs = [_numbers(row[n], low) for n, low in (("kernel", 1), ("stride", 1), ("padding", 0))]
        return MaxPool(pairs[0], pairs[1], pairs[2], bool(row["ceil"]))
    if kind == "add":
        if row["activation"] not in ACTIVATIONS:
            raise ValueError(f"no activation {row['activation']!r}")
        return Add(row["activation"])
    if kind == "mean":
        return Mean(bool(row["keep"]))
    return {"scale": Scale, "flatten": Flatten, "concat": Concat}[kind]()


def _numbers(pair: Any, low: int) -> tuple[int, int]:
    a, b = pair
    if not all(isinstance(n, int) and not isinstance(n, bool) and low <= n < 2**31 for n in (a, b)):
        raise ValueError(f"{pair!r} are no sizes")
    return a, b
