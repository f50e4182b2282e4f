"""Noise schedules: epsilon-, v- and flow-matching models as one family x_t = alpha_t x_0 + sigma_t eps.

Shapes: N rows, Z latent channels, H x W. A time is what the model is told: the step 0 .. T - 1 of a diffusion
model, sigma * T of a flow model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v", "flow"]
Space = Literal["native", "epsilon", "v", "x0"]
_NAMES = {"epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True, slots=True)
class Schedule:
    """What a model predicts and how its noisy latents are made.

    alphas_cumprod: alpha_t^2 of every step, [T] float64, of a diffusion model; None for flow matching, where
    alpha = 1 - sigma and sigma = time / T. shift: the flow's own timestep shift (SD3: 3), which the law of
    times applies.
    """

    prediction: Prediction
    num_times: int = 1000
    alphas_cumprod: Tensor | None = None
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction not in get_args(Prediction):
            valid = ", ".join(get_args(Prediction))
            raise ValueError(f"prediction '{self.prediction}' is not one of {valid}")
        if (self.alphas_cumprod is None) != (self.prediction == "flow"):
            raise ValueError(f"a model that predicts {self.prediction} does not go with this noise schedule")

    @property
    def is_flow(self) -> bool:
        """Whether times are continuous and alpha = 1 - sigma."""
        return self.prediction == "flow"

    def alpha(self, time: Tensor) -> Tensor:
        """alpha_t, [N] float64 on the CPU for times there, otherwise float32."""
        return self._of(time)[0]

    def sigma(self, time: Tensor) -> Tensor:
        """sigma_t, as `alpha`."""
        return self._of(time)[1]

    def add_noise(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps, [N, Z, H, W] in the dtype of the latents."""
        alpha, sigma = (_broadcast(x, latents) for x in self._of(time))
        return alpha * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """What the model should predict: eps, alpha eps - sigma x_0 (Salimans & Ho 2022), or eps - x_0."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - latents
        alpha, sigma = (_broadcast(x, latents) for x in self._of(time))
        return alpha * noise - sigma * latents

    def clean_and_noise(self, prediction: Tensor, noisy: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """(x_0, eps) that a prediction at x_t stands for, [N, Z, H, W] each.

        An epsilon model says nothing of x_0 where alpha is 0.
        """
        alpha, sigma = (_broadcast(x, noisy) for x in self._of(time))
        if self.prediction == "epsilon":
            return (noisy - sigma * prediction) / alpha, prediction
        if self.prediction == "flow":
            return noisy - sigma * prediction, noisy + alpha * prediction
        return alpha * noisy - sigma * prediction, sigma * noisy + alpha * prediction

    def weights(self, time: Tensor, *, space: Space = "native", min_snr: float | None = None) -> Tensor:
        """Factor of the model's squared error at each time, [N] float32.

        space: where the error is measured with constant weight. With e the model's error, the error of eps is
        e, alpha e, alpha e for epsilon, v and flow; that of x_0 is sigma/alpha times it, that of v 1/alpha.
        min_snr: gamma of min(SNR, gamma) / SNR on the error of eps (Hang et al. 2023, eq. 8), which for a v
        model is min(SNR, gamma) / (SNR + 1) on its own.
        """
        alpha, sigma = (x.double() if x.device.type == "cpu" else x for x in self._of(time))
        to_epsilon = torch.ones_like(alpha) if self.prediction == "epsilon" else alpha**2
        if min_snr is not None:
            # min(SNR, gamma) / SNR = min(1, gamma / SNR), which is 1 where alpha is 0.
            return (to_epsilon * (min_snr * sigma**2 / alpha**2).clamp(max=1)).float()
        if space == "native":
            return torch.ones_like(alpha).float()
        if space == "epsilon":
            return to_epsilon.float()
        if space == "x0":
            ratio = (sigma / alpha) if self.prediction == "epsilon" else sigma
            return (ratio**2).float()
        return (
            (to_epsilon / alpha**2).float()
            if self.prediction == "epsilon"
            else torch.ones_like(alpha).float()
        )

    def check_space(self, space: Space, min_snr: float | None) -> None:
        """ValueError for a weight that does not exist or that is not finite at every time of the schedule."""
        if space not in get_args(Space):
            raise ValueError(f"space '{space}' is not one of {', '.join(get_args(Space))}")
        if min_snr is not None and space not in ("native", "epsilon"):
            raise ValueError(f"min_snr weighs the error of eps; space={space} cannot be combined with it")
        ends = self.alphas_cumprod
        zero = ends is not None and bool(ends.min() <= 0)
        if zero and self.prediction == "epsilon" and space in ("x0", "v"):
            raise ValueError(f"space={space} is infinite where the schedule has no signal left (alpha = 0)")

    def _of(self, time: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_flow:
            sigma = time.to(torch.float64 if time.device.type == "cpu" else torch.float32) / self.num_times
            return 1 - sigma, sigma
        assert self.alphas_cumprod is not None
        table = self.alphas_cumprod
        if time.device.type != "cpu":
            table = table.to(device=time.device, dtype=torch.float32)
        squared = table[time.long()]
        return squared.sqrt(), (1 - squared).sqrt()


def schedule_of(scheduler: Any, *, prediction: str = "auto", zero_terminal_snr: bool = False) -> Schedule:
    """The schedule of a diffusers scheduler.

    prediction: 'auto' takes what the scheduler says. zero_terminal_snr: rescaled so that the last time is
    pure noise (Lin et al. 2024, algorithm 1), as Diffusion-DPO does for SDXL-Turbo. ValueError for what is
    not offered.
    """
    from diffusers import DDPMScheduler

    kind, config = type(scheduler).__name__, scheduler.config
    found = "flow" if kind.startswith("FlowMatch") else _NAMES.get(config.get("prediction_type", "epsilon"))
    if prediction != "auto":
        if (found == "flow") != (prediction == "flow"):
            raise ValueError(f"model.prediction={prediction}, but the model's scheduler is a {kind}")
        found = prediction
    if found is None:
        raise ValueError(
            f"the model's {kind} says prediction_type={config['prediction_type']!r}; "
            f"valid: {', '.join(_NAMES)}"
        )
    num_times = int(config.get("num_train_timesteps", 1000))
    if found == "flow":
        if zero_terminal_snr:
            raise ValueError("likelihood.zero_terminal_snr: a flow model ends in pure noise as it is")
        return Schedule("flow", num_times, None, float(config.get("shift", 1.0)))
    names = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    betas = {name: config[name] for name in names if config.get(name) is not None}
    if zero_terminal_snr:
        betas["rescale_betas_zero_snr"] = True
    table = DDPMScheduler(num_train_timesteps=num_times, **betas).alphas_cumprod
    return Schedule(found, num_times, table.double())  # type: ignore[arg-type]


def _broadcast(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
