"""Statistical rejection sampling: pairs of the candidates that a sharper distribution would have drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from triptych.objectives import Input, PairLogLik
from triptych.training.groups import Group, Sample, scores_of
from triptych.training.pair_shapes import FILLS, generator_of, soft_label
from triptych.training.unit_credits import SCORES, one_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Accept:
    """Pairs of candidates that statistical rejection sampling accepts (RSO).

    Liu et al. 2023, arXiv 2309.06657. A pass goes through the remaining candidates in a random order and
    accepts each with probability exp((R - max R) / gamma), max R over those that remained at its start;
    passes go on until num_samples are accepted or none is left. The more candidates, the nearer the accepted
    come to samples of proposal * exp(R / gamma). Candidates are told apart by index: the released code's by
    their text, which loses how often a text was drawn. rank: first_round pairs them at random; tournament
    lets the winners meet again; all. Ties are dropped.
    """

    gamma: float
    num_samples: int = 8
    rank: Literal["first_round", "tournament", "all"] = "first_round"
    label: Literal["hard", "bt", "preference"] = "hard"
    makes: ClassVar[type[Input]] = PairLogLik
    per_unit: ClassVar[bool] = False
    readout: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        one_of(
            rank=(self.rank, ("first_round", "tournament", "all")),
            label=(self.label, ("hard", "bt", "preference")),
        )
        if not self.gamma > 0:
            raise ValueError(f"gamma={self.gamma!r} must be positive")
        if self.num_samples < 2:
            raise ValueError(f"num_samples={self.num_samples} must be at least 2")

    @property
    def needs(self) -> frozenset[str]:
        """Scores."""
        return frozenset({"score"}) if self.label == "bt" else SCORES

    @property
    def provides(self) -> frozenset[str]:
        """'strength' of a soft label."""
        return FILLS[self.label]

    def most(self, num_candidates: int) -> int:
        """n / 2, n - 1 or n (n - 1) / 2 pairs of n accepted candidates."""
        n = min(num_candidates, self.num_samples)
        return {"first_round": n // 2, "tournament": max(0, n - 1), "all": n * (n - 1) // 2}[self.rank]

    def __call__(self, groups: Sequence[Group], *, seed: int) -> list[Sample]:
        """Pairs in the order of the groups."""
        samples: list[Sample] = []
        for index, group in enumerate(groups):
            score = scores_of(group)
            drawn = accepted(score, self.gamma, self.num_samples, generator_of(group, seed, "accept"))
            for chosen, rejected in self._meetings(drawn, score):
                if score[chosen] == score[rejected]:
                    continue
                pair = (chosen, rejected)
                fields = soft_label(self.label, group, score, pair)
                samples.append(Sample(kind="pair", group=index, candidates=pair, fields=fields))
        return samples

    def _meetings(self, drawn: list[int], score: Tensor) -> Iterator[tuple[int, int]]:
        """(better, worse) of every meeting, those of equal score included."""

        def ordered(a: int, b: int) -> tuple[int, int]:
            return (a, b) if score[a] >= score[b] else (b, a)

        if self.rank == "all":
            yield from (ordered(a, b) for i, a in enumerate(drawn) for b in drawn[i + 1 :])
            return
        while len(drawn) > 1:
            met = [ordered(a, b) for a, b in zip(drawn[::2], drawn[1::2], strict=False)]
            yield from met
            if self.rank == "first_round":
                return
            # The last one of an odd number has nobody to meet and goes on.
            drawn = [a for a, _ in met] + drawn[2 * len(met) :]


def acceptance(score: Tensor, gamma: float) -> Tensor:
    """Probability of accepting each candidate, exp((R - max R) / gamma), [K]."""
    return torch.exp((score - score.max()) / gamma)


def accepted(score: Tensor, gamma: float, num_samples: int, generator: torch.Generator) -> list[int]:
    """Indices of accepted candidates, in the order of acceptance, at most num_samples and each once."""
    remaining, found = torch.arange(len(score)), list[int]()
    while len(remaining) and len(found) < num_samples:
        remaining = remaining[torch.randperm(len(remaining), generator=generator)]
        chance = torch.rand(len(remaining), generator=generator)
        passed = chance < acceptance(score[remaining], gamma)
        found += remaining[passed].tolist()
        remaining = remaining[~passed]
    return found[:num_samples]
