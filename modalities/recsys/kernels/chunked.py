"""log p(code) from chunks of the logits in plain PyTorch: no [P, K] tensor outlives its chunk.

Shapes: P positions of a level, R positions of one chunk, L levels, K codes of a level, D width.

For one position with logits z, code y and peak m = max z:
    others = sum_{k != y} exp(z_k - m)        total = others + exp(z_y - m)
    logp = z_y - m - log total
    d logp / d z_k = -exp(z_k - m) / total    (k != y)        d logp / d z_y = others / total
The code is kept out of `others`, so its gradient 1 - p is exact where p is close to 1. The forward pass saves
m, 1 / total and others / total; the backward pass makes the logits of a chunk again: four matrix products in
all, three with a frozen head.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from triptych.modalities.recsys.kernels.reference import ABSENT, accumulation_dtype

# Logits of one chunk: 1 MiB of float32 stays in a CPU's cache; elsewhere 64 MiB of bfloat16.
_CPU_LOGITS, _ACCELERATOR_LOGITS = 2**18, 2**25


@dataclass(frozen=True, slots=True)
class LevelOps:
    """The two passes over some positions of one level.

    score(hidden_RD, weight_KD, codes_R): logp, m, 1 / total and others / total, [4, R]; zeros where the code
        is absent, whatever the hidden state there; logp is NaN for a code outside [0, K).
    differentiate(hidden_RD, weight_KD, codes_R, peak_R, minus_R, plus_R): the gradient of the logits, plus at
        the code and minus * exp(z - peak) elsewhere, [R, K], in the dtype of `hidden_RD`.
    score_in_chunks: whether `score` makes logits, and so wants no more positions than `differentiate`.
    """

    score: Callable[[Tensor, Tensor, Tensor], Tensor]
    differentiate: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    score_in_chunks: bool


def chunk_rows(num_codes: int, device_type: str) -> int:
    """Positions of a chunk: `chunk_rows * num_codes` logits are the largest temporary for any P."""
    return max(1, (_CPU_LOGITS if device_type == "cpu" else _ACCELERATOR_LOGITS) // num_codes)


def logps(hidden_PLD: Tensor, weights: Sequence[Tensor], codes_LP: Tensor) -> Tensor:
    """As `reference.logps`, with a bounded temporary (`chunk_rows`)."""
    return chunked_logps(hidden_PLD, weights, codes_LP, ops=TORCH_OPS)


def chunked_logps(
    hidden_PLD: Tensor, weights: Sequence[Tensor], codes_LP: Tensor, *, ops: LevelOps
) -> Tensor:
    """The chunked form with the passes of `ops`. On a CPU absent positions cost nothing."""
    return _Logps.apply(hidden_PLD, codes_LP, ops, *weights)  # pyright: ignore[reportReturnType]


class _Logps(torch.autograd.Function):
    """Saves its inputs and three numbers a position."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, hidden_PLD: Tensor, codes_LP: Tensor, ops: LevelOps, *weights: Tensor
    ) -> Tensor:
        stats_4LP = hidden_PLD.new_zeros(4, *codes_LP.shape, dtype=accumulation_dtype(hidden_PLD.dtype))
        dtype = _matmul_dtype(hidden_PLD)
        for level, weight_KD in enumerate(weights):
            codes_P, inputs_KD = codes_LP[level], weight_KD.to(dtype)
            step = _step(weight_KD) if ops.score_in_chunks else max(1, len(codes_P))
            for rows in _spans(codes_P, step):
                hidden_RD = hidden_PLD[rows, level].to(dtype)
                stats_4LP[:, level, rows] = ops.score(hidden_RD, inputs_KD, codes_P[rows])
        ctx.ops = ops
        ctx.save_for_backward(hidden_PLD, codes_LP, stats_4LP, *weights)
        return stats_4LP[0].clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_LP: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden_PLD, codes_LP, stats_4LP, *weights = ctx.saved_tensors
        needs_hidden, _, _, *needs_weight = ctx.needs_input_grad
        # Zeros, as a CPU leaves out the absent positions.
        grad_PLD = torch.zeros_like(hidden_PLD) if needs_hidden else None
        grads: list[Tensor | None] = []
        for level, weight_KD in enumerate(weights):
            grad_KD = torch.zeros_like(weight_KD, dtype=stats_4LP.dtype) if needs_weight[level] else None
            tiles = _tiles(hidden_PLD, weight_KD, codes_LP, stats_4LP, grad_LP, level, ctx.ops)
            inputs_KD = weight_KD.to(_matmul_dtype(hidden_PLD))
            for rows, hidden_RD, tile_RK in tiles:
                if grad_PLD is not None:
                    grad_PLD[rows, level] = torch.mm(tile_RK, inputs_KD).to(grad_PLD.dtype)
                if grad_KD is not None:
                    _add_product_(grad_KD, tile_RK.t(), hidden_RD)
            grads.append(None if grad_KD is None else grad_KD.to(weight_KD.dtype))
        return grad_PLD, None, None, *grads


def _tiles(
    hidden_PLD: Tensor,
    weight_KD: Tensor,
    codes_LP: Tensor,
    stats_4LP: Tensor,
    grad_LP: Tensor,
    level: int,
    ops: LevelOps,
) -> Iterator[tuple[slice | Tensor, Tensor, Tensor]]:
    """Positions, their hidden states and the gradient of their logits, chunk by chunk."""
    dtype = _matmul_dtype(hidden_PLD)
    codes_P, inputs_KD = codes_LP[level], weight_KD.to(dtype)
    _, peak_P, inverse_P, rest_P = stats_4LP[:, level]
    minus_P, plus_P = -grad_LP[level] * inverse_P, grad_LP[level] * rest_P
    for rows in _spans(codes_P, _step(weight_KD)):
        codes_R = codes_P[rows]
        hidden_RD = hidden_PLD[rows, level].to(dtype)
        if isinstance(rows, slice):
            # The products must not meet a NaN at a padding position.
            hidden_RD = hidden_RD.masked_fill(codes_R[:, None] == ABSENT, 0.0)
        yield (
            rows,
            hidden_RD,
            ops.differentiate(hidden_RD, inputs_KD, codes_R, peak_P[rows], minus_P[rows], plus_P[rows]),
        )


def _step(weight_KD: Tensor) -> int:
    return chunk_rows(weight_KD.shape[0], weight_KD.device.type)


def _spans(codes_P: Tensor, step: int) -> Iterator[slice | Tensor]:
    """Up to `step` positions at a time; on a CPU only those present, elsewhere that would be a wait."""
    if _may_look(codes_P):
        present = (codes_P != ABSENT).nonzero()[:, 0]
        if len(present) < len(codes_P):
            # The split of no position at all is one empty chunk.
            yield from present.split(step) if len(present) else ()
            return
    yield from (slice(start, start + step) for start in range(0, len(codes_P), step))


def _may_look(codes: Tensor) -> bool:
    """Whether reading the codes does not make the host wait for the device."""
    return codes.device.type == "cpu"


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """The inputs' own on CUDA and ROCm; elsewhere at least float32, the faster one on most CPUs."""
    return hidden.dtype if hidden.device.type == "cuda" else torch.promote_types(hidden.dtype, torch.float32)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, never rounded below the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(_wide_product(left, right))


def _logits(hidden_RD: Tensor, weight_KD: Tensor) -> Tensor:
    """hidden @ weight.T in the accumulation dtype."""
    if hidden_RD.dtype == accumulation_dtype(hidden_RD.dtype):
        return torch.mm(hidden_RD, weight_KD.t())
    return _wide_product(hidden_RD, weight_KD.t())


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right of half-precision tensors on CUDA or ROCm, in float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


def _score(hidden_RD: Tensor, weight_KD: Tensor, codes_R: Tensor) -> Tensor:
    absent_R, num_codes = codes_R == ABSENT, weight_KD.shape[0]
    logits_RK = _logits(hidden_RD, weight_KD)
    column_R1 = codes_R.clamp(0, num_codes - 1)[:, None]
    code_R, peak_R = logits_RK.gather(1, column_R1)[:, 0], logits_RK.amax(1)
    others_R = logits_RK.sub_(peak_R[:, None]).exp_().scatter_(1, column_R1, 0.0).sum(1)
    total_R = others_R + torch.exp(code_R - peak_R)
    logp_R = code_R - peak_R - torch.log(total_R)
    logp_R = logp_R.masked_fill((codes_R < 0) | (codes_R >= num_codes), float("nan"))
    stats_4R = torch.stack((logp_R, peak_R, 1 / total_R, others_R / total_R))
    return stats_4R.masked_fill_(absent_R, 0.0)


def _differentiate(
    hidden_RD: Tensor, weight_KD: Tensor, codes_R: Tensor, peak_R: Tensor, minus_R: Tensor, plus_R: Tensor
) -> Tensor:
    tile_RK = _logits(hidden_RD, weight_KD).sub_(peak_R[:, None]).exp_().mul_(minus_R[:, None])
    column_R1 = codes_R.clamp(0, weight_KD.shape[0] - 1)[:, None]
    return tile_RK.scatter_(1, column_R1, plus_R[:, None]).to(hidden_RD.dtype)


TORCH_OPS = LevelOps(score=_score, differentiate=_differentiate, score_in_chunks=True)
