"""Ranking the whole catalogue for users, with a generative model's beams or with scores of every item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from triptych.modalities.recsys.beams import Beams, beam_search, joined
from triptych.modalities.recsys.beams import ranked_items as items_of_beams
from triptych.modalities.recsys.classical import BARS
from triptych.modalities.recsys.decoding import begin
from triptych.modalities.recsys.interactions import Split
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.model import SessionPolicy
from triptych.modalities.recsys.ranking import top_items
from triptych.modalities.recsys.sasrec import SasRec
from triptych.modalities.recsys.trie import Trie
from triptych.training.references import unchanged, unwrapped


@dataclass(frozen=True, kw_only=True)
class RankingConfig:
    """Held-out ranking of the whole catalogue.

    width: beams of a session model; an item below them is not ranked. mask_seen: items of a user's history
    are not recommended. bars: classical recommenders to put beside. users: at most so many users of the
    validation during training (0: all). shown: users whose recommendations the report shows, as sessions of
    session_items items.
    """

    width: int = 50
    ks: list[int] = field(default_factory=lambda: [5, 10, 20])
    mask_seen: bool = True
    bars: list[str] = field(default_factory=list)
    batch_size: int = 64
    users: int = 0
    shown: int = 8
    session_items: int = 1

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or max(self.ks) > self.width:
            raise ValueError(f"evaluation.ks={self.ks} must be from 1 to evaluation.width={self.width}")
        for name, least in {"batch_size": 1, "users": 0, "shown": 0, "session_items": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"evaluation.{name}={getattr(self, name)} must be at least {least}")


def sessions_of(
    policy: SessionPolicy,
    trie: Trie,
    histories: Sequence[Tensor],
    *,
    width: int,
    num_items: int,
    forbidden: Sequence[Tensor] | None,
    window: int,
    batch_size: int,
    owners: Tensor | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Beams:
    """The `width` likeliest sessions of `num_items` items after each history, in batches of users.

    owners: number of each history's user, -1 = unknown, which they all are when it is None.
    """
    device = policy.begin_D.device
    found: list[Beams] = []
    users = torch.full((len(histories),), -1) if owners is None else owners
    with unchanged(policy), torch.no_grad():
        for start in range(0, len(histories), batch_size):
            rows = histories[start : start + batch_size]
            block = users[start : start + batch_size]
            history = Jagged.of([row[-window:] for row in rows], block).to(device)
            unwanted = None
            if forbidden is not None:
                unwanted = _block(forbidden[start : start + batch_size], device)
            found.append(
                beam_search(begin(policy, history), trie, width=width, num_items=num_items, within=unwanted)
            )
            progress(start + len(rows))
    return joined([b.mapped(Tensor.cpu) for b in found])


def ranked_items(
    policy: nn.Module,
    trie: Trie | None,
    histories: Sequence[Tensor],
    config: RankingConfig,
    *,
    window: int,
    owners: Tensor | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """The first max(ks) items for every history, best first, [U, k]; -1 where there is none."""
    model, most = unwrapped(policy), max(config.ks)
    seen = list(histories) if config.mask_seen else None
    if isinstance(model, SessionPolicy):
        assert trie is not None
        beams = sessions_of(
            model,
            trie,
            histories,
            width=config.width,
            num_items=1,
            forbidden=seen,
            window=window,
            batch_size=config.batch_size,
            owners=owners,
            progress=progress,
        )
        within = None if seen is None else _block(seen)
        return items_of_beams(beams, trie.to("cpu"), k=most, within=within)
    assert isinstance(model, SasRec)
    return _by_scores(model, histories, seen, most, window, config.batch_size, progress)


def bar_rankings(
    split: Split,
    config: RankingConfig,
    histories: Sequence[Tensor],
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Tensor]:
    """Rankings by the classical recommenders of config.bars, which fit on training and validation events."""
    if not config.bars:
        return {}
    events, most = split.with_validation(), max(config.ks)
    found = {}
    for done, name in enumerate(config.bars, start=1):
        scorer = BARS[name](events)
        parts = []
        for start in range(0, len(histories), 256):
            block = list(histories[start : start + 256])
            parts.append(top_items(scorer(block), most, block if config.mask_seen else None))
        found[name] = torch.cat(parts)
        progress(done)
    return found


def check_bars(config: RankingConfig) -> None:
    """ValueError for a classical recommender that there is not."""
    if odd := sorted(set(config.bars) - set(BARS)):
        raise ValueError(f"evaluation.bars={', '.join(odd)}; valid: {', '.join(BARS)}")


def tested(split: Split) -> tuple[list[int], list[Tensor], Tensor]:
    """Users with a test item, what is known of each before it, and the test items."""
    users = (split.test_U >= 0).nonzero()[:, 0].tolist()
    rows = []
    for user in users:
        valid = split.valid_U[user : user + 1]
        rows.append(torch.cat([split.train.of(user), valid[valid >= 0]]))
    return users, rows, split.test_U[users]


def _block(rows: Sequence[Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of items as offsets and items."""
    block = Jagged.of(rows)
    return block.offsets.to(device), block.values.to(device)


def _by_scores(
    model: SasRec,
    histories: Sequence[Tensor],
    seen: Sequence[Tensor] | None,
    most: int,
    window: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> Tensor:
    found = []
    with unchanged(model):
        for start in range(0, len(histories), batch_size):
            rows = histories[start : start + batch_size]
            history = Jagged.of([row[-window:] for row in rows]).to(next(model.parameters()).device)
            block = None if seen is None else list(seen[start : start + batch_size])
            found.append(top_items(model.scores(history).cpu(), most, block))
            progress(start + len(rows))
    return torch.cat(found)
