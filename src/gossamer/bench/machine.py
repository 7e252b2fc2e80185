"""What a measurement must name: the machine, and the versions of what ran on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch


def machine() -> str:
    """The CPU's name, its cores that this process may use, and the threads that torch uses.

    Example:
        >>> machine().endswith(platform.system())
        True
    """
    counts = [
        f"{n} {what}{'' if n == 1 else 's'}" for n, what in ((cores(), "core"), (torch.get_num_threads(), "thread"))
    ]
    return f"{_cpu_name()}, {counts[0]}, {counts[1]} used, {platform.system()}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    simd = {"avx512f", "avx2"} & set(next((line.split() for line in lines if line.startswith("flags")), []))
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({'AVX-512' if 'avx512f' in simd else 'AVX2'})" if simd else name


def cores() -> int:
    """Cores that this process may use.

    Example:
        >>> cores() >= 1
        True
    """
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load() -> float:
    """Processes that wanted a core in the last minute, on average; this one too.

    Example:
        >>> load() >= 0
        True
    """
    return os.getloadavg()[0]


def version(distribution: str) -> str | None:
    """A distribution's version, or None where it is not installed.

    Example:
        >>> version("torch") == torch.__version__.partition("+")[0], version("no-such-thing")
        (True, None)
    """
    try:
        return importlib.metadata.version(distribution).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def is_installed(distribution: str) -> bool:
    """Whether a distribution is installed.

    Example:
        >>> is_installed("torch")
        True
    """
    return version(distribution) is not None
