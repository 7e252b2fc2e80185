"""Small files: a network's tensors as safetensors, without the zeros. docs/format.md describes every byte."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import ArgumentError, FileError, closest
from gossamer.storage.encoding import Encoded, decode, encode
from gossamer.storage.tensors import load_tensors, save_tensors

_KEY, _VERSION = "gossamer", 1
_HALVES: Mapping[str, torch.dtype] = MappingProxyType({"fp16": torch.float16, "bf16": torch.bfloat16})
_HEADER = 512  # bytes that must be saved, since a second entry takes some 200 in the header
_KINDS = ("bits", "gaps")
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
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
    if values is not None and values not in _HALVES:
        raise ArgumentError(f"values={values!r} is no way to store values. {closest(str(values), _HALVES)}")
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
        _store(name, tensor.detach().cpu(), _HALVES.get(values or ""), stored, entries, taken)
    header = {"version": _VERSION, "tensors": entries}
    return save_tensors(path, stored, {_KEY: json.dumps(header, separators=(",", ":")), **more})


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
    stored, entries = _read(path)
    tensors: dict[str, Tensor] = {}
    for name, entry in entries.items():
        tensors[name] = _guarded(path, name, lambda name=name, entry=entry: _expand(name, entry, stored, tensors))
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


@dataclass(frozen=True)
class StoredTensor:
    """One row of a file's contents.

    Args:
        name: the tensor's.
        shape: its shape.
        dtype: its dtype when loaded.
        stored: 'dense', 'bits' or 'gaps', with the values' dtype where that is another; 'same as …' where it is shared.
        zeros: elements that are exactly 0.
        dense_bytes: what it takes in memory; 0 where it is shared.
        nbytes: what it takes in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    stored: str
    zeros: int
    dense_bytes: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Elements."""
        return torch.Size(self.shape).numel()

    @property
    def share(self) -> float:
        """Bytes in the file in percent of those in memory."""
        return 100 * self.nbytes / self.dense_bytes if self.dense_bytes else 0.0


@dataclass(frozen=True)
class FileContents:
    """What a file holds: a row a tensor, and totals.

    Args:
        path: the file.
        rows: one `StoredTensor` a tensor, in the file's order.
        file_bytes: the whole file, header and all.
    """

    path: str
    rows: tuple[StoredTensor, ...]
    file_bytes: int

    def __getitem__(self, name: str) -> StoredTensor:
        for row in self.rows:
            if row.name == name:
                return row
        raise ArgumentError(f"no tensor {name!r} in {self.path!r}. {closest(name, (r.name for r in self.rows))}")

    @property
    def dense_bytes(self) -> int:
        """What all tensors take in memory."""
        return sum(r.dense_bytes for r in self.rows)

    @property
    def share(self) -> float:
        """The file in percent of the tensors in memory."""
        return 100 * self.file_bytes / self.dense_bytes if self.dense_bytes else 100.0

    def to_json(self) -> str:
        """Rows and totals as JSON."""
        rows = [{**asdict(r), "share": round(r.share, 4)} for r in self.rows]
        totals = {"path": self.path, "file_bytes": self.file_bytes, "dense_bytes": self.dense_bytes}
        return json.dumps({**totals, "share": round(self.share, 4), "tensors": rows}, indent=2)

    def __str__(self) -> str:
        return "\n".join(_table(self))


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
    stored, entries = _read(path)
    tensors: dict[str, Tensor] = {}
    rows: list[StoredTensor] = []
    for name, entry in entries.items():
        tensor = _guarded(path, name, lambda name=name, entry=entry: _expand(name, entry, stored, tensors))
        tensors[name] = tensor
        parts = [stored[entry[part]] for part in ("index", "values") if part in entry]
        dtype, how = _name(tensor), str(entry["as"])
        if how == "same":
            how = f"same as {entry['of']}"
        elif parts[-1].dtype != tensor.dtype:
            how = f"{how}, {_name(parts[-1])}"
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
        if tensor.dtype not in _DTYPES.values():
            raise ArgumentError(f"{name!r} is of {tensor.dtype}, which safetensors cannot hold; convert it first")
    return cast("dict[str, Tensor]", dict(model))


def _store(
    name: str,
    tensor: Tensor,
    half: torch.dtype | None,
    stored: dict[str, Tensor],
    entries: dict[str, dict[str, Any]],
    taken: Iterable[str],
) -> None:
    """Puts the smallest form of a tensor among those to be written, and what it is into the header."""
    dtype = _name(tensor)
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


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What a file stores, and its header; that of a foreign file is made up."""
    stored, metadata = load_tensors(path, copy=False)
    where = repr(os.fspath(path))
    if _KEY not in metadata:
        if "tree" in metadata:
            raise FileError(f"{where} holds a {metadata.get('kind', 'state')}, not a network's tensors; use load_state")
        return stored, {name: {"as": "dense", "dtype": _name(t), "values": name} for name, t in stored.items()}
    try:
        header: Any = json.loads(metadata[_KEY])
        version, entries = header["version"], header["tensors"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise FileError(f"{where} has a damaged header; take another copy") from None
    if version != _VERSION:
        raise FileError(
            f"{where} is of version {version!r} of the format; this Gossamer reads version {_VERSION}, so install a "
            "newer one"
        )
    if not isinstance(entries, dict) or not all(isinstance(e, dict) for e in entries.values()):
        raise FileError(f"{where} has a damaged header; take another copy")
    return stored, entries


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _guarded(path: Any, name: str, expand: Any) -> Tensor:
    try:
        return expand()
    except (FileError, KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise FileError(f"{os.fspath(path)!r} is damaged: tensor {name!r} has {what}; take another copy") from None


def _expand(name: str, entry: Mapping[str, Any], stored: Mapping[str, Tensor], done: Mapping[str, Tensor]) -> Tensor:
    if entry["as"] == "same":
        return done[entry["of"]]
    dtype, values = _DTYPES[entry["dtype"]], stored[entry["values"]]
    if values.dtype != dtype and not (values.dtype in _HALVES.values() and dtype.is_floating_point):
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


def _table(what: FileContents) -> Iterable[str]:
    names = [
        (r.name, "×".join(map(str, r.shape)) or "scalar", f"dense {r.dtype}" if r.stored == "dense" else r.stored)
        for r in what.rows
    ]
    titles = ("Tensor", "Shape", "Stored as")
    widths = [max(map(len, column)) for column in zip(titles, *names, strict=True)]
    widths[0] = max(widths[0], 15)

    def line(texts: Iterable[str], zeros: str, dense: str, size: str, share: str) -> str:
        left = "  ".join(f"{text:<{width}}" for text, width in zip(texts, widths, strict=True))
        return f"{left} {zeros:>8} {dense:>13} {size:>13} {share:>8}"

    head = line(titles, "Zeros", "In memory", "In file", "Share")
    yield head
    yield "-" * len(head)
    for r, texts in zip(what.rows, names, strict=True):
        zeros = 100 * r.zeros / r.numel if r.numel else 0.0
        yield line(texts, f"{zeros:.2f}%", f"{r.dense_bytes:,}", f"{r.nbytes:,}", f"{r.share:.2f}%")
    yield "-" * len(head)
    yield line(("File and header", "", ""), "", f"{what.dense_bytes:,}", f"{what.file_bytes:,}", f"{what.share:.2f}%")
