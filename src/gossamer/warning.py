"""What should a user be told of masks that were moved as asked, and are hardly what was meant?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from gossamer.errors import GossamerWarning
from gossamer.evidence import Evidence
from gossamer.layers import Layer
from gossamer.rules.allocation import Context


def warn_of_a_fraction(sparsity: float | Mapping[str, float], stacklevel: int = 2) -> None:
    """Warns where a percentage looks like a fraction.

    Args:
        sparsity: a percentage, or some by layer.
        stacklevel: of whose line the warning speaks, as `warnings.warn` has it.
    """
    most = max(sparsity.values(), default=0) if isinstance(sparsity, Mapping) else sparsity
    if 0 < most < 1:
        warnings.warn(
            f"sparsity={sparsity} is less than one percent; it is a percentage, so 50 means half",
            GossamerWarning,
            stacklevel=stacklevel + 1,
        )


def warn_thin(layers: Mapping[str, Layer], context: Context, granularity: str) -> None:
    """Warns where competing layers have left one of them next to nothing.

    Args:
        layers: by name, after a move.
        context: which units competed.
        granularity: its name.
    """
    if not context.is_pooled:
        return
    known = {n: (la.n_units - la.masked, la.n_units) for n, la in layers.items() if la.masked is not None}
    share = sum(kept for kept, _ in known.values()) / max(1, sum(units for _, units in known.values()))
    thin = [
        f"{name!r} keeps {kept:,} of {units:,}"
        for name, (kept, units) in known.items()
        if units > 1 and kept < min(0.005, share / 10) * units
    ]
    if thin:
        warnings.warn(
            f"context '{context}' leaves layers nearly empty: {', '.join(thin)} units of granularity "
            f"{granularity!r}; Context('global', ceiling=95) bounds it, or take another "
            "normalization, or 'local'",
            GossamerWarning,
            stacklevel=4,
        )


def warn_unchanged(layers: Mapping[str, Layer], evidence: Evidence, criterion: str) -> None:
    """Warns where the criterion measures change and some layers have not changed, so that scores tie.

    Args:
        layers: by name.
        evidence: what the criterion may look at.
        criterion: its name.
    """
    still = [n for n, layer in layers.items() if evidence.unchanged(n, layer.target.weight)]
    if still:
        warnings.warn(
            f"criterion {criterion!r} measures change, and the weights of {', '.join(still)} have not "
            "changed: all their scores tie, and the first positions are masked",
            GossamerWarning,
            stacklevel=4,
        )
