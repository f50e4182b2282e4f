from dataclasses import dataclass

import pytest
import torch
from round_cases import run, stage, terms

from triptych.training.drift import Drifting, drift
from triptych.training.groups import Verdict
from triptych.training.judging import JUDGES, build_judge


def everyone(n):
    return ~torch.eye(n, dtype=torch.bool)


def test_a_value_moves_towards_friends_within_its_bound():
    values = torch.tensor([[0.5], [0.6], [0.55], [0.9]])
    friends = torch.zeros(4, 4, dtype=torch.bool)
    friends[0, 1:] = True
    moved = drift(values, friends, bound=0.2, rate=0.3)
    # .5 + .3 * mean(.1, .05): the friend at .9 is too far away.
    assert moved[0].item() == pytest.approx(0.5225)
    assert torch.equal(moved[1:], values[1:])


def test_a_wide_bound_leads_to_consensus_and_a_narrow_one_to_clusters():
    values = torch.tensor([[0.0], [0.1], [0.9], [1.0]])
    wide, narrow = values, values
    for _ in range(60):
        wide = drift(wide, everyone(4), bound=2.0, rate=0.5)
        narrow = drift(narrow, everyone(4), bound=0.3, rate=0.5)
    assert wide.std() < 1e-4
    assert wide.mean() == pytest.approx(0.5, abs=1e-6)
    torch.testing.assert_close(narrow, torch.tensor([[0.05], [0.05], [0.95], [0.95]]), atol=1e-4, rtol=0)


@dataclass(frozen=True)
class Aspects:
    """Two aspects of an arm: being the first one, being the last one."""

    gives = frozenset({"users"})
    needs = frozenset()

    def __call__(self, groups, live):
        return [
            Verdict(
                users=torch.tensor(
                    [[float(c.actions[0] == 0), float(c.actions[0] == 3)] for c in g.candidates]
                )
            )
            for g in groups
        ]


def drifting(**changes):
    settings = {"values": [[1.0, 0.0], [0.8, 0.2]], "friends": [(0, 1)], "bound": 1.0, "rate": 0.5}
    return Drifting(of=Aspects(), **(settings | changes))


def test_a_judge_drifts_once_a_round_and_a_resumed_run_drifts_on(tmp_path):
    stages = [stage(terms("dpo", beta=0.1), judge=drifting(), num_rounds=3)]
    _, outcome, whole = run(tmp_path / "whole", stages)
    # Two drifts of three rounds: each user half way to the other, then both in the middle.
    torch.testing.assert_close(
        whole.memory["judge/drifting"], torch.tensor([[0.9, 0.1], [0.9, 0.1]]), atol=1e-6, rtol=0
    )
    run(tmp_path / "cut", stages, stop_after=3)
    _, again, resumed = run(tmp_path / "cut", stages)
    assert again.step == outcome.step
    assert torch.equal(resumed.memory["judge/drifting"], whole.memory["judge/drifting"])


def test_what_cannot_be_is_refused():
    for changes, message in [
        ({"values": []}, "values needs one row a user"),
        ({"values": [[1.0], [1.0, 0.0]]}, "all of the same number of aspects"),
        ({"friends": [(0, 2)]}, r"friends=\(0, 2\) names a user that is not among the 2"),
        ({"rate": 1.5}, r"rate=1\.5 in \[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            drifting(**changes)
    assert "drifting" in JUDGES.names()
    with pytest.raises(ValueError, match="judge 'drifting' needs"):
        build_judge({"name": "drifting", "options": {}})


def test_aspects_and_values_must_agree(tmp_path):
    judge = drifting(values=[[1.0, 0.0, 0.0]], friends=[])
    with pytest.raises(ValueError, match="values has 3 aspects a user, the judge gives 2"):
        run(tmp_path, [stage(terms("dpo", beta=0.1), judge=judge)])
