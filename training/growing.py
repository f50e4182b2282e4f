"""Paths with siblings at every step, without a search: denoising trees.

A step's siblings come from the one state where a path is; a state is the modality's own record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.training.groups import Group, Unit
from triptych.training.trees import Child, check_choice

Path = Literal["random", "best", "worst"]


def grow(
    starts: Sequence[tuple[str, Any]],
    *,
    num_steps: int,
    num_siblings: int,
    expand: Callable[[Sequence[Any], int, int], Sequence[Sequence[Child]]],
    generators: Sequence[torch.Generator],
    choose: Path = "random",
    score: Callable[[Sequence[Group]], Sequence[Tensor]] | None = None,
    first_step: int = 0,
    unit: Unit = "denoise",
) -> list[Group]:
    """Paths of `num_steps` steps with siblings at each of them: one group a step, whose context they share.

    starts: key and state of each path. expand(states, step, num): `num` children of each state. Each step's
    siblings come from the one state where the path is, and it goes on from one of them: a random one keeps
    the states those of the policy (step-aware SPO, Liang et al. 2024, arXiv 2406.04314); the best or worst
    one by `score` of the step's groups, [K] each. A group's context is the state, its candidates are the
    states that follow; logp is a step's sum, [K, 1]. Before first_step there are no siblings and no groups.
    generators: one a path. Groups of one path follow each other.
    """
    _check_grow(num_steps, num_siblings, first_step, choose, score is not None)
    states = [state for _, state in starts]
    grown: list[list[Group]] = [[] for _ in starts]
    for step in range(num_steps):
        if step < first_step:
            states = [children[0].state for children in expand(states, step, 1)]
            continue
        drawn = expand(states, step, num_siblings)
        groups = [
            _step_group(key, state, children, step, unit)
            for (key, _), state, children in zip(starts, states, drawn, strict=True)
        ]
        for own, group in zip(grown, groups, strict=True):
            own.append(group)
        scores = [None] * len(groups) if score is None else score(groups)
        taken = [_take(s, num_siblings, choose, g) for s, g in zip(scores, generators, strict=True)]
        states = [children[i].state for children, i in zip(drawn, taken, strict=True)]
    return [group for own in grown for group in own]


def _step_group(key: str, state: Any, children: Sequence[Child], step: int, unit: Unit) -> Group:
    logp = torch.stack([c.logp.detach().float().sum() for c in children]).unsqueeze(-1)
    return Group(
        key=key,
        context=state,
        candidates=tuple(c.state for c in children),
        mask=torch.ones(logp.shape, dtype=torch.bool),
        unit=unit,
        logp=logp.cpu(),
        depth=step,
    )


def _take(scores: Tensor | None, num: int, choose: Path, generator: torch.Generator) -> int:
    if scores is None:
        return int(torch.randint(num, (1,), generator=generator))
    return int(scores.argmax() if choose == "best" else scores.argmin())


def _check_grow(num_steps: int, num_siblings: int, first_step: int, choose: Path, scored: bool) -> None:
    if num_siblings < 2:
        raise ValueError(f"num_siblings={num_siblings} must be at least 2")
    if not 0 <= first_step < num_steps:
        raise ValueError(f"first_step={first_step} must be at least 0 and less than num_steps={num_steps}")
    check_choice("choose", choose, Path)
    if scored != (choose != "random"):
        raise ValueError(f"choose={choose!r}: score goes with 'best' and 'worst', and with them only")
