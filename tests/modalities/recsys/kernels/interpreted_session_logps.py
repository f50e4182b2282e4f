"""The Triton form on CPU tensors; `test_session_logps_triton.py` runs it with TRITON_INTERPRET=1."""

import pytest
import torch

from triptych.modalities.recsys.kernels import code_logps, session_logps, triton_kernels


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks in every direction, the last ones ragged."""
    for name in ("ROWS", "COLS", "DEPTH"):
        monkeypatch.setattr(triton_kernels, name, 16)


def leaves_of(num, sizes=(40, 5), items=2, width=20, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    steps = items * len(sizes)
    hidden = torch.randn(num, steps, width, generator=generator)
    weights = [torch.randn(k, width, generator=generator) for k in sizes]
    codes = torch.stack(
        [torch.randint(sizes[s % len(sizes)], (num,), generator=generator) for s in range(steps)], 1
    )
    codes[torch.rand(num, steps, generator=generator) < 0.2] = -1
    if num > 1:
        codes[-1] = -1
    return [t.to(dtype).requires_grad_() for t in (hidden, *weights)], codes


def outcome(leaves, codes, impl):
    total, each = session_logps(leaves[0], leaves[1:], codes, impl=impl)
    (total.sum() + (each * torch.arange(each.shape[1])).sum()).backward()
    return [total, each, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("num", [1, 63, 100])
def test_values_and_gradients_are_the_references(num):
    expected = outcome(*leaves_of(num), "reference")
    for one, other in zip(expected, outcome(*leaves_of(num), "triton"), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_codes", [1, 5, 64, 300])
def test_codebooks_of_any_size(num_codes):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 24, generator=generator)
    weight = torch.randn(num_codes, 24, generator=generator)
    codes = torch.randint(num_codes, (33,), generator=generator)
    expected = code_logps(hidden, weight, codes, impl="reference")
    torch.testing.assert_close(
        code_logps(hidden, weight, codes, impl="triton"), expected, rtol=1e-4, atol=1e-4
    )


def test_half_precision_is_as_near_to_float32_as_the_reference_twice_over():
    exact = outcome(*leaves_of(40), "reference")
    plain = outcome(*leaves_of(40, dtype=torch.float16), "reference")
    found = outcome(*leaves_of(40, dtype=torch.float16), "triton")
    for one, half, other in zip(exact, plain, found, strict=True):
        allowed = 2 * (half.float() - one).abs().max() + 1e-3
        assert (other.float() - one).abs().max() <= allowed


def test_two_runs_give_the_same_bits():
    one, other = (outcome(*leaves_of(63), "triton") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
