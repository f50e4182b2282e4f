"""Losses of critics and reward models, [B].

A reward model's scalar score stands where a log-likelihood stands (LogLik.logp with count 1;
UnitLogLik.logp with one unit per attribute), so pairs, lists and units serve it unchanged. A critic's
values are UnitLogLik.value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triptych.objectives.aggregation import batch_mean, clean, row_mean, row_sum, unit_field
from triptych.objectives.inputs import ListLogLik, LogLik, PairLogLik, UnitLogLik
from triptych.objectives.links import logistic, square
from triptych.objectives.listwise import ordered, ranked_pairs_loss
from triptych.objectives.registry import NON_NEGATIVE, register
from triptych.objectives.scores import logp_margin


@register(
    "reward_bt",
    takes=PairLogLik,
    uses=("margin",),
    aliases=("bradley_terry",),
    ranges={"alpha": NON_NEGATIVE},
    paper="Ouyang et al. 2022, arXiv 2203.02155; margin: Touvron et al. 2023, arXiv 2307.09288",
    equation="1; margin: 2",
)
def reward_bt(pair: PairLogLik, *, alpha: float = 0.0) -> Tensor:
    """-log sigmoid(s_w - s_l - m) + alpha (s_w + s_l)^2, [B]; s = logp holds the model's scalar score.

    m = pair.margin where there is one. alpha centres the scores of a pair around 0 (Eisenstein et al. 2023,
    arXiv 2312.09244; TRL's center_rewards_coefficient).
    """
    gap = logp_margin(pair) if pair.margin is None else logp_margin(pair) - pair.margin
    return logistic(gap) + alpha * square(pair.chosen.logp + pair.rejected.logp, 0.0)


@register(
    "reward_regression",
    takes=UnitLogLik,
    requires=("target",),
    choices={"reduce": ("sum", "per_term")},
    paper="Wang et al. 2024 (Directional preference alignment), arXiv 2402.18571",
    equation="multi-objective reward loss",
)
def reward_regression(units: UnitLogLik, *, reduce: str = "sum") -> Tensor:
    """sum over the attributes k rated in a row of (s_k - rating_k)^2, [B]; units are attributes, s = logp.

    Attributes that a data set lacks are masked. reduce 'per_term' divides by their number, so that rows from
    richly rated data sets do not weigh more.
    """
    error = square(unit_field(units, "logp"), unit_field(units, "target"))
    return row_sum(error, units.mask) if reduce == "sum" else row_mean(error, units.mask)


def gap_list(
    better_worse: Tensor, both_better: Tensor, both_worse: Tensor, worse_better: Tensor
) -> ListLogLik:
    """The four gap scores of `pit_gap` as a list, [B, 4].

    G(y_w, y_l), G(y_w, y_w), G(y_l, y_l), G(y_l, y_w), each [B]: gap of the first answer over the second one.
    """
    scores = torch.stack([better_worse, both_better, both_worse, worse_better], dim=-1)
    relevance = scores.new_tensor([1.0, 0.0, 0.0, -1.0]).expand(scores.shape)
    return ListLogLik(LogLik(scores, torch.ones_like(scores)), relevance)


@register(
    "pit_gap",
    takes=ListLogLik,
    paper="Wang et al. 2023 (PIT), arXiv 2310.00898",
    equation="gap reward loss",
)
def pit_gap(ranked: ListLogLik) -> Tensor:
    """-sum_{i better than j} log sigmoid(s_i - s_j), [B]: unweighted pairwise loss of scores s = logp.

    On `gap_list` these are PIT's five terms: G(w,l) above G(w,w), G(l,l) and G(l,w), and G(w,w) and G(l,l)
    above G(l,w); G(w,w) and G(l,l) are tied, hence not compared. On other graded lists it is a
    Bradley-Terry reward loss over all ordered pairs (`reward_bt` for K = 2), without dividing by their
    number.
    """
    score = clean(ranked.loglik.logp, ranked.valid())
    return ranked_pairs_loss(score, ordered(ranked).to(score.dtype))


@register(
    "value_regression",
    takes=UnitLogLik,
    couples_batch=True,
    requires=("value", "target"),
    paper="Schulman et al. 2017, arXiv 1707.06347",
    equation="9 (L^VF, with a factor 1/2)",
)
def value_regression(units: UnitLogLik) -> Tensor:
    """mean over the batch's units of (v - G)^2 / 2, as [B] (`batch_mean`); G = target, the return."""
    error = square(unit_field(units, "value"), unit_field(units, "target"))
    return batch_mean(error, units.mask, units.num_units) / 2


@register(
    "ppo_value",
    takes=UnitLogLik,
    couples_batch=True,
    requires=("value", "target", "old_value"),
    paper="Ivison et al. 2024 (Unpacking DPO and PPO), arXiv 2406.09279",
    equation="clipped value loss of PPO's released code",
)
def ppo_value(units: UnitLogLik, *, clip: float) -> Tensor:
    """mean over the batch's units of max((v - G)^2, (clip(v, v_old +- clip) - G)^2) / 2, as [B].

    G = target, the return of `gae`; v_old = old_value, the critic's value when the sample was drawn. Where
    the clip binds and is the larger error, v has no gradient.
    """
    value, target = unit_field(units, "value"), unit_field(units, "target")
    old = unit_field(units, "old_value")
    error = torch.maximum(square(value, target), square(value.clamp(old - clip, old + clip), target))
    return batch_mean(error, units.mask, units.num_units) / 2


def log_ratio_to_go(units: UnitLogLik) -> Tensor:
    """sum_{i >= t} (logp_i - ref_i), [B, U], over the units from t on."""
    ratio = unit_field(units, "logp") - unit_field(units, "ref")
    return ratio.flip(-1).cumsum(-1).flip(-1)


@register(
    "oreo_value",
    takes=UnitLogLik,
    needs_reference=True,
    surrogate=True,
    requires=("value", "target"),
    paper="Wang et al. 2024 (OREO), arXiv 2412.16145",
    equation="value loss",
)
def oreo_value(units: UnitLogLik, *, beta: float) -> Tensor:
    """mean_t (V_t - R + beta sg sum_{i >= t} l_i)^2, [B], l = logp - ref: the critic's soft Bellman error.

    R = target: the outcome reward at every unit. Units are tokens or steps, V_t the value before unit t.
    Offline: the samples may come from anywhere. Gradient into value only.
    """
    path = beta * log_ratio_to_go(units).detach()
    return row_mean(square(unit_field(units, "value") + path, unit_field(units, "target")), units.mask)


@register(
    "oreo_policy",
    takes=UnitLogLik,
    needs_reference=True,
    surrogate=True,
    requires=("value", "target"),
    paper="Wang et al. 2024 (OREO), arXiv 2412.16145",
    equation="policy loss",
)
def oreo_policy(units: UnitLogLik, *, beta: float) -> Tensor:
    """mean_t (sg V_t - R + beta l_t + beta sg sum_{i > t} l_i)^2, [B]: the same number as `oreo_value`.

    Every unit gets its own residual, and only its own log-prob a gradient. The paper's exact KL per token
    is a regulariser added in the recipe.
    """
    own = unit_field(units, "logp") - unit_field(units, "ref")
    later = (log_ratio_to_go(units) - own).detach()
    residual = unit_field(units, "value").detach() + beta * (own + later)
    return row_mean(square(residual, unit_field(units, "target")), units.mask)
