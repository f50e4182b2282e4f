"""Step likelihoods: log-densities of single denoising steps, which are log-probs and no bound (SPO, DDPO).

Shapes: B samples, K candidates of a sample, C = all candidates of a batch, U denoising steps of the longest
one; S distinct states of one latent shape [Z, H, W], N steps that leave them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from triptych.modalities.diffusion.policy import Conditions
from triptych.modalities.diffusion.schedule import Schedule
from triptych.modalities.diffusion.transitions import (
    Reduction,
    Rule,
    full_precision,
    gaussian_kl,
    log_density,
    step_mean,
)
from triptych.objectives import Input, ListLogLik, LogLik, PairLogLik, UnitLogLik

Kind = Literal["pair", "list", "units"]
Empty = tuple[Tensor, Tensor | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStack:
    """Distinct states of one latent shape and the N steps that leave them.

    states: [S, Z, H, W]; times, next_times, and the step's keep, push, std (`Transitions`): [S]; conditions:
    S rows. nexts: [N, Z, H, W]; state_of: [N] the state each step leaves; unit_of: [N] its place in [C * U].
    """

    states: Tensor
    times: Tensor
    next_times: Tensor
    keep: Tensor
    push: Tensor
    std: Tensor
    conditions: Conditions
    nexts: Tensor
    state_of: Tensor
    unit_of: Tensor

    def to(self, device: torch.device) -> StepStack:
        """The stack on a device."""
        return replace(self, **{f.name: _moved(getattr(self, f.name), device) for f in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBatch:
    """Steps of C candidates, each distinct state once, and what is known of the candidates.

    counts: steps of each candidate, [C]; units: which units are steps, [C, U]. slots: [B, K] index of each
    sample's candidates among C, mask: [B, K]; relevance: [B, K]. strength, margin: [B] or None; advantage,
    old: [C, U] or None. empty: the empty prompt, one row, for guidance.
    """

    kind: Kind
    stacks: tuple[StepStack, ...]
    keys: tuple[str, ...]
    ids: tuple[str, ...]
    counts: Tensor
    units: Tensor
    slots: Tensor
    mask: Tensor
    relevance: Tensor
    empty: Conditions | None = None
    strength: Tensor | None = None
    margin: Tensor | None = None
    advantage: Tensor | None = None
    old: Tensor | None = None

    @property
    def num_states(self) -> int:
        """Distinct states: rows of a forward without guidance."""
        return sum(len(stack.states) for stack in self.stacks)

    def to(self, device: torch.device) -> StepBatch:
        """The batch on a device."""
        moved = {f.name: _moved(getattr(self, f.name), device) for f in fields(self)}
        return replace(self, **moved | {"stacks": tuple(stack.to(device) for stack in self.stacks)})


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    return value.to(device) if isinstance(value, Conditions) else value


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLikelihood:
    """log N(x_s; mu(x_t, c), std^2) of each step t -> s, mean or sum over Z, H, W; count = number of steps.

    A state is computed once however many candidates leave it: a pair or a pool from one x_t costs one row of
    the policy and one of the reference. guidance: classifier-free guidance inside the likelihood, of policy
    and reference alike (SPO: 5), which doubles the rows; 1 is without. reduction: 'mean' is that of the
    released SPO, DDPO and Flow-GRPO code; 'sum' the density itself. Nothing is random but the model's own
    dropout, so `generator` is not drawn from.
    """

    schedule: Schedule
    rule: Rule
    guidance: float = 1.0
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if not self.rule.stochastic:
            raise ValueError(
                f"{self.rule} is deterministic: its next state has no density (std = 0), so there is no "
                "likelihood; use eta or noise_level above 0"
            )
        if not self.guidance >= 1:
            raise ValueError(f"guidance={self.guidance} must be at least 1, which is without guidance")
        if self.reduction not in get_args(Reduction):
            raise ValueError(f"reduction='{self.reduction}' is not one of {', '.join(get_args(Reduction))}")

    @property
    def bound(self) -> bool:
        """False: these are log-probs of what was drawn."""
        return False

    def __call__(self, policy: Any, batch: StepBatch, generator: torch.Generator | None = None) -> Input:
        """PairLogLik, ListLogLik or UnitLogLik of the batch under `policy`, without a reference."""
        return self.assemble(self.terms(policy, batch, generator), batch)

    def terms(self, policy: Any, batch: StepBatch, generator: torch.Generator | None = None) -> Tensor:
        """Log-density of each step, [C, U], float32 (float64 for states in it), 0 at padding; one forward."""
        return self.densities(self.means(policy, batch), batch)

    def means(self, policy: Any, batch: StepBatch) -> list[Tensor]:
        """mu at the states of each stack, [S, Z, H, W], in full precision; one forward."""
        return [
            step_mean(stack.states, prediction, stack.keep, stack.push)
            for stack, prediction in zip(batch.stacks, self._predictions(policy, batch), strict=True)
        ]

    def densities(self, means: Sequence[Tensor], batch: StepBatch) -> Tensor:
        """Log-density of each step, [C, U], around the means of its states."""
        return _by_unit(
            [
                log_density(
                    stack.nexts, mean[stack.state_of], stack.std[stack.state_of], reduction=self.reduction
                )
                for stack, mean in zip(batch.stacks, means, strict=True)
            ],
            batch,
        )

    def divergence(self, means: Sequence[Tensor], others: Sequence[Tensor], batch: StepBatch) -> Tensor:
        """KL of each step's Gaussian to that around another mean, ||mu - mu'||^2 / (2 std^2), [C, U].

        Exact, with the gradient of both; the std is the sampler's and the same. As mean or sum over Z, H, W.
        """
        return _by_unit(
            [
                gaussian_kl(mean, other, stack.std, reduction=self.reduction)[stack.state_of]
                for stack, mean, other in zip(batch.stacks, means, others, strict=True)
            ],
            batch,
        )

    def assemble(self, terms: Tensor, batch: StepBatch) -> Input:
        """The objective's input from log-densities of steps [C, U], summed over steps but for units."""
        if batch.kind == "units":
            return UnitLogLik(terms, batch.units, old=batch.old, advantage=batch.advantage)
        dtype = terms.dtype if terms.dtype == torch.float64 else torch.float32
        logp, count = terms.sum(-1, dtype=dtype)[batch.slots], batch.counts[batch.slots]
        if batch.kind == "list":
            return ListLogLik(LogLik(logp, count), batch.relevance, batch.mask)
        chosen, rejected = (LogLik(logp[:, i], count[:, i]) for i in (0, 1))
        return PairLogLik(chosen, rejected, strength=batch.strength, margin=batch.margin)

    def predict(
        self,
        policy: Any,
        states: Sequence[Tensor],
        times: Sequence[Tensor],
        conditions: Sequence[Conditions],
        empty: Conditions | None,
    ) -> list[Tensor]:
        """The model's prediction at the states of each stack, [S, Z, H, W], guided; sampling uses it, too.

        empty: the empty prompt, one row, for guidance.
        """
        if self.guidance == 1:
            return policy(states, times, conditions)
        assert empty is not None, "a guided likelihood's collator gives its batches the empty prompt"
        predictions = policy(
            [torch.cat([x, x]) for x in states],
            [torch.cat([t, t]) for t in times],
            [_with_empty(empty, c) for c in conditions],
        )
        halves = [full_precision(p).chunk(2) for p in predictions]
        return [without + self.guidance * (own - without) for without, own in halves]

    def _predictions(self, policy: Any, batch: StepBatch) -> list[Tensor]:
        """The prediction at every state of a batch, a stack each."""
        stacks = batch.stacks
        return self.predict(
            policy,
            [stack.states for stack in stacks],
            [stack.times for stack in stacks],
            [stack.conditions for stack in stacks],
            batch.empty,
        )


def _by_unit(values: Sequence[Tensor], batch: StepBatch) -> Tensor:
    """Values of the steps of each stack, [N], at their places in [C, U]; 0 at padding."""
    places, found = torch.cat([stack.unit_of for stack in batch.stacks]), torch.cat(list(values))
    table = found.new_zeros(batch.units.numel()).index_copy(0, places, found)
    return table.view(batch.units.shape)


def _with_empty(empty: Conditions, own: Conditions) -> Conditions:
    """The empty prompt for as many rows as `own` has, and `own`: [2 S] rows. Time ids are the rows' own."""
    num_rows = len(own.embeds)
    embeds = torch.cat([empty.embeds.expand(num_rows, -1, -1).to(own.embeds), own.embeds])
    pooled = None
    if own.pooled is not None and empty.pooled is not None:
        pooled = torch.cat([empty.pooled.expand(num_rows, -1).to(own.pooled), own.pooled])
    ids = None if own.time_ids is None else torch.cat([own.time_ids, own.time_ids])
    return Conditions(embeds, pooled, ids)
