"""Sources and judges of tabular rounds: what they draw is distributed as they say."""

import math
from dataclasses import replace

import pytest
import torch
from tabular_cases import D, like, normal, policy, same

from triptych.modalities.tabular import games
from triptych.modalities.tabular.judges import JUDGES
from triptych.modalities.tabular.policy import TabularPolicy
from triptych.modalities.tabular.port import Arm, Context, TabularPort
from triptych.modalities.tabular.sources import SOURCES, blended, listing
from triptych.objectives import Term, Terms, build
from triptych.training.groups import Group, preferences_of
from triptych.training.references import Cached, FrozenCopy, Snapshot
from triptych.training.shapes import SHAPES
from triptych.training.stages import Keep, Live, Part, Stage

ASKED = Context(key="asked")
ANSWERED = Context(key="answered", prefix=(1,), candidates=(Arm((2,)), Arm((0,))), relevance=(1.0, 0.0))
MANY = {"num_candidates": 20_000}


def live(p: TabularPolicy | None = None, **rest) -> Live:
    p = policy() if p is None else p
    references = {"frozen": FrozenCopy.of(like(p, seed=1))}
    port = TabularPort(num_actions=p.num_actions)
    return Live(policy=p, port=port, references=references, device=torch.device("cpu"), seed=0, **rest)


def draw(name: str, options: dict, contexts=(ASKED,), **rest) -> Group:
    return SOURCES.build(name, options)(list(contexts), live(**rest))[-1]


def shares(group: Group, origin: str) -> torch.Tensor:
    """How often each of the seven candidates was drawn."""
    known = policy().all_candidates()
    found = [
        known.index(a.actions) for a, o in zip(group.candidates, group.origin, strict=True) if o == origin
    ]
    return torch.bincount(torch.tensor(found), minlength=7) / len(found)


def near(found: torch.Tensor, logp: torch.Tensor, num: int) -> None:
    """Within four standard deviations of each share."""
    p = logp.detach().exp().float()
    assert ((found - p).abs() < 4 * (p * (1 - p) / num).sqrt()).all(), (found, p)


def reference() -> torch.Tensor:
    return like(policy(), seed=1).distribution()


def test_on_draws_from_the_policy_with_its_log_probs():
    group = draw("on", MANY)
    near(shares(group, "policy"), policy().distribution(), 20_000)
    known = {c: i for i, c in enumerate(policy().all_candidates())}
    index = [known[a.actions] for a in group.candidates]
    assert group.logp is not None
    assert torch.allclose(group.drawn_logp(), policy().distribution().detach()[index].float())
    assert torch.equal(group.count, torch.tensor([float(len(a.actions)) for a in group.candidates]))
    assert not group.logp[~group.mask].any()


def test_calibration_samples_come_from_the_reference_and_say_so():
    group = draw("on", {"num_candidates": 3, "calibration": 10_000})
    assert group.origin[:4] == ("policy",) * 3 + ("reference",)
    near(shares(group, "reference"), reference(), 10_000)
    source = SOURCES.build("on", {"calibration": 1})
    assert source.provides == {"logp", "calibration", "proposal"}
    assert not source.fresh
    assert SOURCES.build("on").fresh


def test_on_reference_draws_from_it_with_its_proposals():
    group = draw("on_reference", MANY)
    near(shares(group, "reference"), reference(), 20_000)
    known = {c: i for i, c in enumerate(policy().all_candidates())}
    index = [known[a.actions] for a in group.candidates]
    assert torch.allclose(group.drawn_logp(), reference().detach()[index].float())
    assert group.logp is not None
    assert torch.allclose(group.logp.sum(-1), policy().distribution().detach()[index].float())


def test_blends_are_normalised_over_candidates_or_at_each_unit():
    """The two differ: .3 of the way in log-probs, against conditionals each .3 of the way."""
    now, p = live(), policy()
    listed = listing(ASKED, now)
    whole = blended(listed, now, slot="frozen", coefficient=0.3, level="sequence")
    same(whole, (0.7 * p.distribution() + 0.3 * reference()).log_softmax(-1))
    by_unit = blended(listed, now, slot="frozen", coefficient=0.3, level="unit")
    table = 0.7 * p.conditionals() + 0.3 * like(p, seed=1).conditionals()
    same(by_unit, TabularPolicy(table, length=2, stop=2).distribution())
    assert (whole - by_unit).abs().max() > 1e-2


@pytest.mark.parametrize("level", ["sequence", "unit"])
def test_blend_draws_from_the_mixture_and_first_from_the_policy(level):
    options = {"coefficient": 0.3, "num_candidates": 20_000, "own": 10_000, "level": level}
    group = draw("blend", options)
    now = live()
    mixed = blended(listing(ASKED, now), now, slot="frozen", coefficient=0.3, level=level)
    near(shares(group, "policy"), policy().distribution(), 10_000)
    near(shares(group, "blend"), mixed, 10_000)
    known = {c: i for i, c in enumerate(policy().all_candidates())}
    assert group.drawn_logp()[-1].item() == pytest.approx(mixed[known[group.candidates[-1].actions]].item())


@pytest.mark.parametrize(("coefficient", "expected"), [(0.0, policy), (1.0, lambda: like(policy(), seed=1))])
def test_the_ends_of_a_blend_are_the_policy_and_the_reference(coefficient, expected):
    now = live()
    for level in ("sequence", "unit"):
        found = blended(listing(ASKED, now), now, slot="frozen", coefficient=coefficient, level=level)
        same(found, expected().distribution())


def test_everything_lists_each_candidate_once_under_a_uniform_proposal():
    group = draw("everything", {})
    assert tuple(a.actions for a in group.candidates) == policy().all_candidates()
    assert group.drawn_logp().tolist() == pytest.approx([-math.log(7)] * 7)
    assert group.logp is not None
    assert group.logp.sum(-1).exp().sum().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="context asked has 7 candidates, more than 6"):
        draw("everything", {"num_candidates": 6})


def test_turns_number_the_turns():
    group = draw("turns", {"num_candidates": 3})
    assert group.unit == "turn"
    assert group.turn is not None
    assert group.turn[0].tolist() == list(range(group.mask.shape[1]))


def test_beams_are_the_likeliest_and_no_samples():
    group = draw("beams", {"num_candidates": 3})
    order = policy().distribution().argsort(descending=True).tolist()[:3]
    assert [a.actions for a in group.candidates] == [policy().all_candidates()[i] for i in order]
    with pytest.raises(ValueError, match="data or beams"):
        group.drawn_logp()


def test_data_are_the_contexts_own_candidates_and_grades():
    group = draw("data", {}, [ANSWERED])
    assert group.candidates == ANSWERED.candidates
    assert group.mask.tolist() == [[True], [True]]
    assert group.verdict.score is not None
    assert group.verdict.score.tolist() == [1.0, 0.0]
    assert group.logp is None


def test_data_without_grades_or_unknown_to_the_policy_are_refused():
    with pytest.raises(ValueError, match="context asked has 0 candidates and 0 relevances; expected 1 to 2"):
        draw("data", {})
    wrong = Context(key="wrong", candidates=(Arm((2, 2)),), relevance=(1.0,))
    with pytest.raises(ValueError, match=r"context wrong: \(2, 2\) is not a candidate"):
        draw("data", {}, [wrong])


@pytest.mark.parametrize("name", ["on", "on_reference", "everything", "turns", "beams"])
def test_a_prefix_is_completed_and_not_drawn_again(name):
    group = draw(name, {}, [ANSWERED])
    assert all(len(a.actions) == 1 for a in group.candidates)
    assert group.depth == 1
    known = policy().distribution(prefix=(1,)).detach().float()
    if group.logp is not None:
        expected = [known[a.actions[0]].item() for a in group.candidates]
        assert group.logp.sum(-1).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["on", "on_reference", "blend", "turns"])
def test_draws_depend_on_the_context_and_the_round_and_on_nothing_else(name):
    options = {"num_candidates": 30} | ({"coefficient": 0.5} if name == "blend" else {})
    torch.manual_seed(1)
    alone = draw(name, options)
    among = draw(name, options, [Context(key="other"), ASKED])
    assert alone.candidates == among.candidates
    assert alone.candidates != draw(name, options, round=1).candidates
    assert alone.candidates != draw(name, options, [Context(key="other")]).candidates


def test_a_reference_that_is_the_policys_own_snapshot_is_drawn_from_as_it_was():
    p = policy()
    now = live(p)
    now.references = {"stage": Snapshot.of(p)}  # type: ignore[misc]
    before = p.distribution().detach().clone()
    with torch.no_grad():
        p.logits.add_(normal(*p.logits.shape, seed=9))
    same(listing(ASKED, now).reference(now, "stage"), before)
    assert (p.distribution() - before).abs().max() > 0.1


def test_a_slot_that_is_not_there_is_named_with_those_that_are():
    with pytest.raises(ValueError, match="no reference 'ema'; this round has frozen"):
        draw("on_reference", {"slot": "ema"})
    now = live()
    now.references = {"frozen": Cached(None, "x")}  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without a source cannot be sampled"):
        SOURCES.build("on_reference")([ASKED], now)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": 1.5}, r"coefficient=1.5 must be in \[0, 1\]"),
        ({"coefficient": 0.5, "own": 2}, "own=2 must be at least 0 and below num_candidates=2"),
        ({"coefficient": 0.5, "level": "token"}, "level='token' is not one of sequence, unit"),
    ],
)
def test_wrong_options_of_a_blend_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SOURCES.build("blend", options)


def test_judges_read_rewards_and_preferences_from_their_tables():
    now = live()
    (group,) = SOURCES.build("data")([ANSWERED], now)
    table = JUDGES.build("table", {"reward": [[10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0]]})
    (verdict,) = table([group], now)
    # (1, 2) and (1, 0) stand at places 5 and 3.
    assert verdict.score is not None
    assert verdict.score.tolist() == [15.0, 13.0]
    scores = torch.linspace(0, 3, 7, dtype=D)
    game = games.bradley_terry_game(scores)
    (verdict,) = JUDGES.build("game", {"preference": game.tolist()})([group], now)
    expected = torch.sigmoid(scores[[5, 3]].unsqueeze(-1) - scores[[5, 3]]).float()
    assert verdict.preference is not None
    assert torch.allclose(verdict.preference, expected)
    assert "win_rate" in JUDGES.names()


def test_game_judges_feed_the_common_adapters():
    now = live()
    (group,) = SOURCES.build("everything")([ASKED], now)
    game = games.bradley_terry_game(torch.linspace(0, 3, 7))
    judge = JUDGES.build("game", {"preference": game.tolist()})
    (verdict,) = JUDGES.build("win_rate", {"of": judge, "with_self": False})([group], now)
    assert verdict.score is not None
    assert verdict.score.tolist() == pytest.approx(((game.sum(-1) - 0.5) / 6).tolist(), abs=1e-6)
    found = preferences_of(replace(group, verdict=verdict))
    assert torch.allclose(found, game.float())


@pytest.mark.parametrize("name", ["on", "turns"])
def test_fresh_sources_may_feed_policy_gradients_and_others_may_not(name):
    def stage(source: str, options: dict) -> Stage:
        part = Part(
            source=SOURCES.build(source, options),
            judge=JUDGES.build("table", {"reward": [[0.0] * 7]}),
            shape=SHAPES.build("units", {"credit": "leave_one_out"}),
            terms=Terms((Term(build("rloo", clip=0.2)),)),
        )
        return Stage(name="one", parts=(part,), keep=Keep(), num_rounds=1, num_contexts=1)

    assert stage(name, {}).main.source.fresh
    for other in ("beams", "data", "everything", "on_reference"):
        with pytest.raises(ValueError, match="rloo needs fresh samples"):
            stage(other, {})
