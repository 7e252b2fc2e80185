"""The compiled library under sanitizers, over shapes drawn at random.

The programs are in `sanitized/`, and check their numbers too. Buffers end where tensors end, so that one float
too far is found.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src" / "native"
PROGRAMS = Path(__file__).parent / "sanitized"
IS_X86 = platform.machine() in ("x86_64", "AMD64")
_WIDE = ["-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma"]
ISAS = {"baseline": (4, []), "avx2": (8, ["-mavx2", "-mfma"]), "avx512_256": (8, _WIDE), "avx512": (16, _WIDE)}
ISAS = ISAS if IS_X86 else {"baseline": ISAS["baseline"]}

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' run time is looked for on Linux"),
]


def engine(without: Iterable[str] = ()) -> list[Path]:
    """The engine's own sources; selection's are a test of their own."""
    return [s for s in sorted(SOURCES.glob("*.cpp")) if s.stem not in ("sweep", "select", "scores", *without)]


def kernels(name: str, isas: Iterable[str]) -> list[tuple[Path, list[str]]]:
    """A source that is compiled once for each instruction set."""
    made = [(isa, f"-DGOSSAMER_LANES={ISAS[isa][0]}", *ISAS[isa][1]) for isa in isas]
    return [(SOURCES / name, [f"-DGOSSAMER_ISA={isa}", *flags]) for isa, *flags in made]


def run(folder: Path, sanitizers: str, flags: list[str], sources: Iterable[tuple[Path, list[str]]]) -> str:
    """Compiles, links and runs a program, and gives what it printed; skips where the compiler has no such sanitizer."""
    common = ["c++", "-std=gnu++17", "-g1", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", f"-I{SOURCES}"]
    jobs = [
        [*common, *flags, *own, "-c", str(source), "-o", f"{i}_{source.stem}.o"]
        for i, (source, own) in enumerate(sources)
    ]
    with ThreadPoolExecutor(2) as two:
        list(two.map(lambda job: subprocess.run(job, cwd=folder, check=True), jobs))
    link = ["c++", f"-fsanitize={sanitizers}", *(job[-1] for job in jobs), "-o", "program", "-pthread", "-ldl"]
    linked = subprocess.run(link, cwd=folder, capture_output=True, text=True, check=False)
    if linked.returncode and "san" in linked.stderr:
        pytest.skip("the compiler has no such sanitizer")
    assert linked.returncode == 0, linked.stderr
    # The thread pool lives as long as the process, by design.
    options = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1", "TSAN_OPTIONS": "exitcode=66"}
    done = subprocess.run(
        [folder / "program"], capture_output=True, text=True, env={**os.environ, **options}, check=False
    )
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("this kernel places memory where the sanitizer cannot have it")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_no_access_outside_and_nothing_undefined(tmp_path: Path) -> None:
    sources = [(s, []) for s in (*engine(), PROGRAMS / "layers.cpp")]
    sources += [*kernels("float32/rows.cpp", ISAS), *kernels("float32/planes.cpp", ISAS)]
    printed = run(tmp_path, "address,undefined", ["-O0"], sources)
    assert "150 rounds" in printed
    ways = {"depthwise", "in place", "tile", "tile of several", "tokens"}
    assert set(printed.split(", ")[2:]) - {"depthwise by rows"} == ways, printed
    assert ("depthwise by rows" in printed) == any("avx512" in isa for isa in ISAS), printed


def test_threads_that_share_layers_and_the_pool_do_not_race(tmp_path: Path) -> None:
    sources = [(s, []) for s in (*engine(without=["machine", "codec"]), PROGRAMS / "baseline.cpp")]
    sources += [(PROGRAMS / "threads.cpp", []), *kernels("float32/rows.cpp", ["baseline"])]
    sources += kernels("float32/planes.cpp", ["baseline"])
    assert run(tmp_path, "thread", ["-O1"], sources) == "192 runs"


def test_selection_stays_inside_and_is_exact_on_any_bytes(tmp_path: Path) -> None:
    once = [*(SOURCES / f"{name}.cpp" for name in ("select", "scores", "isa", "pool")), PROGRAMS / "select.cpp"]
    sources = [(s, []) for s in once] + kernels("sweep.cpp", [isa for isa in ISAS if isa != "avx512_256"])
    assert "600 selections" in run(tmp_path, "address,undefined", ["-O1"], sources)
