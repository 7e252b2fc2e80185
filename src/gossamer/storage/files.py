"""Small files: a network's tensors as safetensors, without the zeros. docs/format.md describes every byte."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import ArgumentError, closest
from gossamer.storage.layout import DTYPES, HALVES, KEY, VERSION, dtype_name, expand, read, store
from gossamer.storage.listing import FileContents, StoredTensor
from gossamer.storage.tensors import load_tensors, save_tensors


def save(model: nn.Module | Mapping[str, Tensor], path: str | os.PathLike[str], *, values: str | None = None) -> Path:
    """Writes a network's tensors to a small file: what is zero takes a bit, or less.

    Each tensor is stored in the smallest of three ways: as it is, as a bit for each element and the values, or as a
    byte for each gap and the values. Tensors that share memory are stored once. The file is a safetensors file, written
    whole or not at all. (Sparse tensors by bitmask as in compressed-tensors, by gaps as in Han et al. 2016.)

    Args:
        model: a network, or its `state_dict`. DataParallel and torch.compile are looked through.
        path: the file, such as 'model.safetensors'.
        values: 'fp16' or 'bf16' stores the numbers of weights (floating point, two or more axes) in two bytes each;
            they come back in their own dtype, rounded. By default every bit is kept.

    Returns:
        The path.

    Raises:
        ArgumentError: something that is no dense tensor, or a number beyond fp16.

    Example:
        >>> import tempfile
        >>> layer = nn.Linear(100, 100)
        >>> _ = nn.init.zeros_(layer.weight[10:])
        >>> path = save(layer, Path(tempfile.mkdtemp()) / "layer.safetensors")
        >>> contents(path)["weight"].nbytes  # 1,000 values of 4 bytes, and 9,000 zeros in 35 bytes
        5035
    """
    return save_with(model, path, {}, values=values)


def save_with(
    model: nn.Module | Mapping[str, Tensor],
    path: str | os.PathLike[str],
    more: Mapping[str, str],
    *,
    values: str | None = None,
) -> Path:
    """The same with further texts in the header, each under a name of its own; `text_of` reads them.

    Args:
        model: as for `save`.
        path: the file.
        more: name → text.
        values: as for `save`.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> path = save_with({"w": torch.ones(2)}, Path(tempfile.mkdtemp()) / "w.safetensors", {"note": "all ones"})
        >>> text_of(path, "note")
        'all ones'
    """
    if values is not None and values not in HALVES:
        raise ArgumentError(f"values={values!r} is no way to store values. {closest(str(values), HALVES)}")
    tensors = _tensors_of(model)
    stored: dict[str, Tensor] = {}
    entries: dict[str, dict[str, Any]] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and key in first:
            entries[name] = {"as": "same", "of": first[key]}
            continue
        first[key] = name
        taken = {*tensors, *stored}
        store(name, tensor.detach().cpu(), HALVES.get(values or ""), stored, entries, taken)
    header = {"version": VERSION, "tensors": entries}
    return save_tensors(path, stored, {KEY: json.dumps(header, separators=(",", ":")), **more})


def load(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Reads what `save` wrote: a `state_dict` of dense tensors, on the CPU, for `model.load_state_dict`.

    The file is mapped into memory and expanded from there. Nothing is unpickled, nothing is run, and no more memory is
    asked for than the file's bytes account for. Any other safetensors file of dense tensors is read too.

    Args:
        path: the file.

    Returns:
        Name → tensor, in the order and dtype they were saved in.

    Raises:
        FileError: no such file, not a whole one, one of a newer version, or one that holds something else.

    Example:
        >>> import tempfile
        >>> path = save({"w": torch.tensor([0.0, 2.0])}, Path(tempfile.mkdtemp()) / "w.safetensors")
        >>> load(path)
        {'w': tensor([0., 2.])}
    """
    stored, entries = read(path)
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        tensors[name] = expand(path, name, entry, stored, tensors)
    return tensors


def text_of(path: str | os.PathLike[str], name: str) -> str | None:
    """A further text in a file's header; None where there is none of that name.

    Args:
        path: a file that `save_with` wrote.
        name: the text's.

    Raises:
        FileError: no such file, or not a whole one.
    """
    _, metadata = load_tensors(path, copy=False)
    return metadata.get(name)


def contents(path: str | os.PathLike[str]) -> FileContents:
    """What a file holds, tensor by tensor, and what each takes and saves.

    Args:
        path: a file that `save` wrote, or any other safetensors file of dense tensors.

    Returns:
        The rows and totals; `print` shows them as a table.

    Raises:
        FileError: as `load`.

    Example:
        >>> import tempfile
        >>> path = save({"w": torch.eye(64)}, Path(tempfile.mkdtemp()) / "w.safetensors")
        >>> contents(path)["w"].stored, contents(path)["w"].zeros
        ('gaps', 4032)
    """
    stored, entries = read(path)
    tensors: dict[str, Tensor] = {}
    rows: list[StoredTensor] = []
    for name, entry in entries.items():
        tensor = expand(path, name, entry, stored, tensors)
        tensors[name] = tensor
        parts = [stored[entry[part]] for part in ("index", "values") if part in entry]
        dtype, how = dtype_name(tensor), str(entry["as"])
        if how == "same":
            how = f"same as {entry['of']}"
        elif parts[-1].dtype != tensor.dtype:
            how = f"{how}, {dtype_name(parts[-1])}"
        zeros = tensor.numel() - int(torch.count_nonzero(tensor)) if "float8" not in dtype else _zeros(tensor)
        size = sum(part.nbytes for part in parts)
        dense = tensor.nbytes if parts else 0
        rows.append(StoredTensor(name, tuple(tensor.shape), dtype, how, zeros, dense, size))
    return FileContents(os.fspath(path), tuple(rows), Path(path).stat().st_size)


def _zeros(tensor: Tensor) -> int:
    return int((tensor.float() == 0).sum())


def _tensors_of(model: Any) -> dict[str, Tensor]:
    if getattr(model, "is_compiled", False) is True and hasattr(model, "explain"):
        raise ArgumentError("a compiled network has no weights of its own to save; save the one that it was made from")
    if isinstance(model, nn.Module):
        while isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        model = model.state_dict()
    if not isinstance(model, Mapping):
        hint = "; give learn.model" if hasattr(model, "model") else ""
        raise ArgumentError(f"save takes a network or its state_dict, got a {type(model).__name__}{hint}")
    for name, tensor in model.items():
        if not isinstance(name, str):
            raise ArgumentError(f"a tensor is called {name!r}; names must be strings, as in a state_dict")
        if not isinstance(tensor, Tensor):
            raise ArgumentError(
                f"{name!r} is a {type(tensor).__name__}, and the file holds tensors only; leave it out, or use "
                "save_state, which takes any state"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            kind = "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else str(tensor.layout)
            raise ArgumentError(
                f"{name!r} is a {kind} tensor, which has no dense numbers to store; make it dense first"
            )
        if tensor.dtype not in DTYPES.values():
            raise ArgumentError(f"{name!r} is of {tensor.dtype}, which safetensors cannot hold; convert it first")
    return cast("dict[str, Tensor]", dict(model))
