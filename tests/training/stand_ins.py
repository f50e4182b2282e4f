"""Two other modalities in small: denoising steps and sessions of items, each a port, sources and judges.

C candidates of a batch, U units, D dimensions of a latent, T denoising steps, P slots of a session, N codes.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from triptych.training.groups import Group, Verdict
from triptych.training.growing import grow
from triptych.training.trees import Child


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of C candidates by name; counts: [C]."""

    values: dict[str, Tensor]
    counts: Tensor
    keys: tuple[str, ...]
    ids: tuple[str, ...]

    def to(self, device):
        return replace(
            self, values={n: v.to(device) for n, v in self.values.items()}, counts=self.counts.to(device)
        )


class Records:
    """What ports share: hashes of records, and records as tensors and JSON values."""

    bound = False

    def key(self, context, candidate):
        return hashlib.sha256(repr((context, candidate)).encode()).hexdigest()

    def readouts(self, policy, batch, names):
        raise ValueError(f"this policy has no {', '.join(sorted(names))}")

    def pack(self, record):
        return {f.name: getattr(record, f.name) for f in fields(record)}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value


# Denoising: x_{t+1} ~ N(x_t + drift_t, var_t), from x_0 = noise to an image of D numbers.


@dataclass(frozen=True, slots=True)
class Latents:
    """States from denoising step `step` on, of D numbers each: one as a context, else those that follow."""

    key: str
    step: int
    states: tuple[tuple[float, ...], ...]


class Denoiser(nn.Module):
    """Mean of the next state: x + drift_t, [D]; its deviation is the root of a falling variance."""

    def __init__(self, num_steps: int, dim: int):
        super().__init__()
        self.drift = nn.Parameter(torch.zeros(num_steps, dim))
        self.register_buffer("std", torch.linspace(0.3, 0.05, num_steps).sqrt())

    def forward(self, before_CUD: Tensor, after_CUD: Tensor, steps_CU: Tensor) -> Tensor:
        """Log-density of each transition, mean over D, [C, U]."""
        std_CU1 = self.std[steps_CU].unsqueeze(-1)
        away = (after_CUD - before_CUD - self.drift[steps_CU]) / std_CU1
        return (-0.5 * away.square() - std_CU1.log() - 0.5 * math.log(2 * math.pi)).mean(-1)

    @torch.no_grad()
    def step(self, state: Sequence[float], step: int, generator: torch.Generator) -> Tensor:
        """A sample of the next state, [D]."""
        noise = torch.randn(self.drift.shape[1], generator=generator)
        return torch.tensor(state) + self.drift[step] + self.std[step] * noise


@dataclass(frozen=True)
class DenoisingPort(Records):
    """Step log-densities; `bound` says, for a test, that they were those of an ELBO."""

    bound: bool = False

    def length(self, context, candidates):
        return sum(len(c.states) for c in candidates)

    def collate(self, items, seeds):
        found = [(p, c) for p, cs in items for c in cs]
        width = max(len(c.states) for _, c in found)
        before, after, steps = [], [], []
        for p, c in found:
            path = [p.states[-1], *c.states]
            rest = width - len(c.states)
            before.append([*path[:-1], *[path[-1]] * rest])
            after.append([*c.states, *[path[-1]] * rest])
            steps.append([*range(p.step, p.step + len(c.states)), *[0] * rest])
        counts = torch.tensor([float(len(c.states)) for _, c in found])
        return Batch(
            {"before": torch.tensor(before), "after": torch.tensor(after), "steps": torch.tensor(steps)},
            counts,
            tuple(self.key(p, c) for p, c in found),
            tuple(p.key for p, _ in items),
        )

    def terms(self, policy, batch, generator=None):
        terms = policy(**{f"{name}_{s}": batch.values[name] for name, s in _SHAPES.items()})
        return terms * (torch.arange(terms.shape[1]) < batch.counts.unsqueeze(1))

    def unpack(self, kind, packed):
        return Latents(**{name: _tuples(value) for name, value in packed.items()})


_SHAPES = {"before": "CUD", "after": "CUD", "steps": "CU"}


@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingTree:
    """Siblings from one state at every step, going on from a random one."""

    num_steps: int
    num_candidates: int = 4
    first_step: int = 0
    fresh = True
    provides = frozenset({"logp"})

    @property
    def groups_per_context(self):
        return self.num_steps - self.first_step

    def __call__(self, contexts, live):
        noise = {c.key: live.generator(c.key, "noise") for c in contexts}

        def expand(states, step, num):
            return [_siblings(live, state, noise[state.key], num) for state in states]

        return grow(
            [(c.key, c) for c in contexts],
            num_steps=self.num_steps,
            num_siblings=self.num_candidates,
            first_step=self.first_step,
            expand=expand,
            generators=[live.generator(c.key, "path") for c in contexts],
        )


def _siblings(live, state: Latents, noise: torch.Generator, num: int) -> list[Child]:
    drawn = [live.policy.step(state.states[-1], state.step, noise).tolist() for _ in range(num)]
    after = [Latents(state.key, state.step + 1, (tuple(x),)) for x in drawn]
    terms = live.port.terms(live.policy, live.port.collate([(state, after)], [0]))
    return [Child(state=s, logp=t.detach()) for s, t in zip(after, terms, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """Whole paths of T steps, K of each context, with the log-prob of every step: [K, T]."""

    num_steps: int
    num_candidates: int = 4
    fresh = True
    groups_per_context = 1
    provides = frozenset({"logp"})

    def __call__(self, contexts, live):
        return [self._one(context, live) for context in contexts]

    def _one(self, context, live):
        noise = live.generator(context.key, "noise")
        paths = []
        for _ in range(self.num_candidates):
            states = [context.states[-1]]
            for step in range(self.num_steps):
                states.append(tuple(live.policy.step(states[-1], step, noise).tolist()))
            paths.append(Latents(context.key, 1, tuple(states[1:])))
        logp = live.port.terms(live.policy, live.port.collate([(context, paths)], [0])).detach()
        mask = torch.ones(logp.shape, dtype=torch.bool)
        return Group(
            key=context.key, context=context, candidates=tuple(paths), mask=mask, unit="denoise", logp=logp
        )


@dataclass(frozen=True, slots=True)
class Near:
    """Minus the squared distance of the last state from a target: reward, and what to expect of it before."""

    target: tuple[float, ...]
    gives = frozenset({"score"})
    needs = frozenset()

    def __call__(self, groups, live):
        return [Verdict(score=torch.stack([self._of(c) for c in g.candidates])) for g in groups]

    def _of(self, candidate):
        return -(torch.tensor(candidate.states[-1]) - torch.tensor(self.target)).square().sum()


# Recommendation: a session is P codes, each predicted from the user and the code before it.


@dataclass(frozen=True, slots=True)
class Request:
    """A user who wants a session; seen: the session that the user really had."""

    key: str
    user: int
    seen: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Session:
    """The codes of its items, one item after the other, [P]."""

    codes: tuple[int, ...]


class Recommender(nn.Module):
    """log p(code | user, place, code before), a table [users, P, N + 1, N]; code N is before the first."""

    def __init__(self, num_users: int, num_places: int, num_codes: int):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(num_users, num_places, num_codes + 1, num_codes))

    def forward(self, users_C: Tensor, codes_CP: Tensor) -> Tensor:
        """Log-prob of each code, [C, P]."""
        num_codes = self.table.shape[-1]
        before_CP = nn.functional.pad(codes_CP[:, :-1], (1, 0), value=num_codes)
        places_P = torch.arange(codes_CP.shape[1])
        logits_CPN = self.table[users_C.unsqueeze(1), places_P, before_CP]
        return logits_CPN.log_softmax(-1).gather(-1, codes_CP.unsqueeze(-1)).squeeze(-1)

    @torch.no_grad()
    def beams(self, user: int, width: int) -> list[tuple[tuple[int, ...], float]]:
        """The likeliest sessions by beam search, with their log-probs, likeliest first."""
        num_places, _, num_codes = self.table.shape[1:]
        found: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        for place in range(num_places):
            longer = []
            for codes, logp in found:
                before = codes[-1] if codes else num_codes
                logps = self.table[user, place, before].log_softmax(-1).tolist()
                longer += [((*codes, c), logp + logps[c]) for c in range(num_codes)]
            found = sorted(longer, key=lambda beam: -beam[1])[:width]
        return found


class SessionPort(Records):
    def length(self, context, candidates):
        return sum(len(c.codes) for c in candidates)

    def collate(self, items, seeds):
        found = [(p, c) for p, cs in items for c in cs]
        users, codes = [p.user for p, _ in found], [c.codes for _, c in found]
        return Batch(
            {"users": torch.tensor(users), "codes": torch.tensor(codes)},
            torch.tensor([float(len(c)) for c in codes]),
            tuple(self.key(p, c) for p, c in found),
            tuple(p.key for p, _ in items),
        )

    def terms(self, policy, batch, generator=None):
        return policy(batch.values["users"], batch.values["codes"])

    def unpack(self, kind, packed):
        made = Request if kind == "context" else Session
        return made(**{name: _tuples(value) for name, value in packed.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Beams:
    """The sessions that a recommender would serve: likely, not drawn, so without log-probs of drawing."""

    num_candidates: int = 8
    fresh = False
    groups_per_context = 1
    provides = frozenset()

    def __call__(self, contexts, live):
        return [
            _sessions(c, [codes for codes, _ in live.policy.beams(c.user, self.num_candidates)], "beam")
            for c in contexts
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The session that the user really had."""

    num_candidates: int = 1
    fresh = False
    groups_per_context = 1
    provides = frozenset({"verdict"})

    def __call__(self, contexts, live):
        return [
            replace(_sessions(c, [c.seen], "data"), verdict=Verdict(score=torch.ones(1))) for c in contexts
        ]


def _sessions(request: Request, codes: Sequence[tuple[int, ...]], origin: str) -> Group:
    return Group(
        key=request.key,
        context=request,
        candidates=tuple(Session(c) for c in codes),
        mask=torch.ones(len(codes), len(codes[0]), dtype=torch.bool),
        unit="slot",
        origin=(origin,) * len(codes),
    )


@dataclass(frozen=True)
class Utility:
    """What a session is worth to its user: the worth of its codes, summed; [users][N]."""

    worth: tuple[tuple[float, ...], ...]
    gives = frozenset({"score"})
    needs = frozenset()

    @cached_property
    def table(self):
        return torch.tensor(self.worth)

    def __call__(self, groups, live):
        return [
            Verdict(
                score=torch.stack([self.table[g.context.user, list(c.codes)].sum() for c in g.candidates])
            )
            for g in groups
        ]
