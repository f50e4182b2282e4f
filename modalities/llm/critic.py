"""Critics of text policies: the value of the text so far, one number before every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """How values are made.

    kind 'head' reads the policy's own hidden states (detached: the critic does not move the policy);
    'model' has a body of its own, a copy of the base model with adapters as the policy's. The head starts
    at zero. What trains it is a regulariser of the recipe's objective, such as ppo_value or oreo_value.
    """

    kind: Literal["head", "model"] = "head"


class TokenCritic(nn.Module):
    """A value per hidden state: zero at the start, so that the first advantages are the rewards' own.

    body: a causal LM of its own, plain or PEFT, or None for the policy's hidden states.
    """

    def __init__(self, hidden_size: int, body: nn.Module | None = None):
        super().__init__()
        self.body = body
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden_NH: Tensor, own_hidden: Callable[[Any], Tensor]) -> Tensor:
        """Values, [N] float32. own_hidden: hidden states [N, H] of another language model on these rows."""
        if self.body is None:
            hidden_NH = hidden_NH.detach()
        else:
            body: Any = self.body
            hidden_NH = own_hidden(body.get_base_model() if hasattr(body, "get_base_model") else body)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            return self.head(hidden_NH.to(self.head.weight.dtype)).squeeze(-1).float()
