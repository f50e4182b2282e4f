"""One denoising step as a Gaussian: against diffusers, the papers' formulas, and numbers by hand."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from triptych.modalities.diffusion.schedule import Schedule, schedule_of
from triptych.modalities.diffusion.transitions import (
    Ddim,
    FlowSde,
    ddim_grid,
    flow_grid,
    log_density,
    shared_state_margin,
    step_mean,
)

D = torch.float64
FLOW = Schedule("flow")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def ddim_scheduler(prediction: str = "epsilon", **options) -> DDIMScheduler:
    return DDIMScheduler(**BETAS, prediction_type=prediction, clip_sample=False, **options)


def literal_flow_step(x: Tensor, v: Tensor, s: float, s_next: float, first: float, level: float):
    """Mean and deviation as Flow-GRPO's released code writes them; first: sigmas[1]."""
    dt = s_next - s
    g = level * math.sqrt(s / (1 - (first if s == 1 else s)))
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    return mean, g * math.sqrt(-dt)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("final", ["first", "clean"])
def test_every_ddim_step_is_that_of_diffusers(prediction, eta, final):
    scheduler = ddim_scheduler(prediction, set_alpha_to_one=final == "clean", steps_offset=1)
    scheduler.set_timesteps(20)
    schedule = schedule_of(scheduler)
    grid = ddim_grid(20, spacing="leading", offset=1)
    steps = Ddim(eta=eta, final=final)(schedule, grid.times, grid.next_times)
    for i, t in enumerate(scheduler.timesteps):
        x, prediction_t, noise = (normal(1, 4, 6, 6, seed=3 * i + k).float() for k in range(3))
        expected = scheduler.step(prediction_t, int(t), x, eta=eta, variance_noise=noise).prev_sample
        mean = step_mean(x, prediction_t, steps.keep[i : i + 1], steps.push[i : i + 1])
        assert torch.allclose(mean + steps.std[i].float() * noise, expected, rtol=1e-5, atol=2e-5)


def test_a_ddim_step_by_hand():
    """alpha, sigma from (.6, .8) to (.8, .6): std^2 = .5625 * .4375, x_0 = 1, mean = .8 + .3375 * .5."""
    schedule = Schedule("epsilon", 2, torch.tensor([0.64, 0.36], dtype=D))
    step = Ddim(eta=1.0)(schedule, torch.tensor([1.0]), torch.tensor([0.0]))
    assert step.std.item() == pytest.approx(math.sqrt(0.24609375), abs=1e-12)
    one = torch.ones(1, 1, 1, 1, dtype=D)
    assert step_mean(one, 0.5 * one, step.keep, step.push).item() == pytest.approx(0.96875, abs=1e-12)


def test_the_step_to_clean_data_has_no_noise_and_gives_the_predicted_image():
    schedule = Schedule("epsilon", 2, torch.tensor([0.64, 0.36], dtype=D))
    step = Ddim(eta=1.0, final="clean")(schedule, torch.tensor([1.0]), torch.tensor([-1.0]))
    one = torch.ones(1, 1, 1, 1, dtype=D)
    assert step.std.item() == 0
    assert step_mean(one, 0.5 * one, step.keep, step.push).item() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("level", [0.0, 0.7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_every_flow_step_is_the_released_formula(level, shift):
    grid = flow_grid(10, shift=shift)
    steps = FlowSde(noise_level=level)(FLOW, grid.times, grid.next_times)
    sigmas = [*(grid.times / 1000).tolist(), 0.0]
    assert sigmas[0] == 1
    for i in range(10):
        x, v = normal(1, 4, 6, 6, seed=i), normal(1, 4, 6, 6, seed=99 + i)
        mean, std = literal_flow_step(x, v, sigmas[i], sigmas[i + 1], sigmas[1], level)
        assert torch.allclose(step_mean(x, v, steps.keep[i : i + 1], steps.push[i : i + 1]), mean, atol=1e-12)
        assert steps.std[i].item() == pytest.approx(std, abs=1e-12)


def test_without_noise_a_flow_step_is_the_euler_step_of_diffusers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    grid = flow_grid(7, shift=3.0)
    steps = FlowSde(noise_level=0.0)(FLOW, grid.times, grid.next_times)
    x = normal(1, 4, 6, 6, seed=0).float()
    for i, t in enumerate(scheduler.timesteps):
        v = normal(1, 4, 6, 6, seed=1 + i).float()
        mine = step_mean(x, v, steps.keep[i : i + 1], steps.push[i : i + 1])
        x = scheduler.step(v, t, x).prev_sample
        assert torch.allclose(mine, x, atol=1e-5)


@pytest.mark.parametrize("schedule", [FLOW, schedule_of(ddim_scheduler())], ids=["flow", "epsilon"])
@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_of_a_known_image_keeps_the_marginal_exactly(schedule, eta):
    """With x_0 known, x_s = alpha_s x_0 + c eps + std z must have variance sigma_s^2 at every step."""
    grid = flow_grid(9) if schedule.is_flow else ddim_grid(9, spacing="trailing")
    steps = Ddim(eta=eta)(schedule, grid.times, grid.next_times)
    alpha, sigma = schedule.alpha(grid.times), schedule.sigma(grid.times)
    inside = grid.next_times.clamp(min=0)
    # Predictions of a known image: eps, and eps - x_0 of the flow.
    kept_noise = steps.keep * sigma + steps.push
    kept_image = steps.keep * alpha - (steps.push if schedule.is_flow else 0)
    assert torch.allclose(kept_image, schedule.alpha(inside), atol=1e-12)
    assert torch.allclose(kept_noise**2 + steps.std**2, schedule.sigma(inside) ** 2, atol=1e-12)


def gaussian_marginal_error(num_steps: int, level: float, drift: float | None = None) -> tuple[float, float]:
    """Error of mean and variance at s = .1 after steps from the true marginal at s = .9, data N(2, .25).

    drift: noise level that the means are made for, where it is another than that of the noise.
    """
    center, spread = 2.0, 0.25
    sigmas = torch.linspace(0.9, 0.1, num_steps + 1, dtype=D)
    times = sigmas[:-1] * 1000, sigmas[1:] * 1000
    noise = FlowSde(noise_level=level)(FLOW, *times).std
    steps = FlowSde(noise_level=level if drift is None else drift)(FLOW, *times)
    mean, variance = 0.1 * center, 0.1**2 * spread + 0.9**2
    for i, s in enumerate(sigmas[:-1].tolist()):
        # v = E[eps - x_0 | x_s] = slope (x - E x_s) - center: the covariance over the variance of x_s.
        slope = (s - (1 - s) * spread) / ((1 - s) ** 2 * spread + s**2)
        keep, push, std = (float(t[i]) for t in (steps.keep, steps.push, noise))
        mean = keep * mean + push * (slope * (mean - (1 - s) * center) - center)
        variance = (keep + push * slope) ** 2 * variance + std**2
    return abs(mean - 0.9 * center), abs(variance - (0.9**2 * spread + 0.1**2))


@pytest.mark.parametrize("level", [0.0, 0.7, 1.0])
def test_the_flow_sde_has_the_marginals_of_the_ode_to_first_order(level):
    """Both arrive at the true Gaussian, with an error that halves when steps double."""
    coarse, fine = gaussian_marginal_error(200, level), gaussian_marginal_error(400, level)
    assert max(fine) < 2e-3
    assert fine[0] < 1e-12 or coarse[0] / fine[0] == pytest.approx(2, rel=0.1)
    assert coarse[1] / fine[1] == pytest.approx(2, rel=0.1)


def test_noise_without_its_own_drift_does_not_keep_the_marginals():
    assert gaussian_marginal_error(400, 0.7)[1] < 2e-3
    assert gaussian_marginal_error(400, 0.7, drift=0.0)[1] > 0.05
    assert gaussian_marginal_error(400, 0.0, drift=0.7)[1] > 0.05


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("num_steps", [1, 4, 20, 30, 50, 333, 1000])
def test_ddim_times_are_those_of_diffusers(spacing, num_steps):
    offset = int(spacing == "leading" and num_steps < 1000)
    scheduler = ddim_scheduler(timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(num_steps)
    grid = ddim_grid(num_steps, spacing=spacing, offset=offset)
    assert grid.times.tolist() == scheduler.timesteps.tolist()
    assert grid.next_times.tolist() == [t - 1000 // num_steps for t in scheduler.timesteps.tolist()]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4, 28])
def test_flow_times_are_those_of_diffusers(shift, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    grid = flow_grid(num_steps, shift=shift)
    assert torch.allclose(grid.times.float(), scheduler.timesteps, rtol=1e-6)
    assert torch.allclose(grid.next_times.float(), scheduler.sigmas[1:] * 1000, rtol=1e-6)


def test_log_density_by_hand_and_against_torch():
    """z = (1, 2), std e: -(5/2)/2 - 1 - log(2 pi)/2 as a mean, twice that as a sum."""
    mean, std = torch.zeros(1, 1, 1, 2, dtype=D), torch.tensor([math.e], dtype=D)
    following = torch.tensor([[[[math.e, 2 * math.e]]]], dtype=D)
    expected = -1.25 - 1 - 0.5 * math.log(2 * math.pi)
    assert log_density(following, mean, std, reduction="mean").item() == pytest.approx(expected, abs=1e-12)
    assert log_density(following, mean, std, reduction="sum").item() == pytest.approx(2 * expected, abs=1e-12)
    x, mu, std = normal(3, 4, 5, 6, seed=0), normal(3, 4, 5, 6, seed=1), torch.tensor([0.1, 1, 2], dtype=D)
    torchs = torch.distributions.Normal(mu, std.reshape(3, 1, 1, 1)).log_prob(x)
    assert torch.allclose(log_density(x, mu, std, reduction="sum"), torchs.sum((1, 2, 3)), rtol=1e-12)
    assert torch.allclose(log_density(x, mu, std, reduction="mean"), torchs.mean((1, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(half):
    x, prediction, following = (normal(2, 4, 8, 8, seed=i).to(half) for i in range(3))
    keep, push, std = (torch.tensor(v, dtype=D) for v in ([1.01, 0.99], [-0.1, -0.2], [0.05, 0.1]))
    mean = step_mean(x, prediction, keep, push)
    density = log_density(following, mean, std, reduction="mean")
    assert mean.dtype == density.dtype == torch.float32
    exact = step_mean(x.double(), prediction.double(), keep, push)
    assert torch.allclose(mean.double(), exact, atol=1e-6)
    assert torch.allclose(
        density.double(), log_density(following.double(), exact, std, reduction="mean"), rtol=1e-5
    )


def four_terms(policy: Tensor, ref: Tensor, chosen: Tensor, rejected: Tensor, std: Tensor) -> Tensor:
    def density(x: Tensor, mean: Tensor) -> Tensor:
        return log_density(x, mean, std, reduction="mean")

    return density(chosen, policy) - density(chosen, ref) - density(rejected, policy) + density(rejected, ref)


def drawn_pair(size: float) -> tuple[Tensor, ...]:
    """Means that differ by `size`, two draws from the policy's, and their deviation."""
    std = torch.tensor([0.05, 0.1, 0.2, 0.4], dtype=D)
    ref = normal(4, 4, 32, 32, seed=0)
    policy = ref + size * normal(4, 4, 32, 32, seed=1)
    chosen, rejected = (policy + std.reshape(4, 1, 1, 1) * normal(4, 4, 32, 32, seed=s) for s in (2, 3))
    return policy, ref, chosen, rejected, std


def test_the_closed_form_is_the_four_term_margin():
    parts = drawn_pair(0.01)
    assert torch.allclose(shared_state_margin(*parts), four_terms(*parts), rtol=0, atol=1e-12)
    small = [part.float() for part in parts]
    assert torch.allclose(shared_state_margin(*small), four_terms(*small), rtol=0, atol=1e-6)


def test_the_closed_form_does_not_cancel_where_four_terms_do():
    """Near the reference, float32 terms are off by some 1e-7, the closed form by 1e-5 of the margin."""
    parts = drawn_pair(1e-5)
    exact = shared_state_margin(*parts)
    # Means are rounded before either form sees them, so both start from the float32 values.
    small = [part.float() for part in parts]
    of_small = shared_state_margin(*(part.double() for part in small))
    closed = (shared_state_margin(*small).double() - of_small).abs()
    terms = (four_terms(*small).double() - of_small).abs()
    assert exact.abs().max() < 1e-5
    assert bool((closed <= 1e-5 * of_small.abs() + 1e-12).all())
    assert 1e-9 < terms.max() < 1e-6


def test_a_step_that_a_schedule_does_not_have_is_refused():
    diffusion = schedule_of(ddim_scheduler())

    def at(time: float, next_time: float):
        return torch.tensor([time]), torch.tensor([next_time])

    with pytest.raises(ValueError, match="from time 5 to 5 is none of this schedule"):
        Ddim(eta=1.0)(diffusion, *at(5, 5))
    with pytest.raises(ValueError, match=r"from time 1000 to 900 .* at most 999"):
        Ddim(eta=1.0)(diffusion, *at(1000, 900))
    with pytest.raises(ValueError, match=r"from time 7.5 to 3 .* whole numbers"):
        Ddim(eta=1.0)(diffusion, *at(7.5, 3))
    with pytest.raises(ValueError, match=r"from time 5 to -1 .* to at least 0"):
        FlowSde(noise_level=0.7)(FLOW, *at(5, -1))
    with pytest.raises(ValueError, match="predicts epsilon: use Ddim"):
        FlowSde(noise_level=0.7)(diffusion, *at(5, 1))


def test_an_epsilon_model_cannot_step_from_pure_noise_and_a_v_model_can():
    table = torch.tensor([0.9, 0.4, 0.0], dtype=D)
    step = torch.tensor([2.0]), torch.tensor([1.0])
    with pytest.raises(ValueError, match="nothing of x_0 at time 2, where alpha is 0"):
        Ddim(eta=1.0)(Schedule("epsilon", 3, table), *step)
    made = Ddim(eta=1.0)(Schedule("v", 3, table), *step)
    # All of eps is drawn anew: mean = alpha_s x_0 = -alpha_s v.
    assert made.keep.item() == pytest.approx(0, abs=1e-12)
    assert made.push.item() == pytest.approx(-math.sqrt(0.4), abs=1e-12)
    assert made.std.item() == pytest.approx(math.sqrt(0.6), abs=1e-12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ddim(eta=1.5), r"eta=1.5 must be in \[0, 1\]"),
        (lambda: Ddim(eta=1.0, final="last"), "final='last' is not one of first, clean"),  # type: ignore[arg-type]
        (lambda: FlowSde(noise_level=-1.0), "noise_level=-1.0 must be at least 0"),
        (lambda: ddim_grid(0, spacing="leading"), "num_steps=0 must be between 1 and num_times=1000"),
        (lambda: ddim_grid(5, spacing="even"), "spacing='even' is not one of"),  # type: ignore[arg-type]
        (lambda: ddim_grid(5, spacing="trailing", offset=1), "offset=1 goes with spacing='leading' only"),
        (lambda: flow_grid(0), "num_steps=0 must be at least 1"),
        (lambda: flow_grid(5, shift=0.0), "shift=0.0 must be above 0"),
    ],
)
def test_options_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
