import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from triptych.modalities.recsys.kernels import Cost, chunked, reference, session_costs

FORMS = {"reference": reference.logps, "chunked": chunked.logps}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


class Traffic(TorchDispatchMode):
    """Bytes that operators read and write of tensors of more than `small` numbers.

    Of a tensor that is indexed only what is picked counts.
    """

    def __init__(self, small):
        super().__init__()
        self.small, self.num_bytes = small, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.__name__
        aliases = [argument.alias_info for argument in func._schema.arguments]
        if "empty" in name or any(alias is not None and not alias.is_write for alias in aliases):
            return result
        overwritten = name.startswith(("copy_", "fill_", "zero_", "new_", "zeros_like"))
        tensors = tensors_of((args[overwritten:], kwargs)) + tensors_of(result)
        if name.startswith(("gather", "scatter")):
            tensors = [tensor for tensor in tensors if tensor.ndim < 2 or tensor.shape[1] == 1]
        self.num_bytes += sum(
            tensor.numel() * tensor.itemsize for tensor in tensors if tensor.numel() > self.small
        )
        return result


def tensors_of(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def run(impl, num_items, sizes, width, dtype, *, trainable_heads, mode):
    """What `mode` counts of the forward pass, and of the backward pass."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_items, len(sizes), width, generator=generator).to(dtype).requires_grad_()
    weights = [torch.randn(k, width, generator=generator).to(dtype) for k in sizes]
    weights = [weight.requires_grad_(trainable_heads) for weight in weights]
    codes = torch.stack([torch.randint(k, (num_items,), generator=generator) for k in sizes])
    with mode() as forward:
        logp = FORMS[impl](hidden, weights, codes)
    wanted = [hidden, *weights] if trainable_heads else [hidden]
    upstream = torch.ones_like(logp)
    with mode() as backward:
        torch.autograd.grad(logp, wanted, upstream)
    return forward, backward


def flop_counter():
    """With the in-place product, which PyTorch's own counter leaves out."""
    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}
    return FlopCounterMode(display=False, custom_mapping=in_place)


def costs(*shape, **options):
    found = session_costs(*shape, **options)
    return found["forward"], found["backward"]


def test_least_of_a_hand_worked_case():
    # 2 items of one code, 5 codes, width 3, float32. Hidden 24, weight 60, codes 16, log-probs 8; the
    # backward pass reads the upstream gradient (8) in their place and writes gradients of 24 and 60.
    # A product is 2 x 2 x 5 x 3 = 60 FLOPs: one forward, two backward.
    forward, backward = costs(2, [5], 3, torch.float32, "least")
    assert forward == Cost(bytes=24 + 60 + 16 + 8, flops=60)
    assert backward == Cost(bytes=108 + 24 + 60, flops=120)
    frozen = costs(2, [5], 3, torch.float32, "least", trainable_heads=False)
    assert frozen == (forward, Cost(bytes=108 + 24, flops=60))


def test_reference_of_a_hand_worked_case():
    # Logits are 40 bytes. Forward: hidden filled (24 + 24), read with the weight (24 + 60), logits written,
    # read, log-softmax written; numbers 24.
    forward, backward = costs(2, [5], 3, torch.float32, "reference")
    assert forward == Cost(bytes=3 * 24 + 60 + 3 * 40 + 24, flops=60)
    # Backward: zeros, log-softmax 3 and two products: 6 logits; weight read and its gradient written; hidden
    # read once, its gradient written, filled (2) and stacked (2).
    assert backward == Cost(bytes=6 * 40 + 2 * 60 + 6 * 24 + 24, flops=120)


def test_triton_of_a_hand_worked_case():
    # 65 positions of 130 codes, width 3, bfloat16: hidden 390 bytes, weight 780; 2 blocks of positions read
    # the weight, 3 of codes the hidden states. Forward writes 4 float32 a position and reads its code.
    forward, backward = costs(65, [130], 3, torch.bfloat16, "triton", trainable_heads=False)
    product = 2 * 65 * 130 * 3
    assert forward == Cost(bytes=2 * 780 + 3 * 390 + 65 * (16 + 8), flops=product)
    # The same blocks again, logits' gradient of 16,900 bytes written and read; hidden filled (2), the zeros
    # of its gradient, the product and its copy (2); the weight read; numbers.
    filled, grad = 2 * 390, 4 * 390
    blocks = 2 * 780 + 3 * 390
    assert backward == Cost(bytes=blocks + 2 * 16_900 + filled + grad + 780 + 65 * 12, flops=2 * product)


def test_levels_add_up():
    each = [session_costs(10, [k], 8, torch.float32, "chunked") for k in (7, 300)]
    both = session_costs(10, [7, 300], 8, torch.float32, "chunked")
    assert both == {name: each[0][name] + each[1][name] for name in ("forward", "backward")}


@pytest.mark.parametrize("trainable_heads", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("impl", FORMS)
def test_flops_are_those_of_the_products_that_run(impl, trainable_heads):
    shape = (50, [7, 300], 24, torch.float32)
    counted = run(impl, *shape, trainable_heads=trainable_heads, mode=flop_counter)
    expected = costs(*shape, impl, trainable_heads=trainable_heads, device_type="cpu")
    assert [mode.get_total_flops() for mode in counted] == [cost.flops for cost in expected]


@pytest.mark.parametrize("trainable_heads", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", FORMS)
def test_bytes_are_those_that_the_operators_read_and_write(impl, dtype, trainable_heads):
    # 600 codes: chunks of 436 positions on a CPU, two of them. Tensors of a few numbers a position are not
    # counted on either side: 8 bytes of code and one log-prob or gradient in each pass of the model.
    shape = (800, [600, 500], 256, dtype)
    counted = run(impl, *shape, trainable_heads=trainable_heads, mode=lambda: Traffic(small=8 * 800))
    expected = costs(*shape, impl, trainable_heads=trainable_heads, device_type="cpu")
    numbers = 2 * 800 * (8 + max(dtype.itemsize, 4))
    assert [mode.num_bytes + numbers for mode in counted] == [cost.bytes for cost in expected]


@pytest.mark.parametrize("width", [64, 128, 256])
def test_triton_against_the_reference_where_no_cache_helps(width):
    # 512 sessions of 5 items, three codebooks of 256, bfloat16. A logit costs the reference's forward pass 16
    # bytes (product 2, cast 2 + 4, log-softmax 4 + 4) and its part of the hidden states, three times over,
    # 6 width / 256. Blocks of 64 x 64 read 2 width / 64 of each input a logit.
    shape = (512 * 5, [256] * 3, width, torch.bfloat16)
    triton, plain = costs(*shape, "triton"), costs(*shape, "reference")
    expected = (width / 16) / (16 + 6 * width / 256)
    assert triton[0].bytes / plain[0].bytes == pytest.approx(expected, rel=0.03)
    assert sum(triton, Cost(0, 0)).bytes < sum(plain, Cost(0, 0)).bytes
    assert 3 * sum(triton, Cost(0, 0)).flops == 4 * sum(plain, Cost(0, 0)).flops


@pytest.mark.parametrize("impl", ["reference", "chunked", "triton"])
def test_no_form_moves_less_than_the_least(impl):
    for width in (8, 128, 1024):
        for dtype in (torch.bfloat16, torch.float32):
            shape = (1000, [256, 5], width, dtype)
            for least, found in zip(costs(*shape, "least"), costs(*shape, impl), strict=True):
                assert least.bytes < found.bytes
                assert least.flops <= found.flops


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match="impl is 'auto'; valid: least, reference, chunked, triton"):
        session_costs(1, [1], 1, torch.float32, "auto")
