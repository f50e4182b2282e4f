import pytest
import torch

from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.next_items import SessionConfig, next_examples


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


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"session\.window=1"):
        SessionConfig(window=1)
