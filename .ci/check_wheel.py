"""Loads the compiled library of the installed package and calls it, in an environment that may be empty of torch."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from pathlib import Path

found = importlib.util.find_spec("gossamer")  # finds the package without importing it, which would ask for torch
if found is None or found.origin is None:
    sys.exit("gossamer is not installed")
folder = Path(found.origin).parent
spec = importlib.util.spec_from_file_location("native", folder / "native.py")
assert spec is not None
assert spec.loader is not None
native = importlib.util.module_from_spec(spec)
sys.modules["native"] = native
spec.loader.exec_module(native)
library = native.find_library([str(folder)])
if library is None:
    sys.exit(f"the library in {folder.name}/ is missing, of another version, or of another machine")
bits = (ctypes.c_uint8 * 2)(0b101, 0b1)
assert library.gossamer_count_bits(ctypes.byref(bits), 16) == 3
names = [library.gossamer_isa(i) for i in range(8)]
print("the library works;", "it has kernels for", ", ".join(n.decode() for n in names if n))
