"""Make semantic ids of items from users' events and what is said of the items, and report on them.

    python scripts/tokenise_items.py --config scripts/recipes/recsys_ids/movielens_tokenise.yaml
    python scripts/tokenise_items.py --data.source my.csv --output runs/ids --make.method rq_vae

The folder `output` gets index.json ({item: ["<a_1>", ...]}, as LETTER and LC-Rec have it), which `ids.path`
of `train_recsys.py` reads, and report.html. Ids are made of the events that training learns from: each user's
last two take no part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from triptych.modalities.recsys.data import DataConfig, load_interactions
from triptych.modalities.recsys.interactions import leave_one_out
from triptych.modalities.recsys.semantic_ids import SemanticIds
from triptych.modalities.recsys.tokenise import TokeniseConfig, tokenise
from triptych.scripts.common import (
    as_dict,
    command_line,
    errors_in_one_line,
    parse,
    quiet_libraries,
    versions,
)
from triptych.training.quarantine import Quarantine
from triptych.training.report import Figure, Table, png, write_report


@dataclass(frozen=True, kw_only=True)
class Config:
    """output: folder of the ids and their report. shown: ids of whose items the report shows some."""

    data: DataConfig
    output: str
    make: TokeniseConfig = field(default_factory=TokeniseConfig)
    shown: int = 8

    def __post_init__(self) -> None:
        if self.shown < 0:
            raise ValueError(f"shown={self.shown} must be at least 0")


def run(config: Config) -> int:
    """Make the ids; returns the exit code."""
    quarantine, folder = Quarantine(), Path(config.output)
    events = leave_one_out(load_interactions(config.data, quarantine=quarantine, report=print)).train
    ids, _, table = tokenise(events, config.make, print)
    folder.mkdir(parents=True, exist_ok=True)
    ids.write(folder / "index.json")
    for row in table.rows:
        print("  ".join(f"{c}: {v}" if c else str(v) for c, v in zip(table.columns, row, strict=True)))
    path = write_report(
        folder,
        title=f"Semantic ids of {config.data.source}",
        summary=[("items", f"{len(ids.items):,}"), ("codes a level", " x ".join(map(str, ids.sizes)))],
        tables=[table, _neighbours(ids, events.titles, config.shown)],
        samples=[],
        images=[Figure("Items a code, most used first", _usage(ids), "A flat line is a balanced level.")],
        config=as_dict(config),
        quarantine_counts=quarantine.counts,
        command=command_line(),
        versions=versions(),
        trained=False,
    )
    if quarantine.total:
        print(quarantine.summary())
    print(f"ids: {folder / 'index.json'}\nreport: {path}")
    return 0


def _neighbours(ids: SemanticIds, titles: Sequence[str], num: int) -> Table:
    """Some codes of the first level and items that have them."""
    first = ids.codes_IL[:, 0]
    used = torch.bincount(first, minlength=ids.sizes[0]).argsort(descending=True, stable=True)
    picked = used[torch.linspace(0, len(used) - 1, min(num, len(used))).long()].tolist()
    rows = []
    for code in picked:
        items = (first == code).nonzero()[:, 0].tolist()
        rows.append([f"<a_{code}>", len(items), " | ".join(str(titles[int(i)]) for i in items[:6])])
    return Table("Items that share their first code", ["code", "items", "some of them"], rows)


def _usage(ids: SemanticIds) -> bytes:
    """Items of each code, sorted, a line a level, as PNG."""
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for level, size in enumerate(ids.sizes):
        counts = torch.bincount(ids.codes_IL[:, level], minlength=size).sort(descending=True).values
        axes.plot(range(1, size + 1), counts.tolist(), label=f"level {level + 1}")
    axes.set_xlabel("code")
    axes.set_ylabel("items")
    axes.legend()
    axes.grid(alpha=0.3)
    return png(figure)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(Config, args, prog="tokenise_items", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
