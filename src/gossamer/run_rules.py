"""Is a state of a run by these rules? What a run was asked to do, as plain values that two runs can be compared by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from fractions import Fraction
from itertools import zip_longest
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor

from gossamer.errors import FileError
from gossamer.methods import Method, gradual
from gossamer.rules.criteria import EVIDENCE, Criterion
from gossamer.rules.granularity import REDUCTIONS
from gossamer.rules.normalization import NORMALIZATIONS
from gossamer.rules.schedules import Schedule
from gossamer.sparsifier import Sparsifier

VERSION = 1


def rules_of(
    sparsifier: Sparsifier,
    schedule: Schedule,
    method: Method,
    targets: Mapping[str, Fraction],
    fixed: Collection[str],
    round_to: int | None,
    total_steps: int | None,
) -> dict[str, Any]:
    """What a run was asked to do, as plain values.

    Args:
        sparsifier: of the run, as all the others are.
        schedule: how progress goes from 0 to 1.
        method: how masks move.
        targets: layer name → fraction of its units to mask in the end.
        fixed: the layers that a target names one by one where the others share one.
        round_to: what the units that a layer keeps are rounded to a multiple of.
        total_steps: that it was made for.

    Example:
        >>> from gossamer.methods import as_method
        >>> from gossamer.rules.schedules import lin
        >>> rules = rules_of(Sparsifier(torch.nn.Conv2d(1, 1, 3)), lin, as_method(None), {}, (), None, 10)
        >>> rules["schedule"], rules["total_steps"]
        ('lin', 10)
    """
    return {
        "granularity": sparsifier.granularity.name,
        "context": str(sparsifier.context),
        "criteria": sparsifier.criterion.name,
        "criteria on an example": example_scores(sparsifier.criterion),
        "schedule": schedule.name,
        "schedule at each tenth": [round(schedule(i / 10), 6) for i in range(11)],
        "round_to": round_to,
        "total_steps": total_steps,
        "skip_frozen": sparsifier.skip_frozen,
        "seed": sparsifier.evidence.seed if "noise" in sparsifier.criterion.needs else None,
        "sparsity": {name: f"{float(100 * fraction):.6g} %" for name, fraction in targets.items()},
        # None where it is as by default, as in states from before there was a choice.
        "every_n_steps": schedule.every_n_steps if schedule.every_n_steps > 1 else None,
        "fixed": sorted(fixed) or None,
        "reduction": _name_of(sparsifier.reduction, "mean", REDUCTIONS),
        "normalization": _name_of(sparsifier.normalization, "none", NORMALIZATIONS),
        "method": None if method == gradual else _method_rules(method),
    }


def check_run_state(state: Any, keys: Collection[str], rules: Mapping[str, Any]) -> None:
    """Makes sure that a state is of a run by some rules.

    Args:
        state: what is to be looked at.
        keys: what a state must have.
        rules: as `rules_of` gives them.

    Raises:
        FileError: it is not, or of a newer version.
    """
    if not isinstance(state, Mapping):
        raise FileError(f"run state must be a dict, got {state!r}; take what state_dict() gave")
    if state.get("version") != VERSION:
        raise FileError(f"run state of version {state.get('version')!r}; this Gossamer reads version {VERSION}")
    missing = [key for key in keys if key not in state]
    if missing:
        raise FileError(f"run state without {missing[0]!r}; it is no state_dict of a SparseTraining")
    for key, fits in _FITS.items():
        if not fits(state[key]):
            raise FileError(f"run state with {key}={state[key]!r}, which no run has; take another copy")
    for rule, here in rules.items():
        there = state["rules"].get(rule)
        if there != here:
            told, there, here = _what_differs(rule, there, here)
            raise FileError(
                f"run state of other rules: {told} is {there!r} there and {here!r} here; make the run as that one was"
            )


def _what_differs(rule: str, there: Any, here: Any) -> tuple[str, Any, Any]:
    """Of a method, which is more than fits on a line, the part."""
    if rule != "method":
        return rule, there, here
    if not (isinstance(there, Mapping) and isinstance(here, Mapping)):
        return rule, _named(there), _named(here)
    theirs, ours = cast("dict[str, Any]", there), cast("dict[str, Any]", here)
    part = next(key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key))
    a: Any = theirs.get(part)
    b: Any = ours.get(part)
    if not (isinstance(a, list) and isinstance(b, list)):
        return f"{part} of {rule}", a, b
    pairs = zip_longest(cast("list[Any]", a), cast("list[Any]", b))
    first, second = next((x, y) for x, y in pairs if x != y)
    return f"one of the {part} of {rule}", first, second


def _named(method: Any) -> Any:
    return cast("dict[str, Any]", method).get("name") if isinstance(method, Mapping) else method


def example_scores(criterion: Criterion) -> list[float] | None:
    """What tells two criteria of one name apart: a user's own is known by its name only, '<lambda>' for many.

    Example:
        >>> from gossamer.rules.criteria import CRITERIA
        >>> example_scores(CRITERIA["large_final"])[:2]
        [1.0, 0.714286]
    """
    weight = torch.linspace(-1.0, 1.0, 8)
    evidence = {kind: weight.roll(i) / (i + 1) for i, kind in enumerate(EVIDENCE)}
    evidence |= {"weight": weight, "initial": weight.flip(0) / 2, "previous": weight / 3, "noise": weight.abs()}
    try:
        return [round(float(score), 6) for score in criterion.score(evidence)]
    except (RuntimeError, IndexError, ValueError, TypeError, KeyError):  # it wants a weight of more axes
        return None


def _name_of(rule: Any, default: str, rules: Mapping[str, Any]) -> str | None:
    name = next((name for name, known in rules.items() if known is rule), getattr(rule, "__name__", "custom"))
    return None if name == default else name


def _method_rules(method: Method) -> dict[str, Any]:
    shares = [round(method.share(step, step / 1000), 6) for step in range(1, 1001)]
    return {
        "name": method.name,
        "grow": method.grow.name,
        "initial": None if method.initial is None else method.initial.name,
        "exchanges of a thousand steps": [[i + 1, share] for i, share in enumerate(shares) if share][:50],
    }


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _are_masks(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(m, Tensor) for m in cast("Any", value).values())


_FITS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "steps_done": _is_count,
        "total_steps": lambda n: n is None or _is_count(n),
        "progress": _is_fraction,
        "floor": _is_fraction,
        "rules": lambda rules: isinstance(rules, Mapping),
        "tensors": lambda tensors: isinstance(tensors, Mapping),
        "let_go": _are_masks,
        "freed": _are_masks,
    }
)
