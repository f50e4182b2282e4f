"""Train a reward model: of texts, of feature vectors (images, sessions, expert features), or of each user.

    python scripts/train_reward.py --config scripts/recipes/reward/text_bt.yaml --optim.lr 1e-5

Run the same command again after an interruption and it goes on where it was. The run folder holds the
configuration, metrics.jsonl, checkpoints, quarantine.jsonl, results.json, the exported model and report.html.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch

from triptych.modalities.llm.data import DataConfig
from triptych.modalities.llm.ratings import RatingsConfig, open_rows
from triptych.modalities.llm.review_features import review_rows
from triptych.modalities.llm.reward_model import BodyConfig
from triptych.modalities.llm.reward_setup import set_up_comparisons, set_up_ratings
from triptych.modalities.llm.rewards import vader
from triptych.scripts.common import (
    StopSignal,
    as_dict,
    cache_dir,
    command_line,
    errors_in_one_line,
    parse,
    progress,
    quiet_libraries,
    save_config,
    versions,
)
from triptych.scripts.workplace import open_workplace
from triptych.training.config import EvaluationConfig, ObjectiveConfig, OptimConfig, RunConfig, flat
from triptych.training.evaluation import evaluate, identity_of, summary
from triptych.training.feature_data import FeatureConfig
from triptych.training.feature_setup import (
    IdealPointConfig,
    Open,
    ScorerConfig,
    set_up_features,
    set_up_ideal_points,
)
from triptych.training.fit import Hooks, fit
from triptych.training.loop import make_learner
from triptych.training.quarantine import Quarantine
from triptych.training.reward_run import RewardRun, finish

# Kind -> the groups of settings it uses, and the objective it has unless told otherwise.
GROUPS = {
    "text": ("model", "data"),
    "gap": ("model", "data"),
    "regression": ("model", "ratings"),
    "features": ("features", "scorer"),
    "ideal_points": ("features", "users"),
}
OPTIONAL = {"scorer"}
OBJECTIVES = {"gap": "pit_gap", "regression": "reward_regression"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """A reward model's run.

    kind: 'text' learns from pairs or graded lists of texts, 'gap' how much better than another answer one is
    (PIT), 'regression' several ratings of texts, 'features' from vectors, 'ideal_points' one of each user.
    objective: null for Bradley-Terry with margins where there are any, PIT's gap loss, or regression.
    """

    kind: Literal["text", "gap", "regression", "features", "ideal_points"]
    optim: OptimConfig
    run: RunConfig
    objective: ObjectiveConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    model: BodyConfig | None = None
    data: DataConfig | None = None
    ratings: RatingsConfig | None = None
    features: FeatureConfig | None = None
    scorer: ScorerConfig | None = None
    users: IdealPointConfig | None = None

    def __post_init__(self) -> None:
        used = GROUPS[self.kind]
        for name in ("model", "data", "ratings", "features", "scorer", "users"):
            given = getattr(self, name) is not None
            if given and name not in used:
                raise ValueError(f"kind={self.kind} does not use {name}; it uses {', '.join(used)}")
            if not given and name in used and name not in OPTIONAL:
                raise ValueError(f"kind={self.kind} needs {name}; it uses {', '.join(used)}")

    def chosen_objective(self) -> ObjectiveConfig:
        """The configured objective, or the kind's own."""
        rated = self.features is not None and self.features.attributes
        default = "reward_regression" if rated else OBJECTIVES.get(self.kind, "reward_bt")
        return self.objective or ObjectiveConfig(name=default)


def run(config: Config) -> int:
    """Train, evaluate, export and report; returns the exit code."""
    stop = StopSignal()
    place = open_workplace(config.optim, config.run)
    accelerator, folder, report, quarantine = place.accelerator, place.folder, place.report, place.quarantine
    with accelerator.local_main_process_first():
        reward = set_up(config, device=accelerator.device, quarantine=quarantine, report=report)
    place.keep_first_config(config)
    place.start_trackers(config)
    learner = make_learner(reward.policy, config.optim, accelerator)

    def held_out(policy: torch.nn.Module) -> dict[str, float]:
        assert reward.eval_task is not None
        size = config.evaluation.micro_batch_size
        return summary(
            evaluate(reward.eval_task, policy, accelerator, micro_batch_size=size, seed=config.run.seed)
        )

    identity = identity_of(
        flat(as_dict(config)),
        data_fingerprint=reward.fingerprint,
        base_model_hash=reward.base_hash,
        num_ranks=accelerator.num_processes,
    )
    hooks = Hooks(
        evaluate=held_out if reward.eval_task else None,
        stop=stop,
        report=report,
        progress=progress("train", enabled=place.main),
    )
    outcome = fit(reward.task, learner, config.optim, config.run, accelerator, identity=identity, hooks=hooks)
    if place.main:
        save_config(config, folder)
    if outcome.finished:
        sources = [g.source for g in (config.data, config.ratings, config.features) if g is not None]
        finish(
            reward,
            learner,
            accelerator,
            folder=folder,
            micro_batch_size=config.evaluation.micro_batch_size,
            title=f"{config.kind} reward model on {sources[0]}",
            tags=["reward-model", config.kind, config.chosen_objective().name],
            datasets=sources,
            settings=as_dict(config),
            quarantine=quarantine,
            command=command_line(),
            versions=versions(),
            report=report,
        )
    else:
        report(f"stopped at step {outcome.step} of {outcome.num_steps}; the same command continues")
    accelerator.end_training()
    return 0 if outcome.finished else 128 + stop.number


def set_up(
    config: Config, *, device: torch.device, quarantine: Quarantine, report: Callable[[str], None]
) -> RewardRun:
    """Model, data and tasks of the configured kind."""
    terms = config.chosen_objective().terms()
    if slots := terms.slots():
        raise ValueError(f"a reward model has no reference, and the objective reads {', '.join(slots)}")
    common = {"seed": config.run.seed, "device": device, "quarantine": quarantine, "report": report}
    if config.kind in ("features", "ideal_points"):
        assert config.features is not None
        reader = _reader(config.features)
        if config.users is not None:
            return set_up_ideal_points(config.features, config.users, terms, reader, **common)
        return set_up_features(config.features, config.scorer or ScorerConfig(), terms, reader, **common)
    assert config.model is not None
    common["cache_dir"] = cache_dir()
    if config.ratings is not None:
        return set_up_ratings(config.model, config.ratings, terms, **common)
    assert config.data is not None
    kind = "gap" if config.kind == "gap" else "text"
    return set_up_comparisons(kind, config.model, config.data, terms, **common)


def _reader(config: FeatureConfig) -> Open:
    """Opens a source of feature vectors, made of texts where the configuration says so."""
    rows = partial(open_rows, split=config.split, data_root=config.data_root, revision=config.revision)
    if config.extract == "review_features":
        sentiment = vader()
        return lambda source: review_rows(rows(source), sentiment)
    return rows


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(Config, args, prog="train_reward", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
