"""What a recommender run leaves behind: rankings, a table beside classical bars, the model, and a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from triptych.modalities.recsys.beams import Beams
from triptych.modalities.recsys.exported import Recommender, export
from triptych.modalities.recsys.ranked import bar_rankings, ranked_items, sessions_of, tested
from triptych.modalities.recsys.ranking import ranking_metrics
from triptych.modalities.recsys.ranking_report import (
    lists_table,
    ranking_figure,
    ranking_note,
    ranking_table,
    sessions_table,
)
from triptych.modalities.recsys.setup import RecsysConfig, RecsysRun
from triptych.modalities.recsys.trie import Trie
from triptych.training.atomic import write_json
from triptych.training.card import write_card
from triptych.training.logs import Progress
from triptych.training.quarantine import Quarantine
from triptych.training.references import unwrapped
from triptych.training.report import Figure, Table, write_report
from triptych.training.stats import Estimate

SESSION_USERS = 200
OURS = {"session": "this model", "sasrec": "SASRec (this run)"}


def trie_of(made: RecsysRun) -> Trie | None:
    """The trie of the run's semantic ids, on the policy's device."""
    if made.ids is None:
        return None
    device = next(made.policy.parameters()).device
    return Trie.of(made.ids.codes_IL, made.ids.sizes).to(device)


def validation(made: RecsysRun, config: RecsysConfig) -> Callable[[nn.Module], Mapping[str, float]]:
    """Recall and NDCG of the validation items, as the training loop asks for them."""
    trie = trie_of(made)
    users = _with(made.split.valid_U)
    if config.evaluation.users:
        # Spread over all: the first users of a file need not be like the others.
        places = torch.linspace(0, len(users) - 1, min(config.evaluation.users, len(users))).long().unique()
        users = [users[i] for i in places.tolist()]
    histories = [made.split.train.of(u) for u in users]
    targets = made.split.valid_U[users]

    def measure(policy: nn.Module) -> Mapping[str, float]:
        items = ranked_items(
            policy,
            trie,
            histories,
            config.evaluation,
            window=config.session.window,
            owners=torch.tensor(users),
        )
        rows = ranking_metrics(items, targets, tuple(config.evaluation.ks))
        return {f"ranking/{name}": float(values.mean()) for name, values in rows.items()}

    return measure


def finish(
    made: RecsysRun,
    policy: nn.Module,
    config: RecsysConfig,
    *,
    quarantine: Quarantine,
    settings: Mapping[str, Any],
    command: str,
    versions: Mapping[str, str],
    report: Callable[[str], None],
    bar: Callable[[str, int], Progress],
) -> None:
    """Rank the held-out items, put the bars beside, export the model with its card, and write report.html."""
    folder, model = Path(config.run.output_dir), unwrapped(policy)
    assert model is made.policy
    users, histories, targets = tested(made.split)
    with bar("rank", len(users)) as progress:
        items = ranked_items(
            model,
            trie_of(made),
            histories,
            config.evaluation,
            window=config.session.window,
            owners=torch.tensor(users),
            progress=progress.update,
        )
    ours = OURS[config.model.kind]
    with bar("bars", len(config.evaluation.bars)) as progress:
        bars = bar_rankings(made.split, config.evaluation, histories, progress.update)
    rankings = {ours: items} | bars
    ks = tuple(config.evaluation.ks)
    rows = {name: [ranking_metrics(found, targets, ks)] for name, found in rankings.items()}
    _keep(folder, items, users, targets)
    note = ranking_note(config.evaluation, made.switches)
    table, results = ranking_table(rows, against=ours, note=note)
    popularity = torch.bincount(made.events.item_E, minlength=len(made.events.items))
    lists, measured = lists_table(
        {name: [found] for name, found in rankings.items()}, popularity, made.vectors, _middle(ks)
    )
    results |= measured
    exported = Recommender(
        policy=made.policy,
        config=config.model,
        ids=made.ids,
        items=made.events.items,
        titles=made.events.titles,
        window=config.session.window,
        users=made.events.users,
        sides=made.events.sides,
    )
    export(folder / "model", exported, state=model.state_dict())
    headline = {f"{name}@{k}": results[f"{ours}: {name}@{k}"] for k in ks for name in ("recall", "ndcg")}
    _card(folder, config, headline, command, versions, settings)
    tables = [table, lists, *([made.id_table] if made.id_table else [])]
    if made.ids is not None:
        some = torch.linspace(0, len(users) - 1, min(SESSION_USERS, len(users))).long().unique().tolist()
        beams = _sessions(
            made,
            config,
            [histories[i] for i in some],
            [users[i] for i in some],
            num_items=max(2, config.session.items),
        )
        sessions, measured = sessions_table({ours: beams}, made.vectors)
        tables.append(sessions)
        results |= measured
    write_json(folder / "results.json", {n: asdict(e) for n, e in results.items()})
    if config.evaluation.shown:
        tables.append(shown_users(made, model, config, users, histories))
    path = write_report(
        folder,
        title=f"{config.model.kind} on {config.data.source}",
        summary=[(name, f"{value:.3f}") for name, value in headline.items()],
        tables=tables,
        samples=[],
        images=[Figure("Ranking of held-out items", ranking_figure(rows, f"recall@{_middle(ks)}"), note)],
        config=settings,
        quarantine_counts=quarantine.counts,
        command=command,
        versions=versions,
    )
    for name, value in headline.items():
        report(f"  {name}: {value:.3f}")
    report(f"report: {path}")


def shown_users(
    made: RecsysRun, model: nn.Module, config: RecsysConfig, users: Sequence[int], histories: Sequence[Tensor]
) -> Table:
    """Some users' latest items and what the model recommends them, by title, with the held-out item."""
    evaluation, titles = config.evaluation, made.events.titles
    picked = torch.linspace(0, len(users) - 1, min(evaluation.shown, len(users))).long().unique().tolist()
    rows = [histories[i] for i in picked]
    trie = trie_of(made)
    if trie is None:
        items = ranked_items(model, None, rows, evaluation, window=config.session.window)
        sessions = items[:, :5].unsqueeze(-1)
    else:
        beams = _sessions(made, config, rows, [users[i] for i in picked], num_items=evaluation.session_items)
        sessions = beams.items_UWm[:, : 5 if evaluation.session_items == 1 else 2]
    lines = []
    for place, i in enumerate(picked):
        shown = [
            " | ".join(titles[item] for item in session if item >= 0)
            for session in sessions[place].tolist()
            if session[0] >= 0
        ]
        lines.append(
            [
                made.events.users[users[i]],
                " | ".join(titles[item] for item in rows[place][-5:].tolist()),
                "; ".join(f"{n}. {text}" for n, text in enumerate(shown, start=1)),
                titles[int(made.split.test_U[users[i]])],
            ]
        )
    columns = ["user", "latest items", "recommended", "held out"]
    return Table("Recommendations", columns, lines, "Items a user already has are not recommended.")


def _with(targets_U: Tensor) -> list[int]:
    """Users that have a held-out item."""
    return (targets_U >= 0).nonzero()[:, 0].tolist()


def _sessions(
    made: RecsysRun,
    config: RecsysConfig,
    rows: Sequence[Tensor],
    users: Sequence[int],
    *,
    num_items: int,
) -> Beams:
    """The likeliest sessions after each history."""
    trie = trie_of(made)
    assert trie is not None
    return sessions_of(
        made.policy,  # type: ignore[arg-type]
        trie,
        rows,
        width=config.evaluation.width,
        num_items=num_items,
        forbidden=rows if config.evaluation.mask_seen else None,
        window=config.session.window,
        batch_size=config.evaluation.batch_size,
        owners=torch.tensor(users),
    )


def _keep(folder: Path, items: Tensor, users: Sequence[int], targets: Tensor) -> None:
    """Rankings of this run, from which runs of several seeds are compared."""
    tensors = {"items": items.contiguous(), "users": torch.tensor(users), "targets": targets.contiguous()}
    save_file(tensors, folder / "rankings.safetensors")


def _middle(ks: Sequence[int]) -> int:
    return sorted(ks)[len(ks) // 2]


def _card(
    folder: Path,
    config: RecsysConfig,
    headline: Mapping[str, Estimate],
    command: str,
    versions: Mapping[str, str],
    settings: Mapping[str, Any],
) -> None:
    write_card(
        folder / "model",
        base_model="trained from scratch",
        library_name="safetensors",
        tags=["generative-recommendation", config.model.kind],
        datasets=[config.data.source],
        license=None,
        metrics={name: f"{value:.3f}" for name, value in headline.items()},
        command=command,
        versions=versions,
        config=settings,
    )
