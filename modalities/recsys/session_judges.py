"""Judges of sessions for training: a reward model learnt from logs.

The oracle is none of them: what is trained on its verdict can no longer be judged by it.

Shapes: G groups, N sessions in all, m items, K towers, R members.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.reward_model import RewardEnsemble, load_reward
from triptych.training.control_judges import JUDGES as COMMON
from triptych.training.groups import Group, Verdict
from triptych.training.judging import check_choice
from triptych.training.plugs import Registry
from triptych.training.stages import Judge, Live

JUDGES: Registry[Judge] = Registry("judge", base=COMMON)


@JUDGES.register("reward_model")
@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """R(u, S) of a trained ensemble: its scalarised score, mean less pessimism times deviation.

    model: folder that `train session-reward` wrote. whose: 'own', the history of the user who asks; 'other',
    that of the next user in the round, a control that keeps what the model knows of items and loses what it
    knows of users. `users` of the verdict are the towers' probabilities, mean over members. The spread of the
    members is reported as `reward_disagreement`.
    """

    model: str
    whose: Literal["own", "other"] = "own"

    gives = frozenset({"score", "users"})
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        check_choice("whose", self.whose, ("own", "other"))
        if not Path(self.model).is_dir():
            raise ValueError(f"model={self.model}: there is no such folder; train a session reward model")

    @cached_property
    def loaded(self) -> tuple[RewardEnsemble, tuple[str, ...]]:
        """The ensemble, and the items that it knows, by number."""
        ensemble, facts = load_reward(Path(self.model))
        return ensemble, tuple(facts.get("items", ()))

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores and towers; ValueError for another catalogue than the reward model's."""
        ensemble, items = self.loaded
        if items != live.port.items:
            raise ValueError(
                f"{self.model}: the reward model knows {len(items)} items, and they are not the "
                f"recommender's {len(live.port.items)} in the same order; train both on the same data"
            )
        if not groups:
            return []
        device = live.device
        ensemble = ensemble.to(device)
        histories = [g.context.history for g in groups]
        if self.whose == "other":
            histories = [*histories[1:], histories[0]]
        sizes = [g.size for g in groups]
        longest = max(len(c.items) for g in groups for c in g.candidates)
        items_Nm = torch.full((sum(sizes), longest), -1)
        for row, shown in enumerate(c for g in groups for c in g.candidates):
            items_Nm[row, : len(shown.items)] = shown.items
        user_N = torch.repeat_interleave(torch.tensor(sizes))
        probabilities_RNK = ensemble.probabilities(
            Jagged.of(histories).to(device), items_Nm.to(device), user_N.to(device)
        )
        scalars_RN = ensemble.scalars(probabilities_RNK)
        spread_N = scalars_RN.std(0, correction=0)
        score_N = (scalars_RN.mean(0) - ensemble.scoring.pessimism * spread_N).float().cpu()
        towers_NK = probabilities_RNK.mean(0).float().cpu()
        live.metrics["reward_disagreement"] = float(spread_N.mean())
        return [
            Verdict(score=score, users=towers)
            for score, towers in zip(score_N.split(sizes), towers_NK.split(sizes), strict=True)
        ]
