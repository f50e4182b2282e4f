"""Everything a feature reward model's run needs, put together from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from triptych.objectives import PairLogLik, Terms
from triptych.objectives.metrics import reward_wins
from triptych.training.evaluation import estimate
from triptych.training.feature_data import (
    FeatureCollator,
    FeatureConfig,
    FeatureData,
    FeatureExample,
    holds_out,
    prompts_of,
    read_features,
    split,
    standardised,
    standardised_ratings,
    standardised_sample,
)
from triptych.training.feature_vectors import Standardise
from triptych.training.ideal_points import Closeness, IdealPoints, NewUsers, Prototypes
from triptych.training.loop import Task
from triptych.training.order import key
from triptych.training.quarantine import Quarantine
from triptych.training.references import content_hash, unwrapped
from triptych.training.report import Table
from triptych.training.reward_run import Results, RewardRun
from triptych.training.scorers import FeatureReward, fit_scorer, save_scorer
from triptych.training.scoring import INPUT_OF, ScoreLikelihood
from triptych.training.stats import Estimate, paired_difference

SNIPPET = """from pathlib import Path

from triptych.training.scorers import load_scorer

scorer, facts = load_scorer(Path('.'))
"""
Open = Callable[[str], Iterable[tuple[str, object]]]


@dataclass(frozen=True, kw_only=True)
class ScorerConfig:
    """hidden: sizes of the hidden layers; none for a linear reward."""

    hidden: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if any(size < 1 for size in self.hidden):
            raise ValueError(f"scorer.hidden={self.hidden} must be sizes of at least 1")


@dataclass(frozen=True, kw_only=True)
class IdealPointConfig:
    """Users as mixtures of prototypes (`IdealPoints`).

    prototypes: 'latent', 'items', or 'prompts' where taste depends on the prompt and every row has its
    features (PAL-B, whose networks have prompt_hidden layers).
    unseen_fraction: share of the users that training never sees; each gets mixture weights from its first
    `shots` pairs and is evaluated on its others. l2: penalty of those weights' logits.
    """

    num_prototypes: int
    latent: int
    hidden: list[int] = field(default_factory=list)
    closeness: Closeness = "distance"
    prototypes: Prototypes = "latent"
    prompt_hidden: list[int] = field(default_factory=list)
    unseen_fraction: float = 0.0
    shots: int = 10
    l2: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.unseen_fraction < 1:
            raise ValueError(f"users.unseen_fraction={self.unseen_fraction} must be in [0, 1)")
        for name in ("num_prototypes", "latent", "shots"):
            if getattr(self, name) < 1:
                raise ValueError(f"users.{name}={getattr(self, name)} must be at least 1")
        if self.prompt_hidden and self.prototypes != "prompts":
            raise ValueError(f"users.prototypes={self.prototypes} does not use users.prompt_hidden")
        if self.l2 < 0:
            raise ValueError(f"users.l2={self.l2} must be 0 or positive")


def _read(
    config: FeatureConfig,
    open_rows: Open,
    *,
    users: bool,
    prompts: bool = False,
    quarantine: Quarantine,
    seed: int,
    report: Callable[[str], None],
) -> FeatureData:
    """Read, split and say what was found. Ties are learnt from, and no ranking of a held-out one is right."""

    def read(source: str) -> list[FeatureExample]:
        return read_features(open_rows(source), config, quarantine=quarantine, users=users, prompts=prompts)

    held_out = None if config.eval_source is None else read(config.eval_source)
    data = split(read(config.source), held_out, fraction=config.eval_fraction, seed=seed)
    ties = sum(e.tied for e in data.held_out)
    data = replace(data, held_out=tuple(e for e in data.held_out if not e.tied))
    left = f", {ties} held-out ties left out" if ties else ""
    report(f"data: {config.source}, {len(data.train)} to train on, {len(data.held_out)} held out{left}")
    if quarantine.counts:
        report(f"left out: {quarantine.summary()}")
    return data


def _task(examples: Sequence[FeatureExample], terms: Terms, collate: FeatureCollator) -> Task:
    return Task(
        likelihood=ScoreLikelihood(),
        terms=terms,
        references={},
        collate=collate,
        examples=examples,
        lengths=[len(e.vectors) for e in examples],
        sources=[e.source for e in examples],
    )


def _check_objective(terms: Terms, data: FeatureData) -> None:
    sample = data.train[0].sample
    fields = {name for name in ("margin", "strength") if getattr(sample, name) is not None}
    terms.check(INPUT_OF[sample.kind], frozenset(fields | ({"target"} if sample.ratings else set())))


def set_up_features(
    config: FeatureConfig,
    scorer: ScorerConfig,
    terms: Terms,
    open_rows: Open,
    *,
    seed: int,
    device: torch.device,
    quarantine: Quarantine,
    report: Callable[[str], None],
) -> RewardRun:
    """One reward for everyone from pairs, or several from ratings where features.attributes names them."""
    data = _read(config, open_rows, users=False, quarantine=quarantine, seed=seed, report=report)
    _check_objective(terms, data)
    outputs = standardised_ratings([e.sample for e in data.train]) if config.attributes else None
    policy = FeatureReward(standardised(data.train), hidden=scorer.hidden, outputs=outputs, seed=seed)
    names = tuple(config.attributes) or ("reward",)

    def in_model_units(examples: Sequence[FeatureExample]) -> list[FeatureExample]:
        if outputs is None:
            return list(examples)
        return [replace(e, sample=standardised_sample(e.sample, outputs)) for e in examples]

    def export(folder: Path, state: Mapping[str, Tensor] | None) -> None:
        save_scorer(policy, folder, facts={"names": names, "source": config.source})

    collate = FeatureCollator()
    return RewardRun(
        policy=policy.to(device),
        task=_task(in_model_units(data.train), terms, collate),
        eval_task=_task(in_model_units(data.held_out), terms, collate) if data.held_out else None,
        clusters=tuple(e.context for e in data.held_out),
        names=names,
        fingerprint=data.fingerprint,
        base_hash=content_hash(policy),
        base_model="feature vectors",
        snippet=SNIPPET,
        export=export,
        outputs=policy.outputs,
        more=lambda trained: (_weights_of(trained), {}),
    )


def _weights_of(policy: nn.Module) -> list[Table]:
    """What each standardised feature is worth to a linear reward, where there are few enough to read."""
    scorer = unwrapped(policy)
    if not isinstance(scorer, FeatureReward) or scorer.hidden or len(scorer.inputs.mean) > 32 or scorer.rated:
        return []
    weights = next(scorer.network.parameters()).detach()[0].tolist()
    lines = [[f"feature {i}", w] for i, w in enumerate(weights)]
    return [Table("Weights", ["feature", "weight"], lines, "Reward for one standard deviation more.")]


def set_up_ideal_points(
    config: FeatureConfig,
    settings: IdealPointConfig,
    terms: Terms,
    open_rows: Open,
    *,
    seed: int,
    device: torch.device,
    quarantine: Quarantine,
    report: Callable[[str], None],
) -> RewardRun:
    """A reward of each user's own, from pairs that name their users."""
    if config.attributes:
        raise ValueError("kind=ideal_points learns from pairs of users; leave features.attributes empty")
    asked = settings.prototypes == "prompts"
    everything = _read(
        config, open_rows, users=True, prompts=asked, quarantine=quarantine, seed=seed, report=report
    )
    _check_objective(terms, everything)
    fraction = settings.unseen_fraction
    names = sorted({e.user or "" for e in everything.train})
    unseen = {name for name in names if holds_out(f"user {name}", fraction=fraction, seed=seed)}
    if len(unseen) == len(names):
        raise ValueError(f"users.unseen_fraction={fraction} leaves none of {len(names)} users to train on")
    users = {name: i for i, name in enumerate(n for n in names if n not in unseen)}
    train = [e for e in everything.train if e.user in users]
    held_out = [e for e in everything.held_out if e.user in users]
    policy = IdealPoints(
        standardised(train),
        num_users=len(users),
        num_prototypes=settings.num_prototypes,
        latent=settings.latent,
        hidden=settings.hidden,
        closeness=settings.closeness,
        prototypes=settings.prototypes,
        prompts=Standardise.of(prompts_of(train)) if asked else None,
        prompt_hidden=settings.prompt_hidden,
        seed=seed,
    )
    new = [e for e in (*everything.train, *everything.held_out) if e.user in unseen]
    report(f"users: {len(users)} seen, {len(unseen)} never trained on")

    def export(folder: Path, state: Mapping[str, Tensor] | None) -> None:
        save_scorer(policy, folder, facts={"users": list(users), "source": config.source})

    def more(trained: nn.Module) -> Results:
        scorer = unwrapped(trained)
        assert isinstance(scorer, IdealPoints)
        shared = shared_results(scorer, held_out, users) if held_out else {}
        found = shared | (unseen_results(scorer, new, terms, settings, seed=seed) if new else {})
        note = "Intervals over contexts, or over users never trained on. 'mean user': one reward for all."
        lines = [[name, value] for name, value in found.items()]
        return ([Table("Users", ["measure", "value"], lines, note)] if lines else []), found

    collate = FeatureCollator(users)
    return RewardRun(
        policy=policy.to(device),
        task=_task(train, terms, collate),
        eval_task=_task(held_out, terms, collate) if held_out else None,
        clusters=tuple(e.context for e in held_out),
        names=("reward",),
        fingerprint=everything.fingerprint,
        base_hash=content_hash(policy),
        base_model="feature vectors",
        snippet=SNIPPET,
        export=export,
        more=more,
    )


@torch.no_grad()
def right_pairs(policy: nn.Module, examples: Sequence[FeatureExample], collate: FeatureCollator) -> Tensor:
    """1 where a pair is ranked rightly, one half for a tie, [M]."""
    device = next(policy.parameters()).device
    pair = ScoreLikelihood()(policy, collate(examples).to(device))
    assert isinstance(pair, PairLogLik)
    return reward_wins(pair).cpu()


def shared_results(
    scorer: IdealPoints, examples: Sequence[FeatureExample], users: Mapping[str, int]
) -> dict[str, Estimate]:
    """Accuracy of each user's own mixture, of the mean user's for everybody, and their difference."""
    own = right_pairs(scorer, examples, FeatureCollator(users))
    mean = right_pairs(scorer, examples, FeatureCollator())
    clusters = [e.context for e in examples]
    return {
        "accuracy, mean user": estimate(mean, clusters=clusters),
        "accuracy, own - mean user": paired_difference(mean, own, seed=0, clusters=clusters),
    }


def unseen_results(
    scorer: IdealPoints,
    examples: Sequence[FeatureExample],
    terms: Terms,
    settings: IdealPointConfig,
    *,
    seed: int,
) -> dict[str, Estimate]:
    """Accuracy for users that training never saw, with weights from `shots` pairs each; {} if too few."""
    by_user: dict[str, list[FeatureExample]] = {}
    for e in sorted(examples, key=lambda e: key("shot", seed, e.sample.id)):
        by_user.setdefault(e.user or "", []).append(e)
    by_user = {name: es for name, es in by_user.items() if len(es) > settings.shots}
    if not by_user:
        return {}
    users = {name: i for i, name in enumerate(by_user)}
    shots = [e for es in by_user.values() for e in es[: settings.shots]]
    others = [e for es in by_user.values() for e in es[settings.shots :] if not e.tied]
    if not others:
        return {}
    device = scorer.logits.device
    new = NewUsers(scorer, len(users)).to(device)
    fit_scorer(new, FeatureCollator(users)(shots).to(device), terms, l2=settings.l2 / len(shots))
    own = right_pairs(new, others, FeatureCollator(users))
    mean = right_pairs(scorer, others, FeatureCollator())
    clusters = [e.user for e in others]
    label = f"accuracy, unseen users, {settings.shots} pairs"
    return {
        label: estimate(own, clusters=clusters),
        f"{label}, own - mean user": paired_difference(mean, own, seed=0, clusters=clusters),
    }
