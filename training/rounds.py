"""The one online loop: draw -> judge -> shape -> step -> keep, stage by stage, for every modality.

Where the rounds stand is a function of the learner's step: a plan gives every round its optimizer steps. A
checkpoint holds, besides the learner, the judged groups of the round it interrupts, the references that
move, the buffer and what judges remember, so that a killed run goes on to bitwise the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from triptych.training.assembly import RoundLikelihood, SampleCollator, fold
from triptych.training.config import OptimConfig, RunConfig
from triptych.training.fit import Hooks, Outcome, Session
from triptych.training.groups import Group, Sample, pad_units, scores_of
from triptych.training.loop import Learner, Task
from triptych.training.order import key, longest_first, round_contexts
from triptych.training.references import Cached, Reference, Snapshot, unchanged, unwrapped
from triptych.training.round_references import fill_references, remember
from triptych.training.round_state import (
    MOVING,
    RoundState,
    Spot,
    begin_round,
    contexts_of,
    finish_round,
    main_slot,
    plan,
    slots_of,
)
from triptych.training.stages import Live, Part, Port, Stage
from triptych.training.values import ValueStore

READOUTS = frozenset({"value", "entropy", "kl"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """What stays the same over all rounds of a run.

    contexts: records with a `key`, which their groups bear. frozen: the reference of slot 'frozen'. observe:
    further metrics of a round's judged groups, by modality.
    """

    stages: Sequence[Stage]
    contexts: Sequence[Any]
    port: Port
    frozen: Reference
    observe: Callable[[Sequence[Group]], Mapping[str, float]] = lambda groups: {}

    def __post_init__(self) -> None:
        if not len(self.contexts):
            raise ValueError("there is no context to draw for")
        for stage in self.stages:
            if stage.num_contexts > len(self.contexts):
                there = f"there are {len(self.contexts)}"
                raise ValueError(
                    f"stage {stage.name}: num_contexts={stage.num_contexts} a round, and {there}"
                )
            if stage.bound != self.port.bound:
                raise ValueError(
                    f"stage {stage.name}: bound={stage.bound}, the likelihood's is {self.port.bound}"
                )


def run_rounds(
    rounds: Rounds,
    learner: Learner,
    config: OptimConfig,
    run: RunConfig,
    accelerator: Accelerator,
    *,
    identity: Mapping[str, Any],
    hooks: Hooks,
) -> tuple[Outcome, RoundState]:
    """All rounds of all stages, from the newest good checkpoint in run.output_dir if any.

    Killed at any moment and started again it ends with bitwise the same weights (same device and ranks).
    Errors as `fit`'s.
    """
    if any(hasattr(p, "device_mesh") for p in learner.policy.parameters()):
        raise ValueError("rounds draw from the whole policy on every process: use DDP, not FSDP")
    if config.average:
        raise ValueError("rounds keep no average of the weights for export: set optim.average=0")
    spots = plan(rounds.stages, config)
    slots = frozenset[str]().union(*(slots_of(s) for s in rounds.stages)) - {"frozen", "none"}
    if odd := slots - set(MOVING):
        raise ValueError(
            f"rounds have the references {', '.join(('frozen', *MOVING))}, not {', '.join(sorted(odd))}"
        )
    slots |= {"stage"} if "previous" in slots else set()
    state = RoundState({slot: Snapshot.of(learner.policy) for slot in sorted(slots)})
    session = Session(
        learner=learner,
        config=config,
        run=run,
        accelerator=accelerator,
        identity=identity,
        hooks=hooks,
        num_steps=spots[-1].end,
        extra=lambda: state.packed(rounds.port),
    )
    try:
        found = session.start()
        if found is not None:
            state.load(found, rounds.port)
        for spot in spots:
            if learner.step < spot.end and not _one_round(rounds, session, state, spot):
                break
    finally:
        session.close()
    outcome = Outcome(step=learner.step, num_steps=session.num_steps, skipped=tuple(learner.skipped))
    return outcome, state


def _one_round(rounds: Rounds, session: Session, state: RoundState, spot: Spot) -> bool:
    """Draw, judge, shape, step, keep; False when the run was asked to stop."""
    stage, learner, accelerator = rounds.stages[spot.stage], session.learner, session.accelerator
    policy = unwrapped(learner.policy)
    live = Live(
        policy=policy,
        port=rounds.port,
        references={"frozen": rounds.frozen, **state.moving},
        device=accelerator.device,
        seed=session.run.seed,
        stage=spot.stage,
        round=spot.round,
        memory=state.memory,
    )
    if state.groups is None:
        begin_round(stage, state, live, spot)
        state.groups = [_judged(rounds, stage, part, live, session) for part in stage.parts]
        # Of the round's first step: a run killed before its checkpoint draws again, and so writes this again.
        shown = next((i for i, part in enumerate(stage.parts) if part.judge is not None), 0)
        values = _describe(state.groups[shown], live) | dict(rounds.observe(state.groups[shown]))
        session.write("train", values, step=learner.step + 1)
    groups = [state.groups[0] + [g for old in state.past for g in old], *state.groups[1:]]
    seed = key("rounds", live.seed, spot.stage, spot.round)
    task = _tasks(stage, groups, live, session, state, seed)
    planned = spot.end - spot.start

    def after_step() -> None:
        if "ema" in state.moving and stage.keep.ema is not None:
            state.moving["ema"].follow(learner.policy, stage.keep.ema)
        if learner.step == spot.end:
            finish_round(stage, state, spot, policy)

    session.after_step = after_step
    if task is None:
        session.hooks.report(f"stage {stage.name}, round {spot.round + 1}: no sample is left to train on")
        steps = 0
    else:
        steps = min(
            planned, math.ceil(round(stage.num_epochs * len(task.examples) / (task.batch_size or 1), 9))
        )
        if not session.advance(task, spot.start + steps, seed=seed, start=spot.start):
            return False
    if learner.step < spot.end:
        finish_round(stage, state, spot, policy)
        return session.pass_over(spot.end)
    return True


def _judged(rounds: Rounds, stage: Stage, part: Part, live: Live, session: Session) -> list[Group]:
    """The groups of one part, drawn and judged, the same on every rank; each rank draws its share."""
    accelerator = session.accelerator
    chosen = round_contexts(
        seed=key("contexts", live.seed, live.stage),
        round_index=live.round,
        num_contexts=len(rounds.contexts),
        size=stage.num_contexts,
    )[: contexts_of(stage, part)]
    mine = [rounds.contexts[i] for i in chosen[accelerator.process_index :: accelerator.num_processes]]
    needs = part.shape.needs | (frozenset() if part.judge is None else part.judge.needs)
    # Judges that remember what they saw must see the same on every rank.
    remembers = getattr(part.judge, "remembers", False)
    with unchanged(live.policy), torch.no_grad(), accelerator.autocast():
        groups = part.source(mine, live) if mine else []
        groups = _filled(groups, needs, part, live, session.config.micro_batch_size)
        if part.judge is not None and not remembers:
            groups = _with_verdicts(groups, part, live)
    if accelerator.num_processes > 1:
        # In the order of one process, so that the windows of samples do not depend on the number of ranks.
        place = {rounds.contexts[index].key: i for i, index in enumerate(chosen)}
        groups = sorted(gather_object(groups), key=lambda g: place[g.key])
    if part.judge is not None and remembers:
        with unchanged(live.policy), torch.no_grad(), accelerator.autocast():
            groups = _with_verdicts(groups, part, live)
    return groups


def _with_verdicts(groups: Sequence[Group], part: Part, live: Live) -> list[Group]:
    assert part.judge is not None
    verdicts = part.judge(groups, live)
    return [replace(g, verdict=v) for g, v in zip(groups, verdicts, strict=True)]


def _filled(
    groups: list[Group], needs: frozenset[str], part: Part, live: Live, micro_batch_size: int
) -> list[Group]:
    """Groups with the reference's and the critic's values, where the judge or the shape asks for them."""
    wanted = {"ref", "value"} & needs
    if not wanted or not groups:
        return groups
    out = list(groups)
    lengths = [live.port.length(g.context, g.candidates) for g in groups]
    order = longest_first(lengths)
    for start in range(0, len(order), micro_batch_size):
        cut = order[start : start + micro_batch_size]
        items = [(groups[i].context, groups[i].candidates) for i in cut]
        batch = live.port.collate(items, [key("fill", groups[i].key) for i in cut]).to(live.device)
        found: dict[str, Tensor] = {}
        if "ref" in wanted:
            found["ref"] = live.references[main_slot(part)](live.port, live.policy, batch)
        if "value" in wanted:
            found["value"] = live.port.readouts(live.policy, batch, frozenset({"value"}))["value"]
        row = 0
        for i in cut:
            rows = slice(row, row + groups[i].size)
            values = {
                name: pad_units(
                    [r[: groups[i].mask.shape[1]].cpu().float() for r in table[rows]], groups[i].mask.shape[1]
                )
                for name, table in found.items()
            }
            out[i] = replace(groups[i], **values)
            row += groups[i].size
    return out


def _tasks(
    stage: Stage, groups: Sequence[list[Group]], live: Live, session: Session, state: RoundState, seed: int
) -> Task | None:
    """The main part's task with the others beside it; None when the main part has no sample."""
    made: list[Task] = []
    for i, (part, judged) in enumerate(zip(stage.parts, groups, strict=True)):
        samples = part.shape(judged, seed=key("shape", seed))
        if not samples and part is stage.main:
            return None
        if not samples:
            continue
        references = {
            slot: Cached(
                state.values.setdefault(f"{i}_{slot}", ValueStore(None)), slot, live.references[slot]
            )
            for slot in part.terms.slots()
        }
        new = len(judged) if i or state.groups is None else len(state.groups[0])
        remember(references, judged[:new], judged[new:], part, stage, live)
        task = _task(part, judged, samples, references, live, session)
        fill_references(task, live, session, seed)
        made.append(task)
    return replace(made[0], also=tuple(made[1:]))


def _task(
    part: Part,
    groups: list[Group],
    samples: list[Sample],
    references: Mapping[str, Reference],
    live: Live,
    session: Session,
) -> Task:
    port, config = live.port, session.config
    used = frozenset[str]().union(*(t.objective.uses for t in part.terms.terms))
    return Task(
        likelihood=RoundLikelihood(port, used & READOUTS),
        terms=part.terms,
        references=references,
        collate=SampleCollator(port, groups),
        examples=samples,
        lengths=[
            port.length(groups[s.group].context, [groups[s.group].candidates[c] for c in s.all_candidates])
            for s in samples
        ],
        sources=[groups[s.group].key for s in samples],
        fold=fold,
        weight=part.weight,
        batch_size=min(part.batch_size or config.batch_size, len(samples)),
        name=part.name,
    )


def _describe(groups: Sequence[Group], live: Live) -> dict[str, float]:
    """Metrics of the groups of one part, the first that has a judge."""
    counts = torch.cat([g.count for g in groups]) if groups else torch.zeros(1)
    found = {"round/groups": float(len(groups)), "length": float(counts.mean())}
    scored = [g for g in groups if {"score", "preference"} & g.verdict.given()]
    if scored:
        scores = [scores_of(g) for g in scored]
        found |= {
            "reward": float(torch.cat(scores).mean()),
            "reward_best": float(torch.stack([s.max() for s in scores]).mean()),
            "reward_std": float(torch.stack([s.std(correction=0) for s in scores]).mean()),
        }
    with_ref = [g for g in groups if g.ref is not None and g.logp is not None and "beam" not in g.origin]
    if with_ref:
        kls = [torch.where(g.mask, g.logp - g.ref, 0.0).sum(-1) for g in with_ref]  # type: ignore[operator]
        found["kl"] = float(torch.cat(kls).mean())
    return found | {f"round/{name}": value for name, value in live.metrics.items()}
