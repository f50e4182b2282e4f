"""The definition of the difference of two mean squared residuals; every faster form is tested against it.

Shapes: N rows (images), D numbers of one row.
"""

import torch
from torch import Tensor


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Arithmetic and sums run in float32, or in float64 if any input is float64."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def mean_difference(prediction_ND: Tensor, ref_ND: Tensor | None, target_ND: Tensor) -> Tensor:
    """mean (prediction - ref) (prediction + ref - 2 target) per row, [N]; no ref: the ref is the target.

    With residual e = prediction - target and change d = prediction - ref the product is d (2 e - d), which
    is e e where the ref is the target, to the last bit.
    """
    inputs = (prediction_ND, target_ND) if ref_ND is None else (prediction_ND, ref_ND, target_ND)
    wide = accumulation_dtype(*(tensor.dtype for tensor in inputs))
    prediction_ND = prediction_ND.to(wide)
    residual_ND = prediction_ND - target_ND.to(wide)
    if ref_ND is None:
        return residual_ND.square().mean(1)
    change_ND = prediction_ND - ref_ND.to(wide)
    return (change_ND * (2 * residual_ND - change_ND)).mean(1)
