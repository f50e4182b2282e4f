"""The shape of policy gradients and critics: all units of a group's candidates, with their credit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from triptych.objectives import Input, UnitLogLik, advantages
from triptych.objectives.aggregation import clean
from triptych.training.credits import CREDITS, Credit
from triptych.training.groups import Group, Sample
from triptych.training.unit_credits import one_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """One sample a group: a row of units for every candidate that is trained on.

    credit, credit_options: a name of `CREDITS` and its options. fields: optional fields of `UnitLogLik` to
    fill; absent, all that the credit gives and `old`, the log-probs of drawing. train: candidates of origin
    'policy', or all; the others still count in the credit, as rivals or in means. whiten: advantages less
    their mean over their deviation, over all units of the round. drop_equal leaves out groups whose
    advantages are all 0 (DAPO's dynamic sampling, Yu et al. 2025, arXiv 2503.14476). Every sample has
    num_units, the round's mean number of units a row, so that means over a batch's units do not depend on
    how the round is cut.
    """

    credit: str = "z_score"
    credit_options: Mapping[str, Any] = field(default_factory=dict[str, Any])
    fields: Sequence[str] | None = None
    train: Literal["policy", "all"] = "policy"
    whiten: bool = False
    drop_equal: bool = False
    made: Credit = field(init=False, repr=False, compare=False)
    makes: ClassVar[type[Input]] = UnitLogLik
    readout: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        one_of(train=(self.train, ("policy", "all")))
        object.__setattr__(self, "made", CREDITS.build(self.credit, self.credit_options))
        valid = self.made.provides | {"old"}
        for name in self.fields or ():
            if name not in valid:
                known = ", ".join(sorted(valid))
                raise ValueError(
                    f"fields names '{name}', which credit '{self.credit}' does not give; valid: {known}"
                )
        for name in ("whiten", "drop_equal"):
            if getattr(self, name) and "advantage" not in self.provides:
                raise ValueError(f"{name} needs advantages, and there are none with credit '{self.credit}'")

    @property
    def needs(self) -> frozenset[str]:
        """What the credit reads, and log-probs of drawing for `old`."""
        return self.made.needs | ({"logp"} if "old" in self.provides else set())

    @property
    def provides(self) -> frozenset[str]:
        """The fields that are filled."""
        return self.made.provides | {"old"} if self.fields is None else frozenset(self.fields)

    @property
    def per_unit(self) -> bool:
        """Whether advantages differ between the units of a row."""
        return self.made.per_unit and "advantage" in self.provides

    def most(self, num_candidates: int) -> int:
        """1."""
        return 1

    def __call__(self, groups: Sequence[Group], *, seed: int) -> list[Sample]:
        """Samples in the order of the groups."""
        rows: dict[int, list[int]] = {}
        found: dict[int, dict[str, Tensor]] = {}
        for index, group in enumerate(groups):
            fields = self._fields(group)
            taken = [i for i in range(group.size) if self.train == "all" or group.origin[i] == "policy"]
            if not taken:
                raise ValueError(
                    f"group {group.key} has no candidate of origin 'policy' but "
                    f"{', '.join(sorted(set(group.origin)))}; train on them with train=all"
                )
            kept = {name: value[taken] for name, value in fields.items()}
            if not self.drop_equal or bool(kept["advantage"].any()):
                rows[index], found[index] = taken, kept
        masks = {i: groups[i].mask[taken] for i, taken in rows.items()}
        if self.whiten:
            _whiten(found, masks)
        num_units = (
            torch.cat([m.sum(-1) for m in masks.values()]).float().mean() if masks else torch.tensor(0.0)
        )
        return [
            Sample(
                kind="units",
                group=index,
                candidates=tuple(taken),
                fields={**found[index], "num_units": num_units.expand(len(taken))},
            )
            for index, taken in rows.items()
        ]

    def _fields(self, group: Group) -> dict[str, Tensor]:
        """The fields of all candidates, [K, U]."""
        fields = self.made(group)
        if "old" in self.provides:
            if group.logp is None:
                raise ValueError(
                    f"group {group.key} has no log-probs of drawing: its candidates are data or beams"
                )
            fields["old"] = clean(group.logp, group.mask)
        return {name: fields[name] for name in sorted(self.provides)}


def _whiten(found: Mapping[int, dict[str, Tensor]], masks: Mapping[int, Tensor]) -> None:
    """Replace the advantages by those whitened over all units, in place."""
    if not found:
        return
    flat = torch.cat([found[i]["advantage"].flatten() for i in found]).unsqueeze(0)
    valid = torch.cat([masks[i].flatten() for i in found]).unsqueeze(0)
    white = advantages.whiten(flat, valid).squeeze(0).split([masks[i].numel() for i in found])
    for (i, fields), part in zip(found.items(), white, strict=True):
        fields["advantage"] = part.view(masks[i].shape)
