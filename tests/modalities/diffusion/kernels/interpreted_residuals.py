"""The Triton form on CPU tensors; `test_residuals_triton.py` runs it with TRITON_INTERPRET=1."""

from dataclasses import replace

import pytest
import torch
import triton.language as tl
from residual_checks import SIZES, assert_at_most_twice_the_error_of_the_reference, make, outputs, value
from triton.runtime import interpreter

from triptych.modalities.diffusion.kernels import cost, residual_difference, squared_residual, triton_kernels

WHAT = pytest.mark.parametrize("with_ref", [True, False], ids=["difference", "squared"])


@pytest.fixture(autouse=True)
def nan_filled_empties():
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def bfloat16_rounds_to_nearest(monkeypatch):
    """As on a GPU: the interpreter of Triton 3.8 truncates float32 to bfloat16, with twice the error."""
    builder = interpreter.InterpreterBuilder
    original = builder.create_fp_trunc

    def create_fp_trunc(self, source, dtype):
        if source.dtype.scalar != tl.float32 or dtype.scalar != tl.bfloat16:
            return original(self, source, dtype)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16).numpy()
        return interpreter.TensorHandle(rounded, dtype.scalar)

    monkeypatch.setattr(builder, "create_fp_trunc", create_fp_trunc)


@pytest.fixture
def three_programs_a_row(monkeypatch):
    """Splits of several blocks, the last one ragged, as a large batch has them."""
    monkeypatch.setattr(cost, "PROGRAMS", 9)
    assert cost.num_splits(3, 65_536) == 3


def test_the_interpreter_is_on():
    assert triton_kernels.interpreted()


@WHAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num", [0, 1, 3])
def test_triton_keeps_the_2x_rule(num, size, dtype, with_ref, monkeypatch):
    if size > 10_000:
        # The interpreter takes milliseconds a program: fewer and larger ones.
        monkeypatch.setattr(cost, "BLOCK", 8192)
        monkeypatch.setattr(triton_kernels, "BLOCK", 8192)
    inputs = make(num, size, dtype, with_ref=with_ref)
    assert_at_most_twice_the_error_of_the_reference(inputs, "triton")


@WHAT
@pytest.mark.parametrize("size", [3000, 7 * 1024, 20_001])
@pytest.mark.usefixtures("three_programs_a_row")
def test_triton_keeps_the_2x_rule_with_several_blocks_a_program(size, with_ref):
    inputs = make(3, size, torch.bfloat16, with_ref=with_ref)
    assert_at_most_twice_the_error_of_the_reference(inputs, "triton")


def test_dtypes_may_differ():
    inputs = make(3, 1000, torch.bfloat16, ref=torch.float16, target=torch.float32)
    assert_at_most_twice_the_error_of_the_reference(inputs, "triton")


@pytest.mark.usefixtures("three_programs_a_row")
def test_the_squared_residual_is_the_difference_from_the_target_to_the_last_bit():
    squared = make(3, 20_001, torch.bfloat16, with_ref=False)
    found, same = outputs(squared, "triton"), outputs(replace(squared, ref=squared.target), "triton")
    assert torch.equal(found["value"], same["value"])
    assert torch.equal(found["gradient"], same["gradient"])


def test_at_the_first_step_the_difference_is_exactly_zero_and_its_gradient_is_not():
    inputs = make(2, 4096, torch.bfloat16)
    prediction = inputs.prediction.requires_grad_()
    found = residual_difference(prediction, prediction, inputs.target, impl="triton")
    assert found.tolist() == [0.0, 0.0]
    found.sum().backward()
    exact = (prediction.detach().float() - inputs.target.float()) * 2 / 4096
    assert torch.equal(prediction.grad, exact.bfloat16())


def test_channels_last_and_rows_of_a_larger_batch_are_read_in_place():
    inputs = make(4, (4, 30, 20), torch.float32)
    plain = outputs(inputs, "triton")
    prediction, ref = (t.to(memory_format=torch.channels_last) for t in (inputs.prediction, inputs.ref))
    # Every second row of a larger batch: another distance between the rows.
    target = inputs.target.to(memory_format=torch.channels_last).repeat_interleave(2, 0)
    target = target.to(memory_format=torch.channels_last)[::2]
    prediction.requires_grad_()
    found = residual_difference(prediction, ref, target, impl="triton")
    (grad,) = torch.autograd.grad(found, prediction, inputs.upstream.float())
    torch.testing.assert_close(found.detach(), plain["value"], rtol=2e-6, atol=1e-7)
    assert torch.equal(grad, plain["gradient"])
    assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("spread", ["prediction", "ref", "target"])
def test_numbers_that_do_not_lie_side_by_side_are_copied(spread):
    inputs = make(2, 1500, torch.float32)
    plain = outputs(inputs, "triton")
    every_second = getattr(inputs, spread).repeat_interleave(2, 1)
    every_second[:, 1::2] = float("nan")
    leaf = inputs.prediction.clone()
    if spread == "prediction":
        leaf = every_second[:, ::2]
    else:
        inputs = replace(inputs, **{spread: every_second[:, ::2]})
    found = residual_difference(leaf.requires_grad_(), inputs.ref, inputs.target, impl="triton")
    (grad,) = torch.autograd.grad(found, leaf, inputs.upstream.float())
    assert torch.equal(found.detach(), plain["value"])
    assert torch.equal(grad, plain["gradient"])


def test_a_target_expanded_to_all_rows_and_an_expanded_upstream_gradient():
    inputs = make(3, 1500, torch.float32, with_ref=False)
    shared = inputs.target[:1].expand(3, -1)
    prediction = inputs.prediction.requires_grad_()
    found = squared_residual(prediction, shared, impl="triton")
    torch.testing.assert_close(found, squared_residual(prediction, shared, impl="reference"))
    found.sum().backward()
    torch.testing.assert_close(prediction.grad, 2 * (prediction - shared).detach() / 1500)


def test_two_runs_give_the_same_bits():
    inputs = make(3, 20_001, torch.float32)
    first, second = (outputs(inputs, "triton") for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_without_grad_nothing_is_recorded():
    inputs = make(2, 100, torch.bfloat16)
    inputs.prediction.requires_grad_()
    with torch.no_grad():
        assert not value(inputs, "triton").requires_grad


def test_float64_is_refused():
    inputs = make(3, 10, torch.float32, target=torch.float64)
    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32, and target is torch.float64"):
        value(inputs, "triton")
