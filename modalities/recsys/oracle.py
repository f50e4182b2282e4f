"""A ground truth for judging recommenders: how users would respond to a session, known as it was made.

A model G is fitted on all ratings, given session effects that ratings cannot show, and frozen. Logs drawn
from G teach a recommender and its reward model; G itself then judges the recommender. Only judges may ask
it: pairs, early stopping and tuning that look at G make its verdict worthless.

G of user u and the j-th item i of a session, counting from 0:

    taste     a_ui = b_i + personalisation * (c_u + p_u q_i + A_u g_i)
    session   x_j  = a_ui - fatigue * sum_{k<j} s_kj - position * j + diversity * (1 - mean_{k<l} s_kl)
    rating    P(rating >= level_c) = sigmoid(x_j - theta_c),  theta_3 <= theta_4 <= theta_5
    reached   P(reached_0) = 1,  P(reached_{j+1}) = P(reached_j) * (1 - leave * (1 - P(rating_j >= level_3)))

s in [0, 1] is the larger of the cosine of two items' genres and of their factors; 1 for one item twice. Over
users c, p q and A g have mean 0 (it is part of b), so personalisation = 0 leaves the mean user. The signals:
vtr, ltr, wtr = reached and rated at least 3, 4, 5; swt = share of the session that is reached.

Shapes: N sessions, m places, U users, I items, E ratings, D factors, G genres, C = 3 levels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor
from torch.nn import functional

from triptych.modalities.recsys.interactions import Interactions

ITEM_SIGNALS = ("vtr", "ltr", "wtr")
SIGNALS = ("swt", *ITEM_SIGNALS)


@dataclass(frozen=True, kw_only=True)
class Scalarisation:
    """Weights of the four signals in the reward of a session; a signal of items counts by its mean over them.

    OneRec (2502.18965) does not say how it makes one number of the four. Equal weights are our choice; with
    them the reward is in [0, 1].
    """

    swt: float = 0.25
    vtr: float = 0.25
    ltr: float = 0.25
    wtr: float = 0.25

    def __post_init__(self) -> None:
        if not any(getattr(self, name) for name in SIGNALS):
            raise ValueError("scalarisation: every weight is 0; give swt, vtr, ltr or wtr another")

    def __call__(self, signals: Mapping[str, Tensor], there_Nm: Tensor) -> Tensor:
        """Weighted sum of swt [N] and the means of vtr, ltr, wtr [N, m] over the items there are, [N]."""
        count_N = there_Nm.sum(1).clamp(min=1)
        total_N = self.swt * signals["swt"].float()
        for name in ITEM_SIGNALS:
            mean_N = (signals[name].float() * there_Nm).sum(1) / count_N
            total_N = total_N + getattr(self, name) * mean_N
        return total_N


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """What the ground truth is made of; another `factors` or another generator is another oracle.

    levels: ratings that count as viewed, liked and followed. factors: D. penalty: of the squares of what is
    fitted, for every rating's log-loss 1. num_steps, lr: of Adam over all ratings. personalisation,
    fatigue, diversity, position, leave: see the formulas; none of the last four can be learnt from ratings,
    so their values are ours. min_genre_items: a genre is one that at least so many items have.
    """

    levels: tuple[float, float, float] = (3.0, 4.0, 5.0)
    factors: int = 16
    penalty: float = 8.0
    num_steps: int = 150
    lr: float = 0.05
    min_genre_items: int = 5
    personalisation: float = 1.0
    fatigue: float = 0.3
    diversity: float = 0.5
    position: float = 0.1
    leave: float = 0.3
    scalarisation: Scalarisation = field(default_factory=Scalarisation)

    def __post_init__(self) -> None:
        if list(self.levels) != sorted(set(self.levels)) or len(self.levels) != len(ITEM_SIGNALS):
            raise ValueError(f"oracle.levels={self.levels} must be {len(ITEM_SIGNALS)} rising ratings")
        for name in ("factors", "num_steps", "min_genre_items"):
            if getattr(self, name) < 1:
                raise ValueError(f"oracle.{name}={getattr(self, name)} must be at least 1")
        for name in ("penalty", "personalisation", "fatigue", "diversity", "position"):
            if getattr(self, name) < 0:
                raise ValueError(f"oracle.{name}={getattr(self, name)} must be at least 0")
        if self.lr <= 0:
            raise ValueError(f"oracle.lr={self.lr} must be above 0")
        if not 0 <= self.leave <= 1:
            raise ValueError(f"oracle.leave={self.leave} must be from 0 to 1")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Oracle:
    """The fitted and frozen response model; users and items are numbered as in the events it was fitted on.

    item_I: b. user_U: c. user_UD, item_ID: p, q. affinity_UG: A. genres_IG: g, unit length or 0. theta_C.
    genres: names of the G columns.
    """

    item_I: Tensor
    user_U: Tensor
    user_UD: Tensor
    item_ID: Tensor
    affinity_UG: Tensor
    genres_IG: Tensor
    theta_C: Tensor
    genres: tuple[str, ...]
    config: OracleConfig

    @property
    def fingerprint(self) -> str:
        """SHA-256 of every number and setting."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("genres", "config")}
        return digest_of(tensors, str(self.config), "\x1f".join(self.genres))

    @torch.no_grad()
    def taste(self, user_N: Tensor, items_Nm: Tensor) -> Tensor:
        """a_ui of each item apart from any session, [N, m]; that of item 0 where there is none."""
        items_Nm = items_Nm.clamp(min=0)
        personal = self.user_U[user_N].unsqueeze(1)
        personal = personal + torch.einsum("nd,nmd->nm", self.user_UD[user_N], self.item_ID[items_Nm])
        personal = personal + torch.einsum("ng,nmg->nm", self.affinity_UG[user_N], self.genres_IG[items_Nm])
        return self.item_I[items_Nm] + self.config.personalisation * personal

    @torch.no_grad()
    def similarity(self, items_Nm: Tensor) -> Tensor:
        """s of every two places of a session, [N, m, m]; 0 where either has no item."""
        held = items_Nm.clamp(min=0)
        genres, factors = self.genres_IG[held], functional.normalize(self.item_ID[held], dim=-1)
        found = torch.maximum(genres @ genres.mT, factors @ factors.mT).clamp(0, 1)
        found = torch.where(items_Nm.unsqueeze(1) == items_Nm.unsqueeze(2), 1.0, found)
        there = items_Nm >= 0
        return found * (there.unsqueeze(1) & there.unsqueeze(2))

    @torch.no_grad()
    def rated(self, user_N: Tensor, items_Nm: Tensor) -> Tensor:
        """P(rating >= level_c) of each item in its place of the session, were it reached, [N, m, C]."""
        _check(self, user_N, items_Nm)
        there, near = items_Nm >= 0, self.similarity(items_Nm)
        before = near.triu(1)
        num_N = there.sum(1)
        pairs_N = (num_N * (num_N - 1) // 2).clamp(min=1)
        different_N = torch.where(num_N > 1, 1 - before.sum((1, 2)) / pairs_N, 0.0)
        place_Nm = (there.cumsum(1) - 1).clamp(min=0)
        effect_Nm = self.config.diversity * different_N.unsqueeze(1) - self.config.fatigue * before.sum(1)
        x_Nm = self.taste(user_N, items_Nm) + effect_Nm - self.config.position * place_Nm
        return torch.sigmoid(x_Nm.unsqueeze(-1) - self.theta_C) * there.unsqueeze(-1)

    @torch.no_grad()
    def probabilities(self, user_N: Tensor, items_Nm: Tensor) -> dict[str, Tensor]:
        """vtr, ltr, wtr: probabilities [N, m], 0 where there is no item (-1); swt: expected share, [N].

        wtr <= ltr <= vtr <= 1. ValueError for numbers that the oracle does not know.
        """
        level_NmC = self.rated(user_N, items_Nm)
        there = items_Nm >= 0
        stay_Nm = torch.where(there, 1 - self.config.leave * (1 - level_NmC[..., 0]), 1.0)
        reached_Nm = functional.pad(stay_Nm.cumprod(1)[:, :-1], (1, 0), value=1.0) * there
        found = {name: reached_Nm * level_NmC[..., c] for c, name in enumerate(ITEM_SIGNALS)}
        return {"swt": reached_Nm.sum(1) / there.sum(1).clamp(min=1)} | found

    @torch.no_grad()
    def reward(self, user_N: Tensor, items_Nm: Tensor) -> Tensor:
        """Expected reward of each session under the configured weights, [N]; 0 for a session of no items."""
        return self.config.scalarisation(self.probabilities(user_N, items_Nm), items_Nm >= 0)

    @torch.no_grad()
    def respond(self, user_N: Tensor, items_Nm: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """One draw of what the users do: vtr, ltr, wtr of 0 and 1, [N, m]; swt: share reached, [N].

        One uniform number an item is its rating, so what is liked was viewed; one more says whether a user
        who did not view an item leaves. Expectations are `probabilities`.
        """
        level_NmC = self.rated(user_N, items_Nm)
        there = items_Nm >= 0
        uniform_2Nm = torch.rand(2, *items_Nm.shape, generator=generator, device=generator.device)
        uniform_2Nm = uniform_2Nm.to(items_Nm.device)
        rated_NmC = uniform_2Nm[0].unsqueeze(-1) < level_NmC
        left_Nm = there & ~rated_NmC[..., 0] & (uniform_2Nm[1] < self.config.leave)
        reached_Nm = there & (functional.pad(left_Nm.cumsum(1)[:, :-1], (1, 0)) == 0)
        found = {n: (reached_Nm & rated_NmC[..., c]).float() for c, n in enumerate(ITEM_SIGNALS)}
        return {"swt": reached_Nm.sum(1) / there.sum(1).clamp(min=1)} | found


def fit_oracle(events: Interactions, config: OracleConfig, generator: torch.Generator) -> Oracle:
    """Maximise the likelihood of all ratings under the formulas' taste, and freeze.

    loss = (-sum_E sum_C log P(1[rating >= level_c]) + penalty / 2 * |everything but theta|^2) / E, by Adam
    over all ratings at once. The generator draws where the factors begin; on one thread the same generator
    gives the same oracle, bit for bit.

    ValueError without ratings, or when a level is never or always reached.
    """
    rating_E = _ratings(events, config.levels)
    reached_EC = (rating_E.unsqueeze(1) >= torch.tensor(config.levels)).float()
    genres_IG, names = genres_of(events, least=config.min_genre_items)
    free = _start(events, config, genres_IG, reached_EC, generator)
    user_E, item_E = events.user_E, events.item_E
    optimizer = torch.optim.Adam(free.values(), lr=config.lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, total_iters=config.num_steps)
    with torch.enable_grad():
        for _ in range(config.num_steps):
            x_E = free["item_I"][item_E] + free["user_U"][user_E]
            x_E = x_E + (free["user_UD"][user_E] * free["item_ID"][item_E]).sum(1)
            if names:
                x_E = x_E + (free["affinity_UG"][user_E] * genres_IG[item_E]).sum(1)
            logit_EC = x_E.unsqueeze(1) - _rising(free["theta_C"])
            loss = functional.binary_cross_entropy_with_logits(logit_EC, reached_EC, reduction="sum")
            squares = sum(value.square().sum() for name, value in free.items() if name != "theta_C")
            optimizer.zero_grad()
            ((loss + config.penalty / 2 * squares) / len(item_E)).backward()
            optimizer.step()
            schedule.step()
    return _frozen({name: value.detach() for name, value in free.items()}, genres_IG, names, config)


def genres_of(events: Interactions, *, least: int) -> tuple[Tensor, tuple[str, ...]]:
    """Unit-length rows of the genres in texts 'Title. Genre, Genre', [I, G], and the genres' names.

    Items of other texts have zeros, and names that fewer than `least` items have are not genres.
    """
    rows: list[list[str]] = []
    for title, text in zip(events.titles, events.texts, strict=True):
        said = text.removeprefix(f"{title}. ") if text.startswith(f"{title}. ") else ""
        rows.append(sorted({name.strip() for name in said.split(",")} - {""}))
    counts = Counter(name for row in rows for name in row)
    names = tuple(sorted(name for name, count in counts.items() if count >= least))
    column = {name: number for number, name in enumerate(names)}
    found = torch.zeros(len(rows), len(names))
    for number, row in enumerate(rows):
        found[number, [column[name] for name in row if name in column]] = 1.0
    return functional.normalize(found, dim=-1), names


def within_user_auc(score_E: Tensor, positive_E: Tensor, user_E: Tensor) -> Tensor:
    """Chance that a user's positive has a higher score than the user's negative, ties half, [users].

    Users who have only positives or only negatives are left out.
    """
    found = []
    for rows in user_E.argsort(stable=True).split(user_E.bincount().tolist()):
        score, positive = score_E[rows], positive_E[rows]
        ahead = score[positive].unsqueeze(1) - score[~positive]
        if ahead.numel():
            found.append(((ahead > 0).double() + 0.5 * (ahead == 0)).mean())
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def diagnose(oracle: Oracle, events: Interactions) -> dict[str, float]:
    """How far the oracle knows the ratings, and how much of it is personal.

    within_user_auc: mean over users, of ratings of at least the second level. item_mean_auc: that of the
    items' mean ratings, the same for everybody; a recommender that only learns which items are good gets this
    far. personal_share: variance of the personal taste of all users and items without the user's own mean
    (which cannot change a ranking), over that plus the items'.
    """
    rating_E = _ratings(events, oracle.config.levels)
    liked_E = rating_E >= oracle.config.levels[1]
    taste_E = oracle.taste(events.user_E, events.item_E.unsqueeze(1))[:, 0]
    count_I = events.item_E.bincount(minlength=len(events.items)).clamp(min=1)
    mean_I = torch.zeros(len(events.items)).index_add(0, events.item_E, rating_E) / count_I
    users, items = torch.arange(len(events.users)), torch.arange(len(events.items))
    taste_UI = oracle.taste(users, items.expand(len(users), -1))
    personal_UI = taste_UI - oracle.item_I
    personal = float((personal_UI - personal_UI.mean(1, keepdim=True)).square().mean())
    common = float(oracle.item_I.var(correction=0))
    return {
        "within_user_auc": float(within_user_auc(taste_E, liked_E, events.user_E).mean()),
        "item_mean_auc": float(within_user_auc(mean_I[events.item_E], liked_E, events.user_E).mean()),
        "personal_share": personal / max(personal + common, 1e-12),
    }


def digest_of(tensors: Mapping[str, Tensor], *about: str) -> str:
    """SHA-256 of names, types, shapes and bytes of tensors, and of texts."""
    digest = hashlib.sha256("\x1e".join(about).encode())
    for name, value in sorted(tensors.items()):
        held = value.detach().cpu().contiguous()
        digest.update(f"\x1e{name}\x1f{held.dtype}\x1f{tuple(held.shape)}\x1f".encode())
        digest.update(held.reshape(-1).view(torch.uint8).numpy().tobytes() if held.numel() else b"")
    return digest.hexdigest()


def _ratings(events: Interactions, levels: tuple[float, ...]) -> Tensor:
    if events.rating_E is None or not len(events.rating_E):
        raise ValueError("an oracle needs ratings: the events have none (rating_E)")
    low, high = float(events.rating_E.min()), float(events.rating_E.max())
    if not low < levels[0] <= levels[-1] <= high:
        raise ValueError(
            f"oracle.levels={tuple(levels)} must be above the lowest rating, {low:g}, and at most the "
            f"highest, {high:g}"
        )
    return events.rating_E.float()


def _start(
    events: Interactions,
    config: OracleConfig,
    genres_IG: Tensor,
    reached_EC: Tensor,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """What is fitted: factors of a normal with deviation .1, zeros else, theta at the ratings' rates."""
    num_users, num_items = len(events.users), len(events.items)
    rate_C = reached_EC.mean(0).clamp(1e-4, 1 - 1e-4)
    theta_C = -torch.logit(rate_C)
    gap = theta_C.diff().clamp(min=1e-3)
    free = {
        "item_I": torch.zeros(num_items),
        "user_U": torch.zeros(num_users),
        "user_UD": 0.1 * torch.randn(num_users, config.factors, generator=generator),
        "item_ID": 0.1 * torch.randn(num_items, config.factors, generator=generator),
        "affinity_UG": torch.zeros(num_users, genres_IG.shape[1]),
        "theta_C": torch.cat([theta_C[:1], gap.expm1().log()]),
    }
    return {name: value.requires_grad_() for name, value in free.items()}


def _rising(free_C: Tensor) -> Tensor:
    """Thresholds from numbers without constraint: the first, then steps of softplus."""
    return torch.cat([free_C[:1], functional.softplus(free_C[1:])]).cumsum(0)


def _frozen(
    fitted: Mapping[str, Tensor], genres_IG: Tensor, names: tuple[str, ...], config: OracleConfig
) -> Oracle:
    """The oracle, with the mean over users of what is personal moved into b."""
    mean_D, mean_G = fitted["user_UD"].mean(0), fitted["affinity_UG"].mean(0)
    common_I = fitted["user_U"].mean() + fitted["item_ID"] @ mean_D + genres_IG @ mean_G
    return Oracle(
        item_I=fitted["item_I"] + common_I,
        user_U=fitted["user_U"] - fitted["user_U"].mean(),
        user_UD=fitted["user_UD"] - mean_D,
        item_ID=fitted["item_ID"],
        affinity_UG=fitted["affinity_UG"] - mean_G,
        genres_IG=genres_IG,
        theta_C=_rising(fitted["theta_C"]),
        genres=names,
        config=config,
    )


def _check(oracle: Oracle, user_N: Tensor, items_Nm: Tensor) -> None:
    if items_Nm.ndim != 2 or user_N.shape != items_Nm.shape[:1]:
        raise ValueError(
            f"users are {list(user_N.shape)} and items {list(items_Nm.shape)}; expected [N] and [N, m]"
        )
    for name, numbers, least, num in (
        ("users", user_N, 0, len(oracle.user_U)),
        ("items", items_Nm, -1, len(oracle.item_I)),
    ):
        if numbers.numel() and not (least <= int(numbers.min()) and int(numbers.max()) < num):
            raise ValueError(
                f"{name} are from {int(numbers.min())} to {int(numbers.max())}; "
                f"the oracle knows {least} to {num - 1}"
            )
