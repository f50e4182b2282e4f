"""Shapes that make graded lists and single labelled candidates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from triptych.objectives import Input, LabelledLogLik, ListLogLik, PairLogLik, advantages
from triptych.training.groups import Group, Sample, preferences_of, scores_of
from triptych.training.pair_shapes import generator_of
from triptych.training.unit_credits import KL_NEEDS, SCORES, log_ratio, one_of

Relevance = Literal["score", "win_share", "rank", "users", "none"]


def _beats(score: Tensor) -> Tensor:
    """1 where i scores more than j, one half where equal, [..., K] -> [..., K, K]."""
    return 0.5 + 0.5 * torch.sign(score.unsqueeze(-1) - score.unsqueeze(-2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """A group's candidates as one graded list; tied candidates stay, and objectives never compare them.

    relevance: score; win_share, mean preference over the others; rank, the share of the others that score
    less, ties half, in [0, 1] as DCG gains want it; users, the mean of that over users or reward models
    (RankDPO, Karthik et al. 2024, arXiv 2410.18013); none, for objectives that read no grades. with_proposal
    and with_reward fill these fields (BRAIn). Groups of less than min_size candidates are left out; of more
    than max_size a random part is taken; top_k takes the best, which are no samples of the proposal any
    more. drop_equal leaves out lists whose grades are all equal. readout 'steps' reads a candidate as the
    mean over its steps of step means: a step is a turn of the group, or a unit where units are no tokens.
    """

    relevance: Relevance = "score"
    with_proposal: bool = False
    with_reward: bool = False
    min_size: int = 2
    max_size: int | None = None
    top_k: int | None = None
    drop_equal: bool = False
    readout: Literal["sum", "steps"] = "sum"
    makes: ClassVar[type[Input]] = ListLogLik
    per_unit: ClassVar[bool] = False

    def __post_init__(self) -> None:
        one_of(
            relevance=(self.relevance, get_args(Relevance)),
            readout=(self.readout, ("sum", "steps")),
        )
        if self.min_size < 1:
            raise ValueError(f"min_size={self.min_size} must be at least 1")
        for name in ("max_size", "top_k"):
            size = getattr(self, name)
            if size is not None and size < self.min_size:
                raise ValueError(f"{name}={size} is less than min_size={self.min_size}")
        if self.top_k is not None and (self.max_size is not None or self.with_proposal):
            other = "max_size" if self.max_size is not None else "with_proposal"
            raise ValueError(
                f"top_k={self.top_k} does not go with {other}: the best are no random candidates"
            )
        if self.relevance == "none" and self.drop_equal:
            raise ValueError("drop_equal needs grades, and relevance is none")

    @property
    def needs(self) -> frozenset[str]:
        """What grades, rewards and proposals are read from."""
        grades = {"none": frozenset[str](), "users": frozenset({"users"})}.get(self.relevance, SCORES)
        scores = SCORES if self.with_reward or self.top_k is not None else frozenset[str]()
        return grades | scores | ({"proposal|logp"} if self.with_proposal else set())

    @property
    def provides(self) -> frozenset[str]:
        """'proposal' and 'reward' where asked for."""
        asked = {"proposal": self.with_proposal, "reward": self.with_reward}
        return frozenset(name for name, filled in asked.items() if filled)

    def most(self, num_candidates: int) -> int:
        """1."""
        return 1

    def __call__(self, groups: Sequence[Group], *, seed: int) -> list[Sample]:
        """Lists in the order of the groups, candidates in the order in which they were drawn."""
        samples: list[Sample] = []
        for index, group in enumerate(groups):
            if group.size < self.min_size:
                continue
            taken = self._taken(group, seed)
            fields = {name: value[taken] for name, value in self._fields(group).items()}
            if self.drop_equal and bool((fields["relevance"] == fields["relevance"][0]).all()):
                continue
            samples.append(Sample(kind="list", group=index, candidates=tuple(taken), fields=fields))
        return samples

    def _taken(self, group: Group, seed: int) -> list[int]:
        if self.top_k is not None:
            best = torch.sort(scores_of(group), descending=True, stable=True).indices[: self.top_k]
            return sorted(best.tolist())
        if self.max_size is not None and group.size > self.max_size:
            order = torch.randperm(group.size, generator=generator_of(group, seed, "lists"))
            return sorted(order[: self.max_size].tolist())
        return list(range(group.size))

    def _fields(self, group: Group) -> dict[str, Tensor]:
        fields = {"relevance": self._relevance(group)}
        if self.with_proposal:
            fields["proposal"] = group.drawn_logp()
        if self.with_reward:
            fields["reward"] = scores_of(group)
        if self.readout == "steps":
            fields |= steps_of(group)
        return fields

    def _relevance(self, group: Group) -> Tensor:
        """The grade of each candidate, [K]."""
        if self.relevance == "score":
            return scores_of(group)
        if self.relevance == "none" or group.size == 1:
            return torch.zeros(group.size)
        if self.relevance == "win_share":
            return advantages.win_share(preferences_of(group))
        if self.relevance == "rank":
            return advantages.win_share(_beats(scores_of(group)))
        if group.verdict.users is None:
            raise ValueError(
                f"group {group.key}: relevance 'users' needs the verdict's users, which are absent"
            )
        return advantages.win_share(_beats(group.verdict.users.T)).mean(0)


def steps_of(group: Group) -> dict[str, Tensor]:
    """The step of each unit, [K, U], and the weight of each step, [K, S]: 1 where a candidate has it."""
    if group.turn is None and group.unit == "token":
        raise ValueError(
            f"group {group.key}: readout 'steps' needs turns, for its units are tokens without any"
        )
    one_each = torch.arange(group.mask.shape[1]).expand(group.mask.shape)
    steps = torch.where(group.mask, one_each if group.turn is None else group.turn, 0).long()
    num_steps = int(steps.max()) + 1 if steps.numel() else 1
    has = (steps.unsqueeze(-1) == torch.arange(num_steps)) & group.mask.unsqueeze(-1)
    return {"steps": steps, "step_weight": has.any(1).float()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Each candidate as a sample of its own, desirable if it scores more than the threshold.

    threshold: mean, of its group; best, only the best score is desirable; both leave out groups of equal
    scores. all: every one is desirable, and no judge is asked; or a number. keep 'desirable' leaves the
    others out (with `sft` and best it is best-of-K fine-tuning). baseline 'drawn' fills KTO's with the
    round's mean of logp - ref over the policy's own candidates, at least 0: they are the samples of the
    policy whose KL the baseline estimates (Ethayarajh et al. 2024, arXiv 2402.01306, section 3.3), so no
    candidate under another's context is needed.
    """

    threshold: float | Literal["mean", "best", "all"] = "mean"
    keep: Literal["all", "desirable"] = "all"
    baseline: Literal["none", "drawn"] = "none"
    makes: ClassVar[type[Input]] = LabelledLogLik
    per_unit: ClassVar[bool] = False
    readout: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        one_of(keep=(self.keep, ("all", "desirable")), baseline=(self.baseline, ("none", "drawn")))
        known = isinstance(self.threshold, str) and self.threshold in ("mean", "best", "all")
        if not known and (isinstance(self.threshold, str | bool) or not math.isfinite(self.threshold)):
            raise ValueError(f"threshold={self.threshold!r} is not a number nor one of mean, best, all")

    @property
    def needs(self) -> frozenset[str]:
        """Scores where there is something to tell apart, and both log-probs for a baseline."""
        scores = frozenset[str]() if self.threshold == "all" else SCORES
        return scores | (KL_NEEDS if self.baseline == "drawn" else frozenset())

    @property
    def provides(self) -> frozenset[str]:
        """'baseline' where asked for."""
        return frozenset({"baseline"} if self.baseline == "drawn" else set())

    def most(self, num_candidates: int) -> int:
        """K."""
        return num_candidates

    def __call__(self, groups: Sequence[Group], *, seed: int) -> list[Sample]:
        """Candidates in the order of the groups."""
        common = {"baseline": drawn_kl(groups).clamp(min=0)} if self.baseline == "drawn" and groups else {}
        return [s for i, group in enumerate(groups) for s in self._samples(i, group, common)]

    def _samples(self, index: int, group: Group, common: Mapping[str, Tensor]) -> Iterator[Sample]:
        desirable = self._desirable(group)
        if self.threshold in ("mean", "best") and group.size > 1 and bool(desirable.all() | ~desirable.any()):
            return
        for i in range(group.size):
            if desirable[i] or self.keep == "all":
                fields = {"desirable": desirable[i], **common}
                yield Sample(kind="labelled", group=index, candidates=(i,), fields=fields)

    def _desirable(self, group: Group) -> Tensor:
        """[K] bool."""
        if self.threshold == "all":
            return torch.ones(group.size, dtype=torch.bool)
        score = scores_of(group).double()
        if self.threshold == "best":
            return score == score.max()
        return score > (score.mean() if self.threshold == "mean" else float(self.threshold))


def drawn_kl(groups: Sequence[Group]) -> Tensor:
    """Mean of logp - ref over the candidates of origin 'policy', (): an estimate of KL(policy || ref).

    ValueError where there is none.
    """
    own = [log_ratio(g).sum(-1)[[o == "policy" for o in g.origin]] for g in groups]
    ratios = torch.cat(own)
    if not len(ratios):
        raise ValueError("baseline 'drawn' needs candidates of origin 'policy', and no group has any")
    return ratios.mean()


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioned:
    """The candidate that a weighing of users or aspects likes best: argmax_i v . users_i.

    The context already says v, so imitating the best one teaches to follow it (`sft`; directional preference
    alignment, Wang et al. 2024, arXiv 2402.18571). which best_worst pairs it with the worst one instead.
    direction: v, [N]; without it v is `direction` among the fields of the context.
    """

    which: Literal["best", "best_worst"] = "best"
    direction: Sequence[float] | None = None
    per_unit: ClassVar[bool] = False
    readout: ClassVar[str] = "sum"
    needs: ClassVar[frozenset[str]] = frozenset({"users"})
    provides: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        one_of(which=(self.which, ("best", "best_worst")))

    @property
    def makes(self) -> type[Input]:
        """Labelled candidates, or pairs."""
        return LabelledLogLik if self.which == "best" else PairLogLik

    def most(self, num_candidates: int) -> int:
        """1."""
        return 1

    def __call__(self, groups: Sequence[Group], *, seed: int) -> list[Sample]:
        """One sample a group; groups whose candidates are all liked the same are left out."""
        samples: list[Sample] = []
        for index, group in enumerate(groups):
            liked = self.liking(group)
            best, worst = int(liked.argmax()), int(liked.argmin())
            if liked[best] == liked[worst] and group.size > 1:
                continue
            if self.which == "best":
                fields = {"desirable": torch.tensor(True)}
                samples.append(Sample(kind="labelled", group=index, candidates=(best,), fields=fields))
            elif group.size > 1:
                samples.append(Sample(kind="pair", group=index, candidates=(best, worst)))
        return samples

    def liking(self, group: Group) -> Tensor:
        """v . users_i, [K]; ValueError where v or the users are missing or do not fit."""
        users, direction = group.verdict.users, self.direction
        if direction is None:
            direction = getattr(group.context, "fields", {}).get("direction")
        if users is None or direction is None:
            absent = (
                "the verdict's users"
                if users is None
                else "a direction, as an option or field of the context"
            )
            raise ValueError(f"group {group.key}: preference_conditioned needs {absent}")
        if len(direction) != users.shape[1]:
            raise ValueError(
                f"group {group.key}: the direction has {len(direction)} numbers for {users.shape[1]} users"
            )
        return users @ torch.tensor(direction, dtype=users.dtype)
