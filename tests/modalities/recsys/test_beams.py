import math

import pytest
import torch
from decoding_cases import (
    TableDecoding,
    assert_same,
    blocked,
    exhaustive,
    found_in,
    legal_sessions,
    narrow,
    prefixes_of,
    random_codes,
    trie_in,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from triptych.modalities.recsys.beams import beam_search, ranked_items
from triptych.modalities.recsys.trie import Trie

SIZES = (3, 4, 3)
# 20 items, 16 of them with an id of their own.
CODES = random_codes(20, SIZES, seed=3)
FORMS = ("padded", "ragged")
NORMALISE = ("codebook", "children")


def search(users, codes=CODES, sizes=SIZES, form="padded", forbidden=None, **options):
    within = None if forbidden is None else blocked(forbidden)
    return beam_search(TableDecoding(users, sizes), trie_in(form, codes, sizes), within=within, **options)


@pytest.mark.parametrize("normalise", NORMALISE)
@pytest.mark.parametrize("form", FORMS)
def test_a_search_as_wide_as_the_catalogue_is_the_exhaustive_ranking(form, normalise):
    beams = search([0, 1, 2], form=form, width=20, normalise=normalise)
    sessions = legal_sessions(CODES, num_items=1)
    for user in range(3):
        assert_same(found_in(beams, user), exhaustive(user, SIZES, sessions, normalise))
    ids = len(sessions)
    assert 1 < ids < 20
    assert (beams.items_UWm[:, ids:] == -1).all()
    assert (beams.codes_UWmL[:, ids:] == -1).all()
    assert (beams.leaves_UWm[:, ids:] == -1).all()
    assert beams.logp_UW[:, ids:].isneginf().all()
    assert beams.logp_UW.dtype == torch.float32


@pytest.mark.parametrize("no_repeats", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_sessions_of_two_of_twenty_items_are_those_of_brute_force_over_pairs(form, no_repeats):
    beams = search([5, 6], form=form, width=400, num_items=2, no_repeats=no_repeats)
    sessions = legal_sessions(CODES, num_items=2, no_repeats=no_repeats)
    for row, user in enumerate([5, 6]):
        assert_same(found_in(beams, row), exhaustive(user, SIZES, sessions))
    repeated = any(len(set(items)) < 2 for items, _ in found_in(beams, 0))
    assert repeated is not no_repeats


def test_twenty_items_of_their_own_ids_make_380_ordered_pairs_or_400_with_repeats():
    codes = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    pairs = {}
    for no_repeats in (True, False):
        beams = search([0], codes, (4, 5), width=500, num_items=2, no_repeats=no_repeats)
        pairs[no_repeats] = {tuple(items) for items, _ in found_in(beams, 0)}
    assert pairs[True] == {(a, b) for a in range(20) for b in range(20) if a != b}
    assert len(pairs[False]) == 400


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_narrow_beams_are_those_of_a_search_written_out_and_a_batch_is_its_users(data):
    sizes = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    codes = random_codes(data.draw(st.integers(1, 10)), sizes, data.draw(st.integers(0, 999)))
    users, width = (
        data.draw(st.lists(st.integers(0, 99), min_size=1, max_size=3)),
        data.draw(st.integers(1, 6)),
    )
    items = st.lists(st.integers(0, len(codes) - 1), max_size=12)
    forbidden = data.draw(st.none() | st.lists(items, min_size=len(users), max_size=len(users)))
    options = {
        "num_items": data.draw(st.integers(1, 3)),
        "no_repeats": data.draw(st.booleans()),
        "normalise": data.draw(st.sampled_from(NORMALISE)),
        "form": data.draw(st.sampled_from(FORMS)),
        "width": width,
    }
    if options["form"] == "padded" and any(x.table is None for x in Trie.of(codes, sizes).levels):
        return
    beams = search(users, codes, sizes, forbidden=forbidden, **options)
    for row, user in enumerate(users):
        unwanted = forbidden[row] if forbidden else ()
        sessions = legal_sessions(
            codes, num_items=options["num_items"], no_repeats=options["no_repeats"], forbidden=unwanted
        )
        wanted = narrow(user, sizes, sessions, width, options["normalise"]) if sessions else []
        assert_same(found_in(beams, row), wanted)
        alone = search([user], codes, sizes, forbidden=[unwanted] if forbidden else None, **options)
        assert alone.items_UWm[0].equal(beams.items_UWm[row])
        assert alone.logp_UW[0].equal(beams.logp_UW[row])
    assert (beams.logp_UW[:, :-1] >= beams.logp_UW[:, 1:]).all()


def test_what_comes_back_is_items_codes_and_leaves_of_one_another():
    trie = Trie.of(CODES, SIZES)
    beams = search([0, 1], width=7, num_items=3)
    assert beams.items_UWm.shape == (2, 7, 3)
    assert CODES[beams.items_UWm].equal(beams.codes_UWmL)
    assert trie.find(beams.codes_UWmL).equal(beams.leaves_UWm)
    assert trie.leaf_of_item[beams.items_UWm].equal(beams.leaves_UWm)


@pytest.mark.parametrize("form", FORMS)
def test_probabilities_of_all_sessions_sum_to_one_only_when_renormalised(form):
    options = {"form": form, "width": 400, "num_items": 2, "forbidden": [[0, 1, 2], []]}
    over_codebook = search([0, 1], **options).logp_UW.exp().sum(1)
    over_legal = search([0, 1], normalise="children", **options).logp_UW.exp().sum(1)
    assert (over_codebook < 0.95).all()
    assert over_legal.tolist() == pytest.approx([1.0, 1.0], abs=1e-5)


def test_an_id_of_two_items_comes_twice_in_a_session_and_gives_them_in_order():
    codes = torch.tensor([[1, 0], [0, 0], [1, 0]])
    beams = search([0], codes, (2, 1), width=30, num_items=3)
    sessions = {tuple(items) for items, _ in found_in(beams, 0)}
    assert sessions == {(0, 2, 1), (0, 1, 2), (1, 0, 2)}
    free = search([0], codes, (2, 1), width=30, num_items=3, no_repeats=False)
    assert {item for items, _ in found_in(free, 0) for item in items} == {0, 1}
    assert len(found_in(free, 0)) == 8


def test_the_first_item_of_an_id_that_the_user_may_get_is_given():
    codes = torch.tensor([[0], [0], [0], [1]])
    beams = search([0], codes, (2,), width=9, num_items=2, forbidden=[[0, 3, 0]])
    assert [items for items, _ in found_in(beams, 0)] == [[1, 2]]


def test_a_user_who_may_get_nothing_gets_nothing_and_the_others_are_as_before():
    beams = search([4, 5], width=3, forbidden=[list(range(20)), []])
    assert (beams.items_UWm[0] == -1).all()
    assert beams.logp_UW[0].isneginf().all()
    assert_same(found_in(beams, 1), found_in(search([5], width=3), 0))
    long = search([4, 5], form="ragged", width=3, num_items=2, forbidden=[list(range(19)), list(range(18))])
    assert (long.items_UWm[0] == -1).all()
    assert sorted(tuple(items) for items, _ in found_in(long, 1)) == [(18, 19), (19, 18)]


@pytest.mark.parametrize("form", FORMS)
def test_one_beam_never_enters_a_prefix_whose_items_are_all_spent(form):
    """Every prefix of one item: after it the likeliest prefix has nothing left."""
    codes = torch.tensor([[0, 0], [1, 0], [2, 1], [2, 2]])
    for user in range(20):
        beams = search([user], codes, (3, 3), form=form, width=1, num_items=4)
        assert sorted(beams.items_UWm[0, 0].tolist()) == [0, 1, 2, 3]
        assert beams.logp_UW[0, 0] > -math.inf


def test_widths_keep_more_rows_early():
    decoding = TableDecoding([0], SIZES)
    beams = beam_search(decoding, Trie.of(CODES, SIZES), width=2, widths=(3, 12, 2), num_items=2)
    # The rows of a level may be filled up with some that are none.
    assert decoding.widths[:4] == [1, 3, 12, 2]
    single = search([0], width=2, widths=(3, 12, 2))
    assert_same(found_in(single, 0), exhaustive(0, SIZES, legal_sessions(CODES, num_items=1))[:2])
    assert beams.items_UWm.shape == (1, 2, 2)


def test_narrow_beams_can_miss_what_wide_ones_find():
    """Else the tests of narrow beams would hold for an exhaustive search as well."""
    sessions = legal_sessions(CODES, num_items=2)
    assert any(
        narrow(user, SIZES, sessions, 1)[0][0] != exhaustive(user, SIZES, sessions)[0][0]
        for user in range(10)
    )
    assert len(prefixes_of(sessions)[()]) == 3


def test_a_ranking_lists_all_items_of_an_id_before_the_next_id():
    codes = torch.tensor([[1], [0], [1], [2], [0]])
    beams = search([0], codes, (3,), width=3)
    order = beams.codes_UWmL[0, :, 0, 0].tolist()
    items = {0: [1, 4], 1: [0, 2], 2: [3]}
    wanted = [item for code in order for item in items[code]]
    assert ranked_items(beams, Trie.of(codes, (3,)), k=7)[0].tolist() == [*wanted, -1, -1]
    assert ranked_items(beams, Trie.of(codes, (3,)), k=2)[0].tolist() == wanted[:2]


def test_a_ranking_leaves_out_what_a_user_must_not_get():
    codes = torch.tensor([[1], [0], [1], [2], [0]])
    trie, forbidden = Trie.of(codes, (3,)), [[1, 3], [0, 1, 2, 3, 4], []]
    beams = search([0, 1, 2], codes, (3,), width=3, forbidden=forbidden)
    ranking = ranked_items(beams, trie, k=4, within=blocked(forbidden))
    assert sorted(ranking[0].tolist()) == [-1, 0, 2, 4]
    assert ranking[1].tolist() == [-1] * 4
    assert -1 not in ranking[2].tolist()


def test_a_ranking_of_sessions_of_two_is_refused():
    with pytest.raises(ValueError, match="sessions of 2 items; a ranking needs 1"):
        ranked_items(search([0], width=2, num_items=2), Trie.of(CODES, SIZES), k=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_items": 0}, "num_items is 0; valid: 1 or more"),
        ({"normalise": "legal"}, "normalise is 'legal'; valid: 'codebook', 'children'"),
        ({"widths": (4, 4)}, r"widths=\[4, 4\] with width=4; valid: 3 positive widths, the last 4"),
        ({"widths": (4, 4, 5)}, "the last 4"),
        ({"widths": (0, 4, 4)}, "3 positive widths"),
    ],
)
def test_an_invalid_option_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        search([0], width=4, **options)


def test_a_decoding_of_other_codebooks_is_refused():
    with pytest.raises(ValueError, match="gives 5 codes for level 1; the trie has 4"):
        beam_search(TableDecoding([0], (3, 5, 3)), Trie.of(CODES, SIZES), width=2)
