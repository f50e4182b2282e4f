"""A reward of each user's own: closeness to a mixture of a few prototypical ideal points (PAL, 2406.08469).

Shapes: C candidates, D features, F features of a prompt, E latent, P prototypes, U users.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from triptych.training.feature_vectors import Standardise, Vectors, mlp

Closeness = Literal["distance", "inner", "angle"]
Prototypes = Literal["latent", "items", "prompts"]
# The scale of cosines as CLIP learns it.
_FIRST_SCALE, _LARGEST_SCALE = 1 / 0.07, 100.0


def closeness_of(latent: Tensor, ideal: Tensor, closeness: Closeness, log_scale: Tensor | None) -> Tensor:
    """Reward of latent candidates [C, E] to users with these ideal points, [C, E] or [E]: [C, 1].

    'distance': -||f - a||, unsquared as in the paper. 'inner': <f, a>, where a user can like what another
    dislikes. 'angle': cos(f, a) min(exp(log_scale), 100).
    """
    if closeness == "inner":
        return (latent * ideal).sum(-1, keepdim=True)
    if closeness == "angle":
        assert log_scale is not None
        cosine = nn.functional.cosine_similarity(latent, ideal.expand_as(latent), dim=-1)
        return (cosine * log_scale.exp().clamp(max=_LARGEST_SCALE)).unsqueeze(-1)
    # The square root has no gradient at 0, where a candidate is exactly at the ideal point.
    return -((latent - ideal).square().sum(-1, keepdim=True) + 1e-12).sqrt()


class IdealPoints(nn.Module):
    """Users as mixtures of P prototypes; reward by closeness to the user's ideal point a, [C, 1].

    w = softmax(the user's logits); f is linear, or a network with `hidden` layers, of a standardised item.
    prototypes:
        'latent'   a = sum_p w_p z_p, z_p learnt latent points (the released f(P) w with f(P) free)
        'items'    a = f(sum_p w_p z_p), z_p learnt items in standardised units (the released f(P w), PAL-A)
        'prompts'  a = sum_p w_p g_p(c), g_p networks with `prompt_hidden` layers of a prompt c's features,
                   which `prompts` standardises (PAL-B)
    closeness: see `closeness_of`. Deviations: GELU and no residual connection in f; P is not bounded; the
    scale of 'angle' has the learning rate of everything else.
    """

    def __init__(
        self,
        inputs: Standardise,
        *,
        num_users: int,
        num_prototypes: int,
        latent: int,
        hidden: Sequence[int] = (),
        closeness: Closeness = "distance",
        prototypes: Prototypes = "latent",
        prompts: Standardise | None = None,
        prompt_hidden: Sequence[int] = (),
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
        for name, value, valid in (
            ("closeness", closeness, get_args(Closeness)),
            ("prototypes", prototypes, get_args(Prototypes)),
        ):
            if value not in valid:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(valid)}")
        if (prototypes == "prompts") != (prompts is not None) or (prompts is None and prompt_hidden):
            raise ValueError(f"prompts and prompt_hidden are of prototypes='prompts', not of {prototypes!r}")
        generator = torch.Generator().manual_seed(seed)
        self.inputs, self.hidden = inputs, tuple(hidden)
        self.closeness: Closeness = closeness
        self.kind, self.prompts, self.prompt_hidden = prototypes, prompts, tuple(prompt_hidden)
        self.latent = latent
        sizes = [len(inputs.mean), *hidden, latent]
        self.projection = mlp(sizes, generator, last=1.0, bias=False)
        if prompts is not None:
            sizes = [len(prompts.mean), *prompt_hidden, latent]
            networks = [mlp(sizes, generator, last=1.0, bias=True) for _ in range(num_prototypes)]
            self.prototypes: nn.Parameter | nn.ModuleList = nn.ModuleList(networks)
        else:
            width = latent if prototypes == "latent" else len(inputs.mean)
            self.prototypes = nn.Parameter(torch.randn(num_prototypes, width, generator=generator))
        # Small and random: with equal weights every prototype would have the same gradient.
        self.logits = nn.Parameter(0.1 * torch.randn(num_users, num_prototypes, generator=generator))
        scaled = closeness == "angle"
        self.log_scale = nn.Parameter(torch.tensor(math.log(_FIRST_SCALE))) if scaled else None

    def weights(self) -> Tensor:
        """Mixture of each user, [U, P], on the simplex."""
        return self.logits.softmax(-1)

    def ideals(self, weights: Tensor, prompts: Tensor | None) -> Tensor:
        """Ideal points of mixtures, [C, P] or [P], at prompts [C, F] where prototypes depend on them.

        [C, E], or [E]. ValueError where prompts are needed and not given.
        """
        if isinstance(self.prototypes, nn.ModuleList):
            if prompts is None or self.prompts is None:
                raise ValueError("prototypes='prompts' scores an item for a prompt; give Vectors.prompts")
            asked = self.prompts(prompts.float())
            points_CPE = torch.stack([g(asked) for g in self.prototypes], -2)
            return (weights.unsqueeze(-1) * points_CPE).sum(-2)
        mixed = weights @ self.prototypes
        return self.projection(mixed) if self.kind == "items" else mixed

    def rewards(self, values: Tensor, weights: Tensor, prompts: Tensor | None = None) -> Tensor:
        """Reward of each vector, [C, D], to a user with these mixture weights, [C, P] or [P]: [C, 1]."""
        latent, ideal = self.projection(self.inputs(values.float())), self.ideals(weights, prompts)
        return closeness_of(latent, ideal, self.closeness, self.log_scale)

    def forward(self, x: Vectors) -> Tensor:
        """Reward of each candidate to its user, [C, 1]; without users, to the mean of them."""
        weights = self.weights()
        mixture = weights.mean(0) if x.users is None else weights[x.users]
        return self.rewards(x.values, mixture, x.prompts)

    def settings(self) -> dict[str, Any]:
        """What `load_scorer` needs besides the weights."""
        users, prototypes = self.logits.shape
        return {
            "type": "ideal_points",
            "hidden": list(self.hidden),
            "num_users": users,
            "num_prototypes": prototypes,
            "latent": self.latent,
            "closeness": self.closeness,
            "prototypes": self.kind,
            "prompt_hidden": list(self.prompt_hidden),
        }


class NewUsers(nn.Module):
    """Users that training did not see: P mixture weights each are trained, everything else is frozen."""

    def __init__(self, model: IdealPoints, num_users: int):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.logits = nn.Parameter(torch.zeros(num_users, model.logits.shape[1], device=model.logits.device))

    def forward(self, x: Vectors) -> Tensor:
        """Reward of each candidate to its new user, [C, 1]."""
        assert x.users is not None
        return self.model.rewards(x.values, self.logits.softmax(-1)[x.users], x.prompts)

    def joined(self) -> IdealPoints:
        """The model with its own users and, after them, these: what is saved to serve both."""
        model = copy.deepcopy(self.model)
        model.logits = nn.Parameter(torch.cat([model.logits, self.logits]).detach().clone())
        return model.requires_grad_(True)
