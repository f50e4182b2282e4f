"""The passes of `chunked.py` as Triton kernels, each with its product of hidden states and weight inside.

Shapes: R positions of one pass or chunk, K codes of a level, D width; blocks of ROWS, COLS and DEPTH of them.

`score_kernel`: one program owns its positions and runs over tiles of codes with a running peak and sum, so
the logits stay in registers. `differentiate_kernel`: one program makes one tile of the logits again and
writes its gradient, in the inputs' dtype; the two products with it stay with the vendor's library, which
reads it once each, where a kernel that owned [ROWS, D] of a result would make the logits D / COLS times. No
atomics: two runs give the same bits. float32 inputs are multiplied in float32, not TF32.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from triptych.modalities.recsys.kernels.chunked import LevelOps, chunked_logps
from triptych.modalities.recsys.kernels.cost import COLS, ROWS

DEPTH = 32
# At 32 the running sums and a float32 product do not fit the registers of an A100 (sm_80): 16 bytes of them
# spill when the number of rows is no multiple of 16, 128 when the width is none either.
SCORE_FLOAT32_DEPTH = 16
NUM_WARPS = 4
# The lowest finite float32, not -inf: exp(-inf - -inf) must not appear.
_LOWEST = tl.constexpr(-3.4028234663852886e38)


def logps(hidden_PLD: Tensor, weights: Sequence[Tensor], codes_LP: Tensor) -> Tensor:
    """As `reference.logps`, with a bounded temporary (`chunked.chunk_rows`)."""
    contiguous = [weight.contiguous() for weight in weights]
    return chunked_logps(hidden_PLD, contiguous, codes_LP, ops=TRITON_OPS)


def score_depth(dtype: torch.dtype) -> int:
    """DEPTH of the score kernel for inputs of a dtype."""
    return SCORE_FLOAT32_DEPTH if dtype == torch.float32 else DEPTH


def interpreted() -> bool:
    """Whether the kernels were defined under Triton's interpreter, which runs them on CPU tensors."""
    return not isinstance(score_kernel, triton.JITFunction)


@triton.jit
def _logits(hidden_ptr, weight_ptr, row, col, num_rows, stride, num_cols, depth, DEPTH: tl.constexpr):
    """Logits of these positions and codes, [ROWS, COLS]; any number where there is none."""
    # Legal addresses in place of masks: with masks in both directions the float32 product spills.
    hidden_row = hidden_ptr + tl.minimum(row, num_rows - 1).to(tl.int64)[:, None] * stride
    weight_row = weight_ptr + tl.minimum(col, num_cols - 1)[None, :] * depth
    logits = tl.zeros([row.shape[0], col.shape[0]], tl.float32)
    for start in range(0, depth, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        hidden = tl.load(hidden_row + inner[None, :], mask=(inner < depth)[None, :], other=0.0)
        weight = tl.load(weight_row + inner[:, None], mask=(inner < depth)[:, None], other=0.0)
        logits = tl.dot(hidden, weight, logits, input_precision="ieee")
    return logits


@triton.jit
def score_kernel(
    hidden_ptr,
    weight_ptr,
    codes_ptr,
    stats_ptr,
    num_rows,
    stride,
    num_cols,
    depth,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """logp, peak, 1 / total and others / total of each position, [4, R]; zeros where the code is -1."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    code = tl.load(codes_ptr + row, mask=row < num_rows, other=-1)
    present = code != -1
    peak = tl.full([ROWS], _LOWEST, tl.float32)
    others = tl.zeros([ROWS], tl.float32)
    code_logit = tl.zeros([ROWS], tl.float32)
    # A block of padding has nothing to run over.
    limit = tl.where(tl.max(present.to(tl.int32), axis=0) > 0, num_cols, 0)  # type: ignore[operator]
    for start in range(0, limit, COLS):
        col = start + tl.arange(0, COLS)
        logits = _logits(hidden_ptr, weight_ptr, row, col, num_rows, stride, num_cols, depth, DEPTH)
        exists = (col < num_cols)[None, :]
        is_code = col[None, :] == code[:, None]
        new_peak = tl.maximum(peak, tl.max(tl.where(exists, logits, float("-inf")), axis=1))
        share = tl.where(exists & (col[None, :] != code[:, None]), tl.exp(logits - new_peak[:, None]), 0.0)
        others = others * tl.exp(peak - new_peak) + tl.sum(share, axis=1)
        code_logit += tl.sum(tl.where(is_code, logits, 0.0), axis=1)
        peak = new_peak
    total = others + tl.exp(code_logit - peak)
    logp = code_logit - peak - tl.log(total)
    logp = tl.where((code >= 0) & (code < num_cols), logp, float("nan"))
    size = num_rows.to(tl.int64)
    tl.store(stats_ptr + row, tl.where(present, logp, 0.0), mask=row < num_rows)
    tl.store(stats_ptr + size + row, tl.where(present, peak, 0.0), mask=row < num_rows)
    tl.store(stats_ptr + 2 * size + row, tl.where(present, 1 / total, 0.0), mask=row < num_rows)
    tl.store(stats_ptr + 3 * size + row, tl.where(present, others / total, 0.0), mask=row < num_rows)


@triton.jit
def differentiate_kernel(
    hidden_ptr,
    weight_ptr,
    codes_ptr,
    peak_ptr,
    minus_ptr,
    plus_ptr,
    tile_ptr,
    num_rows,
    stride,
    num_cols,
    depth,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Gradient of the logits: plus at the code, minus * exp(z - peak) elsewhere, 0 where the code is -1."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    code = tl.load(codes_ptr + row, mask=row < num_rows, other=-1)
    present = code != -1
    logits = _logits(hidden_ptr, weight_ptr, row, col, num_rows, stride, num_cols, depth, DEPTH)
    peak = tl.load(peak_ptr + row, mask=present, other=0.0)[:, None]
    minus = tl.load(minus_ptr + row, mask=present, other=0.0)[:, None]
    plus = tl.load(plus_ptr + row, mask=present, other=0.0)[:, None]
    grad = tl.where(col[None, :] == code[:, None], plus, minus * tl.exp(logits - peak))
    inside = (row < num_rows)[:, None] & (col < num_cols)[None, :]
    place = tile_ptr + row.to(tl.int64)[:, None] * num_cols + col[None, :]
    grad = tl.where(present[:, None], grad, 0.0)
    tl.store(place, grad.to(tile_ptr.dtype.element_ty), mask=inside)


def _score(hidden_RD: Tensor, weight_KD: Tensor, codes_R: Tensor) -> Tensor:
    stats_4R = hidden_RD.new_empty(4, len(codes_R), dtype=torch.float32)
    with _on(hidden_RD):
        score_kernel[(triton.cdiv(len(codes_R), ROWS),)](
            *_dense(hidden_RD, weight_KD, codes_R),
            stats_4R,
            *_sizes(hidden_RD, weight_KD),
            ROWS=ROWS,
            COLS=COLS,
            DEPTH=score_depth(hidden_RD.dtype),
            num_warps=NUM_WARPS,  # type: ignore[call-arg]
        )
    return stats_4R


def _differentiate(
    hidden_RD: Tensor, weight_KD: Tensor, codes_R: Tensor, peak_R: Tensor, minus_R: Tensor, plus_R: Tensor
) -> Tensor:
    tile_RK = hidden_RD.new_empty(len(codes_R), len(weight_KD))
    with _on(hidden_RD):
        differentiate_kernel[(triton.cdiv(len(codes_R), ROWS), triton.cdiv(len(weight_KD), COLS))](
            *_dense(hidden_RD, weight_KD, codes_R),
            peak_R,
            minus_R,
            plus_R,
            tile_RK,
            *_sizes(hidden_RD, weight_KD),
            ROWS=ROWS,
            COLS=COLS,
            DEPTH=DEPTH,
            num_warps=NUM_WARPS,  # type: ignore[call-arg]
        )
    return tile_RK


def _dense(hidden_RD: Tensor, weight_KD: Tensor, codes_R: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    assert hidden_RD.stride(1) == 1 or hidden_RD.shape[1] == 1, "the kernels take dense hidden states"
    assert weight_KD.is_contiguous(), "the kernels take contiguous weights"
    assert codes_R.is_contiguous(), "the kernels take contiguous codes"
    return hidden_RD, weight_KD, codes_R


def _sizes(hidden_RD: Tensor, weight_KD: Tensor) -> tuple[int, int, int, int]:
    """num_rows, stride of a row of the hidden states, num_cols, depth."""
    return len(hidden_RD), hidden_RD.stride(0), weight_KD.shape[0], weight_KD.shape[1]


def _on(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


TRITON_OPS = LevelOps(score=_score, differentiate=_differentiate, score_in_chunks=False)
