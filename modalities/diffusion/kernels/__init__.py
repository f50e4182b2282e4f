"""Mean squared residuals of a noise prediction, and their difference from a reference's, in one pass.

`impl` is "reference" (the definition), "fused" (plain PyTorch, any device, a bounded temporary), "triton"
(CUDA or ROCm), or "auto": triton where it can run, fused elsewhere.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.modalities.diffusion.kernels import fused, reference
from triptych.modalities.diffusion.kernels.cost import bytes_moved, sdxl_section

__all__ = ["IMPLS", "Impl", "bytes_moved", "residual_difference", "sdxl_section", "squared_residual"]

Impl = Literal["auto", "reference", "fused", "triton"]
IMPLS: tuple[Impl, ...] = ("auto", "reference", "fused", "triton")

_log = logging.getLogger(__name__)


def squared_residual(prediction: Tensor, target: Tensor, *, impl: Impl = "auto") -> Tensor:
    """mean (prediction - target)^2 over all dims but the first.

    prediction and target [N, ...] of one shape; returns [N]. The same number as
    `residual_difference(prediction, target, target)`, to the last bit, with one tensor less to read. Dtypes,
    layouts, gradient and errors are those of `residual_difference`.
    """
    return _run({"prediction": prediction, "target": target}, impl)


def residual_difference(prediction: Tensor, ref: Tensor, target: Tensor, *, impl: Impl = "auto") -> Tensor:
    """mean (prediction - target)^2 - mean (ref - target)^2 over all dims but the first, without cancellation.

    It is mean (prediction - ref) (prediction + ref - 2 target), so a prediction close to the reference's does
    not lose its digits in the difference of two large means, and equal predictions give exactly 0.0.
    prediction, ref and target [N, ...] of one shape; returns [N].
    Dtypes may differ. All arithmetic is float32 (float64 if any input is), also under autocast, and so is the
    result. The gradient goes to the prediction alone, 2 (prediction - target) / D with D = numbers a row; ref
    is a constant. No form but "reference" can be differentiated twice.
    Inputs of one memory layout (contiguous, channels_last, rows of a larger batch) are read where they are;
    one whose layout differs from the prediction's is copied.

    Raises ValueError for shapes, dtypes or devices that do not fit, for rows without numbers, for a target
    that requires grad, and for an `impl` that cannot run here.
    """
    return _run({"prediction": prediction, "ref": ref.detach(), "target": target}, impl)


def _run(inputs: dict[str, Tensor], impl: Impl) -> Tensor:
    _check(inputs)
    form = _form(impl, inputs)
    rows = dict(zip(inputs, _rows(*inputs.values()), strict=True))
    device_type = inputs["prediction"].device.type
    # The meta device, on which shapes are worked out, has no autocast.
    with nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False):
        return form(rows["prediction"], rows.get("ref"), rows["target"])


def _rows(prediction: Tensor, *others: Tensor) -> Iterator[Tensor]:
    """Each input as [N, D], its rows dense and in the prediction's order of memory; copied only if not so."""
    strides = prediction.stride()
    order = sorted(range(1, prediction.ndim), key=lambda dim: -strides[dim])
    for tensor in (prediction, *others):
        permuted = tensor.permute(0, *order)
        rows_ND = permuted.reshape(len(tensor), math.prod(permuted.shape[1:]))
        yield rows_ND if rows_ND.stride(1) == 1 else rows_ND.contiguous()


def _form(impl: Impl, inputs: dict[str, Tensor]) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; valid: {', '.join(IMPLS)}")
    obstacle = None if impl in ("reference", "fused") else _why_not_triton(inputs)
    if impl == "auto":
        impl = "fused" if obstacle else "triton"
        _announce(impl, inputs["prediction"].device.type, obstacle)
    elif obstacle:
        raise ValueError(f"impl 'triton' cannot run: {obstacle}; 'auto', 'fused' and 'reference' can")
    forms: dict[str, Any] = {"reference": reference, "fused": fused}
    return (_triton_kernels() if impl == "triton" else forms[impl]).mean_difference


def _why_not_triton(inputs: dict[str, Tensor]) -> str | None:
    """Why the Triton form cannot take these inputs, or None if it can."""
    for name, tensor in inputs.items():
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"it takes bfloat16, float16 or float32, and {name} is {tensor.dtype}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    device = inputs["prediction"].device
    if device.type != "cuda" and not _triton_kernels().interpreted():
        return f"it needs a CUDA or ROCm device, and prediction is on {device}"
    return None


def _triton_kernels() -> Any:
    from triptych.modalities.diffusion.kernels import triton_kernels

    return triton_kernels


@cache
def _announce(impl: str, device_type: str, obstacle: str | None) -> None:
    reason = f" (not triton: {obstacle})" if obstacle else ""
    _log.info("residuals on %s run the %s form%s", device_type, impl, reason)


def _check(inputs: dict[str, Tensor]) -> None:
    names = " and ".join(inputs) if len(inputs) == 2 else "prediction, ref and target"
    shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
    shape = shapes["prediction"]
    if not shape or any(other != shape for other in shapes.values()):
        found = ", ".join(f"{name} {other}" for name, other in shapes.items())
        raise ValueError(f"shapes are {found}; valid: one shape [N, ...] for {names}")
    if 0 in shape[1:]:
        raise ValueError(f"prediction is {shape}, whose rows hold no number; valid: at least one a row")
    dtypes = [tensor.dtype for tensor in inputs.values()]
    if not all(dtype.is_floating_point and dtype.itemsize > 1 for dtype in dtypes):
        found = ", ".join(map(str, dtypes))
        raise ValueError(f"dtypes of {names} are {found}; valid: bfloat16, float16, float32, float64")
    devices = {tensor.device for tensor in inputs.values()}
    if len(devices) > 1:
        raise ValueError(f"{names} are on {sorted(map(str, devices))}; valid: all on one device")
    if inputs["target"].requires_grad:
        raise ValueError("target requires grad; valid: a constant, as only the prediction gets a gradient")
