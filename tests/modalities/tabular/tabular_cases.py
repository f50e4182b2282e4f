"""Small tabular policies and everything they can draw, for tests of population statements in float64."""

import itertools

import torch
from torch import Tensor

from triptych.modalities.tabular.exact import gradient
from triptych.modalities.tabular.policy import PADDING, TabularPolicy, as_actions, num_nodes_of
from triptych.objectives import ListLogLik, LogLik, PairLogLik, UnitLogLik

D = torch.float64


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def policy(*, seed: int = 0, actions: int = 3, length: int = 2, stop: int | None = 2, critic: bool = False):
    """Seven candidates unless told otherwise: (2), and 0 or 1 with any second action."""
    logits = normal(1, num_nodes_of(actions, length), actions, seed=seed)
    return TabularPolicy(logits, length=length, stop=stop, critic=critic)


def like(p: TabularPolicy, *, seed: int) -> TabularPolicy:
    """Another policy over the same candidates."""
    return TabularPolicy(normal(*p.logits.shape, seed=seed), length=p.length, stop=p.stop)


def bandit(*, seed: int = 0, arms: int = 4) -> TabularPolicy:
    return policy(seed=seed, actions=arms, length=1, stop=None)


def terms(p: TabularPolicy) -> tuple[Tensor, Tensor]:
    """Log-probs per unit of all candidates, [N, U], and their mask."""
    actions = as_actions(p.all_candidates())
    return p(actions, torch.zeros(len(actions), dtype=torch.int64)), actions != PADDING


def readout(p: TabularPolicy, name: str) -> Tensor:
    """The named value at each action of all candidates, [N, U]."""
    actions = as_actions(p.all_candidates())
    return p(actions, torch.zeros(len(actions), dtype=torch.int64), None, (name,))[1]


def tuples(p: TabularPolicy, size: int) -> tuple[Tensor, Tensor]:
    """Every tuple of candidates that may be drawn, [T, size], and its chance, [T], without gradient."""
    logp = p.distribution().detach()
    drawn = torch.tensor(list(itertools.product(range(len(logp)), repeat=size)))
    return drawn, logp[drawn].sum(-1).exp()


def rows(p: TabularPolicy, drawn: Tensor, **fields: Tensor) -> UnitLogLik:
    """Candidates as rows of units. drawn: [B]; fields: a value a row, [B], or a unit, [B, U]."""
    logp, mask = terms(p)
    logp, mask = logp[drawn], mask[drawn]
    wide = {
        k: v if v.ndim == 2 or k == "num_units" else v.unsqueeze(-1).expand(mask.shape)
        for k, v in fields.items()
    }
    return UnitLogLik(logp, mask, **wide)


def one_by_one(logp: Tensor, ref: Tensor | None = None) -> LogLik:
    return LogLik(logp, torch.ones_like(logp), ref)


def pairs(p: TabularPolicy, ref: Tensor, drawn: Tensor, **fields: Tensor) -> PairLogLik:
    """First and second of each pair, [T, 2], as chosen and rejected; ref: [N]."""
    logp = p.distribution()
    first, second = drawn.unbind(-1)
    return PairLogLik(one_by_one(logp[first], ref[first]), one_by_one(logp[second], ref[second]), **fields)


def lists(p: TabularPolicy, ref: Tensor, drawn: Tensor, **fields: Tensor) -> ListLogLik:
    logp = p.distribution()[drawn]
    return ListLogLik(one_by_one(logp, ref[drawn]), torch.zeros_like(logp), **fields)


def same(one: Tensor, other: Tensor, atol: float = 1e-12) -> None:
    assert torch.allclose(one, other, rtol=1e-9, atol=atol), (one, other)


def slope(p: TabularPolicy, chance: Tensor, loss: Tensor) -> Tensor:
    """Gradient of sum chance * loss, [D]; the chance is a constant."""
    return gradient((chance.detach() * loss).sum(), p)
