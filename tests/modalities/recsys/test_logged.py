import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.logged import (
    SPLITS,
    LoggedSessions,
    LoggingConfig,
    logging_policy,
    make_logs,
    split_of,
)
from triptych.modalities.recsys.oracle import OracleConfig, fit_oracle
from triptych.training.quarantine import DataError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def events_of(rows, num_items, ratings=None):
    lengths = torch.tensor([len(row) for row in rows])
    return Interactions(
        users=tuple(f"u{n}" for n in range(len(rows))),
        items=tuple(str(n) for n in range(num_items)),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        item_E=torch.cat([torch.as_tensor(row) for row in rows]),
        time_E=torch.arange(int(lengths.sum())).double(),
        rating_E=ratings,
        fingerprint="of these events",
    )


@pytest.fixture(scope="module")
def events():
    """60 users with 4 to 14 of 40 items each."""
    generator = seeded(5)
    rows = [torch.randperm(40, generator=generator)[: 4 + n % 11] for n in range(60)]
    ratings = torch.randint(1, 6, (sum(map(len, rows)),), generator=generator).float()
    return events_of(rows, 40, ratings)


@pytest.fixture(scope="module")
def oracle(events):
    return fit_oracle(events, OracleConfig(factors=3, num_steps=20), seeded())


@pytest.fixture(scope="module")
def logs(events, oracle):
    return make_logs(events, oracle, LoggingConfig(), seeded(1))


def histories(logs):
    offsets = logs.history.offsets.tolist()
    return [logs.history.values[a:b].tolist() for a, b in pairwise(offsets)]


def test_one_session_is_shown_a_request(events, logs):
    requests = list(zip(logs.user_N.tolist(), logs.history.lengths.tolist(), strict=True))
    assert len(set(requests)) == len(requests)
    assert logs.items_Nm.shape == (len(requests), 5)
    shapes = {name: tuple(v.shape) for name, v in logs.signals.items()}
    assert shapes == {"swt": (len(requests),)} | dict.fromkeys(("vtr", "ltr", "wtr"), (len(requests), 5))


def test_requests_come_after_even_parts_of_the_users_events(events, logs):
    lengths = {}
    for user, history in zip(logs.user_N.tolist(), histories(logs), strict=True):
        lengths.setdefault(user, []).append(len(history))
        assert history == events.of(user)[: len(history)].tolist()
    # User 0 has four events, less than min_history; 8 has twelve, 4 has eight, of which the first cut is 2.
    assert 0 not in lengths
    assert lengths[8] == [6, 9, 12]
    assert lengths[4] == [6, 8]


def test_what_the_user_has_is_not_shown_nor_an_item_twice(logs):
    for history, shown in zip(histories(logs), logs.items_Nm.tolist(), strict=True):
        assert len(set(shown)) == 5
        assert not set(shown) & set(history)


def test_the_policy_is_the_mixture_worked_by_hand():
    made = events_of([[0, 1], [0, 1, 2], [3, 0]], 4)
    config = LoggingConfig(popular=0.4, knn=0.4, noise=0.2)
    found = logging_policy(made, config)([torch.tensor([0])])[0].tolist()
    # Of 1, 2, 3: events 2, 1, 1; cosines with 0 of 2/sqrt 6, 1/sqrt 3, 1/sqrt 3, that is sqrt 2 : 1 : 1.
    near = 2**0.5 / (2**0.5 + 2)
    first = 0.4 * 0.5 + 0.4 * near + 0.2 / 3
    other = 0.4 * 0.25 + 0.4 * (1 - near) / 2 + 0.2 / 3
    assert found == pytest.approx([0.0, first, other, other])
    even = logging_policy(made, replace(config, popular=0.0, knn=0.0))([torch.tensor([0])])[0]
    assert even.tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    square = replace(config, popular_power=2.0, knn=0.0, popular=1.0, noise=1e-9)
    assert logging_policy(made, square)([torch.tensor([0])])[0].tolist() == pytest.approx(
        [0, 4 / 6, 1 / 6, 1 / 6]
    )


def test_a_history_that_no_item_is_near_leaves_the_other_parts():
    made = events_of([[0, 1], [2]], 3)
    found = logging_policy(made, LoggingConfig(popular=0.4, knn=0.4, noise=0.2))([torch.tensor([2])])[0]
    assert found.tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_items_are_drawn_as_often_as_the_policy_says_and_not_put_back():
    counts = [4000, 600, 300, 100]
    rows = [[item] for item, count in enumerate(counts) for _ in range(count)]
    made = events_of(rows, 4, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).repeat(1000))
    oracle = fit_oracle(made, OracleConfig(factors=1, num_steps=1), seeded())
    config = LoggingConfig(items=2, requests=1, min_history=1, popular=0.7, knn=0.0, noise=0.3)
    p = logging_policy(made, config)([torch.tensor([0])])[0]
    assert p.tolist() == pytest.approx([0, 0.52, 0.31, 0.17])
    shown = make_logs(made, oracle, config, seeded(2)).items_Nm[:4000]
    second = torch.stack([sum(p[k] * p[i] / (1 - p[k]) for k in range(1, 4) if k != i) for i in range(4)])
    for place, chance in enumerate((p, second)):
        share = torch.bincount(shown[:, place], minlength=4) / 4000
        sigma = (chance * (1 - chance) / 4000).sqrt()
        assert bool(((share - chance).abs() <= 4 * sigma).all())


def test_responses_are_those_of_the_oracle_to_this_user_and_session(events, oracle):
    moody = replace(oracle, user_U=torch.where(torch.arange(60) % 2 == 0, -2.0, 2.0))
    many = LoggingConfig(requests=40, min_history=1)
    logs = make_logs(events, moody, many, seeded(3))
    said = moody.probabilities(logs.user_N, logs.items_Nm)
    assert len(logs.user_N) > 500
    for name, p in said.items():
        # By sessions: items of one are not independent, as who leaves sees no more.
        p_N, made_N = p.view(len(p), -1).mean(1), logs.signals[name].view(len(p), -1).mean(1)
        assert p_N.std() > 0.05
        for weight_N in (torch.ones(len(p)), p_N - p_N.mean()):
            gap_N = weight_N * (made_N - p_N)
            assert abs(float(gap_N.mean())) <= 4 * float(gap_N.std()) / len(p) ** 0.5, name


def test_no_user_is_in_two_splits_and_every_request_is_in_one(logs):
    parts = [logs.of(name) for name in SPLITS]
    users = [set(part.user_N.tolist()) for part in parts]
    assert users[0].isdisjoint(users[1] | users[2])
    assert users[1].isdisjoint(users[2])
    assert set.union(*users) == set(logs.user_N.tolist())
    assert sum(len(part.user_N) for part in parts) == len(logs.user_N)
    judge, rows = parts[2], logs.split_N == 2
    assert torch.equal(judge.items_Nm, logs.items_Nm[rows])
    assert histories(judge) == [h for h, mine in zip(histories(logs), rows.tolist(), strict=True) if mine]
    assert torch.equal(judge.signals["ltr"], logs.signals["ltr"][rows])
    assert len({part.fingerprint for part in parts} | {logs.fingerprint}) == 4


def test_the_split_of_a_user_is_its_own_and_the_shares_are_kept():
    shares = (0.6, 0.2, 0.2)
    found = [split_of(f"user {n}", seed=0, shares=shares) for n in range(4000)]
    assert found[:50] == [split_of(f"user {n}", seed=0, shares=shares) for n in range(50)]
    for place, share in enumerate(shares):
        assert abs(found.count(place) / 4000 - share) <= 4 * (share * (1 - share) / 4000) ** 0.5
    other = [split_of(f"user {n}", seed=1, shares=shares) for n in range(4000)]
    # Two independent splits agree for .6 ** 2 + .2 ** 2 + .2 ** 2 = .44 of the users.
    agree = sum(a == b for a, b in zip(found, other, strict=True)) / 4000
    assert abs(agree - 0.44) <= 4 * (0.44 * 0.56 / 4000) ** 0.5
    assert split_of("anybody", seed=0, shares=(0.0, 0.0, 1.0)) == 2


def test_one_generator_gives_the_same_logs_and_another_other_ones(events, oracle, logs):
    again = make_logs(events, oracle, LoggingConfig(), seeded(1))
    assert again.fingerprint == logs.fingerprint
    assert torch.equal(again.items_Nm, logs.items_Nm)
    assert make_logs(events, oracle, LoggingConfig(), seeded(2)).fingerprint != logs.fingerprint


def test_logs_are_read_as_they_were_written(logs, tmp_path):
    path = tmp_path / "logs" / "sessions.safetensors"
    logs.write(path)
    assert sorted(p.name for p in path.parent.iterdir()) == ["sessions.json", "sessions.safetensors"]
    found = LoggedSessions.read(path)
    assert found.fingerprint == logs.fingerprint
    assert found.about["events"] == "of these events"
    assert histories(found) == histories(logs)
    assert found.history.longest == logs.history.longest
    assert all(torch.equal(found.signals[name], logs.signals[name]) for name in logs.signals)


def test_a_file_that_is_not_what_was_written_is_refused(logs, tmp_path):
    path = tmp_path / "sessions.safetensors"
    with pytest.raises(DataError, match="holds no logged sessions"):
        LoggedSessions.read(path)
    logs.write(path)
    replace(logs, items_Nm=logs.items_Nm.flip(1), fingerprint="").write(tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(path)
    with pytest.raises(DataError, match="is not what was written"):
        LoggedSessions.read(path)
    logs.write(path)
    side = json.loads(path.with_suffix(".json").read_text("utf-8"))
    side["about"]["oracle"] = "another"
    path.with_suffix(".json").write_text(json.dumps(side), "utf-8")
    with pytest.raises(DataError, match="is not what was written"):
        LoggedSessions.read(path)
    logs.write(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="holds no logged sessions"):
        LoggedSessions.read(path)
    with pytest.raises(ValueError, match=r"\*.safetensors"):
        logs.write(tmp_path / "logs.bin")


def test_columns_of_different_lengths_are_refused(logs):
    with pytest.raises(ValueError, match="split_N has 2 rows"):
        replace(logs, split_N=logs.split_N[:2], fingerprint="")
    with pytest.raises(ValueError, match="history has 1 rows"):
        replace(logs, history=Jagged.of([torch.tensor([1])]), fingerprint="")
    with pytest.raises(ValueError, match="the logs have"):
        replace(logs, split_N=logs.split_N + 0, items_Nm=logs.items_Nm.flip(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"items": 0}, "logging.items=0"),
        ({"noise": 0.0}, "logging.noise=0.0 must be above 0"),
        ({"knn": -1.0}, "logging.knn=-1.0"),
        ({"shares": (0.5, 0.5, 0.5)}, "sum to 1"),
    ],
)
def test_settings_without_meaning_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoggingConfig(**options)


def test_requests_that_cannot_be_made_are_refused(events, oracle, logs):
    with pytest.raises(ValueError, match=r"logging.min_history=15: no user"):
        make_logs(events, oracle, LoggingConfig(min_history=15), seeded())
    with pytest.raises(ValueError, match=r"logging.items=30 is more"):
        make_logs(events, oracle, LoggingConfig(items=30), seeded())
    small = events_of([[0], [1]], 2)
    with pytest.raises(ValueError, match="fit it on the same"):
        make_logs(small, oracle, LoggingConfig(), seeded())
    with pytest.raises(ValueError, match="split='test' must be one of train, validation, judge"):
        logs.of("test")
    everybody = make_logs(events, oracle, LoggingConfig(shares=(1.0, 0.0, 0.0)), seeded())
    with pytest.raises(ValueError, match="no request is of the split 'judge'"):
        everybody.of("judge")
