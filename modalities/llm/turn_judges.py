"""Judges of several turns: the score of each, and how much better the last is than the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from triptych.modalities.llm.judges import JUDGES
from triptych.modalities.llm.prompts import Completion
from triptych.training.groups import Group, Verdict, scores_of
from triptych.training.judging import checked, judged, nested_memory, nested_needs
from triptych.training.plug_points import Judge, Live

# More turns than there can be.
LAST = 10**9


@JUDGES.register("per_turn")
@dataclass(frozen=True, slots=True, kw_only=True)
class PerTurn:
    """units: the score of each turn's text, at the turn's last unit, [K, U]; score: that of the last turn.

    `of` must read text alone, as checks do: each turn is shown to it as a completion with that text.
    """

    of: Judge

    gives = frozenset({"score", "units"})
    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "score")

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores of turns; ValueError for a group without turns."""
        texts = [[c.turn_texts() for c in g.candidates] for g in groups]
        num_turns = max((len(t) for group in texts for t in group), default=0)
        by_turn: list[list[Group]] = []
        for turn in range(num_turns):
            shown = [replace(g, candidates=tuple(_only(c, turn) for c in g.candidates)) for g in groups]
            by_turn.append(judged(self.of, shown, live))
        return [
            _at_ends(g, [scores_of(j[i]) for j in by_turn], [len(t) for t in texts[i]])
            for i, g in enumerate(groups)
        ]


@JUDGES.register("turn_gap")
@dataclass(frozen=True, slots=True, kw_only=True)
class TurnGap:
    """score = that of the last turn's text less that of the first's, the answer that it was to improve on.

    The gap G(y, y_ref) of PIT (Wang et al. 2023, arXiv 2310.00898) where a score of single answers is at
    hand, as of a check; `pit_gap` is a trained one. `of` as in `per_turn`.
    """

    of: Judge

    gives = frozenset({"score"})
    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "score")

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Gaps, 0 for an answer of one turn."""
        shown = [
            [replace(g, candidates=tuple(_only(c, turn) for c in g.candidates)) for g in groups]
            for turn in (0, LAST)
        ]
        first, last = (judged(self.of, turns, live) for turns in shown)
        return [Verdict(score=scores_of(b) - scores_of(a)) for a, b in zip(first, last, strict=True)]


def _only(completion: Completion, turn: int) -> Completion:
    """The completion with the text of one turn, the last one for a turn that it does not have."""
    texts = completion.turn_texts()
    return replace(completion, text=texts[min(turn, len(texts) - 1)])


def _at_ends(group: Group, scores: Sequence[Tensor], num_turns: Sequence[int]) -> Verdict:
    """The scores of turns [T][K] where the turns end."""
    if group.turn is None:
        raise ValueError(f"group {group.key} has no turns, which per_turn scores")
    units, last = torch.zeros(group.mask.shape), torch.zeros(group.size)
    for k, number in enumerate(num_turns):
        for turn in range(number):
            places = (group.mask[k] & (group.turn[k] == turn)).nonzero()
            if len(places):
                units[k, places[-1, 0]] = scores[turn][k]
        last[k] = scores[number - 1][k]
    return Verdict(score=last, units=units)
