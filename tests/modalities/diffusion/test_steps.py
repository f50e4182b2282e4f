"""Step likelihoods: one forward a state, gradients of the naive form, and what really was drawn."""

import math
from dataclasses import fields, replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from tiny_diffusion import TINY
from torch import Tensor, nn
from toy import cpu_accelerator

from triptych.modalities.diffusion.policy import Conditions, Denoiser
from triptych.modalities.diffusion.schedule import Schedule, schedule_of
from triptych.modalities.diffusion.step_batches import (
    Trajectory,
    TrajectoryCollator,
    Transition,
    TransitionCollator,
)
from triptych.modalities.diffusion.steps import StepBatch, StepLikelihood, StepStack
from triptych.modalities.diffusion.transitions import Ddim, FlowSde, flow_grid, shared_state_margin
from triptych.objectives import ListLogLik, PairLogLik, Term, Terms, UnitLogLik, build, with_reference
from triptych.training.config import OptimConfig
from triptych.training.loop import Task, make_learner, train_step
from triptych.training.meters import Meter
from triptych.training.references import Cached, FrozenCopy
from triptych.training.values import ValueStore

D = torch.float64
EPSILON = schedule_of(DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"))
FLOW = Schedule("flow")
DDIM = StepLikelihood(schedule=EPSILON, rule=Ddim(eta=1.0))
SHAPE = (4, 8, 8)
WIDTH = {"sd15": 16, "sdxl": 40, "sd3": 48}
POOLED = {"sd15": None, "sdxl": 24, "sd3": 48}


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Toy(nn.Module):
    """prediction = gain x + tone mean(embeds) + drift t / 1000; counts calls and rows."""

    def __init__(self, gain: float = 0.3, tone: float = 0.5, dtype: torch.dtype = D):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([gain, tone, 0.2], dtype=dtype))
        self.calls: list[list[int]] = []

    def forward(self, noisy, times, conditions):
        self.calls.append([len(x) for x in noisy])
        gain, tone, drift = self.weights

        def column(value: Tensor) -> Tensor:
            return value.reshape(-1, 1, 1, 1)

        return [
            gain * x + tone * column(c.embeds.mean((1, 2))) + drift * column(t / 1000)
            for x, t, c in zip(noisy, times, conditions, strict=True)
        ]


def prompt(seed: int = 0, family: str = "sd15", dtype: torch.dtype = torch.float32) -> Conditions:
    pooled = POOLED[family]
    return Conditions(
        normal(1, 5, WIDTH[family], seed=seed, dtype=dtype),
        None if pooled is None else normal(1, pooled, seed=seed + 1, dtype=dtype),
        torch.tensor([[32.0, 32, 0, 0, 32, 32]]) if family == "sdxl" else None,
    )


def empty_prompt(family: str = "sd15", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    c = prompt(77, family, dtype)
    return c.embeds[0], None if c.pooled is None else c.pooled[0]


def transition(seed: int = 0, *, num: int = 2, shape=SHAPE, dtype=torch.float32, **changes) -> Transition:
    """A state and `num` states near the mean of the next, the last one best."""
    state = normal(*shape, seed=seed, dtype=dtype)
    nexts = torch.stack([state + 0.3 * normal(*shape, seed=100 + seed + i, dtype=dtype) for i in range(num)])
    values = {
        "id": f"s{seed}",
        "state": state,
        "time": 501,
        "next_time": 451,
        "nexts": nexts,
        "relevance": tuple(float(i) for i in range(num)),
        "prompt": prompt(seed, dtype=dtype),
    }
    return Transition(**values | changes)


def collate(*examples: Transition, kind="pair", likelihood=DDIM, **options) -> StepBatch:
    return TransitionCollator(likelihood=likelihood, kind=kind, **options)(examples)


def naive_logp(policy: nn.Module, example: Transition, following: Tensor) -> Tensor:
    """Mean log-density of one next state by diffusers' own DDIM arithmetic, with a forward of its own."""
    t, s = int(example.time), int(example.next_time)
    a_t, a_s = (float(EPSILON.alphas_cumprod[i]) for i in (t, s))  # type: ignore[index]
    state = example.state[None]
    (eps,) = policy([state], [torch.tensor([float(t)])], [example.prompt])
    x_0 = (state - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    variance = (1 - a_s) / (1 - a_t) * (1 - a_t / a_s)
    mean = a_s**0.5 * x_0 + (1 - a_s - variance) ** 0.5 * eps
    return torch.distributions.Normal(mean, variance**0.5).log_prob(following[None]).mean()


def gradient(loss: Tensor, policy: Toy) -> Tensor:
    return torch.autograd.grad(loss, policy.weights, retain_graph=True)[0]


def test_a_pair_from_one_state_costs_one_row_of_policy_and_reference():
    policy = Denoiser(TINY["sd15"]().unet)
    reference = FrozenCopy.of(policy)
    assert isinstance(reference.model, Denoiser)
    batch = collate(transition())
    own = DDIM(policy, batch)
    base = DDIM.assemble(reference(DDIM, policy, batch), batch)
    assert policy.calls == reference.model.calls == [1]
    pair = with_reference(own, base)
    assert isinstance(pair, PairLogLik)
    assert build("dpo", beta=10.0)(pair).item() == pytest.approx(math.log(2), abs=1e-6)


def test_guidance_doubles_the_row_and_a_pool_of_any_size_costs_no_more():
    policy = Denoiser(TINY["sd15"]().unet)
    guided = replace(DDIM, guidance=5.0)
    for num in (2, 4, 8):
        guided.terms(
            policy, collate(transition(num=num), kind="list", likelihood=guided, empty=empty_prompt())
        )
        DDIM.terms(policy, collate(transition(num=num), kind="list"))
    assert policy.calls == [2, 1] * 3


def test_pairs_of_one_pool_share_its_state_and_other_prompts_or_times_do_not():
    first = transition()
    again = replace(first, id="again", nexts=first.nexts + 1)
    assert collate(first, again).num_states == 1
    assert collate(first, replace(first, prompt=prompt(9))).num_states == 2
    assert collate(first, replace(first, time=601)).num_states == 2
    assert collate(first, transition(1)).num_states == 2


def test_terms_and_gradient_are_those_of_four_separate_forwards():
    policy, reference = Toy(), Toy(gain=0.1, tone=0.4)
    examples = [transition(i, dtype=D) for i in range(3)]
    batch = collate(*examples)
    pair = with_reference(DDIM(policy, batch), DDIM(reference, batch))
    loss = build("dpo", beta=10.0)(pair)
    naive = []
    for e in examples:
        rejected, chosen = e.nexts
        of = [naive_logp(p, e, x) for x in (chosen, rejected) for p in (policy, reference)]
        naive.append(-torch.nn.functional.logsigmoid(10 * (of[0] - of[1].detach() - of[2] + of[3].detach())))
    assert torch.allclose(loss, torch.stack(naive), rtol=1e-10)
    expected = gradient(torch.stack(naive).sum(), policy)
    assert torch.allclose(gradient(loss.sum(), policy), expected, rtol=1e-9)
    assert expected.abs().min() > 1e-6
    assert policy.calls[0] == reference.calls[0] == [3]


def test_the_margin_of_the_terms_is_the_closed_form_with_its_gradient():
    policy, reference = Toy(), Toy(gain=0.1)
    batch = collate(*(transition(i, dtype=D) for i in range(3)))
    pair = with_reference(DDIM(policy, batch), DDIM(reference, batch))
    assert isinstance(pair, PairLogLik)
    margin = pair.chosen.log_ratio() - pair.rejected.log_ratio()
    (stack,) = batch.stacks

    def mean(p: Toy) -> Tensor:
        (prediction,) = p([stack.states], [stack.times], [stack.conditions])
        return stack.keep.reshape(-1, 1, 1, 1) * stack.states + stack.push.reshape(-1, 1, 1, 1) * prediction

    chosen, rejected = stack.nexts[0::2], stack.nexts[1::2]
    closed = shared_state_margin(mean(policy), mean(reference).detach(), chosen, rejected, stack.std)
    assert torch.allclose(margin, closed, rtol=0, atol=1e-12)
    assert torch.allclose(gradient(margin.sum(), policy), gradient(closed.sum(), policy), rtol=1e-9)


def test_a_side_outside_its_clip_has_no_gradient():
    """The rejected side's ratio stays in the clip; the chosen one's is far above it."""
    policy, reference = Toy(), Toy(gain=0.29, tone=0.5)
    example = transition(dtype=D)
    batch = collate(example)
    (stack,) = batch.stacks
    means = []
    for p in (policy, reference):
        (eps,) = p([stack.states], [stack.times], [stack.conditions])
        means.append((stack.keep.item() * stack.states + stack.push.item() * eps).detach()[0])
    # Far out along mu - mu_ref, and on the mean itself.
    nexts = torch.stack([means[0], means[0] + 5000 * (means[0] - means[1])])
    batch = collate(replace(example, nexts=nexts))
    pair = with_reference(DDIM(policy, batch), DDIM(reference, batch))
    assert isinstance(pair, PairLogLik)
    assert pair.chosen.log_ratio().item() > math.log(1.1)
    assert abs(pair.rejected.log_ratio().item()) < 0.05
    whole = gradient(build("spo_step", beta=10.0, clip=0.1)(pair).sum(), policy)
    # With the chosen side at its bound, only the rejected side's log-ratio moves the loss.
    held = replace(pair, chosen=replace(pair.chosen, logp=pair.chosen.logp.detach()))
    rejected_alone = gradient(build("spo_step", beta=10.0, clip=0.1)(held).sum(), policy)
    assert torch.allclose(whole, rejected_alone, rtol=1e-12)
    clamped = replace(pair, rejected=pair.chosen)
    assert gradient(build("spo_step", beta=10.0, clip=0.1)(clamped).sum(), policy).abs().max() == 0
    assert gradient(build("dpo", beta=10.0)(pair).sum(), policy).abs().max() > 0


def spo_losses(micro_batch_size: int) -> list[float]:
    """40 steps of SPO on four pairs of two latent shapes whose better side has more of its state."""
    pairs = []
    for i in range(4):
        example = transition(i, shape=(4, 8, 8 if i % 2 else 16), dtype=D)
        (stack,) = collate(example).stacks
        mean = (stack.keep + 0.3 * stack.push).item()
        nexts = torch.stack([(mean - 0.4) * example.state, (mean + 0.4) * example.state])
        pairs.append(replace(example, nexts=nexts))
    policy = Toy()
    task = Task(
        likelihood=DDIM,
        terms=Terms((Term(build("spo_step", beta=10.0, clip=0.1)),)),
        references={"frozen": FrozenCopy.of(policy)},
        collate=TransitionCollator(likelihood=DDIM, kind="pair"),
        examples=pairs,
        lengths=[1] * 4,
        sources=["test"] * 4,
    )
    optim = OptimConfig(
        lr=0.01, batch_size=4, micro_batch_size=micro_batch_size, schedule="constant", warmup=0
    )
    accelerator = cpu_accelerator()
    learner = make_learner(policy, optim, accelerator)
    losses = []
    for _ in range(40):
        meter = Meter(accelerator.device)
        train_step(task, learner, optim, accelerator, seed=0, num_steps=40, meter=meter)
        losses.append(meter.read(lambda total: total)["loss"])
    return losses


def test_the_loop_trains_on_steps_down_to_the_bound_of_the_clip():
    """From ln 2 to -log sigmoid(10 (log 1.1 - log 0.9)), whatever the cut into micro-batches."""
    losses = spo_losses(4)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-12)
    assert losses[-1] == pytest.approx(math.log1p(math.exp(-10 * math.log(1.1 / 0.9))), abs=1e-9)
    assert any(0.2 < loss < 0.6 for loss in losses)
    assert spo_losses(1) == pytest.approx(losses, rel=1e-9)


def test_the_best_of_a_pool_is_chosen_and_the_worst_rejected():
    example = transition(num=4, relevance=(0.2, 0.9, -1.0, 0.5), strength=0.8, margin=1.9)
    pair = DDIM(Toy(), collate(example))
    every = DDIM(Toy(), collate(example, kind="list"))
    assert isinstance(pair, PairLogLik)
    assert isinstance(every, ListLogLik)
    assert torch.equal(pair.chosen.logp, every.loglik.logp[:, 1])
    assert torch.equal(pair.rejected.logp, every.loglik.logp[:, 2])
    assert pair.strength is not None
    assert pair.margin is not None
    assert (pair.strength.item(), pair.margin.item()) == pytest.approx((0.8, 1.9))
    assert pair.chosen.count.tolist() == [1.0]


def test_ragged_lists_are_masked_and_keep_their_grades():
    listed = DDIM(Toy(), collate(transition(num=2), transition(1, num=3), kind="list"))
    assert isinstance(listed, ListLogLik)
    assert listed.valid().tolist() == [[True, True, False], [True, True, True]]
    assert listed.relevance.tolist() == [[0, 1, 0], [0, 1, 2]]
    alone = DDIM(Toy(), collate(transition(1, num=3), kind="list"))
    assert isinstance(alone, ListLogLik)
    assert torch.allclose(listed.loglik.logp[1], alone.loglik.logp[0])


def test_other_latent_shapes_are_other_stacks_of_the_same_forward():
    examples = [
        transition(0),
        transition(1, shape=(4, 8, 16)),
        transition(2),
        transition(3, shape=(4, 8, 16)),
    ]
    policy = Toy()
    batch = collate(*examples)
    terms = DDIM.terms(policy, batch)
    assert policy.calls == [[2, 2]]
    for i, example in enumerate(examples):
        assert torch.allclose(terms[2 * i : 2 * i + 2], DDIM.terms(policy, collate(example)), rtol=1e-6)


def test_guidance_is_inside_the_density_for_policy_and_reference():
    """With the toy's prediction linear in the prompt, guidance acts as another prompt."""
    guided = replace(DDIM, guidance=5.0)
    example = transition(dtype=D)
    empty = empty_prompt(dtype=D)
    own = example.prompt.embeds
    moved = Conditions(empty[0][None] + 5.0 * (own - empty[0][None]))
    batch = collate(example, likelihood=guided, empty=empty)
    expected = DDIM.terms(Toy(), collate(replace(example, prompt=moved)))
    assert torch.allclose(guided.terms(Toy(), batch), expected, rtol=1e-10)
    reference = FrozenCopy.of(Toy())
    assert torch.allclose(reference(guided, Toy(gain=9.0), batch), expected, rtol=1e-10)


def test_the_sum_is_the_mean_times_the_size_of_the_latent():
    batch = collate(transition())
    summed = replace(DDIM, reduction="sum")
    assert torch.allclose(summed.terms(Toy(), batch), 256 * DDIM.terms(Toy(), batch), rtol=1e-6)


def test_half_precision_states_are_computed_in_float32():
    example = transition()
    half = replace(example, state=example.state.half(), nexts=example.nexts.half())
    rounded = replace(half, state=half.state.float(), nexts=half.nexts.float())
    policy = Toy(dtype=torch.float32)
    terms = DDIM.terms(policy, collate(half))
    assert terms.dtype == torch.float32
    assert torch.equal(terms, DDIM.terms(policy, collate(rounded)))


def trajectory(num_steps: int, seed: int = 0, **changes) -> Trajectory:
    """A path down from time 901 in steps of 100."""
    times = tuple(901.0 - 100 * u for u in range(num_steps))
    values = {
        "id": f"p{seed}",
        "states": normal(num_steps + 1, *SHAPE, seed=seed),
        "times": times,
        "next_times": tuple(t - 100 for t in times),
        "prompt": prompt(seed),
    }
    return Trajectory(**values | changes)


def test_trajectories_are_rows_of_units_padded_with_nothing():
    paths = [
        trajectory(3, 0, advantage=torch.tensor([1.0, 2, 3]), old=torch.tensor([-1.0, -2, -3])),
        trajectory(1, 1, advantage=torch.tensor([4.0]), old=torch.tensor([-4.0])),
    ]
    batch = TrajectoryCollator(likelihood=DDIM)(paths)
    policy = Toy()
    units = DDIM(policy, batch)
    assert isinstance(units, UnitLogLik)
    assert policy.calls == [[4]]
    assert units.mask.tolist() == [[True, True, True], [True, False, False]]
    assert units.logp[1, 1:].tolist() == [0, 0]
    assert units.advantage is not None
    assert units.old is not None
    assert units.advantage.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert units.old.tolist() == [[-1, -2, -3], [-4, 0, 0]]
    assert batch.counts.tolist() == [3, 1]
    for u in range(3):
        step = transition(
            state=paths[0].states[u],
            nexts=paths[0].states[u + 1].expand(2, *SHAPE),
            time=paths[0].times[u],
            next_time=paths[0].next_times[u],
            prompt=paths[0].prompt,
        )
        assert DDIM.terms(policy, collate(step))[0, 0].item() == pytest.approx(
            units.logp[0, u].item(), rel=1e-6
        )


def test_trajectories_from_one_noise_share_its_row():
    first, second = trajectory(3, 0), trajectory(3, 1, prompt=prompt(0))
    states = torch.cat([first.states[:1], second.states[1:]])
    batch = TrajectoryCollator(likelihood=DDIM)([first, replace(second, states=states)])
    assert batch.num_states == 5
    apart = TrajectoryCollator(likelihood=DDIM)([replace(second, states=states)])
    terms = DDIM.terms(Toy(), batch)
    assert torch.allclose(terms[1], DDIM.terms(Toy(), apart)[0], rtol=1e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_path_drawn_by_diffusers_has_the_density_of_its_noise(family, guidance):
    """x_s = mean + std z, so log p(x_s) = log N(z; 0, 1) - log std, element by element."""
    policy = Denoiser(TINY[family]().unet)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(5)
    own, (embeds, pooled) = prompt(3, family), empty_prompt(family)
    empty = Conditions(embeds[None], None if pooled is None else pooled[None], own.time_ids)
    draw, same = (torch.Generator().manual_seed(7) for _ in range(2))
    states, expected = [normal(1, *SHAPE, seed=5)], []
    stride = 1000 // 5
    for t in scheduler.timesteps.tolist():
        with torch.no_grad():
            eps, base = (policy([states[-1]], [torch.tensor([float(t)])], [c])[0] for c in (own, empty))
        guided = eps if guidance == 1 else base + guidance * (eps - base)
        states.append(scheduler.step(guided, t, states[-1], eta=1.0, generator=draw).prev_sample)
        noise = torch.randn(1, *SHAPE, generator=same)
        std = scheduler._get_variance(t, t - stride) ** 0.5
        expected.append(torch.distributions.Normal(0, 1).log_prob(noise).mean() - std.log())
    likelihood = replace(DDIM, guidance=guidance)
    path = Trajectory(
        id="drawn",
        states=torch.cat(states),
        times=tuple(float(t) for t in scheduler.timesteps.tolist()),
        next_times=tuple(float(t - stride) for t in scheduler.timesteps.tolist()),
        prompt=own,
    )
    collator = TrajectoryCollator(likelihood=likelihood, empty=None if guidance == 1 else (embeds, pooled))
    policy.calls.clear()
    terms = likelihood.terms(policy, collator([path]))
    assert policy.calls == [5 if guidance == 1 else 10]
    # The last step's std is some .03, so rounding of x_s is 30 times as large in z.
    assert torch.allclose(terms[0], torch.stack(expected), atol=2e-4)


def test_a_path_of_a_flow_transformer_has_the_density_of_its_noise():
    policy = Denoiser(TINY["sd3"]().transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    sigmas, level = scheduler.sigmas.tolist(), 0.7
    own, states, expected = prompt(3, "sd3"), [normal(1, 16, 8, 8, seed=5)], []
    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            (v,) = policy([states[-1]], [t[None]], [own])
        s, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
        g = level * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s)))
        mean = states[-1] * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
        noise = normal(1, 16, 8, 8, seed=50 + i)
        states.append(mean + g * math.sqrt(-dt) * noise)
        expected.append(
            torch.distributions.Normal(0, 1).log_prob(noise).mean() - math.log(g * math.sqrt(-dt))
        )
    likelihood = StepLikelihood(schedule=FLOW, rule=FlowSde(noise_level=level))
    grid = flow_grid(6, shift=3.0)
    path = Trajectory(
        id="drawn",
        states=torch.cat(states),
        times=tuple(grid.times.tolist()),
        next_times=tuple(grid.next_times.tolist()),
        prompt=own,
    )
    terms = likelihood.terms(policy, TrajectoryCollator(likelihood=likelihood)([path]))
    assert torch.allclose(terms[0], torch.stack(expected), atol=2e-4)


def test_the_gradient_reaches_a_real_unet_and_is_that_of_the_naive_form():
    policy = Denoiser(TINY["sdxl"]().unet.double())
    batch = collate(transition(prompt=prompt(0, "sdxl"), dtype=D))
    pair = DDIM(policy, batch)
    assert isinstance(pair, PairLogLik)
    example = transition(prompt=prompt(0, "sdxl"), dtype=D)
    rejected, chosen = (naive_logp(policy, example, x) for x in example.nexts)
    weights = [p for p in policy.parameters() if p.requires_grad]
    mine = torch.autograd.grad((pair.chosen.logp - pair.rejected.logp).sum(), weights, allow_unused=True)
    theirs = torch.autograd.grad(chosen - rejected, weights, allow_unused=True)
    found = [(a, b) for a, b in zip(mine, theirs, strict=True) if a is not None and b is not None]
    assert len(found) > 50
    assert max(b.abs().max() for _, b in found) > 1e-3
    for a, b in found:
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-10)


def test_keys_name_everything_that_the_values_depend_on():
    example = transition()
    keys = collate(example).keys
    assert collate(replace(example, id="other", relevance=(1.0, 5.0))).keys == keys
    others = [
        replace(example, state=example.state + 1),
        replace(example, time=601),
        replace(example, next_time=401),
        replace(example, nexts=example.nexts.flip(0)),
        replace(example, prompt=prompt(5)),
        replace(example, nexts=example.nexts.half()),
    ]
    settings = [
        collate(example, likelihood=replace(DDIM, rule=Ddim(eta=0.5))),
        collate(example, likelihood=replace(DDIM, reduction="sum")),
        collate(example, likelihood=replace(DDIM, guidance=5.0), empty=empty_prompt()),
        collate(example, likelihood=replace(DDIM, guidance=4.0), empty=empty_prompt()),
    ]
    found = [*keys, *(k for e in others for k in collate(e).keys), *(k for b in settings for k in b.keys)]
    flipped = collate(others[3]).keys
    assert flipped == keys[::-1]
    assert len(set(found)) == len(found) - 2


def test_cached_reference_values_are_the_live_ones(tmp_path):
    policy, reference = Toy(dtype=torch.float32), FrozenCopy.of(Toy(gain=0.1, dtype=torch.float32))
    batch = TrajectoryCollator(likelihood=DDIM)([trajectory(3, 0), trajectory(1, 1)])
    live = reference(DDIM, policy, batch)
    Cached(ValueStore(tmp_path / "store"), "toy", reference)(DDIM, policy, batch)
    cached = Cached(ValueStore(tmp_path / "store"), "toy", reference)
    again = cached(DDIM, policy, batch)
    assert torch.equal(again, live)
    assert isinstance(reference.model, Toy)


def test_a_batch_goes_to_a_device_whole():
    guided = replace(DDIM, guidance=5.0)
    batch = collate(transition(strength=0.9), likelihood=guided, empty=empty_prompt()).to(
        torch.device("meta")
    )
    records = [batch, *batch.stacks]
    assert isinstance(records[1], StepStack)
    for record in records:
        values = [getattr(record, f.name) for f in fields(record)]
        parts = [p for v in values for p in ((v.embeds, v.pooled) if isinstance(v, Conditions) else (v,))]
        tensors = [p for p in parts if isinstance(p, Tensor)]
        assert len(tensors) > 5
        assert all(t.device.type == "meta" for t in tensors)


@pytest.mark.parametrize("rule", [Ddim(eta=0.0), FlowSde(noise_level=0.0)])
def test_a_deterministic_rule_has_no_likelihood(rule):
    with pytest.raises(ValueError, match=r"deterministic: its next state has no density \(std = 0\)"):
        StepLikelihood(schedule=FLOW, rule=rule)


def test_a_step_without_noise_names_its_owner():
    clean = replace(DDIM, rule=Ddim(eta=1.0, final="clean"))
    with pytest.raises(ValueError, match="s0: the step from time 1 to -49 has no noise"):
        collate(transition(time=1, next_time=-49), likelihood=clean)
    assert torch.isfinite(DDIM.terms(Toy(), collate(transition(time=1, next_time=-49)))).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(DDIM, guidance=0.5), "guidance=0.5 must be at least 1"),
        (lambda: replace(DDIM, reduction="max"), "reduction='max' is not one of mean, sum"),
        (lambda: collate(transition(), empty=empty_prompt()), "guidance=1: an empty prompt is of no use"),
        (
            lambda: collate(transition(), likelihood=replace(DDIM, guidance=5.0)),
            "guidance=5: no empty prompt",
        ),
        (
            lambda: collate(
                transition(), likelihood=replace(DDIM, guidance=5.0), empty=(torch.zeros(3, 16), None)
            ),
            r"s0: .* \[\(1, 5, 16\), None\], the empty prompt's \[\(1, 3, 16\), None\]",
        ),
        (lambda: collate(transition(relevance=(1.0, 1.0))), "s0: every candidate has grade 1, so none is"),
        (lambda: collate(transition(), kind="units"), "kind='units' is not one of pair, list"),
        (lambda: collate(transition(strength=0.5), transition(1)), "strength must be given for every sample"),
        (lambda: transition(relevance=(1.0,)), "s0: 1 grades for 2 candidates"),
        (lambda: transition(nexts=torch.zeros(2, 4, 4, 4)), "K at least 2"),
        (lambda: transition(prompt=Conditions(torch.zeros(2, 5, 16))), "should be those of one row"),
        (lambda: trajectory(3, times=(901.0, 801.0)), "p0: 2 times, but steps by field"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
