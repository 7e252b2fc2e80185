"""What a training step costs when the masks move after every batch, over a dense step; and the memory that a run adds.

ResNet-18 (torchvision), plain PyTorch loop, weight granularity, large_final, one_cycle to 50 %. Every sparse step has a
dense step of an equal model right beside it, in the same process, the two taking turns in who goes first; the ratio is
the median over these pairs. The schedule is that of a run of `--total-steps` steps; blocks of steps are timed around
the positions where one_cycle moves the masks most, after an untimed jump there and two untimed steps.
"""

from __future__ import annotations

import argparse
import copy
import cProfile
import gc
import pstats
import statistics
import types
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn

from common import CLOCKS, PEER, header, median_ratio, peer_module, quartiles, table
from gossamer.rules.schedules import one_cycle
from gossamer.sparsifier import Sparsifier
from gossamer.training import SparseTraining

TARGETS = {"local": 1.03, "global": 1.03}
MEMORY_TARGET = 0.26
POSITIONS = (0.3, 0.43, 0.55)
SPARSITY = 50


@dataclass
class Contestant:
    """A model in training, with what masks it."""

    name: str
    context: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    before: Callable[[float], None]  # what it does before a batch, at a position of the schedule
    after: Callable[[float], None]  # what it does after the optimizer's step
    roots: list[object]  # what it keeps
    own: set[int]  # storages that the dense model has too
    now: Callable[[], float] = CLOCKS["wall"]
    step_seconds: list[float] = field(default_factory=list)
    dense_seconds: list[float] = field(default_factory=list)
    mask_seconds: list[float] = field(default_factory=list)

    def step(self, x: Tensor, y: Tensor, position: float) -> tuple[float, float]:
        """One training step: seconds in all, and of these in masking."""
        start = self.now()
        self.before(position)
        masking = self.now() - start
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        begun = self.now()
        self.after(position)
        end = self.now()
        return end - start, masking + end - begun

    def extra_bytes(self) -> int:
        """Bytes held beyond model and optimizer."""
        own = self.own | storages(p.grad for p in self.model.parameters()).keys()
        own |= storages(v for s in self.optimizer.state.values() for v in s.values()).keys()
        return sum(n for key, n in storages(reachable([*self.roots, self.model])).items() if key not in own)


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Address → bytes of what tensors and arrays lie in, each counted once."""
    found: dict[int, int] = {}
    for t in tensors:
        if isinstance(t, Tensor):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        elif isinstance(t, np.ndarray) and t.base is None:
            found[t.ctypes.data] = t.nbytes
    return found


def reachable(roots: Iterable[object]) -> list[object]:
    """Every tensor and array that can be reached from the roots; code is not looked into."""
    code = (type, types.ModuleType, types.CodeType, types.FrameType, types.BuiltinFunctionType)
    seen: set[int] = set()
    found: list[object] = []
    stack = list(roots)
    while stack:
        item = stack.pop()
        if id(item) in seen or isinstance(item, code):
            continue
        seen.add(id(item))
        if isinstance(item, (Tensor, np.ndarray)):
            found.append(item)
        elif isinstance(item, types.FunctionType):
            stack.extend(c.cell_contents for c in item.__closure__ or ())  # not its globals
            continue
        stack.extend(gc.get_referents(item))
    return found


def nothing(position: float) -> None:
    """What a dense run does about masks."""


def optimizer_of(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=1e-3)
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-4)


def ours(model: nn.Module, context: str, optimizer: str) -> Contestant:
    model = copy.deepcopy(model)
    own = set(storages([*model.parameters(), *model.buffers()]))
    opt = optimizer_of(optimizer, model)
    run = SparseTraining(Sparsifier(model, "weight", context, "large_final"), opt, SPARSITY, "one_cycle")
    return Contestant("gossamer", context, model, opt, nothing, lambda p: void(run.step(p)), [run], own)


def peer(model: nn.Module, context: str, optimizer: str) -> Contestant | None:
    """The calls that the peer's callback makes around a batch (its before_batch and after_step, without lth)."""
    sparse, criteria, core = (peer_module(m) for m in ("sparse.all", "core.criteria", "core.schedule"))
    if sparse is None or criteria is None or core is None:
        return None
    model = copy.deepcopy(model)
    own = set(storages([*model.parameters(), *model.buffers()]))
    opt = optimizer_of(optimizer, model)
    sparsifier = sparse.Sparsifier(model, "weight", context, criteria.large_final)
    schedule = core.Schedule(core.sched_onecycle)

    def before(position: float) -> None:
        progress = schedule.progress(round(position, 3))
        if schedule.changed:
            sparsifier.sparsify_model(SPARSITY / 100 * progress, None)

    def after(position: float) -> None:
        del position
        schedule.after_step()
        sparsifier._apply_masks()

    return Contestant(PEER, context, model, opt, before, after, [sparsifier], own)


def void(value: object) -> None:
    del value


def race(contestants: list[Contestant], dense: Contestant, batches: list[tuple[Tensor, Tensor]], args: Any) -> None:
    """Times all contestants, each step beside a dense one."""
    flip = False
    for position in POSITIONS:
        for i in range(-2, args.pairs // len(POSITIONS)):
            here = position + (i + 2) / args.total_steps
            x, y = batches[i % len(batches)]
            flip = not flip
            for c in contestants:
                if flip:
                    base, _ = dense.step(x, y, here)
                total, masking = c.step(x, y, here)
                if not flip:
                    base, _ = dense.step(x, y, here)
                if i >= 0:
                    c.step_seconds.append(total)
                    c.dense_seconds.append(base)
                    c.mask_seconds.append(masking)


def zeros(model: nn.Module) -> tuple[int, int]:
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    return sum(int((w == 0).sum()) for w in weights), sum(w.numel() for w in weights)


def breakdown(contestant: Contestant, batches: list[tuple[Tensor, Tensor]], total_steps: int, steps: int = 9) -> str:
    """Where our masking spends its time: seconds of each of our functions, what it calls included."""
    masking, profile = contestant.after, cProfile.Profile(contestant.now)

    def profiled(position: float) -> None:
        profile.enable()
        masking(position)
        profile.disable()

    start = POSITIONS[-1] + 0.1
    contestant.step(*batches[0], start)
    contestant.after = profiled
    for i in range(steps):
        contestant.step(*batches[i % len(batches)], start + (i + 1) / total_steps)
    contestant.after = masking
    rows = []
    for (file, _, name), (_, calls, own, cumulative, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        label = name if "gossamer" not in file else f"{file.rsplit('gossamer', 1)[1].strip('/')}: {name}"
        rows.append((1000 * cumulative / steps, 1000 * own / steps, calls / steps, label.replace("|", "")))
    ours = sorted((r for r in rows if ".py: " in r[3]), reverse=True)[:14]
    theirs = sorted((r for r in rows if ".py: " not in r[3]), key=lambda r: -r[1])[:8]
    lines = [(label, f"{calls:.0f}", f"{own:.1f}", f"{total:.1f}") for total, own, calls, label in [*ours, *theirs]]
    return table(["function", "calls", "ms itself", "ms in all"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30, help="pairs of a sparse and a dense step (%(default)s)")
    parser.add_argument(
        "--total-steps", type=int, default=460, help="of the schedule (%(default)s: the tutorial's run)"
    )
    parser.add_argument("--optimizer", nargs="+", choices=["sgd", "adam"], default=["sgd", "adam"], help="(sgd adam)")
    parser.add_argument("--context", nargs="+", choices=["local", "global"], default=["local", "global"], help="(both)")
    parser.add_argument("--batch", type=int, default=64, help="images in a batch (%(default)s)")
    parser.add_argument("--size", type=int, default=64, help="pixels of an image's side (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (%(default)s)")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="wall, or cpu time (use one thread) (%(default)s)"
    )
    parser.add_argument("--no-peer", action="store_true", help="leave the peer out")
    parser.add_argument("--breakdown", action="store_true", help="also print where the masking spends its time")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)

    header("Training with masks that move at every batch", "gossamer", PEER, "torch", "torchvision", "numpy")
    model = torchvision.models.resnet18(num_classes=37)
    model_bytes = sum(storages([*model.parameters(), *model.buffers()]).values())
    print(
        f"ResNet-18, {args.size} px, batch {args.batch}, {args.pairs} pairs of steps, positions {POSITIONS} "
        f"of a schedule of {args.total_steps} steps, {args.clock} clock\n",
        flush=True,
    )
    shape = (args.batch, 3, args.size, args.size)
    batches = [(torch.randn(shape), torch.randint(0, 37, (args.batch,))) for _ in range(4)]
    rows, memory, details, missed = [], [], [], []
    for optimizer in args.optimizer:
        makers = [ours] if args.no_peer else [ours, peer]
        made = [maker(model, context, optimizer) for maker in makers for context in args.context]
        contestants = [c for c in made if c is not None]
        twin = copy.deepcopy(model)
        dense = Contestant("dense", "", twin, optimizer_of(optimizer, twin), nothing, nothing, [], set())
        for c in [dense, *contestants]:
            c.now = CLOCKS[args.clock]
        race(contestants, dense, batches, args)
        position = POSITIONS[-1] + (args.pairs // len(POSITIONS) + 1) / args.total_steps
        for c in contestants:
            ratio = median_ratio(c.step_seconds, c.dense_seconds)
            low, high = quartiles([t / b for t, b in zip(c.step_seconds, c.dense_seconds, strict=True)])
            of_medians = statistics.median(c.step_seconds) / statistics.median(c.dense_seconds)
            masking = statistics.median(c.mask_seconds) / statistics.median(c.dense_seconds)
            target = TARGETS[c.context] if c.name == "gossamer" else None
            verdict = "" if target is None else f"{target:.2f}"
            if target is not None:
                if ratio > target:
                    missed.append(f"{optimizer} {c.context} ({ratio:.3f} > {target})")
                found, total = zeros(c.model)
                asked = SPARSITY / 100 * one_cycle(position) * total
                assert abs(found - asked) <= len(list(c.model.modules())), f"{found} zeros for {asked:.0f} asked"
            rows.append(
                [
                    f"{optimizer}, {c.context}",
                    c.name,
                    f"{ratio:.3f}",
                    f"{low:.3f}..{high:.3f}",
                    f"{of_medians:.3f}",
                    f"{1 + masking:.3f}",
                    verdict,
                ]
            )
            extra = c.extra_bytes() / model_bytes
            is_ours = c.name == "gossamer"
            memory.append([f"{optimizer}, {c.context}", c.name, f"{extra:.3f}", MEMORY_TARGET if is_ours else ""])
            if is_ours and extra > MEMORY_TARGET:
                missed.append(f"memory {optimizer} {c.context} ({extra:.3f} > {MEMORY_TARGET})")
            if args.breakdown and is_ours:
                details.append(f"{optimizer}, {c.context}\n\n{breakdown(c, batches, args.total_steps)}\n")
    columns = ["run", "", "sparse / dense step", "quartiles", "ratio of medians", "1 + masking / dense", "at most"]
    print(table(columns, rows))
    print("\nBytes held beyond model and optimizer, over the model's bytes:\n")
    print(table(["run", "", "extra / model", "at most"], memory))
    print(f"\nTargets missed: {', '.join(missed) if missed else 'none'}.")
    if details:
        print("\nWhere a step's masking spends its time (profiled, which adds some):\n")
        print("\n".join(details))


if __name__ == "__main__":
    main()
