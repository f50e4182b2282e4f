import pytest
import torch
from torch.nn import functional

from triptych.modalities.recsys.jagged import Jagged, padded
from triptych.modalities.recsys.layers import MixtureOfExperts, rotated


def dense(moe, x, chosen=None):
    """Every expert on every token, weighted by the full softmax where it is among the top."""
    weight = (x @ moe.gate.weight.T).softmax(-1)
    top = weight.topk(moe.top_k, -1).indices if chosen is None else chosen
    out = torch.zeros_like(x)
    for i in range(weight.shape[1]):
        gate, value = (x @ moe.into_XDF[i]).chunk(2, -1)
        done = (functional.silu(gate) * value) @ moe.out_XFD[i]
        out += torch.where((top == i).any(-1), weight[:, i], 0.0).unsqueeze(-1) * done
    return out


def make(**options):
    torch.manual_seed(0)
    return MixtureOfExperts(8, 12, num_experts=5, top_k=2, **options).double()


def test_experts_grouped_by_token_equal_every_expert_on_every_token_in_value_and_gradient():
    moe, x = make(), torch.randn(3, 7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for form in (moe, lambda t: dense(moe, t.reshape(-1, 8)).view(t.shape)):
        moe.zero_grad()
        y = x.clone().requires_grad_()
        out = form(y)
        (out * torch.arange(8.0)).sum().backward()
        results.append((out, y.grad, *(p.grad.clone() for p in moe.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_an_expert_that_no_token_chose_still_has_a_gradient_of_zero():
    moe = make()
    with torch.no_grad():
        moe.gate.weight[4] = -100 * moe.gate.weight.abs().max()
    moe(torch.rand(4, 8, dtype=torch.float64)).sum().backward()
    assert moe.into_XDF.grad[4].abs().sum() == 0


def test_loss_free_balancing_raises_the_idle_and_lowers_the_busy_without_touching_weights():
    moe = make(balance_rate=0.02)
    x = torch.rand(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        moe.gate.weight[0] = 3.0
    weight = (x @ moe.gate.weight.T).softmax(-1)
    assert bool((weight.argmax(-1) == 0).all())
    moe.train()
    before = moe.bias_X.detach().clone()
    moe(x).sum().backward()
    assert moe.bias_X[0] < before[0]
    assert bool((moe.bias_X.grad == 0).all())
    loads = torch.zeros(5)
    for _ in range(200):
        chosen = (weight + moe.bias_X).topk(2, -1).indices
        loads += torch.bincount(chosen.flatten(), minlength=5) / (200 * 64 * 2)
        moe(x)
    assert loads.tolist() == pytest.approx([0.2] * 5, abs=0.1)
    chosen = (weight + moe.bias_X).topk(2, -1).indices
    torch.testing.assert_close(moe.eval()(x), dense(moe, x, chosen))
    fixed = moe.bias_X.detach().clone()
    moe.eval()(x)
    assert torch.equal(moe.bias_X, fixed)


def test_top_k_must_fit():
    with pytest.raises(ValueError, match="top_k=3 must be from 1 to num_experts=2"):
        MixtureOfExperts(8, 8, num_experts=2, top_k=3)


def test_rotations_make_products_depend_on_distance_alone():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    product = [float(rotated(q, torch.tensor(a)) @ rotated(k, torch.tensor(a - 3))) for a in (3, 10, 50)]
    assert product == pytest.approx([product[0]] * 3, abs=1e-4)


def test_jagged_rows_know_their_places_and_pad_to_a_rectangle():
    rows = Jagged.of([torch.tensor([1, 2, 3]), torch.tensor([], dtype=torch.int64), torch.tensor([4])])
    assert rows.lengths.tolist() == [3, 0, 1]
    assert rows.rows.tolist() == [0, 0, 0, 2]
    assert rows.places.tolist() == [0, 1, 2, 0]
    slots = rows.rows * rows.longest + rows.places
    assert padded(rows.values, slots, num_rows=3, longest=3).tolist() == [[1, 2, 3], [0, 0, 0], [4, 0, 0]]
    with pytest.raises(ValueError, match="at least one row"):
        Jagged.of([])
