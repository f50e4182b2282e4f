"""From the samples of a round to the objective's input: the same for every modality.

Shapes: C candidates of a batch, U units of the longest one, R rows of the objective's input, K candidates of
the longest list. A pair, a list or a labelled candidate is one row; a sample of units has a row a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from triptych.objectives import Input, LabelledLogLik, ListLogLik, LogLik, PairLogLik, UnitLogLik
from triptych.objectives.listwise import step_weighted
from triptych.training.groups import Group, Kind, Sample
from triptych.training.order import Draw
from triptych.training.stages import Port


@dataclass(frozen=True, slots=True)
class RoundBatch:
    """The port's batch of C candidates and what the samples say of them.

    units: [C, U] own units. slots: [R, K] index of each row's candidates among C; mask: [R, K]. calibration:
    [R] or None. values: the samples' fields, [R], [R, K] or [R, U]. sample: [R] the sample of each row.
    """

    inner: Any
    kind: Kind
    units: Tensor
    slots: Tensor
    mask: Tensor
    calibration: Tensor | None
    values: Mapping[str, Tensor]
    sample: Tensor
    ids: tuple[str, ...]

    @property
    def keys(self) -> tuple[str, ...]:
        """Content hash of each candidate, [C]."""
        return self.inner.keys

    @property
    def counts(self) -> Tensor:
        """Number of terms of each candidate, [C]."""
        return self.inner.counts

    def to(self, device: torch.device) -> RoundBatch:
        """The batch on a device."""
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        values = {name: value.to(device, non_blocking=True) for name, value in self.values.items()}
        return replace(self, inner=self.inner.to(device), values=values, **moved)


@dataclass(frozen=True, slots=True)
class SampleCollator:
    """Samples of one round -> RoundBatch. Samples of one group share the work on their candidates."""

    port: Port
    groups: Sequence[Group]

    def __call__(self, samples: Sequence[Sample], draws: Sequence[Draw] = ()) -> RoundBatch:
        """One batch; ValueError when the samples are not of one kind."""
        kinds: set[Kind] = {s.kind for s in samples}
        if len(kinds) != 1:
            raise ValueError(f"a batch needs samples of one kind, not {sorted(kinds)}")
        wanted: dict[int, dict[int, None]] = {}
        for s in samples:
            wanted.setdefault(s.group, {}).update(dict.fromkeys(s.all_candidates))
        seeds = {s.group: d.seed for s, d in zip(reversed(samples), reversed(draws), strict=False)}
        items = [
            (self.groups[g].context, [self.groups[g].candidates[c] for c in cs]) for g, cs in wanted.items()
        ]
        inner = self.port.collate(items, [seeds.get(g, 0) for g in wanted])
        place = {(g, c): i for i, (g, c) in enumerate((g, c) for g, cs in wanted.items() for c in cs)}
        units = _padded([self.groups[g].mask[c] for g, cs in wanted.items() for c in cs])
        kind = kinds.pop()
        rows = [
            [place[s.group, c] for c in row]
            for s in samples
            for row in ([[c] for c in s.candidates] if kind == "units" else [s.candidates])
        ]
        width = max(len(r) for r in rows)
        return RoundBatch(
            inner=inner,
            kind=kind,
            units=units,
            slots=torch.tensor([[*r, *[0] * (width - len(r))] for r in rows]),
            mask=torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in rows]),
            calibration=_calibration(samples, place),
            values=_stacked(samples, kind),
            sample=torch.tensor(
                [i for i, s in enumerate(samples) for _ in range(len(s.candidates) if kind == "units" else 1)]
            ),
            ids=tuple(self.groups[s.group].key for s in samples),
        )


def _calibration(samples: Sequence[Sample], place: Mapping[tuple[int, int], int]) -> Tensor | None:
    if all(s.calibration is None for s in samples):
        return None
    return torch.tensor([place[s.group, s.calibration] for s in samples if s.calibration is not None])


def _stacked(samples: Sequence[Sample], kind: Kind) -> dict[str, Tensor]:
    """Fields of the samples as tables: units one row below the other, all else padded and stacked."""
    found: dict[str, Tensor] = {}
    for name in samples[0].fields:
        parts = [s.fields[name] for s in samples]
        if kind == "units":
            sizes = [len(s.candidates) for s in samples]
            parts = [p.expand(n) if p.ndim == 0 else p for p, n in zip(parts, sizes, strict=True)]
            rows = [row for p in parts for row in p]
            found[name] = _padded(rows) if rows[0].ndim else torch.stack(rows)
        else:
            found[name] = _padded(parts) if parts[0].ndim else torch.stack(parts)
    return found


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Tensors of one rank, padded with zeros to the largest and stacked."""
    size = [max(p.shape[d] for p in parts) for d in range(parts[0].ndim)]
    table = parts[0].new_zeros(len(parts), *size)
    for i, p in enumerate(parts):
        table[i][tuple(slice(0, n) for n in p.shape)] = p
    return table


@dataclass(frozen=True, slots=True)
class RoundLikelihood:
    """How likely a round's samples are: the port's terms, arranged as the objective reads them.

    names: readouts besides the log-probs that the objective uses: 'value', 'entropy', 'kl'.
    """

    port: Port
    names: frozenset[str] = frozenset()

    def __call__(self, policy: Any, batch: RoundBatch, generator: torch.Generator | None = None) -> Input:
        """The objective's input under the policy, without a reference."""
        if not self.names:
            return self.assemble(self.terms(policy, batch, generator), batch)
        found = dict(self.port.readouts(policy, batch.inner, self.names))
        units = self.assemble(found.pop("logp"), batch)
        assert isinstance(units, UnitLogLik)
        rows = {name: _fit(value, units.mask)[batch.slots[:, 0]] for name, value in found.items()}
        return replace(units, **rows)

    def terms(self, policy: Any, batch: RoundBatch, generator: torch.Generator | None = None) -> Tensor:
        """Log-likelihood per unit of every candidate, [C, U]."""
        return self.port.terms(policy, batch.inner, generator)

    def assemble(self, terms: Tensor, batch: RoundBatch) -> Input:
        """The objective's input from per-unit values [C, U]; units not the policy's own count nothing."""
        units_CU = _fit(batch.units, terms)
        own_CU = torch.where(units_CU, terms, 0.0)
        if batch.kind == "units":
            return _units(own_CU, units_CU, batch)
        loglik = _summed(own_CU, units_CU, batch)
        values: dict[str, Any] = dict(batch.values)
        if batch.kind == "pair":
            chosen, rejected = (loglik.mapped(_column(i)) for i in (0, 1))
            calibration = None
            if batch.calibration is not None:
                logp_C, count_C = own_CU.sum(-1), units_CU.sum(-1).to(own_CU.dtype)
                calibration = LogLik(logp_C[batch.calibration], count_C[batch.calibration])
            return PairLogLik(chosen, rejected, calibration=calibration, **values)
        if batch.kind == "list":
            values = {k: v for k, v in values.items() if k not in ("steps", "step_weight")}
            return ListLogLik(loglik, mask=batch.mask, **values)
        return LabelledLogLik(loglik.mapped(_column(0)), **values)


def _summed(own_CU: Tensor, units_CU: Tensor, batch: RoundBatch) -> LogLik:
    """Sum over units, [R, K]; or the weighted mean over steps of step means where samples name steps."""
    if "steps" not in batch.values:
        count_C = units_CU.sum(-1).to(own_CU.dtype)
        return LogLik(own_CU.sum(-1)[batch.slots], count_C[batch.slots])
    weight_RKS = batch.values["step_weight"]
    own_RKU, units_RKU = own_CU[batch.slots], units_CU[batch.slots].to(own_CU.dtype)
    steps_RKU = _fit(batch.values["steps"], own_RKU).long()
    empty = own_RKU.new_zeros(weight_RKS.shape)
    logp = empty.scatter_add(-1, steps_RKU, own_RKU)
    count = empty.scatter_add(-1, steps_RKU, units_RKU)
    return step_weighted(logp, count, weight_RKS)


def _units(own_CU: Tensor, units_CU: Tensor, batch: RoundBatch) -> UnitLogLik:
    rows = batch.slots[:, 0]
    values = {name: _fit(value, own_CU) if value.ndim == 2 else value for name, value in batch.values.items()}
    return UnitLogLik(own_CU[rows], units_CU[rows], **values)


def _column(i: int) -> Callable[[Tensor], Tensor]:
    return lambda t: t[:, i]


def _fit(values: Tensor, like: Tensor) -> Tensor:
    """Values with as many units as `like`; what is cut off or added is padding."""
    gap = like.shape[-1] - values.shape[-1]
    return values if gap == 0 else torch.nn.functional.pad(values, (0, gap))


def fold(rows: Tensor, batch: RoundBatch) -> Tensor:
    """Mean over the rows of each sample, [R] -> [B]."""
    if len(batch.ids) == len(rows):
        return rows
    total = rows.new_zeros(len(batch.ids)).index_add(0, batch.sample, rows)
    count = rows.new_zeros(len(batch.ids)).index_add(0, batch.sample, torch.ones_like(rows))
    return total / count
