"""Tables and figures of rankings by several recommenders, with intervals over users."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from triptych.training.report import Table
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


def ranking_figure(rows: Rows, metric: str) -> bytes:
    """One metric of every recommender with its interval, best on top, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
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
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def _over_seeds(seeds: Sequence[Mapping[str, Tensor]], name: str) -> Tensor:
    """Mean over seeds of each user's value, [U]."""
    return torch.stack([seed[name].double() for seed in seeds]).mean(0)
