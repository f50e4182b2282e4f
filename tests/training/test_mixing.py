import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from triptych.training.groups import Group, Verdict
from triptych.training.judges import JUDGES, BradleyTerry, build_judge
from triptych.training.mixing import (
    ALWAYS,
    Mixed,
    OnlineRidge,
    RegretMonitor,
    Sleepers,
    groups_in_field,
    log_weight,
    mixture,
    update,
    weight,
)
from triptych.training.stages import Live


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


class TestWeights:
    # Regrets (.4, -.2) and their sizes (1, .5); the values are on the method's page of the paper's check.
    R, C = numbers(0.4, -0.2), numbers(1.0, 0.5)

    def test_weights_of_the_worked_example(self):
        assert weight(self.R, self.C).tolist() == pytest.approx([0.193170, 0.076416], abs=5e-7)
        awake = torch.tensor([True, True])
        assert mixture(self.R, self.C, awake)[0].item() == pytest.approx(0.716542, abs=5e-7)

    def test_a_fresh_expert_weighs_half_of_what_one_round_could_add(self):
        assert weight(numbers(0.0), numbers(0.0)).item() == pytest.approx((math.exp(1 / 3) - 1) / 2)

    def test_an_expert_far_worse_than_the_mix_weighs_nothing(self):
        assert weight(numbers(-1.5), numbers(3.0)).item() == 0.0

    def test_those_asleep_have_no_share(self):
        share = mixture(numbers(9.0, 0.0, 0.0), numbers(9.0, 0.0, 0.0), torch.tensor([False, True, True]))
        assert share.tolist() == pytest.approx([0.0, 0.5, 0.5])

    def test_awake_experts_share_alike_where_all_weigh_nothing(self):
        awake = torch.tensor([True, True, False])
        share = mixture(numbers(-5.0, -9.0, 4.0), numbers(9.0, 9.0, 4.0), awake)
        assert share.tolist() == [0.5, 0.5, 0.0]

    def test_no_overflow_after_many_rounds(self):
        regret, total = numbers(5000.0, 4999.0), numbers(5000.0, 5000.0)
        assert weight(regret, total).isinf().all()
        assert log_weight(regret, total).isfinite().all()
        share = mixture(regret, total, torch.tensor([True, True]))
        # log w differs by (5001^2 - 5000^2) / (3 * 5001), and the subtracted terms cancel to the same ratio.
        assert (share[0] / share[1]).log().item() == pytest.approx(10001 / 15003, rel=1e-3)

    def test_nobody_awake_is_refused(self):
        with pytest.raises(ValueError, match="no expert is awake"):
            mixture(self.R, self.C, torch.tensor([False, False]))

    def test_an_update_moves_the_awake_by_what_they_were_better(self):
        awake = torch.tensor([True, True, False])
        regret, total = update(
            numbers(1.0, 1.0, 1.0), numbers(2.0, 2.0, 2.0), awake, numbers(0.2, 0.9, math.nan), 0.5
        )
        assert regret.tolist() == pytest.approx([1.3, 0.6, 1.0])
        assert total.tolist() == pytest.approx([2.3, 2.4, 2.0])

    @pytest.mark.parametrize("bad", [2.0, math.nan])
    def test_losses_beyond_the_unit_interval_are_refused(self, bad):
        with pytest.raises(ValueError, match=r"scale them to \[0, 1\]"):
            update(numbers(0.0), numbers(0.0), torch.tensor([True]), numbers(bad), 0.0)


def test_the_state_is_tensors_in_the_memory_and_other_experts_cannot_take_it_over():
    memory = {}
    sleepers = Sleepers(experts=("a", "b"), name="m")
    awake = torch.tensor([True, True])
    sleepers.learn(memory, awake, numbers(0.0, 1.0), 0.5)
    assert set(memory) == {"m/regret", "m/total"}
    assert memory["m/regret"].tolist() == [0.5, -0.5]
    again = Sleepers(experts=("a", "b"), name="m").weights(dict(memory), awake)
    assert torch.equal(again, sleepers.weights(memory, awake))
    assert again[0] > again[1]
    with pytest.raises(ValueError, match=r"memory 'm/regret' has shape .* of other experts"):
        Sleepers(experts=("a", "b", "c"), name="m").weights(memory, torch.ones(3, dtype=torch.bool))


class TestMonitor:
    def test_regret_is_against_each_expert_on_each_group_and_the_best_that_was_always_awake(self):
        monitor = RegretMonitor(groups=("*", "u"), experts=("*", "u"))
        memory = {}
        both, only_all = torch.tensor([True, True]), torch.tensor([True, False])
        monitor.learn(memory, both, both, numbers(0.5, 0.1), 0.4)
        monitor.learn(memory, only_all, only_all, numbers(0.2, math.nan), 0.3)
        metrics = monitor.metrics(memory)
        assert metrics == pytest.approx(
            {
                "regret/*": 0.0,  # -.1 + .1; 'u' was asleep in one of its rounds and is no candidate
                "regret/*/*": 0.0,
                "regret/*/u": 0.3,
                "regret/u": 0.3,
                "regret/u/*": -0.1,
                "regret/u/u": 0.3,
            }
        )
        rows = {row["group"]: row for row in monitor.table(memory)}
        assert rows["u"]["best"] == "u"
        assert rows["u"]["rounds"] == 1
        assert rows["*"]["best"] == "*"
        assert rows["*"]["rounds"] == 2

    def test_a_group_that_was_never_seen_has_no_row(self):
        assert RegretMonitor(groups=("*",), experts=("*",)).table({}) == []


class TestRidge:
    def test_it_is_the_ridge_solution_of_what_it_saw(self):
        x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        y = x @ numbers(1.0, -2.0, 0.5) + 0.1
        learner = OnlineRidge(3, l2=0.7)
        for row, target in zip(x, y, strict=True):
            learner.learn(row, target.item())
        expected = torch.linalg.solve(x.T @ x + 0.7 * torch.eye(3, dtype=torch.float64), x.T @ y)
        torch.testing.assert_close(learner.coefficients, expected)
        assert learner.predict(x[0]) == pytest.approx((expected @ x[0]).item())

    def test_it_knows_nothing_at_first(self):
        assert OnlineRidge(2).predict(torch.ones(2)) == 0.0


def stream(num_rounds, seed):
    """Rounds of features, groups ('*', 'a', 'b', intersecting) and outcomes whose rule differs by group."""
    generator = torch.Generator().manual_seed(seed)
    rule = {"*": numbers(0.5, 0.2, 0.0), "a": numbers(0.5, -0.3, 0.1), "b": numbers(0.2, 0.2, 0.25)}
    for _ in range(num_rounds):
        x = torch.cat([numbers(1.0), torch.rand(2, generator=generator, dtype=torch.float64) * 2 - 1])
        coins = torch.rand(2, generator=generator) < 0.5
        belongs = torch.tensor([True, bool(coins[0]), bool(coins[1])])
        name = "b" if coins[1] and not coins[0] else "a" if coins[0] else "*"
        noise = 0.05 * torch.randn((), generator=generator, dtype=torch.float64)
        yield x, belongs, (rule[name] @ x + noise).clamp(0, 1).item()


def test_sleeping_experts_have_less_regret_on_every_group_than_one_learner():
    names = ("*", "a", "b")
    experts = [OnlineRidge(3) for _ in names]
    sleepers, memory = Sleepers(experts=names), {}
    data = list(stream(1200, seed=1))
    lost = {"mixed": numbers(0.0, 0.0, 0.0), "single": numbers(0.0, 0.0, 0.0)}
    for x, belongs, y in data:
        predictions = torch.tensor([e.predict(x) for e in experts], dtype=torch.float64).clamp(0, 1)
        losses = (predictions - y).square()
        mix_loss = (sleepers.weights(memory, belongs) @ predictions - y).square()
        lost["mixed"] += belongs * mix_loss
        # The always-on expert alone is what one learner on all the data would have been.
        lost["single"] += belongs * losses[0]
        sleepers.learn(memory, belongs, losses, mix_loss)
        for expert, member in zip(experts, belongs, strict=True):
            if member:
                expert.learn(x, y)
    for g in range(3):
        rows = [(x, y) for x, belongs, y in data if belongs[g]]
        x, y = torch.stack([r[0] for r in rows]), torch.tensor([r[1] for r in rows], dtype=torch.float64)
        best = (x @ torch.linalg.lstsq(x, y).solution).clamp(0, 1)
        least = (best - y).square().sum()
        mixed, single = (lost[of][g] - least for of in ("mixed", "single"))
        assert mixed < 0.75 * single or mixed < 0, (names[g], mixed, single)
        # And near the best of its own: within some sqrt(T) of it, in units of the loss.
        assert mixed < 0.05 * math.sqrt(len(rows)) * 3


@dataclass
class Context:
    fields: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Likes:
    """Scores candidates, numbers, by their nearness to one."""

    target: float
    asked: list = field(default_factory=list)
    gives = frozenset({"score"})
    needs = frozenset({"ref"})

    def __call__(self, groups, live):
        self.asked.append(len(groups))
        return [
            Verdict(score=torch.tensor([-8 * abs(c - self.target) for c in g.candidates])) for g in groups
        ]


class Says:
    """Preferences by the users' own wish: even ones like small numbers, odd ones large."""

    gives = frozenset({"preference"})
    needs = frozenset()

    def __call__(self, groups, live):
        verdicts = []
        for g in groups:
            values = torch.tensor(g.candidates) * (1 if "large" in g.context.fields["group"] else -1)
            difference = values[:, None] - values
            verdicts.append(Verdict(preference=(difference.sign() + 1) / 2))
        return verdicts


def live():
    return Live(policy=nn.Identity(), port=None, references={}, device=torch.device("cpu"), seed=0)


def users(count):
    generator = torch.Generator().manual_seed(3)
    found = []
    for i in range(count):
        candidates = tuple(torch.rand(2, generator=generator).tolist())
        name = ["large"] if i % 2 else "small"
        mask = torch.ones(2, 1, dtype=torch.bool)
        found.append(Group(key=str(i), context=Context({"group": name}), candidates=candidates, mask=mask))
    return found


class TestMixed:
    @staticmethod
    def judge(**options):
        experts = {ALWAYS: Likes(0.0), "small": Likes(0.0), "large": Likes(1.0)}
        return Mixed(experts=experts, group_of=groups_in_field("group"), **options)

    def test_at_first_awake_experts_count_alike_and_the_others_are_not_asked(self):
        judge, groups = self.judge(), users(3)
        verdict = judge(groups, live())[1]
        a, b = groups[1].candidates
        always, large = (torch.tensor([-8 * abs(c - t) for c in (a, b)]) for t in (0.0, 1.0))
        torch.testing.assert_close(verdict.score, (always + large) / 2)
        p = [torch.sigmoid(s[0] - s[1]).item() for s in (always, large)]
        assert verdict.preference[0, 1].item() == pytest.approx(sum(p) / 2)
        assert [e.asked for e in judge.experts.values()] == [[3], [2], [1]]

    def test_feedback_moves_each_users_weight_to_the_expert_who_was_right(self):
        where = live()
        judge = self.judge(feedback=Says())
        before = judge(users(1) + users(2)[1:], where)
        for _ in range(20):
            judge(users(6), where)
        large = torch.tensor([True, False, True])
        share = judge.sleepers.weights(where.memory, large)
        assert share[2] > 0.95
        after = judge(users(2), where)[1]
        truth = Says()(users(2), where)[1].preference
        assert (after.preference - truth).abs().max() < (before[1].preference - truth).abs().max()
        # Reported for the round, and kept for the next.
        assert where.metrics["regret/large"] > 0
        assert judge.monitor.table(where.memory)[2]["best"] == "large"

    def test_each_group_is_judged_before_its_feedback_is_seen(self):
        with_feedback, without = self.judge(feedback=Says()), self.judge()
        first, plain = with_feedback(users(4), live()), without(users(4), live())
        assert torch.equal(first[0].preference, plain[0].preference)
        # The second large user is judged with what the first one taught.
        assert not torch.equal(first[3].preference, plain[3].preference)

    def test_observing_by_hand_is_the_same_as_feedback(self):
        by_hand, where = self.judge(), live()
        groups = users(1)
        awake = by_hand.awake(groups[0].context)
        predictions = torch.tensor([0.8, 0.6, math.nan])
        by_hand.observe(where, awake, predictions, torch.tensor([1.0]))
        # Losses .04 and .16; the mix said .7 and lost .09.
        assert where.memory["mixed/regret"].tolist() == pytest.approx([0.05, -0.07, 0.0])
        assert where.memory["mixed/total"].tolist() == pytest.approx([0.05, 0.07, 0.0])
        assert by_hand.monitor.metrics(where.memory)["regret/small/*"] == pytest.approx(0.05)

    def test_a_candidate_alone_teaches_nothing(self):
        where = live()
        single = Group(
            key="1",
            context=Context({"group": "small"}),
            candidates=(0.5,),
            mask=torch.ones(1, 1, dtype=torch.bool),
        )
        assert self.judge(feedback=Says())([single], where)[0].preference.tolist() == [[0.5]]
        assert where.memory == {}

    def test_it_remembers_and_needs_what_its_experts_need(self):
        judge = self.judge()
        assert judge.remembers
        assert BradleyTerry(of=judge).remembers
        assert judge.needs == {"ref"}
        assert judge.gives == {"preference", "score"}

    def test_an_expert_for_everybody_must_be_among_them(self):
        with pytest.raises(ValueError, match=r"experts=small must include '\*'"):
            Mixed(experts={"small": Likes(0.0)}, group_of=groups_in_field("group"))

    def test_it_is_built_by_name_with_nested_judges(self):
        expert = {"name": "bradley_terry", "options": {"of": Likes(0.0)}}
        options = {"experts": {"*": expert, "large": expert}, "field": "group"}
        judge = build_judge({"name": "mixed", "options": options}, JUDGES)
        assert isinstance(judge, Mixed)
        assert judge.awake(Context({"group": ["large", "unknown"]})).tolist() == [True, True]
        assert judge.awake(Context()).tolist() == [True, False]
        with pytest.raises(ValueError, match="field 'group' is 3; it names a user group"):
            judge.awake(Context({"group": 3}))
