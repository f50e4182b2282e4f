"""OneRec's session reward model R(u, S), an ensemble of it, and one number out of its several towers.

Deng et al. 2025 (OneRec, 2502.18965), section 3.3, eqs. 4-8. Shapes: B histories, T history items in all,
N sessions, C sessions of a history, m items of a session, Q items asked for, D width, E head width, K towers,
R members, P some of the histories, I items, F features of an item.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triptych.modalities.recsys.jagged import Jagged, padded
from triptych.modalities.recsys.layers import FeedForward, attend
from triptych.training.atomic import clean_temporary, make_temporary, publish
from triptych.training.order import key
from triptych.training.references import unchanged

TOWERS = ("swt", "vtr", "wtr", "ltr")
WEIGHTS, SETTINGS = "reward.safetensors", "reward.json"


@dataclass(frozen=True, kw_only=True)
class RewardModelConfig:
    """A session reward model.

    width: D. hidden: of feed-forward layers and towers. towers: what is predicted of a session; OneRec has
    session watch time, view, follow and like. num_members: models in the ensemble, each with its own seed.
    window: latest items of a history that are looked at.
    """

    width: int = 32
    heads: int = 2
    hidden: int = 64
    dropout: float = 0.1
    towers: tuple[str, ...] = TOWERS
    num_members: int = 1
    window: int = 100

    def __post_init__(self) -> None:
        for name in ("width", "heads", "hidden", "num_members", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"reward.{name}={getattr(self, name)} must be at least 1")
        if self.width % self.heads:
            raise ValueError(f"reward.width={self.width} must be a multiple of reward.heads={self.heads}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"reward.dropout={self.dropout} must be in [0, 1)")
        if not self.towers or len(set(self.towers)) != len(self.towers):
            raise ValueError(f"reward.towers={list(self.towers)} must be names, each once")


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """How the towers' probabilities p_k, and the members, become one score; the paper leaves it open.

    kind: 'mean_z', our choice: the weighted mean of (p_k - mean_k) / std_k over validation sessions, so that
    rare follows count as much as common views; 'weighted': sum of weights_k p_k; 'one': p of `tower`.
    weights: by tower; none with 'mean_z' are equal ones. pessimism: score = mean - pessimism * std over the
    members, which trusts less what they disagree on.
    """

    kind: Literal["mean_z", "weighted", "one"] = "mean_z"
    weights: dict[str, float] = field(default_factory=dict)
    tower: str | None = None
    pessimism: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("mean_z", "weighted", "one"):
            raise ValueError(f"scoring.kind={self.kind!r} is not one of mean_z, weighted, one")
        if (self.kind == "one") != (self.tower is not None):
            raise ValueError(f"scoring.tower={self.tower} goes with scoring.kind=one, and with it only")
        if self.weights and self.kind == "one":
            raise ValueError("scoring.weights go with scoring.kind=mean_z or weighted, not with one")
        if self.kind == "weighted" and not self.weights:
            raise ValueError("scoring.kind=weighted needs scoring.weights")
        if self.weights and not any(self.weights.values()):
            raise ValueError(f"scoring.weights={self.weights} must not all be 0")
        if self.kind == "mean_z" and self.weights and min(self.weights.values()) < 0:
            raise ValueError(f"scoring.weights={self.weights} must be at least 0 with scoring.kind=mean_z")
        if not 0 <= self.pessimism < math.inf:
            raise ValueError(f"scoring.pessimism={self.pessimism} must be 0 or positive")


class TargetAttention(nn.Module):
    """v_i + softmax(q_i k' / sqrt(E)) v over the history, q_i of the item.

    A learnt vector stands before every history, so that an empty one is a history and an item may find
    nothing in it. Histories have no order here.
    """

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.first_D = nn.Parameter(torch.randn(width) * width**-0.5)
        self.norm, self.norm_history = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, items_BQD: Tensor, history: Jagged) -> Tensor:
        """Vectors of Q items for each history of vectors [T, D] -> [B, Q, D]."""
        users, longest = history.num_rows, 1 + history.longest
        starts_B = torch.arange(users, device=items_BQD.device) * longest
        slots = torch.cat([starts_B, starts_B[history.rows] + 1 + history.places])
        first = self.first_D.expand(users, -1).to(history.values.dtype)
        kv = self.kv(self.norm_history(torch.cat([first, history.values])))
        kv = padded(kv, slots, num_rows=users, longest=longest).view(users, longest, 2, self.heads, -1)
        k, v = (t.transpose(1, 2) for t in kv.unbind(2))
        q = self.q(self.norm(items_BQD)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        there = torch.arange(longest, device=items_BQD.device) <= history.lengths.unsqueeze(-1)
        found = attend(q, k, v, there[:, None, None], self.rate if self.training else 0.0)
        return items_BQD + self.out(found.transpose(1, 2).flatten(2))


class SessionAttention(nn.Module):
    """Pre-normalised self-attention and feed-forward over the items of a session, without places."""

    def __init__(self, width: int, heads: int, hidden: int, dropout: float):
        super().__init__()
        self.heads, self.rate = heads, dropout
        self.norm, self.norm_ff = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.ff, self.dropout = FeedForward(width, hidden), nn.Dropout(dropout)

    def forward(self, x_NmD: Tensor, there_Nm: Tensor) -> Tensor:
        """[N, m, D] -> [N, m, D]; a place without an item says something of itself alone."""
        q, k, v = self.qkv(self.norm(x_NmD)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3).unbind(2)
        # A padded query sees itself: a row without any would be NaN.
        itself = torch.eye(there_Nm.shape[1], dtype=torch.bool, device=x_NmD.device)
        mask = there_Nm[:, None, None] | itself
        found = attend(q, k, v, mask, self.rate if self.training else 0.0)
        x_NmD = x_NmD + self.dropout(self.out(found.transpose(1, 2).flatten(2)))
        return x_NmD + self.dropout(self.ff(self.norm_ff(x_NmD)))


class SessionReward(nn.Module):
    """sigmoid(tower_k(sum_i SelfAttention(TargetAttention(v_i, u))_i)) for every tower k.

    v_i: a learnt vector an item, small at first, so that an item without logs says little; plus, with
    `features_IF` (content or co-occurrence vectors, frozen, scaled to a mean square of 1), their projection.
    The same vectors stand for the items of the history.
    """

    def __init__(self, config: RewardModelConfig, num_items: int, features_IF: Tensor | None = None):
        super().__init__()
        if features_IF is not None and len(features_IF) != num_items:
            raise ValueError(f"features have {len(features_IF)} rows; expected {num_items}, one an item")
        self.config, width = config, config.width
        self.table = nn.Embedding(num_items, width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.register_buffer("features_IF", None if features_IF is None else _unit_square(features_IF))
        self.project = None if features_IF is None else nn.Linear(features_IF.shape[1], width, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.target = TargetAttention(width, config.heads, config.dropout)
        self.session = SessionAttention(width, config.heads, config.hidden, config.dropout)
        self.towers = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(width, config.hidden),
                    nn.SiLU(),
                    nn.Dropout(config.dropout),
                    nn.Linear(config.hidden, 1),
                )
                for name in config.towers
            }
        )

    def forward(self, history: Jagged, items_Nm: Tensor, user_N: Tensor | None = None) -> Tensor:
        """Logits of sessions, [N, K]. history: item ids. items: -1 = none. user_N: row of the history of each
        session, in any order; None: session n is of row n. A history is computed once for all its sessions.
        """
        history = latest(history, self.config.window)
        held = history.with_values(self._vectors(history.values))
        there_Nm = items_Nm >= 0
        items_NmD = self._vectors(items_Nm.clamp(min=0))
        if user_N is None:
            x_NmD = self.target(items_NmD, held)
        else:
            slot_N, most = _slots(user_N, history.num_rows)
            flat = items_NmD.new_zeros(history.num_rows * most, *items_NmD.shape[1:])
            folded = flat.index_copy(0, slot_N, items_NmD).view(history.num_rows, -1, items_NmD.shape[-1])
            x_NmD = self.target(folded, held).view(flat.shape)[slot_N]
        x_NmD = self.session(self.dropout(x_NmD), there_Nm)
        pooled_ND = torch.where(there_Nm.unsqueeze(-1), x_NmD, 0.0).sum(1)
        return torch.cat([tower(pooled_ND) for tower in self.towers.values()], -1)

    def _vectors(self, items: Tensor) -> Tensor:
        found = self.table(items)
        if self.project is not None:
            assert isinstance(self.features_IF, Tensor)
            found = found + self.project(self.features_IF[items])
        return found


class RewardEnsemble(nn.Module):
    """Members that saw the same data with different seeds; the score of a session by all of them.

    mean_RK, std_RK: of each member's probabilities over the sessions that `fit_scale` was given. Each member
    has its own, so that members that are only calibrated differently do not disagree.
    """

    def __init__(self, members: Sequence[SessionReward], scoring: ScoringConfig):
        super().__init__()
        towers = members[0].config.towers
        named = [*scoring.weights, *([scoring.tower] if scoring.tower else [])]
        if odd := [name for name in named if name not in towers]:
            raise ValueError(f"scoring names tower '{odd[0]}'; the model has {', '.join(towers)}")
        if scoring.pessimism and len(members) < 2:
            raise ValueError(
                f"scoring.pessimism={scoring.pessimism} needs members that can disagree: set "
                "reward.num_members to at least 2"
            )
        self.members, self.scoring, self.towers = nn.ModuleList(members), scoring, towers
        for name in ("mean_RK", "std_RK"):
            self.register_buffer(name, torch.full((len(members), len(towers)), torch.nan))

    @torch.no_grad()
    def probabilities(
        self, history: Jagged, items_Nm: Tensor, user_N: Tensor, *, batch_size: int = 4096
    ) -> Tensor:
        """What every tower of every member says, [R, N, K] float32, without dropout; see `SessionReward`.

        batch_size: sessions at a time. ValueError for a session of no item, or items that there are not.
        """
        table = self.members[0].table
        assert isinstance(table, nn.Embedding)
        if bool((items_Nm >= table.num_embeddings).any()):
            raise ValueError(f"items={int(items_Nm.max())} must be below the {table.num_embeddings} items")
        if bool((items_Nm < 0).all(1).any()):
            raise ValueError(f"session {int((items_Nm < 0).all(1).nonzero()[0, 0])} has no item to score")
        order, parts = user_N.argsort(stable=True), []
        with unchanged(self):
            for rows in order.split(batch_size):
                users, user = user_N[rows].unique(return_inverse=True)
                held = _picked(history, users)
                parts.append(torch.stack([m(held, items_Nm[rows], user).float() for m in self.members]))
        found = torch.empty(len(self.members), *items_Nm.shape[:1], len(self.towers), device=items_Nm.device)
        if parts:
            found[:, order] = torch.cat(parts, 1).sigmoid()
        return found

    def fit_scale(self, probabilities_RNK: Tensor) -> None:
        """Take means and deviations of 'mean_z' from reference sessions; ValueError for fewer than 2."""
        if probabilities_RNK.shape[1] < 2:
            raise ValueError(f"{probabilities_RNK.shape[1]} reference sessions; z-scores need at least 2")
        self.mean_RK = probabilities_RNK.float().mean(1)
        self.std_RK = probabilities_RNK.float().std(1, correction=0)

    def scalars(self, probabilities_RNK: Tensor) -> Tensor:
        """Each member's score of each session, [R, N]."""
        scoring = self.scoring
        if scoring.tower is not None:
            return probabilities_RNK[..., self.towers.index(scoring.tower)]
        default = 0.0 if scoring.weights else 1.0
        weights_K = probabilities_RNK.new_tensor([scoring.weights.get(t, default) for t in self.towers])
        if scoring.kind == "weighted":
            return probabilities_RNK @ weights_K
        if bool(self.std_RK.isnan().any()):
            raise ValueError("scoring.kind=mean_z needs reference sessions: call fit_scale before")
        # A tower that says the same of every session ranks nothing.
        z_RNK = (probabilities_RNK - self.mean_RK.unsqueeze(1)) / self.std_RK.unsqueeze(1).clamp(min=1e-6)
        return z_RNK @ (weights_K / weights_K.sum())

    def score(self, history: Jagged, items_Nm: Tensor, user_N: Tensor) -> Tensor:
        """mean - pessimism * std over the members of their scores, [N]; the higher the better."""
        scalars_RN = self.scalars(self.probabilities(history, items_Nm, user_N))
        return scalars_RN.mean(0) - self.scoring.pessimism * scalars_RN.std(0, correction=0)


def make_member(
    config: RewardModelConfig, num_items: int, *, seed: int, features_IF: Tensor | None = None
) -> SessionReward:
    """A member with fresh weights of its seed; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key("reward", seed))
        return SessionReward(config, num_items, features_IF)


def save_reward(ensemble: RewardEnsemble, folder: Path, *, facts: Mapping[str, Any]) -> None:
    """Write reward.safetensors and reward.json; facts: names of the items and such, JSON values."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    clean_temporary(folder.parent)
    temporary = make_temporary(folder)
    tensors = {n: v.detach().cpu().contiguous().clone() for n, v in ensemble.state_dict().items()}
    save_file(tensors, temporary / WEIGHTS)
    member = ensemble.members[0]
    assert isinstance(member, SessionReward)
    settings = {
        "model": asdict(member.config),
        "scoring": asdict(ensemble.scoring),
        "num_items": member.table.num_embeddings,
        "num_features": 0 if member.project is None else member.project.in_features,
        "facts": dict(facts),
    }
    (temporary / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    publish(temporary, folder)


def load_reward(folder: Path) -> tuple[RewardEnsemble, dict[str, Any]]:
    """A saved ensemble in evaluation mode, and its facts; ValueError naming the file that does not fit."""
    try:
        saved = json.loads((folder / SETTINGS).read_text("utf-8"))
        towers = tuple(saved["model"].pop("towers"))
        config = RewardModelConfig(**saved["model"], towers=towers)
        scoring, num_items = ScoringConfig(**saved["scoring"]), int(saved["num_items"])
        features = torch.zeros(num_items, saved["num_features"]) if saved["num_features"] else None
        facts = dict(saved["facts"])
        members = [
            make_member(config, num_items, seed=0, features_IF=features) for _ in range(config.num_members)
        ]
        ensemble = RewardEnsemble(members, scoring)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / SETTINGS}: describes no session reward model: {error}") from None
    try:
        ensemble.load_state_dict(load_file(folder / WEIGHTS))
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder / WEIGHTS}: these weights do not fit {SETTINGS}: {reason}") from None
    return ensemble.eval(), facts


def _unit_square(features_IF: Tensor) -> Tensor:
    features_IF = features_IF.float()
    return features_IF / features_IF.square().mean().sqrt().clamp(min=1e-12)


def latest(history: Jagged, window: int) -> Jagged:
    """The last `window` items of every row."""
    if history.longest <= window:
        return history
    keep_T = history.offsets[1:][history.rows] - torch.arange(
        len(history.values), device=history.values.device
    )
    lengths = history.lengths.clamp(max=window)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Jagged(history.values[keep_T <= window], offsets, window, history.owners)


def _picked(history: Jagged, rows_P: Tensor) -> Jagged:
    """Some rows of a history, in this order."""
    lengths = history.lengths[rows_P]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    shift = torch.repeat_interleave(history.offsets[rows_P] - offsets[:-1], lengths)
    values = history.values[torch.arange(len(shift), device=shift.device) + shift]
    return Jagged(values, offsets, int(lengths.max()))


def _slots(user_N: Tensor, num_rows: int) -> tuple[Tensor, int]:
    """Place of each session in a table [B, C], flat, and C, the most sessions that a row has."""
    order, counts = user_N.argsort(stable=True), torch.bincount(user_N, minlength=num_rows)
    starts, most = counts.cumsum(0) - counts, int(counts.max())
    place = torch.empty_like(user_N)
    place[order] = torch.arange(len(user_N), device=user_N.device) - starts[user_N[order]]
    return user_N * most + place, most
