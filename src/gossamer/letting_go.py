"""Which zeros are there only because a run let go of them? Those are no sparse network that was loaded since."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import FileError
from gossamer.keeping import has_zeros_beside
from gossamer.masks import Masks, pack, unpack
from gossamer.targets import Target


class LetGo:
    """What a run has masked that it no longer masks, since it last started.

    Example:
        >>> from gossamer.targets import find_targets
        >>> layer = torch.nn.Linear(2, 1); _ = torch.nn.init.zeros_(layer.weight)
        >>> targets, free = find_targets(layer, torch.nn.Linear), {"": torch.tensor([[True, True]])}
        >>> let_go = LetGo(); let_go.note({"": torch.tensor([[False, False]])}); bool(let_go)
        True
        >>> let_go.has_others(targets, free)
        False
    """

    def __init__(self) -> None:
        # False where something was masked that no longer is, and is zero still. Empty where nothing was let go.
        self._zero: dict[str, Tensor] = {}
        self._freed: dict[str, Tensor] = {}  # the same, also of what has grown since, and may come to zero by itself
        self._released_at: dict[str, int] = {}  # how often each weight had been written to when it was released

    def __bool__(self) -> bool:
        return bool(self._zero)

    def note(self, masks: Mapping[str, Tensor]) -> None:
        """Takes note of masks that are about to let go: what they mask is zero until the next step."""
        for name, mask in masks.items():
            for noted in (self._zero, self._freed):
                before = noted.get(name)
                noted[name] = mask.clone() if before is None else before.to(mask.device) & mask

    def note_release(self, targets: Iterable[Target]) -> None:
        """Takes note of when all weights were released, so that it shows whether they were written to since."""
        self._released_at = {t.name: _version(t.weight) for t in targets}

    @torch.no_grad()
    def note_grown(self, targets: Iterable[Target]) -> None:
        """Takes note of what has grown since it was let go."""
        for target in targets if self._zero else ():
            if target.name in self._zero:
                mask = self._zero[target.name].to(target.weight.device)
                self._zero[target.name] = mask | (target.weight != 0)

    def has_others(self, targets: Iterable[Target], masks: Mapping[str, Tensor]) -> bool:
        """Whether there are zeros beside the masks that were never let go."""
        return not self._zero or has_zeros_beside(targets, masks, self._freed)

    def may_have_others(self, targets: Iterable[Target], masks: Mapping[str, Tensor]) -> bool:
        """Whether there may be: zeros where weights had grown, or weights that were written to since the release."""
        targets = list(targets)
        return has_zeros_beside(targets, masks, self._zero) or any(
            self._released_at.get(t.name, _version(t.weight)) != _version(t.weight) for t in targets
        )

    def forget(self) -> None:
        """Begins anew."""
        self._zero, self._freed, self._released_at = {}, {}, {}

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What was noted, packed."""
        noted = {"let_go": self._zero, "freed": self._freed}
        return {key: {name: pack(mask) for name, mask in masks.items()} for key, masks in noted.items()}

    @staticmethod
    def read(state: Mapping[str, Any], masks: Masks) -> LetGo:
        """What `state_dict` gave, for these masks.

        Raises:
            FileError: it is of another network.
        """
        foreign = next((name for name in (*state["let_go"], *state["freed"]) if name not in masks), None)
        if foreign is not None:
            raise FileError(f"run state of another network: there is no layer {foreign!r}")
        read = LetGo()
        read._zero, read._freed = (
            {n: unpack(t, masks[n].shape, n).to(masks[n].device) for n, t in state[key].items()}
            for key in ("let_go", "freed")
        )
        return read


def _version(weight: Tensor) -> int:
    """How often a tensor was written to in place."""
    return -1 if weight.is_inference() else weight._version
