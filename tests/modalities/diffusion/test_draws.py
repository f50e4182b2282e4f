"""Times and noise of a context: from its seed alone, stratified and antithetic where asked for."""

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler

from triptych.modalities.diffusion.draws import NoiseConfig, check_times, draw
from triptych.modalities.diffusion.schedule import schedule_of
from triptych.training.order import window

EPSILON = schedule_of(DDPMScheduler())
FLOW = schedule_of(FlowMatchEulerDiscreteScheduler(shift=3.0))
SHAPE = (4, 2, 2)


def stream(num, *, num_samples=64):
    return window(seed=0, step=0, num_samples=num_samples, batch_size=num)


def times_of(config, schedule, num):
    return torch.cat([draw(config, schedule, at, SHAPE, 2).times for at in stream(num)])


def test_the_same_seed_gives_the_same_times_and_noise_and_another_does_not():
    first, second = stream(2)
    one, again, other = (draw(NoiseConfig(), EPSILON, at, SHAPE, 2) for at in (first, first, second))
    assert torch.equal(one.noise, again.noise)
    assert (one.key, one.times.item()) == (again.key, again.times.item())
    assert one.key != other.key
    assert not torch.equal(one.noise, other.noise)


def test_candidates_share_their_noise_unless_asked_otherwise():
    at = stream(1)[0]
    assert draw(NoiseConfig(), EPSILON, at, SHAPE, 3).noise.shape == (1, 1, *SHAPE)
    assert draw(NoiseConfig(shared=False), EPSILON, at, SHAPE, 3).noise.shape == (1, 3, *SHAPE)


def test_uniform_times_are_whole_steps_over_the_whole_range():
    times = times_of(NoiseConfig(), EPSILON, 2000)
    assert torch.equal(times, times.floor())
    assert times.min() >= 0
    assert times.max() <= 999
    assert times.mean().item() == pytest.approx(499.5, abs=20)


def test_the_range_keeps_to_its_quantiles():
    times = times_of(NoiseConfig(low=0.25, high=0.5), EPSILON, 500)
    assert times.min() >= 250
    assert times.max() < 500


def test_listed_times_are_the_only_ones_and_come_equally_often():
    """SDXL-Turbo's four steps."""
    values = [249, 499, 749, 999]
    times = times_of(NoiseConfig(values=values), EPSILON, 2000)
    counts = [(times == v).sum().item() for v in values]
    assert sum(counts) == 2000
    assert max(counts) - min(counts) < 150


def test_flow_times_are_logit_normal_under_the_models_shift():
    """The median of sigmoid(N(0, 1)) is 1/2; a shift of 3 takes it to 3/2 / 2 = 3/4."""
    times = times_of(NoiseConfig(), FLOW, 4000) / 1000
    assert times.median().item() == pytest.approx(0.75, abs=0.02)
    below = 3 * 0.25 / (1 + 2 * 0.25)
    share = (times < below).double().mean().item()
    assert share == pytest.approx(0.5 * (1 + math.erf(math.log(0.25 / 0.75) / math.sqrt(2))), abs=0.02)


def test_stratified_times_of_a_batch_are_spread_evenly():
    """Every stretch of 16 neighbours has at most 3 of its times in any eighth of the range, at least 1."""
    config = NoiseConfig(stratified=True)
    for step in range(5):
        draws = window(seed=0, step=step, num_samples=1000, batch_size=16)
        times = torch.cat([draw(config, EPSILON, at, SHAPE, 2).times for at in draws])
        counts = torch.histc(times, bins=8, min=0, max=1000)
        assert counts.min() >= 1
        assert counts.max() <= 3


def test_stratified_times_are_uniform_over_epochs_for_one_sample():
    """At a fixed place in the stream the shift of the epoch decides: its times are uniform."""
    config, at = NoiseConfig(stratified=True), stream(1)[0]
    times = torch.cat(
        [draw(config, EPSILON, replace(at, epoch=e, seed=e), SHAPE, 2).times for e in range(2000)]
    )
    counts = torch.histc(times, bins=4, min=0, max=1000)
    assert counts.min() > 430


def test_several_stratified_draws_of_one_context_divide_the_range():
    at = stream(1)[0]
    times = draw(NoiseConfig(stratified=True, num_draws=4), EPSILON, at, SHAPE, 2).times
    gaps = times.sort().values.diff()
    assert bool((gaps - 250).abs().max() <= 1)


def test_antithetic_draws_mirror_the_noise_each_at_its_own_time():
    drawn = draw(NoiseConfig(antithetic=True, num_draws=4), EPSILON, stream(1)[0], SHAPE, 2)
    assert torch.equal(drawn.noise[0::2], -drawn.noise[1::2])
    assert len(set(drawn.times.tolist())) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.5, "high": 0.5}, "0 <= low < high <= 1"),
        ({"num_draws": 0}, "noise.num_draws=0"),
        ({"num_draws": 3, "antithetic": True}, "needs an even noise.num_draws, not 3"),
        ({"std": 0.0}, "noise.std=0.0"),
    ],
)
def test_settings_that_cannot_mean_anything_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        NoiseConfig(**options)


def test_times_that_the_model_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"noise\.values has 1000; the model's times are 0 to 999"):
        check_times(NoiseConfig(values=[1000]), EPSILON)
