"""Tables of embeddings in torchrec's `EmbeddingCollection`, whose rows ranks share out among them.

Sharded tables are updated during the backward pass (fused), by an optimiser given to `shard`; everything else
is data-parallel and has an optimiser of its own, over `dense_parameters`. A gradient is the mean over ranks.

torchrec is imported when something here is used. T values looked up in all, D width.
"""

# torchrec is optional: without it these imports are not there to be checked.
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.tables import (
    INITIAL_STD,
    TableSpec,
    check_features,
    check_specs,
    one_row,
)

if TYPE_CHECKING:
    from torchrec import KeyedJaggedTensor
    from torchrec.distributed import DistributedModelParallel

FusedOptimizer = Literal["sgd", "adagrad", "rowwise_adagrad"]
Sharding = Literal["table_wise", "row_wise"]
# torchrec's 'data_parallel' pools on a CPU where it should not, and the fused optimiser does not reach it: a
# table that every rank should hold is an nn.Embedding. Splitting columns pays for very wide rows.
SHARDINGS: tuple[Sharding, ...] = ("table_wise", "row_wise")
ADAGRAD_EPS = 1e-10
_INNER = "collection."


def keyed(ids: Mapping[str, Jagged]) -> KeyedJaggedTensor:
    """torchrec's batch of several features; one with fewer rows than another gets empty rows at its end.

    torchrec wants as many rows of every feature. Values keep their order.
    """
    sparse = _torchrec().sparse.jagged_tensor
    num_rows = max(jagged.num_rows for jagged in ids.values())
    lengths = [nn.functional.pad(j.lengths, (0, num_rows - j.num_rows)) for j in ids.values()]
    values = torch.cat([jagged.values for jagged in ids.values()])
    return sparse.KeyedJaggedTensor(keys=list(ids), values=values, lengths=torch.cat(lengths))


def jagged_of(features: KeyedJaggedTensor) -> dict[str, Jagged]:
    """The features of a torchrec batch by name; waits for the device, for the longest row."""
    found = {}
    for name, part in features.to_dict().items():
        lengths = part.lengths()
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int64)
        found[name] = Jagged(part.values(), offsets, int(lengths.max()))
    return found


class TorchrecTables(nn.Module):
    """`TorchTables` in one `EmbeddingCollection`: the same call, numbers, first weights and state-dict keys.

    device='meta' makes no weights until `shard` does: each rank its own, from the seed and its rank. Every
    feature is looked up as one flat row, as values alone matter and features differ in their number of rows.
    A sharded lookup is a collective: every rank makes as many calls, if need be with no values.
    """

    def __init__(self, specs: Sequence[TableSpec], width: int, *, device: torch.device | str | None = None):
        super().__init__()
        check_specs(specs)
        modules = _torchrec().modules
        self.width, self.sizes = width, {s.name: s.num_rows for s in specs}
        configs = [
            modules.embedding_configs.EmbeddingConfig(
                name=s.name,
                embedding_dim=width,
                num_embeddings=s.num_rows,
                feature_names=[s.name],
                init_fn=partial(nn.init.normal_, std=INITIAL_STD),
            )
            for s in specs
        ]
        self.collection = modules.embedding_modules.EmbeddingCollection(
            tables=configs, device=None if device is None else torch.device(device)
        )
        self.register_state_dict_post_hook(_without_inner)
        self.register_load_state_dict_pre_hook(_with_inner)

    def forward(self, ids: Mapping[str, Jagged]) -> dict[str, Tensor]:
        """Feature name -> [T_f, D]; ValueError for an unknown feature, IndexError for an unknown row."""
        if not ids:
            return {}
        check_features(ids, self.sizes)
        for name, jagged in ids.items():
            _check_range(name, jagged.values, self.sizes[name])
        some = next(iter(ids.values())).values
        flat = {n: one_row(ids[n].values if n in ids else some[:0]) for n in self.sizes}
        found = self.collection(keyed(flat))
        # A sharded collection answers with a promise.
        found = found.wait() if hasattr(found, "wait") else found
        return {name: found[name].values() for name in ids}


def shard(
    module: nn.Module,
    *,
    device: torch.device,
    optimizer: FusedOptimizer | None,
    lr: float | None = None,
    eps: float | None = None,
    sharding: Sequence[Sharding] = SHARDINGS,
) -> DistributedModelParallel:
    """The module with its torchrec tables shared out over all ranks and the rest wrapped in DDP.

    optimizer: what updates the tables, with `lr` (`set_learning_rate` changes it); None leaves them as they
    are. Adam is not among them: fbgemm has none for the CPU. eps: of Adagrad, 1e-10 by default as torch's.
    sharding: what the planner may choose from. Do not wrap the result again.

    ValueError when torchrec is not installed, torch.distributed is not initialised, the module has no tables
    of torchrec, or a setting does not go with the optimizer.
    """
    # accelerate says cpu:0, to which DDP would move the parameters, away from fbgemm's own memory.
    device = torch.device("cpu") if device.type == "cpu" else device
    kind, settings = _fused(optimizer, lr, eps)
    if odd := [s for s in sharding if s not in SHARDINGS]:
        raise ValueError(f"sharding={', '.join(odd)}; valid: {', '.join(SHARDINGS)}")
    torchrec = _torchrec()
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "sharded tables need torch.distributed: start the script with torchrun or accelerate"
        )
    from torch.distributed.optim import _apply_optimizer_in_backward

    collection = torchrec.modules.embedding_modules.EmbeddingCollection
    tables: list[Any] = [m for m in module.modules() if isinstance(m, collection)]
    if not tables:
        raise ValueError(f"{type(module).__name__} has no TorchrecTables to shard")
    for table in tables:
        _apply_optimizer_in_backward(kind, table.parameters(), settings)
    names = [config.name for table in tables for config in table.embedding_configs()]
    parallel = torchrec.distributed
    sharders = [parallel.embedding.EmbeddingCollectionSharder()]
    # Tables from 'meta' are drawn here: ranks of one seed would draw the same rows.
    with _quiet(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(torch.initial_seed() + torch.distributed.get_rank())
        return parallel.model_parallel.DistributedModelParallel(
            module,
            device=device,
            plan=_plan(module, device, sharders, names, sharding),
            sharders=sharders,
            # As elsewhere in training: micro-batches may differ, and gradients may be kept to oneself.
            data_parallel_wrapper=parallel.model_parallel.DefaultDataParallelWrapper(static_graph=False),
        )


def dense_parameters(dmp: DistributedModelParallel) -> dict[str, nn.Parameter]:
    """The parameters that the fused optimiser does not update, by name: those of the optimiser beside it."""
    return dict(_torchrec().optim.optimizers.in_backward_optimizer_filter(dmp.named_parameters()))


def set_learning_rate(dmp: DistributedModelParallel, lr: float) -> None:
    """Use `lr` from the next backward pass on."""
    optimizer: Any = dmp.fused_optimizer
    for group in optimizer.param_groups:
        group["lr"] = lr
    # The update itself is part of backward; a step only hands the rate on.
    optimizer.step()


@torch.no_grad()
def gathered_state(dmp: DistributedModelParallel) -> dict[str, Tensor]:
    """The state dict as the unsharded module has it, whole, on the CPU; {} on other ranks than the first.

    A collective: every rank calls it. The result shares no memory with the module.
    """
    with _quiet():
        return _gathered(dmp, dmp.state_dict())


@torch.no_grad()
def gathered_moments(dmp: DistributedModelParallel) -> dict[str, Tensor]:
    """What the fused optimiser remembers, whole, on the CPU; {} on other ranks than the first, and for SGD.

    `<weight>.momentum1` is Adagrad's sum of squares. A collective: every rank calls it.
    """
    with _quiet():
        return _gathered(dmp, _moments(dmp))


@torch.no_grad()
def load_gathered(dmp: DistributedModelParallel, state: Mapping[str, Tensor]) -> None:
    """Load whole tensors, as `gathered_state` or an unsharded module has them; each rank keeps its part.

    Every rank gives all of them, for instance from one file. ValueError for names or shapes that do not fit.
    What the fused optimiser remembers is for `load_moments`.
    """
    with _quiet():
        ours = {name: tuple(value.size()) for name, value in dmp.state_dict().items()}
    _check_fit(ours, state)
    dmp.module.load_state_dict(dict(state))


@torch.no_grad()
def load_tables(dmp: DistributedModelParallel, tables: Mapping[str, Tensor]) -> None:
    """`load_gathered` of the tables alone."""
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    with _quiet():
        rest = {n: v for n, v in dmp.state_dict().items() if not isinstance(v, ShardedTensor)}
    load_gathered(dmp, rest | dict(tables))


@torch.no_grad()
def load_moments(dmp: DistributedModelParallel, moments: Mapping[str, Tensor]) -> None:
    """Load what `gathered_moments` gave, whatever the number of ranks was then. A collective."""
    with _quiet():
        ours = _moments(dmp)
        sizes = _of_all_ranks({name: tuple(value.size()) for name, value in ours.items()})
        _check_fit({name: size for of_rank in sizes for name, size in of_rank.items()}, moments)
        for name, value in ours.items():
            for part in value.local_shards():
                part.tensor.copy_(moments[name][_place(part.metadata)])


def _check_range(name: str, values: Tensor, num_rows: int) -> None:
    """Raise IndexError for a row that is not there, before ranks talk.

    fbgemm would tell the rank that holds the table alone, and others would wait. On a GPU, where looking at
    values means waiting, its check ends the process.
    """
    if values.device.type != "cpu" or not len(values):
        return
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= num_rows:
        raise IndexError(f"table {name} has rows 0 to {num_rows - 1}, not {low if low < 0 else high}")


def _plan(
    module: nn.Module,
    device: torch.device,
    sharders: list[Any],
    names: Sequence[str],
    sharding: Sequence[Sharding],
) -> Any:
    """Which rank holds what: the first rank decides. An id outside its table is an error, not row 0."""
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode

    parallel = _torchrec().distributed
    planning, num_ranks = parallel.planner, torch.distributed.get_world_size()
    constraint = planning.types.ParameterConstraints(
        sharding_types=list(sharding), bounds_check_mode=BoundsCheckMode.FATAL
    )
    planner = planning.EmbeddingShardingPlanner(
        topology=planning.Topology(
            world_size=num_ranks,
            local_world_size=parallel.comm.get_local_size(num_ranks),
            compute_device=device.type,
        ),
        constraints=dict.fromkeys(names, constraint),
    )
    return planner.collective_plan(module, sharders, torch.distributed.group.WORLD)


def _gathered(dmp: DistributedModelParallel, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Whole tensors on the first rank. Ranks may know of different sharded ones: each sends what it has."""
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    sharded = {n: v for n, v in values.items() if isinstance(v, ShardedTensor)}
    mine = [(name, part) for name, value in sharded.items() for part in value.local_shards()]
    listed = [
        (name, tuple(sharded[name].size()), _place(part.metadata), part.tensor.dtype) for name, part in mine
    ]
    rank, found = torch.distributed.get_rank(), {}
    for owner, theirs in enumerate(_of_all_ranks(listed)):
        for i, (name, size, place, dtype) in enumerate(theirs):
            if rank == 0:
                whole = found.setdefault(name, torch.empty(size, dtype=dtype))
                if owner == 0:
                    whole[place] = mine[i][1].tensor.cpu()
                else:
                    part = torch.empty(whole[place].shape, dtype=dtype, device=dmp.device)
                    torch.distributed.recv(part, src=owner)
                    whole[place] = part.cpu()
            elif rank == owner:
                torch.distributed.send(mine[i][1].tensor.contiguous(), dst=0)
    if rank:
        return {}
    plain = {n: v.detach().to("cpu", copy=True).contiguous() for n, v in values.items() if n not in sharded}
    return plain | found


def _place(metadata: Any) -> tuple[slice, ...]:
    """Where in the whole tensor a part is."""
    ranges = zip(metadata.shard_offsets, metadata.shard_sizes, strict=True)
    return tuple(slice(start, start + size) for start, size in ranges)


def _of_all_ranks(value: Any) -> list[Any]:
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def _moments(dmp: DistributedModelParallel) -> dict[str, Any]:
    """The fused optimiser's sharded tensors that this rank knows of, by the weight's name and their own."""
    states = dmp.fused_optimizer.state_dict()["state"]
    return {
        f"{weight.replace(_INNER + 'embeddings.', 'embeddings.')}.{name.rpartition('.')[2]}": value
        for weight, state in states.items()
        for name, value in state.items()
    }


def _check_fit(ours: Mapping[str, tuple[int, ...]], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless names and shapes are the same."""
    if odd := sorted(ours.keys() ^ state.keys()):
        where = "missing" if odd[0] in ours else "not in the module"
        raise ValueError(f"these tensors do not fit: {odd[0]} is {where}")
    for name, shape in ours.items():
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{name}: shape {tuple(state[name].shape)} does not fit {shape}")


def _fused(
    optimizer: FusedOptimizer | None, lr: float | None, eps: float | None
) -> tuple[Any, dict[str, float]]:
    """Class and settings of the fused optimiser."""
    if optimizer is None:
        if lr is not None or eps is not None:
            raise ValueError("optimizer=None takes no lr or eps: the tables are not updated")
        # Without an optimiser torchrec would take its own: SGD with a rate of 0.01.
        return torch.optim.SGD, {"lr": 0.0}
    if optimizer not in ("sgd", "adagrad", "rowwise_adagrad"):
        raise ValueError(f"optimizer={optimizer}; valid: sgd, adagrad, rowwise_adagrad, or None")
    if lr is None:
        raise ValueError(f"optimizer={optimizer} needs lr")
    if optimizer == "sgd":
        if eps is not None:
            raise ValueError("optimizer=sgd takes no eps")
        return torch.optim.SGD, {"lr": lr}
    settings = {"lr": lr, "eps": ADAGRAD_EPS if eps is None else eps}
    if optimizer == "adagrad":
        return torch.optim.Adagrad, settings
    return _torchrec().optim.rowwise_adagrad.RowWiseAdagrad, settings


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torchrec's warnings of its own use of what torch deprecates, and its planner's of us."""
    logger = logging.getLogger("torchrec.distributed.planner")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _torchrec() -> ModuleType:
    """torchrec with the parts used here; ValueError when it or fbgemm cannot be imported."""
    try:
        with warnings.catch_warnings():
            # fbgemm warns of every kernel that its CPU build lacks.
            warnings.simplefilter("ignore")
            import fbgemm_gpu  # noqa: F401
            import torchrec
            import torchrec.distributed.embedding
            import torchrec.distributed.model_parallel
            import torchrec.distributed.planner
            import torchrec.optim.optimizers
            import torchrec.optim.rowwise_adagrad
    except (ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"torchrec tables need torchrec and fbgemm: pip install triptych[recsys] ({reason})"
        ) from None
    return torchrec


def _without_inner(module: nn.Module, state: Any, prefix: str, *_: object) -> None:
    """collection.embeddings.<name>.weight -> embeddings.<name>.weight."""
    for name in [n for n in state if n.startswith(prefix + _INNER)]:
        state[prefix + name.removeprefix(prefix + _INNER)] = state.pop(name)


def _with_inner(module: nn.Module, state: Any, prefix: str, *_: object) -> None:
    for name in [n for n in state if n.startswith(prefix + "embeddings.")]:
        state[prefix + _INNER + name.removeprefix(prefix)] = state.pop(name)
