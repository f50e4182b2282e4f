"""Policy gradients on units of samples (tokens, turns, denoising steps, slots), [B, U] -> [B].

Each is a ratio level, a side and an aggregation from `surrogates.py` and `aggregation.py`; the mean over
rows is the method's loss. How rewards become advantages (group mean, leave-one-out, GAE) is
`advantages.py`. A KL penalty is a regulariser of its own with its own reference slot, so none of these
reads a reference but `a2po`. All need the exact log-probs of their own samples: an ELBO is refused.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from triptych.objectives.aggregation import batch_mean, row_mean, row_sum, unit_field
from triptych.objectives.inputs import UnitLogLik
from triptych.objectives.links import square
from triptych.objectives.registry import POSITIVE, Range, register
from triptych.objectives.scores import log1mexp
from triptych.objectives.surrogates import (
    clipped,
    detached_weight,
    log_clipped,
    ratio,
    row_advantage,
    row_log_ratio,
    row_mean_log_ratio,
    soft_gate,
    unit_log_ratio,
)

_ABOVE_ONE = Range(low=1, low_open=True)
policy_gradient = partial(register, takes=UnitLogLik, on_policy=True, requires=("old", "advantage"))


def clipped_units(
    units: UnitLogLik, *, clip: float, clip_high: float | None = None, delta: float | None = None
) -> Tensor:
    """PPO's clipped surrogate of every unit, [B, U], 0 at padding."""
    rho, advantage = ratio(unit_log_ratio(units)), unit_field(units, "advantage")
    return clipped(rho, advantage, clip=clip, clip_high=clip_high, delta=delta)


@register(
    "reinforce",
    takes=UnitLogLik,
    on_policy=True,
    requires=("advantage",),
    paper="Williams 1992, doi 10.1007/BF00992696",
    equation="theorem 1",
)
def reinforce(units: UnitLogLik) -> Tensor:
    """-sum_u A_u logp_u, [B]: the plain policy gradient of samples drawn by this very policy.

    With A = P(y > y') - 1/2 - tau sg(log-ratio) it is Nash-MD-PG, with A = win share - 1/2 minimaximalist
    SPO, and with A = -(log-ratio - leave-one-out mean) HyPO's online KL anchor.
    """
    return row_sum(-unit_field(units, "advantage") * unit_field(units, "logp"), units.mask)


@policy_gradient("ppo", couples_batch=True, paper="Schulman et al. 2017, arXiv 1707.06347", equation="7")
def ppo(units: UnitLogLik, *, clip: float) -> Tensor:
    """mean over the batch's units of -min(rho A, clip(rho, 1 - clip, 1 + clip) A), as [B] (`batch_mean`).

    rho = exp(logp - old). Advantages usually come from `gae`, whitened. The value loss is `ppo_value`.
    """
    return batch_mean(clipped_units(units, clip=clip), units.mask, units.num_units)


@policy_gradient(
    "grpo",
    ranges={"delta": _ABOVE_ONE},
    paper="Shao et al. 2024 (DeepSeekMath), arXiv 2402.03300",
    equation="3",
)
def grpo(
    units: UnitLogLik, *, clip: float, clip_high: float | None = None, delta: float | None = None
) -> Tensor:
    """(1/|row|) sum_u -min(rho_u A_u, clip(rho_u, 1 - clip, 1 + clip_high) A_u), [B].

    A = `z_score` of the group's rewards. The paper's beta * KL is a regulariser added in the recipe. delta
    bounds the ratio where A < 0 (dual clip).
    """
    return row_mean(clipped_units(units, clip=clip, clip_high=clip_high, delta=delta), units.mask)


@policy_gradient(
    "dr_grpo",
    ranges={"length": POSITIVE},
    paper="Liu et al. 2025 (Understanding R1-Zero-like training), arXiv 2503.20783",
    equation="Dr. GRPO",
)
def dr_grpo(units: UnitLogLik, *, clip: float, clip_high: float | None = None, length: float = 1.0) -> Tensor:
    """(1/length) sum_u -min(rho_u A_u, clip(rho_u) A_u), [B]: no division by the row's own length.

    A = `centred` rewards, not divided by their deviation. length: a constant, for example the longest answer
    allowed; 1 is the paper's formula.
    """
    return row_sum(clipped_units(units, clip=clip, clip_high=clip_high), units.mask) / length


@policy_gradient(
    "dapo",
    couples_batch=True,
    aliases=("bnpo",),
    ranges={"delta": _ABOVE_ONE},
    paper="Yu et al. 2025, arXiv 2503.14476",
    equation="8",
)
def dapo(units: UnitLogLik, *, clip: float, clip_high: float, delta: float | None = None) -> Tensor:
    """mean over the batch's units of -min(rho A, clip(rho, 1 - clip, 1 + clip_high) A), as [B].

    `ppo` with a higher upper clip, on group advantages. Not the mean of row means (`grpo`): a row's weight
    grows with its length. [B] is B * row sum / units in the batch; without `num_units` a batch cut into
    micro-batches divides each part by its own count, as TRL's `bnpo` does. Dynamic sampling and overlong
    shaping act on data and rewards.
    """
    loss = clipped_units(units, clip=clip, clip_high=clip_high, delta=delta)
    return batch_mean(loss, units.mask, units.num_units)


@policy_gradient(
    "rloo",
    row_advantage=True,
    paper="Ahmadian et al. 2024 (Back to basics), arXiv 2402.14740",
    equation="REINFORCE leave-one-out",
)
def rloo(units: UnitLogLik, *, clip: float, clip_high: float | None = None) -> Tensor:
    """-min(rho A, clip(rho) A), [B], rho = exp(sum_u (logp - old)) of the whole sample.

    A = `leave_one_out` of rewards that already hold -beta * KL, one value a row (their mean if units
    differ). At rho = 1 the gradient is the paper's -A grad logp; the clip is for reused samples, as in TRL.
    """
    return clipped(ratio(row_log_ratio(units)), row_advantage(units), clip=clip, clip_high=clip_high)


@policy_gradient("gspo", row_advantage=True, paper="Zheng et al. 2025, arXiv 2507.18071", equation="5, 7")
def gspo(units: UnitLogLik, *, clip: float, clip_high: float | None = None) -> Tensor:
    """-min(s A, clip(s) A), [B], s = exp(mean_u (logp - old)): one length-normalised ratio a sample.

    Clips are near 3e-4, not 0.2. Units that differ in advantage enter by their mean.
    """
    return clipped(ratio(row_mean_log_ratio(units)), row_advantage(units), clip=clip, clip_high=clip_high)


@policy_gradient("luspo", row_advantage=True, paper="LUSPO 2026, arXiv 2602.05261", equation="-")
def luspo(units: UnitLogLik, *, clip: float, clip_high: float | None = None) -> Tensor:
    """-|row| min(s A, clip(s) A), [B], s = exp(mean_u (logp - old)): length-unbiased `gspo`.

    The gradient is a sum over units rather than their mean.
    """
    return units.mask.sum(-1) * gspo(units, clip=clip, clip_high=clip_high)


@policy_gradient(
    "gmpo",
    row_advantage=True,
    paper="Zhao et al. 2025 (Geometric-mean policy optimization), arXiv 2507.20673",
    equation="geometric-mean objective",
)
def gmpo(units: UnitLogLik, *, clip: float, clip_high: float | None = None) -> Tensor:
    """-A exp(mean_u of logp - old, clipped to [-clip, clip_high]), [B]; the paper clips at 0.4."""
    high = clip if clip_high is None else clip_high
    bounded = log_clipped(unit_log_ratio(units), unit_field(units, "advantage"), clip=clip, clip_high=high)
    return -ratio(row_mean(bounded, units.mask)) * row_advantage(units)


@policy_gradient(
    "cispo",
    couples_batch=True,
    surrogate=True,
    paper="Chen et al. 2025 (MiniMax-M1), arXiv 2506.13585",
    equation="4, 5",
)
def cispo(units: UnitLogLik, *, clip_high: float, clip: float = 1.0) -> Tensor:
    """mean over the batch's units of -sg(clip(rho, 1 - clip, 1 + clip_high)) A logp, as [B].

    clip = 1 is no lower bound, as in the paper's runs. TRL's `epsilon_high` is the bound itself, 1 +
    clip_high.
    """
    weight = ratio(unit_log_ratio(units)).clamp(1 - clip, 1 + clip_high)
    loss = detached_weight(weight, unit_field(units, "advantage"), unit_field(units, "logp"))
    return batch_mean(loss, units.mask, units.num_units)


@policy_gradient(
    "sapo",
    ranges={"tau_negative": POSITIVE},
    paper="Gao et al. 2025 (Soft adaptive policy optimization), arXiv 2511.20347",
    equation="-",
)
def sapo(units: UnitLogLik, *, tau: float = 1.0, tau_negative: float = 1.05) -> Tensor:
    """(1/|row|) sum_u -(4/t) sigmoid(t (rho_u - 1)) A_u, [B]: a smooth gate in place of the clip.

    t = tau where A > 0, tau_negative elsewhere.
    """
    rho, advantage = ratio(unit_log_ratio(units)), unit_field(units, "advantage")
    return row_mean(soft_gate(rho, advantage, tau=tau, tau_negative=tau_negative), units.mask)


@policy_gradient(
    "vespo",
    surrogate=True,
    couples_batch=True,
    ranges=dict.fromkeys(("alpha", "delta", "alpha_negative", "delta_negative"), POSITIVE),
    paper="VESPO 2026, arXiv 2602.10693",
    equation="-",
)
def vespo(
    units: UnitLogLik,
    *,
    alpha: float = 2.0,
    delta: float = 3.0,
    alpha_negative: float = 3.0,
    delta_negative: float = 2.0,
) -> Tensor:
    """mean over the batch's units of -sg(phi(w)) A logp, as [B], phi(w) = exp(d) w^a exp(-d w), phi(1) = 1.

    w = exp(sum_u (logp - old)) of the whole sample; a, d = alpha, delta where A >= 0 and the negative ones
    elsewhere (TRL's k and lambda). TRL also clamps log-ratios at +-20, where phi is 0 anyway.
    """
    advantage = unit_field(units, "advantage")
    log_w = row_log_ratio(units).unsqueeze(-1)

    def log_phi(a: float, d: float) -> Tensor:
        return d + a * log_w - d * ratio(log_w)

    phi = torch.where(advantage >= 0, log_phi(alpha, delta), log_phi(alpha_negative, delta_negative)).exp()
    loss = detached_weight(phi, advantage, unit_field(units, "logp"))
    return batch_mean(loss, units.mask, units.num_units)


@policy_gradient(
    "ecpo",
    surrogate=True,
    ranges={"delta": POSITIVE},
    paper="OneRec technical report 2025, arXiv 2506.13695",
    equation="early-clipped GRPO",
)
def ecpo(units: UnitLogLik, *, clip: float, delta: float = 0.1) -> Tensor:
    """(1/|row|) sum_u -min(rho A, clip(rho) A), [B], rho = pi / max(old, sg(pi) / (1 + clip + delta)).

    `grpo` with a bound on the gradient where A < 0. Where A > 0 the minimum has cut the gradient already,
    so nothing changes there.
    """
    logp = unit_field(units, "logp")
    bound = torch.maximum(logp.detach() - math.log(1 + clip + delta), unit_field(units, "old"))
    rho, advantage = ratio(logp - bound), unit_field(units, "advantage")
    return row_mean(clipped(rho, advantage, clip=clip), units.mask)


@policy_gradient(
    "gbpo",
    surrogate=True,
    modalities=("llm", "recsys"),
    paper="OneRec-V2 2025, arXiv 2508.20900",
    equation="gradient-bounded policy optimization",
)
def gbpo(units: UnitLogLik) -> Tensor:
    """(1/|row|) sum_u -A_u pi_u / d_u, [B], d = max(old, sg(pi)) if A >= 0, else max(old, 1 - sg(pi)).

    Probabilities, not logs: no clip, and gradients no larger than those of binary cross-entropy.
    """
    logp, old = unit_field(units, "logp"), unit_field(units, "old")
    advantage = unit_field(units, "advantage")
    floor = torch.where(advantage >= 0, logp.detach(), log1mexp(logp.detach()))
    return row_mean(-ratio(logp - torch.maximum(old, floor)) * advantage, units.mask)


@policy_gradient(
    "ddpo",
    modalities=("diffusion",),
    ranges={"delta": POSITIVE},
    paper="Black et al. 2023, arXiv 2305.13301",
    equation="DDPO-IS",
)
def ddpo(units: UnitLogLik, *, clip: float = 1e-4, delta: float = 5.0) -> Tensor:
    """mean over denoising steps of -min(rho A, clip(rho, 1 - clip, 1 + clip) A), [B], A clamped to +-delta.

    logp_t: Gaussian log-density of step t, mean over latent dimensions as in the released code, hence the
    small clip. A: the image's reward, standardised per prompt, at every step. The paper sums over steps;
    the code and this take their mean.
    """
    rho, advantage = ratio(unit_log_ratio(units)), unit_field(units, "advantage").clamp(-delta, delta)
    return row_mean(clipped(rho, advantage, clip=clip), units.mask)


@register(
    "a2po",
    row_advantage=True,
    takes=UnitLogLik,
    needs_reference=True,
    on_policy=True,
    requires=("advantage",),
    paper="Brantley et al. 2025 (A*-PO), arXiv 2505.20686",
    equation="second stage",
)
def a2po(units: UnitLogLik, *, beta: float) -> Tensor:
    """(beta sum_u (logp - ref) - A)^2, [B]: regress the implicit reward onto the optimal advantage.

    A = R - V*, V* = beta log mean exp(R / beta) over samples of the reference, estimated beforehand; one
    value a row (their mean if units differ).
    """
    log_ratio = row_sum(unit_field(units, "logp") - unit_field(units, "ref"), units.mask)
    return square(beta * log_ratio, row_advantage(units))
