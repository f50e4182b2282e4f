import pytest
import torch
from residual_checks import Traffic, make, value

from triptych.modalities.diffusion.kernels import bytes_moved, sdxl_section
from triptych.modalities.diffusion.kernels.cost import num_splits


def test_least_bytes_of_a_hand_worked_case():
    # 2 rows of 5 in bfloat16. Forward: three inputs of 20 bytes, 8 written; backward: 8 read, two inputs and
    # a gradient of 20. The squared residual has one input less.
    assert bytes_moved(2, 5, torch.bfloat16, "reference")["least"] == 60 + 8 + 8 + 40 + 20
    assert bytes_moved(2, 5, torch.bfloat16, "reference", what="squared")["least"] == 136 - 20


def test_triton_moves_the_least_and_the_sums_of_the_rows():
    # One block a row: two partial sums written and read (16), the two results written and read again (16).
    found = bytes_moved(2, 5, torch.bfloat16, "triton")
    assert found["moved"] == found["least"] + 16 + 16


@pytest.mark.parametrize(
    ("num_rows", "row_size", "splits"),
    [(1, 1, 1), (2, 65_536, 64), (2, 65_537, 65), (512, 65_536, 4), (4096, 65_536, 1), (0, 100, 1)],
)
def test_few_rows_are_split_so_that_enough_programs_run(num_rows, row_size, splits):
    # A block is 1,024 numbers and about 2,048 programs are wanted: 512 rows get four each.
    assert num_splits(num_rows, row_size) == splits


@pytest.mark.parametrize("what", ["difference", "squared"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["reference", "fused"])
def test_the_model_counts_what_the_operators_read_and_write(impl, dtype, what):
    inputs = make(3, 150_000, dtype, with_ref=what == "difference")
    prediction = inputs.prediction.requires_grad_()
    with Traffic() as traffic:
        found = value(inputs, impl)
        torch.autograd.grad(found, prediction, inputs.upstream.to(found.dtype))
    # What is left are the tensors of one number a row.
    assert traffic.num_bytes == pytest.approx(
        bytes_moved(3, 150_000, dtype, impl, what=what)["moved"], rel=1e-4
    )


def test_one_sdxl_pair_is_within_a_thousandth_of_the_least_with_triton():
    ratios = sdxl_section()
    assert 1 < ratios["triton"] < 1.001
    assert ratios["triton"] < ratios["fused"] < ratios["reference"]
    # In bfloat16 76 and 152 bytes a number, where 12 are the least.
    assert ratios["fused"] == pytest.approx(76 / 12, rel=1e-3)
    assert ratios["reference"] == pytest.approx(152 / 12, rel=1e-3)


def test_an_unknown_form_or_quantity_is_named():
    with pytest.raises(ValueError, match="impl is 'auto'; valid: reference, fused, triton"):
        bytes_moved(1, 1, torch.float32, "auto")
    with pytest.raises(ValueError, match="what is 'sum'; valid: difference, squared"):
        bytes_moved(1, 1, torch.float32, "fused", what="sum")
