"""Draw logged sessions from a ground truth that is known, because it was made.

    python scripts/log_sessions.py --config scripts/recipes/recsys_logs/movielens_logs.yaml

A response model, the oracle, is fitted on all ratings and frozen; a simple logging policy shows one session a
request, and the oracle says what the user did. Writes <output>/logs.safetensors, of which reward models
learn, <output>/oracle and <output>/other_oracle, which only `judge_recsys.py` may read, and report.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from triptych.modalities.recsys.data import DataConfig, load_interactions
from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.logged import SPLITS, LoggedSessions, LoggingConfig, make_logs
from triptych.modalities.recsys.oracle import ITEM_SIGNALS, Oracle, OracleConfig, diagnose, fit_oracle
from triptych.modalities.recsys.oracle_files import write_oracle
from triptych.scripts.common import (
    as_dict,
    command_line,
    errors_in_one_line,
    parse,
    quiet_libraries,
    versions,
)
from triptych.training.order import key
from triptych.training.quarantine import Quarantine
from triptych.training.report import Figure, Table, png, write_report


@dataclass(frozen=True, kw_only=True)
class Config:
    """other_oracle: a second ground truth, of its own seed and size, to see what hangs on the first one."""

    data: DataConfig
    output: str
    oracle: OracleConfig = field(default_factory=OracleConfig)
    other_oracle: OracleConfig = field(default_factory=lambda: OracleConfig(factors=24))
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 0


def run(config: Config) -> int:
    """Fit, draw and write; returns the exit code."""
    quarantine, folder = Quarantine(), Path(config.output)
    events = load_interactions(config.data, quarantine=quarantine, report=print)

    def generator(purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(key(purpose, config.seed))

    print("fitting two oracles on all ratings")
    oracle = fit_oracle(events, config.oracle, generator("oracle"))
    other = fit_oracle(events, config.other_oracle, generator("other oracle"))
    logs = make_logs(events, oracle, config.logging, generator("logs"))
    write_oracle(oracle, folder / "oracle")
    write_oracle(other, folder / "other_oracle")
    logs.write(folder / "logs.safetensors")
    tables = [_oracles({"oracle": oracle, "other_oracle": other}, events), _signals(logs), _splits(logs)]
    for table in tables:
        for row in table.rows:
            print("  ".join(f"{c}: {_text(v)}" for c, v in zip(table.columns, row, strict=True)))
    path = write_report(
        folder,
        title=f"Logged sessions on {config.data.source}",
        summary=[("requests", f"{len(logs.user_N):,}"), ("items a session", str(logs.items_Nm.shape[1]))],
        tables=tables,
        samples=[],
        images=[Figure("What was shown", _exposure(logs, events), "Items from the most popular on.")],
        config=as_dict(config),
        quarantine_counts=quarantine.counts,
        command=command_line(),
        versions=versions(),
        trained=False,
    )
    if quarantine.total:
        print(quarantine.summary())
    print(f"logs: {folder / 'logs.safetensors'}\nreport: {path}")
    return 0


def _oracles(oracles: dict[str, Oracle], events: Interactions) -> Table:
    columns = ["oracle", "factors", "within-user AUC", "AUC of item means", "personal share"]
    rows = []
    for name, oracle in oracles.items():
        found = diagnose(oracle, events)
        shown = (found[n] for n in ("within_user_auc", "item_mean_auc", "personal_share"))
        rows.append([name, oracle.config.factors, *shown])
    note = (
        "How well each orders the ratings (4 and 5 over 1 to 3) of a user, beside items' mean ratings, which "
        "are the same for everybody; personal share: of the variance of taste. An oracle judges, and does "
        "nothing else: pairs, early stopping or tuning that looked at it would make its verdict worthless."
    )
    return Table("Ground truths", columns, rows, note)


def _signals(logs: LoggedSessions) -> Table:
    rows = [["swt", float(logs.signals["swt"].mean())]]
    rows += [[name, float(logs.signals[name].mean())] for name in ITEM_SIGNALS]
    note = "swt: share of the session that was reached; the others: share of all items shown."
    return Table("What users did", ["signal", "mean"], rows, note)


def _splits(logs: LoggedSessions) -> Table:
    rows = []
    for place, name in enumerate(SPLITS):
        of = logs.split_N == place
        rows.append([name, len(logs.user_N[of].unique()), int(of.sum())])
    note = "Users are split by their names: who judges is never trained on."
    return Table("Users", ["part", "users", "requests"], rows, note)


def _exposure(logs: LoggedSessions, events: Interactions) -> bytes:
    """Times shown and events of each item, most popular first, as PNG."""
    from matplotlib.figure import Figure as Canvas

    count_I = torch.bincount(events.item_E, minlength=len(events.items))
    order = count_I.argsort(descending=True, stable=True)
    shown_I = torch.bincount(logs.items_Nm.flatten(), minlength=len(events.items))
    canvas = Canvas(figsize=(7, 3.2), layout="constrained")
    axes = canvas.add_subplot()
    axes.plot(shown_I[order].tolist(), ".", markersize=2, label="times shown")
    axes.plot(count_I[order].tolist(), label="events")
    axes.set_xlabel("item")
    axes.set_yscale("symlog")
    axes.legend()
    axes.grid(alpha=0.3)
    return png(canvas)


def _text(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(Config, args, prog="log_sessions", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
