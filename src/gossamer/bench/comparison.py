"""One network by every engine: outputs compared, then timed in turns; a row an engine."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import runtime
from gossamer.bench.clock import alternating, median_ratio, quartiles, seconds
from gossamer.bench.engines import ENGINES, INT8, Engine, Job, UnavailableError
from gossamer.bench.machine import cores, load, machine, version
from gossamer.errors import ArgumentError, closest, first_line
from gossamer.outputs import difference
from gossamer.runtime import CompiledModel
from gossamer.runtime.inputs import arguments_of

_OFF = 1e-3  # beyond this, relative to the largest output, it is no time of the same network


@dataclass(frozen=True)
class EngineRow:
    """One row of a comparison.

    Args:
        engine: its name.
        version: of the distribution; empty where the engine did not run.
        seconds: of one call, one a round; empty where it was not timed.
        ratio: median over the rounds of its time over Gossamer's.
        nbytes: of the file that it needs: weights, or the network.
        difference: the largest difference of its outputs from eager PyTorch's, over the largest output.
        note: why it was not timed.
    """

    engine: str
    version: str = ""
    seconds: tuple[float, ...] = ()
    ratio: float | None = None
    nbytes: int | None = None
    difference: float | None = None
    note: str = ""

    @property
    def ms(self) -> float | None:
        """The median, in milliseconds a call."""
        return 1e3 * statistics.median(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Comparison:
    """A network by every engine.

    Args:
        rows: one an engine, in the order they were asked for.
        inputs: the tensors that went in, such as 'float32 1×3×224×224'.
        sparsity: zeros in percent of the weights (tensors of two or more axes).
        dense_bytes: of all weights in memory.
        sparse_bytes: of the compiled network's file.
        threads: of every engine.
        machine: the processor.
        cores: that this process may use.
        load: processes that wanted a core in the minute before, on average.
    """

    rows: tuple[EngineRow, ...]
    inputs: tuple[str, ...]
    sparsity: float
    dense_bytes: int
    sparse_bytes: int
    threads: int
    machine: str
    cores: int
    load: float

    def __getitem__(self, engine: str) -> EngineRow:
        for row in self.rows:
            if row.engine == engine:
                return row
        raise ArgumentError(f"no engine is called {engine!r}. {closest(engine, (r.engine for r in self.rows))}")

    def to_dict(self) -> dict[str, Any]:
        """As plain values: 'engines', a list of rows with 'ms' and 'quartiles_ms', and what holds for all of them."""
        values = asdict(self)
        values["engines"] = [
            {**row, "ms": r.ms, "quartiles_ms": [1e3 * q for q in quartiles(r.seconds)] if r.seconds else None}
            for row, r in zip(values.pop("rows"), self.rows, strict=True)
        ]
        return values

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    def __str__(self) -> str:
        return "\n".join(_table(self))


def compare(
    model: nn.Module | CompiledModel,
    example_inputs: Any,
    *,
    engines: Iterable[str] | None = None,
    threads: int | None = None,
    rounds: int = 7,
    say: Callable[[str], object] = str,
) -> Comparison:
    """Times a network in every engine of this machine, on the same inputs.

    Outputs are compared with eager PyTorch's first; an engine that computes something else is not timed (those in int8
    are, with their difference in the row). Then all take turns, another one first in each round, each only once no
    thread of the others computes any more.

    Args:
        model: in eval mode, on the CPU; or one that is compiled.
        example_inputs: a tensor, or a tuple of the arguments; where the network is not compiled, also a dict of them,
            by name.
        engines: names out of `ENGINES`, in the order of the rows; by default all but those in int8. 'eager' and
            'gossamer' are always there.
        threads: of each engine; by default as many as torch uses.
        rounds: how often each has its turn.
        say: is told what is being done, for who waits.

    Returns:
        A row an engine; those that are not installed, or cannot run the network, say so in their note.

    Raises:
        ArgumentError: an unknown engine, no rounds, or a network that cannot be compiled.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
        >>> found = compare(net, torch.randn(1, 3, 16, 16), engines=["eager"], rounds=1)
        >>> [row.engine for row in found.rows], found["gossamer"].ratio
        (['eager', 'gossamer'], 1.0)
    """
    names = list(dict.fromkeys([*(e for e in ENGINES if e not in INT8)] if engines is None else engines))
    for name in names:
        if name not in ENGINES:
            raise ArgumentError(f"engines: no engine is called {name!r}. {closest(name, ENGINES)}")
    names = [*(["eager"] if "eager" not in names else []), *names, *(["gossamer"] if "gossamer" not in names else [])]
    if rounds < 1 or (threads is not None and threads < 1):
        raise ArgumentError(f"rounds={rounds}, threads={threads}: each must be at least 1")
    examples = arguments_of(model, example_inputs)
    busy = load()
    with _threads(threads), tempfile.TemporaryDirectory() as folder, torch.no_grad():
        say("compiling")
        fast = model if isinstance(model, CompiledModel) else runtime.compile(model, examples)
        plain = model.reference() if isinstance(model, CompiledModel) else model
        job = Job(plain, fast, examples, torch.get_num_threads(), Path(folder))
        rows, ready = _get_ready(names, job, say)
        say(f"timing {len(ready)} engines")
        times = alternating(rounds, {n: (lambda e=e: seconds(e.call)) for n, e in ready.items()}, warmup=0)
        done = tuple(
            EngineRow(
                row.engine,
                row.version,
                tuple(times[row.engine]),
                median_ratio(times[row.engine], times["gossamer"]),
                row.nbytes,
                row.difference,
            )
            if row.engine in times
            else row
            for row in rows
        )
        return Comparison(
            done,
            tuple(f"{str(t.dtype).removeprefix('torch.')} {'×'.join(map(str, t.shape))}" for t in job.tensors),
            _sparsity(plain),
            ready["eager"].nbytes,
            ready["gossamer"].nbytes,
            job.threads,
            machine(),
            cores(),
            busy,
        )


@contextmanager
def _threads(threads: int | None) -> Generator[None, None, None]:
    before = torch.get_num_threads()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)


def _get_ready(
    names: Sequence[str], job: Job, say: Callable[[str], object]
) -> tuple[list[EngineRow], dict[str, Engine]]:
    try:
        want = job.model(*job.examples)
    except Exception as error:  # anything at all, from anywhere in the network
        raise ArgumentError(f"the network does not run on the example inputs: {first_line(error)}") from error
    rows: list[EngineRow] = []
    ready: dict[str, Engine] = {}
    for name in names:
        say(f"preparing {name}")
        try:
            engine = ENGINES[name](job)
            off = difference(engine.call(), want)
        except UnavailableError as error:
            rows.append(EngineRow(name, note=str(error)))
            continue
        except Exception as error:  # anything at all, from anywhere in the engine
            if name in ("eager", "gossamer"):
                raise
            rows.append(EngineRow(name, note=f"cannot run it: {first_line(error)}"))
            continue
        wrong = not off <= _OFF and name not in INT8
        note = f"computes something else: off by {off:.1e} of the largest output" if wrong else ""
        rows.append(EngineRow(name, engine.version, (), None, engine.nbytes, off, note))
        if not wrong:
            ready[name] = engine
        elif name == "gossamer":
            raise ArgumentError(f"the compiled network {note}")
    return rows, ready


def _sparsity(model: nn.Module) -> float:
    weights = [t for t in model.state_dict().values() if isinstance(t, Tensor) and t.ndim > 1]
    total = sum(w.numel() for w in weights)
    return 100 * (1 - sum(int(torch.count_nonzero(w)) for w in weights) / total) if total else 0.0


def _table(what: Comparison) -> Iterator[str]:
    threads = f"{what.threads} thread{'' if what.threads == 1 else 's'}"
    share = 100 * what.sparse_bytes / max(what.dense_bytes, 1)
    sizes = f"{_size(what.dense_bytes)} dense, {_size(what.sparse_bytes)} sparse ({share:.1f} %)"
    yield f"{', '.join(what.inputs)}; {threads}; {what.sparsity:.2f} % zeros; {sizes}"
    yield f"on {what.machine}, torch {version('torch')}"
    yield ""
    width = max(len(r.engine) for r in what.rows)

    def line(engine: str, version: str, ms: str, spread: str, ratio: str, size: str, off: str) -> str:
        return f"{engine:<{width}}  {version:<9} {ms:>9} {spread:>17} {ratio:>10} {size:>9} {off:>7}"

    head = line("Engine", "Version", "ms/call", "Quartiles", "/ Gossamer", "File", "Off by")
    yield head
    yield "-" * len(head)
    for r in what.rows:
        if r.ms is None or r.ratio is None:
            yield f"{r.engine:<{width}}  {r.note}"
            continue
        low, high = (f"{1e3 * q:.2f}" for q in quartiles(r.seconds))
        off = f"{r.difference:.0e}" if r.difference else "0"
        yield line(r.engine, r.version, f"{r.ms:.2f}", f"{low}..{high}", f"{r.ratio:.2f}", _size(r.nbytes or 0), off)
    if what.load > what.cores:
        yield ""
        yield (
            f"Other work kept this machine busy (load {what.load:.1f} on {what.cores} cores). Engines with several "
            "threads suffer most from that; measure again when it is quiet, or with one thread."
        )


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.1f} kB"
