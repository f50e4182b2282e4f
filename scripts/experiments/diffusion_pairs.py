"""Does Diffusion-DPO obey its labels: true, flipped, random, noisy, and a scorer's?

    python -m triptych.scripts.experiments.diffusion_pairs --save
    python -m triptych.scripts.experiments.diffusion_pairs --cache runs/evidence/diffusion   # keep the base

A small SDXL-class UNet samples a pool of pictures, pairs are labelled by how red they are, and the UNet is
trained on them. It is judged on held-out prompts by another measure, the share of warm hues, which no label
and no scorer ever saw, from the same noise as the untrained model. Training on random labels moves a model
too: every effect is reported less that of random labels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from triptych.modalities.diffusion.likelihood import DiffusionBatch, ElboLikelihood
from triptych.modalities.diffusion.policy import Denoiser
from triptych.objectives import Input
from triptych.scripts.experiments.common import (
    over_seeds,
)
from triptych.scripts.experiments.diffusion_toy import (
    QUICK,
    Judge,
    Pair,
    Pool,
    Sizes,
    align,
    make_pool,
    measured,
    schedule,
    train,
)
from triptych.training.config import ObjectiveConfig, OptimConfig
from triptych.training.order import key
from triptych.training.stats import Estimate

NAME = "diffusion_pairs"
PAPER = "Wallace et al. 2023, arXiv 2311.12908"
REWARD, JUDGED = "redness", "warm_share"
BETA, RATE = 500.0, 1e-4
BETAS = (50.0, BETA, 5000.0)
# Of Bradley-Terry labels, in deviations of the reward; the last is close to chance.
TEMPERATURES = (0.1, 1.0, 6.0)
SCORER_PAIRS = (12, 600)
SCORER_STEPS = 150
Row = dict[str, float]


def bradley_terry(pool: Pool, *, temperature: float, seed: int) -> list[Pair]:
    """Every pair of the pool, the preferred picture first: P = sigmoid(gap of the reward / temperature)."""
    reward = pool.score(REWARD)
    return preferred(pool.pairs(), reward / (temperature * reward.std()), seed=key("labels", seed))


def preferred(pairs: Sequence[Pair], score: Tensor, *, seed: int) -> list[Pair]:
    """The pairs by a draw of Bradley-Terry's model on score [P, K]."""
    generator = torch.Generator().manual_seed(seed)
    coin = torch.rand(len(pairs), generator=generator, dtype=torch.float64)
    gap = torch.stack([score[i, a] - score[i, b] for i, a, b in pairs])
    kept = coin < gap.sigmoid()
    return [(i, a, b) if k else (i, b, a) for (i, a, b), k in zip(pairs, kept.tolist(), strict=True)]


def flipped(pairs: Sequence[Pair]) -> list[Pair]:
    """The opposite labels: those of the reward -r."""
    return [(i, b, a) for i, a, b in pairs]


def accuracy(pairs: Sequence[Pair], score: Tensor) -> float:
    """Share of the pairs whose preferred picture has the higher score."""
    return float(torch.stack([score[i, a] > score[i, b] for i, a, b in pairs]).double().mean())


class Scorer(nn.Module):
    """A small convolutional net that gives each picture [N, Z, H, W] a score, [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 1),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        """Scores, [N]."""
        return self.net(pictures).squeeze(-1)


@dataclass(frozen=True, slots=True)
class ScoreLikelihood:
    """A scorer's score of the clean picture in the place of a log-likelihood, for `reward_bt`."""

    def __call__(self, policy: Any, batch: DiffusionBatch, generator: torch.Generator | None = None) -> Input:
        """The objective's input."""
        return self.assemble(self.terms(policy, batch, generator), batch)

    def terms(self, policy: Any, batch: DiffusionBatch, generator: torch.Generator | None = None) -> Tensor:
        """Scores of the candidates, [C, 1]."""
        (stack,) = batch.stacks
        return policy(stack.latents)[stack.cell.argsort()].unsqueeze(-1)

    def assemble(self, terms: Tensor, batch: DiffusionBatch) -> Input:
        """As for the log-likelihoods of pictures."""
        return ElboLikelihood(schedule=schedule()).assemble(terms, batch)


def scored(pool: Pool, *, num_pairs: int, num_steps: int, seed: int) -> Tensor:
    """Scores [P, K] of a scorer that learnt from some of the pool's pairs, labelled at temperature 1."""
    labels = bradley_terry(pool, temperature=1.0, seed=key("scorer", seed))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(key("taken", seed)))
    taken = [pool.pair(labels[i]) for i in order[:num_pairs].tolist()]
    batch = min(32, len(taken))
    optim = OptimConfig(lr=3e-3, batch_size=batch, micro_batch_size=batch, num_steps=num_steps)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key("scorer", seed, num_pairs))
        scorer = Scorer()
    objective = ObjectiveConfig(name="reward_bt", reference="none")
    train(scorer, taken, objective, optim, seed=seed, likelihood=ScoreLikelihood())
    with torch.no_grad():
        return scorer(pool.pictures.flatten(0, 1)).view(pool.pictures.shape[:2]).double()


def labels_of(pool: Pool, *, seed: int, num_steps: int) -> dict[str, list[Pair]]:
    """Every kind of label, on the same pairs."""
    true, noisy, chance = (bradley_terry(pool, temperature=t, seed=seed) for t in TEMPERATURES)
    named = {
        "true": true,
        "flipped": flipped(true),
        "random": preferred(pool.pairs(), torch.zeros(pool.pictures.shape[:2]), seed=key("random", seed)),
        "noisy": noisy,
        "near chance": chance,
    }
    for name, num_pairs in zip(("weak scorer", "good scorer"), SCORER_PAIRS, strict=True):
        said = scored(pool, num_pairs=num_pairs, num_steps=num_steps, seed=seed)
        # A scorer's label is its order: Bradley-Terry at temperature 0.
        named[name] = preferred(pool.pairs(), 1e9 * said, seed=0)
    return named


def arms() -> dict[str, tuple[str, float, float]]:
    """Name -> labels, beta, learning rate."""
    low, _, high = BETAS
    same = ("true", "flipped", "random", "noisy", "near chance", "weak scorer", "good scorer")
    return {
        **{name: (name, BETA, RATE) for name in same},
        **{f"{n}, beta {b:g}": (n, b, RATE) for n in ("true", "random") for b in (low, high)},
        "fast": ("true", BETA, 10 * RATE),
    }


def run_seed(base: Denoiser, sizes: Sizes, *, seed: int) -> dict[str, Row]:
    """Every arm on one pool: what `Judge.look` says of it, its labels' accuracy, first loss and cost."""
    pool, judge = make_pool(base, sizes, seed=seed), Judge.of(base, sizes, seed=seed)
    steps = SCORER_STEPS if sizes is not QUICK else 10
    labels, truth = labels_of(pool, seed=seed, num_steps=steps), pool.score(REWARD)
    look = partial(judge.look, reward=REWARD, judged=JUDGED)
    found: dict[str, Row] = {"base": look(base), f"best of {sizes.repeats}": best_of(judge)}
    for name, (kind, beta, lr) in arms().items():
        pairs = [pool.pair(pair) for pair in labels[kind]]
        trained = align(base, pairs, "dpo", sizes, seed=seed, lr=lr, beta=beta)
        found[name] = look(trained.policy) | {
            "labels": accuracy(labels[kind], truth),
            "first": trained.losses[0],
            "evaluations": trained.evaluations,
        }
        print(f"seed {seed}, {name}: {_short(found[name])}", file=sys.stderr, flush=True)
    winners = [pool.single((i, a)) for i, a, _ in labels["true"]]
    trained = align(base, winners, "sft", sizes, seed=seed, lr=RATE)
    found["sft"] = look(trained.policy) | {"evaluations": trained.evaluations}
    print(f"seed {seed}, sft: {_short(found['sft'])}", file=sys.stderr, flush=True)
    return found


def _short(row: Row) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in row.items())


def best_of(judge: Judge) -> Row:
    """The reddest of the base's pictures of each held-out prompt: no training, more sampling."""
    pool = judge.pool()
    reward, judged = pool.score(REWARD), measured(JUDGED, pool.pictures.flatten(0, 1))
    place = reward.argmax(-1, keepdim=True)
    taken = judged.view(reward.shape).gather(-1, place)
    return {"reward": float(reward.gather(-1, place).mean()), "judged": float(taken.mean())}


@dataclass(frozen=True, slots=True)
class Results:
    """Arm -> quantity -> a value a seed."""

    rows: Sequence[Mapping[str, Row]]

    def of(self, arm: str, quantity: str = "judged") -> Tensor:
        """[S] float64."""
        return torch.tensor([row[arm][quantity] for row in self.rows], dtype=torch.float64)

    def over(self, arm: str, quantity: str = "judged", *, control: str = "random") -> Estimate:
        """The arm less the control of the same seed."""
        return over_seeds(self.of(arm, quantity) - self.of(control, quantity))
