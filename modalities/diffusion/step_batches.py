"""Records of denoising steps, and the batches that `StepLikelihood` reads made of them.

Shapes as in `steps`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.modalities.diffusion.policy import Conditions
from triptych.modalities.diffusion.steps import Empty, StepBatch, StepLikelihood, StepStack
from triptych.modalities.diffusion.transitions import (
    Transitions,
    full_precision,
)
from triptych.training.groups import pad_units


@dataclass(frozen=True, slots=True, kw_only=True)
class Transition:
    """A state and K states drawn from it: candidates of one step, compared with each other.

    state: [Z, H, W] at `time`; nexts: [K, Z, H, W] at `next_time`; relevance: K numbers, higher is better.
    prompt: conditions of one row. strength: P(best preferred to worst); margin: their quality gap.
    """

    id: str
    state: Tensor
    time: float
    next_time: float
    nexts: Tensor
    relevance: tuple[float, ...]
    prompt: Conditions
    strength: float | None = None
    margin: float | None = None

    def __post_init__(self) -> None:
        if len(self.nexts) < 2 or self.nexts.shape[1:] != self.state.shape or self.state.ndim != 3:
            raise ValueError(
                f"transition {self.id}: state {tuple(self.state.shape)} and nexts {tuple(self.nexts.shape)} "
                "should be [Z, H, W] and [K, Z, H, W] with K at least 2"
            )
        if len(self.relevance) != len(self.nexts):
            raise ValueError(
                f"transition {self.id}: {len(self.relevance)} grades for {len(self.nexts)} candidates"
            )
        _check_prompt(f"transition {self.id}", self.prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A path of U steps, whole or a stretch of one: [x_t, ..., x_s].

    states: [U + 1, Z, H, W]; times, next_times: where each step begins and ends (`Grid`). prompt: conditions
    of one row. advantage: of each step, [U], and old: log-density of each step when it was drawn, [U].
    """

    id: str
    states: Tensor
    times: tuple[float, ...]
    next_times: tuple[float, ...]
    prompt: Conditions
    advantage: Tensor | None = None
    old: Tensor | None = None

    def __post_init__(self) -> None:
        num_steps = len(self.times)
        lengths = {"states": len(self.states) - 1, "next_times": len(self.next_times)}
        lengths |= {n: len(t) for n in ("advantage", "old") if (t := getattr(self, n)) is not None}
        if self.states.ndim != 4 or num_steps < 1 or set(lengths.values()) != {num_steps}:
            raise ValueError(
                f"trajectory {self.id}: {num_steps} times, but steps by field {lengths} and states "
                f"{tuple(self.states.shape)}; expected [U + 1, Z, H, W] with U at least 1"
            )
        _check_prompt(f"trajectory {self.id}", self.prompt)


def _check_prompt(owner: str, prompt: Conditions) -> None:
    shapes = [tuple(t.shape) for t in _tensors(prompt) if t is not None]
    if prompt.embeds.ndim != 3 or any(shape[0] != 1 for shape in shapes):
        raise ValueError(
            f"{owner}: the prompt's shapes {shapes} should be those of one row, embeds [1, L, D]"
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """One step of a candidate of the sample `owner`. start: hash of where and how it starts."""

    owner: str
    state: Tensor
    time: float
    next_time: float
    following: Tensor
    prompt: Conditions
    start: str

    @property
    def shape(self) -> tuple[torch.Size | None, ...]:
        """What steps of one stack have in common."""
        prompt = self.prompt
        ids, pooled = (None if t is None else t.shape for t in (prompt.time_ids, prompt.pooled))
        return self.state.shape, prompt.embeds.shape, pooled, ids


@dataclass(frozen=True, slots=True, kw_only=True)
class TransitionCollator:
    """Transitions -> StepBatch. 'pair': the best of each pool against its worst (SPO); 'list': all of it.

    likelihood: the one that reads the batches; its steps are prepared here. empty: (embeds [L, D], pooled [P]
    or None) of the empty prompt, if and only if the likelihood is guided.
    """

    likelihood: StepLikelihood
    kind: Literal["pair", "list"]
    empty: Empty | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("pair", "list"):
            raise ValueError(f"kind='{self.kind}' is not one of pair, list")
        _check_empty(self.likelihood, self.empty)

    def __call__(self, examples: Sequence[Transition], draws: Sequence[object] = ()) -> StepBatch:
        """One batch; nothing is random. ValueError for a pair of equals, and for a step without noise."""
        kept = [self._kept(e) for e in examples]
        candidates: list[list[_Step]] = []
        for e, indices in zip(examples, kept, strict=True):
            start = _digest(e.state, e.time, e.next_time, _digest(*_tensors(e.prompt)))
            for i in indices:
                step = _Step(e.id, e.state, e.time, e.next_time, e.nexts[i], e.prompt, start)
                candidates.append([step])
        return _batch(
            self.likelihood,
            candidates,
            self.empty,
            kind=self.kind,
            ids=tuple(e.id for e in examples),
            sizes=[len(indices) for indices in kept],
            relevance=pad_units(
                [torch.tensor([e.relevance[i] for i in own]) for e, own in zip(examples, kept, strict=True)]
            ),
            strength=_numbers("strength", [e.strength for e in examples]),
            margin=_numbers("margin", [e.margin for e in examples]),
        )

    def _kept(self, example: Transition) -> list[int]:
        """Candidates to compute; of a pair the best, then the worst."""
        grades = example.relevance
        if self.kind == "list":
            return list(range(len(grades)))
        if max(grades) == min(grades):
            raise ValueError(
                f"transition {example.id}: every candidate has grade {grades[0]:g}, so none is chosen"
            )
        return [grades.index(max(grades)), grades.index(min(grades))]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrajectoryCollator:
    """Trajectories -> StepBatch of kind 'units', a row each. Arguments as of `TransitionCollator`."""

    likelihood: StepLikelihood
    empty: Empty | None = None

    def __post_init__(self) -> None:
        _check_empty(self.likelihood, self.empty)

    def __call__(self, examples: Sequence[Trajectory], draws: Sequence[object] = ()) -> StepBatch:
        """One batch; nothing is random. ValueError for a step without noise."""
        candidates = []
        for e in examples:
            prompt = _digest(*_tensors(e.prompt))
            path = zip(e.states[:-1], e.states[1:], e.times, e.next_times, strict=True)
            candidates.append(
                [_Step(e.id, x, t, s, after, e.prompt, _digest(x, t, s, prompt)) for x, after, t, s in path]
            )
        return _batch(
            self.likelihood,
            candidates,
            self.empty,
            kind="units",
            ids=tuple(e.id for e in examples),
            sizes=[1] * len(examples),
            relevance=torch.zeros(len(examples), 1),
            advantage=_rows("advantage", [e.advantage for e in examples]),
            old=_rows("old", [e.old for e in examples]),
        )


def _batch(
    likelihood: StepLikelihood,
    candidates: Sequence[Sequence[_Step]],
    empty: Empty | None,
    *,
    sizes: Sequence[int],
    **known: Any,
) -> StepBatch:
    """Candidates as stacks; equal states under equal prompts are one row. sizes: candidates a sample."""
    steps = [step for candidate in candidates for step in candidate]
    moves = _moves(likelihood, steps)
    counts = torch.tensor([len(candidate) for candidate in candidates])
    mask_CU = torch.arange(int(counts.max())) < counts[:, None]
    places = mask_CU.flatten().nonzero().squeeze(-1)
    stacks: dict[Any, list[int]] = defaultdict(list)
    for n, step in enumerate(steps):
        stacks[step.shape].append(n)
    prompt = None if empty is None else one_row(*empty)
    for group in stacks.values():
        _check_guided(steps[group[0]], prompt)
    common = _digest(likelihood.guidance, likelihood.reduction, *_tensors(prompt))
    values = torch.stack([moves.keep, moves.push, moves.std], -1)
    hashes = [_digest(s.start, s.following, v) for s, v in zip(steps, values, strict=True)]
    ends = counts.cumsum(0).tolist()
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return StepBatch(
        stacks=tuple(
            _stack([steps[n] for n in g], moves, torch.tensor(g), places[g]) for g in stacks.values()
        ),
        keys=tuple(_digest(common, *hashes[a:b]) for a, b in pairwise([0, *ends])),
        counts=counts.float(),
        units=mask_CU,
        slots=pad_units([torch.arange(a, b) for a, b in pairwise(starts)]),
        mask=pad_units([torch.ones(n, dtype=torch.bool) for n in sizes]),
        empty=prompt,
        **known,
    )


def _moves(likelihood: StepLikelihood, steps: Sequence[_Step]) -> Transitions:
    """The Gaussians of all steps, [N] in float64; ValueError naming the owner of one without noise."""
    times, next_times = (
        torch.tensor([getattr(s, name) for s in steps], dtype=torch.float64) for name in ("time", "next_time")
    )
    moves = likelihood.rule(likelihood.schedule, times, next_times)
    for step, std in zip(steps, moves.std.tolist(), strict=True):
        if not std > 0:
            raise ValueError(
                f"{step.owner}: the step from time {step.time:g} to {step.next_time:g} has no noise "
                "(std = 0), so its next state has no density; leave the step out"
            )
    return moves


def _stack(steps: Sequence[_Step], moves: Transitions, index: Tensor, places: Tensor) -> StepStack:
    """Steps of one shape; `index`: where they are in `moves`."""
    found: dict[str, int] = {}
    for n, step in enumerate(steps):
        found.setdefault(step.start, n)
    row = {start: i for i, start in enumerate(found)}
    first = list(found.values())
    states = full_precision(torch.stack([steps[n].state for n in first]))
    numbers = {
        "times": torch.tensor([steps[n].time for n in first], dtype=torch.float64),
        "next_times": torch.tensor([steps[n].next_time for n in first], dtype=torch.float64),
        "keep": moves.keep[index[first]],
        "push": moves.push[index[first]],
        "std": moves.std[index[first]],
    }
    return StepStack(
        states=states,
        **{name: value.to(states.dtype) for name, value in numbers.items()},
        conditions=joined([steps[n].prompt for n in first]),
        nexts=full_precision(torch.stack([step.following for step in steps])),
        state_of=torch.tensor([row[step.start] for step in steps]),
        unit_of=places,
    )


def one_row(embeds: Tensor, pooled: Tensor | None) -> Conditions:
    """Conditions of one row from embeds [L, D] and pooled [P]."""
    return Conditions(embeds[None], None if pooled is None else pooled[None])


def joined(prompts: Sequence[Conditions]) -> Conditions:
    """Conditions of one row each as one; they have the same parts."""
    pooled = [p.pooled for p in prompts if p.pooled is not None]
    ids = [p.time_ids for p in prompts if p.time_ids is not None]
    embeds = torch.cat([p.embeds for p in prompts])
    return Conditions(embeds, torch.cat(pooled) if pooled else None, torch.cat(ids) if ids else None)


def _tensors(conditions: Conditions | None) -> tuple[Tensor | None, ...]:
    return () if conditions is None else (conditions.embeds, conditions.pooled, conditions.time_ids)


def _check_empty(likelihood: StepLikelihood, empty: Empty | None) -> None:
    if (likelihood.guidance == 1) != (empty is None):
        given = "no empty prompt was given" if empty is None else "an empty prompt is of no use to it"
        raise ValueError(f"guidance={likelihood.guidance:g}: {given}")


def _check_guided(step: _Step, empty: Conditions | None) -> None:
    """ValueError where the empty prompt has another shape than the prompts of a stack."""
    if empty is None:
        return
    shapes = [
        [None if t is None else tuple(t.shape) for t in (c.embeds, c.pooled)] for c in (step.prompt, empty)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{step.owner}: its prompt's embeds and pooled have shapes {shapes[0]}, "
            f"the empty prompt's {shapes[1]}"
        )


def _digest(*parts: Tensor | str | float | None) -> str:
    """SHA-256 of tensors (dtype, shape, bytes), numbers and strings, in order."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, Tensor):
            tensor = part.detach().cpu().contiguous()
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(f"{part!r}\x1f".encode())
    return digest.hexdigest()


def _rows(name: str, values: Sequence[Tensor | None]) -> Tensor | None:
    """Per-step values as one table, [C, U]; ValueError where only some samples have them."""
    given = [v for v in values if v is not None]
    if given and len(given) != len(values):
        raise ValueError(f"{name} must be given for every sample of a batch or for none")
    return pad_units(given) if given else None


def _numbers(name: str, values: Sequence[float | None]) -> Tensor | None:
    table = _rows(name, [None if v is None else torch.tensor([v]) for v in values])
    return None if table is None else table.squeeze(-1)
