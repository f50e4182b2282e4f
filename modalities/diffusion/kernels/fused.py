"""The difference of two mean squared residuals from tiles of the rows, in plain PyTorch.

Shapes: N rows (images), D numbers of one row; R rows and C numbers of one tile.

With e = prediction - target and d = prediction - ref (no ref: the ref is the target, d = e):
    value = sum d (2 e - d) / D                d value / d prediction = 2 e / D
The gradient does not hold the ref, so only prediction and target are saved, in their own dtypes; the
backward pass is one elementwise pass over them. The largest temporary is a tile.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triptych.modalities.diffusion.kernels.reference import accumulation_dtype

# Numbers of a tile: a few float32 tiles of 512 KiB stay in a CPU's cache, a few of 4 MiB in an accelerator's.
_CPU_TILE, _ACCELERATOR_TILE = 2**17, 2**20


@dataclass(frozen=True, slots=True)
class Passes:
    """The two passes over the rows.

    reduce(prediction_ND, ref_ND or None, target_ND): sum d (2 e - d) per row, [N], in the accumulation dtype.
    differentiate(prediction_ND, target_ND, upstream_N): 2 e upstream / D, [N, D], in the prediction's dtype.
    """

    reduce: Callable[[Tensor, Tensor | None, Tensor], Tensor]
    differentiate: Callable[[Tensor, Tensor, Tensor], Tensor]


def mean_difference(prediction_ND: Tensor, ref_ND: Tensor | None, target_ND: Tensor) -> Tensor:
    """As `reference.mean_difference`, with a bounded temporary."""
    return mean_difference_by(TORCH_PASSES, prediction_ND, ref_ND, target_ND)


def mean_difference_by(
    passes: Passes, prediction_ND: Tensor, ref_ND: Tensor | None, target_ND: Tensor
) -> Tensor:
    """`reference.mean_difference` by the given passes."""
    return _MeanDifference.apply(prediction_ND, ref_ND, target_ND, passes)


class _MeanDifference(torch.autograd.Function):
    """Saves prediction and target; only the prediction has a gradient."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, prediction_ND: Tensor, ref_ND: Tensor | None, target_ND: Tensor, passes: Passes
    ) -> Tensor:
        ctx.save_for_backward(prediction_ND, target_ND)
        ctx.passes = passes
        return passes.reduce(prediction_ND, ref_ND, target_ND).div_(prediction_ND.shape[1])

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, upstream_N: Tensor
    ) -> tuple[Tensor | None, ...]:
        prediction_ND, target_ND = ctx.saved_tensors
        return ctx.passes.differentiate(prediction_ND, target_ND, upstream_N), None, None, None


def tiles(rows_ND: Tensor) -> Iterator[tuple[slice, slice]]:
    """Slices of whole rows, or of one row where that alone is more than a tile."""
    num_rows, row_size = rows_ND.shape
    most = _CPU_TILE if rows_ND.device.type == "cpu" else _ACCELERATOR_TILE
    cols = min(row_size, most)
    for rows in _spans(num_rows, most // cols):
        for span in _spans(row_size, cols):
            yield rows, span


def _reduce(prediction_ND: Tensor, ref_ND: Tensor | None, target_ND: Tensor) -> Tensor:
    inputs = (prediction_ND, target_ND) if ref_ND is None else (prediction_ND, ref_ND, target_ND)
    wide = accumulation_dtype(*(tensor.dtype for tensor in inputs))
    total_N = prediction_ND.new_zeros(len(prediction_ND), dtype=wide)
    for tile in tiles(prediction_ND):
        # One wide operand makes a difference wide; the other is cast as it is read.
        prediction_RC = prediction_ND[tile].to(wide)
        residual_RC = prediction_RC - target_ND[tile]
        if ref_ND is None:
            total_N[tile[0]] += residual_RC.square_().sum(1)
        else:
            change_RC = prediction_RC - ref_ND[tile]
            # d - 2 e is one operator where 2 e - d would be two, hence the sign.
            terms_RC = torch.sub(change_RC, residual_RC, alpha=2, out=residual_RC).mul_(change_RC)
            total_N[tile[0]] -= terms_RC.sum(1)
    return total_N


def _differentiate(prediction_ND: Tensor, target_ND: Tensor, upstream_N: Tensor) -> Tensor:
    grad_ND = prediction_ND.new_empty(prediction_ND.shape)
    scale_N1 = (upstream_N * (2 / prediction_ND.shape[1]))[:, None]
    for tile in tiles(prediction_ND):
        residual_RC = prediction_ND[tile].to(upstream_N.dtype) - target_ND[tile]
        torch.mul(residual_RC, scale_N1[tile[0]], out=grad_ND[tile])
    return grad_ND


def _spans(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


TORCH_PASSES = Passes(reduce=_reduce, differentiate=_differentiate)
