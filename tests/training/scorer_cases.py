"""Pairs of vectors that scorers are tried on."""

import torch

from triptych.objectives import Term, Terms, build
from triptych.training.feature_vectors import Vectors
from triptych.training.scoring import ScoreLikelihood, ScoreSample, score_batch

BT = Terms((Term(build("reward_bt")),))
# Cross-entropy of the scores with the label, which may be a tie: PickScore's loss.
SOFT = Terms((Term(build("simpo", beta=1.0, gamma=0.0)),))


def pairs(chosen, rejected, *, users=None, prompts=None, margin=None, strength=None):
    """A batch of pairs of vectors [P, D]; prompts: features of each pair's own, [P, F]."""
    vectors = torch.stack([chosen, rejected], 1).flatten(0, 1)
    who = None if users is None else torch.as_tensor(users).repeat_interleave(2)
    asked = None if prompts is None else prompts.repeat_interleave(2, 0)
    samples = [
        ScoreSample(id=str(i), grades=(1.0, 0.0), margin=margin, strength=strength)
        for i in range(len(chosen))
    ]
    return score_batch(samples, Vectors(vectors, who, asked), [str(i) for i in range(len(vectors))])


def accuracy(scorer, batch):
    pair = ScoreLikelihood()(scorer, batch)
    return float((pair.chosen.logp > pair.rejected.logp).float().mean())
