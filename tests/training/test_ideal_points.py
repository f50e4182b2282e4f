import math

import pytest
import torch
from scorer_cases import BT, accuracy, pairs

from triptych.training.feature_vectors import Standardise, Vectors
from triptych.training.ideal_points import IdealPoints, NewUsers
from triptych.training.scorers import FeatureReward, fit_scorer, load_scorer, save_scorer


def opposed(num_users, per_user, *, seed):
    """Users of two types, who want a large or a small first feature in turns: pairs and their users."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, num_users * per_user, 3, generator=generator)
    users = torch.arange(num_users).repeat_interleave(per_user)
    sign = 1.0 - 2.0 * (users % 2)
    first = sign * (left[:, 0] - right[:, 0]) > 0
    return torch.where(first[:, None], left, right), torch.where(first[:, None], right, left), users


@pytest.mark.parametrize("closeness", ["distance", "inner"])
def test_ideal_points_serve_two_opposed_types_of_users_where_one_reward_serves_none(closeness):
    chosen, rejected, users = opposed(10, 60, seed=0)
    held_out = opposed(10, 30, seed=1)
    model = IdealPoints(
        Standardise.identity(3), num_users=10, num_prototypes=2, latent=2, closeness=closeness, seed=0
    )
    fit_scorer(model, pairs(chosen, rejected, users=users), BT, l2=1e-3)
    shared = FeatureReward(Standardise.identity(3))
    fit_scorer(shared, pairs(chosen, rejected), BT)
    assert accuracy(shared, pairs(*held_out[:2])) < 0.6
    assert accuracy(model, pairs(*held_out[:2], users=held_out[2])) > 0.93
    # The mixtures tell the two types apart.
    side = (model.weights()[:, 0] > 0.5).tolist()
    assert side in ([True, False] * 5, [False, True] * 5)
    # Two users that were never trained on get mixture weights from ten pairs, and nothing else changes.
    before = {name: value.clone() for name, value in model.state_dict().items()}
    few, many = opposed(2, 10, seed=5), opposed(2, 100, seed=6)
    new = NewUsers(model, 2)
    assert [name for name, p in new.named_parameters() if p.requires_grad] == ["logits"]
    fit_scorer(new, pairs(*few[:2], users=few[2]), BT, l2=1e-3)
    assert accuracy(new, pairs(*many[:2], users=many[2])) > 0.9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_the_reward_of_an_ideal_point_is_minus_the_distance_to_the_users_mixture():
    model = IdealPoints(Standardise.identity(2), num_users=1, num_prototypes=2, latent=2)
    with torch.no_grad():
        model.projection[0].weight.copy_(torch.eye(2))
        model.prototypes.copy_(torch.tensor([[4.0, 0.0], [0.0, 4.0]]))
        model.logits.copy_(torch.tensor([[math.log(3.0), 0.0]]))
    assert model.weights()[0].tolist() == pytest.approx([0.75, 0.25])
    # The user's point is (3, 1): (6, 5) is 5 away, and the point itself 0.
    x = Vectors(torch.tensor([[6.0, 5.0], [3.0, 1.0]]), torch.tensor([0, 0]))
    assert model(x)[:, 0].tolist() == pytest.approx([-5.0, 0.0], abs=1e-5)
    model.closeness = "inner"
    assert model(x)[:, 0].tolist() == pytest.approx([23.0, 10.0])
    model(x).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_distance_of_zero_has_a_finite_gradient():
    model = IdealPoints(Standardise.identity(1), num_users=1, num_prototypes=1, latent=1)
    with torch.no_grad():
        model.projection[0].weight.fill_(1.0)
        model.prototypes.fill_(2.0)
    model(Vectors(torch.tensor([[2.0]]), torch.tensor([0]))).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_models_depend_on_the_seed_alone_and_leave_the_global_generator_as_it_was():
    def make(seed):
        return IdealPoints(
            Standardise.identity(3), num_users=2, num_prototypes=2, latent=2, hidden=(4,), seed=seed
        ).state_dict()

    before = torch.random.get_rng_state()
    one, same, other = make(1), make(1), make(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not torch.equal(one["prototypes"], other["prototypes"])


def test_ideal_points_need_at_least_one_of_everything():
    with pytest.raises(ValueError, match="num_prototypes=0 must be at least 1"):
        IdealPoints(Standardise.identity(2), num_users=1, num_prototypes=0, latent=1)


def flipped(num_users, per_user, *, seed):
    """As `opposed`, and the taste of both types turns round with the sign of a prompt's first feature."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, num_users * per_user, 3, generator=generator)
    prompts = torch.randn(len(left), 2, generator=generator)
    users = torch.arange(num_users).repeat_interleave(per_user)
    sign = (1.0 - 2.0 * (users % 2)) * prompts[:, 0].sign()
    first = sign * (left[:, 0] - right[:, 0]) > 0
    sides = torch.where(first[:, None], left, right), torch.where(first[:, None], right, left)
    return pairs(*sides, users=users, prompts=prompts)


def prompted(num_users, **options):
    defaults = {"num_prototypes": 2, "latent": 2, "closeness": "inner", "prompt_hidden": (8,)}
    return IdealPoints(
        Standardise.identity(3),
        num_users=num_users,
        prototypes="prompts",
        prompts=Standardise.identity(2),
        **(defaults | options),
    )


def test_taste_that_depends_on_the_prompt_needs_prototypes_that_do():
    train, held_out = flipped(10, 60, seed=0), flipped(10, 30, seed=1)
    fixed = IdealPoints(Standardise.identity(3), num_users=10, num_prototypes=2, latent=2, closeness="inner")
    fit_scorer(fixed, train, BT, l2=1e-3)
    assert accuracy(fixed, held_out) < 0.6
    model = prompted(10)
    fit_scorer(model, train, BT, l2=1e-3)
    assert accuracy(model, held_out) > 0.93
    # A new user is two numbers here, too, and the networks of prompts stay as they are.
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new = NewUsers(model, 2)
    assert [(n, p.numel()) for n, p in new.named_parameters() if p.requires_grad] == [("logits", 4)]
    fit_scorer(new, flipped(2, 15, seed=5), BT, l2=1e-3)
    assert accuracy(new, flipped(2, 100, seed=6)) > 0.9
    frozen = new.model.state_dict()
    assert all(torch.equal(frozen[name], value) for name, value in before.items())
    assert all(p.grad is None for p in new.model.parameters())


def test_the_ideal_point_at_a_prompt_is_the_mixture_of_what_each_network_makes_of_it():
    model = prompted(1, prompt_hidden=(), closeness="distance")
    model.prompts.mean.fill_(10.0)
    model.prompts.scale.fill_(0.5)
    with torch.no_grad():
        model.projection[0].weight.copy_(torch.eye(3)[:2])
        for network, weight, bias in zip(
            model.prototypes, (torch.eye(2), -torch.eye(2)), ([4.0, 0.0], [0.0, 4.0]), strict=True
        ):
            network[0].weight.copy_(weight)
            network[0].bias.copy_(torch.tensor(bias))
        model.logits.copy_(torch.tensor([[math.log(3.0), 0.0]]))
    # Prompts count from 10 in halves. At (2, -2): 3/4 (6, -2) + 1/4 (-2, 6) = (4, 0). At 0: (3, 1).
    x = Vectors(
        torch.tensor([[7.0, 4.0, 9.0], [3.0, 1.0, 9.0]]),
        torch.tensor([0, 0]),
        torch.tensor([[11.0, 9.0], [10.0, 10.0]]),
    )
    assert model(x)[:, 0].tolist() == pytest.approx([-5.0, 0.0], abs=1e-5)
    # Everybody's mean user is this one user.
    assert torch.equal(model(Vectors(x.values, None, x.prompts)), model(x))
    with pytest.raises(ValueError, match=r"give Vectors\.prompts"):
        model(Vectors(x.values, x.users))


def test_prototypes_among_items_are_mixed_there_and_then_projected():
    model = IdealPoints(
        Standardise(torch.tensor([10.0, 0.0]), torch.ones(2)),
        num_users=1,
        num_prototypes=2,
        latent=1,
        hidden=(1,),
        prototypes="items",
    )
    with torch.no_grad():
        # f(x) = 2 gelu(x_0 + x_1) of the standardised item.
        model.projection[0].weight.copy_(torch.tensor([[1.0, 1.0]]))
        model.projection[2].weight.copy_(torch.tensor([[2.0]]))
        model.prototypes.copy_(torch.tensor([[4.0, 0.0], [0.0, -4.0]]))
        model.logits.copy_(torch.tensor([[math.log(3.0), 0.0]]))
    # The mixture is the item (3, -1): 2 gelu(2) = 3.9090. Mixing projected ones gives 6 - 0.0001.
    gelu = [2 * v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in (1.0, 2.0)]
    x = Vectors(torch.tensor([[11.0, 0.0], [13.0, -1.0]]), torch.tensor([0, 0]))
    assert model(x)[:, 0].tolist() == pytest.approx([gelu[0] - gelu[1], 0.0], abs=1e-5)


def test_a_linear_projection_of_mixed_items_is_a_mixture_of_latent_points():
    options = {"num_users": 3, "num_prototypes": 2, "latent": 2}
    items = IdealPoints(Standardise.identity(4), prototypes="items", **options)
    latent = IdealPoints(Standardise.identity(4), **options)
    with torch.no_grad():
        latent.projection.load_state_dict(items.projection.state_dict())
        latent.prototypes.copy_(items.projection(items.prototypes))
        latent.logits.copy_(items.logits)
    x = Vectors(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3)
    torch.testing.assert_close(items(x), latent(x), atol=1e-6, rtol=0)


def test_an_angle_is_a_cosine_on_the_scale_of_clip_that_is_learnt_up_to_a_hundred():
    model = IdealPoints(Standardise.identity(2), num_users=1, num_prototypes=1, latent=2, closeness="angle")
    with torch.no_grad():
        model.projection[0].weight.copy_(torch.eye(2))
        model.prototypes.copy_(torch.tensor([[5.0, 0.0]]))
    x = Vectors(torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]]), torch.zeros(3, dtype=torch.long))
    assert model(x)[:, 0].tolist() == pytest.approx([0.6 / 0.07, 0.0, -1 / 0.07], rel=1e-5)
    model(x)[0].sum().backward()
    assert model.log_scale.grad.item() == pytest.approx(0.6 / 0.07, rel=1e-5)
    # Beyond 100 the scale stays there and has no gradient.
    with torch.no_grad():
        model.log_scale.fill_(5.0)
    model.zero_grad()
    assert model(x)[:, 0].tolist() == pytest.approx([60.0, 0.0, -100.0], rel=1e-5)
    model(x).sum().backward()
    assert model.log_scale.grad.item() == 0
    # An item at the origin has no angle, and a gradient that is finite.
    model.zero_grad()
    model(Vectors(torch.zeros(1, 2), torch.tensor([0]))).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert IdealPoints(Standardise.identity(2), num_users=1, num_prototypes=1, latent=2).log_scale is None


@pytest.mark.parametrize("prototypes", ["latent", "items", "prompts"])
@pytest.mark.parametrize("closeness", ["distance", "inner", "angle"])
def test_saved_ideal_points_and_the_new_users_joined_to_them_score_the_same_bit_for_bit(
    prototypes, closeness, tmp_path
):
    generator = torch.Generator().manual_seed(0)
    values, prompts = torch.randn(8, 3, generator=generator), 7 + torch.randn(8, 2, generator=generator)
    asked = prototypes == "prompts"
    model = IdealPoints(
        Standardise.of(values),
        num_users=2,
        num_prototypes=3,
        latent=2,
        hidden=(5,),
        closeness=closeness,
        prototypes=prototypes,
        prompts=Standardise.of(prompts) if asked else None,
        prompt_hidden=(4,) if asked else (),
        seed=3,
    )
    new = NewUsers(model, 2)
    with torch.no_grad():
        new.logits.normal_(generator=generator)
    save_scorer(model, tmp_path / "old", facts={"users": ["a", "b"]})
    save_scorer(new.joined(), tmp_path / "all", facts={"users": ["a", "b", "c", "d"]})
    seen = Vectors(values, torch.arange(8) % 2, prompts if asked else None)
    later = Vectors(values, torch.arange(8) % 2 + 2, seen.prompts)
    (old, _), (everyone, facts) = load_scorer(tmp_path / "old"), load_scorer(tmp_path / "all")
    assert torch.equal(old(seen), model(seen))
    assert torch.equal(everyone(seen), model(seen))
    assert torch.equal(everyone(later), new(seen))
    assert not torch.equal(everyone(later), everyone(seen))
    assert facts == {"users": ["a", "b", "c", "d"]}
    assert everyone.settings() == model.settings() | {"num_users": 4}


def test_options_that_do_not_belong_together_are_refused():
    common = {"num_users": 1, "num_prototypes": 1, "latent": 1}
    inputs = Standardise.identity(2)
    with pytest.raises(ValueError, match="closeness='cosine' is not one of distance, inner, angle"):
        IdealPoints(inputs, closeness="cosine", **common)
    with pytest.raises(ValueError, match="prototypes='item' is not one of latent, items, prompts"):
        IdealPoints(inputs, prototypes="item", **common)
    for wrong in ({"prototypes": "prompts"}, {"prompts": inputs}, {"prompt_hidden": (3,)}):
        with pytest.raises(ValueError, match="prompts and prompt_hidden are of prototypes='prompts'"):
            IdealPoints(inputs, **wrong, **common)
