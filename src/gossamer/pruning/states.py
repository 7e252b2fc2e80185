"""The state of a run that prunes: which filters are gone, how far it is, and by which rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from gossamer.errors import FileError
from gossamer.pruning.surgery import Surgeon
from gossamer.run_rules import example_scores

if TYPE_CHECKING:
    from gossamer.pruning.pruner import Pruner

VERSION = 1


def state_of(
    surgeon: Surgeon, rules: Mapping[str, Any], counters: Mapping[str, Any], evidence: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Nested dicts that `save_state` can write.

    Args:
        surgeon: knows what is gone.
        rules: by which the run goes, see `rules_of`.
        counters: how far it is.
        evidence: what the criterion remembers.
    """
    kept = {key: k.clone() for key, k in zip(_keys(surgeon), surgeon.kept, strict=True)}
    return {"version": VERSION, "kept": kept, **counters, "rules": dict(rules), "evidence": dict(evidence)}


def kept_in(state: Mapping[str, Any], surgeon: Surgeon) -> list[Tensor]:
    """For each group, bool over its units: whether it is there in the run that gave the state."""
    return [state["kept"][key].bool() for key in _keys(surgeon)]


def check_state(state: Any, surgeon: Surgeon, rules: Mapping[str, Any]) -> None:
    """Makes sure that a state is of a run on this network, by these rules.

    Args:
        state: of `state_of`, or whatever was in a file.
        surgeon: of the run here.
        rules: by which that goes.

    Raises:
        FileError: it is not, or of a newer version, or filters are gone here that are there in the state.
    """
    if not isinstance(state, Mapping) or cast(Any, state).get("version") != VERSION:
        found: Any = cast(Any, state).get("version") if isinstance(state, Mapping) else state
        raise FileError(f"pruning state of version {found!r}; this Gossamer reads version {VERSION}")
    held = cast("Mapping[str, Any]", state)
    for key, fits in _FITS.items():
        if key not in held or not fits(held[key]):
            what = f"with {key}={held[key]!r}, which no run has" if key in held else f"without {key!r}"
            raise FileError(f"pruning state {what}; take another copy")
    kept = [held["kept"].get(key) for key in _keys(surgeon)]
    sizes = [g.n_units for g in surgeon.groups]
    if len(held["kept"]) != len(sizes) or any(
        not isinstance(k, Tensor) or k.numel() != n for k, n in zip(kept, sizes, strict=True)
    ):
        raise FileError("pruning state of another network; its groups of channels are others than here")
    for rule, here in rules.items():
        there = held["rules"].get(rule)
        if there != here:
            raise FileError(
                f"pruning state of other rules: {rule} is {there!r} there and {here!r} here; make the run as that one "
                "was"
            )
    if any(bool((k.bool() & ~now).any()) for k, now in zip(kept, surgeon.kept, strict=True)):
        raise FileError(
            "pruning state of a network with filters that are gone here, and what is gone does not come back; make the "
            "network anew, and load the state then"
        )


def rules_of(pruner: Pruner) -> dict[str, Any]:
    """What two runs must agree in, so that one can go on where the other was."""
    schedule, criterion = pruner.schedule, pruner.criterion
    return {
        "context": str(pruner.context),
        "normalization": pruner.context.normalization,
        "criteria": criterion.name,
        "criteria on an example": example_scores(criterion),
        "schedule": schedule.name,
        "schedule at each tenth": [round(schedule(i / 10), 6) for i in range(11)],
        "every_n_steps": schedule.every_n_steps,
        "round_to": pruner.round_to,
        "total_steps": pruner.total_steps,
        "seed": pruner.seed if "noise" in criterion.needs else None,
        "sparsity": {name: f"{float(100 * fraction):.6g} %" for name, fraction in pruner.targets.items()},
    }


def _keys(surgeon: Surgeon) -> list[str]:
    return [f"{i} {group.name}" for i, group in enumerate(surgeon.groups)]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_fraction(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


def _is_dict(value: Any) -> bool:
    return isinstance(value, Mapping)


def _are_counts(value: Any) -> bool:
    return isinstance(value, Mapping) and all(
        str(i).isdigit() and _is_count(n) for i, n in cast("Mapping[Any, Any]", value).items()
    )


_FITS: Mapping[str, Callable[[Any], bool]] = MappingProxyType(
    {
        "kept": _is_dict,
        "progress": _is_fraction,
        "steps_done": _is_count,
        "floor": _is_fraction,
        "asked": _are_counts,
        "rules": _is_dict,
        "evidence": _is_dict,
    }
)
