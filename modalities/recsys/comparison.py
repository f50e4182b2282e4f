"""Exported recommenders on held-out events, one or several seeds each, beside classical bars."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from triptych.modalities.recsys.beams import Beams
from triptych.modalities.recsys.data import describe
from triptych.modalities.recsys.exported import Recommender, load
from triptych.modalities.recsys.interactions import Interactions, leave_one_out
from triptych.modalities.recsys.ranked import (
    RankingConfig,
    bar_rankings,
    ranked_items,
    sessions_of,
    tested,
)
from triptych.modalities.recsys.ranking import ranking_metrics
from triptych.modalities.recsys.ranking_report import (
    lists_table,
    ranking_figure,
    ranking_note,
    ranking_table,
    sessions_table,
)
from triptych.modalities.recsys.trie import Trie
from triptych.training.report import Figure, Table
from triptych.training.stats import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """tables and images of a report; results by name; rankings: recommender -> items [U, k] of every seed."""

    tables: list[Table]
    images: list[Figure]
    results: dict[str, Estimate]
    rankings: dict[str, list[Tensor]]


def compare(
    events: Interactions,
    models: Mapping[str, Sequence[Path]],
    config: RankingConfig,
    *,
    against: str,
    num_users: int = 200,
    report: Callable[[str], None],
    progress: Callable[[int], None] = lambda done: None,
) -> Compared:
    """Rank each user's last event with every model and bar.

    models: name -> exported folders, one a seed. num_users: whose sessions are looked at, as the models write
    them. A model's catalogue may differ from that of the events: items are matched by name, and what a model
    does not know it neither reads nor recommends.
    """
    split = leave_one_out(events)
    switches = describe(events, split)
    for line in switches:
        report(line)
    users, histories, targets = tested(split)
    rankings: dict[str, list[Tensor]] = {name: [] for name in models}
    some = torch.linspace(0, len(users) - 1, min(num_users, len(users))).long().unique().tolist()
    beams: dict[str, Beams] = {}
    done = 0
    for name, folders in models.items():
        for folder in folders:
            made = load(folder)
            theirs, back = _numbers(made, events, folder, report)
            rows = [theirs[row][theirs[row] >= 0] for row in histories]
            trie = None if made.ids is None else Trie.of(made.ids.codes_IL, made.ids.sizes)
            owners = made.owners([events.users[u] for u in users])
            items = ranked_items(made.policy, trie, rows, config, window=made.window, owners=owners)
            rankings[name].append(back[items])
            if trie is not None and name not in beams:
                beams[name] = _sessions(made, trie, [rows[i] for i in some], owners[some], config)
            done += 1
            progress(done)
    bars = bar_rankings(split, config, histories)
    rankings |= {name: [items] for name, items in bars.items()}
    ks = tuple(config.ks)
    scored = {n: [ranking_metrics(items, targets, ks) for items in seeds] for n, seeds in rankings.items()}
    note = ranking_note(config, switches)
    table, results = ranking_table(scored, against=against, note=note)
    popularity = torch.bincount(split.with_validation().item_E, minlength=len(events.items))
    middle = sorted(ks)[len(ks) // 2]
    lists, measured = lists_table(rankings, popularity, None, middle)
    results |= measured
    tables = [table, lists]
    if beams:
        sessions, measured = sessions_table(beams, None)
        tables.append(sessions)
        results |= measured
    figures = [
        Figure(f"{metric}@{middle}", ranking_figure(scored, f"{metric}@{middle}"), note)
        for metric in ("recall", "ndcg")
    ]
    return Compared(tables=tables, images=figures, results=results, rankings=rankings)


def _sessions(
    made: Recommender, trie: Trie, rows: Sequence[Tensor], owners: Tensor, config: RankingConfig
) -> Beams:
    return sessions_of(
        made.policy,  # type: ignore[arg-type]
        trie,
        rows,
        width=config.width,
        num_items=config.session_items,
        forbidden=rows if config.mask_seen else None,
        window=made.window,
        batch_size=config.batch_size,
        owners=owners,
    )


def _numbers(
    made: Recommender, events: Interactions, folder: Path, report: Callable[[str], None]
) -> tuple[Tensor, Tensor]:
    """Number in the model of each item of the events, -1 for none, and the other way; the last stands for -1.

    ValueError when they have no item in common.
    """
    ours, theirs = ({n: i for i, n in enumerate(names)} for names in (events.items, made.items))
    there = torch.tensor([theirs.get(name, -1) for name in events.items])
    back = torch.tensor([*(ours.get(name, -1) for name in made.items), -1])
    unknown = int((there < 0).sum())
    if unknown == len(there):
        raise ValueError(f"{folder}: none of its items is among those of the events")
    if unknown:
        report(f"{folder}: {unknown} of {len(there)} items are not in its catalogue")
    return there, back
