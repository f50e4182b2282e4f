"""References as values: what a policy is compared with, as a function to per-term log-likelihoods.

A reference is called with the likelihood, the policy, the batch and the generator that the policy was
called with, and returns the terms that `Likelihood.assemble` turns into the objective's input. It leaves
the policy exactly as it found it: training flags, active adapters, `requires_grad`.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from triptych.objectives import Input
from triptych.training.sharding import laid_out_like
from triptych.training.values import ValueStore


class Batch(Protocol):
    """What the loop needs of a batch."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Content hash of each candidate, [C]."""
        ...

    @property
    def counts(self) -> Tensor:
        """Number of terms of each candidate, [C]."""
        ...

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the samples, [B]."""
        ...

    def to(self, device: torch.device) -> Any:
        """The batch on a device."""
        ...


class HasTerms(Protocol):
    """What a reference needs of a likelihood, or of a port."""

    def terms(self, policy: Any, batch: Any, generator: torch.Generator | None = None) -> Tensor:
        """Log-likelihood per term (token, slot; one for an ELBO) of each candidate, [C, U], zero-padded."""
        ...


class Likelihood(HasTerms, Protocol):
    """How likely a batch's candidates are under a policy. `assemble(terms(...))` is the call itself."""

    def __call__(self, policy: Any, batch: Any, generator: torch.Generator | None = None) -> Input:
        """The objective's input, without a reference."""
        ...

    def assemble(self, terms: Tensor, batch: Any) -> Input:
        """The objective's input from per-term values."""
        ...


@runtime_checkable
class Comparable(Protocol):
    """A likelihood that knows the difference of two models' terms better than the terms themselves."""

    def predict(self, policy: Any, batch: Any) -> Any:
        """What a model says of the batch, from which `beside` makes its terms."""
        ...

    def beside(self, policy: Any, reference: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Terms of the policy and of the reference that said `reference`, [C, U] each."""
        ...


class Reference(Protocol):
    """Per-term log-likelihoods of a batch under the reference, [C, U], without gradient."""

    def __call__(
        self, likelihood: HasTerms, policy: nn.Module, batch: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """See the class."""
        ...

    def active(self, policy: nn.Module) -> AbstractContextManager[Any]:
        """Inside, the yielded module is the reference, in evaluation mode and without gradient."""
        ...


def _terms(
    reference: Reference, likelihood: HasTerms, policy: nn.Module, batch: Any, generator: Any
) -> Tensor:
    with reference.active(policy) as module:
        return likelihood.terms(module, batch, generator)


@dataclass(frozen=True, slots=True)
class AdapterOff:
    """The policy's own base model: its PEFT adapters are switched off for the call. Costs no memory."""

    def __call__(
        self, likelihood: HasTerms, policy: nn.Module, batch: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Terms under the base model. ValueError when the policy has no adapter."""
        return _terms(self, likelihood, policy, batch, generator)

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The policy with its adapters off."""
        adapted = find_adapted(policy)
        with unchanged(policy), torch.no_grad(), adapted.disable_adapter():
            yield unwrapped(policy)


@dataclass(frozen=True, slots=True)
class Sibling:
    """Another adapter on the same base model (fast-slow chasing, merged tasks)."""

    adapter: str

    def __call__(
        self, likelihood: HasTerms, policy: nn.Module, batch: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Terms under the sibling. ValueError when the policy has no adapter of that name."""
        return _terms(self, likelihood, policy, batch, generator)

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The policy with the sibling as its active adapter."""
        adapted = find_adapted(policy)
        if self.adapter not in adapted.peft_config:
            raise ValueError(f"no adapter '{self.adapter}'; there are {', '.join(adapted.peft_config)}")
        name, active = adapted.active_adapter, list(adapted.active_adapters)
        with unchanged(policy), torch.no_grad():
            adapted.set_adapter(self.adapter)
            try:
                yield unwrapped(policy)
            finally:
                adapted.set_adapter(name)
                if active != [name]:
                    adapted.base_model.set_adapter(active)


@dataclass(frozen=True, slots=True)
class FrozenCopy:
    """A snapshot of a policy as it was, whatever was done to it in memory: resized, merged, trained."""

    model: nn.Module

    @classmethod
    def of(cls, policy: nn.Module) -> FrozenCopy:
        """Copy every parameter and buffer of the policy now; later training does not reach the copy."""
        model = copy.deepcopy(unwrapped(policy)).eval()
        return cls(model.requires_grad_(False))

    def __call__(
        self, likelihood: HasTerms, policy: nn.Module, batch: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Terms under the snapshot."""
        return _terms(self, likelihood, policy, batch, generator)

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The copy."""
        with torch.no_grad():
            yield self.model


@dataclass(frozen=True, slots=True)
class Untrained:
    """The policy as it is: before the first step its own reference, which needs no second model."""

    def __call__(
        self, likelihood: HasTerms, policy: nn.Module, batch: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Terms under the policy."""
        return _terms(self, likelihood, policy, batch, generator)

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The policy itself."""
        with unchanged(policy), torch.no_grad():
            yield unwrapped(policy)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The policy's trained weights as they were at some time, swapped in for the call.

    Costs the memory of the trained weights alone. values: name of a trained parameter -> its value; both
    `take` and `follow` change them in place.
    """

    values: dict[str, Tensor]

    @classmethod
    def of(cls, policy: nn.Module) -> Snapshot:
        """The policy's trained weights now."""
        return cls({name: p.detach().clone() for name, p in trained(policy).items()})

    def take(self, policy: nn.Module) -> None:
        """Become the policy as it is now."""
        self.follow(policy, 0.0)

    @torch.no_grad()
    def put(self, policy: nn.Module) -> None:
        """Give the policy the snapshot's weights for good."""
        for name, parameter in trained(policy).items():
            parameter.copy_(self.values[name])

    @torch.no_grad()
    def load(self, policy: nn.Module, values: Mapping[str, Tensor]) -> None:
        """Take saved values, laid out as the policy's weights are."""
        for name, parameter in trained(policy).items():
            self.values[name].copy_(laid_out_like(values[name], parameter))

    @torch.no_grad()
    def follow(self, policy: nn.Module, decay: float) -> None:
        """value <- decay value + (1 - decay) weight."""
        for name, parameter in trained(policy).items():
            value = self.values[name]
            if decay:
                value.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
            else:
                value.copy_(parameter.detach())

    def __call__(
        self, likelihood: HasTerms, policy: nn.Module, batch: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Terms under the snapshot."""
        return _terms(self, likelihood, policy, batch, generator)

    @contextlib.contextmanager
    def active(self, policy: nn.Module) -> Iterator[nn.Module]:
        """The policy with the snapshot's weights."""
        named = trained(policy)
        with unchanged(policy), torch.no_grad():
            now = {name: _exchange(p, self.values[name]) for name, p in named.items()}
            try:
                yield unwrapped(policy)
            finally:
                for name, p in named.items():
                    _exchange(p, now[name])


def _exchange(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Give a parameter another value; returns the one it had.

    Where it can be, storage is exchanged, so that a graph made before stays valid; shards are copied, as
    FSDP2 gathers from memory of its own.
    """
    if isinstance(parameter, DTensor):
        old = parameter.detach().clone()
        parameter.copy_(value)
        return old
    old = parameter.data
    parameter.data = value
    return old


def trained(policy: nn.Module) -> dict[str, nn.Parameter]:
    """The policy's parameters that require a gradient, by name."""
    return {n: p for n, p in unwrapped(policy).named_parameters() if p.requires_grad}


@dataclass(frozen=True, slots=True)
class Cached:
    """Values kept in a store under (model, candidate content); `source` computes those that are missing.

    identity names the reference model and its dtype (`content_hash`): another model never finds these values.
    """

    store: ValueStore
    identity: str
    source: Reference | None = None

    def __call__(
        self, likelihood: HasTerms, policy: nn.Module, batch: Any, generator: torch.Generator | None = None
    ) -> Tensor:
        """Terms from the store, on the batch's device. ValueError for a missing value without a source."""
        keys = self.keys(batch)
        if missing := [k for k in keys if k not in self.store]:
            if self.source is None:
                raise ValueError(
                    f"{len(missing)} candidates have no cached reference value, and no source is set"
                )
            terms = self.source(likelihood, policy, batch, generator)
            self.store.add(keys, terms, batch.counts)
        return self.store.table(keys).to(batch.counts.device, non_blocking=True)

    def active(self, policy: nn.Module) -> AbstractContextManager[Any]:
        """What the source is; ValueError without one."""
        if self.source is None:
            raise ValueError("cached reference values without a source cannot be sampled from")
        return self.source.active(policy)

    def keys(self, batch: Any) -> list[str]:
        """Store keys of the batch's candidates."""
        return self.keys_of(batch.keys)

    def keys_of(self, candidates: Sequence[str]) -> list[str]:
        """Store keys of candidates given by their content hashes."""
        return [store_key(self.identity, k) for k in candidates]

    def fill(
        self,
        likelihood: HasTerms,
        policy: nn.Module,
        batches: Iterator[Any] | Sequence[Any],
        device: torch.device,
    ) -> int:
        """Compute what is missing; returns how many candidates were computed. `store.flush` writes the last.

        A batch is computed whole or not at all, so that an interrupted fill goes on to the same values.
        """
        computed = 0
        for batch in batches:
            if all(k in self.store for k in self.keys(batch)):
                continue
            self(likelihood, policy, batch.to(device))
            computed += len(batch.keys)
        return computed


def store_key(identity: str, candidate: str) -> str:
    """Key of one candidate's values under one reference."""
    return hashlib.sha256(f"{identity}\x1f{candidate}".encode()).hexdigest()


def unwrapped(policy: nn.Module) -> nn.Module:
    """The policy inside a DDP wrapper, whose forward is only for passes with gradients."""
    return policy.module if isinstance(policy, nn.parallel.DistributedDataParallel) else policy


def find_adapted(policy: nn.Module) -> Any:
    """The PEFT model inside a policy; ValueError when there is none."""
    for module in policy.modules():
        if hasattr(module, "disable_adapter") and hasattr(module, "peft_config"):
            return module
    raise ValueError(
        "the policy has no adapter to switch off: use reference 'frozen_copy', or train with LoRA"
    )


@contextlib.contextmanager
def unchanged(policy: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; on leaving, every training flag and requires_grad is as before.

    PEFT's own switches set requires_grad on whole layers, which would unfreeze or freeze what was not asked.
    """
    training = [m for m in policy.modules() if m.training]
    flags = [(p, p.requires_grad) for p in policy.parameters()]
    policy.eval()
    try:
        yield
    finally:
        for parameter, flag in flags:
            if parameter.requires_grad != flag:
                parameter.requires_grad_(flag)
        for module in training:
            module.training = True


@torch.no_grad()
def content_hash(module: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of every parameter and buffer that is saved."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        tensor = value.detach().cpu().contiguous()
        digest.update(f"{name}\x1f{tensor.dtype}\x1f{tuple(tensor.shape)}\x1f".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()
