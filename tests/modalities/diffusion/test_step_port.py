"""Denoising paths in the rounds: what is shared, what a step is worth, and what a checkpoint keeps."""

import pytest
import torch
from torch import nn

from triptych.modalities.diffusion.latents import ImagePrompt, Latents
from triptych.modalities.diffusion.policy import Conditions
from triptych.modalities.diffusion.schedule import Schedule
from triptych.modalities.diffusion.step_port import StepPort
from triptych.modalities.diffusion.steps import StepLikelihood
from triptych.modalities.diffusion.transitions import Ddim, ddim_grid
from triptych.training.group_state import pack_groups, unpack_groups
from triptych.training.groups import Group
from triptych.training.references import FrozenCopy

ALPHAS = torch.linspace(0.9999, 0.02, 100, dtype=torch.float64)


class Toy(nn.Module):
    """Predicts gain x; counts its rows."""

    def __init__(self):
        super().__init__()
        self.gain, self.rows = nn.Parameter(torch.tensor(0.3)), 0

    def forward(self, noisy, times, conditions):
        self.rows += sum(map(len, noisy))
        return [self.gain * x for x in noisy]


def port(**changes) -> StepPort:
    schedule = Schedule(prediction="epsilon", num_times=100, alphas_cumprod=ALPHAS)
    likelihood = StepLikelihood(schedule=schedule, rule=Ddim(eta=1.0))
    prompts = {key: Conditions(torch.full((1, 3, 4), float(i))) for i, key in enumerate("ab")}
    options = {
        "likelihood": likelihood,
        "grid": ddim_grid(5, num_times=100, spacing="leading", offset=1),
    } | changes
    return StepPort(prompts=prompts, shape=(2, 3, 3), **options)


def states(num: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(num, 2, 3, 3, generator=torch.Generator().manual_seed(seed))


def latents(num: int, *, step: int = 0, seed: int = 0, key: str = "a") -> Latents:
    return Latents(key=key, text="a cat", step=step, states=states(num, seed))


def test_siblings_of_one_state_cost_one_row():
    made, policy = port(), Toy()
    context = latents(1, step=2)
    siblings = [latents(1, step=3, seed=s) for s in (1, 2, 3)]
    batch = made.collate([(context, siblings)], [0])
    assert made.terms(policy, batch).shape == (3, 1)
    assert policy.rows == 1
    assert made.length(context, siblings) == 1


def test_a_path_of_its_own_start_is_worth_what_its_steps_are_worth_one_by_one():
    made, policy = port(), Toy()
    path = latents(4, step=1)
    whole = made.terms(policy, made.collate([(ImagePrompt(key="a", text="a cat"), [path])], [0]))
    assert made.length(ImagePrompt(key="a", text="a cat"), [path]) == 3
    steps = []
    for i in range(3):
        before = Latents(key="a", text="a cat", step=1 + i, states=path.states[i : i + 1])
        after = Latents(key="a", text="a cat", step=2 + i, states=path.states[i + 1 : i + 2])
        steps.append(made.terms(policy, made.collate([(before, [after])], [0])))
    torch.testing.assert_close(whole, torch.cat(steps, 1))
    assert whole.abs().min() > 1e-3


def test_the_key_is_the_batch_s_and_names_prompt_state_and_step():
    made = port()
    context, after = latents(1), latents(1, step=1, seed=1)
    key = made.key(context, after)
    assert (
        made.collate([(latents(1, seed=5), [latents(1, step=1)]), (context, [after])], [0, 0]).keys[1] == key
    )
    others = [
        made.key(latents(1, seed=5), after),
        made.key(latents(1, key="b"), after),
        made.key(context, latents(1, step=1, seed=2)),
        made.key(latents(1, step=1), latents(1, step=2, seed=1)),
    ]
    assert len({key, *others}) == 5


def test_groups_come_back_from_a_checkpoint_bit_for_bit():
    made = port()
    clean = states(1, 7)[0]
    candidates = tuple(
        Latents(key="a", text="a cat", step=3, states=states(1, s), clean=clean, clean_step=3) for s in (1, 2)
    )
    mask = torch.ones(2, 1, dtype=torch.bool)
    groups = [
        Group(key="a", context=latents(1, step=2), candidates=candidates, mask=mask, unit="denoise"),
        Group(key="b", context=ImagePrompt(key="b", text="dog"), candidates=candidates, mask=mask),
    ]
    found = unpack_groups(*pack_groups(groups, made, "g"), made)
    assert found[1].context == groups[1].context
    for old, new in zip(groups[0].candidates, found[0].candidates, strict=True):
        assert torch.equal(old.states, new.states)
        assert torch.equal(old.clean, new.clean)
        assert (old.step, old.clean_step, old.text) == (new.step, new.clean_step, new.text)
    assert made.key(groups[0].context, candidates[0]) == made.key(found[0].context, found[0].candidates[0])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: port().collate([(latents(1, key="c"), [latents(1, step=1)])], [0]), "c: no conditions"),
        (lambda: port().collate([(latents(1), [latents(7)])], [0]), "to step 6 of 5"),
        (
            lambda: port().readouts(
                None, port().collate([(latents(1), [latents(1, step=1)])], [0]), frozenset({"value"})
            ),
            "no value",
        ),
        (lambda: Latents(key="a", text="", step=0, states=torch.zeros(2, 3, 3)), "expected"),
        (
            lambda: Latents(key="a", text="", step=0, states=states(1), clean=torch.zeros(1)),
            "clean has shape",
        ),
    ],
)
def test_what_does_not_fit_is_named(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_the_exact_kl_is_that_of_the_steps_gaussians_and_has_their_gradient():
    policy, base = Toy(), Toy()
    with torch.no_grad():
        policy.gain.add_(0.2)
    made = port(base=FrozenCopy(base))
    path = latents(3, step=1)
    batch = made.collate([(ImagePrompt(key="a", text="a cat"), [path])], [0])
    found = made.readouts(policy, batch, frozenset({"kl"}))
    torch.testing.assert_close(found["logp"], made.terms(policy, batch), rtol=0, atol=0)
    (stack,) = batch.stacks
    expected = [
        torch.distributions.kl_divergence(
            torch.distributions.Normal((keep + push * 0.5) * x, std),
            torch.distributions.Normal((keep + push * 0.3) * x, std),
        ).mean()
        for x, keep, push, std in zip(stack.states, stack.keep, stack.push, stack.std, strict=True)
    ]
    torch.testing.assert_close(found["kl"][0].detach(), torch.stack(expected), rtol=1e-4, atol=1e-9)
    (gradient,) = torch.autograd.grad(found["kl"].sum(), policy.gain)
    # KL = (0.2 push)^2 x^2 / (2 std^2), so its derivative is 2 / 0.2 times it.
    assert float(gradient) == pytest.approx(10 * float(found["kl"].sum().detach()), rel=1e-4)
    with pytest.raises(ValueError, match="no base model"):
        port().readouts(policy, batch, frozenset({"kl"}))
    with pytest.raises(ValueError, match="no entropy"):
        made.readouts(policy, batch, frozenset({"entropy", "kl"}))
