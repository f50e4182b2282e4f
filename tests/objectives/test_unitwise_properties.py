import math
from dataclasses import replace

import pytest
import torch
from unit_cases import ALL, COUPLED, OPTIONS, SURROGATES, D, gradient, unit_batch

from triptych.objectives.inputs import UnitLogLik
from triptych.objectives.registry import build, spec
from triptych.objectives.surrogates import ratio


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ALL)
def test_padding_may_hold_anything(name, junk):
    x = unit_batch(name)
    fields = {f: getattr(x, f) for f in ("logp", "old", "ref", "advantage")}
    bad = replace(x, **{f: v.masked_fill(~x.mask, junk) for f, v in fields.items() if v is not None})
    objective = build(name, **OPTIONS[name])
    torch.testing.assert_close(objective(bad), objective(x))
    torch.testing.assert_close(gradient(name, bad), gradient(name, x))
    assert gradient(name, bad)[~x.mask].abs().max() == 0


@pytest.mark.parametrize("name", sorted(set(ALL) - COUPLED))
def test_rows_do_not_depend_on_each_other(name):
    x = unit_batch(name)
    whole = build(name, **OPTIONS[name])(x)
    for i in range(3):
        part = {f: getattr(x, f) for f in ("logp", "mask", "old", "ref", "advantage")}
        alone = UnitLogLik(**{f: None if v is None else v[i : i + 1] for f, v in part.items()})
        torch.testing.assert_close(build(name, **OPTIONS[name])(alone), whole[i : i + 1])


@pytest.mark.parametrize("name", ALL)
def test_rows_without_units_have_no_gradient_and_stay_finite(name):
    x = unit_batch(name)
    empty = replace(x, mask=torch.zeros_like(x.mask))
    assert build(name, **OPTIONS[name])(empty).tolist() == [0, 0, 0]
    assert gradient(name, empty).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [-1e4, 1e4])
@pytest.mark.parametrize("name", ALL)
def test_extreme_ratios_stay_finite(name, shift, dtype):
    x = unit_batch(name, dtype=dtype)
    field = "ref" if name == "a2po" else "old"
    moved = {} if name == "reinforce" else {field: getattr(x, field) + shift}
    for sign in (1, -1):
        y = replace(x, advantage=sign * x.advantage.abs(), **moved)
        assert build(name, **OPTIONS[name])(y).isfinite().all()
        assert gradient(name, y).isfinite().all()


def test_the_ratio_is_the_exponential_up_to_twenty_and_its_tangent_beyond():
    x = torch.tensor([-1e4, -3.0, 0.0, 19.9, 21.0], dtype=D, requires_grad=True)
    y = ratio(x)
    top = math.exp(20)
    assert y.tolist() == pytest.approx([0, math.exp(-3), 1, math.exp(19.9), 2 * top])
    y.sum().backward()
    assert x.grad.tolist() == pytest.approx([0, math.exp(-3), 1, math.exp(19.9), top])


@pytest.mark.parametrize("name", sorted(set(ALL) - SURROGATES))
def test_gradients_are_those_of_the_loss(name):
    x = unit_batch(name, seed=1)

    def loss(logp):
        return build(name, **OPTIONS[name])(replace(x, logp=logp))

    assert torch.autograd.gradcheck(loss, (x.logp.clone().requires_grad_(),))


@pytest.mark.parametrize("name", ALL)
def test_only_the_policys_log_probs_get_a_gradient(name):
    x = unit_batch(name)
    fields = ("logp", "old", "ref", "advantage")
    leaves = {f: getattr(x, f).requires_grad_() for f in fields if getattr(x, f) is not None}
    build(name, **OPTIONS[name])(UnitLogLik(mask=x.mask, **leaves)).sum().backward()
    assert leaves.pop("logp").grad is not None
    assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.parametrize("name", ALL)
def test_missing_fields_are_named_and_bounds_refused(name):
    needed = {"reinforce": {"advantage"}, "a2po": {"ref", "advantage"}}.get(name, {"old", "advantage"})
    assert spec(name).requires == needed
    assert spec(name).on_policy
    bare = UnitLogLik(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"UnitLogLik\.\w+, which is None"):
        build(name, **OPTIONS[name])(bare)


@pytest.mark.parametrize("name", sorted(COUPLED))
def test_the_units_of_the_whole_batch_uncouple_its_rows(name):
    x = unit_batch(name)
    objective = build(name, **OPTIONS[name])
    per_row = x.mask.sum() / len(x.mask)
    whole = objective(replace(x, num_units=per_row.expand(3).to(x.logp.dtype)))
    torch.testing.assert_close(whole, objective(x))
    fields = ("logp", "mask", "ref", "old", "advantage")
    rows = [
        UnitLogLik(
            **{f: None if getattr(x, f) is None else getattr(x, f)[i : i + 1] for f in fields},
            num_units=per_row.view(1).to(x.logp.dtype),
        )
        for i in range(3)
    ]
    torch.testing.assert_close(torch.cat([objective(r) for r in rows]), whole)
