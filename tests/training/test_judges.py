import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from triptych.training.agreement import Agreement, kendall, spearman, top_order
from triptych.training.groups import Group, Verdict
from triptych.training.judges import (
    JUDGES,
    BradleyTerry,
    Combine,
    Ensemble,
    Flipped,
    Gap,
    Minus,
    OverUsers,
    Preferring,
    Scored,
    WinRate,
    build_judge,
)
from triptych.training.judging import ORDER_FLIPS
from triptych.training.plugs import PlugConfig
from triptych.training.stages import Live

CYCLE = [[0.5, 0.7, 0.4], [0.3, 0.5, 0.9], [0.6, 0.1, 0.5]]


def live(seed=0, round=0):
    return Live(
        policy=nn.Identity(), port=None, references={}, device=torch.device("cpu"), seed=seed, round=round
    )


def group(*candidates, key="x", context=None, units=2, **fields):
    mask = torch.ones(len(candidates), units, dtype=torch.bool)
    return Group(key=key, context=context, candidates=candidates, mask=fields.pop("mask", mask), **fields)


@dataclass(frozen=True, kw_only=True)
class Says:
    """A judge that says this of every group."""

    verdict: Verdict
    needs: frozenset = frozenset()

    @property
    def gives(self):
        return self.verdict.given()

    def __call__(self, groups, live):
        return [self.verdict] * len(groups)


def says(**fields):
    return Says(
        verdict=Verdict(**{k: torch.tensor(v) if isinstance(v, list) else v for k, v in fields.items()})
    )


def one(judge, *candidates, **options):
    return judge([group(*(candidates or ("a", "b", "c")), **options)], live())[0]


def close(tensor, values):
    torch.testing.assert_close(tensor, torch.tensor(values), rtol=1e-5, atol=1e-6)


def lengths(context, candidates):
    return [len(c) for c in candidates]


class TestScoredAndPreferring:
    def test_a_measure_of_candidates_is_a_score(self):
        verdict = one(Scored(measure=lengths, name="length"), "aa", "b")
        close(verdict.score, [2.0, 1.0])

    @pytest.mark.parametrize("wrong", [[1.0], [math.nan, 0.0], [math.inf, 0.0]])
    def test_a_measure_that_returns_anything_but_k_finite_numbers_is_named(self, wrong):
        judge = Scored(measure=lambda context, candidates: wrong, name="broken")
        with pytest.raises(ValueError, match=r"broken of x returned .*; expected 2 finite numbers"):
            one(judge, "aa", "b")

    def test_a_comparison_that_favours_the_first_is_averaged_over_both_orders(self):
        # True P(a > b) = .6 and a bonus of .2 for the first: .8 and 1 - (.4 + .2) = .4, on average .6.
        truth = {("a", "b"): 0.6, ("b", "a"): 0.4}
        judge = Preferring(prefer=lambda context, a, b: truth[a, b] + 0.2, name="biased")
        where = live()
        verdict = judge([group("a", "b")], where)[0]
        close(verdict.preference, [[0.5, 0.6], [0.4, 0.5]])
        # In one order a wins, in the other b does: the order alone decided.
        assert where.memory[ORDER_FLIPS].tolist() == [1.0, 1.0]
        assert where.metrics[ORDER_FLIPS] == 1.0

    def test_flips_are_counted_over_all_pairs_of_all_calls(self):
        def prefer(context, a, b):
            return 0.9 if {a, b} == {"a", "b"} else float(a < b)

        judge, where = Preferring(prefer=prefer, name="j"), live()
        judge([group("a", "b", "c")], where)
        judge([group("b", "c"), group("c")], where)
        assert where.memory[ORDER_FLIPS].tolist() == [1.0, 4.0]
        assert where.metrics[ORDER_FLIPS] == 0.25

    def test_a_comparison_is_given_the_context_and_must_be_a_probability(self):
        judge = Preferring(prefer=lambda context, a, b: context, name="odd")
        close(one(judge, "a", "b", context=0.3).preference, [[0.5, 0.5], [0.5, 0.5]])
        with pytest.raises(ValueError, match=r"odd returned .*probabilities in \[0, 1\]"):
            one(judge, "a", "b", context=1.5)


class TestWinRate:
    def test_spo_counts_the_wins_over_the_others(self):
        close(one(WinRate(of=says(preference=CYCLE), with_self=False)).score, [0.55, 0.6, 0.35])

    def test_sppo_counts_the_candidate_itself_as_half_a_win(self):
        verdict = one(WinRate(of=says(preference=CYCLE), with_self=True))
        close(verdict.score, [1.6 / 3, 1.7 / 3, 1.2 / 3])
        close(verdict.preference, CYCLE)

    def test_scores_win_by_bradley_terry(self):
        verdict = one(WinRate(of=says(score=[0.8, 0.35]), with_self=True), "a", "b")
        p = 1 / (1 + math.exp(-0.45))
        close(verdict.score, [(0.5 + p) / 2, (1.5 - p) / 2])

    @pytest.mark.parametrize("with_self", [False, True])
    def test_a_candidate_alone_has_half_a_win(self, with_self):
        close(one(WinRate(of=says(score=[3.0]), with_self=with_self), "a").score, [0.5])


def test_bradley_terry_is_the_sigmoid_of_the_scaled_difference():
    verdict = one(BradleyTerry(of=says(score=[1.0, 0.0]), temperature=0.5), "a", "b")
    p = 1 / (1 + math.exp(-2))
    close(verdict.preference, [[0.5, p], [1 - p, 0.5]])
    close(verdict.score, [1.0, 0.0])


def test_bradley_terry_of_preferences_is_refused():
    with pytest.raises(ValueError, match="of must give score; Says gives preference"):
        BradleyTerry(of=says(preference=CYCLE))


class TestAgreement:
    # Ranks of five answers, as CREAM's example has them.
    A, B = [3.0, 1.0, 2.0, 5.0, 4.0], [2.0, 1.0, 3.0, 5.0, 4.0]

    def test_kendall_of_creams_example_gives_point_nine(self):
        assert kendall(torch.tensor(self.A), torch.tensor(self.B)) == pytest.approx(0.8)
        judge = Agreement(of=says(score=self.A), other=says(score=self.B))
        verdict = one(judge, *"abcde")
        assert verdict.consistency == pytest.approx(0.9)
        close(verdict.score, self.A)

    def test_kendall_with_ties_is_tau_b(self):
        a, b = torch.tensor([1.0, 1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 3.0, 1.0])
        # Pairs: 01 tied in a; 02 ++; 03 tied in b; 12 ++; 13 +-; 23 +-: (2 - 2) / sqrt(5 * 5) = 0.
        assert kendall(a, b) == pytest.approx(0.0)
        c = torch.tensor([1.0, 2.0, 3.0, 4.0])
        # Against no ties: 5 concordant, none discordant: 5 / sqrt(5 * 6).
        assert kendall(a, c) == pytest.approx(5 / math.sqrt(30))

    def test_spearman_by_hand(self):
        # Squared rank differences 1 + 0 + 1: 1 - 6 * 2 / (5 * 24) = .9.
        assert spearman(torch.tensor(self.A), torch.tensor(self.B)) == pytest.approx(0.9)

    def test_spearman_gives_ties_their_mean_rank(self):
        # Ranks (1.5, 1.5, 3) and (1, 2, 3): covariance 1.5, variances 1.5 and 2.
        assert spearman(torch.tensor([0.0, 0.0, 1.0]), torch.tensor([5.0, 6.0, 7.0])) == pytest.approx(
            1.5 / math.sqrt(1.5 * 2)
        )

    def test_rankings_that_say_nothing_count_as_chance(self):
        judge = Agreement(of=says(score=[1.0, 1.0, 1.0]), other=says(score=[1.0, 2.0, 3.0]))
        assert one(judge).consistency == 0.5
        alone = Agreement(of=says(score=[1.0]), other=says(score=[1.0]))
        assert one(alone, "a").consistency == 0.5

    def test_top_order_compares_the_best_and_worst_candidates_and_not_the_first_and_last_listed(self):
        a = torch.tensor([2.0, 4.0, 1.0, 3.0])
        # Best (1) and worst (2) agree while the listed first and last swap ranks.
        assert top_order(a, torch.tensor([3.0, 4.0, 1.0, 2.0])) == 1.0
        # The first and last listed have the same ranks, best and worst do not.
        assert top_order(a, torch.tensor([2.0, 1.0, 4.0, 3.0])) == -1.0
        # The same best with another worst does not do, nor the other way round.
        assert top_order(a, torch.tensor([1.0, 4.0, 2.0, 3.0])) == -1.0
        assert top_order(a, torch.tensor([4.0, 3.0, 1.0, 2.0])) == -1.0
        judge = Agreement(of=says(score=[1.0, 2.0]), other=says(score=[2.0, 1.0]), measure="top_order")
        assert one(judge, "a", "b").consistency == 0.0

    def test_over_a_call_every_group_has_the_mean(self):
        other = Scored(measure=lambda context, candidates: context, name="other")
        judge = Agreement(of=says(score=[1.0, 2.0]), other=other, over="call")
        same, opposite = (group("a", "b", context=c) for c in ([1.0, 2.0], [2.0, 1.0]))
        assert [v.consistency for v in judge([same, opposite, same], live())] == [pytest.approx(2 / 3)] * 3

    def test_preferences_are_ranked_by_their_mean(self):
        judge = Agreement(of=says(preference=CYCLE), other=says(score=[2.0, 3.0, 1.0]))
        assert one(judge).consistency == 1.0

    def test_an_unknown_measure_is_named_with_the_valid_ones(self):
        with pytest.raises(ValueError, match="measure='pearson' must be one of kendall, spearman, top_order"):
            Agreement(of=says(score=[1.0]), other=says(score=[1.0]), measure="pearson")


class TestEnsemble:
    MEMBERS = ([3.0, 1.0, 2.0], [6.0, 2.0, 2.0], [0.0, 10.0, 5.0], [1.0, 1.0, 0.0])

    def score(self, how, *members):
        return one(Ensemble(of=[says(score=m) for m in members or self.MEMBERS], how=how)).score

    def test_mean_min_max_and_median(self):
        close(self.score("mean"), [2.5, 3.5, 2.25])
        close(self.score("min"), [0.0, 1.0, 0.0])
        close(self.score("max"), [6.0, 10.0, 5.0])
        close(self.score("median"), [2.0, 1.5, 2.0])

    def test_votes_are_wins_over_judges_and_rivals(self):
        # RankDPO's phi, wins / (2 judges * 2 rivals): (2 + 2), (0 + .5), (1 + .5) of 4.
        close(self.score("vote", *self.MEMBERS[:2]), [1.0, 0.125, 0.375])

    def test_votes_see_differences_that_a_sigmoid_rounds_away(self):
        close(self.score("vote", [1e-9, 0.0, -1e-9]), [1.0, 0.5, 0.0])

    def test_preferring_judges_vote_too(self):
        judge = Ensemble(of=[says(preference=CYCLE), says(score=[3.0, 2.0, 1.0])], how="vote")
        verdict = one(judge)
        close(verdict.preference, [[0.5, 1.0, 0.5], [0.0, 0.5, 1.0], [0.5, 0.0, 0.5]])
        close(verdict.score, [0.75, 0.5, 0.25])

    def test_normalised_members_count_alike_whatever_their_scale(self):
        small, large = [1.0, 2.0, 3.0], [300.0, 100.0, 200.0]
        close(self.score("normalised", small, large), [0.0, -0.5, 0.5])

    def test_members_scores_stay_as_users(self):
        verdict = one(Ensemble(of=[says(score=m) for m in self.MEMBERS[:2]]))
        close(verdict.users, [[3.0, 6.0], [1.0, 2.0], [2.0, 2.0]])
        close(one(OverUsers(of=Ensemble(of=[says(score=[3.0, 1.0, 2.0])]), how="min")).score, [3.0, 1.0, 2.0])

    def test_no_member_is_refused(self):
        with pytest.raises(ValueError, match=r"of=\[\] must be a list of at least one judge"):
            Ensemble(of=[])

    def test_combine_is_a_weighted_sum(self):
        members = [says(score=m) for m in self.MEMBERS[:2]]
        close(one(Combine(of=members, weights=[1.0, -0.5])).score, [0.0, 0.0, 1.0])
        with pytest.raises(ValueError, match=r"weights=\[1.0\] must be one for each of 2 judges"):
            Combine(of=members, weights=[1.0])


class TestOverUsers:
    USERS = ([1.0, 3.0], [2.0, 2.5])

    @pytest.mark.parametrize(
        ("how", "weights", "expected"),
        [("mean", None, [2.0, 2.25]), ("min", None, [1.0, 2.0]), ("weighted", [3, 1], [1.5, 2.125])],
    )
    def test_scores_of_users_become_one(self, how, weights, expected):
        judge = OverUsers(of=says(users=[*self.USERS]), how=how, weights=weights)
        close(one(judge, "a", "b").score, expected)

    def test_weights_go_with_weighted_and_fit_the_users(self):
        with pytest.raises(ValueError, match="goes with how=weighted"):
            OverUsers(of=says(users=[*self.USERS]), how="mean", weights=[1, 1])
        with pytest.raises(ValueError, match="3 weights for 2 users"):
            one(OverUsers(of=says(users=[*self.USERS]), how="weighted", weights=[1, 1, 1]), "a", "b")

    def test_a_judge_without_users_is_refused(self):
        with pytest.raises(ValueError, match="of must give users; Says gives score"):
            OverUsers(of=says(score=[1.0]))


class TestMinus:
    def test_length_is_the_number_of_units(self):
        mask = torch.tensor([[True, True, True], [True, False, False]])
        verdict = one(Minus(of=says(score=[1.0, 1.0]), coefficient=0.1), "a", "b", mask=mask)
        close(verdict.score, [0.7, 0.9])

    def test_log_ratio_is_the_kl_penalty_over_own_units(self):
        mask = torch.tensor([[True, True], [True, False]])
        judge = Minus(of=says(score=[1.0, 1.0]), coefficient=0.5, what="log_ratio")
        logp, ref = torch.tensor([[-1.0, -2.0], [-1.0, 0.0]]), torch.tensor([[-2.0, -2.5], [-0.5, math.nan]])
        close(one(judge, "a", "b", mask=mask, logp=logp, ref=ref).score, [0.25, 1.25])
        assert judge.needs == {"logp", "ref"}
        with pytest.raises(ValueError, match="needs log-probs of policy and reference"):
            one(judge, "a", "b")

    def test_another_judge_may_be_the_penalty(self):
        judge = Minus(of=says(score=[1.0, 1.0]), coefficient=0.5, what=Scored(measure=lengths, name="length"))
        close(one(judge, "aa", "b").score, [0.0, 0.5])

    def test_preferences_without_the_penalty_do_not_survive(self):
        judge = Minus(of=says(score=[1.0, 0.0], preference=[[0.5, 0.9], [0.1, 0.5]]), coefficient=1.0)
        assert one(judge, "a", "b").preference is None
        assert "preference" not in judge.gives

    def test_an_unknown_penalty_is_named(self):
        with pytest.raises(ValueError, match="what='size' must be one of length, log_ratio"):
            Minus(of=says(score=[1.0]), coefficient=1.0, what="size")


@dataclass
class Context:
    candidates: tuple = ()
    fields: dict = field(default_factory=dict)


class TestGap:
    judge = Gap(of=Scored(measure=lengths, name="length"))

    def test_the_groups_own_reference_answer_is_the_level(self):
        verdict = one(self.judge, "aaa", "b", "cc", origin=("policy", "policy", "data"))
        close(verdict.score, [1.0, -1.0, 0.0])

    def test_else_the_first_of_the_contexts_candidates(self):
        groups = [
            group("aaa", "b", context=Context(("dddd", "")), key="1"),
            group("a", "bb", origin=("policy", "data")),
        ]
        first, second = self.judge([*groups, group("a", context=Context(("b",)))], live())[:2]
        close(first.score, [-1.0, -3.0])
        close(second.score, [-1.0, 0.0])

    def test_without_a_reference_answer_the_group_is_named(self):
        with pytest.raises(ValueError, match="group x has no reference answer"):
            one(self.judge, "a", context=Context())

    def test_a_judge_that_needs_log_probs_of_the_reference_is_refused(self):
        with pytest.raises(ValueError, match="which a reference answer lacks"):
            Gap(of=Minus(of=says(score=[1.0]), coefficient=1.0, what="log_ratio"))


class TestFlipped:
    def test_the_rate_of_flipped_pairs_is_the_rate_and_both_sides_agree(self):
        judge = Flipped(of=says(score=[1.0, 0.0]), rate=0.3)
        verdicts = judge([group("a", "b", key=str(i)) for i in range(1000)], live())
        flipped = sum(v.preference[0, 1].item() < 0.5 for v in verdicts)
        assert 255 < flipped < 345  # three standard deviations
        assert all((v.preference + v.preference.T - 1).abs().max() < 1e-6 for v in verdicts)
        assert all(v.score is None for v in verdicts)

    def test_noise_depends_on_the_group_and_the_round_and_not_on_the_batch(self):
        judge = Flipped(of=says(score=list(map(float, range(6)))), rate=0.5)
        a, b = (group(*"abcdef", key=k) for k in "ab")
        together = judge([a, b, b], live())
        assert torch.equal(judge([b], live())[0].preference, together[1].preference)
        assert not torch.equal(together[0].preference, together[1].preference)
        assert not torch.equal(together[1].preference, together[2].preference)
        assert not torch.equal(judge([b], live(round=1))[0].preference, together[1].preference)

    @pytest.mark.parametrize(
        ("rate", "expected"), [(0.0, CYCLE), (1.0, [list(r) for r in zip(*CYCLE, strict=True)])]
    )
    def test_no_noise_changes_nothing_and_full_noise_turns_all_round(self, rate, expected):
        close(one(Flipped(of=says(preference=CYCLE), rate=rate)).preference, expected)


class TestBuilding:
    def test_judges_nest_by_name_and_options(self):
        judge = build_judge(
            PlugConfig(
                name="agreement",
                options={
                    "of": {"name": "win_rate", "options": {"of": says(score=[1.0, 2.0]), "with_self": False}},
                    "other": says(score=[1.0, 2.0]),
                },
            )
        )
        assert isinstance(judge, Agreement)
        assert isinstance(judge.of, WinRate)
        assert judge.gives == {"score", "preference", "consistency"}
        assert one(judge, "a", "b").consistency == 1.0

    def test_lists_of_judges_are_built_too(self):
        member = {"name": "bradley_terry", "options": {"of": says(score=[1.0, 0.0])}}
        judge = build_judge({"name": "ensemble", "options": {"of": [member, member], "how": "vote"}})
        close(one(judge, "a", "b").score, [1.0, 0.0])

    def test_a_built_judge_is_returned_as_it_is(self):
        judge = says(score=[1.0])
        assert build_judge(judge) is judge

    def test_errors_name_the_way_to_the_nested_judge(self):
        inner = {"name": "bradley_tery", "options": {}}
        with pytest.raises(
            ValueError, match=r"judge 'win_rate': no judge 'bradley_tery'. Did you mean 'bradley_terry'"
        ):
            build_judge({"name": "win_rate", "options": {"of": inner, "with_self": True}})
        with pytest.raises(ValueError, match="judge 'win_rate' has no option 'self'; it takes of, with_self"):
            build_judge({"name": "win_rate", "options": {"of": says(score=[1.0]), "self": True}})
        with pytest.raises(ValueError, match=r"a judge is \{name, options\}, not \{name, option\}"):
            build_judge({"name": "win_rate", "option": {}})
        with pytest.raises(ValueError, match="is no judge: give a built one"):
            build_judge({"name": "win_rate", "options": {"of": "vader", "with_self": True}})

    def test_what_nested_judges_need_and_remember_is_passed_on(self):
        class Remembering(Says):
            remembers = True

        inner = Remembering(verdict=Verdict(score=torch.tensor([1.0])), needs=frozenset({"value"}))
        judge = BradleyTerry(of=Ensemble(of=[says(score=[1.0]), inner]))
        assert judge.needs == {"value"}
        assert judge.remembers
        assert not BradleyTerry(of=says(score=[1.0])).remembers

    def test_every_judge_is_registered(self):
        adapters = "agreement bradley_terry combine ensemble flipped gap minus over_users win_rate"
        assert set(adapters.split()) <= set(JUDGES.names())

    def test_a_judge_that_skips_a_group_is_named(self):
        class Skipping(Says):
            def __call__(self, groups, live):
                return []

        judge = WinRate(of=Skipping(verdict=Verdict(score=torch.tensor([1.0]))), with_self=True)
        with pytest.raises(ValueError, match="judge Skipping gave 0 verdicts of 1 groups"):
            one(judge, "a")


def test_aspects_reduce_to_their_mean():
    """UltraFeedback's four ratings (2, 3, 3, 3) of one answer."""
    judge = OverUsers(of=says(users=torch.tensor([[2.0, 3.0, 3.0, 3.0], [5.0, 1.0, 1.0, 1.0]])))
    assert judge([group("a", "b")], live())[0].score.tolist() == [2.75, 2.0]
