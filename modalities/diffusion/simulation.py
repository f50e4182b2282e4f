"""What a training step costs, found by running it without computing: FLOPs and peak memory.

The model is built with fake tensors, which have shapes and dtypes but no values; every operation of a real
step is then dispatched, its FLOPs counted and its memory followed from allocation to release.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from triptych.modalities.diffusion.architectures import (
    Architecture,
    build_denoiser,
    build_text_encoder,
    build_vae,
    inputs_of,
)
from triptych.modalities.diffusion.model import DTYPES, LoraConfig, ModelConfig, adapt


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a denoiser is trained. rows: images of one micro-batch on one device.

    lora: null trains every weight. dtype: of the base's weights. autocast: bfloat16, as optim.precision=bf16.
    foreach: AdamW's update of all weights at once, PyTorch's default on GPUs, which takes another copy of the
    trained weights for a moment.
    """

    lora: LoraConfig | None
    dtype: Literal["float32", "bfloat16"]
    rows: int
    resolution: int
    autocast: bool = False
    gradient_checkpointing: bool = False
    foreach: bool = True

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"--micro_batch_size={self.rows} must be at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One micro-batch with its update. FLOPs are of one image; sizes in bytes.

    policy: forward, backward and what checkpointing repeats. trained: number of weights that are.
    activations: what the forward pass leaves for the backward pass. peak: the most that is alive at once, of
    policy, gradients, AdamW's moments, activations and temporaries; no allocator's or library's own.
    """

    policy: float
    weights: int
    trained: int
    gradients: int
    moments: int
    activations: int
    peak: int


_KEPT: dict[str, Any] = {}


def _once(make: Callable[[], Any], *key: Any) -> Any:
    """What `make` returns, kept for the process: a large model takes some ten seconds."""
    name = json.dumps(key, default=asdict)
    if name not in _KEPT:
        _KEPT[name] = make()
    return _KEPT[name]


def simulate(made: Architecture, setup: Setup) -> Step:
    """The costs of a step."""
    return _once(partial(_simulate, made, setup), "step", made, setup)


def _simulate(made: Architecture, setup: Setup) -> Step:
    denoiser = _adapted(made, setup)
    with FakeTensorMode():
        _materialize(denoiser)
        optimizer = _warm_optimizer(denoiser, setup)
        moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
        sizes = {"rows": setup.rows, "resolution": setup.resolution}
        inputs = inputs_of(made, **sizes, dtype=DTYPES[setup.dtype], device="cpu")
        live = Watch()
        live.follow(tree_iter([list(denoiser.parameters()), list(denoiser.buffers()), moments, inputs]))
        before = live.now
        with live:
            with torch.autocast("cpu", torch.bfloat16, enabled=setup.autocast):
                prediction = denoiser(**inputs, return_dict=False)[0]
            activations = live.now - before
            prediction.float().square().mean().backward()
            del prediction
            optimizer.step()
        trained = [p for p in denoiser.parameters() if p.requires_grad]
        return Step(
            policy=live.flops / setup.rows,
            weights=_bytes(denoiser.parameters()),
            trained=sum(p.numel() for p in trained),
            gradients=_bytes(p.grad for p in trained if p.grad is not None),
            moments=_bytes(moments),
            activations=activations,
            peak=live.peak,
        )


def _adapted(made: Architecture, setup: Setup) -> nn.Module:
    """The model as `adapt` makes it, on the meta device, computing as it would on a GPU."""
    denoiser = build_denoiser(made, DTYPES[setup.dtype])
    config = ModelConfig(
        name_or_path="plan",
        dtype=setup.dtype,
        lora=setup.lora,
        reference="frozen_copy",
        gradient_checkpointing=setup.gradient_checkpointing,
    )
    with torch.device("meta"):
        adapt(denoiser, config)
    if setup.autocast:
        # CUDA's autocast runs normalisation in float32; the CPU's, which is at work here, does not.
        for module in denoiser.modules():
            if isinstance(module, nn.GroupNorm | nn.LayerNorm):
                module.float().register_forward_pre_hook(_in_float32)
    return denoiser.train()


def _in_float32(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].float(), *inputs[1:])


def _materialize(module: nn.Module) -> None:
    """Give a module of the meta device fake tensors of the CPU; inside a FakeTensorMode."""
    memo: dict[int, Tensor] = {}
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            if id(value) not in memo:
                empty = torch.empty(value.shape, dtype=value.dtype)
                memo[id(value)] = nn.Parameter(empty, requires_grad=value.requires_grad)
            part._parameters[name] = memo[id(value)]  # type: ignore[assignment]
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = torch.empty(value.shape, dtype=value.dtype)


def _warm_optimizer(denoiser: nn.Module, setup: Setup) -> torch.optim.Optimizer:
    """AdamW as it is after its first step, with both moments."""
    trained = [p for p in denoiser.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, foreach=setup.foreach)
    for parameter in trained:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(1.0), **moments}
    return optimizer


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(out.shape, query.shape, key.shape, value.shape)


_ATEN = torch.ops.aten
# PyTorch's list lacks the CPU's attention that does not keep its matrix.
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class Watch(TorchDispatchMode):
    """Follows every operation: bytes of all tensors that exist, now and at the most, and FLOPs so far.

    `FlopCounterMode` also counts FLOPs, but its hooks keep tensors alive.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.flops = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def follow(self, values: Iterable[Any]) -> None:
        """Count tensors that were made before, or by an operation; each storage once."""
        for value in values:
            if not isinstance(value, Tensor):
                continue
            storage = value.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known[key] = weakref.ref(storage, partial(self._release, key, size))
                self.now += size
        self.peak = max(self.peak, self.now)

    def _release(self, key: int, size: int, _: Any) -> None:
        del self._known[key]
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := _FORMULAS.get(func.overloadpacket):
            self.flops += formula(*args, **kwargs, out_val=out)
        self.follow(tree_iter(out))
        return out


def forward_flops(made: Architecture, resolution: int) -> float:
    """One image through the denoiser, without gradient."""

    def count() -> float:
        denoiser = build_denoiser(made)
        return _count(partial(denoiser, **inputs_of(made, rows=1, resolution=resolution)))

    return _once(count, "forward", made, resolution)


def encode_flops(made: Architecture, resolution: int) -> float:
    """One image through the VAE's encoder."""
    images = torch.empty(1, 3, resolution, resolution, device="meta")
    return _once(lambda: _count(partial(build_vae(made).encode, images)), "encode", made, resolution)


def text_flops(made: Architecture) -> float:
    """One prompt through every text encoder."""

    def count() -> float:
        calls = ((build_text_encoder(e), (1, e.tokens)) for e in made.text)
        words = {"dtype": torch.long, "device": "meta"}
        return sum(_count(partial(model, torch.zeros(shape, **words))) for model, shape in calls)

    return _once(count, "text", made)


def _count(call: Callable[[], Any]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def encoder_bytes(made: Architecture, *, vae: torch.dtype, text: torch.dtype) -> int:
    """The weights of the VAE and of the text encoders."""
    modules = [build_vae(made, vae), *(build_text_encoder(e, text) for e in made.text)]
    return sum(_bytes(m.parameters()) for m in modules)


def encode_peak(made: Architecture, *, rows: int, resolution: int, dtype: torch.dtype) -> int:
    """Memory that the VAE's encoder takes for a moment, beside its weights."""

    def measure() -> int:
        vae = build_vae(made, dtype)
        with FakeTensorMode(), torch.no_grad():
            _materialize(vae)
            live = Watch()
            with live:
                vae.encode(torch.empty(rows, 3, resolution, resolution, dtype=dtype))
            return live.peak

    return _once(measure, "encode_peak", made, rows, resolution, str(dtype))
