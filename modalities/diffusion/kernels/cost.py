"""Bytes moved by each form of the residuals, forward and backward, against the least possible."""

from typing import Literal

import torch

from triptych.modalities.diffusion.kernels.reference import accumulation_dtype

# What the Triton form gives to a program: blocks of BLOCK numbers, of one row, so that about PROGRAMS of them
# run: 16 on each of the 132 units of an H100.
BLOCK, PROGRAMS = 1024, 2048

FORMS = ("reference", "fused", "triton")
SDXL_SHAPE = {"num_rows": 2, "row_size": 4 * 128 * 128, "dtype": torch.bfloat16}


def num_splits(num_rows: int, row_size: int) -> int:
    """Programs of the Triton forward pass a row: one a block, or fewer with many rows."""
    blocks = -(-row_size // BLOCK)
    wanted = -(-PROGRAMS // max(num_rows, 1))
    return -(-blocks // -(-blocks // min(blocks, wanted)))


def bytes_moved(
    num_rows: int,
    row_size: int,
    dtype: torch.dtype,
    impl: str,
    *,
    what: Literal["difference", "squared"] = "difference",
) -> dict[str, int]:
    """{"least": bytes, "moved": bytes} of one forward and backward pass, all inputs in `dtype`.

    least: forward every input is read and one number a row written; backward that number's gradient,
    prediction and target are read and the prediction's gradient written. `what` "squared" has no ref to read.
    moved: what the form's operators read and write if no cache holds a tensor from one to the next, so an
    upper bound: the tiles of "fused" are small enough for a cache. Raises ValueError for an `impl` other than
    reference, fused and triton, and for a `what` other than difference and squared.
    """
    if what not in ("difference", "squared"):
        raise ValueError(f"what is {what!r}; valid: difference, squared")
    squared = what == "squared"
    item, wide = dtype.itemsize, accumulation_dtype(dtype).itemsize
    per_row = 2 * num_rows * wide
    least = num_rows * row_size * item * (5 if squared else 6) + per_row
    if impl == "triton":
        # The partial sums are written and read, the sum of a row read and written again to divide it.
        partial = 2 * num_rows * num_splits(num_rows, row_size) * wide
        return {"least": least, "moved": least + partial + per_row}
    cast = item + wide if item < wide else 0
    passes = {
        # Casts; differences, product and mean; and what autograd does for each of them.
        ("reference", True): (2 * cast + 6 * wide) + (8 * wide + cast),
        ("reference", False): (3 * cast + 15 * wide) + (17 * wide + cast),
        # Tiles: cast prediction; differences, product and sum; then cast, difference and product.
        ("fused", True): (cast + 5 * wide + item) + (cast + 3 * wide + 2 * item),
        ("fused", False): (cast + 11 * wide + 2 * item) + (cast + 3 * wide + 2 * item),
    }
    if (impl, squared) not in passes:
        raise ValueError(f"impl is {impl!r}; valid: {', '.join(FORMS)}")
    return {"least": least, "moved": num_rows * row_size * passes[impl, squared] + per_row}


def sdxl_section() -> dict[str, float]:
    """moved / least of every form for one pair of SDXL latents at 1024 x 1024 in bfloat16."""
    found = {form: bytes_moved(**SDXL_SHAPE, impl=form) for form in FORMS}
    return {form: bytes["moved"] / bytes["least"] for form, bytes in found.items()}
