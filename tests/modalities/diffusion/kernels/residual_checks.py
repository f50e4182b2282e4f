"""What the tests of the residuals share: inputs, a float64 oracle, the 2x rule, a count of bytes."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from triptych.modalities.diffusion.kernels import residual_difference, squared_residual

SIZES = (1, 63, 100, 1000, 65_536)


@dataclass(frozen=True, slots=True)
class Inputs:
    """`ref` None asks for the squared residual."""

    prediction: Tensor
    ref: Tensor | None
    target: Tensor
    upstream: Tensor


def make(
    num: int,
    size: int | tuple[int, ...],
    dtype: torch.dtype,
    *,
    ref: torch.dtype | None = None,
    target: torch.dtype | None = None,
    with_ref: bool = True,
    device: str = "cpu",
) -> Inputs:
    """A prediction near its reference, both about one unit from the target, as while training."""
    shape = (num, size) if isinstance(size, int) else (num, *size)
    generator = torch.Generator().manual_seed(31 * num + shape[-1])
    noise, drift, miss = (torch.randn(shape, generator=generator) for _ in range(3))
    near = noise + 0.7 * miss
    upstream = torch.randn(num, generator=generator, dtype=torch.float64).add(2)
    return Inputs(
        prediction=(near + 0.05 * drift).to(device, dtype),
        ref=near.to(device, ref or dtype) if with_ref else None,
        target=noise.to(device, target or dtype),
        upstream=upstream.to(device),
    )


def value(inputs: Inputs, impl: str) -> Tensor:
    if inputs.ref is None:
        return squared_residual(inputs.prediction, inputs.target, impl=impl)
    return residual_difference(inputs.prediction, inputs.ref, inputs.target, impl=impl)


def outputs(inputs: Inputs, impl: str) -> dict[str, Tensor]:
    """The value and the gradient of sum(upstream * value)."""
    leaf = inputs.prediction.detach().clone().requires_grad_()
    found = value(replace(inputs, prediction=leaf), impl)
    (grad,) = torch.autograd.grad(found, leaf, inputs.upstream.to(found.dtype))
    return {"value": found.detach(), "gradient": grad}


def oracle(inputs: Inputs) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The same in float64 from the written formula, without the package, and how large the terms are."""
    prediction, target = inputs.prediction.double(), inputs.target.double()
    ref = target if inputs.ref is None else inputs.ref.double()
    terms = ((prediction - ref) * (prediction + ref - 2 * target)).flatten(1)
    per_row = inputs.upstream.view(-1, *[1] * (prediction.ndim - 1))
    gradient = 2 * (prediction - target) * per_row / max(1, terms.shape[1])
    truth = {"value": terms.mean(1), "gradient": gradient}
    sizes = {"value": terms.abs().mean(1), "gradient": gradient.abs()}
    return truth, {name: size.max().item() if size.numel() else 0.0 for name, size in sizes.items()}


def assert_at_most_twice_the_error_of_the_reference(inputs: Inputs, impl: str) -> None:
    """The 2x rule: the largest error against float64 is at most twice that of the reference form."""
    truth, sizes = oracle(inputs)
    plain, fast = outputs(inputs, "reference"), outputs(inputs, impl)
    for name, found in fast.items():
        assert found.dtype == plain[name].dtype
        assert found.shape == truth[name].shape
        if found.numel() == 0:
            continue
        error, allowed = ((t[name].double() - truth[name]).abs().max().item() for t in (fast, plain))
        # Two roundings in float32 of numbers as large as the terms: a reference can miss them by luck.
        limit = 2 * allowed + 2.4e-7 * sizes[name]
        assert error <= limit, f"{name}: error {error:.2e}, reference {allowed:.2e}"


class Traffic(TorchDispatchMode):
    """Bytes the operators read and write, forward and backward, and the numel of the largest new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        aliases = [argument.alias_info for argument in func._schema.arguments]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return result
        # A new_zeros reads nothing of its first argument, nor does what overwrites it.
        overwritten = func.__name__.startswith(("copy_", "fill_", "new_"))
        read = _tensors((args[overwritten:], {k: v for k, v in kwargs.items() if k != "out"}))
        written = _tensors(result)
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        fresh = [t.numel() for t in written if t.untyped_storage().data_ptr() not in given]
        self.largest = max([self.largest, *fresh])
        if "empty" not in func.__name__:
            self.num_bytes += sum(map(_num_bytes, [*read, *written]))
        return result


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _num_bytes(tensor: Tensor) -> int:
    """Of the memory it lies in: an expanded tensor is read once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())
