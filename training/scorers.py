"""Reward models over feature vectors: linear or a small network, here; fitting, saving and loading of all.

Image and session embeddings and expert features go through these; what makes the vectors is frozen and stays
outside. Users' own rewards are in `ideal_points`. Shapes: C candidates, N objectives, D features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triptych.objectives import Terms
from triptych.training.atomic import clean_temporary, make_temporary, publish
from triptych.training.feature_vectors import Standardise, Vectors, mlp
from triptych.training.ideal_points import IdealPoints
from triptych.training.scoring import ScoreBatch, ScoreLikelihood

WEIGHTS, SETTINGS = "scorer.safetensors", "scorer.json"


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
        self.network = mlp(sizes, generator, last=0.0, bias=self.rated)

    def forward(self, x: Vectors) -> Tensor:
        """Scores in standardised units, [C, N]."""
        return self.network(self.inputs(x.values.float()))

    def rate(self, x: Vectors) -> Tensor:
        """Scores in the ratings' own units, [C, N]; those of pairs as they are."""
        return self.outputs.inverse(self(x))

    def settings(self) -> dict[str, Any]:
        """What `load_scorer` needs besides the weights."""
        return {"type": "features", "hidden": list(self.hidden), "rated": self.rated}


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
        asked = "prompts.mean" in tensors
        prompts = Standardise(tensors["prompts.mean"], tensors["prompts.scale"]) if asked else None
        scorer = IdealPoints(inputs, prompts=prompts, **settings)
    else:
        raise ValueError(f"{folder / SETTINGS}: type={kind!r} is not one of features, ideal_points")
    scorer.load_state_dict(tensors)
    return scorer.eval(), saved["facts"]
