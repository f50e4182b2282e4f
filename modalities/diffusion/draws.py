"""The times and the noise of a context, from its seed alone: drawn once, shared by candidates and models.

Neither the cut into micro-batches nor the device changes them, and a cached reference finds them again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from triptych.modalities.diffusion.schedule import Schedule
from triptych.training.order import Draw, key

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """At which times, and with how many draws of noise, a likelihood is estimated.

    law: 'uniform' over the model's times; 'logit_normal', sigmoid(N(mean, std)) (Esser et al. 2024), the
    practice of flow models; 'auto' takes the one that the kind of model is trained with. low, high: the part
    of [0, 1) that is used. values: these times alone (a distilled model's few steps: 249, 499, 749, 999).
    num_draws: draws of time and noise that a likelihood is the mean of; each costs a forward.
    stratified: the times of one context's draws, and those of neighbouring contexts of a batch, are spread
    evenly. antithetic: of two draws one has the other's noise with the opposite sign, each at a time of its
    own (both at one time are noisier than two independent draws: the time matters more).
    shared: candidates of a context share time and noise; False draws noise for each, for comparison.
    """

    law: Literal["auto", "uniform", "logit_normal"] = "auto"
    mean: float = 0.0
    std: float = 1.0
    low: float = 0.0
    high: float = 1.0
    values: list[int] = field(default_factory=list)
    num_draws: int = 1
    stratified: bool = False
    antithetic: bool = False
    shared: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"noise.low={self.low}, noise.high={self.high}: 0 <= low < high <= 1 is needed")
        if self.std <= 0:
            raise ValueError(f"noise.std={self.std} must be positive")
        if self.num_draws < 1:
            raise ValueError(f"noise.num_draws={self.num_draws} must be at least 1")
        if self.antithetic and self.num_draws % 2:
            raise ValueError(f"noise.antithetic needs an even noise.num_draws, not {self.num_draws}")


@dataclass(frozen=True, slots=True)
class Draws:
    """What a context sees: times [U] float64, noise [U, K or 1, Z, H, W], and a key of their origin."""

    times: Tensor
    noise: Tensor
    key: str


def check_times(config: NoiseConfig, schedule: Schedule) -> None:
    """ValueError for times that the model does not have."""
    for value in config.values:
        if not 0 <= value < schedule.num_times:
            raise ValueError(f"noise.values has {value}; the model's times are 0 to {schedule.num_times - 1}")


def draw(
    config: NoiseConfig, schedule: Schedule, at: Draw, shape: tuple[int, ...], num_candidates: int
) -> Draws:
    """The draws of one context. shape: of a candidate's latents, [Z, H, W]."""
    generator = torch.Generator().manual_seed(key("noise", at.seed))
    times = _times(config, schedule, at, generator)
    rows = 1 if config.shared else num_candidates
    if config.antithetic:
        half = torch.randn((config.num_draws // 2, rows, *shape), generator=generator)
        noise = torch.stack([half, -half], dim=1).flatten(0, 1)
    else:
        noise = torch.randn((config.num_draws, rows, *shape), generator=generator)
    # The times may depend on the place in the order, the noise only on the seed.
    return Draws(times, noise, f"{at.seed}:{','.join(f'{t:.9g}' for t in times.tolist())}:{config.shared}")


def _times(config: NoiseConfig, schedule: Schedule, at: Draw, generator: torch.Generator) -> Tensor:
    num = config.num_draws
    u = torch.rand(num, generator=generator, dtype=torch.float64)
    if config.stratified:
        # The first draws of neighbouring contexts form a Kronecker sequence, whose every stretch is spread
        # evenly (Weyl 1916); the shift, drawn once an epoch, keeps each of them uniform.
        shift = key("strata", at.epoch) / 2**63
        first = (shift + at.place * _GOLDEN) % 1.0 if at.place >= 0 else float(u[0])
        u = (first + torch.arange(num, dtype=torch.float64) / num) % 1.0
    u = config.low + (config.high - config.low) * u
    if config.values:
        choice = (u * len(config.values)).long().clamp(max=len(config.values) - 1)
        times = torch.tensor(config.values, dtype=torch.float64)[choice]
    elif _law(config, schedule) == "logit_normal":
        times = torch.sigmoid(config.mean + config.std * torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9)))
    else:
        times = u
    if not config.values:
        times = _model_times(times, schedule)
    return times


def _law(config: NoiseConfig, schedule: Schedule) -> str:
    if config.law != "auto":
        return config.law
    return "logit_normal" if schedule.is_flow else "uniform"


def _model_times(fraction: Tensor, schedule: Schedule) -> Tensor:
    """Fractions of the way from data to noise as the model's own times, in the flow's shift."""
    if schedule.is_flow:
        sigma = schedule.shift * fraction / (1 + (schedule.shift - 1) * fraction)
        return sigma * schedule.num_times
    return (fraction * schedule.num_times).floor().clamp(max=schedule.num_times - 1)
