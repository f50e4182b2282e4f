"""Reward models over feature vectors: linear, a small network, ideal points of users.

Image and session embeddings and expert features go through these; what makes the vectors is frozen and stays
outside. Shapes: C candidates, N objectives, D features, E latent, P prototypes, U users.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triptych.objectives import Terms
from triptych.training.atomic import clean_temporary, make_temporary, publish
from triptych.training.scoring import ScoreBatch, ScoreLikelihood

WEIGHTS, SETTINGS = "scorer.safetensors", "scorer.json"


@dataclass(frozen=True, slots=True)
class Vectors:
    """Feature vectors [C, D] and, where rewards differ by user, the index of each one's user, [C]."""

    values: Tensor
    users: Tensor | None = None

    def to(self, device: torch.device) -> Vectors:
        """On a device."""
        return Vectors(self.values.to(device), None if self.users is None else self.users.to(device))


class Standardise(nn.Module):
    """(x - mean) / scale of each column, fixed from data; a constant column becomes 0."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, scale: Tensor):
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", scale.float())

    @classmethod
    def of(cls, x: Tensor, known: Tensor | None = None) -> Standardise:
        """From the rows of x, [M, D], counting only those that are `known`."""
        known = torch.ones_like(x, dtype=torch.bool) if known is None else known
        count = known.sum(0).clamp(min=1)
        x = torch.where(known, x, 0.0).double()
        mean = x.sum(0) / count
        spread = (torch.where(known, (x - mean).square(), 0.0).sum(0) / count).sqrt()
        return cls(mean, torch.where(spread > 1e-12 * (1 + mean.abs()), spread, 1.0))

    @classmethod
    def identity(cls, size: int) -> Standardise:
        """That changes nothing."""
        return cls(torch.zeros(size), torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """Standardised, [*, D]."""
        return (x - self.mean) / self.scale

    def inverse(self, x: Tensor) -> Tensor:
        """Back in the data's own units, [*, D]."""
        return x * self.scale + self.mean


def _network(sizes: Sequence[int], generator: torch.Generator, *, last: float, bias: bool) -> nn.Sequential:
    """Linear layers with GELU between them; the last one's weights are `last` times the usual size."""
    layers: list[nn.Module] = []
    for i, (d_in, d_out) in enumerate(itertools.pairwise(sizes)):
        final = i == len(sizes) - 2
        layer: nn.Linear = nn.utils.skip_init(nn.Linear, d_in, d_out, bias=bias or not final)  # type: ignore[assignment]
        with torch.no_grad():
            layer.weight.normal_(0, 1 / math.sqrt(d_in), generator=generator)
            layer.weight.mul_(last if final else 1.0)
            if bias or not final:
                layer.bias.zero_()
        layers += [layer] if final else [layer, nn.GELU()]
    return nn.Sequential(*layers)


class FeatureReward(nn.Module):
    """W x of standardised features, or a small network of them, [C, N]; zero before it is trained.

    The expert-feature reward of domain knowledge (2402.15473): w . f tells what each feature is worth.
    outputs: what turns a score into the ratings' own units; scores of pairs have none. Without ratings the
    last layer has no bias, which no comparison could see.
    """

    def __init__(
        self,
        inputs: Standardise,
        *,
        hidden: Sequence[int] = (),
        outputs: Standardise | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.inputs, self.hidden = inputs, tuple(hidden)
        self.rated = outputs is not None
        self.outputs = outputs or Standardise.identity(1)
        sizes = [len(inputs.mean), *hidden, len(self.outputs.mean)]
        generator = torch.Generator().manual_seed(seed)
        self.network = _network(sizes, generator, last=0.0, bias=self.rated)

    def forward(self, x: Vectors) -> Tensor:
        """Scores in standardised units, [C, N]."""
        return self.network(self.inputs(x.values.float()))

    def rate(self, x: Vectors) -> Tensor:
        """Scores in the ratings' own units, [C, N]; those of pairs as they are."""
        return self.outputs.inverse(self(x))

    def settings(self) -> dict[str, Any]:
        """What `load_scorer` needs besides the weights."""
        return {"type": "features", "hidden": list(self.hidden), "rated": self.rated}


class IdealPoints(nn.Module):
    """Users as mixtures of P prototypical ideal points (PAL-A, 2406.08469); reward by closeness, [C, 1].

    u = sum_p w_p z_p, w = softmax(the user's logits); r(x, u) = -||f(x) - u|| ('distance', unsquared as in
    the paper), or <f(x), u> ('inner', where a user can like what another dislikes). f is linear, or a network
    with `hidden` layers. Deviation: the prototypes z are latent points; the paper projects them with f.
    """

    def __init__(
        self,
        inputs: Standardise,
        *,
        num_users: int,
        num_prototypes: int,
        latent: int,
        hidden: Sequence[int] = (),
        closeness: Literal["distance", "inner"] = "distance",
        seed: int = 0,
    ):
        super().__init__()
        for name, value in {
            "num_users": num_users,
            "num_prototypes": num_prototypes,
            "latent": latent,
        }.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        generator = torch.Generator().manual_seed(seed)
        self.inputs, self.hidden, self.closeness = inputs, tuple(hidden), closeness
        sizes = [len(inputs.mean), *hidden, latent]
        self.projection = _network(sizes, generator, last=1.0, bias=False)
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, latent, generator=generator))
        # Small and random: with equal weights every prototype would have the same gradient.
        self.logits = nn.Parameter(0.1 * torch.randn(num_users, num_prototypes, generator=generator))

    def weights(self) -> Tensor:
        """Mixture of each user, [U, P], on the simplex."""
        return self.logits.softmax(-1)

    def rewards(self, values: Tensor, weights: Tensor) -> Tensor:
        """Reward of each vector, [C, D], to a user with these mixture weights, [C, P] or [P]: [C, 1]."""
        latent, ideal = self.projection(self.inputs(values.float())), weights @ self.prototypes
        if self.closeness == "inner":
            return (latent * ideal).sum(-1, keepdim=True)
        # The square root has no gradient at 0, where a candidate is exactly at the ideal point.
        return -((latent - ideal).square().sum(-1, keepdim=True) + 1e-12).sqrt()

    def forward(self, x: Vectors) -> Tensor:
        """Reward of each candidate to its user, [C, 1]; without users, to the mean of them."""
        weights = self.weights()
        return self.rewards(x.values, weights.mean(0) if x.users is None else weights[x.users])

    def settings(self) -> dict[str, Any]:
        """What `load_scorer` needs besides the weights."""
        users, prototypes = self.logits.shape
        return {
            "type": "ideal_points",
            "hidden": list(self.hidden),
            "num_users": users,
            "num_prototypes": prototypes,
            "latent": self.prototypes.shape[1],
            "closeness": self.closeness,
        }


class NewUsers(nn.Module):
    """Users that training did not see: their mixture weights alone are trained, everything else is frozen."""

    def __init__(self, model: IdealPoints, num_users: int):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.logits = nn.Parameter(torch.zeros(num_users, model.logits.shape[1], device=model.logits.device))

    def forward(self, x: Vectors) -> Tensor:
        """Reward of each candidate to its new user, [C, 1]."""
        assert x.users is not None
        return self.model.rewards(x.values, self.logits.softmax(-1)[x.users])


def fit_scorer(
    scorer: nn.Module,
    batch: ScoreBatch,
    terms: Terms,
    *,
    num_steps: int = 100,
    lr: float = 1.0,
    l2: float = 0.0,
    optimizer: Literal["lbfgs", "adamw"] = "lbfgs",
) -> float:
    """Train on the whole batch at every step; the mean loss at the end, penalty left out.

    l2 / 2 times the squared weights is added, which keeps the optimum of separable pairs finite. The only
    randomness is in how the scorer was made. ValueError when the loss is not finite.
    """
    likelihood, trained = ScoreLikelihood(), [p for p in scorer.parameters() if p.requires_grad]

    def losses() -> tuple[Tensor, Tensor]:
        value, _ = terms({"none": likelihood(scorer, batch)})
        return value.mean(), value.mean() + 0.5 * l2 * sum(p.square().sum() for p in trained)

    def closure() -> Tensor:
        made.zero_grad()
        loss = losses()[1]
        loss.backward()
        return loss

    if optimizer == "lbfgs":
        made = torch.optim.LBFGS(
            trained, lr=lr, max_iter=num_steps, history_size=20, line_search_fn="strong_wolfe"
        )
        made.step(closure)  # type: ignore[arg-type]
    else:
        made = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
        for _ in range(num_steps):
            made.step(closure)  # type: ignore[arg-type]
    with torch.no_grad():
        final = float(losses()[0])
    if not math.isfinite(final):
        raise ValueError(
            f"the scorer's loss is {final} after {num_steps} steps; lower lr={lr} or raise l2={l2}"
        )
    return final


def save_scorer(scorer: FeatureReward | IdealPoints, folder: Path, *, facts: Mapping[str, Any]) -> None:
    """Write scorer.safetensors and scorer.json; facts: names of objectives or users, JSON values."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    clean_temporary(folder.parent)
    temporary = make_temporary(folder)
    tensors = {k: v.detach().cpu().contiguous() for k, v in scorer.state_dict().items()}
    save_file(tensors, temporary / WEIGHTS)
    settings = {"settings": scorer.settings(), "facts": dict(facts)}
    (temporary / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    publish(temporary, folder)


def load_scorer(folder: Path) -> tuple[FeatureReward | IdealPoints, dict[str, Any]]:
    """A saved scorer in evaluation mode, and its facts; ValueError naming what the folder lacks."""
    for name in (SETTINGS, WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no feature reward model: it has no {name}")
    saved = json.loads((folder / SETTINGS).read_text("utf-8"))
    tensors, settings = load_file(folder / WEIGHTS), dict(saved["settings"])
    kind = settings.pop("type")
    inputs = Standardise(tensors["inputs.mean"], tensors["inputs.scale"])
    if kind == "features":
        rated = settings.pop("rated")
        outputs = Standardise(tensors["outputs.mean"], tensors["outputs.scale"]) if rated else None
        scorer: FeatureReward | IdealPoints = FeatureReward(inputs, outputs=outputs, **settings)
    elif kind == "ideal_points":
        scorer = IdealPoints(inputs, **settings)
    else:
        raise ValueError(f"{folder / SETTINGS}: type={kind!r} is not one of features, ideal_points")
    scorer.load_state_dict(tensors)
    return scorer.eval(), saved["facts"]
