"""The plug points of a round: what a modality brings, and what draws, judges and shapes.

Everything here is a protocol but `Live`, which says what a round may use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from triptych.objectives import Input
from triptych.training.groups import Group, Sample, Verdict
from triptych.training.order import key
from triptych.training.references import Batch, Reference


class Port(Protocol):
    """What a modality brings to the rounds besides sources and judges: likelihoods of drawn candidates.

    bound: whether `terms` is a bound (an ELBO) rather than the log-prob of a sample.
    """

    @property
    def bound(self) -> bool:
        """See the class."""
        ...

    def key(self, context: Any, candidate: Any) -> str:
        """Content hash of a candidate in its context, as the batch's `keys` have it."""
        ...

    def length(self, context: Any, candidates: Sequence[Any]) -> int:
        """Cost of computing these candidates, for batches of similar cost."""
        ...

    def collate(self, items: Sequence[tuple[Any, Sequence[Any]]], seeds: Sequence[int]) -> Batch:
        """One batch of contexts with their candidates, [C] in all, in order; a seed for each context."""
        ...

    def terms(self, policy: Any, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """Log-likelihood per unit of each candidate, [C, U], zero-padded."""
        ...

    def readouts(self, policy: Any, batch: Any, names: frozenset[str]) -> Mapping[str, Tensor]:
        """`logp` and the named values per unit, [C, U] each: 'value' (critic), 'entropy', 'kl' (exact).

        ValueError for one that this policy does not have.
        """
        ...

    def pack(self, record: Any) -> Mapping[str, Any]:
        """A context or candidate as tensors and JSON values, for checkpoints."""
        ...

    def unpack(self, kind: Literal["context", "candidate"], packed: Mapping[str, Any]) -> Any:
        """The record that was packed."""
        ...


@dataclass(slots=True, kw_only=True)
class Live:
    """What a round may use: the policy as it is now, its references, and the round's own randomness.

    memory: what judges keep from round to round (weights of experts, drifting values), by name; saved in
    checkpoints. metrics: what sources and judges report of this round.
    """

    policy: nn.Module
    port: Any
    references: Mapping[str, Reference]
    device: torch.device
    seed: int
    stage: int = 0
    round: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    def generator(self, *parts: int | str) -> torch.Generator:
        """A CPU generator of this round and the given parts (a context's key, a purpose)."""
        return torch.Generator().manual_seed(key("round", self.seed, self.stage, self.round, *parts))


class Source(Protocol):
    """Contexts -> groups.

    fresh: every candidate is a sample of the policy as it is, with its log-prob. Where only those of origin
    'policy' are, an attribute `own_fresh` says so. num_candidates: K, at most.
    groups_per_context: groups a context makes, at most. provides: what its groups have besides candidates:
    'logp', 'proposal', 'verdict', 'calibration' (a candidate of origin 'reference').
    """

    @property
    def fresh(self) -> bool:
        """See the class."""
        ...

    @property
    def num_candidates(self) -> int:
        """See the class."""
        ...

    @property
    def groups_per_context(self) -> int:
        """See the class."""
        ...

    @property
    def provides(self) -> frozenset[str]:
        """See the class."""
        ...

    def __call__(self, contexts: Sequence[Any], live: Live) -> list[Group]:
        """Draw; groups of one context follow each other, contexts stay in order."""
        ...


class Judge(Protocol):
    """Groups -> verdicts. gives: fields of `Verdict` that it fills. needs: 'ref' or 'value' of the groups."""

    @property
    def gives(self) -> frozenset[str]:
        """See the class."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """See the class."""
        ...

    def __call__(self, groups: Sequence[Group], live: Live) -> list[Verdict]:
        """One verdict a group, in order."""
        ...


class Shape(Protocol):
    """Judged groups -> training samples; pure, with randomness from the seed alone.

    makes: the objective's input type. needs: fields of the verdict or the group that must be there; a name
    'a|b' asks for either. provides: optional fields of the input that the samples fill. per_unit: whether
    advantages differ between the units of a row. readout: 'sum' of a candidate's units, or 'steps'.
    """

    @property
    def makes(self) -> type[Input]:
        """See the class."""
        ...

    @property
    def needs(self) -> frozenset[str]:
        """See the class."""
        ...

    @property
    def provides(self) -> frozenset[str]:
        """See the class."""
        ...

    @property
    def per_unit(self) -> bool:
        """See the class."""
        ...

    def most(self, num_candidates: int) -> int:
        """Samples that a group of K candidates makes, at most."""
        ...

    def __call__(self, groups: Sequence[Group], *, seed: int) -> list[Sample]:
        """Samples in the order of the groups."""
        ...
