"""Schedules: epsilon, v and flow as one family, against diffusers and by hand."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from triptych.modalities.diffusion.schedule import Schedule, schedule_of

TIMES = torch.tensor([0.0, 10.0, 499.0, 999.0])


def ddpm(prediction="epsilon", **options):
    names = {"epsilon": "epsilon", "v": "v_prediction"}
    return DDPMScheduler(beta_schedule="scaled_linear", prediction_type=names[prediction], **options)


def tensors(num=4):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num, 2, 3, 3, generator=generator), torch.randn(num, 2, 3, 3, generator=generator)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_noisy_latents_and_targets_are_those_of_diffusers(prediction):
    scheduler = ddpm(prediction)
    schedule, (latents, noise) = schedule_of(scheduler), tensors()
    torch.testing.assert_close(
        schedule.add_noise(latents, noise, TIMES), scheduler.add_noise(latents, noise, TIMES.long())
    )
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, TIMES.long())
    torch.testing.assert_close(schedule.target(latents, noise, TIMES), expected)


def test_a_flow_goes_straight_from_data_to_noise():
    schedule, (latents, noise) = schedule_of(FlowMatchEulerDiscreteScheduler(shift=3.0)), tensors(1)
    assert (schedule.prediction, schedule.shift) == ("flow", 3.0)
    quarter = torch.tensor([250.0])
    torch.testing.assert_close(schedule.add_noise(latents, noise, quarter), 0.75 * latents + 0.25 * noise)
    torch.testing.assert_close(schedule.target(latents, noise, quarter), noise - latents)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
def test_the_true_prediction_gives_back_image_and_noise(prediction):
    scheduler = FlowMatchEulerDiscreteScheduler() if prediction == "flow" else ddpm(prediction)
    schedule, (latents, noise) = schedule_of(scheduler), (t.double() for t in tensors())
    latents, noise = tensors()
    times = torch.tensor([1.0, 10.0, 499.0, 900.0])
    noisy = schedule.add_noise(latents.double(), noise.double(), times)
    target = schedule.target(latents.double(), noise.double(), times)
    clean, found = schedule.clean_and_noise(target, noisy, times)
    torch.testing.assert_close(clean, latents.double())
    torch.testing.assert_close(found, noise.double())


@pytest.mark.parametrize("prediction", ["epsilon", "v", "flow"])
@pytest.mark.parametrize("space", ["epsilon", "x0"])
def test_a_space_weighs_the_native_error_as_the_error_there(prediction, space):
    """The error of the implied eps or x_0 is the native error times the weight, whatever is predicted."""
    scheduler = FlowMatchEulerDiscreteScheduler() if prediction == "flow" else ddpm(prediction)
    schedule = schedule_of(scheduler)
    (latents, noise), times = tensors(3), torch.tensor([50.0, 400.0, 800.0])
    latents, noise = latents.double(), noise.double()
    noisy, target = schedule.add_noise(latents, noise, times), schedule.target(latents, noise, times)
    wrong = target + 0.1 * torch.randn(target.shape, generator=torch.Generator().manual_seed(1)).double()
    clean, eps = schedule.clean_and_noise(wrong, noisy, times)
    there = (eps - noise) if space == "epsilon" else (clean - latents)
    native = (wrong - target).square().mean((1, 2, 3))
    torch.testing.assert_close(
        schedule.weights(times, space=space).double() * native,
        there.square().mean((1, 2, 3)),
        rtol=1e-5,
        atol=0,
    )


def test_v_space_of_an_epsilon_model_is_the_error_over_alpha():
    schedule = schedule_of(ddpm())
    times = torch.tensor([500.0])
    expected = 1 / schedule.alpha(times) ** 2
    torch.testing.assert_close(schedule.weights(times, space="v").double(), expected, rtol=1e-6, atol=0)


def test_min_snr_is_the_published_weight_for_epsilon_and_v():
    """min(SNR, 5)/SNR for epsilon, min(SNR, 5)/(SNR + 1) for v (Hang et al. 2023, eq. 8 and appendix)."""
    for prediction in ("epsilon", "v"):
        schedule = schedule_of(ddpm(prediction))
        snr = (schedule.alpha(TIMES) / schedule.sigma(TIMES)) ** 2
        low = snr.clamp(max=5.0)
        expected = low / snr if prediction == "epsilon" else low / (snr + 1)
        torch.testing.assert_close(schedule.weights(TIMES, min_snr=5.0).double(), expected, rtol=1e-5, atol=0)


def test_min_snr_is_finite_where_the_schedule_ends_in_pure_noise():
    schedule = schedule_of(ddpm("v", rescale_betas_zero_snr=True))
    assert schedule.alpha(torch.tensor([999.0])).item() == pytest.approx(0, abs=1e-6)
    assert bool(schedule.weights(TIMES, min_snr=5.0).isfinite().all())


def test_weights_that_would_be_infinite_or_ambiguous_are_refused():
    zero = Schedule("epsilon", 2, torch.tensor([0.5, 0.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="space=x0 is infinite"):
        zero.check_space("x0", None)
    with pytest.raises(ValueError, match="space=v cannot be combined"):
        schedule_of(ddpm()).check_space("v", 5.0)
    with pytest.raises(ValueError, match="not one of native, epsilon, v, x0"):
        schedule_of(ddpm()).check_space("noise", None)


def test_a_prediction_type_that_is_not_offered_is_named():
    with pytest.raises(ValueError, match="prediction_type='sample'; valid: epsilon, v_prediction"):
        schedule_of(DDPMScheduler(prediction_type="sample"))
    with pytest.raises(ValueError, match=r"prediction=flow, but the model's scheduler is a DDPMScheduler"):
        schedule_of(ddpm(), prediction="flow")
    assert schedule_of(ddpm(), prediction="v").prediction == "v"
