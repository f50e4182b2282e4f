import itertools
import math

import pytest
import torch
from decoding_cases import blocked, ids_of, random_codes, trie_in
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.modalities.recsys.trie import Stock, Trie

SIZES = (2, 3)
# Items 0 and 2 share the id (1, 0).
CODES = torch.tensor([[1, 0], [0, 2], [1, 0], [1, 1]])
LOGP = torch.tensor([[[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]]).log()
FORMS = ("padded", "ragged")

tables = st.builds(
    lambda num, sizes, seed: (random_codes(num, sizes, seed), tuple(sizes)),
    st.integers(1, 40),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.integers(0, 10_000),
)


def children_of(form, alive=(True, True)):
    """The second level's candidates of node 0 (code 0) and node 1 (code 1) of the first."""
    trie = trie_in(form, CODES, SIZES)
    return trie.children(1, torch.tensor([[0, 1]]), LOGP, torch.tensor([alive]))


def real(children, x_UM):
    """The values of real candidates, in order of row and code."""
    return x_UM[children.logp > -math.inf].tolist()


def test_four_items_of_three_ids_make_this_trie():
    trie = Trie.of(CODES, SIZES)
    top, leaf = trie.levels
    assert top.codes.tolist() == [0, 1]
    assert top.num_items.tolist() == [1, 3]
    assert leaf.codes.tolist() == [2, 0, 1]
    assert leaf.parents.tolist() == [0, 1, 1]
    assert leaf.first.tolist() == [0, 1, 3]
    assert trie.paths.tolist() == [[0, 0], [1, 1], [1, 2]]
    assert trie.leaf_of_item.tolist() == [1, 0, 1, 2]
    assert trie.item_first.tolist() == [0, 1, 3, 4]
    assert trie.items.tolist() == [1, 0, 2, 3]
    assert (trie.num_leaves, trie.num_items, trie.sizes) == (3, 4, (2, 3))


@settings(max_examples=40, deadline=None)
@given(tables)
def test_leaves_are_the_distinct_ids_in_order_and_their_items_a_partition(table):
    codes_IL, sizes = table
    trie, ids = Trie.of(codes_IL, sizes), ids_of(codes_IL)
    leaves = torch.arange(trie.num_leaves)
    assert [tuple(row) for row in trie.codes(leaves).tolist()] == sorted(ids)
    offsets = trie.item_first.tolist()
    items = [trie.items[a:b].tolist() for a, b in itertools.pairwise(offsets)]
    assert items == [ids[key] for key in sorted(ids)]
    assert trie.codes(trie.leaf_of_item).equal(codes_IL)
    assert trie.find(codes_IL).equal(trie.leaf_of_item)


@settings(max_examples=40, deadline=None)
@given(tables)
def test_legal_codes_of_every_node_are_those_of_a_dictionary_of_prefixes(table):
    codes_IL, sizes = table
    trie = Trie.of(codes_IL, sizes)
    rows = {tuple(row) for row in codes_IL.tolist()}
    prefixes = [()]
    for level, size in enumerate(sizes):
        mask = trie.mask(level, torch.arange(len(prefixes)))
        following = [{row[level] for row in rows if row[:level] == prefix} for prefix in prefixes]
        assert mask.tolist() == [[code in codes for code in range(size)] for codes in following]
        prefixes = sorted({row[: level + 1] for row in rows})
    assert trie.mask(0, torch.zeros(2, 3, dtype=torch.int64)).shape == (2, 3, sizes[0])


def test_an_id_of_no_item_is_not_found():
    wanted = torch.tensor([[[1, 0], [1, 2]], [[0, 0], [0, 2]], [[-1, 3], [1, -1]], [[2, 0], [0, 3]]])
    assert Trie.of(CODES, SIZES).find(wanted).tolist() == [[1, -1], [-1, 0], [-1, -1], [-1, -1]]


def test_the_form_of_gathering_follows_the_skew_of_the_fan_outs():
    wide = torch.cat(
        [torch.tensor([[0, k] for k in range(90)]), torch.tensor([[k, 0] for k in range(1, 90)])]
    )
    assert Trie.of(wide, (90, 90)).levels[1].table is None
    even = torch.cartesian_prod(torch.arange(3), torch.arange(40))
    assert Trie.of(even, (3, 50)).levels[1].table is not None
    assert [level.complete for level in Trie.of(even, (3, 50)).levels] == [True, False]


@pytest.mark.parametrize("form", FORMS)
def test_candidates_take_the_log_probs_of_the_children_alone(form):
    children = children_of(form)
    assert children.logp.exp()[children.logp > -math.inf].tolist() == pytest.approx([0.3, 0.4, 0.5])
    assert real(children, children.nodes()) == [0, 1, 2]
    assert real(children, children.spread(torch.tensor([[7, 8]]))) == [7, 8, 8]
    assert real(children, children.after(torch.tensor([[1.0, 2.0]])).exp()) == pytest.approx(
        [0.3 * math.e, 0.4 * math.e**2, 0.5 * math.e**2]
    )
    assert children.highest(children.logp).exp().tolist()[0] == pytest.approx([0.3, 0.5])
    assert children.log_mass().exp().tolist()[0] == pytest.approx([0.3, 0.9])


@pytest.mark.parametrize("form", FORMS)
def test_a_dead_row_has_no_candidates(form):
    children = children_of(form, alive=(False, True))
    assert real(children, children.nodes()) == [1, 2]
    assert children.log_mass().exp().tolist()[0] == pytest.approx([1.0, 0.9])
    none = children_of(form, alive=(False, False))
    assert none.logp.isneginf().all()
    assert none.logp.numel() > 0


@pytest.mark.parametrize("form", FORMS)
def test_nodes_taken_away_are_those_of_that_row(form):
    children = children_of(form)
    nodes = torch.tensor([[[1, 0, -1], [1, 0, 2]]])
    # Row 0 owns node 0 alone, row 1 nodes 1 and 2: only what a row owns counts.
    assert real(children, children.tally(nodes)) == [1, 1, 1]
    gone = torch.tensor([[[True, False, True], [True, True, False]]])
    assert real(children.without(nodes, gone), children.nodes()) == [0, 2]
    twice = torch.tensor([[[0, 0], [2, 2]]])
    assert real(children, children.tally(twice)) == [2, 0, 2]


@settings(max_examples=30, deadline=None)
@given(tables, st.lists(st.lists(st.integers(0, 39), max_size=60), min_size=1, max_size=3))
def test_stock_counts_what_each_user_may_get_below_every_node(table, rows):
    codes_IL, sizes = table
    rows = [[item for item in row if item < len(codes_IL)] for row in rows]
    trie = Trie.of(codes_IL, sizes)
    stock = Stock.of(trie, blocked(rows), len(rows))
    for level in range(len(sizes)):
        nodes = torch.arange(len(trie.levels[level].codes))
        below = [set((trie.paths[trie.leaf_of_item, level] == n).nonzero().flatten().tolist()) for n in nodes]
        wanted = [[len(items - set(row)) for items in below] for row in rows]
        assert stock.left(level, nodes.expand(len(rows), -1)).tolist() == wanted
    for user, row in enumerate(rows):
        for leaf, items in enumerate(ids_of(codes_IL)[key] for key in sorted(ids_of(codes_IL))):
            allowed = [item for item in items if item not in row]
            places = torch.zeros(len(rows), len(allowed), dtype=torch.int64)
            places[user] = torch.arange(len(allowed))
            assert stock.items(torch.full_like(places, leaf), places)[user].tolist() == allowed


def test_stock_without_forbidden_items_holds_every_item():
    trie = Trie.of(CODES, SIZES)
    stock = Stock.of(trie, None, 5)
    assert stock.left(1, torch.tensor([[0, 1, 2]])).tolist() == [[1, 2, 1]]
    assert stock.items(torch.tensor([[1, 1, 0]]), torch.tensor([[0, 1, 0]])).tolist() == [[0, 2, 1]]


def test_to_moves_every_tensor():
    trie = Trie.of(CODES, SIZES).to("meta")
    own = [trie.paths, trie.item_first, trie.items, trie.leaf_of_item]
    for level in trie.levels:
        own += [level.codes, level.parents, level.first, level.num_items, level.table]
    assert all(tensor.is_meta for tensor in own)


@pytest.mark.parametrize(
    ("codes", "sizes", "message"),
    [
        (CODES, (2, 3, 4), r"codes have shape \(4, 2\); valid: \[items, 3\]"),
        (CODES[:0], SIZES, r"codes have shape \(0, 2\)"),
        (CODES, (2, 2), "codes of level 1 go from 0 to 2; valid: 0 to 1"),
        (-CODES, SIZES, "codes of level 0 go from -1 to 0; valid: 0 to 1"),
    ],
)
def test_codes_that_do_not_fit_are_named(codes, sizes, message):
    with pytest.raises(ValueError, match=message):
        Trie.of(codes, sizes)


@pytest.mark.parametrize(
    ("rows", "users", "message"),
    [
        ([[0], [1]], 3, "3 offsets over 2 items do not fit 3 users"),
        ([[4]], 1, "forbidden items go from 4 to 4; valid: 0 to 3"),
        ([[-1, 2]], 1, "forbidden items go from -1 to 2"),
    ],
)
def test_forbidden_items_that_do_not_fit_are_named(rows, users, message):
    with pytest.raises(ValueError, match=message):
        Stock.of(Trie.of(CODES, SIZES), blocked(rows), users)
