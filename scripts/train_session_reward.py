"""Train OneRec's session reward model on logged sessions: an ensemble of several towers.

    python scripts/train_session_reward.py --config scripts/recipes/recsys_reward/movielens_reward.yaml

Writes <output>/model, which the judge `reward_model` of alignment recipes reads, and report.html with every
tower beside what the base rate and the items' means reach.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from triptych.modalities.recsys.data import DataConfig, load_interactions
from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.item_vectors import item_vectors
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.logged import LoggedSessions
from triptych.modalities.recsys.reward_model import save_reward
from triptych.modalities.recsys.reward_training import (
    TRAIN,
    VALIDATION,
    RewardTrainingConfig,
    TrainedReward,
    session_labels,
    train_reward_model,
)
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
    """features: of items: 'svd' of what is watched near what by the users learnt from, or 'none'.

    learn_from: part of the logs' users; the other of the two validates. A model of the validation users is an
    independent second opinion, by which an alarm can be raised.
    """

    logs: str
    data: DataConfig
    training: RewardTrainingConfig
    output: str
    features: Literal["svd", "none"] = "svd"
    dim: int = 32
    learn_from: Literal["train", "validation"] = "train"


def run(config: Config) -> int:
    """Train and write; returns the exit code."""
    folder, quarantine = Path(config.output), Quarantine()
    events = load_interactions(config.data, quarantine=quarantine, report=print)
    logs = LoggedSessions.read(Path(config.logs))
    if logs.about.get("events") != events.fingerprint:
        raise ValueError(f"logs={config.logs}: made of other data than data.source={config.data.source}")
    if config.learn_from == "validation":
        swapped = torch.tensor([VALIDATION, TRAIN])
        two = logs.split_N < 2
        split_N = torch.where(two, swapped[logs.split_N.clamp(max=1)], logs.split_N)
        logs = replace(logs, split_N=split_N, fingerprint="")
    features = None
    if config.features == "svd":
        features = item_vectors(_learnt(events, logs), kind="svd", dim=config.dim)
    torch.manual_seed(config.training.seed)
    trained = train_reward_model(
        logs,
        config.training,
        num_items=len(events.items),
        accelerator=Accelerator(),
        features_IF=features,
        report=print,
    )
    facts = {"items": list(events.items), "logs": logs.fingerprint, "learn_from": config.learn_from}
    save_reward(trained.ensemble, folder / "model", facts=facts)
    table = _towers(trained.metrics, config.training.model.towers)
    for row in table.rows:
        print(
            "  ".join(
                f"{c}: {v if isinstance(v, str) else round(v, 3)}"
                for c, v in zip(table.columns, row, strict=True)
            )
        )
    (folder / "results.json").write_text(json.dumps(trained.metrics, indent=1) + "\n", "utf-8")
    path = write_report(
        folder,
        title=f"Session reward model on {config.data.source}",
        summary=[("members", str(config.training.model.num_members)), ("sessions", f"{len(logs.user_N):,}")],
        tables=[table, _epochs(trained)],
        samples=[],
        images=[Figure("Reliability", _reliability(trained, logs), "A calibrated tower is on the diagonal.")],
        config=as_dict(config),
        quarantine_counts=quarantine.counts,
        command=command_line(),
        versions=versions(),
        trained=False,
    )
    print(f"model: {folder / 'model'}\nreport: {path}")
    return 0


def _learnt(events: Interactions, logs: LoggedSessions) -> Interactions:
    """The events of the users that are learnt from."""
    keep_U = torch.zeros(len(events.users), dtype=torch.bool)
    keep_U[logs.user_N[logs.split_N == TRAIN]] = True
    return events.kept(keep_U[events.user_E])


def _towers(metrics: Mapping[str, float], towers: Sequence[str]) -> Table:
    names = ("bce", "base_rate_bce", "calibration", "within_user_auc", "item_mean_auc")
    rows = [[tower, *(metrics[f"{tower}/{name}"] for name in names)] for tower in towers]
    columns = [
        "tower",
        "cross-entropy",
        "of the base rate",
        "calibration error",
        "within-user AUC",
        "AUC of item means",
    ]
    note = (
        "On sessions of users that are not learnt from. AUC: chance that of two sessions of a user the one "
        "with the better response scores higher; responses are drawn, so 1 is out of reach. Item means are "
        "the same for everybody: what a reward model knows beyond them is what it knows of the user."
    )
    return Table("Towers", columns, rows, note)


def _epochs(trained: TrainedReward) -> Table:
    longest = max(len(row) for row in trained.losses)
    rows = [
        [epoch + 1, *(row[epoch] if epoch < len(row) else None for row in trained.losses)]
        for epoch in range(longest)
    ]
    columns = ["epoch", *(f"member {i + 1}" for i in range(len(trained.losses)))]
    return Table("Validation loss", columns, rows, "The best epoch of each member is kept.")


def _reliability(trained: TrainedReward, logs: LoggedSessions) -> bytes:
    """Mean response against mean probability in tenths of the validation sessions, a line a tower, as PNG."""
    from matplotlib.figure import Figure as Canvas

    towers = trained.ensemble.towers
    rows = (logs.split_N == VALIDATION).nonzero()[:, 0]
    device = next(trained.ensemble.parameters()).device
    history: Jagged = logs.history.to(device)
    found = trained.ensemble.probabilities(history, logs.items_Nm.to(device)[rows], rows.to(device))
    probability_NK = found.mean(0).cpu()
    labels_NK: Tensor = session_labels(logs.signals, logs.items_Nm, towers)[rows]
    canvas = Canvas(figsize=(4.6, 4.2), layout="constrained")
    axes = canvas.add_subplot()
    axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
    for k, tower in enumerate(towers):
        order = probability_NK[:, k].argsort()
        bins = [b for b in torch.tensor_split(order, 10) if len(b)]
        x, y = ([float(v[b, k].mean()) for b in bins] for v in (probability_NK, labels_NK))
        axes.plot(x, y, ".-", label=tower)
    axes.set_xlabel("probability")
    axes.set_ylabel("response")
    axes.legend()
    axes.grid(alpha=0.3)
    return png(canvas)


def main(args: Sequence[str] | None = None) -> int:
    """Entry point."""
    with errors_in_one_line():
        config = parse(Config, args, prog="train_session_reward", doc=__doc__ or "")
        quiet_libraries()
        return run(config)


if __name__ == "__main__":
    raise SystemExit(main())
