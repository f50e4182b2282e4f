"""Bytes moved and FLOPs of each form of the log-probs, forward and backward, against the least possible.

Letters: p positions of a level, k codes of a level, d width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from triptych.modalities.recsys.kernels.chunked import chunk_rows
from triptych.modalities.recsys.kernels.reference import accumulation_dtype

# Positions and codes of one block of the Triton kernels.
ROWS, COLS = 64, 64

FORMS = ("least", "reference", "chunked", "triton")


@dataclass(frozen=True, slots=True)
class Cost:
    """bytes: read and written. flops: of matrix products, 2 for a multiplication and an addition."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """One level: p, k, d, and the bytes of a number as given, as summed and as the products take it."""

    p: int
    k: int
    d: int
    item: int
    wide: int
    taken: int
    step: int
    trainable: bool

    @property
    def numbers(self) -> int:
        """Codes read, and one number a position written or read."""
        return self.p * (8 + self.wide)

    @property
    def taking(self) -> int:
        """Bytes of casting a number for the products."""
        return 0 if self.taken == self.item else self.item + self.taken


def session_costs(
    num_items: int,
    sizes: Sequence[int],
    width: int,
    dtype: torch.dtype,
    impl: str,
    *,
    trainable_heads: bool = True,
    device_type: str = "cuda",
) -> dict[str, Cost]:
    """{"forward": Cost, "backward": Cost} of `num_items` items, each with a code on every level, none absent.

    least: each pass reads its inputs and writes its outputs once and keeps numbers a position alone; FLOPs of
    the products that no form can leave out. reference, chunked, triton: what the form's operators read and
    write if no cache holds a tensor from one to the next (or a block, from one program to the next), so an
    upper bound; of tensors of a number a position only codes, log-probs and their gradient count. Products
    with the empty part of a block do not count. Raises ValueError for another `impl`.
    """
    if impl not in FORMS:
        raise ValueError(f"impl is {impl!r}; valid: {', '.join(FORMS)}")
    item = dtype.itemsize
    passes = {"least": _least, "reference": _reference, "chunked": _chunked, "triton": _triton}[impl]
    # The forms that keep no logits make them again.
    products = 1 + trainable_heads + (impl in ("chunked", "triton"))
    forward, backward = Cost(0, 0), Cost(0, 0)
    for num_codes in sizes:
        level = _Level(
            p=num_items,
            k=num_codes,
            d=width,
            item=item,
            wide=accumulation_dtype(dtype).itemsize,
            taken=item if device_type == "cuda" else max(item, torch.float32.itemsize),
            step=chunk_rows(num_codes, device_type),
            trainable=trainable_heads,
        )
        product = 2 * num_items * num_codes * width
        bytes_forward, bytes_backward = passes(level)
        forward += Cost(bytes_forward, product)
        backward += Cost(bytes_backward, products * product)
    return {"forward": forward, "backward": backward}


def _least(x: _Level) -> tuple[int, int]:
    inputs = (x.p + x.k) * x.d * x.item + x.numbers
    return inputs, inputs + (x.p + x.trainable * x.k) * x.d * x.item


def _reference(x: _Level) -> tuple[int, int]:
    hidden, weight, logits = x.p * x.d * x.item, x.k * x.d * x.item, x.p * x.k
    cast = logits * (x.item + x.wide) if x.item < x.wide else 0
    # Absent positions filled (2), product, cast, log-softmax (2).
    forward = 3 * hidden + weight + logits * x.item + cast + 2 * logits * x.wide
    # Zeros of the gather, log-softmax (3), cast, product; absent positions (2); levels stacked (2).
    backward = 4 * logits * x.wide + cast + logits * x.item + weight + hidden + 4 * hidden
    head = (logits * x.item + hidden + weight) if x.trainable else 0
    return forward + x.numbers, backward + head + x.numbers


def _chunked(x: _Level) -> tuple[int, int]:
    inputs, logits = x.p * x.d * x.taken, x.p * x.k * x.wide
    heads = -(-x.p // x.step) * x.k * x.d * x.taken
    # Product, peak, then difference, exponential (2 each) and sum.
    forward = (x.p + x.k) * x.d * x.taking + inputs + heads + 7 * logits + x.numbers
    # Product, then difference, exponential and weight (2 each).
    return forward, inputs + heads + 7 * logits + _products(x) + _tile_cast(x)


def _triton(x: _Level) -> tuple[int, int]:
    hidden, weight = x.p * x.d * x.item, x.k * x.d * x.item
    col_blocks = -(-x.k // COLS)
    forward = -(-x.p // ROWS) * weight + col_blocks * hidden + 4 * x.p * x.wide + 8 * x.p
    chunks, rest = divmod(x.p, x.step)
    row_blocks = chunks * -(-x.step // ROWS) + -(-rest // ROWS)
    # The gradient of the logits is written once, in the dtype of the inputs.
    return forward, row_blocks * weight + col_blocks * hidden + x.p * x.k * x.item + _products(x)


def _tile_cast(x: _Level) -> int:
    return 0 if x.taken == x.wide else x.p * x.k * (x.taken + x.wide)


def _products(x: _Level) -> int:
    """What both forms do besides making the gradient of the logits: the two products with it."""
    chunks = -(-x.p // x.step)
    inputs, tile = x.p * x.d * x.taken, x.p * x.k * x.taken
    heads, grads = x.k * x.d * x.taken, x.k * x.d * x.wide
    # Zeros of the gradient, hidden states cast, absent positions filled (2).
    total = x.p * x.d * x.item + x.p * x.d * x.taking + 2 * inputs + x.numbers
    # The heads cast twice; product, its cast, and its copy into the gradient (2).
    total += 2 * x.k * x.d * x.taking + tile + chunks * heads + inputs
    total += x.p * x.d * x.taking + 2 * x.p * x.d * x.item
    if x.trainable:
        # Zeros, then the sum read and written by a product, or by an addition after one.
        sums = 2 if x.taken == x.wide else 4
        total += grads + tile + inputs + sums * chunks * grads
        total += 0 if x.item == x.wide else x.k * x.d * (x.item + x.wide)
    return total
