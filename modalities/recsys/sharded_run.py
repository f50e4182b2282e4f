"""A training run whose embedding tables are shared out over its ranks: what the loop and the script need.

The first rank makes a plain whole policy, for held-out metrics and the export, when one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from triptych.modalities.recsys.model import SessionPolicy
from triptych.modalities.recsys.outcome import validation
from triptych.modalities.recsys.setup import RecsysConfig, RecsysRun, TablesConfig, make_policy
from triptych.modalities.recsys.sharded_tables import (
    TorchrecTables,
    dense_parameters,
    gathered_moments,
    gathered_state,
    load_moments,
    load_tables,
    set_learning_rate,
    shard,
)
from triptych.training.fused import check_fused
from triptych.training.loop import Learner
from triptych.training.references import trained

if TYPE_CHECKING:
    from torchrec.distributed import DistributedModelParallel  # pyright: ignore[reportMissingImports]


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedTables:
    """A policy with its tables shared out, as the loop sees it: see `training.fused.Fused`.

    lr: the tables' rate at the top of the schedule. keys: parameter of a table -> its key in the state dict.
    """

    policy: DistributedModelParallel
    dense: Mapping[str, nn.Parameter]
    shapes: Mapping[str, tuple[int, ...]]
    keys: Mapping[str, str]
    lr: float

    def follow(self, ratio: float) -> None:
        """Use this share of `lr` from the next backward pass on."""
        set_learning_rate(self.policy, self.lr * ratio)

    def weights(self) -> dict[str, Tensor]:
        """The tables whole, on the first rank; a collective."""
        state = gathered_state(self.policy)
        return {name: state[key] for name, key in self.keys.items()} if state else {}

    def moments(self) -> dict[str, Tensor]:
        """What the tables' optimizer remembers, on the first rank; a collective."""
        return gathered_moments(self.policy)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None) -> None:
        """Take over whole weights and moments, whatever the number of ranks was then; a collective."""
        for name, parameter in self.dense.items():
            parameter.copy_(weights[name])
        load_tables(self.policy, {key: weights[name] for name, key in self.keys.items()})
        if moments is not None:
            load_moments(self.policy, moments)


def sharing(config: RecsysConfig, accelerator: Accelerator) -> Callable[[nn.Module], SharedTables] | None:
    """What shares a policy's tables out over the ranks; None for one rank, or tables in torch.

    ValueError for settings that do not go with it, and for `tables` where nothing is shared out.
    """
    ranks = accelerator.num_processes
    if ranks == 1 or config.model.tables != "torchrec":
        if config.tables is not None:
            raise ValueError(
                "tables is for model.tables=torchrec on several ranks, and here are "
                f"model.tables={config.model.tables} and {ranks} of them: leave it out (optim updates tables)"
            )
        return None
    check_fused(config.optim, accelerator)
    return partial(share_tables, tables=config.tables or TablesConfig(), device=accelerator.device)


def share_tables(policy: nn.Module, *, tables: TablesConfig, device: torch.device) -> SharedTables:
    """Share the policy's tables out over all ranks, in place; the rest is data-parallel (DDP)."""
    # Names as one process has them, in its order: checkpoints of both are alike.
    names = {name: tuple(p.shape) for name, p in trained(policy).items()}
    keys = {
        f"{prefix}.collection.embeddings.{table}.weight": f"{prefix}.embeddings.{table}.weight"
        for prefix, module in policy.named_modules()
        if isinstance(module, TorchrecTables)
        for table in module.sizes
    }
    dmp = shard(policy, device=device, optimizer=tables.optimizer, lr=tables.lr)
    dense = dense_parameters(dmp)
    return SharedTables(
        policy=dmp,
        dense={name: dense[name] for name in names if name not in keys},
        shapes={name: names[name] for name in keys},
        keys=keys,
        lr=tables.lr,
    )


def whole_run(made: RecsysRun, config: RecsysConfig, learner: Learner) -> RecsysRun:
    """The run with a whole policy of plain torch on the first rank, unchanged elsewhere; a collective.

    Where tables are not shared out, the run is as it was made.
    """
    if not isinstance(learner.fused, SharedTables):
        return made
    policy = _whole_policy(made, config, learner.fused)
    return made if policy is None else replace(made, policy=policy)


def whole_validation(
    made: RecsysRun, config: RecsysConfig, learner: Learner
) -> Callable[[nn.Module], Mapping[str, float]]:
    """`validation`; of shared-out tables the first rank has the metrics, and the others have none."""
    measure, fused = validation(made, config), learner.fused
    if not isinstance(fused, SharedTables):
        return measure

    def on_first_rank(_: nn.Module) -> Mapping[str, float]:
        policy = _whole_policy(made, config, fused)
        return {} if policy is None else measure(policy)

    return on_first_rank


def _whole_policy(made: RecsysRun, config: RecsysConfig, fused: SharedTables) -> SessionPolicy | None:
    """A policy with every table in torch, on the first rank's device; None on other ranks."""
    state = gathered_state(fused.policy)
    if not state:
        return None
    with torch.random.fork_rng(devices=[]):
        policy = make_policy(replace(config.model, tables="torch"), made.ids, made.events.sides)
    assert isinstance(policy, SessionPolicy)
    policy.load_state_dict(state)
    return policy.to(next(iter(fused.dense.values())).device)
