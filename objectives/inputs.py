"""What an objective reads: log-likelihoods of candidates, arranged by the kind of feedback.

Every tensor is checked for shape when the input is made. Half-precision values become float32 at the
door, and every reference is detached, so no objective has to think of either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)
Present = TypeVar("Present")


def _prepare(self: Any, *, detached: tuple[str, ...]) -> None:
    """Cast half-precision fields to float32 and detach the named ones, in place of a frozen dataclass."""
    for field in fields(self):
        value = getattr(self, field.name)
        if not isinstance(value, Tensor):
            continue
        if value.dtype in _HALF:
            value = value.float()
        if field.name in detached:
            value = value.detach()
        object.__setattr__(self, field.name, value)


def _same_shape(owner: str, shape: torch.Size, **tensors: Tensor | LogLik | None) -> None:
    for name, value in tensors.items():
        tensor = value.logp if isinstance(value, LogLik) else value
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{owner}.{name} has shape {tuple(tensor.shape)}; expected {tuple(shape)}")


def _rank(owner: str, field: str, tensor: Tensor, names: str) -> None:
    if tensor.ndim != len(names):
        raise ValueError(f"{owner}.{field} has shape {tuple(tensor.shape)}; expected [{','.join(names)}]")


def _fractions(owner: str, **tensors: Tensor | None) -> None:
    """Refuse values outside [0, 1]. Looked at on the CPU only: elsewhere it would wait for the device."""
    for name, tensor in tensors.items():
        if tensor is None or tensor.device.type != "cpu":
            continue
        if not bool(((tensor >= 0) & (tensor <= 1)).all()):
            raise ValueError(f"{owner}.{name} has values outside [0, 1]: {tensor}")


def present(value: Present | None, field: str) -> Present:
    """The value of an optional field; ValueError naming the field when it is absent."""
    if value is None:
        raise ValueError(f"this objective needs {field}, which is None")
    return value


@dataclass(frozen=True, slots=True)
class LogLik:
    """Log-likelihood of candidates of any shape [*].

    logp: natural log, summed over the terms of a candidate (tokens, slots; 1 for an ELBO).
    count: number of terms summed. ref: the same sum under the reference; detached. Shapes all [*].
    head, ref_head: the sums over the first terms only, up to the public length min(|y_w|, |y_l|) of the pair.
    collision: sum over terms of log sum_v p(v)^2 under the policy, the log-probability that two draws agree;
    detached (WPO's alignment).
    """

    logp: Tensor
    count: Tensor
    ref: Tensor | None = None
    head: Tensor | None = None
    ref_head: Tensor | None = None
    collision: Tensor | None = None

    def __post_init__(self) -> None:
        _prepare(self, detached=("ref", "count", "ref_head", "collision"))
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "logp"}
        _same_shape("LogLik", self.logp.shape, **rest)

    def log_ratio(self) -> Tensor:
        """logp - ref, [*]: the implicit reward without its beta (Rafailov et al. 2023, eq. 5)."""
        return self.logp - self.reference()

    def mean(self) -> Tensor:
        """logp / count, [*]; 0 where count is 0."""
        return self.logp / self.count.clamp(min=1)

    def mean_log_ratio(self) -> Tensor:
        """(logp - ref) / count, [*]."""
        return self.log_ratio() / self.count.clamp(min=1)

    def reference(self) -> Tensor:
        """The reference's log-likelihood, [*]; ValueError when there is none."""
        return present(self.ref, "LogLik.ref, the reference's log-likelihood")

    def mapped(self, fn: Callable[[Tensor], Tensor]) -> LogLik:
        """`fn` applied to every tensor, absent ones left absent: select, gather or reshape candidates."""

        def apply(t: Tensor | None) -> Tensor | None:
            return None if t is None else fn(t)

        rest = (self.ref, self.head, self.ref_head, self.collision)
        return LogLik(fn(self.logp), fn(self.count), *(apply(t) for t in rest))


@dataclass(frozen=True, slots=True)
class PairLogLik:
    """Two candidates of one context, [B] each.

    strength: P(chosen preferred) in [0, 1], [B], absent = 1. margin: quality gap >= 0, [B].
    smoothing: label-flip probability of each pair in [0, 1], [B], absent = 0.
    win_chosen, win_rejected: win rates of each side against the policy's own samples in [0, 1], [B].
    gold: a third, best candidate of the context. calibration: a sample of the calibration distribution
    (VPO, XPO). All but the log-likelihoods are detached.
    """

    chosen: LogLik
    rejected: LogLik
    strength: Tensor | None = None
    margin: Tensor | None = None
    smoothing: Tensor | None = None
    win_chosen: Tensor | None = None
    win_rejected: Tensor | None = None
    gold: LogLik | None = None
    calibration: LogLik | None = None

    def __post_init__(self) -> None:
        fractions = ("strength", "smoothing", "win_chosen", "win_rejected")
        _prepare(self, detached=(*fractions, "margin"))
        _rank("PairLogLik", "chosen", self.chosen.logp, "B")
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "chosen"}
        _same_shape("PairLogLik", self.chosen.logp.shape, **rest)
        _fractions("PairLogLik", **{name: rest[name] for name in fractions})

    def swapped(self) -> PairLogLik:
        """The same pair with the label turned round.

        Strength becomes 1 - strength, margin its negative and the win rates change places; smoothing, gold
        and calibration do not depend on the label.
        """
        return replace(
            self,
            chosen=self.rejected,
            rejected=self.chosen,
            strength=None if self.strength is None else 1 - self.strength,
            margin=None if self.margin is None else -self.margin,
            win_chosen=self.win_rejected,
            win_rejected=self.win_chosen,
        )


@dataclass(frozen=True, slots=True)
class RevisionLogLik:
    """A pair together with each side as a revision of each side, six log-likelihoods of [B].

    a_given_b: log-likelihood of a when the context shows b as the answer to improve (SRPO).
    """

    chosen: LogLik
    rejected: LogLik
    chosen_given_rejected: LogLik
    rejected_given_rejected: LogLik
    chosen_given_chosen: LogLik
    rejected_given_chosen: LogLik

    def __post_init__(self) -> None:
        _rank("RevisionLogLik", "chosen", self.chosen.logp, "B")
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "chosen"}
        _same_shape("RevisionLogLik", self.chosen.logp.shape, **rest)


@dataclass(frozen=True, slots=True)
class ListLogLik:
    """K graded candidates of one context, [B, K]; mask False marks padding; higher relevance is better.

    proposal: log-likelihoods under the distribution that drew the candidates. reward: a real-valued score of
    each. Both [B, K], detached.
    """

    loglik: LogLik
    relevance: Tensor
    mask: Tensor | None = None
    proposal: Tensor | None = None
    reward: Tensor | None = None

    def __post_init__(self) -> None:
        _prepare(self, detached=("relevance", "proposal", "reward"))
        _rank("ListLogLik", "loglik", self.loglik.logp, "BK")
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "loglik"}
        _same_shape("ListLogLik", self.loglik.logp.shape, **rest)

    def valid(self) -> Tensor:
        """Mask of real candidates, [B, K] bool."""
        return torch.ones_like(self.relevance, dtype=torch.bool) if self.mask is None else self.mask


@dataclass(frozen=True, slots=True)
class LabelledLogLik:
    """Single candidates marked desirable or not, [B].

    baseline: detached batch statistic (KTO's z, BCO's delta), [B] or a scalar. mismatched: candidates under
    contexts that are not theirs, [M]; once they have a reference, an absent baseline becomes their mean
    log-ratio, at least 0: KTO's estimate of KL(policy || reference) (Ethayarajh et al. 2024, section 4.1).
    """

    loglik: LogLik
    desirable: Tensor
    baseline: Tensor | None = None
    mismatched: LogLik | None = None

    def __post_init__(self) -> None:
        if self.baseline is None and self.mismatched is not None and self.mismatched.ref is not None:
            object.__setattr__(self, "baseline", self.mismatched.log_ratio().mean().clamp(min=0))
        _prepare(self, detached=("baseline",))
        _rank("LabelledLogLik", "loglik", self.loglik.logp, "B")
        _same_shape("LabelledLogLik", self.loglik.logp.shape, desirable=self.desirable)
        if self.desirable.dtype != torch.bool:
            raise ValueError(f"LabelledLogLik.desirable is {self.desirable.dtype}; expected torch.bool")
        if self.baseline is not None and self.baseline.ndim:
            _same_shape("LabelledLogLik", self.loglik.logp.shape, baseline=self.baseline)


@dataclass(frozen=True, slots=True)
class UnitLogLik:
    """Log-probs per unit (token, turn, denoising step, slot), [B, U]; mask False marks padding.

    ref, old: the same under the reference and under the policy that drew the sample; advantage, value,
    target: per unit. old_value: the critic's value when the sample was drawn. kl, entropy: exact values over
    the whole vocabulary, per unit. num_units: units per row of the whole batch that this is a part of, [B]:
    losses that are means over a batch's units divide by it, and then no cut of the batch changes them.
    All but logp, value, kl and entropy are detached.
    """

    logp: Tensor
    mask: Tensor
    ref: Tensor | None = None
    old: Tensor | None = None
    advantage: Tensor | None = None
    value: Tensor | None = None
    target: Tensor | None = None
    kl: Tensor | None = None
    entropy: Tensor | None = None
    old_value: Tensor | None = None
    num_units: Tensor | None = None

    def __post_init__(self) -> None:
        _prepare(self, detached=("ref", "old", "advantage", "target", "old_value", "num_units"))
        _rank("UnitLogLik", "logp", self.logp, "BU")
        rest = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("logp", "num_units")}
        _same_shape("UnitLogLik", self.logp.shape, **rest)
        _same_shape("UnitLogLik", self.logp.shape[:1], num_units=self.num_units)


Input = LogLik | PairLogLik | RevisionLogLik | ListLogLik | LabelledLogLik | UnitLogLik
AnyInput = TypeVar("AnyInput", bound=Input)


def with_reference(policy: AnyInput, reference: AnyInput) -> AnyInput:
    """The policy's input with the reference's log-likelihoods as `ref`, detached.

    Both come from the same batch and the same draw of randomness; everything else is kept from the policy.
    """
    if isinstance(policy, LogLik) and isinstance(reference, LogLik):
        return replace(policy, ref=reference.logp, ref_head=reference.head)
    if isinstance(policy, UnitLogLik) and isinstance(reference, UnitLogLik):
        return replace(policy, ref=reference.logp)
    parts = {f.name: getattr(policy, f.name) for f in fields(policy)}
    logliks = {name: part for name, part in parts.items() if isinstance(part, LogLik)}
    return replace(policy, **{k: with_reference(v, getattr(reference, k)) for k, v in logliks.items()})


def provided(x: Input) -> frozenset[str]:
    """Names of the optional fields that an input fills, its log-likelihoods' too; no masks, no counts."""
    filled: set[str] = set()
    for field in fields(x):
        value = getattr(x, field.name)
        if isinstance(value, LogLik):
            filled |= provided(value)
        if field.default is None and value is not None and field.name not in ("mask", "num_units"):
            filled.add(field.name)
    return frozenset(filled)


def batch_size(x: Input) -> int:
    """B, the number of rows that an objective's loss will have."""
    if isinstance(x, (PairLogLik, RevisionLogLik)):
        return x.chosen.logp.shape[0]
    if isinstance(x, (ListLogLik, LabelledLogLik)):
        return x.loglik.logp.shape[0]
    return x.logp.shape[0]
