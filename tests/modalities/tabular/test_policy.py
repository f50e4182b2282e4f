"""The table itself: what it lists, its log-probs, and a log-linear policy."""

import pytest
import torch
from tabular_cases import D, normal, policy, same

from triptych.modalities.tabular.policy import PADDING, TabularPolicy, node_of, num_nodes_of


def by_hand() -> TabularPolicy:
    """Two actions, two steps: first .25/.75, then .5/.5 after 0 and .2/.8 after 1."""
    probs = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.2, 0.8]]], dtype=D)
    return TabularPolicy(probs.log(), length=2, critic=True)


def test_candidates_are_listed_in_order_and_end_at_the_stop():
    assert by_hand().all_candidates() == ((0, 0), (0, 1), (1, 0), (1, 1))
    assert by_hand().all_candidates((1,)) == ((0,), (1,))
    stopping = policy(actions=3, length=2, stop=2)
    assert stopping.all_candidates() == ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2,))


def test_log_probs_are_those_of_the_nodes_on_the_way():
    p = by_hand()
    same(p.distribution().exp(), torch.tensor([0.125, 0.125, 0.15, 0.6], dtype=D))
    same(p.distribution(prefix=(1,)).exp(), torch.tensor([0.2, 0.8], dtype=D))
    actions = torch.tensor([[1, 0], [1, PADDING]])
    found = p(actions, torch.zeros(2, dtype=torch.int64)).exp()
    same(found, torch.tensor([[0.75, 0.2], [0.75, 1.0]], dtype=D))


def test_contexts_have_rows_of_their_own():
    logits = normal(2, 4, 3, seed=0)
    p = TabularPolicy(logits, length=2, stop=2)
    for context in (0, 1):
        alone = TabularPolicy(logits[context : context + 1], length=2, stop=2)
        same(p.distribution(context), alone.distribution())
        assert p.distribution(context).exp().sum().item() == pytest.approx(1)


def test_values_and_entropies_are_read_before_each_action():
    p = by_hand()
    assert p.critic is not None
    assert not p.critic.any()
    with torch.no_grad():
        p.critic.copy_(torch.tensor([[0.1, 0.2, 0.3]], dtype=D))
    logp, value, entropy = p(
        torch.tensor([[1, 0], [0, PADDING]]), torch.zeros(2, dtype=torch.int64), None, ("value", "entropy")
    )
    same(value, torch.tensor([[0.1, 0.3], [0.1, 0.0]], dtype=D))
    assert entropy[0].tolist() == pytest.approx([0.562335, 0.500402], abs=1e-6)
    assert entropy[1, 1] == logp[1, 1] == 0


def test_a_candidate_may_begin_at_any_node():
    p = by_hand()
    one = torch.zeros(1, dtype=torch.int64)
    found = p(torch.tensor([[1]]), one, torch.tensor([node_of((1,), 2)]))
    assert found.exp().item() == pytest.approx(0.8)


def test_a_log_linear_policy_learns_its_features_weights_alone():
    """Two arms with features (1, 0) and (1, 2): only the difference moves, from the reference."""
    start = torch.tensor([[[0.2, 0.8]]], dtype=D).log()
    features = torch.tensor([[[[1.0, 0.0], [1.0, 2.0]]]], dtype=D)
    p = TabularPolicy(start, features=features)
    assert [n for n, q in p.named_parameters() if q.requires_grad] == ["theta"]
    same(p.distribution(), start.flatten())
    (slope,) = torch.autograd.grad(p.distribution()[1], [p.theta])
    same(slope, torch.tensor([0.0, 2 * 0.2], dtype=D))


def test_saved_weights_come_back():
    p, q = policy(critic=True), policy(seed=1, critic=True)
    q.load_state_dict(p.state_dict())
    same(q.distribution(), p.distribution())


def test_number_of_nodes():
    assert [num_nodes_of(3, depth) for depth in (1, 2, 3)] == [1, 4, 13]


@pytest.mark.parametrize(
    ("logits", "options", "message"),
    [
        (torch.zeros(1, 3, 3), {"length": 2}, "shape"),
        (torch.zeros(4, 3), {}, "shape"),
        (torch.full((1, 1, 2), -torch.inf), {}, "finite"),
        (torch.zeros(1, 1, 2), {"stop": 2}, "stop=2 is not an action; there are 2"),
        (torch.zeros(1, 1, 2), {"features": torch.zeros(1, 1, 3, 1)}, "features have shape"),
    ],
)
def test_a_table_that_cannot_be_is_refused(logits, options, message):
    with pytest.raises(ValueError, match=message):
        TabularPolicy(logits, **options)


@pytest.mark.parametrize("prefix", [(2,), (0, 1), (3,)])
def test_a_prefix_that_cannot_be_completed_is_refused(prefix):
    with pytest.raises(ValueError, match="cannot be completed: expected fewer than 2 actions below 3"):
        policy().all_candidates(prefix)


def test_an_unknown_readout_names_those_that_there_are():
    with pytest.raises(ValueError, match="no readout 'value'; it has entropy"):
        policy()(torch.tensor([[0, 1]]), torch.zeros(1, dtype=torch.int64), None, ("value",))
