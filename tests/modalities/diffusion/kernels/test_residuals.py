import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from residual_checks import (
    SIZES,
    Traffic,
    assert_at_most_twice_the_error_of_the_reference,
    make,
    oracle,
    outputs,
    value,
)

from triptych.modalities.diffusion import kernels
from triptych.modalities.diffusion.kernels import fused, residual_difference, squared_residual

FORMS = ("reference", "fused")
WHAT = pytest.mark.parametrize("with_ref", [True, False], ids=["difference", "squared"])
FORM = pytest.mark.parametrize("impl", FORMS)


@pytest.fixture
def small_tiles(monkeypatch):
    """Several ragged tiles at small sizes: of whole rows, and within a row."""
    monkeypatch.setattr(fused, "_CPU_TILE", 2**11)


@pytest.fixture
def nan_filled_empties():
    """torch.empty returns NaN, so that an output that is not written is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@FORM
def test_a_hand_worked_row(impl):
    # Squared errors: prediction (1 + 4) / 2, ref (1 + 0) / 2. Gradient of either: 2 (p - t) / 2 = p - t.
    prediction = torch.tensor([[4.0, 5.0]], requires_grad=True)
    ref, target = torch.tensor([[4.0, 3.0]]), torch.tensor([[3.0, 3.0]])
    assert squared_residual(prediction, target, impl=impl).tolist() == [2.5]
    found = residual_difference(prediction, ref, target, impl=impl)
    assert found.tolist() == [2.0]
    found.backward()
    assert prediction.grad.tolist() == [[1.0, 2.0]]


@WHAT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num", [0, 1, 3])
@pytest.mark.usefixtures("small_tiles", "nan_filled_empties")
def test_fused_value_and_gradient_keep_the_2x_rule(num, size, dtype, with_ref):
    inputs = make(num, size, dtype, with_ref=with_ref)
    assert_at_most_twice_the_error_of_the_reference(inputs, "fused")


@WHAT
@pytest.mark.usefixtures("nan_filled_empties")
def test_fused_keeps_the_2x_rule_with_its_own_tiles(with_ref):
    # Whole rows, two a tile, then three rows of more than a tile each.
    for num, size in ((5, 50_000), (3, 150_001)):
        inputs = make(num, size, torch.bfloat16, with_ref=with_ref)
        assert len(list(fused.tiles(inputs.target))) == {5: 3, 3: 6}[num]
        assert_at_most_twice_the_error_of_the_reference(inputs, "fused")


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float16),
        (torch.float16, torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes_may_differ(dtypes):
    prediction, ref, target = dtypes
    inputs = make(3, 1000, prediction, ref=ref, target=target)
    found = outputs(inputs, "fused")
    assert found["value"].dtype == torch.float32
    assert found["gradient"].dtype == prediction
    assert_at_most_twice_the_error_of_the_reference(inputs, "fused")


@FORM
@pytest.mark.parametrize("which", ["prediction", "ref", "target"])
def test_one_float64_input_makes_all_arithmetic_float64(impl, which):
    inputs = make(2, 1000, torch.float32)
    inputs = replace(inputs, **{which: getattr(inputs, which).double().add(1e-12)})
    found, (truth, _) = outputs(inputs, impl), oracle(inputs)
    assert found["value"].dtype == torch.float64
    torch.testing.assert_close(found["value"], truth["value"], rtol=1e-12, atol=0)
    gradient = truth["gradient"].to(inputs.prediction.dtype)
    last_bit = torch.finfo(gradient.dtype).eps
    torch.testing.assert_close(found["gradient"], gradient, rtol=last_bit, atol=1e-17)


@FORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_the_squared_residual_is_the_difference_from_the_target_to_the_last_bit(impl, dtype):
    squared = make(3, 5000, dtype, with_ref=False)
    found, same = outputs(squared, impl), outputs(replace(squared, ref=squared.target), impl)
    assert torch.equal(found["value"], same["value"])
    torch.testing.assert_close(found["gradient"], same["gradient"], rtol=1e-6, atol=0)


@FORM
def test_the_difference_is_that_of_the_two_squared_residuals(impl):
    inputs = make(3, 5000, torch.float64)
    own = squared_residual(inputs.prediction, inputs.target, impl=impl)
    other = squared_residual(inputs.ref, inputs.target, impl=impl)
    torch.testing.assert_close(value(inputs, impl), own - other, rtol=1e-11, atol=0)


@FORM
def test_a_small_change_survives_where_the_difference_of_two_means_loses_it(impl):
    # ref and target in bfloat16, the prediction ref + about 1e-5 in float32. Measured over 64 rows of 65,536:
    # the largest relative error is 1.5e-7 with this form and 4.6e-3 for two float32 means, 30,000 times that.
    generator = torch.Generator().manual_seed(0)
    target, miss, drift = (torch.randn(64, 65_536, generator=generator) for _ in range(3))
    target, ref = target.bfloat16(), (target + 0.5 * miss).bfloat16()
    prediction = ref.float() + 1e-5 * (drift + miss)
    own, other = ((t.double() - target.double()).square().mean(1) for t in (prediction, ref))
    truth = own - other
    found = residual_difference(prediction, ref, target, impl=impl)
    means = [squared_residual(t, target, impl=impl) for t in (prediction, ref)]
    error, lossy = (((t - truth) / truth).abs().max().item() for t in (found.double(), means[0] - means[1]))
    assert error < 1e-6
    assert lossy > 1000 * error


@FORM
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_at_the_first_step_the_difference_is_exactly_zero_and_its_gradient_is_not(impl, dtype):
    inputs = make(2, 4096, dtype)
    prediction = inputs.prediction.requires_grad_()
    found = residual_difference(prediction, prediction, inputs.target, impl=impl)
    assert found.tolist() == [0.0, 0.0]
    found.sum().backward()
    # 4,096 is a power of two, so only the last rounding to the prediction's dtype is left.
    exact = (prediction.detach().float() - inputs.target.float()) * 2 / 4096
    assert torch.equal(prediction.grad, exact.to(dtype))


@FORM
@WHAT
def test_channels_last_is_read_in_place_and_its_gradient_is_channels_last(impl, with_ref):
    inputs = make(3, (4, 6, 10), torch.bfloat16, with_ref=with_ref)
    plain = outputs(inputs, impl)
    layout = torch.channels_last
    moved = replace(
        inputs,
        prediction=inputs.prediction.to(memory_format=layout),
        ref=None if inputs.ref is None else inputs.ref.to(memory_format=layout),
        target=inputs.target.to(memory_format=layout),
    )
    found = outputs(moved, impl)
    torch.testing.assert_close(found["value"], plain["value"], rtol=2e-6, atol=1e-7)
    assert torch.equal(found["gradient"], plain["gradient"])
    assert found["gradient"].is_contiguous(memory_format=layout)
    rows = list(kernels._rows(moved.prediction, moved.target))
    assert [row.data_ptr() for row in rows] == [moved.prediction.data_ptr(), moved.target.data_ptr()]


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "width_before_height": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every_second_row_of_a_batch": lambda x: x.repeat_interleave(2, 0)[::2],
    "first_channels_of_more": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "every_second_column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
}


@pytest.mark.parametrize("impl", FORMS)
@pytest.mark.parametrize("other", LAYOUTS)
@pytest.mark.parametrize("own", LAYOUTS)
def test_any_two_layouts_give_the_numbers_of_contiguous_tensors(impl, own, other):
    inputs = make(3, (4, 5, 6), torch.float64)
    plain = outputs(inputs, impl)
    prediction = LAYOUTS[own](inputs.prediction).requires_grad_()
    found = residual_difference(
        prediction, LAYOUTS[other](inputs.ref), LAYOUTS[own](inputs.target), impl=impl
    )
    (grad,) = torch.autograd.grad(found, prediction, inputs.upstream)
    torch.testing.assert_close(found.detach(), plain["value"], rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, plain["gradient"], rtol=1e-12, atol=0)


@FORM
def test_one_target_expanded_to_all_rows_is_not_copied(impl):
    inputs = make(3, (4, 5, 6), torch.float64)
    shared = inputs.target[:1].expand(3, -1, -1, -1)
    found = value(replace(inputs, target=shared), impl)
    torch.testing.assert_close(found, value(replace(inputs, target=shared.clone()), impl))
    _, row = kernels._rows(inputs.prediction, shared)
    assert row.data_ptr() == shared.data_ptr()
    assert row.stride() == (0, 1)


@FORM
def test_a_vector_is_one_number_a_row(impl):
    found = squared_residual(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0]), impl=impl)
    assert found.tolist() == [4.0, 0.0]


@FORM
@WHAT
def test_gradcheck_in_float64(impl, with_ref, small_tiles):
    inputs = make(3, (2, 3), torch.float64, with_ref=with_ref)
    assert torch.autograd.gradcheck(
        lambda p: value(replace(inputs, prediction=p), impl), (inputs.prediction.requires_grad_(),)
    )


@FORM
def test_ref_is_a_constant(impl):
    inputs = make(2, 10, torch.float32)
    found = residual_difference(inputs.prediction, inputs.ref.requires_grad_(), inputs.target, impl=impl)
    assert not found.requires_grad


def test_a_second_backward_gives_the_same_gradient_and_two_runs_the_same_bits():
    inputs = make(3, 200_000, torch.bfloat16)
    prediction = inputs.prediction.requires_grad_()
    found = value(inputs, "fused")
    upstream = inputs.upstream.float()
    first = torch.autograd.grad(found, prediction, upstream, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(found, prediction, upstream)[0])
    assert torch.equal(found, value(inputs, "fused"))


def test_fused_cannot_be_differentiated_twice_and_says_so():
    prediction = torch.randn(2, 5, requires_grad=True)
    found = squared_residual(prediction, torch.zeros(2, 5), impl="fused").square().sum()
    (grad,) = torch.autograd.grad(found, prediction, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@WHAT
def test_fused_saves_prediction_and_target_alone(with_ref):
    inputs = make(3, 1000, torch.bfloat16, with_ref=with_ref)
    inputs.prediction.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        value(inputs, "fused")
    assert saved == [inputs.prediction.data_ptr(), inputs.target.data_ptr()]


@WHAT
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_fused_makes_no_temporary_larger_than_a_tile(dtype, with_ref):
    inputs = make(2, 200_000, dtype, with_ref=with_ref)
    prediction, upstream = inputs.prediction.requires_grad_(), inputs.upstream.float()
    with Traffic() as forward:
        found = value(inputs, "fused")
    with Traffic() as backward:
        (grad,) = torch.autograd.grad(found, prediction, upstream)
    assert forward.largest == fused._CPU_TILE
    # The gradient itself, in the prediction's dtype.
    assert backward.largest == grad.numel() == 400_000
    assert grad.dtype == dtype
    with Traffic() as plain:
        value(inputs, "reference")
    assert plain.largest == 400_000


@FORM
def test_without_grad_nothing_is_recorded(impl):
    inputs = make(2, 100, torch.bfloat16)
    inputs.prediction.requires_grad_()
    with torch.no_grad():
        found = value(inputs, impl)
    assert not found.requires_grad
    assert torch.equal(found, value(inputs, impl))


@FORM
@WHAT
def test_autocast_changes_nothing(impl, with_ref):
    inputs = make(2, 1000, torch.float32, with_ref=with_ref)
    plain = outputs(inputs, impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = outputs(inputs, impl)
    assert cast["value"].dtype == torch.float32
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


def test_auto_logs_its_choice_once(caplog):
    kernels._announce.cache_clear()
    inputs = make(3, 10, torch.float64)
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            value(inputs, "auto")
    assert [r.message.split(" (")[0] for r in caplog.records] == ["residuals on cpu run the fused form"]


def test_impl_triton_on_a_cpu_tensor_says_why_it_cannot_run():
    pytest.importorskip("triton", reason="triton is not installed")
    with pytest.raises(ValueError, match="needs a CUDA or ROCm device, and prediction is on cpu"):
        value(make(3, 10, torch.float32), "triton")


def test_impl_triton_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(kernels, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'triton' cannot run: the package triton is not installed"):
        value(make(3, 10, torch.float32), "triton")


def test_importing_and_running_does_not_import_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from triptych.modalities.diffusion.kernels import squared_residual\n"
        "print(squared_residual(torch.ones(1, 3), torch.zeros(1, 3)).item())"
    )
    env = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == 1.0


def _wrong(**changes):
    given = {name: torch.zeros(2, 3) for name in ("prediction", "ref", "target")}
    return {**given, **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_wrong(impl="chunked"), "impl is 'chunked'; valid: auto, reference, fused, triton"),
        (
            _wrong(ref=torch.zeros(3, 2)),
            r"prediction \[2, 3\], ref \[3, 2\], target \[2, 3\]; valid: one shape",
        ),
        (_wrong(target=torch.zeros(3)), r"target \[3\]; valid: one shape \[N, ...\] for prediction, ref and"),
        (_wrong(target=torch.zeros(2, 3).requires_grad_()), "target requires grad; valid: a constant"),
        (_wrong(ref=torch.zeros(2, 3).long()), "are torch.float32, torch.int64, torch.float32; valid: bfl"),
        (_wrong(ref=torch.zeros(2, 3).to(torch.float8_e4m3fn)), "float8_e4m3fn, torch.float32; valid: bfl"),
        (_wrong(ref=torch.zeros(2, 3, device="meta")), r"are on \['cpu', 'meta'\]; valid: all on one device"),
        (
            {name: torch.zeros(2, 0, 3) for name in ("prediction", "ref", "target")},
            r"prediction is \[2, 0, 3\], whose rows hold no number; valid: at least one a row",
        ),
        (
            {name: torch.zeros(()) for name in ("prediction", "ref", "target")},
            r"prediction \[\], ref \[\], target \[\]; valid: one shape \[N, ...\]",
        ),
    ],
    ids=lambda argument: argument[:24] if isinstance(argument, str) else "",
)
def test_a_wrong_argument_is_named_with_what_is_valid(arguments, message):
    with pytest.raises(ValueError, match=message):
        residual_difference(**arguments)


def test_the_squared_residual_checks_its_own_two_inputs():
    with pytest.raises(
        ValueError, match=r"prediction \[2\], target \[3\]; valid: .* for prediction and target"
    ):
        squared_residual(torch.zeros(2), torch.zeros(3))
