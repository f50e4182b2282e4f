"""Session models: OneRec's encoder-decoder over semantic ids, the lazy decoder, TIGER's form, and SASRec.

Shapes: T history tokens in all, B users, M tokens of the longest history, N sessions (rows grouped by user),
C sessions of a user, m items of a session, L levels, S tokens of a session, W beams, D width, H heads,
E head width, I items.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from triptych.modalities.recsys.context import (
    CodeVectors,
    Context,
    ContextKind,
    Encoder,
    HistoryTokens,
    Reader,
    TokenKind,
)
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.kernels import Impl, session_logps
from triptych.modalities.recsys.layers import FeedForward, MixtureOfExperts, attend, rotated


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Sparse feed-forward layers of the decoder. OneRec has 24 and 2 a token.

    balance_rate: of loss-free balancing; 0 for none, as in OneRec.
    """

    num_experts: int = 24
    top_k: int = 2
    balance_rate: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A session model.

    kind: 'session' writes semantic ids with a decoder; 'sasrec' scores items from the last history token.
    context: 'bidirectional' encoder (OneRec, TIGER), 'causal' encoder, or 'lazy': none, shared keys = values
    (OneRec-V2). The last two train on every position of a history in one pass. history_tokens: see
    `HistoryTokens`. item_vectors adds an embedding of the item itself to its token, item_features those of
    its features' values; user_vectors and user_features do so with the history's first token. tables: where
    those embeddings are, in torch or in torchrec's collection, which several ranks share out among them.
    decoder_dropout: of the decoder, null = dropout; a code says little of an item and the next one depends on
    all before it, so the decoder wants less than the context. hidden: width of the feed-forward layers, 0 =
    8/3 of width. tie: history, decoder and heads have one vector a code, as in T5, so TIGER. experts: null =
    dense.
    """

    kind: Literal["session", "sasrec"] = "session"
    context: ContextKind = "bidirectional"
    history_tokens: TokenKind = "sum"
    item_vectors: bool = False
    item_features: list[str] = field(default_factory=list)
    user_vectors: bool = False
    user_features: list[str] = field(default_factory=list)
    tables: Literal["torch", "torchrec"] = "torch"
    width: int = 64
    heads: int = 4
    kv_heads: int = 0
    encoder_layers: int = 2
    decoder_layers: int = 2
    hidden: int = 0
    dropout: float = 0.1
    decoder_dropout: float | None = None
    tie: bool = False
    experts: ExpertsConfig | None = None
    kernel: Impl = "auto"

    def __post_init__(self) -> None:
        if self.width % self.heads or (self.width // self.heads) % 2:
            raise ValueError(f"model.width={self.width} must be an even multiple of model.heads={self.heads}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}")
        for name, value in (("dropout", self.dropout), ("decoder_dropout", self.decoder_rate)):
            if not 0 <= value < 1:
                raise ValueError(f"model.{name}={value} must be in [0, 1)")
        if self.kind == "sasrec" and self.context != "causal":
            raise ValueError(f"model.kind=sasrec needs model.context=causal, not {self.context}")
        if self.kind == "sasrec" and self.decoder_dropout is not None:
            raise ValueError("model.kind=sasrec has no decoder: leave decoder_dropout out")
        if self.kind == "sasrec" and (self.looks_up or self.tables != "torch"):
            raise ValueError(
                "model.kind=sasrec has the items' vectors alone: leave item_vectors, item_features, "
                "user_vectors, user_features and tables out"
            )
        if self.history_tokens != "sum" and (self.item_vectors or self.item_features):
            raise ValueError(
                "model.item_vectors and model.item_features need model.history_tokens=sum, "
                f"not {self.history_tokens}"
            )
        if self.tables == "torchrec" and not self.looks_up:
            raise ValueError(
                "model.tables=torchrec has nothing to hold: set model.item_vectors, item_features, "
                "user_vectors or user_features"
            )
        if self.context == "lazy" and self.encoder_layers:
            raise ValueError("model.context=lazy has no encoder: set model.encoder_layers=0")
        if self.context != "lazy" and not self.encoder_layers:
            raise ValueError(f"model.context={self.context} needs model.encoder_layers of at least 1")

    @property
    def every_position(self) -> bool:
        """Whether one pass over a history can predict after each of its items."""
        return self.context != "bidirectional"

    @property
    def looks_up(self) -> bool:
        """Whether there are embeddings of items or users besides those of codes."""
        return bool(self.item_vectors or self.item_features or self.user_vectors or self.user_features)

    @property
    def decoder_rate(self) -> float:
        """Dropout of the decoder."""
        return self.dropout if self.decoder_dropout is None else self.decoder_dropout

    @property
    def feed_forward(self) -> int:
        """Width of the feed-forward layers."""
        return self.hidden or -(-8 * self.width // 3 // 8) * 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Sessions:
    """Sessions to be scored. items: [N, m], -1 = none. user: row of the history, rising, [N].

    seen: items of the history that the session may look at, [N]. most: C, the largest number of a user's.
    """

    items: Tensor
    user: Tensor
    seen: Tensor
    most: int

    def to(self, device: torch.device) -> Sessions:
        """The same on a device."""
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in ("items", "user", "seen")}
        return Sessions(**moved, most=self.most)


class DecoderLayer(nn.Module):
    """Self-attention over a session, attention to the user's context, feed-forward or experts."""

    def __init__(self, config: ModelConfig, kv_heads: int):
        super().__init__()
        width = config.width
        self.heads, self.rate = config.heads, config.decoder_rate
        self.norm, self.norm_cross, self.norm_ff = (nn.RMSNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.query, self.out_cross = (nn.Linear(width, width, bias=False) for _ in range(2))
        experts = config.experts
        self.ff = (
            FeedForward(width, config.feed_forward)
            if experts is None
            else MixtureOfExperts(
                width,
                config.feed_forward,
                num_experts=experts.num_experts,
                top_k=experts.top_k,
                balance_rate=experts.balance_rate,
            )
        )
        self.dropout = nn.Dropout(config.decoder_rate)

    def forward(
        self,
        x_NSD: Tensor,
        start: int,
        past: tuple[Tensor, Tensor] | None,
        cross: Callable[[Tensor, float], Tensor],
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Tokens at places start.. of N sessions after `past` keys and values; the layer's own of all so far.

        cross: queries [N, S, H, E] and a dropout rate -> what the context answers, [N, S, H, E].
        """
        num, length, width = x_NSD.shape
        rate = self.rate if self.training else 0.0
        q, k, v = self.qkv(self.norm(x_NSD)).view(num, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        places = torch.arange(start, start + length, device=x_NSD.device)
        q, k = rotated(q, places), rotated(k, places)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        seen = torch.arange(k.shape[2], device=x_NSD.device) <= places.unsqueeze(-1)
        out = attend(q, k, v, None if length == 1 else seen, rate)
        x_NSD = x_NSD + self.dropout(self.out(out.transpose(1, 2).reshape(num, length, width)))
        query = self.query(self.norm_cross(x_NSD)).view(num, length, self.heads, -1)
        x_NSD = x_NSD + self.dropout(self.out_cross(cross(query, rate).reshape(num, length, width)))
        return x_NSD + self.dropout(self.ff(self.norm_ff(x_NSD))), (k, v)


class SessionPolicy(nn.Module):
    """Log-probs of sessions of items given a user's history: sum over items and levels of log p(code | ...).

    codes_IL: semantic id of every item. Before each item the decoder reads a begin token (OneRec,
    2502.18965, 3.2), which is not predicted. The history is encoded once a user, whatever the number of
    sessions, and its keys and values are projected once; sessions are folded into the length of the queries.
    item_table, user_table: numbers [T] -> [T, D], where config asks for them; see `make_policy`.
    """

    def __init__(
        self,
        config: ModelConfig,
        codes_IL: Tensor,
        sizes: tuple[int, ...],
        item_table: nn.Module | None = None,
        user_table: nn.Module | None = None,
    ):
        super().__init__()
        assert item_table is not None or not (config.item_vectors or config.item_features)
        assert user_table is not None or not (config.user_vectors or config.user_features)
        kv_heads = config.kv_heads or config.heads
        width, head_width = config.width, config.width // config.heads
        self.config, self.sizes = config, tuple(sizes)
        self.register_buffer("codes_IL", codes_IL, persistent=False)
        self.history_codes = CodeVectors(sizes, width)
        self.tokens = HistoryTokens(
            self.history_codes, config.history_tokens, item_table, config.dropout, user_table
        )
        self.encoder = (
            None
            if config.context == "lazy"
            else Encoder(
                width,
                config.heads,
                config.feed_forward,
                config.encoder_layers,
                causal=config.context == "causal",
                dropout=config.dropout,
            )
        )
        self.reader = Reader(
            width, kv_heads, head_width, config.decoder_layers, shared=config.context == "lazy"
        )
        self.codes = self.history_codes if config.tie else CodeVectors(sizes, width)
        self.begin_D = nn.Parameter(torch.randn(width) * 0.02)
        self.layers = nn.ModuleList(DecoderLayer(config, kv_heads) for _ in range(config.decoder_layers))
        self.norm = nn.RMSNorm(width)
        self.heads = None
        if not config.tie:
            self.heads = nn.ParameterList(nn.Parameter(torch.randn(k, width) * width**-0.5) for k in sizes)

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.sizes)

    def head(self, level: int) -> Tensor:
        """Output vectors of a level's codes, [K_l, D]."""
        return self.codes.of_level(level) if self.heads is None else self.heads[level]

    def forward(self, history: Jagged, sessions: Sessions) -> Tensor:
        """Log-prob of every code of every session, [N, m L]; 0 where a session has no item."""
        codes_NmL = self.codes_of(sessions.items)
        hidden = self.decode(self.read(history), sessions, codes_NmL)
        weights = [self.head(level) for level in range(self.num_levels)]
        absent = (sessions.items < 0).repeat_interleave(self.num_levels, 1)
        labels = codes_NmL.flatten(1).masked_fill(absent, -1)
        return session_logps(hidden, weights, labels, impl=self.config.kernel)[1]

    def codes_of(self, items: Tensor) -> Tensor:
        """Semantic ids of items [...] -> [..., L]; those of item 0 where there is none."""
        assert isinstance(self.codes_IL, Tensor)
        return self.codes_IL[items.clamp(min=0)]

    def read(self, history: Jagged) -> Context:
        """A history as what decoder layers attend to; once a user."""
        tokens = self.tokens(history, self.codes_of(history.values))
        encoded = tokens.vectors if self.encoder is None else self.encoder(tokens)
        return self.reader(encoded, tokens)

    def decode(self, context: Context, sessions: Sessions, codes_NmL: Tensor) -> Tensor:
        """Hidden state before each code, [N, m L, D]."""
        num, items, levels = codes_NmL.shape
        begin = self.begin_D.expand(num, items, 1, -1)
        vectors = self.codes(codes_NmL)
        x_NSD = torch.cat([begin.to(vectors.dtype), vectors], 2).flatten(1, 2)[:, :-1]
        x_NSD = functional.dropout(x_NSD, self.config.decoder_rate, self.training)
        cross = _Cross.of(context, sessions)
        for index, layer in enumerate(self.layers):
            x_NSD, _ = layer(x_NSD, 0, None, cross.layer(index))
        places = torch.arange(items * (levels + 1), device=x_NSD.device).view(items, -1)[:, :levels].flatten()
        return self.norm(x_NSD[:, places])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cross:
    """Sessions folded into their users' queries: [N, S] rows to [B, C S] and back."""

    context: Context
    slots: Tensor | None
    users: int
    most: int
    seen: Tensor
    mask: Tensor

    @classmethod
    def of(cls, context: Context, sessions: Sessions) -> _Cross:
        users, most = len(context.lengths), sessions.most
        user = sessions.user
        seen_N = 1 + sessions.seen * context.per_item
        if len(user) == users * most:
            slots, seen_BC = None, seen_N.view(users, most)
        else:
            firsts = torch.searchsorted(user, torch.arange(users, device=user.device))
            slots = user * most + torch.arange(len(user), device=user.device) - firsts[user]
            seen_BC = seen_N.new_ones(users * most).index_copy(0, slots, seen_N).view(users, most)
        longest = context.keys[0].shape[2]
        mask = torch.arange(longest, device=user.device) < seen_BC.unsqueeze(-1)
        return cls(context=context, slots=slots, users=users, most=most, seen=seen_N, mask=mask)

    def layer(self, index: int) -> Callable[[Tensor, float], Tensor]:
        """The attention of one decoder layer."""
        keys, values = self.context.layer(index)

        def attention(q_NSHE: Tensor, rate: float) -> Tensor:
            length, heads, head_width = q_NSHE.shape[1:]
            q = rotated(q_NSHE, self.seen.view(-1, 1, 1))
            if self.slots is not None:
                q = q.new_zeros(self.users * self.most, length, heads, head_width).index_copy(
                    0, self.slots, q
                )
            q = q.view(self.users, self.most * length, heads, head_width).transpose(1, 2)
            mask = self.mask.repeat_interleave(length, 1).unsqueeze(1)
            out = attend(q, keys, values, mask, rate).transpose(1, 2)
            out = out.reshape(self.users * self.most, length, heads, head_width)
            return out if self.slots is None else out[self.slots]

        return attention
