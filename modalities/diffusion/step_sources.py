"""Sources of denoising paths: siblings at every step (SPO, LPO), and whole paths (DDPO, Flow-GRPO).

Shapes: P prompts, K candidates of one, T steps of the sampler, S states of one step; Z, H, W of a latent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from triptych.modalities.diffusion.latents import ImagePrompt, Latents
from triptych.modalities.diffusion.step_batches import joined, one_row
from triptych.modalities.diffusion.step_port import StepPort
from triptych.modalities.diffusion.transitions import log_density, step_mean
from triptych.training.groups import Group, scores_of
from triptych.training.judging import checked, judged
from triptych.training.plugs import Registry
from triptych.training.stages import Judge, Live, Source

SOURCES: Registry[Source] = Registry("source")
Path = Literal["random", "best", "worst"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Walker:
    """Takes states of the sampler's grid one step on. States are float32 on the CPU, batch_size at a time."""

    policy: Any
    port: StepPort
    device: torch.device
    batch_size: int

    @classmethod
    def of(cls, live: Live, batch_size: int) -> Walker:
        """The walker of a round."""
        return cls(policy=live.policy, port=live.port, device=live.device, batch_size=batch_size)

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.port.grid.times)

    @torch.no_grad()
    def predict(self, keys: Sequence[str], states: Tensor, step: int) -> Tensor:
        """The guided prediction where `step` begins, [S, Z, H, W], one row (two guided) a state."""
        found: list[Tensor] = []
        empty = None if self.port.empty is None else one_row(*self.port.empty).to(self.device)
        for start in range(0, len(states), self.batch_size):
            part = states[start : start + self.batch_size].to(self.device)
            times = torch.full((len(part),), float(self.port.grid.times[step]), device=self.device)
            prompts = [self.port.prompts[key] for key in keys[start : start + self.batch_size]]
            conditions = joined(prompts).to(self.device)
            found += self.port.likelihood.predict(self.policy, [part], [times], [conditions], empty)
        return torch.cat([f.float().cpu() for f in found])

    def draw(self, states: Tensor, prediction: Tensor, step: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """States one step on, [S, Z, H, W], and the log-density of each, [S]. noise: standard normal."""
        likelihood, grid = self.port.likelihood, self.port.grid
        times, next_times = (t[step].expand(len(states)) for t in (grid.times, grid.next_times))
        moves = likelihood.rule(likelihood.schedule, times, next_times)
        keep, push, std = (x.float() for x in (moves.keep, moves.push, moves.std))
        mean = step_mean(states, prediction, keep, push)
        drawn = mean + std.reshape(-1, 1, 1, 1) * noise
        return drawn, log_density(drawn, mean, std, reduction=likelihood.reduction)

    def clean(self, keys: Sequence[str], states: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """x_0 as seen from where `step` begins, [S, Z, H, W], and the prediction; the states after step T."""
        if step == self.num_steps:
            return states, None
        prediction = self.predict(keys, states, step)
        times = self.port.grid.times[step].expand(len(states)).float()
        return self.port.likelihood.schedule.clean_and_noise(prediction, states, times)[0], prediction


def _stretch(first_step: int, last_step: int | None, num_steps: int) -> tuple[int, int]:
    last = num_steps if last_step is None else last_step
    if not 0 <= first_step < last <= num_steps:
        raise ValueError(
            f"first_step={first_step} and last_step={last_step} must be a stretch of the sampler's "
            f"{num_steps} steps"
        )
    return first_step, last


def _check_grid(walker: Walker, num_steps: int, stretch: tuple[int, int]) -> None:
    """ValueError unless these are the sampler's steps, and those that are trained on have noise."""
    if walker.num_steps != num_steps:
        raise ValueError(f"num_steps={num_steps}, but the sampler has {walker.num_steps} steps")
    likelihood, grid = walker.port.likelihood, walker.port.grid
    std = likelihood.rule(likelihood.schedule, grid.times, grid.next_times).std[slice(*stretch)]
    for step in (~(std > 0)).nonzero().flatten().tolist():
        raise ValueError(
            f"step {stretch[0] + step} of {num_steps} has no noise, so its next state has no density: "
            "leave it out with first_step and last_step"
        )


def _normal(generators: Sequence[torch.Generator], num: int, shape: Sequence[int]) -> Tensor:
    """Standard normal numbers, [P, num, *shape]; each prompt's from its own generator."""
    return torch.stack([torch.randn(num, *shape, generator=g) for g in generators])


@SOURCES.register("step_siblings")
@dataclass(frozen=True, slots=True, kw_only=True)
class StepSiblings:
    """K siblings from one state at every step, and on from one of them. Liang et al. 2024, arXiv 2406.04314.

    One path a prompt. Every sibling has x_0 as the next step sees it, for judges; the one that the path goes
    on with uses that prediction again. Steps before first_step have no siblings (SPO: the first 4 of 20), and
    the path ends at last_step (None: at the picture). segment: j steps that siblings go on their own before
    they are compared; each of the j is a group whose candidates bear the label of the segment's end (the
    released SDXL form: j = 4, K = 2). choose: the sibling to go on from, at random or the best or worst by
    `judge`.
    """

    num_candidates: int = 4
    first_step: int = 4
    last_step: int | None = None
    num_steps: int = 20
    segment: int = 1
    choose: Path = "random"
    judge: Judge | None = None
    batch_size: int = 8

    fresh = True
    provides = frozenset({"logp"})

    def __post_init__(self) -> None:
        for name, least in {"num_candidates": 2, "segment": 1, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        first, last = _stretch(self.first_step, self.last_step, self.num_steps)
        if (last - first) % self.segment:
            raise ValueError(f"segment={self.segment} does not divide the {last - first} steps with siblings")
        if (self.choose == "random") != (self.judge is None):
            raise ValueError(
                f"choose={self.choose!r}: a judge goes with 'best' and 'worst', and with them only"
            )
        if self.judge is not None:
            checked(self.judge, "judge", "score")

    @property
    def groups_per_context(self) -> int:
        """Steps with siblings."""
        first, last = _stretch(self.first_step, self.last_step, self.num_steps)
        return last - first

    def __call__(self, contexts: Sequence[ImagePrompt], live: Live) -> list[Group]:
        """The groups of all paths, those of one prompt after each other."""
        walker = Walker.of(live, self.batch_size)
        first, last = _stretch(self.first_step, self.last_step, self.num_steps)
        _check_grid(walker, self.num_steps, (first, last))
        noises = [live.generator(c.key, "noise") for c in contexts]
        paths = [live.generator(c.key, "path") for c in contexts]
        keys = [c.key for c in contexts]
        shape = live.port.shape
        states = _normal(noises, 1, shape)[:, 0]
        for step in range(first):
            states, _ = walker.draw(
                states, walker.predict(keys, states, step), step, _normal(noises, 1, shape)[:, 0]
            )
        prediction: Tensor | None = None
        grown: list[list[Group]] = [[] for _ in contexts]
        for step in range(first, last, self.segment):
            prediction = walker.predict(keys, states, step) if prediction is None else prediction
            made, after, following = self._segment(walker, contexts, states, prediction, step, noises)
            picked = self._picked(made, live, paths)
            for own, groups in zip(grown, made, strict=True):
                own += groups
            rows = torch.arange(len(contexts))
            states = after[rows, picked]
            prediction = None if following is None else following[rows, picked]
        return [group for own in grown for group in own]

    def _segment(
        self,
        walker: Walker,
        contexts: Sequence[ImagePrompt],
        states: Tensor,
        prediction: Tensor,
        step: int,
        noises: Sequence[torch.Generator],
    ) -> tuple[list[list[Group]], Tensor, Tensor | None]:
        """Groups by prompt, the siblings' last states [P, K, Z, H, W] and the predictions there."""
        num, shape = self.num_candidates, states.shape[1:]
        keys = [c.key for c in contexts for _ in range(num)]
        path, logps = [states.repeat_interleave(num, 0)], []
        known = prediction.repeat_interleave(num, 0)
        for i in range(self.segment):
            known = known if i == 0 else walker.predict(keys, path[-1], step + i)
            after, logp = walker.draw(path[-1], known, step + i, _normal(noises, num, shape).flatten(0, 1))
            path.append(after)
            logps.append(logp)
        clean, following = walker.clean(keys, path[-1], step + self.segment)
        made: list[list[Group]] = []
        for p, context in enumerate(contexts):
            rows = slice(p * num, p * num + num)
            own = [x[rows] for x in path]
            made.append(
                [
                    self._group(context, step, i, own[i : i + 2], logps[i][rows], clean[rows])
                    for i in range(self.segment)
                ]
            )
        by_prompt = (len(contexts), num, *shape)
        return made, path[-1].view(by_prompt), None if following is None else following.view(by_prompt)

    def _group(
        self,
        prompt: ImagePrompt,
        step: int,
        offset: int,
        ends: Sequence[Tensor],
        logp: Tensor,
        clean: Tensor,
    ) -> Group:
        """One step of a segment that begins at `step`. ends: its K first and last states."""
        at, (before, after), shared = step + offset, ends, offset == 0
        key, text = prompt.key, prompt.text
        context = Latents(key=key, text=text, step=at, states=before[:1]) if shared else prompt
        states = after.unsqueeze(1) if shared else torch.stack([before, after], 1)
        candidates = tuple(
            Latents(key=key, text=text, step=at + shared, states=s, clean=c, clean_step=step + self.segment)
            for s, c in zip(states, clean, strict=True)
        )
        return Group(
            key=prompt.key,
            context=context,
            candidates=candidates,
            mask=torch.ones(len(after), 1, dtype=torch.bool),
            unit="denoise",
            logp=logp.unsqueeze(-1),
            depth=at,
        )

    def _picked(
        self, made: Sequence[Sequence[Group]], live: Live, paths: Sequence[torch.Generator]
    ) -> Tensor:
        if self.judge is None:
            return torch.tensor([int(torch.randint(self.num_candidates, (1,), generator=g)) for g in paths])
        scores = [scores_of(g) for g in judged(self.judge, [groups[-1] for groups in made], live)]
        return torch.stack([s.argmax() if self.choose == "best" else s.argmin() for s in scores])


@SOURCES.register("denoising_paths")
@dataclass(frozen=True, slots=True, kw_only=True)
class DenoisingPaths:
    """K whole paths of each prompt, with the log-density of every step. Black et al. 2024 (DDPO).

    Candidates are the steps from first_step to last_step (None: to the end), which are those trained on; x_0
    of all is the finished picture. The last step of a flow has little noise and large ratios: Flow-GRPO has
    no use for it. shared_noise: all K start from one x_T (DanceGRPO) or each from its own. split: every step
    is a group of its own, so that a sample costs K rows of the model at a time and not K (T - first_step);
    objectives of whole paths (D3PO's pairs) need them together.
    """

    num_candidates: int = 8
    num_steps: int = 20
    first_step: int = 0
    last_step: int | None = None
    shared_noise: bool = False
    split: bool = False
    batch_size: int = 8

    fresh = True
    provides = frozenset({"logp"})

    def __post_init__(self) -> None:
        for name in ("num_candidates", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        _stretch(self.first_step, self.last_step, self.num_steps)

    @property
    def groups_per_context(self) -> int:
        """1, or the steps that are trained on where they are split."""
        first, last = _stretch(self.first_step, self.last_step, self.num_steps)
        return last - first if self.split else 1

    def __call__(self, contexts: Sequence[ImagePrompt], live: Live) -> list[Group]:
        """One group a prompt, or one a step of it."""
        walker = Walker.of(live, self.batch_size)
        first, last = _stretch(self.first_step, self.last_step, self.num_steps)
        _check_grid(walker, self.num_steps, (first, last))
        num, shape = self.num_candidates, live.port.shape
        noises = [live.generator(c.key, "noise") for c in contexts]
        keys = [c.key for c in contexts for _ in range(num)]
        start = _normal(noises, 1 if self.shared_noise else num, shape).expand(-1, num, *shape)
        path, logps = [start.flatten(0, 1)], []
        for step in range(self.num_steps):
            prediction = walker.predict(keys, path[-1], step)
            after, logp = walker.draw(path[-1], prediction, step, _normal(noises, num, shape).flatten(0, 1))
            path.append(after)
            logps.append(logp)
        states, table = torch.stack(path[first : last + 1], 1), torch.stack(logps[first:last], 1)
        stretches = [(i, i + 1) for i in range(last - first)] if self.split else [(0, last - first)]
        return [
            self._group(
                context, first + a, states[rows, a : b + 1], path[-1][rows], table[rows, a:b].contiguous()
            )
            for rows, context in _rows(contexts, num)
            for a, b in stretches
        ]

    def _group(self, context: ImagePrompt, step: int, states: Tensor, clean: Tensor, logp: Tensor) -> Group:
        """A stretch of K paths from `step` on: states [K, U + 1, Z, H, W], logp [K, U]."""
        return Group(
            key=context.key,
            context=context,
            candidates=tuple(
                Latents(
                    key=context.key,
                    text=context.text,
                    step=step,
                    states=own,
                    clean=picture,
                    clean_step=self.num_steps,
                )
                for own, picture in zip(states, clean, strict=True)
            ),
            mask=torch.ones(logp.shape, dtype=torch.bool),
            unit="denoise",
            logp=logp,
            depth=step,
        )


def _rows(contexts: Sequence[ImagePrompt], num: int) -> Iterator[tuple[slice, ImagePrompt]]:
    """Each context with the rows of its candidates."""
    for i, context in enumerate(contexts):
        yield slice(i * num, i * num + num), context
