"""A network as an ONNX file, for other runtimes. Its zeros are written as zeros."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves, tree_map

from gossamer.errors import ArgumentError, StateError, first_line
from gossamer.outputs import difference
from gossamer.runtime import CompiledModel
from gossamer.runtime.inputs import arguments_of

_ONE_FILE = 2**31 - 2**24  # bytes of weights; protobuf's messages end at 2 GiB, and larger ones lie in a second file
_OFF = 1e-3  # beyond this, relative to the largest output, it is another network


@dataclass(frozen=True)
class Exported:
    """What was written.

    Args:
        path: the file; weights of 2 GiB and more are beside it, in one that ends in '.data'.
        nbytes: of all that was written.
        batch: whether other batch sizes than the example's may be given.
        difference: the largest difference of an output from PyTorch's, over the largest output; None where
            onnxruntime is not installed.
    """

    path: Path
    nbytes: int
    batch: bool
    difference: float | None


def export_onnx(
    model: nn.Module, example_inputs: Any, path: str | os.PathLike[str], *, batch: bool = True, check: bool = True
) -> Exported:
    """Writes a network as ONNX, and runs the file in onnxruntime, where that is installed, beside PyTorch.

    The file is written whole or not at all, and not if onnxruntime computes something else.

    Args:
        model: in eval mode, on the CPU; or compiled.
        example_inputs: a tensor, or a tuple of the arguments, or a dict of arguments by their names. Tensors may lie in
            lists and dicts.
        path: the file, such as 'model.onnx'.
        batch: lets the first axis of all inputs vary, where the network allows it.
        check: whether to compare.

    Returns:
        What was written, and how far it is off.

    Raises:
        ArgumentError: the exporter's packages are not installed, or the network cannot be exported.
        StateError: onnxruntime's outputs are not PyTorch's.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
        >>> done = export_onnx(net, torch.randn(1, 3, 8, 8), Path(tempfile.mkdtemp()) / "net.onnx")
        >>> done.batch, done.difference < 1e-5
        (True, True)
    """
    if isinstance(model, CompiledModel):
        model = model.reference()
    missing = [name for name in ("onnx", "onnxscript") if not _is_installed(name)]
    if missing:
        raise ArgumentError(f"writing ONNX needs {' and '.join(missing)}; install with: pip install onnx onnxscript")
    if model.training and not isinstance(model, GraphModule):  # a captured graph keeps the flag, and is what it is
        raise ArgumentError("the network is in training mode; export model.eval()")
    path, args = Path(path), arguments_of(model, example_inputs)
    if path.is_dir() or not path.parent.is_dir():
        raise ArgumentError(
            f"{str(path)!r} is no place for a file; give one such as 'model.onnx', in a folder that is there"
        )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".onnx-") as folder, torch.no_grad():
        made = Path(folder) / path.name
        varies = _write(model, args, made, batch)
        off = _difference(model, args, made, varies) if check and _is_installed("onnxruntime") else None
        if off is not None and not off <= _OFF:
            raise StateError(
                f"onnxruntime's outputs differ from PyTorch's by {off:.1e} of the largest one, so nothing was written; "
                "an operator of the network means something else in ONNX"
            )
        files = sorted(Path(folder).iterdir(), key=lambda f: f == made)  # the weights first, so that none is missing
        nbytes = sum(f.stat().st_size for f in files)
        for file in files:
            shutil.move(file, path.parent / file.name)
    return Exported(path, nbytes, varies, off)


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _write(model: nn.Module, args: tuple[Any, ...], path: Path, batch: bool) -> bool:
    """Writes the file, and says whether its batch size may vary."""
    nbytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    failed: Exception | None = None
    for varies in (True, False) if batch else (False,):
        given = with_batch(args, 2) if varies else args
        shapes = (
            tree_map(lambda a: {0: Dim.AUTO} if isinstance(a, Tensor) and a.ndim else None, given) if varies else None
        )
        try:
            with hushed():
                torch.onnx.export(
                    model,
                    (*given, {}) if given and isinstance(given[-1], dict) else given,  # a last dict names arguments
                    path,
                    dynamo=True,
                    dynamic_shapes=shapes,
                    external_data=nbytes > _ONE_FILE,
                    verbose=False,
                )
            return varies and _varies(path)
        except Exception as error:  # anything at all, from anywhere in PyTorch or the network
            failed = error
    # The exporter's own words are of its steps; what is wrong is in what it failed on.
    reason = failed if failed is None or failed.__cause__ is None else failed.__cause__
    raise ArgumentError(f"the network cannot be written as ONNX: {first_line(reason)}")


def _varies(path: Path) -> bool:
    import onnx

    inputs = onnx.load(str(path), load_external_data=False).graph.input
    return all(bool(i.type.tensor_type.shape.dim[0].dim_param) for i in inputs if i.type.tensor_type.shape.dim)


def _difference(model: nn.Module, args: tuple[Any, ...], path: Path, varies: bool) -> float:
    import onnxruntime as ort

    ort.set_default_logger_severity(3)
    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no base of their own
        raise StateError(
            f"onnxruntime does not read what was exported, so nothing was written: {first_line(error)}"
        ) from error
    worst = 0.0
    for given in (args, with_batch(args, 3)) if varies else (args,):
        tensors = [a for a in tree_leaves(given) if isinstance(a, Tensor)]
        got = session.run(None, {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)})
        worst = max(worst, difference(got, model(*given)))
    return worst


def with_batch(args: Sequence[Any], batch: int) -> tuple[Any, ...]:
    """Arguments whose tensors have another size along the first axis: theirs, over and over.

    Example:
        >>> with_batch((torch.tensor([[1], [2]]), 5), 3)
        (tensor([[1], [2], [1]]), 5)
    """
    return tree_map(
        lambda a: a[torch.arange(batch) % len(a)] if isinstance(a, Tensor) and a.ndim and len(a) else a, tuple(args)
    )


@contextlib.contextmanager
def hushed() -> Generator[None, None, None]:
    """Nothing is printed, warned of or logged inside: exporters and quantisers are talkative."""
    before = logging.root.manager.disable
    try:
        logging.disable(logging.WARNING)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
