"""What may a criterion look at? Gathered on demand, dropped when done.

Only what the criterion declares is kept between two steps: nothing for `large_final`, a copy of the weights for those
that look back.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ArgumentError, FileError, StateError
from gossamer.rules.criteria import OF_DATA, Criterion

Look = Callable[[Sequence[str]], Mapping[str, Mapping[str, Tensor]]]
"""Kinds of evidence → what data says, by kind and layer."""


class Evidence:
    """The memory behind a criterion, one entry a layer.

    Args:
        criterion: says what is needed.
        weights: layer name → weight, as the run begins.
        seed: of the noise that `random` uses.
        look: gathers evidence of data, for all layers at once; None where there is no data.

    Example:
        >>> from gossamer.rules.criteria import large_final
        >>> Evidence(large_final, {"a": torch.ones(2)}).gather("a", torch.ones(2))
        {'weight': tensor([1., 1.])}
    """

    def __init__(
        self, criterion: Criterion, weights: Mapping[str, Tensor], seed: int = 0, look: Look | None = None
    ) -> None:
        self.criterion = criterion
        self.seed = seed
        keep = [k for k in ("initial", "previous", "accumulated") if k in criterion.needs]
        self.kept = {kind: {name: w.detach().clone() for name, w in weights.items()} for kind in keep}
        for name, w in self.kept.get("accumulated", {}).items():
            self.kept["accumulated"][name] = torch.zeros_like(widen(w))
        self.look = look
        self._of_data = [kind for kind in criterion.needs if kind in OF_DATA]
        self._gathered: Mapping[str, Mapping[str, Tensor]] | None = None

    def gather(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Everything that the criterion needs to score a layer, each of the weight's shape and on its device."""
        have: dict[str, Tensor] = {}
        for kind in self.criterion.needs:
            if kind == "weight":
                have[kind] = weight.detach()
            elif kind == "noise":
                have[kind] = self._noise(name, weight)
            elif kind in OF_DATA:
                have[kind] = self._from_data()[kind][name]
            else:
                stored = self.kept[kind][name]
                if stored.device != weight.device:
                    self.kept[kind][name] = stored = stored.to(weight.device)
                have[kind] = stored
        return have

    @property
    def takes_data(self) -> bool:
        """Whether data has to be run through the network for this criterion."""
        return bool(self._of_data)

    def _from_data(self) -> Mapping[str, Mapping[str, Tensor]]:
        if self._gathered is None:
            assert self.look is not None
            self._gathered = self.look(self._of_data)
        return self._gathered

    def drop(self) -> None:
        """Forgets what data said, so that it is gathered anew when it is next asked for."""
        self._gathered = None

    @torch.no_grad()
    def observe(self, weights: Mapping[str, Tensor], factor: Tensor | None = None) -> None:
        """Looks at the gradients of one step, right before the optimizer makes it.

        Args:
            weights: layer name → weight, with its gradient where it has one.
            factor: what gradients are multiplied with, 0-d; 0 where the step will do nothing. None for 1.
        """
        kept = self.kept.get("accumulated")
        if kept is None:
            return
        sums: list[Tensor] = []
        parts: list[list[Tensor]] = [[], []]
        for name, weight in weights.items():
            if weight.grad is None:
                continue
            if kept[name].device != weight.device:
                kept[name] = kept[name].to(weight.device)
            gradient = weight.grad.to_dense() if weight.grad.layout != torch.strided else weight.grad
            sums.append(kept[name])
            parts[0].append(widen(weight.detach()))
            parts[1].append(widen(gradient) if factor is None else scaled(gradient, factor))
        if sums:
            torch._foreach_addcmul_(sums, *parts, value=-1)  # pyright: ignore[reportPrivateImportUsage]

    def moved(self, name: str, weight: Tensor, changed: bool | Tensor = True) -> None:
        """Takes note of whether a layer's mask has changed (a 0-d tensor where only the device knows)."""
        if "previous" not in self.kept or changed is False:
            return
        previous, now = self.kept["previous"][name], weight.detach()
        previous.copy_(now if changed is True else torch.where(changed, now, previous.to(now)))

    def unchanged(self, name: str, weight: Tensor) -> bool:
        """Whether the criterion measures change and there has been none, so that all its scores tie."""
        for kind, layers in self.kept.items():
            same = torch.zeros_like(weight) if kind == "accumulated" else weight.detach()
            if not torch.equal(layers[name].to(weight), same):
                return False
        if "accumulated" in self.kept:
            return True
        return bool(self.kept) and "weight" in self.criterion.needs

    def state_dict(self) -> dict[str, Tensor]:
        """What is kept, as flat tensors: 'initial/<layer>' and 'previous/<layer>'."""
        return {f"{kind}/{name}": t.clone() for kind, layers in self.kept.items() for name, t in layers.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `state_dict` gave; all or none.

        Raises:
            FileError: something is missing, or of another shape.
        """
        wanted = {f"{kind}/{name}": t for kind, layers in self.kept.items() for name, t in layers.items()}
        for key, tensor in wanted.items():
            other: Any = state.get(key)
            if not isinstance(other, Tensor) or other.shape != tensor.shape or not other.is_floating_point():
                have = (
                    f"is of {other.dtype} and shape {tuple(other.shape)}" if isinstance(other, Tensor) else "is missing"
                )
                raise FileError(
                    f"state of another run: {key!r} {have}, and criterion {self.criterion.name!r} needs it of shape "
                    f"{tuple(tensor.shape)}; use the criterion and the network that the state is from"
                )
        for key, tensor in wanted.items():
            tensor.copy_(state[key])

    def _noise(self, name: str, weight: Tensor) -> Tensor:
        return _noise(f"{self.seed}/{name}", weight)


def _noise(key: str, weight: Tensor) -> Tensor:
    # From the layer's name and not its place, on the CPU, so that every rank and every resume sees the same.
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.rand(weight.shape, generator=generator).to(weight.device)


class StepEvidence:
    """What is there right before a step of the optimizer: weights, their gradients, and noise of that step's own.

    Args:
        criterion: says what is needed.
        seed: of the noise.
        step: which step it is.
        factor: what gradients are multiplied with, 0-d; None for 1.

    Raises:
        ArgumentError: the criterion asks for something else.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2)); weight.sum().backward()
        >>> StepEvidence(Criterion(lambda gradient: gradient.abs()), seed=0, step=1).gather("a", weight)
        {'gradient': tensor([1., 1.])}
    """

    KINDS = ("weight", "gradient", "noise")

    def __init__(self, criterion: Criterion, seed: int, step: int, factor: Tensor | None = None) -> None:
        odd = next((kind for kind in criterion.needs if kind not in self.KINDS), None)
        if odd is not None:
            raise ArgumentError(
                f"criterion {criterion.name!r} asks for {odd!r}, which is not there at a step; weights that grow are "
                f"chosen by {', '.join(self.KINDS)}"
            )
        self.criterion, self._key, self._factor = criterion, f"{seed}/{step}", factor

    def gather(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Everything that the criterion needs to score a layer.

        Raises:
            StateError: the weight has no gradient.
        """
        have: dict[str, Tensor] = {}
        for kind in self.criterion.needs:
            if kind == "weight":
                have[kind] = weight.detach()
            elif kind == "noise":
                have[kind] = _noise(f"{self._key}/{name}", weight)
            elif weight.grad is None:
                raise StateError(
                    f"layer {name!r} has no gradient to choose by which weights grow, since the loss does not depend "
                    f"on it; leave it out with exclude=[{name!r}]"
                )
            else:
                gradient = weight.grad.to_dense() if weight.grad.layout != torch.strided else weight.grad
                have[kind] = gradient if self._factor is None else scaled(gradient, self._factor)
        return have


class ScoresOnDemand:
    """Scores of single weights, computed slice by slice, so that no tensor of the layer's size is made.

    Args:
        criterion: an elementwise one.
        evidence: name → tensor, contiguous, all of one shape.

    Example:
        >>> from gossamer.rules.criteria import large_final
        >>> ScoresOnDemand(large_final, {"weight": torch.tensor([[-2.0, 1.0]])})[0:2]
        tensor([2., 1.])
    """

    def __init__(self, criterion: Criterion, evidence: Mapping[str, Tensor]) -> None:
        self.criterion = criterion
        self.flat = {name: tensor.reshape(-1) for name, tensor in evidence.items()}

    def __len__(self) -> int:
        return len(next(iter(self.flat.values())))

    def __getitem__(self, index: slice, /) -> Tensor:
        return self.criterion.score({name: widen(t[index]) for name, t in self.flat.items()})


class LastScores:
    """The scores of the layer that was asked last, so that those of one layer at a time are all that is held."""

    def __init__(self) -> None:
        self._of: object = None
        self._scores: Tensor | None = None

    def get(self, owner: object, compute: Callable[[], Tensor]) -> Tensor:
        """Those of an owner, computed where another one was asked last."""
        if self._of is not owner or self._scores is None:
            self._of = self._scores = None  # gone before the next are made
            self._scores, self._of = compute(), owner
        return self._scores


class WholeScores:
    """Scores of a layer that only come all at once, computed anew whenever another layer's were asked for in between.

    Args:
        compute: gives them, flat; always the same.
        n: how many there are.
        last: shared by the layers of a selection.

    Example:
        >>> scores = WholeScores(lambda: torch.tensor([2.0, 1.0]), 2, LastScores())
        >>> len(scores), scores[1:]
        (2, tensor([1.]))
    """

    def __init__(self, compute: Callable[[], Tensor], n: int, last: LastScores) -> None:
        self._compute, self._n, self._last = compute, n, last

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: slice, /) -> Tensor:
        return self._last.get(self, self._compute)[index]


def scaled(gradient: Tensor, factor: Tensor) -> Tensor:
    """A gradient times a 0-d factor, in float32 or wider; a factor of 0 takes infinity and nan to 0 as well.

    Example:
        >>> scaled(torch.tensor([2.0, torch.inf]), torch.tensor(0.0))
        tensor([0., 0.])
    """
    factor = factor.to(gradient.device)
    return torch.where(factor > 0, widen(gradient) * factor, 0.0)


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider, so that half precision makes no ties that the weights do not have.

    Example:
        >>> widen(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
