"""PUCT search on trees worked by hand, and siblings along paths."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from triptych.training.groups import Group
from triptych.training.growing import grow
from triptych.training.trees import (
    Child,
    Estimate,
    Node,
    Search,
    chooser,
    prior,
    puct,
    search,
    search_trees,
    sibling_groups,
    siblings,
    step_value,
    walk,
)

# Two steps of two: state -> (log-prob of the step, confidence, whether the answer is correct).
STEPS = {
    "a": (-0.1, 0.5, None),
    "b": (-1.0, 0.6, None),
    "aa": (math.log(0.5), 0.7, True),
    "ab": (math.log(0.5), 0.3, False),
    "ba": (math.log(0.5), 0.2, False),
    "bb": (math.log(0.5), 0.9, True),
}
SETTINGS = Search(num_simulations=1, root_factor=3, num_children=2, max_depth=2)


class Small:
    """The tree of STEPS; keeps the states of every call."""

    def __init__(self):
        self.expanded, self.evaluated = [], []

    def expand(self, leaves):
        self.expanded.append([leaf.state for leaf in leaves])
        return [[self._child(leaf.state + c) for c in "ab"] for leaf in leaves]

    def _child(self, state):
        name = state.lstrip("/")
        return Child(state=state, logp=torch.tensor([STEPS[name][0]]), terminal=len(name) == 2)

    def evaluate(self, nodes):
        self.evaluated.append([node.state for node in nodes])
        steps = [STEPS[node.state.lstrip("/")] for node in nodes]
        return [Estimate(confidence=c, correct=correct) for _, c, correct in steps]


def searched(num_simulations, *, gamma=1.0):
    small, root = Small(), Node(state="")
    search(
        [root],
        replace(SETTINGS, gamma=gamma),
        expand=small.expand,
        evaluate=small.evaluate,
        num_simulations=num_simulations,
    )
    return root, small


def test_prior_divides_the_log_prob_by_a_power_of_the_length():
    assert prior(torch.tensor([-1.0, -2.0])) == pytest.approx(math.exp(-3 / 2**1.25))
    assert prior(torch.tensor([-1.0, -2.0]), length_power=1.0) == pytest.approx(math.exp(-1.5))


def test_puct_is_q_plus_the_exploration_of_a_likely_and_little_visited_step():
    parent = Node(state=0, visits=9)
    node = Node(state=1, parent=parent, q=0.5, prior=0.25, visits=2)
    assert puct(node, exploration=1.0) == pytest.approx(0.5 + 0.25 * 3 / 3)
    assert puct(node, exploration=4.0) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("estimate", "depth", "expected"),
    [
        (Estimate(confidence=0.8), 0, 0.8),
        (Estimate(confidence=0.8), 4, 0.8),
        (Estimate(confidence=0.8), 5, 0.4),
        (Estimate(confidence=0.8, correct=True), 0, 1.8),
        (Estimate(confidence=0.8, correct=True, original=True), 0, 2.05),
        (Estimate(confidence=0.8, correct=False, original=True), 0, -0.2),
    ],
)
def test_a_value_is_confidence_over_depth_plus_the_outcome(estimate, depth, expected):
    assert step_value(estimate, depth) == pytest.approx(expected)


def test_one_simulation_goes_to_an_end_and_backs_up_visit_weighted_q():
    # At the root: a 0.5 + 0.904837 beats b 0.6 + 0.367879. Then aa (r = 1.7 - 0.5) beats ab (r = -0.7 - 0.5).
    root, small = searched(1)
    a, b = root.children
    assert small.expanded == [[""], ["a"]]
    assert [(n.q, n.visits) for n in a.children] == [(pytest.approx(1.2), 1), (pytest.approx(-1.2), 0)]
    assert (a.future, a.q, a.visits) == (pytest.approx(0.0), pytest.approx(0.5), 1)
    assert (b.q, b.visits, root.visits) == (pytest.approx(0.6), 0, 1)
    assert root.future == pytest.approx((1 * 0.5 + 1 * 0.6) / 2)


def test_three_simulations_give_the_values_worked_by_hand():
    # a again (0.5 + 0.904837 sqrt 2 / 2 = 1.1398 against 0.6 + 0.367879 sqrt 2 = 1.1203):
    # V = (2 1.2 - 1.2) / 3 = 0.4.
    # a again (0.9 + 0.904837 sqrt 3 / 3 = 1.4224 against 1.2372): V = (3 1.2 - 1.2) / 4 = 0.6.
    root, small = searched(3)
    a, b = root.children
    assert [n.visits for n in a.children] == [3, 0]
    assert (a.future, a.q, a.visits) == (pytest.approx(0.6), pytest.approx(1.1), 3)
    assert (b.q, b.visits) == (pytest.approx(0.6), 0)
    assert root.future == pytest.approx((3 * 1.1 + 0.6) / 4)
    assert small.expanded == [[""], ["a"]]


def test_gamma_discounts_what_follows_a_step():
    root, _ = searched(2, gamma=0.5)
    assert root.children[0].q == pytest.approx(0.5 + 0.5 * 0.4)


def test_every_tree_is_expanded_and_evaluated_in_one_call():
    small = Small()
    trees = search_trees(["", "/", "//"], SETTINGS, expand=small.expand, evaluate=small.evaluate)
    assert small.expanded[:2] == [["", "/", "//"], ["a", "/a", "//a"]]
    assert small.evaluated[0] == ["a", "b", "/a", "/b", "//a", "//b"]
    alone = search_trees(["/"], SETTINGS, expand=Small().expand, evaluate=Small().evaluate)[0]
    for one, other in zip(alone.levels, trees[1].levels, strict=True):
        assert torch.equal(one.q, other.q)
        assert torch.equal(one.visits, other.visits)


def test_the_path_takes_the_most_visited_child_and_searches_again_from_there():
    # 3 simulations at the root, then 1 more from a: Q of a at the moment of choosing stays 1.1.
    small = Small()
    tree = search_trees([""], SETTINGS, expand=small.expand, evaluate=small.evaluate)[0]
    first, second = tree.levels
    assert first.q.tolist() == pytest.approx([1.1, 0.6])
    assert first.visits.tolist() == [3, 0]
    assert second.visits.tolist() == [4, 0]
    assert second.parent is first.chosen
    assert tree.answer.state == "aa"


def test_a_leaf_for_which_nothing_is_drawn_is_an_end():
    root = Node(state="")
    search(
        [root],
        SETTINGS,
        expand=lambda leaves: [[] for _ in leaves],
        evaluate=lambda nodes: pytest.fail("there is nothing to evaluate"),
        num_simulations=2,
    )
    assert root.terminal
    assert root.visits == 2


def test_confidence_counts_less_from_the_sixth_step_on():
    root = Node(state=0)
    search(
        [root],
        Search(max_depth=7),
        expand=lambda leaves: [[Child(state=leaf.state + 1, logp=torch.zeros(1))] for leaf in leaves],
        evaluate=lambda nodes: [Estimate(confidence=0.6) for _ in nodes],
        num_simulations=1,
    )
    values = [level.nodes[0].value for level in walk(root, chooser("best"))]
    assert values == pytest.approx([0.6, 0.6, 0.6, 0.6, 0.6, 0.3, 0.2])


def test_walking_by_q_and_by_visits_can_differ():
    root = Node(state=0)
    root.children = [
        Node(state=1, parent=root, q=0.9, visits=1),
        Node(state=2, parent=root, q=0.2, visits=5, index=1),
    ]
    assert [level.chosen.state for level in walk(root, chooser("visits"))] == [2]
    assert [level.chosen.state for level in walk(root, chooser("best"))] == [1]
    picks = {
        next(walk(root, chooser("random", torch.Generator().manual_seed(s)))).chosen.state for s in range(20)
    }
    assert picks == {1, 2}


def make_group(level):
    logp = torch.stack([n.logp for n in level.nodes])
    return Group(
        key="x",
        context=level.parent.state,
        candidates=tuple(n.state for n in level.nodes),
        mask=torch.ones(logp.shape, dtype=torch.bool),
        logp=logp,
    )


def test_a_tree_makes_one_judged_group_a_depth():
    small = Small()
    tree = search_trees([""], SETTINGS, expand=small.expand, evaluate=small.evaluate)[0]
    groups = sibling_groups(tree, make_group, keep_only_correct=True)
    assert [g.context for g in groups] == ["", "a"]
    assert [g.candidates for g in groups] == [("a", "b"), ("aa", "ab")]
    assert [g.depth for g in groups] == [0, 1]
    assert groups[0].verdict.score.tolist() == pytest.approx([1.1, 0.6])
    assert groups[0].verdict.visits.tolist() == [3, 0]
    assert groups[1].logp[:, 0].tolist() == pytest.approx([math.log(0.5)] * 2)


def test_trees_that_end_wrong_are_dropped_only_when_asked():
    small = Small()
    wrong = {**STEPS, "aa": (-0.1, 0.7, False), "ab": (-0.1, 0.3, False)}
    small.evaluate = lambda nodes: [
        Estimate(confidence=wrong[n.state][1], correct=wrong[n.state][2]) for n in nodes
    ]
    tree = search_trees([""], replace(SETTINGS, root_factor=1), expand=small.expand, evaluate=small.evaluate)[
        0
    ]
    assert tree.answer.correct is False
    assert sibling_groups(tree, make_group, keep_only_correct=True) == []
    assert len(sibling_groups(tree, make_group)) == 2


def test_a_step_without_siblings_makes_no_group():
    small = Small()
    tree = search_trees(
        [""], SETTINGS, expand=lambda leaves: [d[:1] for d in small.expand(leaves)], evaluate=small.evaluate
    )[0]
    assert len(tree.levels) == 2
    assert sibling_groups(tree, make_group) == []


def order_agreement(num_simulations, *, num_trees=40, depth=4, seed=0):
    """Share of pairs of first steps that Q puts in the true order, in random trees with known values.

    A tree's answers are correct by chance, likelier under some steps than under others. The true value of a
    step is the share of correct answers below it; the confidence in an unfinished step is noise.
    """
    numbers = np.random.default_rng(seed)
    correct = [
        numbers.random((3,) * depth) < numbers.beta(1, 1, (3, 3) + (1,) * (depth - 2))
        for _ in range(num_trees)
    ]
    noise = np.random.default_rng(seed + 1)

    def expand(leaves):
        return [
            [
                Child(
                    state=(*leaf.state, i),
                    logp=torch.tensor([math.log(1 / 3)]),
                    terminal=leaf.depth + 1 == depth,
                )
                for i in range(3)
            ]
            for leaf in leaves
        ]

    def evaluate(nodes):
        return [
            Estimate(correct=bool(correct[n.state[0]][n.state[1:]]))
            if n.terminal
            else Estimate(confidence=noise.random())
            for n in nodes
        ]

    settings = Search(num_children=3, max_depth=depth)
    roots = [Node(state=(i,)) for i in range(num_trees)]
    search(roots, settings, expand=expand, evaluate=evaluate, num_simulations=num_simulations)
    right = total = 0
    for root, answers in zip(roots, correct, strict=True):
        truth = answers.reshape(3, -1).mean(-1)
        q = siblings(root, chooser("visits")).q
        for i in range(3):
            for j in range(i):
                if truth[i] != truth[j]:
                    total += 1
                    right += (truth[i] > truth[j]) == (q[i] > q[j]).item()
    return float(right / total)


def test_more_simulations_order_siblings_by_their_true_value_more_often():
    few, some, many = (order_agreement(n) for n in (1, 16, 128))
    assert few < 0.6
    assert some > few + 0.1
    assert many > some


class Line:
    """States are numbers; sibling i of step t adds 10^-t i, with log-prob -i. Keeps its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, states, step, num):
        self.calls.append((list(states), step, num))
        return [
            [Child(state=s + i * 10.0**-step, logp=torch.tensor([-float(i), -0.5])) for i in range(num)]
            for s in states
        ]


def grown(*, seed=0, num_steps=3, starts=(("a", 100.0), ("b", 200.0)), **options):
    line = Line()
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(starts))]
    options = {"num_siblings": 3, "generators": generators, **options}
    return grow(list(starts), num_steps=num_steps, expand=line, **options), line


def test_growing_gives_one_group_a_step_whose_siblings_share_their_state():
    groups, line = grown()
    assert [g.key for g in groups] == ["a", "a", "a", "b", "b", "b"]
    assert [g.depth for g in groups] == [0, 1, 2] * 2
    for group in groups:
        assert group.unit == "denoise"
        assert group.candidates == tuple(group.context + i * 10.0**-group.depth for i in range(3))
        assert group.logp.tolist() == [[-0.5], [-1.5], [-2.5]]
        assert group.mask.shape == (3, 1)
    for before, after in ((0, 1), (1, 2), (3, 4), (4, 5)):
        assert groups[after].context in groups[before].candidates
    assert [len(states) for states, _, _ in line.calls] == [2, 2, 2]


def test_a_path_goes_on_from_a_random_sibling_by_its_generator():
    contexts = [[g.context for g in grown(seed=s, starts=(("a", 0.0),))[0]] for s in range(40)]
    assert contexts[3] == [g.context for g in grown(seed=3, starts=(("a", 0.0),))[0]]
    taken = [round(c[1]) for c in contexts]
    assert all(8 <= taken.count(i) <= 19 for i in range(3)), taken


@pytest.mark.parametrize(("choose", "expected"), [("best", [0.0, 2.0, 2.2]), ("worst", [0.0, 0.0, 0.0])])
def test_a_path_goes_on_from_the_best_or_worst_sibling_when_asked(choose, expected):
    groups, _ = grown(
        choose=choose,
        starts=(("a", 0.0),),
        score=lambda groups: [torch.tensor(g.candidates) for g in groups],
    )
    assert [g.context for g in groups] == pytest.approx(expected)


def test_steps_before_the_first_have_no_siblings():
    groups, line = grown(first_step=2)
    assert [(step, num) for _, step, num in line.calls] == [(0, 1), (1, 1), (2, 3)]
    assert [g.depth for g in groups] == [2, 2]


def test_settings_that_mean_nothing_are_refused_by_name():
    with pytest.raises(ValueError, match=r"search\.num_children=1 must be at least 2"):
        Search(num_children=1)
    with pytest.raises(ValueError, match=r"search.gamma=0 must be in \(0, 1\]"):
        Search(gamma=0)
    with pytest.raises(ValueError, match=r"search\.exploration=nan must be a number"):
        Search(exploration=math.nan)
    with pytest.raises(ValueError, match=r"search\.choose='value' is not one of visits, best, random"):
        Search(choose="value")
    with pytest.raises(ValueError, match="a generator goes with 'random'"):
        chooser("random")
    with pytest.raises(ValueError, match="score goes with 'best' and 'worst'"):
        grown(choose="best")
    with pytest.raises(ValueError, match="num_siblings=1 must be at least 2"):
        grown(num_siblings=1)
    with pytest.raises(ValueError, match="first_step=3 must be at least 0 and less than num_steps=3"):
        grown(first_step=3)
    with pytest.raises(ValueError, match=r"a child's logp has shape \(0,\)"):
        Child(state=0, logp=torch.zeros(0))
