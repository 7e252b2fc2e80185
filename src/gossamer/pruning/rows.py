"""What became of each layer's filters, as rows of a report; and of those that are not as asked for, why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction

from gossamer.pruning.counting import fraction_of
from gossamer.pruning.graph import Group, Member
from gossamer.pruning.report import LayerPruning, listed
from gossamer.pruning.surgery import Surgeon
from gossamer.rules.allocation import count


def rows_of(
    surgeon: Surgeon,
    types: Mapping[str, str],
    targets: Mapping[str, Fraction],
    progress: float,
    asked: Mapping[int, int],
    round_to: int | None,
) -> tuple[LayerPruning, ...]:
    """Rows of the layers that have a target, and of those that went with them, in the network's order.

    Args:
        surgeon: knows what is gone.
        types: layer → its type.
        targets: layer → the fraction of its filters that is to be gone in the end.
        progress: how much of that is due by now.
        asked: group → units that are to be gone by now, where groups compete.
        round_to: as in `Pruner`.
    """
    rows: dict[str, LayerPruning] = {}
    for i, group in enumerate(surgeon.groups):
        if not any(n in targets for n in group.layers):
            continue
        for member in group.filters:
            own = targets.get(member.name)
            wanted = 0 if own is None else asked.get(i, count(own * Fraction(progress), group.n_units))
            per_unit = len(member.index) // group.n_units
            gone = int((~surgeon.kept[i])[member.unit].sum())
            why = "" if gone == wanted * per_unit else _why(group, member, targets, round_to)
            before = rows.get(member.name)
            if before is None:
                size = group.n_units * per_unit if group.heads == member.name else member.size
                row = LayerPruning(member.name, types[member.name], size, size - gone, wanted * per_unit, why)
            else:  # a layer whose filters lie in several groups
                wanted = before.asked + wanted * per_unit
                row = replace(before, kept=before.kept - gone, asked=wanted, why=before.why or why)
            rows[member.name] = row
    return tuple(rows[n] for n, _ in surgeon.model.named_modules() if n in rows)


def _why(group: Group, member: Member, targets: Mapping[str, Fraction], round_to: int | None) -> str:
    own, others = targets.get(member.name), [o for o in group.layers if o != member.name]
    if group.why:
        return group.why
    if own is None:
        return f"goes with the channels of {listed([o for o in others if o in targets])}"
    if own != fraction_of(group, targets):
        return f"its channels are joined with those of {listed(others)}, which have another target"
    if group.n_blocks > 1:
        return f"each of {group.n_blocks} blocks of channels has to lose as many"
    return f"round_to={round_to}" if round_to else "a layer keeps one filter at least"
