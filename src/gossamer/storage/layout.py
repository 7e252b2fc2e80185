"""How does a tensor lie in a file? The smallest of its forms, and the header's entry that says which."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ArgumentError, FileError
from gossamer.storage.encoding import Encoded, decode, encode
from gossamer.storage.tensors import load_tensors

KEY, VERSION = "gossamer", 1
HALVES: Mapping[str, torch.dtype] = MappingProxyType({"fp16": torch.float16, "bf16": torch.bfloat16})
_HEADER = 512  # bytes that must be saved, since a second entry takes some 200 in the header
_KINDS = ("bits", "gaps")
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        str(dtype).removeprefix("torch."): dtype
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
            *(torch.int64, torch.int32, torch.int16, torch.int8, torch.bool),
            *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
            *(torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz),
        )
    }
)


def store(
    name: str,
    tensor: Tensor,
    half: torch.dtype | None,
    stored: dict[str, Tensor],
    entries: dict[str, dict[str, Any]],
    taken: Iterable[str],
) -> None:
    """Puts the smallest form of a tensor among those to be written, and what it is into the header.

    Args:
        name: the tensor's.
        tensor: on the CPU.
        half: the dtype that a weight's values are narrowed to, or None.
        stored: what is to be written, which grows.
        entries: the header, which grows.
        taken: names that are no longer free.

    Raises:
        ArgumentError: a value that the narrower dtype cannot hold.

    Example:
        >>> stored, entries = {}, {}
        >>> store("w", torch.eye(64), None, stored, entries, ["w"]); entries["w"]["as"], list(stored)
        ('gaps', ['w:gaps', 'w:values'])
    """
    dtype = dtype_name(tensor)
    encoded = encode(tensor)
    values: Tensor = encoded.values
    narrow = half is not None and tensor.is_floating_point() and tensor.ndim > 1 and tensor.element_size() > 2
    dense = tensor
    if narrow:
        assert half is not None
        values, dense = _narrow(name, values, half), tensor.to(half)
    if encoded.index.nbytes + values.nbytes + _HEADER < dense.nbytes:
        keys = {part: _free(f"{name}:{part}", taken) for part in (encoded.kind, "values")}
        stored[keys[encoded.kind]], stored[keys["values"]] = encoded.index, values
        entries[name] = {
            "as": encoded.kind,
            "dtype": dtype,
            "shape": list(tensor.shape),
            "index": keys[encoded.kind],
            "values": keys["values"],
        }
        return
    stored[name] = dense
    entries[name] = {"as": "dense", "dtype": dtype, "values": name}


def _narrow(name: str, values: Tensor, half: torch.dtype) -> Tensor:
    narrow = values.to(half)
    lost = torch.isfinite(values) & ~torch.isfinite(narrow)
    if bool(lost.any()):
        raise ArgumentError(
            f"{name!r} has the value {float(values[lost][0]):g}, which is beyond {half}; use values='bf16', or none"
        )
    return narrow


def _free(name: str, taken: Iterable[str]) -> str:
    while name in taken:
        name += ":"
    return name


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What a file stores, and its header; that of a foreign file is made up.

    Args:
        path: the file.

    Returns:
        Name → tensor as it is stored, and name → entry of the header.

    Raises:
        FileError: no such file, not a whole one, one of a newer version, or one that holds something else.
    """
    stored, metadata = load_tensors(path, copy=False)
    where = repr(os.fspath(path))
    if KEY not in metadata:
        if "tree" in metadata:
            raise FileError(f"{where} holds a {metadata.get('kind', 'state')}, not a network's tensors; use load_state")
        return stored, {name: {"as": "dense", "dtype": dtype_name(t), "values": name} for name, t in stored.items()}
    try:
        header: Any = json.loads(metadata[KEY])
        version, entries = header["version"], header["tensors"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FileError(f"{where} has a damaged header; take another copy") from None
    if version != VERSION:
        raise FileError(
            f"{where} is of version {version!r} of the format; this Gossamer reads version {VERSION}, so install a "
            "newer one"
        )
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise FileError(f"{where} has a damaged header; take another copy")
    return stored, entries


def dtype_name(tensor: Tensor) -> str:
    """A tensor's dtype as the header has it.

    Example:
        >>> dtype_name(torch.ones(1))
        'float32'
    """
    return str(tensor.dtype).removeprefix("torch.")


def expand(
    path: str | os.PathLike[str],
    name: str,
    entry: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    done: Mapping[str, Tensor],
) -> Tensor:
    """A tensor as it was saved.

    Args:
        path: the file, for the message.
        name: the tensor's.
        entry: of the header.
        stored: what the file stores.
        done: tensors that were expanded before it, one of which it may be the same as.

    Raises:
        FileError: the entry and what is stored do not fit.
    """
    try:
        return _expand(entry, stored, done)
    except (FileError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise FileError(f"{os.fspath(path)!r} is damaged: tensor {name!r} has {what}; take another copy") from None


def _expand(entry: Mapping[str, Any], stored: Mapping[str, Tensor], done: Mapping[str, Tensor]) -> Tensor:
    if entry["as"] == "same":
        return done[entry["of"]]
    dtype, values = DTYPES[entry["dtype"]], stored[entry["values"]]
    if values.dtype != dtype and not (values.dtype in HALVES.values() and dtype.is_floating_point):
        raise FileError(f"values of {values.dtype} for {dtype}")
    if entry["as"] == "dense":
        return values.to(dtype, copy=True)
    if entry["as"] not in _KINDS:
        raise FileError(f"an unknown encoding {entry['as']!r}")
    return decode(Encoded(entry["as"], stored[entry["index"]], values), _shape(entry["shape"]), dtype)


def _shape(sizes: Any) -> tuple[int, ...]:
    fits = isinstance(sizes, Sequence) and not isinstance(sizes, str) and len(sizes) <= 64
    if not fits or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**48 for n in sizes):
        raise FileError(f"the shape {str(sizes)[:80]}")
    return tuple(sizes)
