"""Log-likelihoods of semantic-id codes straight from hidden states and one head a level.

`impl` is "reference" (the definition; materialises the logits), "chunked" (plain PyTorch, any device),
"triton" (CUDA or ROCm), or "auto": triton where it can run, chunked elsewhere.

Shapes: N sessions, S positions of a session, L levels, K codes of a level, P positions of one level, D width.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.modalities.recsys.kernels import chunked, reference
from triptych.modalities.recsys.kernels.cost import Cost, session_costs
from triptych.modalities.recsys.kernels.reference import ABSENT

__all__ = ["ABSENT", "IMPLS", "Cost", "Impl", "code_logps", "session_costs", "session_logps"]

Impl = Literal["auto", "reference", "chunked", "triton"]
IMPLS: tuple[Impl, ...] = ("auto", "reference", "chunked", "triton")

_log = logging.getLogger(__name__)


def session_logps(
    hidden: Tensor, weights: Sequence[Tensor], codes: Tensor, *, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """(sum_s logp[n, s], logp[n, s]), logp[n, s] = log softmax(hidden[n, s] @ W_l.T)[codes[n, s]], l = s % L.

    hidden [N, S, D], weights: L heads [K_l, D], codes [N, S] int64 with S a multiple of L; returns [N] and
    [N, S] in float32 (float64 for float64 inputs), in nats. A position whose code is -1 is absent: it gives
    0.0 and passes no gradient, even if its hidden state is NaN. Gradients from both results go to those of
    hidden and weights that require them. Under autocast the products run in its dtype. The sum is over a row
    of [N, S], so its order is fixed: two runs give the same bits. Hidden states that are not contiguous are
    copied.

    Raises ValueError for shapes, dtypes or codes that do not fit, and for an `impl` that cannot run here. On
    an accelerator a code outside [0, K_l) gives NaN instead, as checking it would wait for the device.
    """
    _check_session_shapes(hidden, weights, codes)
    num_levels = len(weights)
    num_items = codes.numel() // num_levels
    hidden_PLD = hidden.reshape(num_items, num_levels, hidden.shape[2])
    logp_LP = _run(hidden_PLD, weights, codes.reshape(num_items, num_levels).t(), impl)
    logp = logp_LP.t().reshape(codes.shape)
    return logp.sum(1), logp


def code_logps(hidden: Tensor, weight: Tensor, codes: Tensor, *, impl: Impl = "auto") -> Tensor:
    """log softmax(hidden @ weight.T)[code] for positions of one level, [P].

    hidden [P, D], weight [K, D], codes [P] int64; otherwise as `session_logps`.
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden is {list(hidden.shape)}; valid: [P, D]")
    if codes.shape != hidden.shape[:1]:
        raise ValueError(f"codes is {list(codes.shape)}; valid: [{hidden.shape[0]}], one code a position")
    _check_weights(hidden, [weight], codes)
    return _run(hidden[:, None], [weight], codes[None], impl)[0]


def _run(hidden_PLD: Tensor, weights: Sequence[Tensor], codes_LP: Tensor, impl: Impl) -> Tensor:
    device_type = hidden_PLD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden_PLD, weights = hidden_PLD.to(dtype), [weight.to(dtype) for weight in weights]
    _check_dtypes(hidden_PLD, weights)
    _check_codes(codes_LP, weights)
    form = _form(impl, hidden_PLD)
    with torch.autocast(device_type, enabled=False):
        return form(hidden_PLD.contiguous(), weights, codes_LP.contiguous())


def _form(impl: Impl, hidden: Tensor) -> Callable[[Tensor, Sequence[Tensor], Tensor], Tensor]:
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; valid: {', '.join(IMPLS)}")
    obstacle = None if impl in ("reference", "chunked") else _why_not_triton(hidden)
    if impl == "auto":
        impl = "chunked" if obstacle else "triton"
        _announce(impl, hidden.device.type, obstacle)
    elif obstacle:
        raise ValueError(f"impl 'triton' cannot run: {obstacle}; 'auto', 'chunked' and 'reference' can")
    forms: dict[str, Any] = {"reference": reference, "chunked": chunked}
    return (_triton_kernels() if impl == "triton" else forms[impl]).logps


def _why_not_triton(hidden: Tensor) -> str | None:
    """Why the Triton form cannot take these inputs, or None if it can."""
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it takes bfloat16, float16 or float32, and hidden is {hidden.dtype}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if hidden.device.type != "cuda" and not _triton_kernels().interpreted():
        return f"it needs a CUDA or ROCm device, and hidden is on {hidden.device}"
    return None


def _triton_kernels() -> Any:
    from triptych.modalities.recsys.kernels import triton_kernels

    return triton_kernels


@cache
def _announce(impl: str, device_type: str, obstacle: str | None) -> None:
    reason = f" (not triton: {obstacle})" if obstacle else ""
    _log.info("code_logps on %s runs the %s form%s", device_type, impl, reason)


def _check_session_shapes(hidden: Tensor, weights: Sequence[Tensor], codes: Tensor) -> None:
    if hidden.ndim != 3:
        raise ValueError(f"hidden is {list(hidden.shape)}; valid: [N, S, D]")
    if codes.shape != hidden.shape[:2]:
        raise ValueError(f"codes is {list(codes.shape)}; valid: {list(hidden.shape[:2])}, one a position")
    if len(weights) == 0:
        raise ValueError("weights is empty; valid: one [K, D] head a level")
    if codes.shape[1] % len(weights):
        raise ValueError(
            f"sessions have {codes.shape[1]} positions; valid: a multiple of the {len(weights)} heads"
        )
    _check_weights(hidden, weights, codes)


def _check_weights(hidden: Tensor, weights: Sequence[Tensor], codes: Tensor) -> None:
    for level, weight in enumerate(weights):
        if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or len(weight) == 0:
            raise ValueError(
                f"the weight of level {level} is {list(weight.shape)}; valid: [K > 0, {hidden.shape[-1]}]"
            )
    devices = {t.device for t in (hidden, codes, *weights)}
    if len(devices) > 1:
        raise ValueError(f"inputs are on {sorted(map(str, devices))}; valid: all on one device")


def _check_dtypes(hidden: Tensor, weights: Sequence[Tensor]) -> None:
    dtypes = [hidden.dtype, *(weight.dtype for weight in weights)]
    if len(set(dtypes)) > 1 or not dtypes[0].is_floating_point:
        names = ", ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"dtypes of hidden and weights are {names}; valid: one floating dtype, or autocast")


def _check_codes(codes_LP: Tensor, weights: Sequence[Tensor]) -> None:
    if codes_LP.dtype != torch.int64:
        raise ValueError(f"codes are {codes_LP.dtype}; valid: torch.int64")
    if codes_LP.device.type != "cpu" or codes_LP.numel() == 0:
        return
    for level, (codes_P, weight) in enumerate(zip(codes_LP, weights, strict=True)):
        low, high = int(codes_P.min()), int(codes_P.max())
        if low < ABSENT or high >= len(weight):
            raise ValueError(
                f"codes of level {level} run from {low} to {high}; "
                f"valid: 0 to {len(weight) - 1}, or {ABSENT} for absent"
            )
