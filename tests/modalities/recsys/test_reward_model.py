import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.reward_model import (
    RewardEnsemble,
    RewardModelConfig,
    ScoringConfig,
    SessionReward,
    TargetAttention,
    latest,
    load_reward,
    make_member,
    save_reward,
)

NUM_ITEMS = 12
CONFIG = RewardModelConfig(width=8, heads=2, hidden=16)


def history(*rows):
    return Jagged.of([torch.tensor(row, dtype=torch.int64) for row in rows])


def member(config=CONFIG, seed=0, features=None):
    """A member in evaluation mode with weights large enough to have opinions."""
    made = make_member(config, NUM_ITEMS, seed=seed, features_IF=features).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    return made


def ensemble(num_members=2, scoring=None, config=CONFIG, features=None):
    config = replace(config, num_members=num_members)
    members = [member(config, seed, features) for seed in range(num_members)]
    return RewardEnsemble(members, scoring or ScoringConfig())


HISTORY = history([1, 2, 3, 4], [5], [])
ITEMS = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])


def test_padded_places_change_nothing_wherever_and_however_many_they_are():
    model = member()
    plain = model(HISTORY, torch.tensor([[3, 7], [1, 9], [4, 0]]))
    padded = model(HISTORY, torch.tensor([[-1, 3, -1, 7, -1], [1, 9, -1, -1, -1], [-1, -1, -1, 4, 0]]))
    torch.testing.assert_close(padded, plain)


def test_an_item_that_is_there_does_change_the_session():
    model = member()
    two = model(HISTORY, torch.tensor([[3, 7, -1], [1, 9, -1], [4, 0, -1]]))
    three = model(HISTORY, torch.tensor([[3, 7, 2], [1, 9, 2], [4, 0, 2]]))
    assert bool(((two - three).abs() > 1e-4).all())


def test_pooling_is_a_sum_so_that_an_item_twice_says_twice_as_much_to_the_towers():
    model = member()
    seen = []
    for tower in model.towers.values():
        tower.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0]))
    model(history([1, 2]), torch.tensor([[3, -1]]))
    model(history([1, 2]), torch.tensor([[3, 3]]))
    torch.testing.assert_close(seen[4], 2 * seen[0])


def test_the_order_of_a_sessions_items_does_not_count():
    model = member()
    torch.testing.assert_close(model(HISTORY, ITEMS.flip(1)), model(HISTORY, ITEMS))


def test_target_attention_equals_a_loop_over_heads_and_history_items():
    torch.manual_seed(0)
    layer = TargetAttention(8, 2, 0.0).eval()
    vectors, item = torch.randn(3, 8), torch.randn(8)
    with torch.no_grad():
        seen = [layer.first_D, *vectors]
        keys, values = zip(*((layer.kv(layer.norm_history(x))).split(8) for x in seen), strict=True)
        query, heads = layer.q(layer.norm(item)), []
        for head in (slice(0, 4), slice(4, 8)):
            weights = [math.exp(float(query[head] @ k[head]) / 2) for k in keys]
            total = sum(weights)
            heads.append(sum(w / total * v[head] for w, v in zip(weights, values, strict=True)))
        expected = item + layer.out(torch.cat(heads))
        found = layer(item.view(1, 1, 8), Jagged.of([vectors]))
    torch.testing.assert_close(found[0, 0], expected)


def test_target_attention_ignores_the_padding_of_shorter_histories():
    torch.manual_seed(0)
    layer = TargetAttention(8, 2, 0.0).eval()
    short, long = torch.randn(2, 8), 10 * torch.randn(9, 8)
    items = torch.randn(2, 3, 8)
    alone = layer(items[:1], Jagged.of([short]))
    torch.testing.assert_close(layer(items, Jagged.of([short, long]))[:1], alone)


def test_an_empty_history_is_read_as_the_learnt_vector_alone():
    torch.manual_seed(0)
    layer = TargetAttention(8, 2, 0.0).eval()
    item = torch.randn(1, 1, 8)
    value = layer.kv(layer.norm_history(layer.first_D))[8:]
    found = layer(item, Jagged(torch.zeros(0, 8), torch.tensor([0, 0]), 0))
    torch.testing.assert_close(found, item + layer.out(value))


def test_every_parameter_gets_a_gradient():
    model = member(features=torch.randn(NUM_ITEMS, 5)).train()
    model(HISTORY, torch.tensor([[0, 1, 2], [3, 4, -1], [5, -1, -1]])).sigmoid().sum().backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.any())]
    assert without == []


def test_the_user_matters_through_the_history():
    items = torch.tensor([[3, 7]]).expand(3, -1)
    assert bool((member()(HISTORY, items).std(0) > 1e-3).all())


def test_many_sessions_of_a_history_are_scored_as_each_by_itself():
    model, generator = member(), torch.Generator().manual_seed(1)
    user = torch.tensor([2, 0, 0, 1, 2, 0, 0])
    items = torch.randint(-1, NUM_ITEMS, (7, 4), generator=generator)
    rows = [HISTORY.values[HISTORY.offsets[u] : HISTORY.offsets[u + 1]] for u in user]
    alone = [model(Jagged.of([row]), items[i : i + 1])[0] for i, row in enumerate(rows)]
    torch.testing.assert_close(model(HISTORY, items, user), torch.stack(alone))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_scores_do_not_depend_on_the_batches_they_are_computed_in(batch_size):
    made, user = ensemble(), torch.tensor([2, 0, 0, 1, 2])
    items = torch.tensor([[1, 2], [3, 4], [5, -1], [6, 7], [8, 9]])
    found = made.probabilities(HISTORY, items, user, batch_size=batch_size)
    expected = torch.stack([m(HISTORY, items, user).sigmoid() for m in made.members])
    torch.testing.assert_close(found, expected)


def test_only_the_latest_items_of_the_window_are_looked_at():
    model = member(replace(CONFIG, window=2))
    held = history([1, 2, 3, 4], [5], [])
    assert latest(held, 2).values.tolist() == [3, 4, 5]
    assert latest(held, 2).offsets.tolist() == [0, 2, 3, 3]
    torch.testing.assert_close(model(held, ITEMS), model(history([9, 9, 3, 4], [5], []), ITEMS))
    assert not torch.allclose(model(held, ITEMS), model(history([1, 2, 3, 6], [5], []), ITEMS))


def test_features_of_items_reach_items_and_histories():
    features = torch.randn(NUM_ITEMS, 5, generator=torch.Generator().manual_seed(0))
    model = member(features=features)
    before = model(HISTORY, ITEMS)
    model.get_buffer("features_IF")[1] += 1.0
    after = model(HISTORY, ITEMS)
    assert not torch.allclose(after[0], before[0])
    torch.testing.assert_close(after[1:], before[1:])


def test_the_scale_of_features_does_not_count():
    features = torch.randn(NUM_ITEMS, 5, generator=torch.Generator().manual_seed(0))
    large, small = member(features=7 * features), member(features=0.1 * features)
    torch.testing.assert_close(large(HISTORY, ITEMS), small(HISTORY, ITEMS))
    assert float(large.get_buffer("features_IF").square().mean()) == pytest.approx(1.0)


def test_members_differ_by_seed_and_their_scores_have_a_deviation():
    made = ensemble(3, ScoringConfig(kind="one", tower="ltr"))
    scalars = made.scalars(made.probabilities(HISTORY, ITEMS, torch.arange(3)))
    assert float(scalars.std(0, correction=0).min()) > 1e-4
    again = make_member(CONFIG, NUM_ITEMS, seed=7).table.weight
    assert torch.equal(again, make_member(CONFIG, NUM_ITEMS, seed=7).table.weight)
    assert not torch.equal(again, make_member(CONFIG, NUM_ITEMS, seed=8).table.weight)


def test_making_a_member_leaves_the_global_generator_as_it_was():
    before = torch.get_rng_state()
    make_member(CONFIG, NUM_ITEMS, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_score_is_the_mean_less_so_many_deviations_over_the_members():
    plain = ensemble(3, ScoringConfig(kind="one", tower="vtr"))
    careful = ensemble(3, replace(plain.scoring, pessimism=2.0))
    p_RN = plain.probabilities(HISTORY, ITEMS, torch.arange(3))[..., 1]
    found = careful.score(HISTORY, ITEMS, torch.arange(3))
    torch.testing.assert_close(plain.score(HISTORY, ITEMS, torch.arange(3)), p_RN.mean(0))
    torch.testing.assert_close(found, p_RN.mean(0) - 2 * p_RN.var(0, correction=0).sqrt())


# One member; two towers of two sessions: p = (.2, .6) and (.4, .2).
TWO = torch.tensor([[[0.2, 0.6], [0.4, 0.2]]])


def of_two(**scoring):
    config = replace(CONFIG, towers=("vtr", "ltr"))
    return RewardEnsemble([SessionReward(config, NUM_ITEMS)], ScoringConfig(**scoring))


def test_weighted_scores_are_sums_of_probabilities():
    made = of_two(kind="weighted", weights={"vtr": 1.0, "ltr": -0.5})
    torch.testing.assert_close(made.scalars(TWO), torch.tensor([[-0.1, 0.3]]))


def test_one_tower_is_its_probability():
    torch.testing.assert_close(of_two(kind="one", tower="ltr").scalars(TWO), torch.tensor([[0.6, 0.2]]))


def test_z_scores_are_of_the_reference_sessions():
    made = of_two()
    # vtr: mean .3, deviation .1; ltr: mean .5, deviation .3.
    made.fit_scale(torch.tensor([[[0.2, 0.8], [0.4, 0.2]]]))
    # ((-1) + (1/3)) / 2 and ((1) + (-1)) / 2.
    torch.testing.assert_close(made.scalars(TWO), torch.tensor([[-1 / 3, 0.0]]))


def test_weighted_z_scores_are_a_weighted_mean():
    made = of_two(weights={"vtr": 1.0, "ltr": 3.0})
    made.fit_scale(torch.tensor([[[0.2, 0.8], [0.4, 0.2]]]))
    torch.testing.assert_close(made.scalars(TWO), torch.tensor([[0.0, -0.5]]))


def test_a_tower_that_says_the_same_of_every_session_ranks_nothing():
    made = of_two()
    made.fit_scale(torch.tensor([[[0.3, 0.8], [0.3, 0.2]]]))
    found = made.scalars(torch.tensor([[[0.3, 0.8], [0.3, 0.2]]]))
    torch.testing.assert_close(found, torch.tensor([[0.5, -0.5]]))


def test_each_member_has_its_own_scale():
    made = ensemble(2)
    p = torch.rand(2, 50, 4, generator=torch.Generator().manual_seed(0))
    # The second member says the same in other units: then the two agree.
    p[1] = 0.1 + 0.2 * p[0]
    made.fit_scale(p)
    scalars = made.scalars(p)
    torch.testing.assert_close(scalars[0], scalars[1], atol=1e-4, rtol=0)


def test_z_scores_before_their_scale_are_refused():
    with pytest.raises(ValueError, match="call fit_scale"):
        of_two().scalars(TWO)
    with pytest.raises(ValueError, match="at least 2"):
        of_two().fit_scale(TWO[:, :1])


def test_scoring_is_without_dropout_and_leaves_the_mode_as_it_was():
    made = ensemble(2, ScoringConfig(kind="one", tower="swt"), replace(CONFIG, dropout=0.5)).train()
    first = made.score(HISTORY, ITEMS, torch.arange(3))
    assert torch.equal(made.score(HISTORY, ITEMS, torch.arange(3)), first)
    assert made.training
    assert all(m.training for m in made.members)


def test_sessions_that_cannot_be_scored_are_refused_by_name():
    made = ensemble()
    with pytest.raises(ValueError, match="session 1 has no item"):
        made.probabilities(HISTORY, torch.tensor([[1, -1], [-1, -1]]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="items=12 must be below the 12 items"):
        made.probabilities(HISTORY, torch.tensor([[1, 12]]), torch.tensor([0]))


@pytest.mark.parametrize("with_features", [False, True])
def test_an_exported_ensemble_scores_as_before(tmp_path, with_features):
    features = torch.randn(NUM_ITEMS, 5) if with_features else None
    scoring = ScoringConfig(weights={"vtr": 1.0, "ltr": 2.0}, pessimism=0.5)
    made = ensemble(2, scoring, features=features)
    made.fit_scale(made.probabilities(HISTORY, ITEMS, torch.arange(3)))
    save_reward(made, tmp_path / "reward", facts={"items": ["a", "b"]})
    loaded, facts = load_reward(tmp_path / "reward")
    assert facts == {"items": ["a", "b"]}
    assert (loaded.scoring, loaded.members[0].config) == (scoring, made.members[0].config)
    assert not loaded.training
    items, user = torch.tensor([[0, 5, -1], [9, 10, 11]]), torch.tensor([2, 0])
    assert torch.equal(loaded.score(HISTORY, items, user), made.score(HISTORY, items, user))


def test_a_folder_that_is_no_reward_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"reward\.json: describes no session reward model"):
        load_reward(tmp_path)
    save_reward(ensemble(), tmp_path / "reward", facts={})
    text = (tmp_path / "reward" / "reward.json").read_text("utf-8")
    (tmp_path / "reward" / "reward.json").write_text(text.replace('"width": 8', '"width": 16'), "utf-8")
    with pytest.raises(ValueError, match=r"reward\.safetensors: these weights do not fit"):
        load_reward(tmp_path / "reward")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"width": 9}, "reward.width=9 must be a multiple"),
        ({"window": 0}, "reward.window=0 must be at least 1"),
        ({"dropout": 1.0}, "reward.dropout=1.0"),
        ({"towers": ("vtr", "vtr")}, "each once"),
    ],
)
def test_a_model_that_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        RewardModelConfig(**options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "mean"}, "scoring.kind='mean' is not one of"),
        ({"kind": "one"}, "scoring.tower=None goes with"),
        ({"kind": "mean_z", "tower": "vtr"}, "scoring.tower=vtr goes with"),
        ({"kind": "one", "tower": "vtr", "weights": {"vtr": 1.0}}, "scoring.weights go with"),
        ({"kind": "weighted"}, "needs scoring.weights"),
        ({"kind": "weighted", "weights": {"vtr": 0.0}}, "must not all be 0"),
        ({"weights": {"vtr": -1.0, "ltr": 1.0}}, "must be at least 0 with scoring.kind=mean_z"),
        ({"pessimism": -1.0}, "scoring.pessimism=-1.0"),
    ],
)
def test_a_scoring_that_cannot_be_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ScoringConfig(**options)


def test_scoring_settings_without_effect_or_meaning_are_refused():
    with pytest.raises(ValueError, match="scoring names tower 'like'; the model has swt, vtr, wtr, ltr"):
        ensemble(1, ScoringConfig(kind="one", tower="like"))
    with pytest.raises(ValueError, match=r"reward\.num_members to at least 2"):
        ensemble(1, ScoringConfig(pessimism=1.0))


def test_towers_have_weights_of_their_own():
    probabilities = functional.sigmoid(member()(HISTORY, ITEMS))
    assert probabilities.shape == (3, 4)
    assert bool((probabilities.std(1) > 1e-4).all())
