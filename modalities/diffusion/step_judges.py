"""Judges of denoising paths: scorers of decoded pictures, step-aware and latent rewards, step-wise margins.

Shapes: K candidates of a group, N distinct latents [Z, H, W].
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from triptych.modalities.diffusion.image_scoring import ImageScorer, build_scorer, scores_of_images
from triptych.modalities.diffusion.latents import Latents
from triptych.modalities.diffusion.policy import Conditions
from triptych.modalities.diffusion.reward_models import StepReward, load_reward
from triptych.modalities.diffusion.rollout import to_images
from triptych.modalities.diffusion.step_batches import joined, one_row
from triptych.modalities.diffusion.step_port import StepPort
from triptych.training.groups import Group, Verdict, scores_of
from triptych.training.judges import JUDGES as COMMON
from triptych.training.judges import Ensemble
from triptych.training.judging import checked, judged, nested_memory, nested_needs
from triptych.training.plugs import Registry
from triptych.training.stages import Judge, Live

JUDGES: Registry[Judge] = Registry("judge", COMMON)


@JUDGES.register("pictures")
@dataclass(frozen=True, slots=True, kw_only=True)
class PictureJudge:
    """Image scorers on the decoded x_0 of every candidate: the finished picture, or what a step sees of it.

    scorers: name -> {scorer, options}, see `image_scoring`. how: what several make together, as `Ensemble`
    has it ('vote': phi); their own scores are the verdict's `users` and their means the round's metrics. Each
    distinct x_0 is decoded and scored once, batch_size at a time.
    """

    scorers: Mapping[str, Any]
    how: Literal["mean", "min", "max", "median", "vote", "normalised"] = "mean"
    batch_size: int = 16
    _built: dict[str, ImageScorer] = field(init=False, repr=False, compare=False)

    gives = frozenset({"score", "users"})
    needs = frozenset[str]()

    def __post_init__(self) -> None:
        if not isinstance(self.scorers, Mapping) or not self.scorers:
            raise ValueError("scorers must name at least one image scorer: {name: {scorer, options}}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        object.__setattr__(self, "_built", {n: _scorer(n, c) for n, c in self.scorers.items()})
        Ensemble(of=[_Said([], n) for n in self.scorers], how=self.how)

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores. ValueError where the port cannot decode or a candidate has no x_0."""
        seen = _Seen.of(groups)
        found: dict[str, list[Tensor]] = {name: [] for name in self._built}
        for start in range(0, len(seen.latents), self.batch_size):
            cut = slice(start, start + self.batch_size)
            images = to_images(_decoded(live, seen.latents[cut]))
            for name, scorer in self._built.items():
                found[name].append(scores_of_images(scorer, images, seen.texts[cut], f"scorer {name}"))
        members: list[Judge] = []
        for name, parts in found.items():
            scores = torch.cat(parts) if parts else torch.zeros(0)
            own = [Verdict(score=scores[place]) for place in seen.places]
            live.metrics[f"score/{name}"] = float(scores.mean()) if len(scores) else math.nan
            members.append(_Said(own, name))
        if len(members) == 1:
            return members[0](groups, live)
        return Ensemble(of=members, how=self.how)(groups, live)


@dataclass(frozen=True, slots=True)
class _Said:
    """Verdicts that are there already, as a member of an ensemble."""

    verdicts: Sequence[Verdict]
    name: str

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        return list(self.verdicts)


def _scorer(name: str, config: Any) -> ImageScorer:
    if callable(config):
        return cast(ImageScorer, config)
    if not isinstance(config, Mapping) or set(config) - {"scorer", "options"} or "scorer" not in config:
        raise ValueError(f"scorers.{name} must be {{scorer, options}}, not {config!r}")
    return build_scorer({"name": config["scorer"], "options": config.get("options") or {}})


@JUDGES.register("step_scores")
@dataclass(frozen=True, slots=True, kw_only=True)
class StepJudge:
    """A step-aware preference model on decoded x_0-hat, told the time it was seen from (SPO, section 3.1).

    reward: the folder of a `StepScorer`, or a `StepReward`. The finished picture has time 0, as in the
    released code. Pictures are decoded and scored batch_size at a time.
    """

    reward: Any
    batch_size: int = 16
    _made: dict[str, StepReward] = field(default_factory=dict, init=False, repr=False, compare=False)

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores; ValueError where the port cannot decode or a candidate has no x_0."""
        reward, seen = _reward(self, "step", live), _Seen.of(groups)
        times = torch.tensor([_time(live.port, step) for step in seen.steps])
        scores: list[Tensor] = []
        for start in range(0, len(seen.latents), self.batch_size):
            cut = slice(start, start + self.batch_size)
            pictures = _decoded(live, seen.latents[cut])
            conditions = joined([live.port.prompts[key] for key in seen.keys[cut]])
            scores.append(_checked(reward(pictures, seen.texts[cut], times[cut], conditions, _empty(live))))
        return _verdicts(scores, seen.places)


@JUDGES.register("latent_scores")
@dataclass(frozen=True, slots=True, kw_only=True)
class LatentJudge:
    """A latent reward model on each candidate's last state, at the time that begins there; no decoding (LPO).

    reward: the folder of a `LatentReward`, or a `StepReward`. A finished latent has time 0.
    """

    reward: Any
    batch_size: int = 16
    _made: dict[str, StepReward] = field(default_factory=dict, init=False, repr=False, compare=False)

    gives = frozenset({"score"})
    needs = frozenset[str]()

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """Scores."""
        reward, port = _reward(self, "latent", live), live.port
        candidates = [(c, g.context.key) for g in groups for c in g.candidates]
        scores: list[Tensor] = []
        for start in range(0, len(candidates), self.batch_size):
            part = candidates[start : start + self.batch_size]
            states = torch.stack([c.states[-1] for c, _ in part])
            times = torch.tensor([_time(port, c.end) for c, _ in part])
            conditions = joined([port.prompts[key] for _, key in part])
            scores.append(
                _checked(reward(states, [c.text for c, _ in part], times, conditions, _empty(live)))
            )
        ends = torch.tensor([g.size for g in groups]).cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return _verdicts(scores, [torch.arange(a, b) for a, b in zip(starts, ends, strict=True)])


@JUDGES.register("step_margin")
@dataclass(frozen=True, slots=True, kw_only=True)
class StepMargin:
    """Scores in units of the step's margin, so that `pairs` with min_margin 1 keeps what its bar lets by.

    SPO and LPO keep a pair whose softmax over the scores of its two sides differs by more than a bar:
    tanh(gap / 2) > bar, which is gap > 2 atanh(bar). The bar goes from `low` at the step with the least noise
    to `high` at that with the most, in the step's std (LPO: SDXL 0.45 to 0.6, SD1.5 0.35 to 0.5). A bar that
    is the same at all steps (SPO: SD1.5 0.3, SDXL 0.4) needs no judge: it is min_margin = 2 atanh(bar).
    """

    of: Judge
    low: float
    high: float

    needs = property(nested_needs)
    remembers = property(nested_memory)

    def __post_init__(self) -> None:
        checked(self.of, "of", "score", "preference")
        for name in ("low", "high"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in (0, 1)")

    @property
    def gives(self) -> frozenset[str]:
        """See `Judge`."""
        return self.of.gives | {"score"}

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """The verdicts of `of`, their scores in margins."""
        margins = margins_of(live.port, low=self.low, high=self.high)
        found = judged(self.of, groups, live)
        return [replace(g.verdict, score=scores_of(g) / float(margins[g.depth])) for g in found]


def margins_of(port: StepPort, *, low: float, high: float) -> Tensor:
    """2 atanh(bar) of every step, [T]; the bar goes with the step's std from low to high."""
    likelihood, grid = port.likelihood, port.grid
    std = likelihood.rule(likelihood.schedule, grid.times, grid.next_times).std
    share = (std - std.min()) / (std.max() - std.min()).clamp(min=1e-12)
    return 2 * (low + (high - low) * share).atanh()


def _reward(judge: StepJudge | LatentJudge, kind: Literal["step", "latent"], live: Live) -> StepReward:
    """The reward of a judge; a folder is loaded once."""
    if callable(judge.reward):
        return cast(StepReward, judge.reward)
    if kind not in judge._made:
        judge._made[kind] = load_reward(kind, Path(judge.reward), device=live.device)
    return judge._made[kind]


@dataclass(frozen=True, slots=True)
class _Seen:
    """The N distinct x_0 of some groups: groups of one segment have the same tensors, to be decoded once.

    places: where each group's candidates are among them, [K]. steps: where the step that sees them begins.
    """

    places: list[Tensor]
    latents: Tensor
    texts: list[str]
    keys: list[str]
    steps: list[int]

    @classmethod
    def of(cls, groups: Sequence[Group]) -> _Seen:
        """ValueError for a candidate without x_0."""
        found: dict[tuple[int, str], int] = {}
        candidates: list[tuple[Latents, str]] = []
        latents: list[Tensor] = []
        places: list[Tensor] = []
        for g in groups:
            own: list[int] = []
            for c in g.candidates:
                if c.clean is None:
                    raise ValueError(f"group {g.key}: a candidate has no x_0 to look at")
                place = found.setdefault((c.clean.data_ptr(), g.context.key), len(found))
                if place == len(candidates):
                    candidates.append((c, g.context.key))
                    latents.append(c.clean)
                own.append(place)
            places.append(torch.tensor(own))
        return cls(
            places=places,
            latents=torch.stack(latents) if latents else torch.zeros(0),
            texts=[c.text for c, _ in candidates],
            keys=[key for _, key in candidates],
            steps=[c.clean_step for c, _ in candidates],
        )


def _time(port: StepPort, step: int) -> float:
    """The time at which a step begins; 0 after the last one."""
    return 0.0 if step == len(port.grid.times) else float(port.grid.times[step])


def _empty(live: Live) -> Conditions | None:
    return None if live.port.empty is None else one_row(*live.port.empty)


def _decoded(live: Live, latents: Tensor) -> Tensor:
    if live.port.decode is None:
        raise ValueError("this port has no decoder, and a judge wants to look at pictures: give it one")
    return live.port.decode(latents.to(live.device))


def _checked(scores: Tensor) -> Tensor:
    return scores.detach().float().cpu()


def _verdicts(scores: Sequence[Tensor], places: Sequence[Tensor]) -> list[Verdict]:
    table = torch.cat(list(scores)) if scores else torch.zeros(0)
    if not table.isfinite().all():
        raise ValueError("the reward model gave scores that are not finite")
    return [Verdict(score=table[place]) for place in places]
