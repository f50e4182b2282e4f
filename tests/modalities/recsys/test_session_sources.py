"""Sources, judges and the port of a recommender's rounds, on a small catalogue."""

import math

import pytest
import torch
from decoding_cases import TableDecoding, legal_sessions, random_codes, trie_in
from tiny_sessions import NUM_ITEMS, SIZES, codes, policy

from triptych.modalities.recsys.beams import beam_search
from triptych.modalities.recsys.requests import Request, Shown
from triptych.modalities.recsys.session_port import SessionPort
from triptych.modalities.recsys.session_sources import BeamSessions, DrawnSessions, FollowedSessions
from triptych.modalities.recsys.stochastic import sampled, user_seeds
from triptych.modalities.recsys.trie import Trie
from triptych.training.stages import Live

TABLE_SIZES = (3, 4, 3)
CODES = random_codes(20, TABLE_SIZES, seed=3)


def port(num_items=2, window=4):
    trie = Trie.of(codes(), SIZES)
    return SessionPort(trie=trie, items=tuple(map(str, range(NUM_ITEMS))), window=window, num_items=num_items)


def requests(num=3):
    generator = torch.Generator().manual_seed(5)
    return [
        Request(
            key=f"u{i}:{5 + i}",
            user=f"u{i}",
            history=torch.randperm(NUM_ITEMS, generator=generator)[: 5 + i],
            followed=torch.tensor([i, -1]) if i == 1 else torch.tensor([i, i + 7]),
        )
        for i in range(num)
    ]


def live(model, its_port, round=0):
    return Live(policy=model, port=its_port, references={}, device=torch.device("cpu"), seed=3, round=round)


@pytest.mark.parametrize("context", ["bidirectional", "causal", "lazy"])
def test_beams_are_legal_different_and_their_scores_are_the_log_probs_that_the_port_computes(context):
    model, its_port = policy(context=context), port()
    groups = BeamSessions(num_candidates=6, batch_size=2)(requests(), live(model, its_port))
    batch = its_port.collate([(g.context, g.candidates) for g in groups])
    terms = its_port.terms(model, batch)
    assert torch.allclose(torch.cat([g.logp for g in groups]), terms, atol=1e-5)
    for g in groups:
        rows = torch.stack([c.items for c in g.candidates])
        assert len(rows.unique(dim=0)) == len(rows) == 6
        assert not torch.isin(rows, g.context.history).any()
        assert (rows[:, 0] != rows[:, 1]).all()
        assert set(g.origin) == {"beam"}
        logp = g.logp.sum(-1)
        assert (logp.diff() <= 1e-6).all()


def test_keys_of_candidates_are_those_of_the_batch():
    its_port, asked = port(), requests()
    shown = [Shown(items=torch.tensor([1, 2])), Shown(items=torch.tensor([3, -1]))]
    batch = its_port.collate([(r, shown) for r in asked])
    assert batch.keys == tuple(its_port.key(r, s) for r in asked for s in shown)
    assert batch.counts.tolist() == [6.0, 3.0] * 3


def test_beams_are_refused_as_samples():
    group = BeamSessions(num_candidates=4)(requests(1), live(policy(), port()))[0]
    assert not BeamSessions.fresh
    with pytest.raises(ValueError, match="beams"):
        group.drawn_logp()


@pytest.mark.parametrize("how", ["diverse", "gumbel"])
def test_spread_out_beams_have_scores_of_their_own_too(how):
    model, its_port = policy(), port()
    source = BeamSessions(num_candidates=4, how=how, groups=2)
    groups = source(requests(), live(model, its_port))
    batch = its_port.collate([(g.context, g.candidates) for g in groups])
    assert torch.allclose(torch.cat([g.logp for g in groups]), its_port.terms(model, batch), atol=1e-5)
    assert all(len({tuple(c.items.tolist()) for c in g.candidates}) == g.size for g in groups)


def test_draws_have_the_log_probs_of_the_policy_and_do_not_depend_on_the_batch():
    model, its_port, asked = policy(), port(), requests()
    here = live(model, its_port)
    groups = DrawnSessions(num_candidates=5)(asked, here)
    batch = its_port.collate([(g.context, g.candidates) for g in groups])
    assert torch.allclose(torch.cat([g.logp for g in groups]), its_port.terms(model, batch), atol=1e-5)
    assert 0 < here.metrics["legal_mass"] <= 1
    alone = DrawnSessions(num_candidates=5, batch_size=1)(asked[2:], live(model, its_port))[0]
    assert [c.items.tolist() for c in alone.candidates] == [c.items.tolist() for c in groups[2].candidates]
    later = DrawnSessions(num_candidates=5)(asked, live(model, its_port, round=1))
    assert [c.items.tolist() for c in later[0].candidates] != [c.items.tolist() for c in groups[0].candidates]


def test_what_followed_is_one_candidate_and_absent_items_are_masked():
    groups = FollowedSessions()(requests(), live(policy(), port()))
    assert [g.candidates[0].items.tolist() for g in groups] == [[0, 7], [1, -1], [2, 9]]
    assert groups[0].mask.tolist() == [[True] * 6]
    assert groups[1].mask.tolist() == [[True] * 3 + [False] * 3]


def test_a_request_without_a_session_that_followed_is_named():
    (request,) = requests(1)
    bare = Request(key="a:1", user="a", history=request.history, followed=torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="a:1"):
        FollowedSessions()([bare], live(policy(), port()))


@pytest.mark.parametrize("form", ["padded", "ragged"])
def test_draws_come_as_often_as_their_probability_says(form):
    num = 6000
    trie = trie_in(form, CODES, TABLE_SIZES)
    seeds = user_seeds(3, torch.Generator().manual_seed(1))
    found = sampled(TableDecoding([3, 4, 5], TABLE_SIZES), trie, num=num, seeds=seeds)
    every = legal_sessions(CODES, num_items=1)
    exact = beam_search(TableDecoding([3, 4, 5], TABLE_SIZES), trie, width=len(every), normalise="children")
    for user in range(3):
        p = {
            int(i): math.exp(lp)
            for i, lp in zip(exact.items_UWm[user, :, 0], exact.logp_UW[user], strict=True)
        }
        counts = torch.bincount(found.beams.items_UWm[user, :, 0], minlength=20)
        for item, chance in p.items():
            error = 4.5 * math.sqrt(chance * (1 - chance) / num)
            assert abs(counts[item].item() / num - chance) < error + 1e-9
        legal = {
            int(i): float(x)
            for i, x in zip(found.beams.items_UWm[user, :, 0], found.legal_UW[user], strict=True)
        }
        for item, logp in legal.items():
            if counts[item]:
                assert logp == pytest.approx(math.log(p[item]), abs=1e-4)


def test_two_draws_of_two_items_never_repeat_an_item_nor_give_one_that_is_owned():
    trie = trie_in("padded", CODES, TABLE_SIZES)
    owned = (torch.tensor([0, 17]), torch.arange(17))
    found = sampled(
        TableDecoding([1], TABLE_SIZES), trie, num=50, seeds=torch.tensor([4]), num_items=2, within=owned
    )
    items = found.beams.items_UWm[0]
    assert (items >= 17).all()
    assert (items[:, 0] != items[:, 1]).all()
