"""The two passes of `fused.py` as Triton kernels.

Shapes: N rows (images), D numbers of one row, S splits of a row.

Forward: every program sums its split of one row in float32 into partials [N, S], and PyTorch sums those;
with few rows a row has many splits, so that two images of 65,536 numbers still fill a GPU. Backward: one
elementwise pass, a program a block. There are no atomics: two runs give the same bits. Inputs may be of
different dtypes and are cast as they are loaded; nothing of size [N, D] is written but the gradient.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.modalities.diffusion.kernels.cost import BLOCK, num_splits
from triptych.modalities.diffusion.kernels.fused import Passes, mean_difference_by

# Eight numbers a thread: one load of 16 bytes in half precision.
NUM_WARPS = BLOCK // (32 * 8)


def mean_difference(prediction_ND: Tensor, ref_ND: Tensor | None, target_ND: Tensor) -> Tensor:
    """As `reference.mean_difference`, in one pass over the inputs."""
    return mean_difference_by(TRITON_PASSES, prediction_ND, ref_ND, target_ND)


def interpreted() -> bool:
    """Whether the kernels were defined under Triton's interpreter, which runs them on CPU tensors."""
    return not isinstance(reduce_kernel, triton.JITFunction)


@triton.jit
def reduce_kernel(
    prediction_ptr,
    ref_ptr,
    target_ptr,
    partial_ptr,
    row_size,
    prediction_stride,
    ref_stride,
    target_stride,
    splits,
    blocks,
    HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum d (2 e - d) over the `blocks` blocks of one split of one row; without a ref e e."""
    program = tl.program_id(0)
    row = (program // splits).to(tl.int64)
    start = (program % splits) * blocks * BLOCK
    prediction_ptr += row * prediction_stride + start
    target_ptr += row * target_stride + start
    ref_ptr += row * ref_stride + start
    left = row_size - start
    sums = tl.zeros([BLOCK], tl.float32)
    for block in range(blocks):
        offsets = block * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < left
        # What lies outside loads as zeros and adds 0.
        prediction = tl.load(prediction_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        residual = prediction - tl.load(target_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if HAS_REF:
            change = prediction - tl.load(ref_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
            sums += change * (2 * residual - change)
        else:
            sums += residual * residual
    tl.store(partial_ptr + program, tl.sum(sums, axis=0))


@triton.jit
def differentiate_kernel(
    prediction_ptr,
    target_ptr,
    upstream_ptr,
    grad_ptr,
    row_size,
    prediction_stride,
    target_stride,
    blocks,
    scale,
    BLOCK: tl.constexpr,
):
    """grad = upstream * scale * e over one of the `blocks` blocks of one row."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    offsets = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < row_size
    prediction = tl.load(prediction_ptr + row * prediction_stride + offsets, mask=inside, other=0.0)
    target = tl.load(target_ptr + row * target_stride + offsets, mask=inside, other=0.0)
    residual = prediction.to(tl.float32) - target.to(tl.float32)
    grad = residual * (tl.load(upstream_ptr + row) * scale)
    tl.store(grad_ptr + row * row_size + offsets, grad.to(grad_ptr.dtype.element_ty), mask=inside)


def _reduce(prediction_ND: Tensor, ref_ND: Tensor | None, target_ND: Tensor) -> Tensor:
    num_rows, row_size = prediction_ND.shape
    splits = num_splits(num_rows, row_size)
    partial_NS = prediction_ND.new_empty(num_rows, splits, dtype=torch.float32)
    other_ND = target_ND if ref_ND is None else ref_ND
    tensors = (prediction_ND, other_ND, target_ND)
    with _on(prediction_ND):
        _launch(
            reduce_kernel,
            num_rows * splits,
            *tensors,
            partial_NS,
            row_size,
            *(tensor.stride(0) for tensor in tensors),
            splits,
            triton.cdiv(row_size, splits * BLOCK),
            HAS_REF=ref_ND is not None,
        )
    return partial_NS.sum(1)


def _differentiate(prediction_ND: Tensor, target_ND: Tensor, upstream_N: Tensor) -> Tensor:
    num_rows, row_size = prediction_ND.shape
    grad_ND = prediction_ND.new_empty(num_rows, row_size)
    blocks = triton.cdiv(row_size, BLOCK)
    with _on(prediction_ND):
        _launch(
            differentiate_kernel,
            num_rows * blocks,
            prediction_ND,
            target_ND,
            upstream_N.contiguous(),
            grad_ND,
            row_size,
            prediction_ND.stride(0),
            target_ND.stride(0),
            blocks,
            2 / row_size,
        )
    return grad_ND


def _launch(kernel: Any, num_programs: int, *arguments: Any, **constants: bool) -> None:
    if num_programs:
        kernel[(num_programs,)](*arguments, BLOCK=BLOCK, num_warps=NUM_WARPS, **constants)


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


TRITON_PASSES = Passes(reduce=_reduce, differentiate=_differentiate)
