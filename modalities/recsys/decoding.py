"""Code-by-code decoding of a session model: cached keys and values, a context shared by all beams of a user.

Shapes: U users, W beams, R = U W rows, S new tokens, H heads, E head width, K_l codes of a level.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from triptych.modalities.recsys.context import Context
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.layers import attend, rotated
from triptych.modalities.recsys.model import SessionPolicy


@torch.no_grad()
def begin(policy: SessionPolicy, history: Jagged) -> SessionDecoding:
    """A decoding for every user of the history, from an empty session."""
    return SessionDecoding(policy, policy.read(history))


class SessionDecoding:
    """Code-by-code decoding of U users' beams: cached keys and values, a user's context shared by its beams.

    `advance` is what `beam_search` drives.
    """

    def __init__(self, policy: SessionPolicy, context: Context):
        self._policy, self._context = policy, context
        self._place, self._length = 0, 0
        self._past: list[tuple[Tensor, Tensor] | None] = [None] * len(policy.layers)
        longest = context.keys[0].shape[2]
        steps = torch.arange(longest, device=context.lengths.device)
        self._mask = (steps < context.lengths.unsqueeze(-1))[:, None, None]

    @torch.no_grad()
    def advance(self, parents_UW: Tensor | None, codes_UW: Tensor | None) -> Tensor:
        """Log-probs of the next code over its level's codebook, [U, W, K_l] float32.

        The first call takes (None, None); later row (u, w) continues row parents_UW[u, w] of the previous
        call with codes_UW[u, w]. After an item's last level comes level 0 of the next.
        """
        policy, users = self._policy, len(self._context.lengths)
        begin = policy.begin_D.expand(users, 1, 1, -1)
        if codes_UW is None or parents_UW is None:
            tokens = begin
        else:
            self._reorder(parents_UW)
            level = self._place % policy.num_levels
            tokens = functional.embedding(codes_UW, policy.codes.of_level(level)).unsqueeze(2)
            self._place += 1
            if level == policy.num_levels - 1:
                tokens = torch.cat([tokens, begin.expand(-1, tokens.shape[1], -1, -1)], 2)
        x_RSD = tokens.flatten(0, 1)
        for index, layer in enumerate(policy.layers):
            x_RSD, self._past[index] = layer(x_RSD, self._length, self._past[index], self._cross(index))
        self._length += x_RSD.shape[1]
        hidden = policy.norm(x_RSD[:, -1])
        logits = functional.linear(hidden, policy.head(self._place % policy.num_levels))
        return logits.float().log_softmax(-1).view(users, -1, logits.shape[-1])

    def _reorder(self, parents_UW: Tensor) -> None:
        users = len(parents_UW)
        first = self._past[0]
        assert first is not None
        width = len(first[0]) // users
        rows = (parents_UW + torch.arange(users, device=parents_UW.device).unsqueeze(-1) * width).flatten()
        self._past = [None if p is None else (p[0][rows], p[1][rows]) for p in self._past]

    def _cross(self, index: int) -> Callable[[Tensor, float], Tensor]:
        keys, values = self._context.layer(index)
        users = len(self._context.lengths)

        def attention(q_RSHE: Tensor, rate: float) -> Tensor:
            seen = self._context.lengths.repeat_interleave(len(q_RSHE) // users)
            q = rotated(q_RSHE, seen.view(-1, 1, 1))
            folded = q.reshape(users, -1, *q.shape[2:]).transpose(1, 2)
            return attend(folded, keys, values, self._mask, rate).transpose(1, 2).reshape(q.shape)

        return attention
