"""Credit of units: a critic's, of turns and of steps, by hand-worked numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judged import JUNK, group
from torch import Tensor

from triptych.objectives import UnitLogLik, build
from triptych.training.credits import CREDITS
from triptych.training.groups import Group, Verdict


def advantage(name: str, of: Group, **options: Any) -> Tensor:
    return CREDITS.build(name, options)(of)["advantage"]


def test_gae_has_the_golden_advantages_returns_and_losses_of_ppo():
    of = group(
        {"score": [1.0]}, [3], logp=[[0.1, -0.05, 0.2]], ref=[[0.0, 0.0, 0.0]], value=[[0.1, 0.2, 0.4]]
    )
    credit = CREDITS.build("gae", {"kl": 0.05})
    fields = credit(of)
    assert fields["advantage"][0].tolist() == pytest.approx([0.81985, 0.763, 0.59], abs=1e-6)
    assert fields["target"][0].tolist() == pytest.approx([0.91985, 0.963, 0.99], abs=1e-6)
    assert torch.equal(fields["old_value"], torch.tensor([[0.1, 0.2, 0.4]]))
    units = UnitLogLik(
        logp=torch.tensor([[0.1, -0.3, 0.25]]),
        mask=of.mask,
        old=torch.zeros(1, 3),
        value=torch.tensor([[0.15, 0.1, 0.9]]),
        **fields,
    )
    policy, value = build("ppo", clip=0.2)(units).item(), build("ppo_value", clip=0.2)(units).item()
    assert (policy, value) == pytest.approx((-0.72644, 0.248256), abs=1e-6)
    assert policy + 0.1 * value == pytest.approx(-0.701614, abs=1e-6)


def test_gae_puts_the_score_at_each_rows_own_last_unit_and_0_at_padding():
    of = group({"score": [2.0, 5.0]}, [1, 3], value=[[0.5, JUNK, JUNK], [0.0, 0.0, 1.0]])
    fields = CREDITS.build("gae", {"lam": 0.0})(of)
    assert fields["advantage"].tolist() == [[1.5, 0.0, 0.0], [0.0, 1.0, 4.0]]
    assert fields["old_value"].tolist() == [[0.5, 0.0, 0.0], [0.0, 0.0, 1.0]]


def test_gae_without_values_says_that_it_needs_a_critic():
    with pytest.raises(ValueError, match="group g: credit 'gae' needs the critic's values"):
        advantage("gae", group({"score": [1.0]}, [1]))


def two_turns(first: float, second: float, kl: tuple[float, float] = (0.0, 0.0)) -> dict[str, Any]:
    """Rows of two units a turn with rewards at the last ones; all of a turn's k1 at its first unit."""
    return {
        "units": [0.0, first, JUNK, 0.0, second],
        "turn": [0, 0, 7, 1, 1],
        "ratio": [kl[0], 0.0, JUNK, kl[1], 0.0],
    }


def turns(*rows: dict[str, Any]) -> Group:
    """A group of two-turn rows, whose third unit is the second prompt: nobody's."""
    mask = torch.tensor([[True, True, False, True, True]] * len(rows))
    return Group(
        key="g",
        context="x",
        candidates=tuple(range(len(rows))),
        mask=mask,
        turn=torch.tensor([r["turn"] for r in rows]),
        logp=torch.tensor([r["ratio"] for r in rows]),
        ref=torch.zeros(len(rows), 5),
        verdict=Verdict(units=torch.tensor([r["units"] for r in rows])),
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"weight_per_turn": [0.0, 1.0], "kl_per_turn": [0.1, 0.01]}, 0.968),
        ({"alpha": 10.0, "kl_per_turn": [0.01, 0.01]}, 10.995),
    ],
)
def test_turn_rewards_add_up_to_both_objectives_of_score(options: dict[str, Any], expected: float):
    credit: Any = CREDITS.build("per_turn", options)
    reward, _ = credit.rewards(turns(two_turns(0.0, 1.0, (0.3, 0.2))))
    assert reward.sum().item() == pytest.approx(expected, abs=1e-6)


def test_a_turn_sees_only_its_own_reward_unless_asked_for_the_return():
    of = turns(two_turns(1.0, 0.0), two_turns(0.0, 1.0))
    own = advantage("per_turn", of, alpha=10.0)
    # Turn rewards are (1, -10) and (0, 11).
    assert own.tolist() == [[0.5, 0.5, 0.0, -10.5, -10.5], [-0.5, -0.5, 0.0, 10.5, 10.5]]
    whole = advantage("per_turn", of, alpha=10.0, credit="return")
    # Returns are (-9, -10) and (11, 11): the whole return pays for failing the first turn.
    assert whole.tolist() == [[-10.0, -10.0, 0.0, -10.5, -10.5], [10.0, 10.0, 0.0, 10.5, 10.5]]


def test_the_leave_one_out_baseline_of_turns_doubles_the_mean_one_of_two_rows():
    of = turns(two_turns(1.0, 0.0), two_turns(0.0, 1.0))
    mean = advantage("per_turn", of)
    assert torch.allclose(advantage("per_turn", of, baseline="leave_one_out"), 2 * mean)


def test_a_turn_that_a_row_does_not_have_counts_in_no_mean():
    of = Group(
        key="g",
        context="x",
        candidates=(0, 1, 2),
        mask=torch.tensor([[True, True], [True, True], [True, False]]),
        turn=torch.tensor([[0, 1]] * 3),
        verdict=Verdict(units=torch.tensor([[1.0, 3.0], [0.0, 1.0], [2.5, JUNK]])),
    )
    # The third row has no second turn: no bonus of -2.5 for it, and the mean of the second turn is 2.
    assert advantage("per_turn", of, credit="return").tolist() == [[1.5, 1.0], [-1.5, -1.0], [0.0, 0.0]]
    # Second-turn rewards with the bonus are 3 + (3 - 1) = 5 and 1 + (1 - 0) = 2.
    assert advantage("per_turn", of, alpha=1.0)[:, 1].tolist() == [1.5, -1.5, 0.0]
    # Returns are then 1 + 5, 0 + 2 and 2.5, less their mean of 3.5.
    whole = advantage("per_turn", of, alpha=1.0, credit="return")
    assert whole[:, 0].tolist() == [2.5, -1.5, -1.0]


def test_too_few_coefficients_for_the_turns_are_named():
    with pytest.raises(ValueError, match=r"group g has 2 turns, and weight_per_turn=\[1.0\] has 1"):
        advantage("per_turn", turns(two_turns(0.0, 1.0)), weight_per_turn=[1.0])


def test_an_unknown_credit_of_turns_is_refused_with_the_valid_ones():
    with pytest.raises(ValueError, match="credit='full' is not one of own, return"):
        CREDITS.build("per_turn", {"credit": "full"})


def test_step_advantages_compare_siblings_at_the_same_step():
    of = group({"units": [[1.0, 5.0], [0.0, 3.0], [0.5, JUNK]]}, [2, 2, 1])
    found = advantage("step_advantage", of, eps=0.0)
    assert torch.allclose(found, torch.tensor([[1.0, 0.7071068], [-1.0, -0.7071068], [0.0, 0.0]]))
