"""Scorers of unfinished pictures: what they are told of the time, and what they have learnt from.

All are one small convolutional network that learns the oracle's order of two clean pictures. Two see x_0 as
the model has it of noisy ones, with the time or without; one has seen clean pictures alone.

Shapes: P prompts, K pictures a prompt, D noisy versions of each, N rows; Z = 3 channels, H = W = 16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor, nn

from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.step_batches import joined
from triptych.objectives.links import logistic
from triptych.scripts.experiments.diffusion_toy import schedule
from triptych.scripts.experiments.step_aware_toy import (
    HELD_OUT,
    TRAINED,
    Reward,
    Sizes,
    embedded,
    finished,
    pictures_of,
)
from triptych.training.order import key

NUM_TIMES = 1000
# Middles of the bins of times on which scorers are tested.
BINS = (100, 300, 500, 700, 900)
NOISY = tuple(i for i, time in enumerate(BINS) if time >= 500)
KINDS = ("with the time", "without the time", "clean pictures")
WIDTHS, PLACES, FEATURES = (16, 32, 32), 4, 8
RATE, DECAY, PAIRS = 2e-3, 1e-2, 48


@dataclass(frozen=True, slots=True)
class Seen:
    """x_0 as the model has it of noisy pictures, [D, P, K, Z, H, W], and their times, [D, P].

    The pictures of one prompt share time and noise within a version. clean: the pictures, [P, K, Z, H, W].
    """

    clean: Tensor
    denoised: Tensor
    times: Tensor


@torch.no_grad()
def look_at(base: Denoiser, subjects: Sequence[int], clean: Tensor, times: Tensor, *, seed: int) -> Seen:
    """One UNet evaluation of every noisy version; times: [D, P]."""
    generator = torch.Generator().manual_seed(key("versions", seed))
    versions = []
    for row in times:
        prompts = []
        for subject, time, pictures in zip(subjects, row, clean, strict=True):
            noise = torch.randn(pictures.shape[1:], generator=generator).expand_as(pictures)
            at = time.expand(len(pictures))
            noisy = schedule().add_noise(pictures, noise, at)
            conditions = joined([embedded(subject)] * len(pictures))
            (said,) = base([noisy], [at.float()], [conditions])
            prompts.append(schedule().clean_and_noise(said, noisy, at)[0].clamp(-1, 1))
        versions.append(torch.stack(prompts))
    return Seen(clean, torch.stack(versions), times)


class Scorer(nn.Module):
    """Three convolutions, read as their means and as a few channels by place.

    The time, if it is not always 0, scales and shifts the channels of each.
    """

    def __init__(self, *, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key("scorer", seed))
            before = (3, *WIDTHS[:-1])
            self.layers = nn.ModuleList(
                nn.Conv2d(a, b, 3, stride=1 + (i > 0), padding=1)
                for i, (a, b) in enumerate(zip(before, WIDTHS, strict=True))
            )
            self.told = nn.Linear(2 * FEATURES, 2 * sum(WIDTHS))
            self.where = nn.Conv2d(WIDTHS[-1], PLACES, 1)
            self.last = nn.Linear(WIDTHS[-1] + 16 * PLACES, 1)
        nn.init.zeros_(self.told.weight)
        nn.init.zeros_(self.told.bias)

    def forward(self, pictures: Tensor, times: Tensor) -> Tensor:
        """Scores of x_0 [N, Z, H, W] as seen at times [N], [N]."""
        angle = math.pi * (times / NUM_TIMES).unsqueeze(-1) * 2.0 ** torch.arange(FEATURES)
        scales = self.told(torch.cat([angle.sin(), angle.cos()], -1)).split([2 * w for w in WIDTHS], -1)
        x = pictures
        for layer, told in zip(self.layers, scales, strict=True):
            scale, shift = told[:, :, None, None].chunk(2, 1)
            x = nn.functional.silu(layer(x) * (1 + scale) + shift)
        return self.last(torch.cat([x.mean((2, 3)), self.where(x).flatten(1)], -1)).squeeze(-1)


def fitted(kind: str, seen: Seen, truth: Tensor, *, num_steps: int, seed: int) -> Scorer:
    """A scorer after steps on random pairs of one prompt, -log sigmoid(s_w - s_l); truth: [P, K]."""
    scorer, generator = Scorer(seed=seed), torch.Generator().manual_seed(key("pairs", seed))
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=RATE, weight_decay=DECAY)
    num_versions, num_prompts, num = seen.denoised.shape[:3]
    for _ in range(num_steps):
        version, prompt = (
            torch.randint(0, n, (PAIRS,), generator=generator) for n in (num_versions, num_prompts)
        )
        first = torch.randint(0, num, (PAIRS,), generator=generator)
        other = (first + torch.randint(1, num, (PAIRS,), generator=generator)) % num
        sides = []
        for picture in (first, other):
            clean = kind == "clean pictures"
            x = seen.clean[prompt, picture] if clean else seen.denoised[version, prompt, picture]
            sides.append(scorer(x, _told(kind, seen.times[version, prompt])))
        order = (truth[prompt, first] - truth[prompt, other]).sign().float()
        loss = logistic(order * (sides[0] - sides[1])).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return scorer.requires_grad_(False)


def _told(kind: str, times: Tensor) -> Tensor:
    return times.float() if kind == "with the time" else torch.zeros(times.shape)


def accuracy(scorer: Scorer, kind: str, seen: Seen, truth: Tensor) -> float:
    """Share of the pairs of unequal truth that are said in the oracle's order, over all versions."""
    a, b = (list(side) for side in zip(*combinations(range(truth.shape[1]), 2), strict=True))
    gap = truth[:, a] - truth[:, b]
    right = []
    for pictures, times in zip(seen.denoised, seen.times, strict=True):
        told = _told(kind, times).repeat_interleave(truth.shape[1])
        said = scorer(pictures.flatten(0, 1), told).view(truth.shape)
        right.append((((said[:, a] - said[:, b]) * gap)[gap != 0] > 0).double())
    return float(torch.cat(right).mean())


def by_time(
    base: Denoiser, rewards: Sequence[Reward], sizes: Sizes, *, seed: int
) -> dict[str, Mapping[str, list[float]]]:
    """Reward -> kind of scorer -> accuracy on held-out prompts in every bin of times."""
    pools = {
        subjects: finished(
            pictures_of(base, subjects, sizes.scored, sizes.steps, seed=key("scored", seed, *subjects))
        )
        for subjects in (TRAINED, HELD_OUT)
    }
    generator = torch.Generator().manual_seed(key("times", seed))
    drawn = torch.randint(0, NUM_TIMES, (sizes.seen, len(TRAINED)), generator=generator)
    learnt_from = look_at(base, TRAINED, pools[TRAINED], drawn, seed=seed)
    tested = [
        look_at(
            base,
            HELD_OUT,
            pools[HELD_OUT],
            torch.full((max(1, sizes.seen // 3), len(HELD_OUT)), time),
            seed=key("tested", seed, time),
        )
        for time in BINS
    ]
    found = {}
    for reward in rewards:
        truth, held = (
            reward.measure(pools[s].flatten(0, 1)).view(pools[s].shape[:2]) for s in (TRAINED, HELD_OUT)
        )
        found[reward.name] = {
            kind: [
                accuracy(scorer, kind, seen, held)
                for scorer in [fitted(kind, learnt_from, truth, num_steps=sizes.scoring, seed=seed)]
                for seen in tested
            ]
            for kind in KINDS
        }
    return found
