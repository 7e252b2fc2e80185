"""Safetensors files, written whole or not at all, read without running anything."""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from gossamer.errors import ArgumentError, FileError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_FORGOTTEN = 3600  # seconds after which a temporary file is nobody's, where locks do not say; writing takes far less


def write_whole(path: str | os.PathLike[str], content: bytes) -> Path:
    """Writes a file so that, whatever happens, its name holds the old content or the new, never a part.

    Args:
        path: the file; missing folders are made.
        content: all of its bytes.

    Returns:
        The path.

    Example:
        >>> import tempfile
        >>> write_whole(Path(tempfile.mkdtemp()) / "deep" / "a.bin", b"abc").read_bytes()
        b'abc'
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"a file to write must be a path, got {path!r}; give a str or a pathlib.Path")
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{str(path)!r} is a folder; name a file in it")
    whole = Path(os.path.realpath(path))  # else a link would be replaced, and what it points to stay old
    whole.parent.mkdir(parents=True, exist_ok=True)
    for left in whole.parent.glob(f".{glob.escape(whole.name)}.*.tmp"):
        _sweep(left)
    handle, temporary = _open_temporary(whole)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(temporary, 0o666 & ~mask)  # mkstemp's own mode would lock everybody else out
            if fcntl is not None:
                os.replace(temporary, whole)  # still locked, so that nobody sweeps it away before
        if fcntl is None:
            os.replace(temporary, whole)  # Windows moves no file that is open
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _open_temporary(whole: Path) -> tuple[int, str]:
    """A new file beside another, locked for as long as its writer lives."""
    while True:
        handle, temporary = tempfile.mkstemp(dir=whole.parent, prefix=f".{whole.name}.", suffix=".tmp")
        if fcntl is None:
            return handle, temporary
        with contextlib.suppress(OSError):  # a file system without locks, where age alone decides
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, temporary
        os.close(handle)  # swept away by another writer before it was locked


def _sweep(left: Path) -> None:
    """Removes a temporary file whose writer was killed: its lock is free, or it is old."""
    try:
        if fcntl is not None:
            with left.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    return  # somebody is writing it
                left.unlink()
                return
    except OSError:  # another writer has just renamed it, or there are no locks here
        pass
    with contextlib.suppress(OSError):
        if time.time() - left.stat().st_mtime > _FORGOTTEN:
            left.unlink()


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Writes tensors and metadata to a safetensors file, whole or not at all.

    Args:
        path: the file.
        tensors: name → tensor, on any device; tensors may share memory.
        metadata: strings for the header.

    Returns:
        The path.

    Example:
        >>> import tempfile, torch
        >>> path = save_tensors(Path(tempfile.mkdtemp()) / "t.safetensors", {"a": torch.ones(2)}, {"kind": "test"})
        >>> load_tensors(path)[0]["a"]
        tensor([1., 1.])
    """
    ready = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    return write_whole(path, save(ready, metadata=dict(metadata)))


def load_tensors(path: str | os.PathLike[str], *, copy: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads a safetensors file.

    Args:
        path: the file.
        copy: whether the tensors are copies; else they are the file itself, mapped, for whoever reads them once, at
            once: they change with the file, and one that somebody cuts short later would kill the process.

    Returns:
        Tensors by name, on the CPU, and the metadata of the header.

    Raises:
        ArgumentError: the path is no path.
        FileError: it does not exist, cannot be read, or is no whole safetensors file.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ArgumentError(f"a file to load must be a path, got {path!r}; give a str or a pathlib.Path")
    path = Path(path)
    if path.is_dir():
        raise FileError(f"{str(path)!r} is a folder; name a file in it")
    if not path.is_file():
        raise FileError(f"there is no file {str(path)!r}")
    try:
        path.open("rb").close()  # safe_open says that a file is not there where it may not be read
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be read ({error.strerror}); see that you have the right to") from None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if copy:
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            return tensors, dict(file.metadata() or {})
    except Exception as error:  # a mangled header can make torch and safetensors raise more than their own errors
        with path.open("rb") as start:
            if start.read(4) == b"PK\x03\x04":
                raise FileError(
                    f"{str(path)!r} is no safetensors file; it looks like one of torch.save, which torch.load reads"
                ) from None
        raise FileError(
            f"{str(path)!r} is no whole safetensors file ({error}); it may be truncated or of another kind, so take "
            "another copy"
        ) from None
