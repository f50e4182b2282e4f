"""Everything a recommender run needs, put together from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from triptych.modalities.recsys.data import DataConfig, describe, load_interactions
from triptych.modalities.recsys.features import EntityVectors, Sides, picked
from triptych.modalities.recsys.interactions import Interactions, Split, leave_one_out
from triptych.modalities.recsys.likelihood import Collator, Example, SessionLikelihood, per_sample
from triptych.modalities.recsys.model import ModelConfig, SessionPolicy
from triptych.modalities.recsys.next_items import SessionConfig, next_examples
from triptych.modalities.recsys.ranked import RankingConfig, check_bars
from triptych.modalities.recsys.requests import UsersConfig, with_users
from triptych.modalities.recsys.sasrec import SasRec
from triptych.modalities.recsys.semantic_ids import SemanticIds
from triptych.modalities.recsys.tables import TableSpec, TorchTables
from triptych.modalities.recsys.tokenise import TokeniseConfig, tokenise
from triptych.objectives import LogLik, Terms
from triptych.training.atomic import write_json
from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.loop import Task
from triptych.training.quarantine import Quarantine
from triptych.training.references import content_hash
from triptych.training.report import Table


@dataclass(frozen=True, kw_only=True)
class IdsConfig:
    """Semantic ids: read from `path` ({item: ["<a_1>", ...]} json), or made as `make` says."""

    path: str | None = None
    make: TokeniseConfig = field(default_factory=TokeniseConfig)


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """The optimizer of tables that several ranks share out (model.tables=torchrec); `optim` is of the rest.

    It updates them in the backward pass, with `lr` on the schedule of optim.lr. Gradients of tables are not
    clipped and their weights do not decay: optim.max_grad_norm and optim.weight_decay are of the rest.
    """

    optimizer: Literal["sgd", "adagrad", "rowwise_adagrad"] = "rowwise_adagrad"
    lr: float = 0.05

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise ValueError(f"tables.lr={self.lr} must be positive")


@dataclass(frozen=True, kw_only=True)
class RecsysConfig:
    """A whole recommender run. users: null learns from all; else from some, so that others can judge.

    tables: null = `TablesConfig` as it is, where ranks share tables out.
    """

    data: DataConfig
    model: ModelConfig
    objective: ObjectiveConfig
    optim: OptimConfig
    run: RunConfig
    ids: IdsConfig = field(default_factory=IdsConfig)
    tables: TablesConfig | None = None
    session: SessionConfig = field(default_factory=SessionConfig)
    evaluation: RankingConfig = field(default_factory=RankingConfig)
    users: UsersConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecsysRun:
    """What `set_up` made.

    ids: of a session model; vectors: [I, D] that they were made of, if they were. events: learnt from.
    """

    policy: SessionPolicy | SasRec
    ids: SemanticIds | None
    vectors: Tensor | None
    id_table: Table | None
    split: Split
    task: Task
    base_hash: str
    switches: tuple[str, ...]
    events: Interactions


def set_up(
    config: RecsysConfig,
    terms: Terms,
    *,
    device: torch.device,
    quarantine: Quarantine,
    report: Callable[[str], None],
) -> RecsysRun:
    """Read the events, hold each user's last two out, make or read semantic ids, build the model.

    Raises ValueError (DataError among them) in one line for anything the user can mend.
    """
    if config.model.kind == "sasrec" and config.session.items != 1:
        raise ValueError(f"model.kind=sasrec predicts one item: session.items={config.session.items}")
    last = config.session.hold_out == "test"
    if last and config.run.eval_every:
        raise ValueError("session.hold_out=test leaves nothing to validate on: set run.eval_every=0")
    check_bars(config.evaluation)
    terms.check(LogLik, frozenset(), modality="recsys")
    if slots := terms.slots():
        raise ValueError(
            f"next-item data has no reference for the slot {', '.join(slots)}: use objective sft"
        )
    events = load_interactions(config.data, quarantine=quarantine, report=report)
    if config.users is not None:
        events = with_users(events, config.users)
        report(f"users of {' and '.join(config.users.parts)} alone: {len(events.item_E):,} events")
    split = leave_one_out(events)
    learnt = split.with_validation() if last else split.train
    what = "training and validation" if last else "training"
    switches = (*describe(events, split), f"The model learns from {what} events.")
    for line in switches:
        report(line)
    ids, vectors, table = None, None, None
    if config.model.kind == "session":
        ids, vectors, table = _semantic_ids(config, learnt, report)
    torch.manual_seed(config.run.seed)
    policy = make_policy(config.model, ids, events.sides).to(device)
    examples = next_examples(learnt, config.session, every_position=config.model.every_position)
    if not examples:
        raise ValueError(
            f"data.source={config.data.source}: no user has 4 events, two to train on and two to hold out"
        )
    levels = 1 if ids is None else len(ids.sizes)
    return RecsysRun(
        policy=policy,
        ids=ids,
        vectors=vectors,
        id_table=table,
        split=split,
        task=next_task(examples, terms, levels, crop=config.session.crop),
        base_hash=content_hash(policy),
        switches=switches,
        events=learnt,
    )


def make_policy(config: ModelConfig, ids: SemanticIds | None, sides: Sides) -> SessionPolicy | SasRec:
    """A model of this configuration with fresh weights; ValueError for a feature that there is not."""
    if config.kind == "sasrec":
        return SasRec(config, sides.num_items)
    assert ids is not None
    tables: list[EntityVectors | None] = []
    for what, own, num, there in (
        ("item", config.item_vectors, sides.num_items, sides.item_features),
        ("user", config.user_vectors, sides.num_users, sides.user_features),
    ):
        names = config.item_features if what == "item" else config.user_features
        features = picked(there, names, f"model.{what}_features")
        wanted = own or features
        name = what if own else None
        tables.append(
            EntityVectors(_tables(config), config.width, own=name, num=num, features=features)
            if wanted
            else None
        )
    return SessionPolicy(config, ids.codes_IL, ids.sizes, *tables)


def _tables(config: ModelConfig) -> Callable[[Sequence[TableSpec], int], nn.Module]:
    if config.tables == "torch":
        return TorchTables
    from triptych.modalities.recsys.sharded_tables import TorchrecTables

    return TorchrecTables


def next_task(examples: list[Example], terms: Terms, levels: int, *, crop: float = 0.0) -> Task:
    """Next-session prediction on examples, every position with the same weight."""
    mean = sum(len(e.sessions) for e in examples) / len(examples)
    return Task(
        likelihood=SessionLikelihood(),
        terms=terms,
        references={},
        collate=Collator(levels=levels, per_sample=mean, crop=crop),
        examples=examples,
        lengths=[e.cost for e in examples],
        sources=[e.source for e in examples],
        fold=per_sample,
    )


def _semantic_ids(
    config: RecsysConfig, events: Interactions, report: Callable[[str], None]
) -> tuple[SemanticIds, Tensor | None, Table | None]:
    if config.ids.path is not None:
        return SemanticIds.read(Path(config.ids.path), events.items), None, None
    folder = Path(config.run.output_dir) / "ids"
    ids, vectors, table = tokenise(events, config.ids.make, report)
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        # Every rank makes the same ones; two that write would take the file from each other.
        return ids, vectors, table
    folder.mkdir(parents=True, exist_ok=True)
    ids.write(folder / "index.json")
    write_json(folder / "made_of.json", {"fingerprint": events.fingerprint, "items": len(ids.items)})
    return ids, vectors, table
