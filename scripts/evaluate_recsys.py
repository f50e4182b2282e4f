"""Rank held-out events with exported recommenders, several seeds each, beside classical ones.

    python scripts/evaluate_recsys.py --config scripts/recipes/recsys_ids/movielens_evaluate.yaml
    python scripts/evaluate_recsys.py --data.source my.csv --models '{"a": ["runs/x/model"]}' --output runs/y

models: name -> exported folders, one a seed: a user's results under all seeds are drawn together. The folder
`output` gets report.html, results.json, and rankings.safetensors with every recommender's items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors.torch import save_file

from triptych.modalities.recsys.comparison import compare
from triptych.modalities.recsys.data import DataConfig, load_interactions
from triptych.modalities.recsys.ranked import RankingConfig, check_bars
from triptych.scripts.common import (
    as_dict,
    command_line,
    errors_in_one_line,
    parse,
    progress,
    quiet_libraries,
    versions,
)
from triptych.training.atomic import write_json
from triptych.training.quarantine import Quarantine
from triptych.training.report import write_report


@dataclass(frozen=True, kw_only=True)
class Config:
    """against: the model that the others are compared with; the first when null."""

    data: DataConfig
    models: dict[str, list[str]]
    output: str
    against: str | None = None
    evaluation: RankingConfig = field(default_factory=RankingConfig)

    def __post_init__(self) -> None:
        if not self.models or not all(self.models.values()):
            raise ValueError("models needs a name and at least one exported folder for it")
        if self.against is not None and self.against not in self.models:
            raise ValueError(f"against={self.against} is none of the models: {', '.join(self.models)}")
        check_bars(self.evaluation)


def run(config: Config) -> int:
    """Compare; returns the exit code."""
    quarantine, folder = Quarantine(), Path(config.output)
    events = load_interactions(config.data, quarantine=quarantine, report=print)
    against = config.against or next(iter(config.models))
    with progress("models", enabled=True)(sum(map(len, config.models.values())), 0) as bar:
        found = compare(
            events,
            {name: [Path(p) for p in paths] for name, paths in config.models.items()},
            config.evaluation,
            against=against,
            report=print,
            progress=bar.update,
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {
            f"{name}/{i}": x.contiguous()
            for name, seeds in found.rankings.items()
            for i, x in enumerate(seeds)
        },
        folder / "rankings.safetensors",
    )
    write_json(folder / "results.json", {n: asdict(e) for n, e in found.results.items()})
    for line in found.tables[0].rows:
        print("  ".join(format(v, ".3f") if hasattr(v, "mean") else str(v) for v in line))
    ks = sorted(config.evaluation.ks)
    headline = [f"{against}: {name}@{ks[len(ks) // 2]}" for name in ("recall", "ndcg")]
    path = write_report(
        folder,
        title=f"Recommenders on {config.data.source}",
        summary=[(name, f"{found.results[name]:.3f}") for name in headline],
        tables=found.tables,
        samples=[],
        images=found.images,
        config=as_dict(config),
        quarantine_counts=quarantine.counts,
        command=command_line(),
        versions=versions(),
    )
    print(f"report: {path}")
    return 0


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(Config, args, prog="evaluate_recsys", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
