"""The definition of a code's log-likelihood under its level's head; every faster form is tested against it.

Shapes: P positions of a level, L levels, K codes of a level, D width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

ABSENT = -1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Reductions run in float32, or in float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logps(hidden_PLD: Tensor, weights: Sequence[Tensor], codes_LP: Tensor) -> Tensor:
    """log softmax(hidden[p, l] @ weights[l].T)[codes[l, p]], [L, P]; 0.0 where the code is -1.

    Materialises the [P, K] logits of every level. A code outside [0, K) that is not -1 gives NaN.
    """
    levels = zip(hidden_PLD.unbind(1), weights, codes_LP, strict=True)
    return torch.stack([_level(hidden_PD, weight_KD, codes_P) for hidden_PD, weight_KD, codes_P in levels])


def _level(hidden_PD: Tensor, weight_KD: Tensor, codes_P: Tensor) -> Tensor:
    absent_P, num_codes = codes_P == ABSENT, weight_KD.shape[0]
    # Zeros instead of the hidden state of a padding position, which may be NaN.
    logits_PK = functional.linear(hidden_PD.masked_fill(absent_P[:, None], 0.0), weight_KD)
    logps_PK = torch.log_softmax(logits_PK, dim=-1, dtype=accumulation_dtype(logits_PK.dtype))
    logp_P = logps_PK.gather(1, codes_P.clamp(0, num_codes - 1)[:, None])[:, 0]
    outside_P = (codes_P < 0) | (codes_P >= num_codes)
    return logp_P.masked_fill(outside_P, float("nan")).masked_fill(absent_P, 0.0)
