"""A policy over short sequences of few actions, as a table: everything it can do can be listed.

X contexts, S nodes (prefixes), A actions, N candidates, C candidates of a batch, U units, F features. Nodes
are numbered as in a heap: the root is 0 and action a of node s leads to s A + 1 + a.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor, nn

PADDING = -1
READOUTS = ("value", "entropy")


def num_nodes_of(num_actions: int, length: int) -> int:
    """Prefixes shorter than `length`: sum_{l < length} A^l."""
    return sum(num_actions**depth for depth in range(length))


def child(node: int, action: int, num_actions: int) -> int:
    """The node that an action leads to."""
    return node * num_actions + 1 + action


class TabularPolicy(nn.Module):
    """log pi(action | context, prefix) = log-softmax of a table of logits, [X, S, A].

    Candidates are tuples of `length` actions, or end earlier with the action `stop`. logits: where it
    begins, any reference distribution; finite. features: [X, S, A, F]; then logits + features @ theta with
    theta [F], zero at first, is what learns (a log-linear policy). critic: whether it has a table of values,
    [X, S], zero at first.
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        length: int = 1,
        stop: int | None = None,
        features: Tensor | None = None,
        critic: bool = False,
    ):
        super().__init__()
        _check_table(logits, length, stop, features)
        self.length, self.stop = length, stop
        start = logits.detach().clone()
        self.logits = nn.Parameter(start, requires_grad=features is None)
        self.register_buffer("features", None if features is None else features.detach().clone())
        self.theta = None if features is None else nn.Parameter(start.new_zeros(features.shape[-1]))
        self.critic = nn.Parameter(start.new_zeros(start.shape[:2])) if critic else None

    @property
    def num_contexts(self) -> int:
        """X."""
        return self.logits.shape[0]

    @property
    def num_actions(self) -> int:
        """A."""
        return self.logits.shape[-1]

    def conditionals(self) -> Tensor:
        """Log-prob of every action at every node, [X, S, A]."""
        logits = self.logits
        if self.theta is not None:
            logits = logits + self.get_buffer("features") @ self.theta
        return logits.log_softmax(-1)

    def all_candidates(self, prefix: Sequence[int] = ()) -> tuple[tuple[int, ...], ...]:
        """Every way to complete a prefix, in lexicographic order, the prefix left out."""
        return completions(self.num_actions, self.length, self.stop, tuple(prefix))

    def forward(
        self, actions: Tensor, context: Tensor, start: Tensor | None = None, names: tuple[str, ...] = ()
    ) -> Tensor:
        """Log-prob of each action, [C, U], 0 where actions are PADDING.

        actions: [C, U] int64; context: [C]; start: node at which each candidate begins, [C], the root where
        absent. names: what else to read at the same nodes ('value' before the action, 'entropy'); then
        [1 + len(names), C, U], log-probs first. ValueError for a name that this policy does not have.
        """
        own = actions != PADDING
        taken = actions.clamp(min=0)
        nodes = nodes_before(actions, start, self.num_actions)
        conditionals_CUA = self.conditionals()[context.unsqueeze(-1), nodes]
        rows = [conditionals_CUA.gather(-1, taken.unsqueeze(-1)).squeeze(-1)]
        for name in names:
            if name == "entropy":
                rows.append(-(conditionals_CUA.exp() * conditionals_CUA).sum(-1))
            elif name == "value" and self.critic is not None:
                rows.append(self.critic[context.unsqueeze(-1), nodes])
            else:
                has = ", ".join(READOUTS if self.critic is not None else READOUTS[1:])
                raise ValueError(f"this tabular policy has no readout '{name}'; it has {has}")
        rows = [torch.where(own, row, 0.0) for row in rows]
        return torch.stack(rows) if names else rows[0]

    def distribution(self, context: int = 0, prefix: Sequence[int] = ()) -> Tensor:
        """Log-prob of every completion of a prefix in a context, [N], in the order of `all_candidates`."""
        actions = as_actions(self.all_candidates(prefix)).to(self.logits.device)
        start = torch.full_like(actions[:, 0], node_of(prefix, self.num_actions))
        return self(actions, torch.full_like(start, context), start).sum(-1)


def node_of(prefix: Sequence[int], num_actions: int) -> int:
    """The node that a prefix leads to."""
    node = 0
    for action in prefix:
        node = child(node, action, num_actions)
    return node


def nodes_before(actions: Tensor, start: Tensor | None, num_actions: int) -> Tensor:
    """Node before each action, [C, U]; at padding that of the last action. start: [C], or the root."""
    node = actions.new_zeros(len(actions)) if start is None else start
    columns = [node]
    for u in range(1, actions.shape[1]):
        own = actions[:, u] != PADDING
        node = torch.where(own, node * num_actions + 1 + actions[:, u - 1], node)
        columns.append(node)
    return torch.stack(columns, -1)


def as_actions(candidates: Sequence[Sequence[int]]) -> Tensor:
    """Candidates as one table, [C, U] int64, filled up with PADDING."""
    width = max(len(c) for c in candidates)
    return torch.tensor([[*c, *(PADDING,) * (width - len(c))] for c in candidates], dtype=torch.int64)


@lru_cache(maxsize=256)
def completions(
    num_actions: int, length: int, stop: int | None, prefix: tuple[int, ...] = ()
) -> tuple[tuple[int, ...], ...]:
    """Every way to complete a prefix, in lexicographic order. ValueError for a prefix that is complete."""
    if any(a not in range(num_actions) for a in prefix) or len(prefix) >= length or stop in prefix:
        raise ValueError(
            f"prefix {prefix} cannot be completed: expected fewer than {length} actions below {num_actions}"
            + (f", none of them {stop}, which ends a candidate" if stop is not None else "")
        )
    found: list[tuple[int, ...]] = []
    for action in range(num_actions):
        if action == stop or len(prefix) + 1 == length:
            found.append((action,))
        else:
            rest = completions(num_actions, length, stop, (*prefix, action))
            found.extend((action, *r) for r in rest)
    return tuple(found)


def _check_table(logits: Tensor, length: int, stop: int | None, features: Tensor | None) -> None:
    if logits.ndim != 3 or length < 1 or logits.shape[1] != num_nodes_of(logits.shape[-1], length):
        shape = tuple(logits.shape)
        raise ValueError(
            f"logits have shape {shape}; expected [contexts, nodes, actions] with sum_l actions^l nodes for "
            f"the prefixes shorter than length={length}"
        )
    if not bool(logits.isfinite().all()):
        raise ValueError("logits must be finite; make an action unlikely rather than impossible")
    if stop is not None and stop not in range(logits.shape[-1]):
        raise ValueError(f"stop={stop} is not an action; there are {logits.shape[-1]}")
    if features is not None and (features.ndim != 4 or features.shape[:-1] != logits.shape):
        raise ValueError(f"features have shape {tuple(features.shape)}; expected {tuple(logits.shape)} and F")
