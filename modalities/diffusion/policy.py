"""The policy of a diffusion run: one call for UNets and flow transformers, with a switch for its adapters.

Shapes: N rows of one latent shape, L prompt tokens, D their width, P the width of the pooled prompt, T
vectors of a user, E wide.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triptych.modalities.diffusion.persons import arguments_of
from triptych.training.references import unchanged


@dataclass(frozen=True, slots=True)
class Conditions:
    """What rows see: embeds [N, L, D]; pooled [N, P], time_ids [N, 6] and users [N, T, E], or None.

    time_ids: (original height, original width, top, left, target height, target width) in pixels (SDXL,
    Podell et al. 2023, section 2.2). users: see `persons`.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    users: Tensor | None = None

    def rows(self, index: Tensor) -> Conditions:
        """The conditions of the rows `index`, [M]."""
        return Conditions(*(None if t is None else t[index] for t in self._all()))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Conditions:
        """The conditions on a device."""
        moved = (None if t is None else t.to(device, non_blocking=True) for t in self._all())
        return Conditions(*moved)  # type: ignore[arg-type]

    def _all(self) -> tuple[Tensor | None, ...]:
        return self.embeds, self.pooled, self.time_ids, self.users


class Denoiser(nn.Module):
    """A diffusers UNet or SD3-class transformer. `calls` counts model evaluations, in rows, for tests.

    model: as diffusers made it, with the adapters that `add_adapter` put there.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.calls: list[int] = []
        if getattr(model, "peft_config", None):
            self.adapters = AdapterSwitch(model)

    def forward(
        self, noisy: Sequence[Tensor], times: Sequence[Tensor], conditions: Sequence[Conditions]
    ) -> list[Tensor]:
        """The model's prediction of each stack [N, Z, H, W] of one latent shape; times [N]."""
        return [self._predict(*stack) for stack in zip(noisy, times, conditions, strict=True)]

    def _predict(self, noisy: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        self.calls.append(len(noisy))
        dtype = next(self.model.parameters()).dtype
        embeds = conditions.embeds.to(dtype)
        pooled = None if conditions.pooled is None else conditions.pooled.to(dtype)
        times = times.to(torch.float32)
        persons = arguments_of(self.model, conditions.users)
        if not hasattr(self.model, "conv_in"):
            return self.model(
                hidden_states=noisy.to(dtype),
                timestep=times,
                encoder_hidden_states=embeds,
                pooled_projections=pooled,
                return_dict=False,
            )[0]
        added = None
        if conditions.time_ids is not None and pooled is not None:
            added = {"text_embeds": pooled, "time_ids": conditions.time_ids}
        return self.model(
            noisy.to(dtype),
            times,
            encoder_hidden_states=embeds,
            added_cond_kwargs=added,
            cross_attention_kwargs=persons,
            return_dict=False,
        )[0]


class AdapterSwitch(nn.Module):
    """The adapters of a diffusers model in the terms of a PEFT model, for the references. Has no weights."""

    def __init__(self, model: nn.Module):
        super().__init__()
        # In a tuple, so that the model's weights are not listed a second time.
        self._model = (model,)

    @property
    def model(self) -> Any:
        """The model that has the adapters."""
        return self._model[0]

    @property
    def base_model(self) -> AdapterSwitch:
        """Itself: `set_adapter` takes several names here."""
        return self

    @property
    def peft_config(self) -> dict[str, Any]:
        """Adapter name -> its configuration."""
        return self.model.peft_config

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part in a forward."""
        return list(self.model.active_adapters())

    @property
    def active_adapter(self) -> str:
        """The first of them."""
        return self.active_adapters[0]

    def set_adapter(self, name: str | list[str]) -> None:
        """Let these adapters take part; requires_grad changes with it, so use it inside `unchanged`."""
        self.model.set_adapter(name)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """No adapter inside; on leaving, also by an exception, the same ones and requires_grad as before."""
        active = self.active_adapters
        with unchanged(self.model):
            self.model.disable_adapters()
            try:
                yield
            finally:
                self.model.enable_adapters()
                self.model.set_adapter(active)
