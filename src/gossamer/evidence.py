"""What may a criterion look at? Gathered on demand, dropped when done.

Only what the criterion declares is kept between two steps: nothing for `large_final`, a copy of the weights for those
that look back.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import FileError
from gossamer.rules.criteria import Criterion


class Evidence:
    """The memory behind a criterion, one entry a layer.

    Args:
        criterion: says what is needed.
        weights: layer name → weight, as the run begins.
        seed: of the noise that `random` uses.

    Example:
        >>> from gossamer.rules.criteria import large_final
        >>> Evidence(large_final, {"a": torch.ones(2)}).gather("a", torch.ones(2))
        {'weight': tensor([1., 1.])}
    """

    def __init__(self, criterion: Criterion, weights: Mapping[str, Tensor], seed: int = 0) -> None:
        self.criterion = criterion
        self.seed = seed
        keep = [k for k in ("initial", "previous") if k in criterion.needs]
        self.kept = {kind: {name: w.detach().clone() for name, w in weights.items()} for kind in keep}

    def gather(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """Everything that the criterion needs to score a layer, each of the weight's shape and on its device."""
        have: dict[str, Tensor] = {}
        for kind in self.criterion.needs:
            if kind == "weight":
                have[kind] = weight.detach()
            elif kind == "noise":
                have[kind] = self._noise(name, weight)
            else:
                stored = self.kept[kind][name]
                if stored.device != weight.device:
                    self.kept[kind][name] = stored = stored.to(weight.device)
                have[kind] = stored
        return have

    def moved(self, name: str, weight: Tensor, changed: bool | Tensor = True) -> None:
        """Takes note of whether a layer's mask has changed (a 0-d tensor where only the device knows)."""
        if "previous" not in self.kept or changed is False:
            return
        previous, now = self.kept["previous"][name], weight.detach()
        previous.copy_(now if changed is True else torch.where(changed, now, previous.to(now)))

    def unchanged(self, name: str, weight: Tensor) -> bool:
        """Whether the criterion measures change and there has been none, so that all its scores tie."""
        for kind, layers in self.kept.items():
            if kind in self.criterion.needs and not torch.equal(layers[name].to(weight), weight.detach()):
                return False
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
        # From the layer's name and not its place, on the CPU, so that every rank and every resume sees the same.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        return torch.rand(weight.shape, generator=generator).to(weight.device)


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


def widen(tensor: Tensor) -> Tensor:
    """The tensor in float32 or wider, so that half precision makes no ties that the weights do not have.

    Example:
        >>> widen(torch.ones(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
