"""Where rounds stand: their plan, what a checkpoint keeps, and what becomes of the weights round by round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from triptych.training.checkpoint import Checkpoint
from triptych.training.config import OptimConfig
from triptych.training.group_state import pack_groups, unpack_groups
from triptych.training.groups import Group
from triptych.training.references import Snapshot, trained
from triptych.training.stages import Live, Part, Port, Stage
from triptych.training.values import ValueStore

# 'previous' is what 'stage' was before it last moved: the iterate before the one that began this round.
MOVING = ("stage", "ema", "previous")


@dataclass(frozen=True, slots=True)
class Spot:
    """One round's place in the plan: optimizer steps [start, end)."""

    stage: int
    round: int
    start: int
    end: int


def plan(stages: Sequence[Stage], config: OptimConfig) -> list[Spot]:
    """Every round with its steps: as many as num_epochs over the most samples that it can have take."""
    spots: list[Spot] = []
    step = 0
    for s, stage in enumerate(stages):
        main = stage.main
        most = (
            contexts_of(stage, main)
            * main.source.groups_per_context
            * main.shape.most(main.source.num_candidates)
        )
        for r in range(stage.num_rounds):
            samples = most * (1 + len(stage.keep.past_rounds(r)))
            steps = max(1, math.ceil(round(stage.num_epochs * samples / config.batch_size, 9)))
            spots.append(Spot(s, r, step, step + steps))
            step += steps
    return spots


def contexts_of(stage: Stage, part: Part) -> int:
    """Contexts of a round that a part uses."""
    return max(1, round(stage.num_contexts * part.share))


@dataclass(slots=True)
class RoundState:
    """What a checkpoint keeps besides the learner.

    groups: of each part of the round under way, judged; None between rounds. past: main groups of earlier
    rounds of the stage, as far as the buffer asks for them. moving: the references that move, by slot.
    average: mean of the policies at the ends of num_averaged rounds. memory: what judges keep. values: the
    references' values of the round under way, by part and slot, as they were at its start.
    """

    moving: dict[str, Snapshot]
    groups: list[list[Group]] | None = None
    past: list[list[Group]] = field(default_factory=list)
    average: dict[str, Tensor] = field(default_factory=dict)
    num_averaged: int = 0
    memory: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, ValueStore] = field(default_factory=dict)

    def packed(self, port: Port) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Tensors by group and JSON values."""
        tensors = {f"reference_{slot}": dict(s.values) for slot, s in self.moving.items()}
        tensors |= {"average": self.average, "memory": self.memory, "groups": {}}
        tensors |= {f"values_{name}": store.vectors(store.keys()) for name, store in self.values.items()}
        state: dict[str, Any] = {"num_averaged": self.num_averaged, "groups": None, "past": []}
        for name, lists in (("groups", self.groups), ("past", self.past)):
            if lists is None:
                continue
            state[name] = []
            for i, groups in enumerate(lists):
                found, entry = pack_groups(groups, port, f"{name}{i}.")
                tensors["groups"] |= found
                state[name].append(entry)
        return {name: group for name, group in tensors.items() if group}, {"rounds": state}

    def load(self, checkpoint: Checkpoint, port: Port) -> None:
        """Become what a checkpoint kept."""
        state, tensors = checkpoint.state["rounds"], checkpoint.tensors
        for slot, snapshot in self.moving.items():
            for name, value in tensors[f"reference_{slot}"].items():
                snapshot.values[name].copy_(value)
        found = tensors.get("groups", {})
        self.average, self.memory = dict(tensors.get("average", {})), dict(tensors.get("memory", {}))
        self.num_averaged = state["num_averaged"]
        self.values = {}
        for name in tensors:
            if name.startswith("values_"):
                store = self.values[name.removeprefix("values_")] = ValueStore(None)
                store.merge(tensors[name])
        unpacked = {
            name: None
            if state[name] is None
            else [unpack_groups(found, entry, port) for entry in state[name]]
            for name in ("groups", "past")
        }
        self.groups, self.past = unpacked["groups"], unpacked["past"] or []


def begin_round(stage: Stage, state: RoundState, live: Live, spot: Spot) -> None:
    """Keep, as far as it belongs to a round's start: the references that become the policy as it is now."""
    if spot.round == 0:
        state.past, state.average, state.num_averaged = [], {}, 0
    due = spot.round == 0 or (stage.keep.stage == "each_round" and spot.round % stage.keep.every == 0)
    if "previous" in state.moving and due:
        first = spot.stage == 0 and spot.round == 0
        earlier = Snapshot.of(live.policy).values if first else state.moving["stage"].values
        for name, value in state.moving["previous"].values.items():
            value.copy_(earlier[name])
    if "stage" in state.moving and due:
        state.moving["stage"].take(live.policy)
    if "ema" in state.moving and spot.round == 0:
        state.moving["ema"].take(live.policy)


@torch.no_grad()
def finish_round(stage: Stage, state: RoundState, spot: Spot, policy: nn.Module) -> None:
    """Keep, as far as it belongs to a round's end: the buffer and the average of the policies."""
    assert state.groups is not None
    wanted = len(stage.keep.past_rounds(spot.round + 1))
    state.past = [*state.past, state.groups[0]][-wanted:] if wanted else []
    state.groups, state.values = None, {}
    if stage.keep.average:
        state.num_averaged += 1
        for name, parameter in trained(policy).items():
            mean = state.average.get(name, torch.zeros_like(parameter)).to(parameter.device)
            state.average[name] = mean + (parameter.detach() - mean) / state.num_averaged


def main_slot(part: Part) -> str:
    """The reference that a part's rewards are relative to: its main term's; 'frozen' where it reads none."""
    slot = part.terms.main.reference
    return "frozen" if slot == "none" else slot


def slots_of(stage: Stage) -> frozenset[str]:
    """Reference slots that a stage reads: its terms', and those that its sources and judges name."""
    found: set[str] = set() if stage.keep.ema is None else {"ema"}
    for part in stage.parts:
        found |= {*part.terms.slots(), main_slot(part)}
        for plug in (part.source, part.judge):
            found |= named_slots(plug)
    return frozenset(found)


def named_slots(plug: Any) -> set[str]:
    """Reference slots that a source or a judge names in its options, and those inside them."""
    if isinstance(plug, Mapping):
        plug = list(plug.values())
    if isinstance(plug, (list, tuple)):
        return set[str]().union(*map(named_slots, plug))
    if not is_dataclass(plug):
        return set()
    values = {f.name: getattr(plug, f.name) for f in fields(plug)}
    own = {v for k, v in values.items() if k == "slot" and isinstance(v, str)}
    return own.union(*(named_slots(v) for v in values.values()))
