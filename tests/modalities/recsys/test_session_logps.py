import pytest
import torch

from triptych.modalities.recsys.kernels import code_logps, session_logps


def inputs(num=5, items=3, sizes=(7, 4), width=6, dtype=torch.float64, seed=0):
    """Hidden states, heads and codes, some of them absent, one row wholly."""
    generator = torch.Generator().manual_seed(seed)
    steps = items * len(sizes)
    hidden = torch.randn(num, steps, width, dtype=dtype, generator=generator)
    weights = [torch.randn(k, width, dtype=dtype, generator=generator) for k in sizes]
    codes = torch.stack(
        [torch.randint(sizes[s % len(sizes)], (num,), generator=generator) for s in range(steps)], 1
    )
    codes[torch.rand(num, steps, generator=generator) < 0.2] = -1
    if num > 1:
        codes[-1] = -1
    return hidden, weights, codes


def by_hand(hidden, weights, codes):
    """A softmax at a time."""
    rows = []
    for n in range(len(hidden)):
        row = []
        for s in range(hidden.shape[1]):
            logits = weights[s % len(weights)] @ hidden[n, s]
            code = int(codes[n, s])
            row.append(logits.log_softmax(0)[code] if code >= 0 else hidden.new_zeros(()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
@pytest.mark.parametrize("num", [1, 63, 100])
def test_values_and_gradients_are_those_of_a_softmax_at_a_time(impl, num):
    hidden, weights, codes = inputs(num)
    found = {}
    for name, form in {
        "hand": lambda *a: (None, by_hand(*a)),
        impl: lambda *a: session_logps(*a, impl=impl),
    }.items():
        leaves = [t.clone().requires_grad_() for t in (hidden, *weights)]
        total, each = form(leaves[0], leaves[1:], codes)
        each.mul(torch.arange(each.shape[1])).sum().backward()
        found[name] = (each, *(leaf.grad for leaf in leaves))
        if total is not None:
            torch.testing.assert_close(total, each.sum(1))
    for one, other in zip(found["hand"], found[impl], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_the_sum_passes_gradients_that_are_right(impl):
    hidden, weights, codes = inputs(3)
    leaves = [t.requires_grad_() for t in (hidden, *weights)]
    assert torch.autograd.gradcheck(lambda h, *w: session_logps(h, list(w), codes, impl=impl)[0], leaves)


@pytest.mark.parametrize("num_codes", [1, 5, 64, 1000])
def test_one_level_of_any_size(num_codes):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 8, generator=generator)
    weight = torch.randn(num_codes, 8, generator=generator)
    codes = torch.randint(num_codes, (100,), generator=generator)
    expected = (hidden @ weight.T).log_softmax(-1).gather(1, codes[:, None])[:, 0]
    for impl in ("reference", "chunked"):
        torch.testing.assert_close(
            code_logps(hidden, weight, codes, impl=impl), expected, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_about_as_near_to_float32_as_plain_pytorch_is(dtype):
    hidden, weights, codes = inputs(100, dtype=torch.float32, width=32, sizes=(300, 40))
    exact = session_logps(hidden, weights, codes, impl="reference")[1]
    half = [t.to(dtype) for t in (hidden, *weights)]
    plain = session_logps(half[0], half[1:], codes, impl="reference")[1]
    found = session_logps(half[0], half[1:], codes, impl="chunked")[1]
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6


def test_an_absent_position_may_hold_anything_and_gets_no_gradient():
    hidden, weights, codes = inputs(4)
    hidden[codes < 0] = torch.nan
    leaf = hidden.requires_grad_()
    total, each = session_logps(leaf, weights, codes)
    assert bool((each[codes < 0] == 0).all())
    total.sum().backward()
    assert bool(torch.isfinite(leaf.grad).all())
    assert bool((leaf.grad[codes < 0] == 0).all())
    assert total[-1] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(5, 5, dtype=torch.int64)}, r"codes is \[5, 5\]"),
        ({"weights": []}, "weights is empty"),
        ({"impl": "fast"}, "impl is 'fast'; valid: auto, reference, chunked, triton"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    hidden, weights, codes = inputs()
    given = {"hidden": hidden, "weights": weights, "codes": codes} | changes
    with pytest.raises(ValueError, match=message):
        session_logps(**given)


def test_a_code_that_the_level_does_not_have_is_refused():
    hidden, weights, codes = inputs()
    codes[0, 0] = 7
    with pytest.raises(ValueError, match="7"):
        session_logps(hidden, weights, codes)
