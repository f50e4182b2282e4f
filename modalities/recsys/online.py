"""Alignment of a trained recommender in rounds: OneRec's Iterative Preference Alignment and its rivals.

A round of IPA (Deng et al. 2025, OneRec, 2502.18965, algorithm 2) is one of its epochs: the policy M_t
searches sessions for a share of the requests, a reward model picks the best and the worst, and every step
minimises

    L = L_NTP(session that followed) + weight * L_preference(best, worst; reference M_t)

with next-token prediction on every request and the preference loss on the share. The paper leaves open what
makes one number of the reward model's towers, beta, the weight and T: see `ScoringConfig` and the recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from triptych.modalities.recsys.data import DataConfig, describe, load_interactions
from triptych.modalities.recsys.exported import Recommender, load
from triptych.modalities.recsys.interactions import Interactions, Split, leave_one_out
from triptych.modalities.recsys.logged import LoggedSessions
from triptych.modalities.recsys.model import SessionPolicy
from triptych.modalities.recsys.ranked import RankingConfig
from triptych.modalities.recsys.requests import (
    RequestConfig,
    UsersConfig,
    requests_of,
    users_of,
    with_users,
)
from triptych.modalities.recsys.session_judges import JUDGES
from triptych.modalities.recsys.session_port import SessionPort
from triptych.modalities.recsys.session_sources import SOURCES
from triptych.modalities.recsys.trie import Trie
from triptych.training import round_recipes
from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.groups import Group, scores_of
from triptych.training.plugs import PlugConfig
from triptych.training.quarantine import Quarantine
from triptych.training.references import FrozenCopy, content_hash
from triptych.training.round_recipes import AUTO, PartConfig, Plugs, RoundSettings, StageConfig
from triptych.training.rounds import Rounds
from triptych.training.stages import Keep, Stage

PLUGS = Plugs(modality="recsys", sources=SOURCES, judges=JUDGES)
PREFERENCE = "preference"


@dataclass(frozen=True, kw_only=True)
class SessionEvaluation:
    """What is looked at during training, and what is kept for judges that training never asks.

    logs: file of logged sessions; requests of its judge users are answered at every evaluation and the
    answers written down, unjudged but by the recipe's own reward model. requests: at most so many (0: all);
    width: beams of each, draws: samples of each. alarm: another judge, of requests of the logs' validation
    users: where it goes down, beyond its interval, while the reward goes up, the run stops. alarm_requests:
    how many. ranking: of the held-out items. shown: users in the report.
    """

    logs: str
    requests: int = 0
    width: int = 16
    draws: int = 4
    batch_size: int = 64
    alarm: PlugConfig | None = None
    alarm_requests: int = 300
    ranking: RankingConfig = field(default_factory=RankingConfig)
    shown: int = 8

    def __post_init__(self) -> None:
        least = {"requests": 0, "width": 1, "draws": 1, "batch_size": 1, "alarm_requests": 1, "shown": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"evaluation.{name}={getattr(self, name)} must be at least {low}")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """A whole alignment run.

    base: folder of an exported session model. source, judge, objective, shape: of the preference loss, which
    takes `share` of a round's requests (OneRec's r_DPO) and counts `weight` (its lambda); weight 0 is the
    control that only goes on with next-token prediction, without drawing anything. next_token: weight of
    next-token prediction on the session that followed, for every request; 0 leaves it out. rounds:
    num_contexts are requests, num_epochs passes over them. optim.batch_size: requests a step. users: must be
    those of the logs.
    """

    base: str
    data: DataConfig
    source: PlugConfig
    objective: ObjectiveConfig
    rounds: RoundSettings
    optim: OptimConfig
    run: RunConfig
    evaluation: SessionEvaluation
    judge: PlugConfig | None = None
    shape: PlugConfig = AUTO
    share: float = 1.0
    weight: float = 1.0
    next_token: float = 1.0
    keep: Keep = field(default_factory=lambda: Keep(stage="each_round"))
    anchors: list[PartConfig] = field(default_factory=list)
    users: UsersConfig = field(default_factory=UsersConfig)
    requests: RequestConfig = field(default_factory=RequestConfig)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} of the requests must be in (0, 1]")
        for name in ("weight", "next_token"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if not self.weight and not self.next_token:
            raise ValueError("weight=0 and next_token=0 leave nothing to learn")
        if not self.next_token and self.share < 1:
            raise ValueError(
                f"next_token=0 leaves share={self.share} of the requests nothing to be a share of"
            )
        if unknown := set(self.requests.parts) - set(self.users.parts):
            raise ValueError(f"requests.parts: {', '.join(sorted(unknown))} is not among users.parts")
        if "judge" in self.users.parts:
            raise ValueError("users.parts holds the judge users: who is trained on cannot judge")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recipe:
    """`round_recipes.HasRounds` of a run."""

    source: PlugConfig
    judge: PlugConfig | None
    shape: PlugConfig
    objective: ObjectiveConfig
    anchors: list[PartConfig]
    keep: Keep
    rounds: RoundSettings
    stages: list[StageConfig] = field(default_factory=list)


def stages_of(config: OnlineConfig) -> list[Stage]:
    """The one stage of a recipe; ValueError, with the reason, for what could not mean what it says."""
    if config.optim.num_steps is not None or config.optim.num_epochs != 1:
        raise ValueError(
            "optim.num_steps, optim.num_epochs: rounds.num_rounds and rounds.num_epochs decide on the length"
        )
    preference = PartConfig(
        name=PREFERENCE,
        source=config.source,
        objective=config.objective,
        judge=config.judge,
        shape=config.shape,
        weight=config.weight,
        batch_size=max(1, round(config.share * config.optim.batch_size)),
        share=config.share,
    )
    next_token = PartConfig(
        name="next_token",
        source=PlugConfig(name="followed"),
        objective=ObjectiveConfig(name="sft", options={"reduce": "sum"}, reference="none"),
        weight=config.next_token,
    )
    parts = [p for p in (next_token, preference) if p.weight]
    first = parts[0]
    recipe = _Recipe(
        source=first.source,
        judge=first.judge,
        shape=first.shape,
        objective=first.objective,
        anchors=[*parts[1:], *config.anchors],
        keep=config.keep,
        rounds=config.rounds,
    )
    return round_recipes.stages_of(recipe, PLUGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRun:
    """What `set_up_online` made. split: leave-one-out of the events of config.users.parts."""

    policy: SessionPolicy
    base: Recommender
    port: SessionPort
    rounds: Rounds
    logs: LoggedSessions
    events: Interactions
    split: Split
    switches: tuple[str, ...]
    base_hash: str
    fingerprint: str


def set_up_online(
    config: OnlineConfig,
    stages: Sequence[Stage],
    *,
    device: torch.device,
    quarantine: Quarantine,
    report: Callable[[str], None],
) -> OnlineRun:
    """Read model, events and logs, and put the rounds together. ValueError for what a user can mend."""
    base = load(Path(config.base))
    if base.ids is None or not isinstance(base.policy, SessionPolicy):
        raise ValueError(f"base={config.base}: it scores single items; sessions need model.kind=session")
    events = load_interactions(config.data, quarantine=quarantine, report=report)
    if events.items != base.items:
        raise ValueError(
            f"base={config.base} knows {len(base.items)} items, and data.source={config.data.source} holds "
            f"{len(events.items)} others or in another order: give the data that it was trained on"
        )
    logs = LoggedSessions.read(Path(config.evaluation.logs))
    _check_logs(config, events, logs)
    used = with_users(events, config.users)
    split = leave_one_out(used)
    owners_U = base.owners(events.users)
    users = users_of(events, config.users, config.requests.parts)
    contexts = requests_of(split.train, users, config.requests, owners_U)
    switches = tuple(describe(used, split))
    for line in switches:
        report(line)
    report(f"{len(contexts):,} requests of {len({r.user for r in contexts}):,} users to learn from")
    policy = base.policy.train().to(device)
    port = SessionPort(
        trie=Trie.of(base.ids.codes_IL, base.ids.sizes),
        items=base.items,
        window=base.window,
        num_items=config.requests.items,
    )
    rounds = Rounds(
        stages=stages, contexts=contexts, port=port, frozen=FrozenCopy.of(policy), observe=observe
    )
    facts = "\x1f".join([events.fingerprint, logs.fingerprint])
    return OnlineRun(
        policy=policy,
        base=base,
        port=port,
        rounds=rounds,
        logs=logs,
        events=events,
        split=split,
        switches=switches,
        base_hash=content_hash(policy),
        fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
    )


def _check_logs(config: OnlineConfig, events: Interactions, logs: LoggedSessions) -> None:
    """ValueError for logs of other data, or whose judges would be trained on here."""
    path = config.evaluation.logs
    if logs.about.get("events") != events.fingerprint:
        raise ValueError(f"evaluation.logs={path}: made of other data than data.source={config.data.source}")
    learning = set(users_of(events, config.users, config.users.parts))
    judging = set(logs.of("judge").user_N.tolist())
    if both := sorted(learning & judging):
        raise ValueError(
            f"evaluation.logs={path}: user {events.users[both[0]]} and {len(both) - 1} others judge there "
            "and learn here; give users.shares and users.seed of the logs"
        )


def observe(groups: Sequence[Group]) -> Mapping[str, float]:
    """How different the sessions of a round are: a pair of near copies teaches little.

    distinct: share of different sessions of a request; overlap: share of common items in its best and worst
    session; margin: their difference of scores; items: share of different items in all sessions.
    """
    found: list[tuple[float, float, float]] = []
    every = torch.cat([c.items for g in groups for c in g.candidates])
    for g in groups:
        rows = torch.stack([c.items for c in g.candidates])
        distinct = len(rows.unique(dim=0)) / len(rows)
        if not {"score", "preference"} & g.verdict.given():
            continue
        score = scores_of(g)
        best, worst = rows[int(score.argmax())], rows[int(score.argmin())]
        overlap = float(torch.isin(best, worst).float().mean())
        found.append((distinct, overlap, float(score.max() - score.min())))
    values = {"round/different_items": float(len(every.unique()))}
    if found:
        means = torch.tensor(found).mean(0).tolist()
        values |= dict(zip(("round/distinct", "round/overlap", "round/margin"), means, strict=True))
    return values
