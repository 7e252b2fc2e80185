"""Times that can be compared: nobody else's threads run, everybody takes turns, and ratios are of the same round."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_LOOK = 0.01  # seconds between two looks at the process's clock


def settle(most: float = 1.0) -> bool:
    """Waits until no thread of this process computes.

    Pools of threads spin for a while after a call, to be quick at the next one: ONNX Runtime's for some 20 ms of every
    core, in which another engine has half a machine.

    Args:
        most: seconds to wait at most.

    Returns:
        Whether they rest.

    Example:
        >>> settle()
        True
    """
    calm, end = 0, time.perf_counter() + most
    while calm < 2 and time.perf_counter() < end:
        before = time.process_time()
        time.sleep(_LOOK)
        calm = calm + 1 if time.process_time() - before < _LOOK / 10 else 0
    return calm == 2


def seconds(call: Callable[[], Any], atleast: float = 0.06) -> float:
    """Of one call: the mean over as many as take a while, once others rest.

    What comes before them is not counted, since others have used the caches, and threads that slept have to wake up.

    Args:
        call: what is timed.
        atleast: seconds to time calls for.

    Returns:
        Seconds of one call.

    Example:
        >>> 0.01 < seconds(lambda: time.sleep(0.01), atleast=0.02) < 1
        True
    """
    settle()
    began = time.perf_counter()
    while True:
        call()
        if time.perf_counter() - began > atleast / 4:
            break
    n, began = 0, time.perf_counter()
    while True:
        call()
        n += 1
        took = time.perf_counter() - began
        if took > atleast:
            return took / n


def alternating(rounds: int, jobs: Mapping[str, Callable[[], float]], warmup: int = 1) -> dict[str, list[float]]:
    """The seconds that each job says it took, round by round: all jobs in every round, another one first each time.

    Whatever slows the machine for a while then slows all of them.

    Args:
        rounds: how many.
        jobs: name → what takes the time of one job.
        warmup: rounds before those that count.

    Returns:
        Name → seconds, one a round.

    Example:
        >>> alternating(2, {"a": lambda: 1.0, "b": lambda: 2.0})
        {'a': [1.0, 1.0], 'b': [2.0, 2.0]}
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for i in range(-warmup, rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            took = jobs[name]()
            if i >= 0:
                times[name].append(took)
    return times


def median_ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of time over base's time of the same round.

    Example:
        >>> median_ratio([2.0, 40.0, 3.0], [1.0, 20.0, 1.0])
        2.0
    """
    return statistics.median(t / b for t, b in zip(times, base, strict=True))


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The lower and the upper quartile.

    Example:
        >>> quartiles([1.0, 2.0, 3.0, 4.0, 5.0])
        (2.0, 4.0)
    """
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
