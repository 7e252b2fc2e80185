"""SparseGPT: masks, and surviving weights that make up for what is masked. One shot, layer by layer, with data.

Optimal brain surgeon, column by column: where a weight w_j goes, all later columns of its row move by
-w_j · [H⁻¹]_j / [H⁻¹]_jj, where H = X·Xᵀ is of the layer's inputs and the inverse is of the columns from j on. Those
inverses are the rows of one Cholesky factor (Frantar & Alistarh 2023, arXiv:2301.00774; OBC, 2022, arXiv:2208.11580).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import torch
from torch import Tensor, nn

from gossamer.calibration import Calibration, over_ranks, undisturbed, watching
from gossamer.errors import ArgumentError, TargetError
from gossamer.layer_inputs import patches
from gossamer.rules.allocation import Context, count
from gossamer.rules.selection import select, select_n_m
from gossamer.sparsifier import Sparsifier
from gossamer.targets import Target

_TRIES = 4  # dampings, each ten times the last, before a Hessian counts as singular


def sparsegpt(
    sparsifier: Sparsifier,
    sparsity: float | Mapping[str, float],
    *,
    block_size: int | None = None,
    damping: float = 0.01,
) -> None:
    """Makes a trained network sparse in one shot, and moves the weights that stay to make up for those that go.

    Layers are taken one after the other, each with the inputs that the sparse layers before it give. Only one layer's
    Hessian, columns × columns in float32, is held at a time; the data is run through the network once for each layer.

    Args:
        sparsifier: with `data`, granularity 'weight', and Linear layers and convolutions; its criterion has no say. In
            context 'local' masks are chosen in each block of columns, in 'output' for each row of it, and with N:M in
            each block of M inputs; 'er', 'erk', 'uniform_plus' and a dict give layers targets of their own.
        sparsity: percent of weights to mask, as in `Sparsifier.sparsify_model`.
        block_size: columns whose masks are chosen together; with N:M, a multiple of M. By default the paper's 128, and
            a sixteenth of a layer's columns where that is less: what the weights have become since has to be seen. In
            'output' a quarter, and no fewer than 32: of a row's few columns each block would have to give its share.
        damping: share of the Hessian's mean diagonal that is added to its diagonal.

    Raises:
        ArgumentError: an argument or a sparsifier that cannot be used, or masks that are there already.
        TargetError: a layer of another type, one that the data does not reach, or data that makes no Hessian.

    Example:
        >>> layer, x = nn.Linear(8, 4), torch.randn(100, 8)
        >>> out = layer(x)
        >>> sparsegpt(Sparsifier(layer, layer_type=nn.Linear, data=x), 50)
        >>> int((layer.weight == 0).sum())
        16
    """
    calibration = _check(sparsifier, block_size, damping)
    fractions = sparsifier.resolve(sparsity)
    sparsifier.check_weights()
    skip = sparsifier.skip_frozen
    targets = [t for t in sparsifier.targets if t.name in fractions and (t.weight.requires_grad or not skip)]
    for target in targets:
        _check_target(target)
    _check_reached(calibration, targets)
    for target in targets:
        masked = count(fractions[target.name], target.weight.numel())
        if not masked:
            continue
        hessian = _hessian(calibration, target)
        weight, kept = solve(
            _columns(target, target.weight.detach().float()), hessian, masked, sparsifier.context, block_size, damping,
            target.name,
        )  # fmt: skip
        with torch.no_grad():
            target.weight.copy_(_whole(target, weight))
        sparsifier.put_mask(target.name, _whole(target, kept))


def solve(
    weight: Tensor,
    hessian: Tensor,
    masked: int,
    context: Context,
    block_size: int | None = None,
    damping: float = 0.01,
    name: str = "",
) -> tuple[Tensor, Tensor]:
    """One layer: masks exactly so many weights, and moves the others.

    Args:
        weight: groups × rows × columns, float32; with N:M, the inputs of a block lie side by side.
        hessian: groups × columns × columns, of the inputs.
        masked: how many weights to mask.
        context: which of them compete.
        block_size: columns whose masks are chosen together; None as in `sparsegpt`.
        damping: share of the mean diagonal that is added to the diagonal.
        name: the layer's, for messages.

    Returns:
        New weights, exactly 0 where masked, and the mask (True = kept), both of the weight's shape.

    Raises:
        TargetError: the Hessian cannot be inverted.

    Example:
        >>> w, h = torch.tensor([[[3.0, 1.0]]]), torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
        >>> solve(w.flip(2), h, 1, Context("local"), damping=1e-6)[0]
        tensor([[[0.0000, 3.5000]]])
    """
    weight = weight.clone()
    factor = _factor(hessian, damping, name)
    columns = weight.shape[2]
    if block_size is None:
        # Inside one row a few columns would be a pattern, such as 2:4, which costs more than late choices gain.
        share, least = (4, 32) if context.kind == "output" else (16, 4)
        few = columns if columns <= 16 else min(max(columns // share, least), 128, columns)
        block_size = max(128 // context.m * context.m, context.m) if context.m else few
    kept = torch.ones_like(weight, dtype=torch.bool)
    diagonal = factor.diagonal(dim1=1, dim2=2)
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        # So many that after each block the layer stands at its share of the whole, and after the last one at the whole.
        due = [_share(masked, columns, at) for at in (start, end)]
        errors = torch.zeros_like(weight[:, :, start:end])
        scores = (weight[:, :, start:end] / diagonal[:, None, start:end]).square()
        if not context.m:
            kept[:, :, start:end] = _choose(scores, due[1] - due[0], context)
        for j in range(start, end):
            if context.m and (j - start) % context.m == 0:  # by the weights as they have become
                part = slice(j, j + context.m)
                due = [_share(masked, columns, at) for at in (j, j + context.m)]
                now = (weight[:, :, part] / diagonal[:, None, part]).square()
                kept[:, :, part] = _choose(now, due[1] - due[0], context)
            error = torch.where(kept[:, :, j], 0.0, weight[:, :, j] / diagonal[:, j, None])
            weight[:, :, j:end] -= error[:, :, None] * factor[:, j, None, j:end]
            errors[:, :, j - start] = error
        weight[:, :, end:] -= errors @ factor[:, start:end, end:]
    return torch.where(kept, weight, 0.0), kept


def _choose(scores: Tensor, masked: int, context: Context) -> Tensor:
    everything = torch.ones_like(scores, dtype=torch.bool)
    if context.kind == "local":
        return select(scores, everything, masked)
    return select_n_m(scores, everything, masked, scores.shape[2])


def _share(masked: int, columns: int, at: int) -> int:
    return count(Fraction(masked * at, columns), 1)


def _factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """The upper Cholesky factor of the damped inverse."""
    mean = hessian.diagonal(dim1=1, dim2=2).mean(1)
    # Where no input ever differs from 0 all weights are alike.
    added = damping * torch.where(mean > 0, mean, torch.ones_like(mean))
    eye = torch.eye(hessian.shape[1], device=hessian.device)
    for _ in range(_TRIES):
        lower, failed = torch.linalg.cholesky_ex(hessian + added[:, None, None] * eye)
        if not bool(failed.any()):
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not bool(failed.any()):
                return upper
        added = added * 10
    raise TargetError(
        f"layer {name!r}: the Hessian of its inputs cannot be inverted in float32; give more data, a larger damping, "
        f"or exclude=[{name!r}]"
    )


def _hessian(calibration: Calibration, target: Target) -> Tensor:
    """X·Xᵀ / n of a layer's inputs, for each group."""
    found: list[Tensor] = []
    n = 0

    def look(module: nn.Module, x: Tensor) -> None:
        nonlocal n
        columns = patches(module, x)
        product = columns.transpose(1, 2) @ columns
        n += columns.shape[1]
        if found:
            found[0] += product
        else:
            found.append(product)

    modules = [target.module, *target.shared_with]
    with undisturbed(calibration.model, evaluate=True), torch.no_grad(), watching(modules, look):
        for batch in calibration:
            calibration.output(batch)
    if not found:
        raise _not_reached(target)
    if not bool(torch.isfinite(found[0]).all()):
        raise TargetError(
            f"layer {target.name!r} gets nan or infinite inputs from the data; check the data and the weights before it"
        )
    total = over_ranks(torch.tensor(float(n), device=found[0].device))
    return over_ranks(found[0]) / total


def _check_reached(calibration: Calibration, targets: Sequence[Target]) -> None:
    """Before a layer is changed; a batch that reaches all is enough."""
    owners = {id(m): t.name for t in targets for m in (t.module, *t.shared_with)}
    reached = set[str]()
    modules = [m for t in targets for m in (t.module, *t.shared_with)]
    with (
        undisturbed(calibration.model, evaluate=True),
        torch.no_grad(),
        watching(modules, lambda module, _: reached.add(owners[id(module)])),
    ):
        for batch in calibration:
            calibration.output(batch)
            if len(reached) == len(targets):
                return
    raise _not_reached(next(t for t in targets if t.name not in reached))


def _not_reached(target: Target) -> TargetError:
    return TargetError(
        f"layer {target.name!r} is not reached by the data, so nothing is known of its inputs; leave it out with "
        f"exclude=[{target.name!r}]"
    )


def _columns(target: Target, weight: Tensor) -> Tensor:
    """groups × rows × columns; the columns go over the kernel's places first, then over the inputs, as in `patches`."""
    groups = int(getattr(target.module, "groups", 1))
    rows = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return rows.transpose(2, 3).reshape(groups, rows.shape[1], -1)


def _whole(target: Target, columns: Tensor) -> Tensor:
    """The way back."""
    shape = target.weight.shape
    rows = columns.reshape(*columns.shape[:2], -1, shape[1])
    return rows.transpose(2, 3).reshape(shape)


def _check(sparsifier: Sparsifier, block_size: int | None, damping: float) -> Calibration:
    if not isinstance(sparsifier, Sparsifier):
        raise ArgumentError(
            f"sparsegpt takes a Sparsifier, got {type(sparsifier).__name__}; wrap it: Sparsifier(model)"
        )
    context, calibration = sparsifier.context, sparsifier.calibration
    if calibration is None:
        raise ArgumentError("sparsegpt looks at the inputs of layers; give the Sparsifier data=, batches of inputs")
    if sparsifier.granularity.name != "weight":
        raise ArgumentError(
            f"sparsegpt masks single weights, column by column, got granularity {sparsifier.granularity.name!r}; use "
            "'weight'"
        )
    if context.is_pooled:
        raise ArgumentError(
            f"sparsegpt measures the error of one layer's output, which does not compare with another's, got context "
            f"'{context}'; use 'local', 'erk' or a pattern such as '2:4'"
        )
    if block_size is None:
        block_size = max(context.m, 1)
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ArgumentError(f"block_size={block_size!r} is no positive integer; 128 is usual")
    if context.m and block_size % context.m:
        raise ArgumentError(
            f"block_size={block_size} is no multiple of the {context.m} of context '{context}'; 128 is usual"
        )
    if isinstance(damping, bool) or not isinstance(damping, (int, float)) or not 0 < damping < float("inf"):
        raise ArgumentError(f"damping={damping!r} is no positive number; 0.01 is usual")
    masked = [name for name in sparsifier.masks if sparsifier.masks.masked(name)]
    if masked:
        raise ArgumentError(
            f"sparsegpt starts from dense layers, and {masked[0]!r} has masks already; make a new Sparsifier of a "
            "dense network"
        )
    return calibration


def _check_target(target: Target) -> None:
    module = target.module
    convolution = isinstance(module, nn.modules.conv._ConvNd) and not module.transposed
    if not convolution and not isinstance(module, nn.Linear):
        raise TargetError(
            f"layer {target.name!r} is a {target.type}, and SparseGPT needs an output that is a matrix times its input "
            f"(Linear layers and convolutions); leave it out with exclude=[{target.name!r}]"
        )
