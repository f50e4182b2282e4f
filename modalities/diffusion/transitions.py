"""One denoising step as a Gaussian: x_s ~ N(keep x_t + push prediction, std^2) for a step t -> s.

Both rules are one form in x_0 and eps as the model sees them: mean = alpha_s x_0 + c eps, so they hold for
epsilon, v and flow models alike. Shapes: N rows, Z latent channels, H x W, D = Z H W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from triptych.modalities.diffusion.schedule import Schedule

Final = Literal["first", "clean"]
Spacing = Literal["leading", "trailing", "linspace"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True, slots=True)
class Transitions:
    """N steps: mean = keep x_t + push prediction, [N] each; std, [N]. Made in float64 on the CPU."""

    keep: Tensor
    push: Tensor
    std: Tensor


class Rule(Protocol):
    """How a sampler steps. stochastic: whether its steps have noise, without which they have no density."""

    @property
    def stochastic(self) -> bool:
        """See the class."""
        ...

    def __call__(self, schedule: Schedule, times: Tensor, next_times: Tensor) -> Transitions:
        """Steps from `times` to `next_times`, [N] each, on the CPU."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ddim:
    """DDIM with noise: mean = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps. Song et al. 2021, eq. 12, 16.

    std = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2): eq. 16, written so that
    it holds where alpha^2 + sigma^2 is not 1, for flow models too. eta: 0 is deterministic, 1 the ancestral
    steps of DDPM (SPO, DDPO). final: the noise that is left below time 0: that of step 0 ('first', diffusers'
    set_alpha_to_one=False as SD1.5 and SDXL have it) or none ('clean'). x_0 is not clipped (diffusers'
    clip_sample): latents have no bounds.
    """

    eta: float
    final: Final = "first"

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta={self.eta} must be in [0, 1]")
        if self.final not in get_args(Final):
            raise ValueError(f"final='{self.final}' is not one of {', '.join(get_args(Final))}")

    @property
    def stochastic(self) -> bool:
        """Whether eta > 0."""
        return self.eta > 0

    def __call__(self, schedule: Schedule, times: Tensor, next_times: Tensor) -> Transitions:
        """The steps. ValueError for one that does not go down, and for an epsilon model's from alpha = 0."""
        times, next_times = _checked(schedule, times, next_times)
        alpha, sigma = schedule.alpha(times).double(), schedule.sigma(times).double()
        inside = next_times.clamp(min=0)
        alpha_next, sigma_next = schedule.alpha(inside).double(), schedule.sigma(inside).double()
        if self.final == "clean":
            below = next_times < 0
            alpha_next, sigma_next = alpha_next.masked_fill(below, 1.0), sigma_next.masked_fill(below, 0.0)
        left = (sigma**2 - (alpha / alpha_next * sigma_next) ** 2).clamp(min=0)
        std = self.eta * sigma_next / sigma * left.sqrt()
        return _linear(schedule, times, alpha_next, (sigma_next**2 - std**2).clamp(min=0).sqrt(), std)


@dataclass(frozen=True, slots=True, kw_only=True)
class FlowSde:
    """The flow's ODE as an SDE, one Euler-Maruyama step. Liu et al. 2025 (Flow-GRPO, arXiv 2505.05470).

    g = noise_level sqrt(s / (1 - s)), dt = s' - s < 0, std = g sqrt(-dt), in diffusers' sigmas s > s':
    mean = x (1 + g^2 / (2 s) dt) + v (1 + g^2 (1 - s) / (2 s)) dt, which is computed as
    (1 - s') x_0 + (s' + g^2 / (2 s) dt) eps, the same number. As in the released code, 1 - s in g is 1 - s'
    in the step from s = 1. Marginals are the ODE's as dt -> 0: the noise left at s' has variance
    s'^2 + 2 q |dt| + q^2 with q = g^2 |dt| / (2 s), that of `Ddim` has s'^2.
    """

    noise_level: float

    def __post_init__(self) -> None:
        if not 0 <= self.noise_level < math.inf:
            raise ValueError(f"noise_level={self.noise_level} must be at least 0 and finite")

    @property
    def stochastic(self) -> bool:
        """Whether noise_level > 0."""
        return self.noise_level > 0

    def __call__(self, schedule: Schedule, times: Tensor, next_times: Tensor) -> Transitions:
        """The steps. ValueError for a model that predicts no flow, and for a step that does not go down."""
        if not schedule.is_flow:
            raise ValueError(
                f"FlowSde steps are those of a flow model; this one predicts {schedule.prediction}: use Ddim"
            )
        times, next_times = _checked(schedule, times, next_times)
        s, s_next = schedule.sigma(times).double(), schedule.sigma(next_times).double()
        down = s - s_next
        variance = self.noise_level**2 * s / (1 - torch.where(s >= 1, s_next, s))
        return _linear(
            schedule, times, 1 - s_next, s_next - variance / (2 * s) * down, (variance * down).sqrt()
        )


def _checked(schedule: Schedule, times: Tensor, next_times: Tensor) -> tuple[Tensor, Tensor]:
    times, next_times = times.double(), next_times.double()
    top = schedule.num_times if schedule.is_flow else schedule.num_times - 1
    lowest = 0.0 if schedule.is_flow else -math.inf
    wrong = ~((next_times < times) & (times >= 0) & (times <= top) & (next_times >= lowest))
    if not schedule.is_flow:
        wrong |= (times != times.round()) | (next_times != next_times.round())
    if bool(wrong.any()):
        at, to = float(times[wrong][0]), float(next_times[wrong][0])
        raise ValueError(
            f"a step from time {at:g} to {to:g} is none of this schedule: "
            f"steps go down from at most {top}, "
            + ("to at least 0" if schedule.is_flow else "in whole numbers")
        )
    return times, next_times


def _linear(schedule: Schedule, times: Tensor, clean: Tensor, noise: Tensor, std: Tensor) -> Transitions:
    """mean = clean x_0 + noise eps, as coefficients of x_t and of the prediction; both are linear in them."""
    one, zero = torch.ones_like(times), torch.zeros_like(times)
    keep, push = (
        clean * x_0 + noise * eps
        for x_0, eps in (
            schedule.clean_and_noise(zero, one, times),
            schedule.clean_and_noise(one, zero, times),
        )
    )
    wrong = ~(keep.isfinite() & push.isfinite())
    if bool(wrong.any()):
        at = float(times[wrong][0])
        raise ValueError(f"an epsilon prediction says nothing of x_0 at time {at:g}, where alpha is 0")
    return Transitions(keep, push, std)


def step_mean(noisy: Tensor, prediction: Tensor, keep: Tensor, push: Tensor) -> Tensor:
    """keep x_t + push prediction, [N, Z, H, W], in float32 (float64 stays). keep, push: [N]."""
    noisy, prediction = full_precision(noisy), full_precision(prediction)
    return _column(keep, noisy) * noisy + _column(push, noisy) * prediction


def log_density(following: Tensor, mean: Tensor, std: Tensor, *, reduction: Reduction) -> Tensor:
    """log N(x_s; mean, std^2) as mean or sum over D, [N], in float32 (float64 stays). std: [N], above 0.

    Natural log of the density itself, constants and all: -(mean z^2 / 2 + log std + log(2 pi) / 2).
    """
    std = std.to(full_precision(mean).dtype)
    z = (full_precision(following) - full_precision(mean)) / _column(std, mean)
    density = -0.5 * z.square().flatten(1).mean(-1) - std.log() - 0.5 * math.log(2 * math.pi)
    return density if reduction == "mean" else density * z[0].numel()


def gaussian_kl(mean: Tensor, other: Tensor, std: Tensor, *, reduction: Reduction) -> Tensor:
    """KL(N(mean, std^2) || N(other, std^2)) = ||mean - other||^2 / (2 std^2), mean or sum over D, [N].

    Liu et al. 2025 (Flow-GRPO), section 4; std: [N], above 0. float32 (float64 stays).
    """
    gap = (full_precision(mean) - full_precision(other)) / _column(std, mean)
    kl = 0.5 * gap.square().flatten(1).mean(-1)
    return kl if reduction == "mean" else kl * gap[0].numel()


def shared_state_margin(
    policy_mean: Tensor, ref_mean: Tensor, chosen: Tensor, rejected: Tensor, std: Tensor
) -> Tensor:
    """mean_D[(x^w - x^l)(mu_theta - mu_ref)] / std^2, [N]: the log-ratio margin of two steps from one x_t.

    log p_theta/p_ref (x^w) - log p_theta/p_ref (x^l) with densities as means over D; the squares cancel
    exactly. [N, Z, H, W] each, std [N]; float32 (float64 stays).

    `StepLikelihood` costs the same, one forward a state, and its four terms need this form nowhere: they are
    of order 1, so in float32 their margin is off by some 1e-7 whatever its size, but the gradient is made of
    x - mu of each side and loses nothing, and `spo_step` has to see which side moved. This form is for
    margins themselves near the reference: its error is below 1e-5 of the margin.
    """
    std = std.to(full_precision(policy_mean).dtype)
    moved = (full_precision(chosen) - full_precision(rejected)) * (
        full_precision(policy_mean) - full_precision(ref_mean)
    )
    return moved.flatten(1).mean(-1) / std.square()


@dataclass(frozen=True, slots=True)
class Grid:
    """The steps of a sampler: times that the model sees and where each step ends, [T] float64 each.

    A step of DDIM may end elsewhere than the next one begins, and the last one below 0: as in diffusers.
    """

    times: Tensor
    next_times: Tensor


def ddim_grid(num_steps: int, *, num_times: int = 1000, spacing: Spacing, offset: int = 0) -> Grid:
    """diffusers' DDIM timesteps: each step ends num_times // num_steps below where it begins.

    spacing: Lin et al. 2024, table 2. offset: diffusers' steps_offset, of 'leading' alone (SD1.5, SDXL: 1).
    """
    if not 1 <= num_steps <= num_times:
        raise ValueError(f"num_steps={num_steps} must be between 1 and num_times={num_times}")
    if spacing not in get_args(Spacing):
        raise ValueError(f"spacing='{spacing}' is not one of {', '.join(get_args(Spacing))}")
    if offset and spacing != "leading":
        raise ValueError(f"offset={offset} goes with spacing='leading' only, not with '{spacing}'")
    stride = num_times // num_steps
    steps = torch.arange(num_steps, dtype=torch.float64)
    if spacing == "leading":
        times = (steps * stride).flip(0) + offset
    elif spacing == "trailing":
        times = (num_times - steps * (num_times / num_steps)).round() - 1
    else:
        times = torch.linspace(0, num_times - 1, num_steps, dtype=torch.float64).round().flip(0)
    return Grid(times, times - stride)


def flow_grid(num_steps: int, *, num_times: int = 1000, shift: float = 1.0) -> Grid:
    """diffusers' flow-matching timesteps: sigmas between the ends of the shifted schedule, shifted (again).

    shift: s -> shift s / (1 + (shift - 1) s), fixed (SD3: 3); the last step ends at 0.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps} must be at least 1")
    if not 0 < shift < math.inf:
        raise ValueError(f"shift={shift} must be above 0 and finite")

    def shifted(s: Tensor) -> Tensor:
        return shift * s / (1 + (shift - 1) * s)

    first, last = shifted(torch.tensor([1.0, 1 / num_times], dtype=torch.float64)).tolist()
    times = shifted(torch.linspace(first, last, num_steps, dtype=torch.float64)) * num_times
    return Grid(times, torch.cat([times[1:], times.new_zeros(1)]))


def full_precision(x: Tensor) -> Tensor:
    """float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _column(x: Tensor, like: Tensor) -> Tensor:
    return x.to(full_precision(like).dtype).reshape(-1, *[1] * (like.ndim - 1))
