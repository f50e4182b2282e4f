import itertools
import math

import pytest
import torch
from decoding_cases import (
    TableDecoding,
    assert_same,
    blocked,
    conditional,
    exhaustive,
    found_in,
    legal_sessions,
    random_codes,
    trie_in,
)

from triptych.modalities.recsys.beams import beam_search
from triptych.modalities.recsys.stochastic import diverse, gumbel, user_seeds
from triptych.modalities.recsys.trie import Trie

SIZES = (3, 4, 3)
CODES = random_codes(20, SIZES, seed=3)
# Five ids; node 0 of the first level has three, so that one code there weighs more than its children.
FEW, FEW_SIZES = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [2, 1]]), (4, 3)
FORMS = ("padded", "ragged")


def draw(users, seeds, codes=CODES, sizes=SIZES, form="padded", forbidden=None, **options):
    within = None if forbidden is None else blocked(forbidden)
    trie, seeds = trie_in(form, codes, sizes), torch.as_tensor(seeds)
    return gumbel(TableDecoding(users, sizes), trie, seeds=seeds, within=within, **options)


def many(width, num=4000, **options):
    """Draws of one user under many seeds, over the five ids; and the items' probabilities."""
    seeds = user_seeds(num, torch.Generator().manual_seed(0))
    draws = draw([7] * num, seeds, FEW, FEW_SIZES, width=width, **options)
    ranking = exhaustive(7, FEW_SIZES, legal_sessions(FEW, num_items=1), "children")
    p_I = torch.zeros(5, dtype=torch.float64)
    for (item,), logp in ranking:
        p_I[item] = math.exp(logp)
    return draws, p_I


def assert_share(hits_N, p):
    """A frequency within 4 standard errors of p."""
    assert abs(hits_N.double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / len(hits_N)) + 1e-9


@pytest.mark.parametrize("form", FORMS)
def test_draws_as_wide_as_all_sessions_are_each_of_them_once_with_both_log_probs(form):
    forbidden = [[0, 1, 2], list(range(10))]
    draws = draw([3, 4], [11, 12], form=form, width=400, num_items=2, forbidden=forbidden)
    for row, user in enumerate([3, 4]):
        sessions = legal_sessions(CODES, num_items=2, forbidden=forbidden[row])
        for normalise, logp in (("codebook", draws.beams.logp_UW), ("children", draws.legal_UW)):
            pairs = zip(draws.beams.items_UWm[row].tolist(), logp[row].tolist(), strict=True)
            found = sorted((pair for pair in pairs if pair[1] > -math.inf), key=lambda pair: -pair[1])
            assert_same(found, exhaustive(user, SIZES, sessions, normalise))
        assert draws.keys_UW[row].isfinite().sum() == len(sessions)
        assert draws.keys_UW[row, len(sessions) :].isneginf().all()
    assert draws.keys_UW.dtype == torch.float64
    assert (draws.keys_UW[:, :-1] >= draws.keys_UW[:, 1:]).all()


@pytest.mark.parametrize("form", FORMS)
def test_inclusion_probabilities_are_those_of_drawing_without_replacement(form):
    draws, p_I = many(width=2, form=form)
    items_NW = draws.beams.items_UWm.squeeze(-1)
    assert (items_NW[:, 0] != items_NW[:, 1]).all()
    for item in range(5):
        assert_share(items_NW[:, 0] == item, p_I[item].item())
    for first, second in itertools.permutations(range(5), 2):
        p = (p_I[first] * p_I[second] / (1 - p_I[first])).item()
        assert_share((items_NW[:, 0] == first) & (items_NW[:, 1] == second), p)


def test_keys_are_log_probs_with_independent_standard_gumbel_noise():
    draws, _ = many(width=5)
    noise_NW = draws.keys_UW - draws.legal_UW
    order = draws.beams.items_UWm.squeeze(-1).argsort(1)
    noise_NI = noise_NW.gather(1, order)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    for item, q in itertools.product(range(5), quantiles.tolist()):
        assert_share(noise_NI[:, item] < -math.log(-math.log(q)), q)
    others = torch.corrcoef(noise_NI.T) - torch.eye(5)
    assert others.abs().max() < 4 / math.sqrt(len(noise_NI))


def test_weights_from_the_threshold_give_an_unbiased_mean():
    """E sum over all but the last draw of p / q f = sum of p f,  q = 1 - exp(-exp(log p - last key))."""
    draws, p_I = many(width=3)
    values_I = torch.tensor([1.0, -2.0, 5.0, 0.5, 10.0], dtype=torch.float64)
    items_NW, logp_NW = draws.beams.items_UWm.squeeze(-1)[:, :2], draws.legal_UW[:, :2].double()
    q_NW = -torch.expm1(-(logp_NW - draws.keys_UW[:, 2:]).exp())
    estimate_N = (logp_NW.exp() / q_NW * values_I[items_NW]).sum(1)
    error = estimate_N.std().item() / math.sqrt(len(estimate_N))
    assert abs(estimate_N.mean().item() - (p_I @ values_I).item()) < 4 * error
    assert error < 0.1


def test_a_user_draws_the_same_alone_in_a_batch_and_in_either_form():
    options = {"width": 6, "num_items": 2}
    batch = draw([0, 1, 2], [5, 6, 7], forbidden=[[0], [], [3, 4]], **options)
    alone = draw([1], [6], forbidden=[[]], form="ragged", **options)
    assert alone.beams.items_UWm[0].equal(batch.beams.items_UWm[1])
    torch.testing.assert_close(alone.keys_UW[0], batch.keys_UW[1])
    torch.testing.assert_close(alone.beams.logp_UW[0], batch.beams.logp_UW[1])


def test_draws_of_a_narrow_search_come_first_in_a_wider_one():
    narrow, wide = (draw([0, 1], [5, 6], width=width, num_items=2) for width in (4, 40))
    assert narrow.beams.items_UWm.equal(wide.beams.items_UWm[:, :4])
    torch.testing.assert_close(narrow.keys_UW, wide.keys_UW[:, :4])


def test_seeds_decide_the_draws():
    same = draw([0, 0, 0], [5, 5, 6], width=8, num_items=2).beams.items_UWm
    assert same[0].equal(same[1])
    assert not same[0].equal(same[2])
    seeds = [user_seeds(6, torch.Generator().manual_seed(s)) for s in (0, 0, 1)]
    assert seeds[0].equal(seeds[1])
    assert len({*seeds[0].tolist(), *seeds[2].tolist()}) == 12


def test_sessions_drawn_repeat_no_item_and_respect_the_catalogue():
    draws = draw(range(6), range(6), width=12, num_items=3, forbidden=[[0, 1]] * 6)
    items = draws.beams.items_UWm
    assert (items.sort(-1).values.diff(dim=-1) > 0).all()
    assert (items > 1).all()
    assert CODES[items].equal(draws.beams.codes_UWmL)
    assert all(len({tuple(s) for s in rows}) == 12 for rows in items.tolist())


def test_a_user_who_may_get_nothing_draws_nothing():
    draws = draw([0, 1], [0, 1], width=3, num_items=2, forbidden=[list(range(20)), []])
    assert (draws.beams.items_UWm[0] == -1).all()
    assert draws.keys_UW[0].isneginf().all()
    assert draws.legal_UW[0].isneginf().all()
    assert draws.keys_UW[1].isfinite().all()


def test_seeds_for_other_users_are_refused():
    with pytest.raises(ValueError, match=r"seeds have shape \(3,\); valid: \[2\], one a user"):
        draw([0, 1], [1, 2, 3], width=2)


def groups_of(users, codes=CODES, sizes=SIZES, form="padded", forbidden=None, **options):
    within = None if forbidden is None else blocked(forbidden)
    return diverse(TableDecoding(users, sizes), trie_in(form, codes, sizes), within=within, **options)


@pytest.mark.parametrize("normalise", ["codebook", "children"])
def test_one_group_is_plain_beam_search(normalise):
    options = {"width": 6, "num_items": 2, "normalise": normalise}
    plain = beam_search(TableDecoding([0, 1], SIZES), Trie.of(CODES, SIZES), **options)
    one = groups_of([0, 1], groups=1, strength=9.0, **options)
    assert one.items_UWm.equal(plain.items_UWm)
    assert one.logp_UW.equal(plain.logp_UW)


def greedy_groups(user, groups, strength):
    """Groups of one beam, written out: each takes the best code less what the same prefixes cost."""
    rows = {tuple(row) for row in CODES.tolist()}
    found = [((), 0.0, 0.0)] * groups
    for level, size in enumerate(SIZES):
        taken = []
        for prefix, logp, key in found:
            gains = conditional(user, prefix, size)
            candidates = []
            for code in sorted({row[level] for row in rows if row[:level] == prefix}):
                longer, gain = (*prefix, code), gains[code].item()
                times = sum(longer == other for other, _, _ in taken)
                if times and level == len(SIZES) - 1:
                    continue
                candidates.append((longer, logp + gain, key + gain - strength * times))
            if candidates:
                taken.append(max(candidates, key=lambda c: c[2]))
        found = taken
    return sorted(((codes, logp) for codes, logp, _ in found), key=lambda pair: -pair[1])


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 50.0])
@pytest.mark.parametrize("form", FORMS)
def test_groups_of_one_beam_are_greedy_searches_that_avoid_one_another(form, strength):
    users = list(range(12))
    beams = groups_of(users, form=form, width=2, groups=2, strength=strength)
    for row, user in enumerate(users):
        wanted = greedy_groups(user, 2, strength)
        found = beams.codes_UWmL[row, : len(wanted), 0].tolist()
        assert [tuple(codes) for codes in found] == [codes for codes, _ in wanted]
        assert beams.logp_UW[row, : len(wanted)].tolist() == pytest.approx(
            [logp for _, logp in wanted], abs=1e-5
        )


def test_strong_groups_start_with_more_first_codes_than_weak_ones():
    first = {}
    for strength in (0.0, 50.0):
        beams = groups_of(range(10), width=6, groups=3, strength=strength, num_items=2)
        first[strength] = [len(set(rows)) for rows in beams.codes_UWmL[:, :, 0, 0].tolist()]
    # Two rows a group: a code that one group shares with an earlier one may be dropped later.
    assert min(first[50.0]) >= 2
    assert sum(first[50.0]) > sum(first[0.0])


@pytest.mark.parametrize("strength", [0.0, 0.7])
@pytest.mark.parametrize("num_items", [1, 2, 3])
@pytest.mark.parametrize("normalise", ["codebook", "children"])
def test_groups_find_no_session_twice_and_score_it_without_the_penalty(strength, num_items, normalise):
    forbidden = [[0, 5], [], list(range(17))]
    beams = groups_of(
        [0, 1, 2],
        width=8,
        groups=4,
        strength=strength,
        num_items=num_items,
        normalise=normalise,
        forbidden=forbidden,
    )
    for user in range(3):
        found = found_in(beams, user)
        sessions = legal_sessions(CODES, num_items=num_items, forbidden=forbidden[user])
        scores = {tuple(items): logp for items, logp in exhaustive(user, SIZES, sessions, normalise)}
        assert len({tuple(items) for items, _ in found}) == len(found) > 0
        assert [logp for _, logp in found] == pytest.approx([scores[tuple(i)] for i, _ in found], abs=1e-5)
    assert (beams.logp_UW[:, :-1] >= beams.logp_UW[:, 1:]).all()
    there = beams.items_UWm >= 0
    assert CODES[beams.items_UWm[there]].equal(beams.codes_UWmL[there])


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_of_groups_is_its_users(form):
    options = {"form": form, "width": 6, "groups": 3, "strength": 0.5, "num_items": 2}
    forbidden = [[1], list(range(18)), [2, 3]]
    batch = groups_of([0, 1, 2], forbidden=forbidden, **options)
    for user in range(3):
        alone = groups_of([user], forbidden=[forbidden[user]], **options)
        assert alone.items_UWm[0].equal(batch.items_UWm[user])
        assert alone.logp_UW[0].equal(batch.logp_UW[user])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 4, "strength": 1.0}, "groups=4 must divide width=6"),
        ({"groups": 0, "strength": 1.0}, "groups=0 must divide width=6"),
        ({"groups": 2, "strength": -1.0}, "strength=-1.0; valid: 0 or more, finite"),
    ],
)
def test_invalid_groups_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        groups_of([0], width=6, **options)
