import itertools

import pytest
import torch
from tiny_sessions import FORMS, NUM_ITEMS, SIZES, codes, histories, policy

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.model import ModelConfig, Sessions
from triptych.modalities.recsys.ranked import RankingConfig, ranked_items, sessions_of
from triptych.modalities.recsys.sasrec import SasRec
from triptych.modalities.recsys.trie import Trie

TRIE = Trie.of(codes(), SIZES)
ROWS = [histories(n, seed=n).values for n in (3, 7, 1, 5)]


def scores(model, rows, sessions):
    """Log-prob of every session for every history, [U, number of sessions]."""
    history = Jagged.of(rows)
    every = torch.tensor(sessions)
    asked = Sessions(
        items=every.repeat(len(rows), 1),
        user=torch.arange(len(rows)).repeat_interleave(len(every)),
        seen=history.lengths.repeat_interleave(len(every)),
        most=len(every),
    )
    return model(history, asked).detach().sum(1).view(len(rows), -1)


def search(model, rows, **options):
    settings = {"width": NUM_ITEMS, "num_items": 1, "forbidden": None, "window": 50, "batch_size": 2}
    return sessions_of(model, TRIE, rows, **(settings | options))


@pytest.mark.parametrize("form", FORMS)
def test_beams_as_wide_as_the_catalogue_are_the_exhaustive_ranking(form):
    model = policy(**FORMS[form])
    expected, order = scores(model, ROWS, [[i] for i in range(NUM_ITEMS)]).sort(descending=True)
    found = search(model, ROWS)
    assert torch.equal(found.items_UWm[:, :, 0], order)
    torch.testing.assert_close(found.logp_UW, expected, rtol=1e-4, atol=1e-4)


def test_beams_of_a_batch_are_those_of_each_user_alone():
    model = policy()
    together = search(model, ROWS, width=6, batch_size=4)
    for u, row in enumerate(ROWS):
        alone = search(model, [row], width=6)
        assert torch.equal(alone.items_UWm[0], together.items_UWm[u])
        torch.testing.assert_close(alone.logp_UW[0], together.logp_UW[u], rtol=1e-4, atol=1e-5)


def test_sessions_of_two_items_equal_brute_force_over_ordered_pairs():
    model = policy()
    pairs = list(itertools.permutations(range(NUM_ITEMS), 2))
    expected = scores(model, ROWS[:2], pairs)
    best, place = expected.sort(descending=True)
    found = search(model, ROWS[:2], width=len(pairs), num_items=2)
    assert found.items_UWm[0, 0].tolist() == list(pairs[int(place[0, 0])])
    torch.testing.assert_close(found.logp_UW, best, rtol=1e-4, atol=1e-4)


def test_items_that_a_user_has_are_not_recommended():
    model = policy()
    for u, row in enumerate(search(model, ROWS, forbidden=ROWS).items_UWm[:, :, 0].tolist()):
        left = set(range(NUM_ITEMS)) - set(ROWS[u].tolist())
        assert {i for i in row if i >= 0} == left
    config = RankingConfig(width=NUM_ITEMS, ks=[3, 20])
    ranked = ranked_items(model, TRIE, ROWS, config, window=50)
    assert ranked.shape == (4, 20)
    assert not set(ranked[1].tolist()) & set(ROWS[1].tolist())


def test_items_of_one_id_follow_one_another():
    shared = codes()
    shared[7] = shared[3]
    model = policy()
    model.codes_IL.copy_(shared)
    config = RankingConfig(width=NUM_ITEMS, ks=[20], mask_seen=False)
    ranked = ranked_items(model, Trie.of(shared, SIZES), ROWS, config, window=50)[0].tolist()
    assert sorted(ranked) == list(range(NUM_ITEMS))
    assert ranked.index(7) == ranked.index(3) + 1


def test_sasrec_ranks_by_its_scores():
    torch.manual_seed(0)
    model = SasRec(
        ModelConfig(kind="sasrec", context="causal", width=16, heads=2, kernel="reference"), NUM_ITEMS
    )
    config = RankingConfig(width=20, ks=[5], mask_seen=False)
    found = ranked_items(model, None, ROWS, config, window=50)
    model.eval()
    assert torch.equal(found, model.scores(Jagged.of(ROWS)).topk(5).indices)


def test_only_the_window_of_a_history_counts():
    model = policy()
    long = torch.cat([torch.tensor([4, 4, 4]), ROWS[1]])
    assert torch.equal(
        search(model, [long], window=7).items_UWm, search(model, [ROWS[1]], window=7).items_UWm
    )


def test_places_beyond_the_beams_are_refused():
    with pytest.raises(ValueError, match=r"evaluation\.ks=\[60\] must be from 1 to evaluation\.width=50"):
        RankingConfig(ks=[60])
