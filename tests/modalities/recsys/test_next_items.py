from dataclasses import replace

import pytest
import torch

from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.next_items import Quality, SessionConfig, next_examples


def events(*lengths):
    total = torch.tensor(lengths)
    return Interactions(
        users=tuple(f"u{i}" for i in range(len(lengths))),
        items=tuple(str(i) for i in range(300)),
        offsets=torch.cat([total.new_zeros(1), total.cumsum(0)]),
        item_E=torch.cat([torch.arange(n) for n in lengths]),
        time_E=torch.zeros(int(total.sum())).double(),
    )


@pytest.mark.parametrize("length", [2, 3, 10, 11, 12, 57])
@pytest.mark.parametrize("every_position", [True, False])
def test_every_event_but_the_first_is_predicted_once_from_what_came_before(length, every_position):
    found = next_examples(events(length), SessionConfig(window=10), every_position=every_position)
    targets = []
    for example in found:
        assert len(example.history) <= 10
        for session, seen in zip(example.sessions, example.seen.tolist(), strict=True):
            # Items are numbered in time: what is seen ends just before the target.
            assert int(example.history[seen - 1]) == int(session[0]) - 1
            targets.append(int(session[0]))
    assert sorted(targets) == list(range(1, length))


def test_no_place_of_a_long_history_is_predicted_from_few_items():
    found = next_examples(events(57), SessionConfig(window=10), every_position=True)
    least = min(
        seen
        for example in found
        for session, seen in zip(example.sessions, example.seen.tolist(), strict=True)
        if int(session[0]) > 10
    )
    assert least >= 5


def test_sessions_go_on_as_far_as_the_user_does():
    (example,) = next_examples(events(4), SessionConfig(items=3), every_position=True)
    assert example.sessions.tolist() == [[1, 2, 3], [2, 3, -1], [3, -1, -1]]
    assert example.seen.tolist() == [1, 2, 3]


def test_users_with_one_event_give_nothing_to_learn():
    assert [e.source for e in next_examples(events(1, 2), SessionConfig(), every_position=True)] == [
        "user u1"
    ]


def watched(**signals):
    """One user with six events and signals of them."""
    made = events(6)
    columns = {name: torch.tensor(values, dtype=torch.float32) for name, values in signals.items()}
    return replace(made, rating_E=columns.pop("rating", None), signals=columns)


@pytest.mark.parametrize("every_position", [True, False])
@pytest.mark.parametrize(
    ("quality", "rule", "firsts"),
    [
        # Sessions of two begin at 1..5; long_view 0 1 1 0 1 1 sums to 2 1 1 2 1.
        ([Quality(signal="long_view", least=2)], "all", [1, 4]),
        ([Quality(signal="long_view", least=1, statistic="most")], "all", [1, 2, 3, 4, 5]),
        # A session of one item at the end has the mean of that one: 5.
        ([Quality(signal="rating", least=4.5, statistic="mean")], "all", [5]),
        ([Quality(signal="long_view", least=2), Quality(signal="rating", least=8)], "all", [4]),
        ([Quality(signal="long_view", least=2), Quality(signal="rating", least=8)], "any", [1, 4]),
    ],
)
def test_only_sessions_of_quality_are_learnt(every_position, quality, rule, firsts):
    made = watched(long_view=[0, 1, 1, 0, 1, 1], rating=[1, 2, 3, 4, 3, 5])
    config = SessionConfig(items=2, quality=quality, quality_rule=rule)
    found = next_examples(made, config, every_position=every_position)
    targets = [int(session[0]) for example in found for session in example.sessions]
    assert sorted(targets) == firsts
    for example in found:
        seen = example.seen.tolist()
        assert [int(s[0]) for s in example.sessions] == seen


def test_a_quality_of_a_signal_that_is_not_there_is_refused():
    config = SessionConfig(quality=[Quality(signal="is_like", least=1)])
    with pytest.raises(ValueError, match="no signal 'is_like'; they have rating, play"):
        next_examples(watched(rating=[1] * 6, play=[1] * 6), config, every_position=True)


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"session\.window=1"):
        SessionConfig(window=1)
