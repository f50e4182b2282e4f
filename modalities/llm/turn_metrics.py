"""What a round's answers were like, beyond their scores."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from triptych.modalities.llm.prompts import Completion
from triptych.training.groups import Group


def turn_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Shares of answers that ended by themselves and of distinct ones in a group; of two turns also SCoRe's.

    turns/first, turns/second: mean reward of each turn; turns/fixed: share of first answers below one half
    whose second is above it; turns/broken: share of first answers above whose second is below (Kumar et al.
    2024, arXiv 2409.12917).
    """
    answers = [c for g in groups for c in g.candidates if isinstance(c, Completion)]
    if not answers:
        return {}
    distinct = [len({c.ids.tobytes() for c in g.candidates}) / g.size for g in groups]
    found = {
        "round/finished": sum(c.finished for c in answers) / len(answers),
        "round/distinct": sum(distinct) / len(distinct),
    }
    rewards = [_turn_rewards(g) for g in groups if g.turn is not None and g.verdict.units is not None]
    if not rewards:
        return found
    both = torch.cat(rewards)
    first, second = both[:, 0] > 0.5, both[:, -1] > 0.5
    found |= {"turns/first": float(both[:, 0].mean()), "turns/second": float(both[:, -1].mean())}
    found["turns/fixed"] = float((~first & second).sum() / (~first).sum().clamp(min=1))
    found["turns/broken"] = float((first & ~second).sum() / first.sum().clamp(min=1))
    return found


def _turn_rewards(group: Group) -> torch.Tensor:
    """Summed reward of the first and of the last turn of each candidate, [K, 2]."""
    turn, units = group.turn, group.verdict.units
    assert turn is not None
    assert units is not None
    last = torch.where(group.mask, turn, 0).amax()
    own = [torch.where(group.mask & (turn == t), units, 0.0).sum(-1) for t in (0, int(last))]
    return torch.stack(own, -1)
