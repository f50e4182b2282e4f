"""A language model decoding token by token: its key-value cache, its mask, its positions.

Shapes: P prompts, T tokens of the longest one, K candidates of each, R = P * K rows, V vocabulary.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from triptych.modalities.llm.kernels.reference import LogitMap, accumulation_dtype
from triptych.modalities.llm.policy import TokenPolicy, logit_options
from triptych.modalities.llm.rollout import pad_left


class Decoder:
    """One model with the cache of the rows that it decodes.

    prefill, fan_out, step ...: a prompt is computed once, whatever number of candidates continues it. `enter`
    switches to the model for the time of one call: adapters off, weights of a snapshot, or nothing.
    """

    def __init__(self, enter: Callable[[], AbstractContextManager[TokenPolicy]]):
        self._enter = enter
        self._cache: Any = None
        self._mask: Tensor | None = None
        self._length: Tensor = torch.empty(0)
        self._width = 0

    def prefill(self, prompts: Sequence[np.ndarray], pad_id: int, device: torch.device, room: int) -> Tensor:
        """Logits after each prompt, [P, V]. room: places for the tokens that will follow."""
        ids_PT, mask_PT = pad_left([p.tolist() for p in prompts], pad_id)
        self._width = ids_PT.shape[1]
        length_P, padded = mask_PT.sum(1), not bool(mask_PT.all())
        positions_PT = (mask_PT.cumsum(1) - 1).clamp(min=0)
        # Without a mask attention runs its fused forms.
        if padded:
            self._mask = functional.pad(mask_PT, (0, room), value=1).to(device)
        self._length = length_P.to(device)
        return self._run(ids_PT.to(device), positions_PT.to(device))

    def fan_out(self, count: int, room: int) -> Decoder:
        """A decoder of `count` rows for each prompt, side by side; this one stays as it is."""
        out = Decoder(self._enter)
        out._cache = copy.copy(self._cache)
        out._cache.layers = [_repeated(layer, count, room) for layer in self._cache.layers]
        out._width, out._length = self._width, self._length.repeat_interleave(count)
        out._mask = None if self._mask is None else self._mask.repeat_interleave(count, 0)
        return out

    def step(self, token_R: Tensor) -> Tensor:
        """Logits after one more token of each row, [R, V]."""
        position_R1 = self._length[:, None]
        self._length, self._width = self._length + 1, self._width + 1
        return self._run(token_R[:, None], position_R1)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, given by index."""
        self._cache.batch_select_indices(rows)
        self._length = self._length[rows]
        self._mask = None if self._mask is None else self._mask[rows]

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        with self._enter() as policy:
            lm = policy.causal_lm
            if self._cache is None:
                self._cache = DynamicCache(config=lm.config)
            hidden = lm.base_model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=None if self._mask is None else self._mask[:, : self._width],
                use_cache=True,
                **{cache_argument(type(lm.base_model)): self._cache},
            ).last_hidden_state[:, -1]
            head = lm.get_output_embeddings()
            raw = functional.linear(hidden, head.weight, getattr(head, "bias", None))
            return LogitMap(**logit_options(lm.config))(raw.to(accumulation_dtype(raw.dtype)))


@cache
def cache_argument(model: type) -> str:
    """What a model's forward calls its key-value cache: 'cache' from transformers 5.24 on, before that
    'past_key_values', and still so in models of other packages.
    """
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _repeated(layer: Any, count: int, room: int) -> Any:
    """A layer's cache with each row `count` times; the layer itself keeps its own."""
    # Layers of other kinds (sliding windows, states) stay small, or have what only they know.
    if type(layer) is DynamicLayer and layer.is_initialized:
        return _RoomyLayer(layer, count, room)
    layer = copy.copy(layer)
    layer.batch_repeat_interleave(count)
    return layer


class _RoomyLayer(DynamicLayer):
    """A full-attention layer's cache with room for the tokens to come.

    The library's own grows by concatenation and copies every key and value at every step.
    """

    def __init__(self, layer: DynamicLayer, repeats: int, room: int):
        super().__init__()
        assert layer.keys is not None
        assert layer.values is not None
        self._used = layer.keys.shape[-2]
        self._keys, self._values = (_with_room(t, repeats, room) for t in (layer.keys, layer.values))
        self.dtype, self.device, self.is_initialized = layer.keys.dtype, layer.keys.device, True
        self._show()

    def _show(self) -> None:
        self.keys, self.values = self._keys[:, :, : self._used], self._values[:, :, : self._used]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new states after the old ones."""
        new = slice(self._used, self._used + key_states.shape[-2])
        self._keys[:, :, new], self._values[:, :, new] = key_states, value_states
        self._used = new.stop
        self._show()
        return self.keys, self.values  # type: ignore[return-value]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices."""
        self._keys, self._values = self._keys[indices], self._values[indices]
        self._show()


def _with_room(states: Tensor, repeats: int, room: int) -> Tensor:
    """Each row `repeats` times, with empty places after its states."""
    batch, heads, used, width = states.shape
    out = states.new_zeros(batch, repeats, heads, used + room, width)
    out[:, :, :, :used] = states[:, None]
    return out.flatten(0, 1)
