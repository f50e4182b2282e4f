"""SASRec, the sequential baseline, from the same layers as the session models.

Shapes: T history tokens in all, B users, N sessions of one item, D width, I items.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from triptych.modalities.recsys.context import CodeVectors, Encoder, HistoryTokens, Tokens
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.kernels import session_logps
from triptych.modalities.recsys.model import ModelConfig, Sessions


class SasRec(nn.Module):
    """log softmax over all items of encoder(history)_last . item vector: SASRec with full cross-entropy.

    Kang and McAuley 2018 (1808.09781), with the softmax loss of later practice. A session is one item.
    """

    def __init__(self, config: ModelConfig, num_items: int):
        super().__init__()
        self.config = config
        codes = CodeVectors((num_items,), config.width)
        self.tokens = HistoryTokens(codes, "sum", None, config.dropout)
        self.encoder = Encoder(
            config.width,
            config.heads,
            config.feed_forward,
            config.encoder_layers,
            causal=True,
            dropout=config.dropout,
        )

    def forward(self, history: Jagged, sessions: Sessions) -> Tensor:
        """Log-prob of every session's item, [N, 1]; ValueError for sessions of several items."""
        if sessions.items.shape[1] != 1:
            raise ValueError(f"sasrec scores sessions of 1 item, not of {sessions.items.shape[1]}")
        tokens, hidden_TD = self._hidden(history)
        hidden_ND = hidden_TD[tokens.offsets[sessions.user] + sessions.seen]
        return session_logps(
            hidden_ND.unsqueeze(1), [self.tokens.codes.of_level(0)], sessions.items, impl=self.config.kernel
        )[1]

    @torch.no_grad()
    def scores(self, history: Jagged) -> Tensor:
        """Log-prob of every item after the whole history, [B, I]."""
        tokens, hidden_TD = self._hidden(history)
        last_BD = hidden_TD[tokens.offsets[1:] - 1]
        return functional.linear(last_BD, self.tokens.codes.of_level(0)).float().log_softmax(-1)

    def _hidden(self, history: Jagged) -> tuple[Tokens, Tensor]:
        tokens = self.tokens(history, history.values.unsqueeze(-1))
        return tokens, self.encoder(tokens)
