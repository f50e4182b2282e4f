"""What a session model knows of a user: a history encoded once, and the keys and values it is read through.

Shapes: T history tokens in all, B users, M tokens of the longest history, D width, H heads, G key-value
heads, E head width, L levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from triptych.modalities.recsys.jagged import Jagged, padded
from triptych.modalities.recsys.layers import FeedForward, attend, rotated

ContextKind = Literal["bidirectional", "causal", "lazy"]
TokenKind = Literal["sum", "codes", "separated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """History tokens, the user's own token first, laid end to end.

    vectors: [T, D]. slots: place in a padded [B, M], [T]. offsets: [B + 1]. longest: M. per_item: tokens of
    an item, so that a history of n items has 1 + n per_item tokens.
    """

    vectors: Tensor
    slots: Tensor
    offsets: Tensor
    longest: int
    per_item: int

    @property
    def num_users(self) -> int:
        """B."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each user, [B]."""
        return self.offsets.diff()

    def padded(self, values_T: Tensor) -> Tensor:
        """[T, ...] as [B, M, ...]."""
        return padded(values_T, self.slots, num_rows=self.num_users, longest=self.longest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """Keys and values that decoder layers read, each [B, G, M, E]; one pair a layer, or one for all of them.

    lengths: tokens that are there, [B]; a session that has seen n items sees 1 + n per_item of them.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    lengths: Tensor
    per_item: int

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a decoder layer; the lazy decoder's layers share theirs."""
        place = index if len(self.keys) > 1 else 0
        return self.keys[place], self.values[place]


class HistoryTokens(nn.Module):
    """Items of a history -> token vectors.

    kind: 'sum': one token an item, the sum of its codes' vectors, and of the item's own with `item_table`;
    'codes': a token a code; 'separated': a separator after every item, as OneRec has it (2502.18965, 2.2).
    A learnt token stands first, so that an empty history is a history; `user_table` adds the user's vector.
    """

    def __init__(
        self,
        codes: CodeVectors,
        kind: TokenKind,
        item_table: nn.Module | None,
        dropout: float,
        user_table: nn.Module | None = None,
    ):
        super().__init__()
        assert item_table is None or kind == "sum"
        self.codes, self.kind, self.item_table, self.user_table = codes, kind, item_table, user_table
        self.first_D = nn.Parameter(torch.randn(codes.width) * 0.02)
        self.separator_D = nn.Parameter(torch.randn(codes.width) * 0.02) if kind == "separated" else None
        self.dropout = nn.Dropout(dropout)
        self.per_item = {"sum": 1, "codes": codes.num_levels, "separated": codes.num_levels + 1}[kind]

    def forward(self, history: Jagged, codes_TL: Tensor) -> Tokens:
        """history: item ids; codes_TL: their codes."""
        vectors_TLD = self.codes(codes_TL)
        if self.kind == "sum":
            vectors = vectors_TLD.sum(1)
            if self.item_table is not None:
                vectors = vectors + self.item_table(history.values)
        else:
            parts = [vectors_TLD]
            if self.separator_D is not None:
                parts.append(self.separator_D.expand(len(vectors_TLD), 1, -1).to(vectors_TLD.dtype))
            vectors = torch.cat(parts, 1).flatten(0, 1)
        users, longest = history.num_rows, 1 + history.longest * self.per_item
        starts_B = torch.arange(users, device=vectors.device) * longest
        inner = torch.arange(self.per_item, device=vectors.device)
        places_T = 1 + (history.places.unsqueeze(-1) * self.per_item + inner).flatten()
        rows_T = history.rows.repeat_interleave(self.per_item)
        first = self.first_D.expand(users, -1).to(vectors.dtype)
        if self.user_table is not None:
            assert history.owners is not None
            first = first + self.user_table(history.owners)
        # Every user's first token goes before its items: the order of slots.
        slots = torch.cat([starts_B, starts_B[rows_T] + places_T])
        order = slots.argsort()
        offsets = history.offsets * self.per_item + torch.arange(users + 1, device=vectors.device)
        return Tokens(
            vectors=self.dropout(torch.cat([first, vectors])[order]),
            slots=slots[order],
            offsets=offsets,
            longest=longest,
            per_item=self.per_item,
        )


class CodeVectors(nn.Module):
    """One vector a code of every level, [sum K_l, D]; level l's codes follow those of the levels before."""

    def __init__(self, sizes: Sequence[int], width: int):
        super().__init__()
        self.sizes, self.width = tuple(sizes), width
        self.table = nn.Embedding(sum(sizes), width)
        nn.init.normal_(self.table.weight, std=0.02)
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.register_buffer("starts_L", starts, persistent=False)

    @property
    def num_levels(self) -> int:
        """L."""
        return len(self.sizes)

    def forward(self, codes_L: Tensor) -> Tensor:
        """Codes of all levels [..., L] -> [..., L, D]."""
        assert isinstance(self.starts_L, Tensor)
        return self.table(codes_L + self.starts_L)

    def of_level(self, level: int) -> Tensor:
        """The vectors of one level's codes, [K_l, D]."""
        start = sum(self.sizes[:level])
        return self.table.weight[start : start + self.sizes[level]]


class EncoderLayer(nn.Module):
    """Pre-normalised self-attention and feed-forward over jagged rows; only attention sees a padded form."""

    def __init__(self, width: int, heads: int, hidden: int, *, causal: bool, dropout: float):
        super().__init__()
        self.heads, self.causal, self.rate = heads, causal, dropout
        self.norm, self.norm_ff = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.ff, self.dropout = FeedForward(width, hidden), nn.Dropout(dropout)

    def forward(self, x_TD: Tensor, tokens: Tokens, places_T: Tensor, mask: Tensor) -> Tensor:
        """[T, D] -> [T, D]."""
        q, k, v = self.qkv(self.norm(x_TD)).view(len(x_TD), 3, self.heads, -1).unbind(1)
        q, k = (rotated(t, places_T.unsqueeze(-1)) for t in (q, k))
        q, k, v = (tokens.padded(t).transpose(1, 2) for t in (q, k, v))
        out = attend(q, k, v, mask, self.rate if self.training else 0.0)
        x_TD = x_TD + self.dropout(self.out(out.transpose(1, 2).flatten(2).flatten(0, 1)[tokens.slots]))
        return x_TD + self.dropout(self.ff(self.norm_ff(x_TD)))


class Encoder(nn.Module):
    """A stack of layers over histories. causal: a token sees what came before it, as in SASRec."""

    def __init__(self, width: int, heads: int, hidden: int, num_layers: int, *, causal: bool, dropout: float):
        super().__init__()
        self.causal = causal
        self.layers = nn.ModuleList(
            EncoderLayer(width, heads, hidden, causal=causal, dropout=dropout) for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(width)

    def forward(self, tokens: Tokens) -> Tensor:
        """Token vectors after the stack, [T, D]."""
        x_TD, longest = tokens.vectors, tokens.longest
        steps = torch.arange(longest, device=x_TD.device)
        mask = (steps < tokens.lengths.unsqueeze(-1))[:, None, None]
        if self.causal:
            mask = mask & (steps <= steps.unsqueeze(-1))
        # A padded query sees the first token alone: a row without any would be NaN.
        mask = mask | (steps == 0)
        places_T = tokens.slots % longest
        for layer in self.layers:
            x_TD = layer(x_TD, tokens, places_T, mask)
        return self.norm(x_TD)


class Reader(nn.Module):
    """Keys and values of a context: one projection a decoder layer, or one for all that is both (lazy).

    The lazy decoder of OneRec-V2 (2508.20900) has no encoder: context vectors, normalised, are projected once
    and serve as keys and as values of every layer.
    """

    def __init__(self, width: int, kv_heads: int, head_width: int, num_layers: int, *, shared: bool):
        super().__init__()
        self.kv_heads, self.shared = kv_heads, shared
        out = kv_heads * head_width
        count = 1 if shared else num_layers
        self.norm = nn.RMSNorm(width) if shared else nn.Identity()
        self.into = nn.ModuleList(
            nn.Linear(width, out if shared else 2 * out, bias=False) for _ in range(count)
        )

    def forward(self, x_TD: Tensor, tokens: Tokens) -> Context:
        """Projected once for every user; keys carry their place, values do not."""
        x_TD = self.norm(x_TD)
        places_T = tokens.slots % tokens.longest
        keys, values = [], []
        for into in self.into:
            parts = into(x_TD).view(len(x_TD), 1 if self.shared else 2, self.kv_heads, -1)
            k, v = parts[:, 0], parts[:, -1]
            keys.append(tokens.padded(rotated(k, places_T.unsqueeze(-1))).transpose(1, 2))
            values.append(tokens.padded(v).transpose(1, 2))
        return Context(
            keys=tuple(keys), values=tuple(values), lengths=tokens.lengths, per_item=tokens.per_item
        )
