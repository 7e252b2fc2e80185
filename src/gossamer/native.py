"""The compiled library, by ctypes. Where it was not built there is none, and whoever asks has a plain twin at hand."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from ctypes import POINTER, c_char_p, c_double, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

_ABI = 3
_LIBRARY = "_native.so"


class View(ctypes.Structure):
    """Where a tensor's values are, as in src/native/gossamer.h, in elements."""

    _fields_ = (("channel", c_int64), ("image", c_int64))


class Value(ctypes.Structure):
    """A tensor in one of the buffers of a run."""

    _fields_ = (("buffer", c_int32), ("unused", c_int32), ("at", c_int64), ("view", View))


class Step(ctypes.Structure):
    """One operator to run."""

    _fields_ = (
        ("plan", c_void_p),
        ("a", Value),
        ("b", Value),
        ("out", Value),
        ("images", c_int64),
        ("channels", c_int64),
        ("height", c_int32),
        ("width", c_int32),
        ("out_height", c_int32),
        ("out_width", c_int32),
        ("window", c_int32 * 6),
        ("kind", c_int32),
        ("activation", c_int32),
        ("add_last", c_int32),
        ("isa", c_int32),
    )


class Use(ctypes.Structure):
    """What a layer is run on."""

    _fields_ = (
        ("images", c_int64),
        ("height", c_int32),
        ("width", c_int32),
        ("threads", c_int32),
        ("isa", c_int32),
        ("direct", c_int32),
        ("dry", c_int32),
    )


class Run(ctypes.Structure):
    """Steps, and the buffers that they run over."""

    _fields_ = (
        ("steps", c_void_p),
        ("n_steps", c_int64),
        ("buffers", POINTER(c_void_p)),
        ("strides", POINTER(c_int64)),
        ("n_buffers", c_int64),
        ("batches", c_int64),
        ("threads", c_int32),
        ("team", c_int32),
        ("seconds", POINTER(c_double)),
    )


class Sweep(ctypes.Structure):
    """The weights or the scores of a layer, and their mask, as in src/native/gossamer.h."""

    _fields_ = (
        ("keep", c_void_p),
        ("n", c_int64),
        ("n_kept", c_int64),
        ("tensors", POINTER(c_void_p)),
        ("sizes", POINTER(c_int32)),
        ("n_tensors", c_int32),
        ("kind", c_int32),
        ("scores", c_void_p),
        ("n_masked", c_int64),
        ("least", c_int64),
    )


class Group(ctypes.Structure):
    """Layers that compete for what is to be masked, as in src/native/gossamer.h."""

    _fields_ = (
        ("layers", POINTER(Sweep)),
        ("n_layers", c_int64),
        ("need", c_int64),
        ("hint", c_double),
        ("threshold", c_double),
        ("upper", c_double),
        ("left", c_int64),
        ("failed", c_int32),
    )


_FUNCTIONS: tuple[tuple[str, Any, tuple[Any, ...]], ...] = (
    ("gossamer_isa", c_char_p, (c_int32,)),
    ("gossamer_layer_new", c_void_p, (c_void_p, c_void_p, c_void_p)),
    ("gossamer_layer_free", None, (c_void_p,)),
    ("gossamer_plan_new", c_void_p, (c_void_p, POINTER(Use), POINTER(c_char_p))),
    ("gossamer_plan_free", None, (c_void_p,)),
    ("gossamer_plan_cost", c_double, (c_void_p,)),
    ("gossamer_plan_text", None, (c_void_p, c_char_p, c_int64)),
    ("gossamer_dense_cost", c_double, (c_void_p, POINTER(Use))),
    ("gossamer_run", c_int32, (POINTER(Run),)),
    ("gossamer_cache", c_int64, ()),
    ("gossamer_has_team", c_int32, ()),
    ("gossamer_count_bits", c_int64, (c_void_p, c_int64)),
    ("gossamer_count_gaps", c_int64, (c_void_p, c_int64, POINTER(c_int64))),
    ("gossamer_expand_bits", c_int32, (c_void_p, c_int64, c_void_p, c_int64, c_void_p, c_int32)),
    ("gossamer_expand_gaps", c_int32, (c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int32)),
    ("gossamer_zero", c_int32, (POINTER(Sweep), c_int32, c_int32)),
    ("gossamer_drop", None, (POINTER(Group), c_int64, c_int32, c_int32, c_int32)),
)


def find_library(folders: Iterable[str]) -> ctypes.CDLL | None:
    """The library in one of some folders, its functions typed; None where there is none of this version.

    Example:
        >>> find_library([]) is None
        True
    """
    for folder in folders:
        path = Path(folder) / _LIBRARY
        if not path.is_file():
            continue
        try:
            library = ctypes.CDLL(str(path))
            if library.gossamer_abi() != _ABI:  # of an older build
                continue
            for name, result, arguments in _FUNCTIONS:
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError):  # built for another machine
            continue
        return library
    return None


@cache
def native() -> Any:
    """The library's functions, or None where the package was installed without a C++ compiler."""
    return find_library(sys.modules[__name__.partition(".")[0]].__path__)
