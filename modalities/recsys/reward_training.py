"""Training of OneRec's session reward model on logged sessions, and how good it is on validation users.

What users did has a likelihood under the towers' probabilities p_k, log P(labels) = sum_k [y_k log p_k +
(1 - y_k) log(1 - p_k)], so the sum of the towers' cross-entropies (2502.18965, 3.3) is the objective `sft`.

Shapes: N sessions, m items of a session, K towers, R members, I items.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.reward_model import (
    RewardEnsemble,
    RewardModelConfig,
    ScoringConfig,
    SessionReward,
    latest,
    make_member,
)
from triptych.objectives import Input, LogLik, Term, Terms, build
from triptych.objectives.links import logistic
from triptych.training.config import OptimConfig
from triptych.training.evaluation import evaluate
from triptych.training.fit import planned_steps
from triptych.training.loop import Task, make_learner, train_step
from triptych.training.meters import Meter
from triptych.training.order import key
from triptych.training.references import unwrapped

TRAIN, VALIDATION = 0, 1
NUM_BINS = 10


class RewardLogs(Protocol):
    """Logged requests, N of them.

    user_N: whose it was. history: item ids before it, a row a request. items_Nm: what was shown, -1 = none.
    signals: by tower; of items, [N, m], or of the session, [N], in [0, 1]. split_N: 0 = train, 1 =
    validation, anything else is not looked at.
    """

    @property
    def user_N(self) -> Tensor:
        """See the class."""
        ...

    @property
    def history(self) -> Jagged:
        """See the class."""
        ...

    @property
    def items_Nm(self) -> Tensor:
        """See the class."""
        ...

    @property
    def signals(self) -> Mapping[str, Tensor]:
        """See the class."""
        ...

    @property
    def split_N(self) -> Tensor:
        """See the class."""
        ...


@dataclass(frozen=True, kw_only=True)
class RewardTrainingConfig:
    """How an ensemble is trained and scores.

    optim: of each member; num_epochs are the most. patience: epochs in a row without a lower validation loss
    after which a member stops; the weights of its best epoch are kept. micro_batch_size of evaluation is that
    of optim.
    """

    optim: OptimConfig
    model: RewardModelConfig = field(default_factory=RewardModelConfig)
    scoring: ScoringConfig = field(default_factory=ScoringConfig)
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"reward.patience={self.patience} must be at least 1")
        if self.optim.average:
            raise ValueError(
                f"reward.optim.average={self.optim.average}: the best epoch is kept, not an average"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardExample:
    """One logged session. history: item ids, oldest first. items: [m]. labels: [K] in [0, 1]."""

    id: str
    source: str
    history: Tensor
    items: Tensor
    labels: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardBatch:
    """Sessions, one a row of the history, with labels [N, K]."""

    history: Jagged
    items_Nm: Tensor
    labels_NK: Tensor
    keys: tuple[str, ...]
    ids: tuple[str, ...]

    @property
    def counts(self) -> Tensor:
        """Labels of each session, [N]."""
        return self.labels_NK.new_full((len(self.labels_NK),), self.labels_NK.shape[1])

    def to(self, device: torch.device) -> RewardBatch:
        """The batch on a device."""
        return replace(
            self,
            history=self.history.to(device),
            items_Nm=self.items_Nm.to(device, non_blocking=True),
            labels_NK=self.labels_NK.to(device, non_blocking=True),
        )


@dataclass(frozen=True, slots=True)
class ResponseLikelihood:
    """Log-likelihood of what users did under the reward model's probabilities; a label may be a share."""

    def __call__(
        self, policy: nn.Module, batch: RewardBatch, generator: torch.Generator | None = None
    ) -> Input:
        """LogLik of the batch, [N]."""
        return self.assemble(self.terms(policy, batch, generator), batch)

    def terms(
        self, policy: nn.Module, batch: RewardBatch, generator: torch.Generator | None = None
    ) -> Tensor:
        """y log p + (1 - y) log(1 - p) of every tower, [N, K], in float32 (float64 stays)."""
        logits_NK = policy(batch.history, batch.items_Nm)
        logits_NK = logits_NK if logits_NK.dtype == torch.float64 else logits_NK.float()
        return -logistic(logits_NK, batch.labels_NK)

    def assemble(self, terms: Tensor, batch: RewardBatch) -> Input:
        """Sums over the towers."""
        return LogLik(terms.sum(-1), batch.counts)


def session_labels(signals: Mapping[str, Tensor], items_Nm: Tensor, towers: Sequence[str]) -> Tensor:
    """Label of each session and tower, [N, K]: a signal of the session [N], or the mean of one of its items.

    Means are over the items that there are. ValueError for a signal that is absent, has another shape or is
    outside of [0, 1], or a session without an item.
    """
    there_Nm = items_Nm >= 0
    if bool((~there_Nm.any(1)).any()):
        raise ValueError(f"session {int((~there_Nm.any(1)).nonzero()[0, 0])} has no item")
    columns = []
    for name in towers:
        if name not in signals:
            raise ValueError(f"there is no signal '{name}'; there are {', '.join(signals) or 'none'}")
        values = signals[name].float()
        if values.shape not in (items_Nm.shape, items_Nm.shape[:1]):
            shapes = f"{tuple(items_Nm.shape)} or {tuple(items_Nm.shape[:1])}"
            raise ValueError(f"signal '{name}' has shape {tuple(values.shape)}; expected {shapes}")
        if values.ndim == 2:
            values = torch.where(there_Nm, values, 0.0).sum(1) / there_Nm.sum(1)
        if not bool(((values >= 0) & (values <= 1)).all()):
            raise ValueError(f"signal '{name}' must be in [0, 1] and finite for every session")
        columns.append(values)
    return torch.stack(columns, -1)


def reward_examples(logs: RewardLogs, config: RewardModelConfig, *, split: int) -> list[RewardExample]:
    """The requests of a split; ValueError when there is none."""
    rows = (logs.split_N == split).nonzero()[:, 0]
    if not len(rows):
        raise ValueError(f"no logged session has split {split} (0 = train, 1 = validation)")
    labels = session_labels({n: s[rows] for n, s in logs.signals.items()}, logs.items_Nm[rows], config.towers)
    history = latest(logs.history, config.window)
    held = history.values.split(history.lengths.tolist())
    return [
        RewardExample(
            id=str(row),
            source=f"request {row} of user {int(logs.user_N[row])}",
            history=held[row],
            items=logs.items_Nm[row],
            labels=label,
        )
        for row, label in zip(rows.tolist(), labels, strict=True)
    ]


def collate(examples: Sequence[RewardExample], draws: Sequence[object] = ()) -> RewardBatch:
    """One batch."""
    return RewardBatch(
        history=Jagged.of([e.history for e in examples]),
        items_Nm=torch.stack([e.items for e in examples]),
        labels_NK=torch.stack([e.labels for e in examples]),
        keys=tuple(_hash(e) for e in examples),
        ids=tuple(e.id for e in examples),
    )


def _hash(example: RewardExample) -> str:
    text = f"{example.history.tolist()}|{example.items.tolist()}"
    return hashlib.sha256(text.encode()).hexdigest()


def reward_task(examples: Sequence[RewardExample]) -> Task:
    """Sum over the towers of the cross-entropy, mean over sessions."""
    return Task(
        likelihood=ResponseLikelihood(),
        terms=Terms((Term(build("sft", reduce="sum"), 1.0, "none"),)),
        references={},
        collate=collate,
        examples=examples,
        lengths=[len(e.history) + len(e.items) for e in examples],
        sources=[e.source for e in examples],
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedReward:
    """An ensemble in evaluation mode, its metrics on validation, and each member's losses there by epoch."""

    ensemble: RewardEnsemble
    metrics: dict[str, float]
    losses: tuple[tuple[float, ...], ...]


def _silent(line: str) -> None:
    pass


def train_reward_model(
    logs: RewardLogs,
    config: RewardTrainingConfig,
    *,
    num_items: int,
    accelerator: Accelerator,
    features_IF: Tensor | None = None,
    report: Callable[[str], None] = _silent,
) -> TrainedReward:
    """Train every member on the sessions of split 0; stop, scale and measure on those of split 1 alone.

    Members differ in their first weights, dropout and order of samples, not in their data. Members take
    minutes, so they are not checkpointed. ValueError for logs that lack a split or a signal;
    `NonFiniteError` as in `train_step`.
    """
    if bool((logs.items_Nm >= num_items).any()) or bool((logs.history.values >= num_items).any()):
        raise ValueError(f"num_items={num_items}, but the logs have items of that number or above")
    train = reward_task(reward_examples(logs, config.model, split=TRAIN))
    held_out = reward_task(reward_examples(logs, config.model, split=VALIDATION))
    members, losses = [], []
    for i in range(config.model.num_members):
        seed = key("reward member", config.seed, i)
        member = make_member(config.model, num_items, seed=seed, features_IF=features_IF)
        found = _train_member(member, train, held_out, config, accelerator, seed)
        report(
            f"reward model {i + 1} of {config.model.num_members}: validation loss {min(found):.4f} after "
            f"epoch {found.index(min(found)) + 1} of {len(found)}"
        )
        members.append(member)
        losses.append(tuple(found))
    ensemble = RewardEnsemble(members, config.scoring).to(accelerator.device).eval()
    sessions = _of(logs, VALIDATION, accelerator.device)
    probabilities_RNK = ensemble.probabilities(*sessions)
    ensemble.fit_scale(probabilities_RNK)
    metrics = reward_metrics(probabilities_RNK.mean(0).cpu(), logs, config.model.towers, num_items=num_items)
    return TrainedReward(ensemble=ensemble, metrics=metrics, losses=tuple(losses))


def _train_member(
    member: SessionReward,
    train: Task,
    held_out: Task,
    config: RewardTrainingConfig,
    accelerator: Accelerator,
    seed: int,
) -> list[float]:
    """Train in place up to the best epoch; validation losses by epoch."""
    optim = config.optim
    learner = make_learner(member, optim, accelerator)
    num_steps = planned_steps(optim, len(train.examples))
    per_epoch = -(-len(train.examples) // optim.batch_size)
    meter, losses, best = Meter(accelerator.device), [], {}
    while learner.step < num_steps:
        train_step(train, learner, optim, accelerator, seed=seed, num_steps=num_steps, meter=meter)
        if learner.step % per_epoch and learner.step < num_steps:
            continue
        rows = evaluate(
            held_out, learner.policy, accelerator, micro_batch_size=optim.micro_batch_size, seed=0
        )
        losses.append(float(rows["loss"].mean()))
        if losses[-1] == min(losses):
            best = {n: v.detach().clone() for n, v in unwrapped(learner.policy).state_dict().items()}
        elif len(losses) - 1 - losses.index(min(losses)) >= config.patience:
            break
    unwrapped(learner.policy).load_state_dict(best)
    return losses


def _of(logs: RewardLogs, split: int, device: torch.device) -> tuple[Jagged, Tensor, Tensor]:
    """Histories, sessions and rows, as an ensemble reads them."""
    rows = (logs.split_N == split).nonzero()[:, 0].to(device)
    return logs.history.to(device), logs.items_Nm.to(device)[rows], rows


def reward_metrics(
    probability_NK: Tensor, logs: RewardLogs, towers: Sequence[str], *, num_items: int
) -> dict[str, float]:
    """How good probabilities of the validation sessions are, by tower, beside two baselines.

    bce: cross-entropy; base_rate_bce: of the training mean as everybody's probability; calibration: see
    `calibration_error`; within_user_auc, and item_mean_auc: that of `item_mean_scores`, which know good items
    but no user.
    """
    train, held = (logs.split_N == split for split in (TRAIN, VALIDATION))
    labels_NK = session_labels(logs.signals, logs.items_Nm, towers)
    found: dict[str, float] = {}
    for k, name in enumerate(towers):
        p_N, y_N, user_N = probability_NK[:, k].double(), labels_NK[held, k].double(), logs.user_N[held]
        rate_N = labels_NK[train, k].double().mean().expand_as(y_N)
        baseline_N = item_mean_scores(logs, name, num_items=num_items)[held]
        found |= {
            f"{name}/bce": _bce(p_N, y_N),
            f"{name}/base_rate_bce": _bce(rate_N, y_N),
            f"{name}/calibration": calibration_error(p_N, y_N),
            f"{name}/within_user_auc": within_user_auc(p_N, y_N, user_N),
            f"{name}/item_mean_auc": within_user_auc(baseline_N, y_N, user_N),
        }
    return found


def _bce(p_N: Tensor, y_N: Tensor) -> float:
    return float(nn.functional.binary_cross_entropy(p_N.clamp(1e-7, 1 - 1e-7), y_N))


def calibration_error(p_N: Tensor, y_N: Tensor) -> float:
    """Mean over bins of |mean p - mean y|, by their size; bins of equal numbers of sessions by rising p.

    Nguyen and O'Connor 2015, section 4: bins of equal width would leave most of them empty for rare signals.
    """
    order = p_N.argsort(stable=True)
    bins = torch.tensor_split((p_N - y_N)[order], min(NUM_BINS, len(p_N)))
    return float(sum(gap.sum().abs() for gap in bins) / len(p_N))


def within_user_auc(score_N: Tensor, label_N: Tensor, user_N: Tensor) -> float:
    """Chance that of two sessions of a user the one with the higher label has the higher score, ties half.

    Labels of 0 and 1 make it the area under the ROC curve. Mean over the users who have two labels; NaN when
    nobody has.
    """
    order = user_N.argsort(stable=True)
    counts = user_N.unique(return_counts=True)[1].tolist()
    found = []
    for score, label in zip(score_N[order].split(counts), label_N[order].split(counts), strict=True):
        better = label.unsqueeze(1) > label
        if better.any():
            ahead = (score.unsqueeze(1) - score)[better]
            found.append(((ahead.sign() + 1) / 2).mean())
    return float(torch.stack(found).mean()) if found else float("nan")


def item_mean_scores(logs: RewardLogs, name: str, *, num_items: int, prior: float = 5.0) -> Tensor:
    """Mean over a session's items of each item's own mean label in training, [N].

    Item means are (sum + prior * mean of all) / (count + prior); a session's signal is that of its items.
    """
    items, there = logs.items_Nm, logs.items_Nm >= 0
    values = logs.signals[name].double()
    values = values if values.ndim == 2 else values.unsqueeze(1).expand(items.shape)
    used = there & (logs.split_N == TRAIN).unsqueeze(1)
    mean = values[used].mean()
    sums = torch.zeros(num_items, dtype=torch.float64).index_add(0, items[used], values[used])
    counts = torch.bincount(items[used], minlength=num_items)
    means_I = (sums + prior * mean) / (counts + prior)
    return torch.where(there, means_I[items.clamp(min=0)], 0.0).sum(1) / there.sum(1)
