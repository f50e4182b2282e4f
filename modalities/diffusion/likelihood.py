"""ELBO likelihoods of images: what the objective layer sees of a diffusion or flow model.

Shapes: B contexts, K candidates a context, C = all candidates of a batch, U draws of time and noise, Z latent
channels, H x W. N = rows of one latent shape: every candidate at every draw.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.modalities.diffusion.draws import Draws, NoiseConfig, draw
from triptych.modalities.diffusion.kernels import Impl, residual_difference, squared_residual
from triptych.modalities.diffusion.persons import Users
from triptych.modalities.diffusion.policy import Conditions
from triptych.modalities.diffusion.schedule import Schedule, Space
from triptych.objectives import Input, LabelledLogLik, ListLogLik, LogLik, PairLogLik
from triptych.training.order import Draw, key

Kind = Literal["pair", "list", "labelled", "single"]
INPUT_OF: dict[str, type[Input]] = {
    "pair": PairLogLik,
    "list": ListLogLik,
    "labelled": LabelledLogLik,
    "single": LogLik,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One context with the latents of its candidates.

    latents [K, Z, H, W], scaled as the model takes them: the mean of the VAE's posterior, or with logvar its
    parameters. embeds [L, D], pooled [P] or None; time_ids [K, 6] or None. keys: content hash of each
    candidate in its context. kind 'labelled': relevance > 0 is desirable. strength: P(first preferred) of a
    pair. group: whose preference it is, None if unknown.
    """

    id: str
    source: str
    kind: Kind
    latents: Tensor
    embeds: Tensor
    relevance: tuple[float, ...]
    keys: tuple[str, ...]
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    logvar: Tensor | None = None
    strength: float | None = None
    margin: float | None = None
    group: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """Rows of one latent shape: clean latents and noise [N, Z, H, W], times [N], and where each belongs.

    cell: candidate * U + draw of each row, [N]. prompt: row of `conditions` of each, [N].
    """

    latents: Tensor
    noise: Tensor
    times: Tensor
    cell: Tensor
    prompt: Tensor
    time_ids: Tensor | None

    def to(self, device: torch.device) -> Stack:
        """The stack on a device."""
        return replace(self, **_moved(self, device))


@dataclass(frozen=True, slots=True, kw_only=True)
class DiffusionBatch:
    """Noisy images and what is known of them.

    slots: [B, K] index of each context's candidates among C (0 where there is none), mask: [B, K].
    relevance: [B, K]. strength, margin: [B] or None. conditions: one row a context.
    """

    kind: Kind
    stacks: tuple[Stack, ...]
    conditions: Conditions
    num_draws: int
    slots: Tensor
    mask: Tensor
    relevance: Tensor
    strength: Tensor | None
    margin: Tensor | None
    keys: tuple[str, ...]
    counts: Tensor
    ids: tuple[str, ...]

    @property
    def size(self) -> int:
        """B."""
        return len(self.ids)

    def to(self, device: torch.device) -> DiffusionBatch:
        """The batch on a device."""
        stacks = tuple(s.to(device) for s in self.stacks)
        return replace(self, stacks=stacks, conditions=self.conditions.to(device), **_moved(self, device))


def _moved(record: Any, device: torch.device) -> dict[str, Tensor]:
    tensors = {f.name: getattr(record, f.name) for f in fields(record)}
    return {k: v.to(device, non_blocking=True) for k, v in tensors.items() if isinstance(v, Tensor)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Collator:
    """Examples of one kind -> DiffusionBatch, with times and noise from each draw's seed.

    empty: (embeds [L, D], pooled [P] or None) of the empty prompt, which takes a context's place with
    probability `dropout`, for all of its candidates alike. users: vectors of the examples' groups, which the
    policy is to see; with probability `user_dropout` zeros, as for an example without a group.
    """

    schedule: Schedule
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    empty: tuple[Tensor, Tensor | None] | None = None
    dropout: float = 0.0
    users: Users | None = None
    user_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.dropout and self.empty is None:
            raise ValueError("prompt dropout needs the embeddings of the empty prompt")
        if self.user_dropout and self.users is None:
            raise ValueError("user dropout needs the vectors of the users")

    def __call__(self, examples: Sequence[Example], draws: Sequence[Draw]) -> DiffusionBatch:
        """One batch; ValueError when the examples are not all of one kind."""
        kinds = {e.kind for e in examples}
        if len(kinds) != 1:
            raise ValueError(f"a batch needs examples of one kind, not {sorted(kinds)}")
        kind = kinds.pop()
        drawn = [
            draw(self.noise, self.schedule, at, tuple(e.latents.shape[1:]), len(e.latents))
            for e, at in zip(examples, draws, strict=True)
        ]
        prompts = [self._prompt(e, at) for e, at in zip(examples, draws, strict=True)]
        sizes = [len(e.latents) for e in examples]
        slots, mask = _slots(sizes)
        relevance = torch.zeros(slots.shape)
        for i, e in enumerate(examples):
            relevance[i, : len(e.relevance)] = torch.tensor(e.relevance)
        return DiffusionBatch(
            kind=kind,  # type: ignore[arg-type]
            stacks=_stacks(examples, drawn, draws),
            conditions=Conditions(
                torch.stack([embeds for embeds, _, _ in prompts]),
                _stacked([pooled for _, pooled, _ in prompts]),
                users=_stacked([self._user(e, at) for e, at in zip(examples, draws, strict=True)]),
            ),
            num_draws=self.noise.num_draws,
            slots=slots,
            mask=mask,
            relevance=relevance,
            strength=_column([e.strength for e in examples]),
            margin=_column([e.margin for e in examples]),
            keys=tuple(
                _key(e.keys[k], d, dropped, 0 if self.noise.shared else k)
                for e, d, (_, _, dropped), size in zip(examples, drawn, prompts, sizes, strict=True)
                for k in range(size)
            ),
            counts=torch.full((sum(sizes),), self.noise.num_draws),
            ids=tuple(e.id for e in examples),
        )

    def _prompt(self, example: Example, at: Draw) -> tuple[Tensor, Tensor | None, bool]:
        if self.dropout and self.empty is not None:
            chance = torch.Generator().manual_seed(key("prompt dropout", at.seed))
            if float(torch.rand((), generator=chance)) < self.dropout:
                return (*self.empty, True)
        return example.embeds, example.pooled, False

    def _user(self, example: Example, at: Draw) -> Tensor | None:
        """Vectors of the example's person. No key names them: references do not see them."""
        if self.users is None or example.group is None:
            return None if self.users is None else self.users.nobody
        if self.user_dropout:
            chance = torch.Generator().manual_seed(key("user dropout", at.seed))
            if float(torch.rand((), generator=chance)) < self.user_dropout:
                return self.users.nobody
        return self.users[example.group]


# latents, noise, time, cell, prompt, size condition of one row of a stack.
_Row = tuple[Tensor, Tensor, Tensor, int, int, Tensor | None]


def _stacks(examples: Sequence[Example], drawn: Sequence[Draws], draws: Sequence[Draw]) -> tuple[Stack, ...]:
    """All rows, those of one latent shape together, in the order of the candidates."""
    rows: dict[tuple[int, ...], list[_Row]] = defaultdict(list)
    candidate = 0
    for i, (e, d, at) in enumerate(zip(examples, drawn, draws, strict=True)):
        latents = _latents(e, at)
        for k in range(len(latents)):
            ids = None if e.time_ids is None else e.time_ids[k]
            for u in range(len(d.times)):
                noise = d.noise[u, k if d.noise.shape[1] > 1 else 0]
                cell = (candidate + k) * len(d.times) + u
                rows[tuple(latents.shape[1:])].append((latents[k], noise, d.times[u], cell, i, ids))
        candidate += len(latents)
    found = []
    for shaped in rows.values():
        latents, noise, times, cells, prompts, ids = zip(*shaped, strict=True)
        found.append(
            Stack(
                latents=torch.stack(latents),
                noise=torch.stack(noise),
                times=torch.stack(times).float(),
                cell=torch.tensor(cells),
                prompt=torch.tensor(prompts),
                time_ids=_stacked(ids),
            )
        )
    return tuple(found)


def _latents(example: Example, at: Draw) -> Tensor:
    """The latents to learn from: the posterior's mean, or a sample of it where its variance was kept."""
    mean = example.latents.float()
    if example.logvar is None:
        return mean
    generator = torch.Generator().manual_seed(key("posterior", at.seed))
    return mean + (0.5 * example.logvar.float()).exp() * torch.randn(mean.shape, generator=generator)


def _key(content: str, drawn: Draws, dropped: bool, noise: int) -> str:
    text = f"{content}\x1f{drawn.key}\x1f{dropped}\x1f{noise}"
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ElboLikelihood:
    """logp = -w(t)/2 * mean (or sum) over Z H W of (prediction - target)^2, count 1: a bound, not a log-prob.

    With w = 1 and the mean, dpo(beta) on it is Diffusion-DPO (Wallace et al. 2023, eq. 14) as published:
    -log sigmoid(-beta/2 [(m_w - r_w) - (m_l - r_l)]), m, r the mean squared errors of policy and reference.
    Several draws are averaged. reduction: 'mean' over the D = Z H W numbers of an image as every published
    script has it, or the papers' 'sum', where the same beta weighs D times as much. space, min_snr: see
    `Schedule.weights`. baseline: whether labelled images come with KTO's. Values are float64 where the device
    has it: the difference of two of them is about 1e-4 of either.
    """

    schedule: Schedule
    reduction: Literal["mean", "sum"] = "mean"
    space: Space = "native"
    min_snr: float | None = None
    kernel: Impl = "auto"
    baseline: bool = True

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            raise ValueError(f"reduction '{self.reduction}' is not one of mean, sum")
        self.schedule.check_space(self.space, self.min_snr)

    def __call__(self, policy: Any, batch: DiffusionBatch, generator: torch.Generator | None = None) -> Input:
        """The objective's input under `policy`, by the batch's kind, without a reference."""
        return self.assemble(self.terms(policy, batch, generator), batch)

    def terms(self, policy: Any, batch: DiffusionBatch, generator: torch.Generator | None = None) -> Tensor:
        """Each draw's share of a candidate's log-likelihood, [C, U]; one forward a latent shape."""
        residuals = [
            squared_residual(prediction, target, impl=self.kernel)
            for prediction, target in zip(self.predict(policy, batch), self._targets(batch), strict=True)
        ]
        return self._table(residuals, batch)

    def predict(self, policy: Any, batch: DiffusionBatch) -> list[Tensor]:
        """The model's prediction for every row, stack by stack, [N, Z, H, W] each."""
        noisy = [self.schedule.add_noise(s.latents, s.noise, s.times) for s in batch.stacks]
        times = [s.times for s in batch.stacks]
        conditions = [replace(batch.conditions.rows(s.prompt), time_ids=s.time_ids) for s in batch.stacks]
        return policy(noisy, times, conditions)

    def beside(
        self, policy: Any, reference: Sequence[Tensor], batch: DiffusionBatch
    ) -> tuple[Tensor, Tensor]:
        """Terms of the policy and of a reference whose predictions are known, [C, U] each.

        Their difference is exact to the rounding of the predictions: it comes from one fused pass,
        mean (e_policy - e_ref) (e_policy + e_ref - 2 target), and not from two means that nearly cancel.
        """
        targets = self._targets(batch)
        theirs = self._table(
            [squared_residual(e, t, impl=self.kernel) for e, t in zip(reference, targets, strict=True)], batch
        )
        differences = [
            residual_difference(mine, other, target, impl=self.kernel)
            for mine, other, target in zip(self.predict(policy, batch), reference, targets, strict=True)
        ]
        return theirs + self._table(differences, batch), theirs

    def assemble(self, terms: Tensor, batch: DiffusionBatch) -> Input:
        """The objective's input from terms [C, U]."""
        logp_C = terms.sum(-1)
        logp = logp_C[batch.slots]
        count = torch.ones_like(logp)
        if batch.kind == "pair":
            sides = (LogLik(logp[:, i], count[:, i]) for i in (0, 1))
            return PairLogLik(*sides, strength=batch.strength, margin=batch.margin)
        if batch.kind == "list":
            return ListLogLik(LogLik(logp, count), batch.relevance, batch.mask)
        own = LogLik(logp[:, 0], count[:, 0])
        if batch.kind == "single":
            return own
        # Diffusion-KTO's baseline (Li et al. 2024, section 4): the batch's own mean log-ratio, at least 0.
        itself = LogLik(own.logp.detach(), own.count) if self.baseline else None
        return LabelledLogLik(own, batch.relevance[:, 0] > 0, mismatched=itself)

    def _targets(self, batch: DiffusionBatch) -> list[Tensor]:
        return [self.schedule.target(s.latents, s.noise, s.times) for s in batch.stacks]

    def _table(self, residuals: Sequence[Tensor], batch: DiffusionBatch) -> Tensor:
        """-w(t)/2 residual / U of every row, put in its place, [C, U]."""
        values, cells = [], []
        for stack, residual in zip(batch.stacks, residuals, strict=True):
            weight = self.schedule.weights(stack.times, space=self.space, min_snr=self.min_snr)
            scale = 1.0 if self.reduction == "mean" else float(stack.latents[0].numel())
            wide = residual if residual.device.type == "mps" else residual.double()
            values.append(-0.5 * scale / batch.num_draws * weight.to(wide.dtype) * wide)
            cells.append(stack.cell)
        # Stacks hold whole candidates, so a sort by cell is the whole work.
        order = torch.cat(cells).argsort()
        return torch.cat(values)[order].reshape(-1, batch.num_draws)


def effective_beta(beta: float, reduction: str, shape: Sequence[int]) -> tuple[float, float]:
    """(beta per mean, beta per summed unit) for latents of [Z, H, W]: what beta means at a resolution."""
    size = 1
    for n in shape:
        size *= n
    return (beta, beta / size) if reduction == "mean" else (beta * size, beta)


def _slots(num_candidates: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Index among all candidates and mask of each context's k-th one, [B, K]."""
    sizes = torch.tensor(num_candidates)
    starts = torch.cumsum(sizes, 0) - sizes
    places = torch.arange(int(sizes.max()))
    mask = places < sizes.unsqueeze(1)
    return torch.where(mask, starts.unsqueeze(1) + places, 0), mask


def _stacked(values: Sequence[Tensor | None]) -> Tensor | None:
    present = [v for v in values if v is not None]
    if present and len(present) < len(values):
        raise ValueError("pooled prompts and size conditions must be there for every example or for none")
    return torch.stack(present) if present else None


def _column(values: Sequence[float | None]) -> Tensor | None:
    if all(v is None for v in values):
        return None
    if any(v is None for v in values):
        raise ValueError("strength and margin must be given for every example of a batch or for none")
    return torch.tensor(values, dtype=torch.float32)
