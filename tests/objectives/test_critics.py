import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from triptych.objectives.advantages import gae, kl_shaped_reward
from triptych.objectives.critics import gap_list, log_ratio_to_go
from triptych.objectives.inputs import ListLogLik, LogLik, PairLogLik, UnitLogLik
from triptych.objectives.registry import build, spec

D = torch.float64


def t(*x: float) -> Tensor:
    return torch.tensor(x, dtype=D)


def scores(chosen: list[float], rejected: list[float], margin: list[float] | None = None) -> PairLogLik:
    one = torch.ones(len(chosen), dtype=D)
    gap = None if margin is None else t(*margin)
    return PairLogLik(LogLik(t(*chosen), one), LogLik(t(*rejected), one), margin=gap)


def ppo_example() -> UnitLogLik:
    """Values when drawn (.1, .2, .4); advantages and returns of the worked GAE; new values (.15, .1, .9)."""
    mask = torch.ones(1, 3, dtype=torch.bool)
    reward = kl_shaped_reward(t(1.0), t(0.1, -0.05, 0.2)[None], mask, beta=0.05)
    advantage, target = gae(reward, t(0.1, 0.2, 0.4)[None], mask, gamma=1.0, lam=0.95)
    old, value = t(0.1, 0.2, 0.4)[None], t(0.15, 0.1, 0.9)[None]
    fields = {"advantage": advantage, "value": value, "target": target, "old_value": old}
    return UnitLogLik(torch.zeros(1, 3, dtype=D), mask, **fields)


def oreo_example() -> UnitLogLik:
    def row(*x):
        return t(*x)[None]

    logp, ref = row(-1.0, -2.0, -0.5), row(-1.2, -1.9, -0.8)
    mask = torch.ones(1, 3, dtype=torch.bool)
    return UnitLogLik(logp, mask, ref=ref, value=row(0.5, 0.6, 0.8), target=row(1.0, 1.0, 1.0))


def unit_batch(name: str, seed: int = 0) -> UnitLogLik:
    g = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn(3, 4, generator=g, dtype=D)

    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    full = UnitLogLik(draw(), mask, ref=draw(), old_value=draw(), value=draw(), target=draw())
    unused = {"ref", "old_value", "value"} - spec(name).uses
    return replace(full, **dict.fromkeys(unused))


OPTIONS = {
    "reward_regression": {},
    "value_regression": {},
    "ppo_value": {"clip": 0.2},
    "oreo_value": {"beta": 0.3},
    "oreo_policy": {"beta": 0.3},
}
TRAINED = dict.fromkeys(OPTIONS, "value") | {"reward_regression": "logp", "oreo_policy": "logp"}


def gradient(name: str, x: UnitLogLik, field: str) -> Tensor:
    leaf = getattr(x, field).detach().requires_grad_()
    loss = build(name, **OPTIONS[name])(replace(x, **{field: leaf})).sum()
    return torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True)[0]


def test_reward_bt_is_the_logistic_loss_of_the_score_gap():
    assert build("reward_bt")(scores([1.2], [0.2])).item() == pytest.approx(0.3132616875)
    # A margin of 1 eats the gap; one of 2 turns it round.
    loss = build("reward_bt")(scores([1.2, 1.2], [0.2, 0.2], [1.0, 2.0]))
    assert loss.tolist() == pytest.approx([math.log(2), 1.3132616875])


def test_reward_bt_centring_penalises_the_square_of_the_sum():
    # (1.2 + .2)^2 = 1.96.
    assert build("reward_bt", alpha=0.1)(scores([1.2], [0.2])).item() == pytest.approx(0.3132616875 + 0.196)
    assert build("reward_bt", alpha=0.1)(scores([0.5], [-0.5])).item() == pytest.approx(0.3132616875)


def test_pit_gap_is_the_sum_of_its_five_terms():
    x = gap_list(t(1.2), t(0.1), t(-0.1), t(-0.9))
    assert build("pit_gap")(x).item() == pytest.approx(1.328226, abs=1e-6)
    five = [1.2 - 0.1, 1.2 + 0.1, 1.2 + 0.9, 0.1 + 0.9, -0.1 + 0.9]
    assert build("pit_gap")(x).item() == pytest.approx(sum(math.log1p(math.exp(-d)) for d in five))


def test_pit_gap_does_not_compare_the_two_draws():
    leaves = [torch.tensor([v], dtype=D, requires_grad=True) for v in (0.0, 50.0, -50.0, 0.0)]
    loss = build("pit_gap")(gap_list(*leaves)).sum()
    # wl - ww = -50, ww - lw = 50, wl - ll = 50, ll - lw = -50, wl - lw = 0.
    assert loss.item() == pytest.approx(100 + math.log(2))


def test_pit_gap_on_a_list_of_two_is_the_bradley_terry_loss():
    pair = scores([1.2, -0.3], [0.2, 0.4])
    both = torch.stack([pair.rejected.logp, pair.chosen.logp], -1)
    x = ListLogLik(LogLik(both, torch.ones_like(both)), torch.tensor([[0.0, 1.0]] * 2, dtype=D))
    torch.testing.assert_close(build("pit_gap")(x), build("reward_bt")(pair))


def test_reward_regression_sums_over_the_rated_attributes():
    mask = torch.tensor([[True, True, False], [False, True, False]])
    predicted = torch.tensor([[0.5, 1.0, 9.0], [math.nan, 3.0, math.inf]], dtype=D)
    rating = torch.tensor([[1.0, 3.0, math.nan], [0.0, 2.0, 0.0]], dtype=D)
    x = UnitLogLik(predicted, mask, target=rating)
    assert build("reward_regression")(x).tolist() == [0.25 + 4, 1.0]
    assert build("reward_regression", reduce="per_term")(x).tolist() == [2.125, 1.0]


def test_value_losses_agree_with_the_worked_ppo_example():
    x = ppo_example()
    assert build("ppo_value", clip=0.2)(x).item() == pytest.approx(0.248256, abs=1e-6)
    # Without the clip: (.76985^2 + .863^2 + .09^2) / 6.
    assert build("value_regression")(x).item() == pytest.approx(0.2242563371, abs=1e-9)
    assert build("ppo_value", clip=1e3)(x).item() == pytest.approx(build("value_regression")(x).item())


def test_a_value_beyond_its_clip_has_no_gradient_where_the_clip_is_worse():
    slope = gradient("ppo_value", ppo_example(), "value")[0]
    # Only the third value left its band of .4 +- .2, towards the return .99: clipping it is the larger error.
    assert slope[2] == 0
    assert slope[0].item() == pytest.approx((0.15 - 0.91985) / 3)
    assert slope[1].item() == pytest.approx((0.1 - 0.963) / 3)


@pytest.mark.parametrize("name", ["value_regression", "ppo_value"])
def test_value_losses_average_over_units_and_not_over_rows(name):
    x = unit_batch(name)
    rows = [build(name, **OPTIONS[name])(_row(x, i)).item() for i in range(3)]
    expected = (3 * rows[0] + 1 * rows[1] + 4 * rows[2]) / 8
    assert build(name, **OPTIONS[name])(x).mean().item() == pytest.approx(expected)
    assert spec(name).couples_batch
    # With the batch's own count given, a row's loss does not depend on the rows beside it.
    counted = replace(x, num_units=torch.full((3,), 8 / 3, dtype=D))
    whole = build(name, **OPTIONS[name])(counted)
    alone = [build(name, **OPTIONS[name])(replace(_row(x, i), num_units=t(8 / 3))) for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), whole)
    assert whole.mean().item() == pytest.approx(expected)


def test_both_oreo_losses_agree_with_the_worked_example():
    x = oreo_example()
    for name in ("oreo_value", "oreo_policy"):
        assert build(name, beta=0.03)(x).item() == pytest.approx(0.143287, abs=1e-6)


def test_oreo_reads_the_path_from_each_unit_on():
    x = oreo_example()
    assert log_ratio_to_go(x)[0].tolist() == pytest.approx([0.4, 0.2, 0.3])


def test_oreo_gives_every_unit_the_gradient_of_its_own_residual():
    residual = torch.tensor([0.5 + 0.3 * 0.4, 0.6 + 0.3 * 0.2, 0.8 + 0.3 * 0.3], dtype=D) - 1
    x = oreo_example()
    torch.testing.assert_close(gradient("oreo_value", x, "value")[0], 2 * residual / 3)
    torch.testing.assert_close(gradient("oreo_policy", x, "logp")[0], 0.3 * 2 * residual / 3)
    both = replace(x, logp=x.logp.requires_grad_(), value=x.value.requires_grad_())
    build("oreo_value", beta=0.3)(both).sum().backward()
    assert both.logp.grad is None
    both = replace(x, logp=x.logp.detach().requires_grad_(), value=x.value.detach().requires_grad_())
    build("oreo_policy", beta=0.3)(both).sum().backward()
    assert both.value.grad is None


def test_oreo_losses_recover_the_soft_value_and_the_soft_optimal_policy():
    # One step, three answers: V = beta log sum ref exp(R / beta), pi = ref exp((R - V) / beta).
    beta, reward, ref = 0.5, t(1.0, 0.0, 0.3), t(0.2, 0.5, 0.3)
    value = beta * (ref.log() + reward / beta).logsumexp(-1)
    optimal = (ref.log() + (reward - value) / beta).unsqueeze(-1)
    assert optimal.exp().sum().item() == pytest.approx(1)

    def column(x):
        return x.expand(3).unsqueeze(-1)

    mask = torch.ones(3, 1, dtype=torch.bool)
    x = UnitLogLik(optimal, mask, ref=column(ref.log()), value=column(value), target=column(reward))
    for name in ("oreo_value", "oreo_policy"):
        assert build(name, beta=beta)(x).abs().max() < 1e-20


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OPTIONS)
def test_padding_may_hold_anything(name, junk):
    x = unit_batch(name)
    fields = {f: getattr(x, f) for f in ("logp", "ref", "advantage", "value", "target")}
    dirty = {f: v.masked_fill(~x.mask, junk) for f, v in fields.items() if v is not None}
    bad = replace(x, **dirty)
    torch.testing.assert_close(build(name, **OPTIONS[name])(bad), build(name, **OPTIONS[name])(x))
    slope = gradient(name, bad, TRAINED[name])
    torch.testing.assert_close(slope, gradient(name, x, TRAINED[name]))
    assert slope[~x.mask].abs().max() == 0


@pytest.mark.parametrize("name", OPTIONS)
def test_rows_without_units_cost_nothing(name):
    x = unit_batch(name)
    assert build(name, **OPTIONS[name])(replace(x, mask=torch.zeros_like(x.mask))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", OPTIONS)
def test_extreme_values_stay_finite(name):
    x = unit_batch(name)
    grown = {f: (1e4 * getattr(x, f)).float() for f in ("logp", "ref", "value") if getattr(x, f) is not None}
    x = replace(x, **grown)
    assert build(name, **OPTIONS[name])(x).isfinite().all()
    assert gradient(name, x, TRAINED[name]).isfinite().all()


@pytest.mark.parametrize("name", ["reward_regression", "value_regression", "ppo_value", "oreo_value"])
def test_gradients_are_those_of_the_loss(name):
    x = unit_batch(name)
    field = TRAINED[name]

    def loss(leaf):
        return build(name, **OPTIONS[name])(replace(x, **{field: leaf}))

    assert torch.autograd.gradcheck(loss, (getattr(x, field).clone().requires_grad_(),))


def test_pair_and_list_rewards_pass_gradcheck_and_stay_finite():
    def reward(w, r):
        return build("reward_bt", alpha=0.1)(PairLogLik(LogLik(w, one), LogLik(r, one)))

    one = torch.ones(3, dtype=D)
    leaves = [torch.randn(3, dtype=D, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(reward, leaves[:2])
    assert torch.autograd.gradcheck(lambda *g: build("pit_gap")(gap_list(*g)), leaves)
    assert build("pit_gap")(gap_list(*(t(s * 1e4).float() for s in (-1, 1, 1, 1)))).isfinite().all()


def test_missing_fields_are_named():
    x = UnitLogLik(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    for name, field in [("ppo_value", "value"), ("oreo_value", "ref"), ("reward_regression", "target")]:
        assert field in spec(name).requires
        with pytest.raises(ValueError, match=rf"UnitLogLik\.{field}, which is None"):
            build(name, **OPTIONS[name])(x)


def _row(x: UnitLogLik, i: int) -> UnitLogLik:
    fields = ("logp", "mask", "ref", "old_value", "value", "target")
    return UnitLogLik(**{f: None if getattr(x, f) is None else getattr(x, f)[i : i + 1] for f in fields})
