"""torchrec's tables against plain ones: in one process, and with rows shared out over two ranks."""

import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from table_ranks import SHARDINGS, alone, everything, make_policy, users
from tiny_sessions import NUM_ITEMS
from toy import run_ranks

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.sharded_tables import TorchrecTables, jagged_of, keyed, shard
from triptych.modalities.recsys.tables import TableSpec, TorchTables

SPECS = (TableSpec("item", 30), TableSpec("genre", 5))
ITEM = "tokens.item_table.tables.embeddings.item.weight"
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _needs_torchrec():
    try:
        TorchrecTables(SPECS, 4)
    except ValueError as error:
        pytest.skip(str(error))


def rows(*lists):
    return Jagged.of([torch.tensor(row, dtype=torch.int64) for row in lists])


def ragged():
    """Features with different numbers of rows, some of them empty; values that repeat."""
    return {
        "genre": rows([], [4], []),
        "item": rows([7, 7, 1], [], [29, 0], [7], []),
    }


def test_unsharded_collections_give_the_values_and_gradients_of_torch():
    torch.manual_seed(0)
    plain, ours = TorchTables(SPECS, 8), TorchrecTables(SPECS, 8)
    ours.load_state_dict(plain.state_dict())
    for ids in (ragged(), {"item": rows([3], [])}, {"item": rows([]), "genre": rows([1])}):
        expected, found = plain(ids), ours(ids)
        assert expected.keys() == found.keys() == ids.keys()
        generator = torch.Generator().manual_seed(1)
        for name, values in expected.items():
            assert torch.equal(found[name], values)
            weights = torch.randn(values.shape, generator=generator)
            (values * weights).sum().backward()
            (found[name] * weights).sum().backward()
    for name in ("item", "genre"):
        mine = ours.collection.embeddings[name].weight.grad
        assert torch.equal(mine, plain.embeddings[name].weight.grad)
        assert mine.abs().sum() > 0


def test_both_have_the_same_initial_weights_and_keys_and_load_each_other():
    states = []
    for make in (TorchTables, TorchrecTables):
        torch.manual_seed(3)
        states.append(make(SPECS, 8).state_dict())
    assert list(states[0]) == list(states[1]) == ["embeddings.item.weight", "embeddings.genre.weight"]
    assert all(torch.equal(states[0][n], states[1][n]) for n in states[0])
    torch.manual_seed(4)
    copied = copy.deepcopy(TorchrecTables(SPECS, 8))
    copied.load_state_dict(states[0])
    assert all(torch.equal(copied.state_dict()[n], states[0][n]) for n in states[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        copied.load_state_dict({"embeddings.item.weight": states[0]["embeddings.item.weight"]})


def test_features_come_back_from_torchrecs_batch():
    ids = ragged()
    found = jagged_of(keyed(ids))
    assert list(found) == ["genre", "item"]
    assert found["item"].values.tolist() == [7, 7, 1, 29, 0, 7]
    assert found["item"].offsets.tolist() == [0, 3, 3, 5, 6, 6]
    assert (found["item"].longest, found["genre"].longest) == (3, 1)
    # Three rows of genres have become five, as many as of items.
    assert found["genre"].values.tolist() == [4]
    assert found["genre"].offsets.tolist() == [0, 0, 1, 1, 1, 1]
    assert found["item"].offsets.dtype == torch.int64
    empty = jagged_of(keyed({"item": rows([], [])}))["item"]
    assert (empty.offsets.tolist(), empty.longest) == ([0, 0, 0], 0)


def test_what_cannot_be_sharded_is_refused_in_one_line(monkeypatch):
    tables = TorchrecTables(SPECS, 8)
    for settings, message in (
        ({"optimizer": "adam", "lr": 0.1}, "optimizer=adam; valid: sgd, adagrad, rowwise_adagrad"),
        ({"optimizer": "sgd"}, "optimizer=sgd needs lr"),
        ({"optimizer": "sgd", "lr": 0.1, "eps": 1e-8}, "optimizer=sgd takes no eps"),
        ({"optimizer": None, "lr": 0.1}, "optimizer=None takes no lr"),
        (
            {"optimizer": "sgd", "lr": 0.1, "sharding": ("data_parallel",)},
            "sharding=data_parallel; valid: table_wise",
        ),
        ({"optimizer": "sgd", "lr": 0.1}, "need torch.distributed: start the script with"),
    ):
        with pytest.raises(ValueError, match=message):
            shard(tables, device=CPU, **settings)
    with pytest.raises(ValueError, match="no table for the feature author; there are item, genre"):
        tables({"author": rows([1])})
    monkeypatch.setitem(sys.modules, "fbgemm_gpu", None)
    with pytest.raises(
        ValueError, match=r"need torchrec and fbgemm: pip install triptych\[recsys\]"
    ) as caught:
        TorchrecTables(SPECS, 8)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What one process trains, with what each of two ranks found, and the folder with their files."""
    folder = tmp_path_factory.mktemp("two")
    one = {}
    for name in ("sgd", "adagrad"):
        losses, policy, optimizer = alone(name)
        one[name] = losses, {n: t.clone() for n, t in policy.state_dict().items()}
    # The last one is Adagrad's.
    one["sums"] = optimizer.state[policy.tokens.item_table.tables.embeddings["item"].weight]["sum"]
    save_file(one["sgd"][1], folder / "one.safetensors")
    assert run_ranks(everything, 2, str(folder)) == [0, 0]
    ranks = [json.loads((folder / f"rank {rank}.json").read_text()) for rank in range(2)]
    return one, ranks, folder


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize(("name", "tolerance"), [("sgd", 1e-6), ("adagrad", 1e-5)])
def test_two_ranks_with_shared_out_tables_train_as_one_process_with_torchs(name, sharding, tolerance, two):
    one, ranks, folder = two
    losses, weights = one[name]
    halves = [rank["losses"][f"{name} {sharding}"] for rank in ranks]
    assert [sum(pair) / 2 for pair in zip(*halves, strict=True)] == pytest.approx(losses, abs=1e-5)
    assert losses[0] > losses[1] > losses[2]
    found = load_file(folder / f"{name} {sharding}.safetensors")
    assert found.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=tolerance, msg=f"{key}")
    # What differs is the order of sums over samples: the table's own rows differ by a rounding error.
    assert (found[ITEM] - weights[ITEM]).abs().max() <= 3e-7
    before = make_policy(TorchTables).state_dict()
    assert (found[ITEM] - before[ITEM]).abs().max() > 100 * tolerance


@pytest.mark.slow
def test_the_plan_is_the_one_asked_for(two):
    shards = two[1][0]["shards"]
    assert [part[1:] for part in shards["table_wise"]] == [[NUM_ITEMS, 16]]
    assert shards["row_wise"] == [[0, NUM_ITEMS // 2, 16], [1, NUM_ITEMS // 2, 16]]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_weights_gathered_from_two_ranks_give_one_process_the_same_log_probs(sharding, two):
    one, ranks, folder = two
    policy = make_policy(TorchTables, seed=9)
    policy.load_state_dict(load_file(folder / f"sgd {sharding}.safetensors"), strict=True)
    trained = make_policy(TorchTables)
    trained.load_state_dict(one["sgd"][1])
    batch = users([0, 1, 2, 3])
    with torch.no_grad():
        torch.testing.assert_close(policy(*batch), trained(*batch), rtol=0, atol=1e-5)
        expected = trained(*batch)
    for rank in ranks:
        # Loaded from one process's file, then gathered again to the same bits.
        torch.testing.assert_close(torch.tensor(rank[f"loaded {sharding}"]), expected, rtol=0, atol=1e-5)
        assert rank[f"again {sharding}"]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_adagrads_sums_are_those_of_one_process_and_a_run_resumed_from_files_ends_the_same(sharding, two):
    one, ranks, folder = two
    moments = load_file(folder / f"moments {sharding}.safetensors")
    assert set(moments) == {f"{ITEM}.momentum1", f"{ITEM.replace('.item.', '.user.')}.momentum1"}
    torch.testing.assert_close(moments[f"{ITEM}.momentum1"], one["sums"], rtol=1e-5, atol=1e-6)
    whole = load_file(folder / f"adagrad {sharding}.safetensors")
    after = ranks[0][f"resumed {sharding}"]
    torch.testing.assert_close(torch.tensor(after[ITEM]), whole[ITEM], rtol=0, atol=3e-7)


@pytest.mark.slow
def test_only_the_first_rank_holds_the_whole_and_no_table_is_among_the_dense(two):
    one, ranks, _ = two
    assert set(ranks[0]["others"]) == {len(one["sgd"][1])}
    assert set(ranks[1]["others"]) == {0}
    rest = [name for name, _ in make_policy(TorchTables).named_parameters() if "item_table" not in name]
    assert [rank["dense"] for rank in ranks] == [rest, rest]


@pytest.mark.slow
@pytest.mark.parametrize("sharding", SHARDINGS)
def test_an_id_outside_a_table_is_an_error_and_not_its_first_row(sharding, two):
    for rank in two[1]:
        assert rank[f"outside {sharding}"] == "table item has rows 0 to 19, not 20"


@pytest.mark.slow
def test_tables_without_an_optimiser_stay_and_weights_that_do_not_fit_are_named(two):
    for rank in two[1]:
        assert rank["frozen"]
        assert rank["absent"] == f"these tensors do not fit: {ITEM} is missing"
        assert rank["more"] == "these tensors do not fit: other is not in the module"
        assert rank["shape"] == f"{ITEM}: shape (19, 16) does not fit (20, 16)"


@pytest.mark.slow
def test_rows_made_by_ranks_with_one_seed_differ(two):
    table = torch.tensor(two[1][0]["meta"])
    assert table.shape == (NUM_ITEMS, 16)
    assert len(table.unique(dim=0)) == NUM_ITEMS
    assert table.std().item() == pytest.approx(0.02, rel=0.2)


@pytest.mark.slow
def test_tables_alone_take_a_row_wise_adagrad_step_though_one_rank_looks_nothing_up(two):
    before, after = two[1][0]["bare"]
    before, after = ({n: torch.tensor(v) for n, v in state.items()} for state in (before, after))
    assert list(after) == ["embeddings.item.weight", "embeddings.user.weight"]
    assert torch.equal(before["embeddings.user.weight"], after["embeddings.user.weight"])
    # Mean over two ranks: (1, 2, 3, 4) / 2 a value; item 17 has two. The mean square of (1, 2, 3, 4) is 7.5.
    direction = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = before["embeddings.item.weight"].clone()
    expected[17] -= 0.1 * direction / (7.5**0.5 + 0.5)
    expected[2] -= 0.1 * (direction / 2) / ((7.5 / 4) ** 0.5 + 0.5)
    torch.testing.assert_close(after["embeddings.item.weight"], expected, rtol=0, atol=1e-6)
