"""Pictures to a person's own taste: a UNet that also attends to vectors of the user (PPD).

Every cross-attention becomes Z' = Attn(Q, K, V) + scale Attn(Q, u W'_k, u W'_v) (Dang et al. 2025, arXiv
2501.06655), decoupled as in IP-Adapter (Ye et al. 2023). Only W'_k and W'_v train; W'_v starts at 0, so the
first step's policy is the base bit for bit. W' have no bias, so a user of zeros is the base for ever: it is
the reference, and a dropped user teaches nothing. The user is a property of the model, not of the prompt:
both halves of classifier-free guidance see them.

With diffusers alone, after `load_persons(pipe.unet, folder)` (`export`):

    users = Users.load(Path("users.safetensors"))
    with drawn_for(pipe, mixed(users["ann"], users["bob"], 0.3)):
        image = pipe("a lighthouse").images[0]

Shapes: N rows, T vectors a user, D their width. One vector has nothing to be chosen from, so of T = 1 W'_k
has no effect.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from triptych.training.references import HasTerms, unchanged, unwrapped


@dataclass(frozen=True, kw_only=True)
class PersonsConfig:
    """Attention to the user. users: a safetensors file, user id -> [D] or [T, D]; see `Users`.

    The ids are the records' groups; contexts of anybody else are left out. scale: of the added attention.
    dropout: probability that a context is learnt for nobody, with zeros; as these are the base whatever is
    learnt, it costs data and regularises nothing else. shown: whom the run's pictures are drawn for; null is
    the first held-out person.
    """

    users: str
    scale: float = 1.0
    dropout: float = 0.0
    shown: str | None = None

    def __post_init__(self) -> None:
        if not self.scale > 0:
            raise ValueError(f"model.persons.scale={self.scale} must be positive")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.persons.dropout={self.dropout} must be in [0, 1)")


@dataclass(frozen=True, slots=True)
class Users:
    """Vectors of every user, id -> [T, D] float32; T and D are the same for all.

    Not one-hot: those say nothing of a new user. ValueError for none, and for vectors that are not finite or
    not alike.
    """

    vectors: dict[str, Tensor]

    def __post_init__(self) -> None:
        if not self.vectors:
            raise ValueError("a table of users needs at least one")
        first = next(iter(self.vectors.values())).shape
        for name, value in self.vectors.items():
            if value.ndim != 2 or value.shape != first or not value.numel():
                raise ValueError(
                    f"user '{name}' has vectors of shape {tuple(value.shape)}, the first one {tuple(first)}; "
                    "all need the same [T, D]"
                )
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"the vectors of user '{name}' are not finite")

    @classmethod
    def load(cls, path: Path) -> Users:
        """The table of a safetensors file, whose tensors [D] or [T, D] have the ids as names."""
        try:
            found = load_file(path)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is no table of users in safetensors: {reason}") from error
        try:
            return cls({name: torch.atleast_2d(value).float() for name, value in found.items()})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: Path) -> None:
        """Write the table as `load` reads it."""
        if "__metadata__" in self.vectors:
            raise ValueError("no user can be called __metadata__ in a safetensors file")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: value.contiguous() for name, value in self.vectors.items()}, path)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.vectors:
            raise ValueError(f"no user '{name}' among the {len(self)} of the table")
        return self.vectors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.vectors

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """D."""
        return self.nobody.shape[1]

    @property
    def nobody(self) -> Tensor:
        """Zeros, [T, D]: the base."""
        return torch.zeros_like(next(iter(self.vectors.values())))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of ids and vectors."""
        digest = hashlib.sha256()
        for name, value in sorted(self.vectors.items()):
            digest.update(f"{name}\x1f{tuple(value.shape)}\x1f".encode())
            digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()


def user_embeddings(features: Mapping[str, Tensor]) -> Users:
    """A user's vector from a few of their pairs: the mean of preferred less dispreferred, with mean square 1.

    features: id -> [n, 2, D] of any frozen model of pictures, the preferred one first; the paper has n = 4.
    T = 1. ValueError for a user whose differences cancel.
    """
    return Users({name: _unit(name, pairs.float().diff(dim=1).mean(0)) for name, pairs in features.items()})


def pair_vectors(features: Mapping[str, Tensor]) -> Users:
    """As `user_embeddings`, with a vector of every pair, T = n, that the picture can attend to or not."""
    return Users(
        {name: _unit(name, pairs.float().diff(dim=1).squeeze(1)) for name, pairs in features.items()}
    )


def _unit(name: str, difference: Tensor) -> Tensor:
    """Vectors from dispreferred less preferred, [T, D]. Scaled alone, so that a new user's is alike."""
    size = difference.square().mean().sqrt()
    if not float(size) > 0:
        raise ValueError(f"the pairs of user '{name}' differ in no feature on average")
    return -difference / size


def mixed(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Between two users: (1 - share) first + share second."""
    return torch.lerp(first, second, share)


class UserSwitch:
    """What a model's user attentions share: their scale, whether they are on, and who is drawn for.

    shown: vectors [T, D] of every row whose call names no user; None is the base.
    """

    def __init__(self, scale: float):
        self.scale, self.on = scale, True
        self.shown: Tensor | None = None

    def users(self, given: Tensor | None, rows: Tensor) -> Tensor | None:
        """Vectors of every row, [N, T, D], on the rows' device; None where there is nothing to attend to."""
        if not self.on:
            return None
        if given is None and self.shown is not None:
            given = self.shown.expand(len(rows), *self.shown.shape)
        return None if given is None else given.to(rows.device)


class UserAttention(nn.Module):
    """Attention processor of a cross-attention: diffusers' own, and beside it attention to the user."""

    def __init__(self, attn: Any, width: int, switch: UserSwitch, generator: torch.Generator | None = None):
        super().__init__()
        self.switch = switch
        device, size = attn.to_k.weight.device, attn.to_k.out_features
        # In float32 whatever the base's dtype, as adapters are.
        options: Any = {"bias": False, "device": device, "dtype": torch.float32}
        self.to_k, self.to_v = nn.Linear(width, size, **options), nn.Linear(width, size, **options)
        with torch.no_grad():
            start = torch.randn((size, width), generator=generator) / width**0.5
            self.to_k.weight.copy_(start)
            self.to_v.weight.zero_()

    # diffusers looks at this signature for what it may pass on, so it cannot be `forward`.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """Z'. ip_hidden_states: vectors of the rows' users, [N, T, D], under diffusers' name for such."""
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        num_rows, heads = len(hidden_states), attn.heads
        if attention_mask is not None:
            mask = attn.prepare_attention_mask(attention_mask, text.shape[1], num_rows)
            attention_mask = mask.view(num_rows, heads, -1, mask.shape[-1])
        query, key, value = (
            _split(layer(x), heads)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        found = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        users = self.switch.users(ip_hidden_states, hidden_states)
        if users is not None:
            users = users.to(self.to_k.weight.dtype)
            key, value = (_split(layer(users), heads).to(query.dtype) for layer in (self.to_k, self.to_v))
            found = found + self.switch.scale * scaled_dot_product_attention(query, key, value)
        found = found.transpose(1, 2).flatten(2).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](found))


def _split(x: Tensor, heads: int) -> Tensor:
    """[N, L, heads * d] as [N, heads, L, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def add_persons(
    denoiser: Any, *, width: int, scale: float = 1.0, generator: torch.Generator | None = None
) -> UserSwitch:
    """Freeze a UNet and let each of its cross-attentions see a user of vectors `width` wide; they train.

    W'_k ~ N(0, 1 / width), W'_v = 0. ValueError for what is no UNet (SD3's tokens have one attention for
    text and picture), and for a model with adapters or attention of another kind.
    """
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    if not hasattr(denoiser, "conv_in"):
        raise ValueError(
            f"model.persons: {type(denoiser).__name__} has no cross-attention to add a user's to; "
            "UNets have (SD1.5, SD2, SDXL)"
        )
    if getattr(denoiser, "peft_config", None):
        raise ValueError("model.persons: the model has adapters; merge or remove them first")
    places = {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, Attention) and module.is_cross_attention
    }
    if not places:
        raise ValueError("model.persons: the model has no cross-attention")
    for name, attn in places.items():
        if type(attn.processor) is not AttnProcessor2_0 or not _is_plain(attn):
            kind = type(attn.processor).__name__
            raise ValueError(f"model.persons: {name} is not diffusers' plain attention (processor {kind})")
    denoiser.requires_grad_(False)
    switch = UserSwitch(scale)
    for attn in places.values():
        attn.set_processor(UserAttention(attn, width, switch, generator))  # type: ignore[arg-type]
    return switch


def _is_plain(attn: Any) -> bool:
    """Whether it is projections and a softmax alone."""
    extras = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim")
    scaled = attn.residual_connection or attn.rescale_output_factor != 1
    return not scaled and all(getattr(attn, name, None) is None for name in extras)


def user_attentions(model: nn.Module) -> dict[str, UserAttention]:
    """Name of each cross-attention -> what was added to it; empty for a model without users."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, UserAttention)}
    return {name.removesuffix(".processor"): m for name, m in found.items()}


def switch_of(model: nn.Module) -> UserSwitch:
    """The switch of a model's user attentions; ValueError where it has none."""
    for module in model.modules():
        if isinstance(module, UserAttention):
            return module.switch
    raise ValueError("the model attends to no user: `add_persons` makes it, or `load_persons`")


def arguments_of(model: nn.Module, users: Tensor | None) -> dict[str, Tensor] | None:
    """cross_attention_kwargs of a UNet for rows of these users, [N, T, D]; ValueError if it has none."""
    if users is None:
        return None
    switch_of(model)
    return {"ip_hidden_states": users}


@contextlib.contextmanager
def drawn_for(drawer: Any, vectors: Tensor | None) -> Iterator[None]:
    """Inside, a pipeline (or its UNet) draws for the user of these vectors, [T, D]; None is the base."""
    switch = switch_of(drawer if isinstance(drawer, nn.Module) else drawer.unet)
    before, switch.shown = switch.shown, vectors
    try:
        yield
    finally:
        switch.shown = before


@dataclass(frozen=True, slots=True)
class UserOff:
    """The reference: the policy's own base, its attention to users off. Costs no memory."""

    def __call__(
        self, likelihood: HasTerms, policy: nn.Module, batch: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Terms under the base. ValueError when the policy has no users."""
        with self.active(policy) as module:
            return likelihood.terms(module, batch, generator)

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The policy with its users off."""
        switch = switch_of(policy)
        before = switch.on
        with unchanged(policy), torch.no_grad():
            switch.on = False
            try:
                yield unwrapped(policy)
            finally:
                switch.on = before
