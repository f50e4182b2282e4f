"""Judging alignment runs by what they were never trained on, from the answers that they left behind.

Shapes: N requests, W beams, S draws, m items, R runs of an arm (seeds).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from triptych.modalities.recsys.logged import LoggedSessions
from triptych.modalities.recsys.online_look import Answers, all_answers
from triptych.modalities.recsys.oracle import Oracle
from triptych.modalities.recsys.ranking import ranking_metrics
from triptych.training.agreement import spearman
from triptych.training.stats import Estimate, bootstrap_interval, paired_difference

BASE = "base"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Who judges: an oracle, and the requests that all runs answered. user_N: of each; users of the logs."""

    oracle: Oracle
    user_N: Tensor

    @classmethod
    def of(cls, oracle: Oracle, logs: LoggedSessions, answers: Answers) -> Bench:
        """For the requests that some answers are to."""
        return cls(oracle=oracle, user_N=logs.of("judge").user_N[answers.row_N])

    def gold(self, items_NWm: Tensor) -> Tensor:
        """Expected reward of every session, [N, W]; NaN where there is none."""
        num, width = items_NWm.shape[:2]
        found = self.oracle.reward(self.user_N.repeat_interleave(width), items_NWm.flatten(0, 1))
        return torch.where(items_NWm[..., 0] >= 0, found.view(num, width), torch.nan)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """Where a run is after some steps: KL to the base, and gains over the base.

    served: gold of the likeliest session; gold, reward: of sessions drawn from the policy.
    """

    step: int
    kl: float
    served: float
    gold: float
    reward: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """What one arm's runs answered: rows are requests, means over its runs. None where a run says nothing.

    served: gold of the likeliest session; best: highest gold among the beams; drawn: mean gold of samples;
    reward: the recipe's own, of the served; kl; agreement: Spearman's rho of reward and gold among the beams.
    paths: of each run. recall: of real held-out items, [users]; None for a control at inference.
    """

    served: Tensor
    best: Tensor | None = None
    drawn: Tensor | None = None
    reward: Tensor | None = None
    kl: Tensor | None = None
    agreement: Tensor | None = None
    recall: Tensor | None = None
    paths: tuple[tuple[Point, ...], ...] = ()


def arm_of(folders: Sequence[Path], bench: Bench, *, k: int = 10) -> Arm:
    """The last answers of every run, and its path. ValueError for runs with other requests."""
    rows: list[dict[str, Tensor]] = []
    paths = []
    for folder in folders:
        files = list(all_answers(folder).items())
        last = Answers.read(files[-1][1])
        if len(last.row_N) != len(bench.user_N):
            raise ValueError(f"{folder}: answers {len(last.row_N)} requests, the others {len(bench.user_N)}")
        rows.append(_measured(last, bench) | {"recall": recall_of(folder, "aligned", k)})
        paths.append(tuple(_path(files, bench)))
    means = {name: torch.stack([r[name] for r in rows]).mean(0) for name in rows[0]}
    return Arm(paths=tuple(paths), **means)


def first_answers(folder: Path) -> Answers:
    """What the base answers, from before any step of a run."""
    step, path = next(iter(all_answers(folder).items()))
    if step:
        raise ValueError(f"{folder}: the first answers are of step {step}; those before any step are gone")
    return Answers.read(path)


def base_arm(folder: Path, first: Answers, bench: Bench, *, k: int = 10) -> Arm:
    """What every run began with; `folder` is one of them."""
    return Arm(**_measured(first, bench) | {"recall": recall_of(folder, BASE, k)}, paths=())


def reranked(first: Answers, bench: Bench, score_NW: Tensor) -> Arm:
    """The base's beams, the one with the highest score served: what needs no training."""
    gold_NW = bench.gold(first.served_NWm)
    best = torch.where(gold_NW.isnan(), -torch.inf, score_NW).argmax(1, keepdim=True)
    reward = first.reward_NW.gather(1, best)[:, 0]
    return Arm(served=gold_NW.gather(1, best)[:, 0], reward=None if reward.isnan().any() else reward)


def recall_of(folder: Path, name: str, k: int) -> Tensor:
    """Recall@k of the real held-out items by the base or the aligned model of a run, a row a user."""
    path = folder / "rankings.safetensors"
    try:
        tensors = load_file(path)
        return ranking_metrics(tensors[f"items.{name}"], tensors["targets"], (k,))[f"recall@{k}"].double()
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: holds no ranking; let the run come to its end ({error})") from None


def _measured(answers: Answers, bench: Bench) -> dict[str, Tensor]:
    gold_NW, drawn_NS = bench.gold(answers.served_NWm), bench.gold(answers.drawn_NSm)
    found = {
        "served": gold_NW[:, 0],
        "best": gold_NW.nan_to_num(-torch.inf).amax(1),
        "drawn": drawn_NS.nanmean(1),
        "kl": answers.kl_NS.mean(1),
    }
    if not bool(answers.reward_NW[:, 0].isnan().any()):
        found["reward"] = answers.reward_NW[:, 0]
        rows = zip(answers.reward_NW, gold_NW, strict=True)
        found["agreement"] = torch.tensor([spearman(r[~r.isnan()], g[~g.isnan()]) for r, g in rows])
    return {name: value.double() for name, value in found.items()}


def _path(files: Sequence[tuple[int, Path]], bench: Bench) -> list[Point]:
    """Gains over the first answers at every step that was looked at."""
    found: list[Point] = []
    start: Tensor | None = None
    for step, path in files:
        answers = Answers.read(path)
        served, drawn = bench.gold(answers.served_NWm[:, :1]), bench.gold(answers.drawn_NSm)
        means = torch.stack([x.nanmean() for x in (served, drawn, answers.reward_NS)])
        start = means if start is None else start
        kl = max(0.0, float(answers.kl_NS.mean()))
        gains = dict(zip(("served", "gold", "reward"), (means - start).tolist(), strict=True))
        found.append(Point(step=step, kl=kl, **gains))
    return found


def gold_at(path: Sequence[Point], kl: float) -> float | None:
    """Gold gain of a run where its KL first reaches a value, linear in between; None if it never does."""
    for before, after in itertools.pairwise(path):
        if before.kl <= kl <= after.kl and after.kl > before.kl:
            share = (kl - before.kl) / (after.kl - before.kl)
            return before.gold + share * (after.gold - before.gold)
    return None


def estimates(
    arms: Mapping[str, Arm], base: Arm, control: str | None, users: Sequence[int]
) -> dict[str, dict[str, Estimate]]:
    """Of every arm: gold, gains over the base and the control arm, reward, KL, with intervals over users."""
    found: dict[str, dict[str, Estimate]] = {}
    against = {"base": base} | ({control: arms[control]} if control is not None else {})

    def mean(values: Tensor) -> Estimate:
        return bootstrap_interval(values, seed=0, clusters=users)

    def gain(before: Tensor | None, after: Tensor | None) -> Estimate | None:
        if before is None or after is None:
            return None
        return paired_difference(before, after, seed=0, clusters=users)

    for name, arm in {BASE: base, **arms}.items():
        one: dict[str, Estimate | None] = {"gold": mean(arm.served)}
        for label, other in against.items():
            if name != label:
                one[f"gold - {label}"] = gain(other.served, arm.served)
                one[f"drawn gold - {label}"] = gain(other.drawn, arm.drawn)
        one["best of beams - base"] = gain(base.best, arm.best) if name != BASE else None
        one["reward - base"] = gain(base.reward, arm.reward) if name != BASE else None
        one["kl"] = None if arm.kl is None else mean(arm.kl)
        one["agreement"] = None if arm.agreement is None else mean(arm.agreement)
        if name != BASE and arm.recall is not None and base.recall is not None:
            one["recall - base"] = paired_difference(base.recall, arm.recall, seed=0)
        found[name] = {label: value for label, value in one.items() if value is not None}
    return found


def matched(arms: Mapping[str, Arm]) -> tuple[float, dict[str, tuple[float, ...]]]:
    """Gold gain of every run at one KL, half of the smallest last KL of any arm that moved; by arm."""
    last = [arm.paths[0][-1].kl for arm in arms.values() if arm.paths and arm.paths[0][-1].kl > 0.05]
    if not last:
        return 0.0, {}
    kl = min(last) / 2
    found = {}
    for name, arm in arms.items():
        gains = [gold_at(path, kl) for path in arm.paths]
        if gains and all(g is not None for g in gains):
            found[name] = tuple(g for g in gains if g is not None)
    return kl, found


def session_means(items_NWm: Tensor, value_I: Tensor) -> Tensor:
    """Mean of a value of items over each session, [N, W]."""
    there = items_NWm >= 0
    total = torch.where(there, value_I[items_NWm.clamp(min=0)], 0.0).sum(-1)
    return total / there.sum(-1).clamp(min=1)
