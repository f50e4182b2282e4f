"""Tables and figures of rankings by several recommenders, with intervals over users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from triptych.modalities.recsys.beams import Beams
from triptych.modalities.recsys.ranked import RankingConfig
from triptych.modalities.recsys.ranking import coverage, diversity, popularity_share, repeats
from triptych.training.report import Table, png
from triptych.training.stats import Estimate, bootstrap_interval, paired_difference

Rows = Mapping[str, Sequence[Mapping[str, Tensor]]]


def ranking_table(rows: Rows, *, against: str, note: str) -> tuple[Table, dict[str, Estimate]]:
    """Mean of each metric over users and seeds, 95 % interval over users, and what `against` is better by.

    rows: recommender -> a dict of per-user metrics [U] for every seed, users in one order. A user's results
    under all seeds are drawn together. Also every number by name: '<recommender>: recall@10',
    '<against> - <recommender>: recall@10'.
    """
    names = list(rows[against][0])
    results: dict[str, Estimate] = {}
    lines: list[list[object]] = []
    ours = {name: _over_seeds(rows[against], name) for name in names}
    last = names[-2] if len(names) > 1 else names[0]
    shown = next((n for n in names if n == "ndcg@10"), last)
    for recommender, seeds in rows.items():
        line: list[object] = [recommender if len(seeds) == 1 else f"{recommender} ({len(seeds)} seeds)"]
        for name in names:
            values = _over_seeds(seeds, name)
            results[f"{recommender}: {name}"] = bootstrap_interval(values, seed=0)
            line.append(results[f"{recommender}: {name}"])
            if recommender != against:
                gain = paired_difference(values, ours[name], seed=0)
                results[f"{against} - {recommender}: {name}"] = gain
        line.append(results.get(f"{against} - {recommender}: {shown}"))
        lines.append(line)
    columns = ["recommender", *names, f"{against}: {shown} over it"]
    return Table("Ranking of held-out items", columns, lines, note), results


def lists_table(
    rankings: Mapping[str, Sequence[Tensor]], popularity_I: Tensor, vectors_ID: Tensor | None, k: int
) -> tuple[Table, dict[str, Estimate]]:
    """What the first k recommendations of all users are like: coverage, diversity, popularity, by name.

    rankings: recommender -> items [U, >= k] of every seed. vectors_ID: of which diversity is measured.
    """
    names = [f"catalogue coverage@{k}", *([f"diversity@{k}"] if vectors_ID is not None else [])]
    names.append(f"most popular fifth@{k}")
    results, lines = {}, []
    for recommender, seeds in rankings.items():
        first = [items[:, :k] for items in seeds]
        covered = torch.tensor([coverage(items, len(popularity_I)) for items in first])
        found = [_plain(float(covered.mean()))]
        if vectors_ID is not None:
            found.append(_mean([diversity(items, vectors_ID) for items in first]))
        found.append(_mean([popularity_share(items, popularity_I) for items in first]))
        results |= {f"{recommender}: {name}": value for name, value in zip(names, found, strict=True)}
        lines.append([recommender, f"{found[0].mean:.1%}", *found[1:]])
    note = (
        "Coverage: share of the catalogue recommended to anybody. Diversity: 1 - mean cosine of the vectors "
        "that semantic ids are made of. Last: share of recommendations among the most popular fifth."
    )
    return Table("What is recommended", ["recommender", *names], lines, note), results


def sessions_table(
    beams: Mapping[str, Beams], vectors_ID: Tensor | None
) -> tuple[Table, dict[str, Estimate]]:
    """Of the likeliest sessions of several items: legality, repeated items, variety, and log-probs.

    legal: share of sessions whose every place is an item; distinct: different items of a user's sessions, of
    the places that there are; overlap: share of the items of the best session that the last one has, too.
    """
    results, lines = {}, []
    for recommender, found in beams.items():
        items_UWm = found.items_UWm
        there_UW = torch.isfinite(found.logp_UW)
        count_U = there_UW.sum(1).clamp(min=1)
        legal_U = ((items_UWm >= 0).all(-1) & there_UW).sum(1) / count_U
        again_U = (repeats(items_UWm.flatten(0, 1)).view(there_UW.shape) * there_UW).sum(1) / count_U
        last = (count_U - 1).view(-1, 1, 1).expand(-1, 1, items_UWm.shape[-1])
        worst_Um = items_UWm.gather(1, last)[:, 0]
        overlap_U = (items_UWm[:, 0].unsqueeze(-1) == worst_Um.unsqueeze(1)).any(-1).double().mean(-1)
        distinct_U = torch.tensor([len(row[row >= 0].unique()) for row in items_UWm])
        values = {
            "legal": legal_U,
            "items repeated": again_U,
            "distinct": distinct_U / (count_U * items_UWm.shape[-1]),
            "overlap": overlap_U,
            "best log-prob": found.logp_UW[:, 0],
        }
        if vectors_ID is not None:
            values["diversity"] = diversity(items_UWm[:, 0], vectors_ID)
        measured = {name: bootstrap_interval(value.double(), seed=0) for name, value in values.items()}
        results |= {f"{recommender}, sessions: {name}": value for name, value in measured.items()}
        lines.append([recommender, *measured.values()])
    num_items = next(iter(beams.values())).items_UWm.shape[-1]
    columns = ["model", *(n.split(": ")[1] for n in results if n.startswith(f"{next(iter(beams))}, "))]
    note = (
        "Legal: every place is an item of the catalogue. Distinct: different items of a user's sessions, of "
        "all places. Overlap: items of the best session that the last one has, too. Diversity: of the best."
    )
    return Table(f"Sessions of {num_items} items", columns, lines, note), results


def ranking_note(config: RankingConfig, switches: Sequence[str]) -> str:
    """How a table came about: the protocol, and what was decided on the way."""
    masked = "are not ranked" if config.mask_seen else "are ranked, too"
    return (
        f"Leave one out; the whole catalogue is ranked; a user's earlier items {masked}; "
        f"items below {config.width} beams count as not found. Classical recommenders learn from training "
        f"and validation events. {' '.join(switches)} 95 % intervals by bootstrap over users."
    )


def ranking_figure(rows: Rows, metric: str) -> bytes:
    """One metric of every recommender with its interval, best on top, as PNG."""
    from matplotlib.figure import Figure

    found = [(name, bootstrap_interval(_over_seeds(seeds, metric), seed=0)) for name, seeds in rows.items()]
    found.sort(key=lambda pair: pair[1].mean)
    figure = Figure(figsize=(7, 0.6 + 0.36 * len(found)), layout="constrained")
    axes = figure.add_subplot()
    for place, (_, value) in enumerate(found):
        axes.plot([value.low, value.high], [place, place], color="#4c6ef5", linewidth=2)
        axes.plot([value.mean], [place], "o", color="#1c2f8a")
        axes.annotate(
            f"{value.mean:.3f}", (value.mean, place), (0, 5), textcoords="offset points", ha="center"
        )
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.set_ylim(-0.6, len(found) - 0.3)
    axes.set_xlabel(f"{metric}, 95 % interval over users")
    axes.grid(axis="x", alpha=0.3)
    return png(figure)


def _over_seeds(seeds: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """Mean over seeds of each user's value, [U]."""
    return torch.stack([seed[name].double() for seed in seeds]).mean(0)


def _mean(seeds: Sequence[Tensor]) -> Estimate:
    return bootstrap_interval(torch.stack([seed.double() for seed in seeds]).mean(0), seed=0)


def _plain(value: float) -> Estimate:
    return Estimate(value, value, value, 1)
