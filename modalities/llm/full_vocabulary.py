"""Exact values over the whole vocabulary, with gradient: the entropy, and the KL to a reference.

Shapes: N positions, H hidden, V vocabulary. Positions go in blocks whose logits are made again in the
backward pass, so that no [N, V] tensor exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from triptych.objectives.kl import exact_entropy, exact_kl

BLOCK = 256


def log_distribution(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    *,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """log softmax of the head's logits in float32, [N, V]; logits as `kernels.token_logps` has them."""
    z = torch.nn.functional.linear(hidden_NH, weight_VH.to(hidden_NH.dtype), bias_V).float() * scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.log_softmax(z / temperature, -1)


def entropy_and_kl(
    hidden_NH: Tensor, ref_NH: Tensor | None, weight_VH: Tensor, bias_V: Tensor | None, **logit_map: Any
) -> tuple[Tensor, Tensor]:
    """Entropy, and KL(policy || ref) where there is a reference (else 0), of every position, [N] each.

    Both models share the head; the reference's hidden states carry no gradient.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, len(hidden_NH), BLOCK):
        here = slice(start, start + BLOCK)
        ref = None if ref_NH is None else ref_NH[here]
        block = (hidden_NH[here], ref, weight_VH, bias_V, logit_map)
        parts.append(checkpoint(_block, *block, use_reentrant=False))  # type: ignore[arg-type]
    entropy, kl = (torch.cat(values) for values in zip(*parts, strict=True))
    return entropy, kl


def _block(
    hidden: Tensor, ref: Tensor | None, weight: Tensor, bias: Tensor | None, logit_map: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    logp = log_distribution(hidden, weight, bias, **logit_map)
    entropy = exact_entropy(logp)
    if ref is None:
        return entropy, torch.zeros_like(entropy)
    with torch.no_grad():
        base = log_distribution(ref, weight, bias, **logit_map)
    return entropy, exact_kl(logp, base)
