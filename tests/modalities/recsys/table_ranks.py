"""What each process of a group does for `test_sharded_tables`, in a module that they can import."""

import json
from pathlib import Path

import tiny_sessions as tiny
import torch
from safetensors.torch import load_file, save_file
from toy import cpu_accelerator

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.model import ModelConfig, SessionPolicy, Sessions
from triptych.modalities.recsys.sharded_tables import (
    TorchrecTables,
    dense_parameters,
    gathered_moments,
    gathered_state,
    load_gathered,
    load_moments,
    set_learning_rate,
    shard,
)
from triptych.modalities.recsys.tables import ItemTable, TableSpec, TorchTables, one_row

LR = {"sgd": 0.02, "adagrad": 0.02}
# Rates of three steps: the last one is different, as under a schedule.
FACTORS = (1.0, 1.0, 0.25)
SHARDINGS = ("table_wise", "row_wise")
CPU = torch.device("cpu")


# The second table is not looked up: its rows stay as they are.
SPECS = (TableSpec("item", tiny.NUM_ITEMS), TableSpec("user", 3))
CONFIG = ModelConfig(width=16, heads=2, dropout=0.0, kernel="reference")


def make_policy(tables, seed=0):
    """A session model with these tables for its items' own vectors, and opinions."""
    torch.manual_seed(seed)
    policy = SessionPolicy(CONFIG, tiny.codes(), tiny.SIZES, ItemTable(tables(SPECS, CONFIG.width)))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    return policy


def users(rows):
    """Some of four users with their histories and two sessions each; one has no history."""
    history, sessions = tiny.histories(5, 0, 3, 7), tiny.sessions(tiny.histories(5, 0, 3, 7), 2)
    kept = torch.isin(sessions.user, torch.tensor(rows))
    return Jagged.of([history.values[history.offsets[r] : history.offsets[r + 1]] for r in rows]), Sessions(
        items=sessions.items[kept],
        user=sessions.user[kept] - rows[0],
        seen=sessions.seen[kept],
        most=2,
    )


def loss(policy, rows):
    return -policy(*users(rows)).sum(-1).mean()


def dense_optimizer(name, parameters, lr):
    """What the fused optimiser of this name does, in torch."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr)
    return torch.optim.Adagrad(parameters, lr=lr, eps=1e-10)


def alone(name):
    """Losses and weights of three steps in one process, with torch's tables."""
    policy = make_policy(TorchTables)
    optimizer = dense_optimizer(name, policy.parameters(), LR[name])
    losses = []
    for factor in FACTORS:
        for group in optimizer.param_groups:
            group["lr"] = LR[name] * factor
        found = loss(policy, [0, 1, 2, 3])
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.item())
    return losses, policy, optimizer


def together(name, sharding, rank, *, resumed=None):
    """The same on two ranks with two users each; table weights are shared out.

    resumed: weights and the fused optimiser's moments after two of the steps, with which the third is made.
    """
    dmp = shard(make_policy(TorchrecTables), device=CPU, optimizer=name, sharding=(sharding,), lr=LR[name])
    optimizer = dense_optimizer(name, dense_parameters(dmp).values(), LR[name])
    losses, kept, factors = [], None, FACTORS
    if resumed is not None:
        load_gathered(dmp, resumed[0])
        load_moments(dmp, resumed[1])
        factors = FACTORS[2:]
    for step, factor in enumerate(factors):
        if step == 2:
            kept = gathered_state(dmp), gathered_moments(dmp)
        set_learning_rate(dmp, LR[name] * factor)
        for group in optimizer.param_groups:
            group["lr"] = LR[name] * factor
        found = loss(dmp, [2 * rank, 2 * rank + 1])
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(found.item())
    return losses, dmp, kept


def resumed(folder, sharding, kept, rank):
    """The item table's rows after a third step that was made from files, with the other sharding."""
    for i, state in enumerate(kept):
        if rank == 0:
            save_file(state, folder / f"kept {i} {sharding}.safetensors")
    torch.distributed.barrier()
    files = [load_file(folder / f"kept {i} {sharding}.safetensors") for i in range(2)]
    other = next(s for s in SHARDINGS if s != sharding)
    state = gathered_state(together("adagrad", other, rank, resumed=files)[1])
    return {name: value.tolist() for name, value in state.items() if "item_table" in name}


def shard_sizes(dmp):
    """Rows and columns of each rank's part of the item table."""
    plan = dmp.plan.get_plan_for_module("tokens.item_table.tables.collection")
    spec = plan["item"].sharding_spec
    return [[s.placement.rank(), *s.shard_sizes] for s in spec.shards]


def everything(folder):
    """All that two processes do, in one group: starting one costs more than the work."""
    folder = Path(folder)
    rank = cpu_accelerator().process_index
    torch.set_num_threads(1)
    found = {"losses": {}, "shards": {}, "dense": [], "others": []}
    for sharding in SHARDINGS:
        for name in ("sgd", "adagrad"):
            losses, dmp, kept = together(name, sharding, rank)
            state = gathered_state(dmp)
            found["losses"][f"{name} {sharding}"] = losses
            found["shards"][sharding] = shard_sizes(dmp)
            found["others"].append(len(state))
            if rank == 0:
                save_file(state, folder / f"{name} {sharding}.safetensors")
        # Adagrad's, which came last.
        found[f"resumed {sharding}"] = resumed(folder, sharding, kept, rank)
        gathered = gathered_moments(dmp)
        if rank == 0:
            save_file(gathered, folder / f"moments {sharding}.safetensors")
        found["dense"] = [*dense_parameters(dmp)]
        load_gathered(dmp, load_file(folder / "one.safetensors"))
        with torch.no_grad():
            found[f"loaded {sharding}"] = dmp(*users([0, 1, 2, 3])).tolist()
        found[f"outside {sharding}"] = outside(dmp)
        found[f"again {sharding}"] = same(gathered_state(dmp), folder / "one.safetensors", rank)
    found |= frozen_and_refused(folder, rank)
    found["meta"] = from_meta(rank)
    found["bare"] = bare(rank)
    (folder / f"rank {rank}.json").write_text(json.dumps(found))


def outside(dmp):
    """What comes of an item that the table has no row for."""
    table = dmp.module.tokens.item_table
    try:
        with torch.no_grad():
            table(torch.tensor([3, tiny.NUM_ITEMS]))
    except IndexError as error:
        return str(error)
    return "accepted"


def same(state, path, rank):
    saved = load_file(path)
    return rank != 0 or (state.keys() == saved.keys() and all(torch.equal(state[n], saved[n]) for n in saved))


def frozen_and_refused(folder, rank):
    """Tables without an optimiser, and weights that do not fit."""
    dmp = shard(make_policy(TorchrecTables), device=CPU, optimizer=None)
    before = gathered_state(dmp)
    loss(dmp, [rank]).backward()
    after = gathered_state(dmp)
    found = {"frozen": all(torch.equal(before[n], after[n]) for n in before if "item_table" in n)}
    state = load_file(folder / "one.safetensors")
    name = "tokens.item_table.tables.embeddings.item.weight"
    for case, changed in {
        "absent": {n: t for n, t in state.items() if n != name},
        "more": state | {"other": torch.zeros(1)},
        "shape": state | {name: state[name][1:]},
    }.items():
        try:
            load_gathered(dmp, changed)
            found[case] = "accepted"
        except ValueError as error:
            found[case] = str(error)
    return found


def from_meta(rank):
    """Rows of a table that `shard` makes, which both ranks draw with the same seed."""
    policy = make_policy(lambda specs, width: TorchrecTables(specs, width, device="meta"))
    torch.manual_seed(7)
    dmp = shard(policy, device=CPU, optimizer="sgd", lr=0.1, sharding=("row_wise",))
    state = gathered_state(dmp)
    return state["tokens.item_table.tables.embeddings.item.weight"].tolist() if rank == 0 else None


def bare(rank):
    """Weights before and after a row-wise Adagrad step of tables alone; the second rank looks nothing up."""
    torch.manual_seed(0)
    dmp = shard(
        TorchrecTables(SPECS, 4),
        device=CPU,
        optimizer="rowwise_adagrad",
        lr=0.1,
        eps=0.5,
        sharding=("row_wise",),
    )
    before = gathered_state(dmp)
    items = torch.tensor([17, 2, 17] if rank == 0 else [], dtype=torch.int64)
    found = dmp({"item": one_row(items)})["item"]
    (found * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    after = gathered_state(dmp)
    return [{name: value.tolist() for name, value in state.items()} for state in (before, after)]
