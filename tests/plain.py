"""The slow twins: what the package promises, in lines plain enough to be believed by reading them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

LAYERS = {
    "Linear": lambda: nn.Linear(8, 12),
    "Embedding": lambda: nn.Embedding(12, 8),
    "Conv1d": lambda: nn.Conv1d(8, 6, 3),
    "Conv2d": lambda: nn.Conv2d(8, 6, (2, 3)),
    "Conv3d": lambda: nn.Conv3d(4, 3, (1, 2, 3)),
    "Conv2d grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "ConvTranspose1d": lambda: nn.ConvTranspose1d(8, 6, 3),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 6, (2, 3)),
    "ConvTranspose3d": lambda: nn.ConvTranspose3d(4, 3, (1, 2, 3)),
    "ConvTranspose2d grouped": lambda: nn.ConvTranspose2d(8, 6, 3, groups=2),
}
"""One small layer of every type that can be made sparse, with axes of different lengths where it can."""


def input_for(layer: nn.Module, n: int = 2) -> Tensor:
    """A small batch that fits a layer: integers, the same each time."""
    generator = torch.Generator().manual_seed(7)
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, layer.num_embeddings, (n, 3), generator=generator)
    shape = (
        [layer.in_features]
        if isinstance(layer, nn.Linear)
        else [layer.in_channels, *(k + 1 for k in layer.kernel_size)]
    )
    return torch.randint(-1, 2, (n, *shape), generator=generator).to(layer.weight.dtype)


def lowest(scores: Sequence[float], among: Sequence[int], n: int) -> list[int]:
    """The n positions of the lowest scores, ties by position."""
    return sorted(among, key=lambda i: (scores[i], i))[:n]


def mask(scores: Sequence[float], kept: Sequence[bool], masked: int) -> list[bool]:
    """The mask that masks exactly so many, inside or around the mask that there is."""
    gone = [i for i, k in enumerate(kept) if not k]
    if masked >= len(gone):
        gone += lowest(scores, [i for i, k in enumerate(kept) if k], masked - len(gone))
    else:
        gone = lowest(scores, gone, masked)
    return [i not in set(gone) for i in range(len(scores))]


def split(masked: int, layers: Sequence[Sequence[float]]) -> list[int]:
    """How many of each layer are among the lowest of all, ties in the order of the layers."""
    ranked = sorted((score, i, j) for i, layer in enumerate(layers) for j, score in enumerate(layer))[:masked]
    return [sum(1 for _, i, _ in ranked if i == layer) for layer in range(len(layers))]


def bounded_split(
    masked: int, layers: Sequence[Sequence[float]], least: Sequence[int], most: Sequence[int]
) -> list[int]:
    """The same, where each layer gives at least so many and at most so many."""
    counts = list(least)
    ranked = sorted((score, i, j) for i, layer in enumerate(layers) for j, score in enumerate(layer))
    taken = {(i, j) for i, layer in enumerate(layers) for j in lowest(layer, range(len(layer)), least[i])}
    for _, i, j in ranked:
        if sum(counts) < masked and counts[i] < most[i] and (i, j) not in taken:
            counts[i] += 1
    return counts


def set_integers(weight: Tensor, seed: int = 0) -> None:
    """Small integers: many ties, and every sum of them exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight.copy_(torch.randint(-4, 5, weight.shape, generator=generator))


def zeros(weight: Tensor) -> int:
    """Weights that are exactly 0."""
    return int((weight == 0).sum())


def bits(tensor: Tensor) -> list[int]:
    """A tensor as the bytes it is made of, so that 0.0 and -0.0 differ and nan equals nan."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()


def surface(model: nn.Module) -> dict[str, object]:
    """Everything that one could add to a model, by name."""
    shape: dict[str, object] = {"state_dict": list(model.state_dict()), "modules": [type(m) for m in model.modules()]}
    for name, module in model.named_modules():
        shape[name] = {k: (list(v) if isinstance(v, dict) else None) for k, v in vars(module).items()}
    for name, parameter in model.named_parameters():
        hooks = parameter._backward_hooks, getattr(parameter, "_post_accumulate_grad_hooks", None)
        shape["." + name] = (type(parameter), list(vars(parameter)), [list(h or ()) for h in hooks])
    return shape
