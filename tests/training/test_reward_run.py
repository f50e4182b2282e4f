import pytest
import torch

from triptych.training.reward_run import calibration_error, pair_results, r_squared, rating_results

GAP_OF_80 = 1.3862943611198908  # log 4, of which the sigmoid is 0.8


def test_the_calibration_error_is_that_worked_out_by_hand():
    # Confidence 0.8 and three of four right: off by 0.05. Confidence 0.5 and ties half right: off by nothing.
    gaps = torch.tensor([1.0, 1.0, 1.0, -1.0]) * GAP_OF_80 * 1.0000001
    assert calibration_error(gaps) == pytest.approx(0.05, abs=1e-5)
    assert calibration_error(torch.cat([gaps, torch.zeros(4)])) == pytest.approx(0.025, abs=1e-5)
    assert calibration_error(torch.full((4,), 100.0)) == pytest.approx(0.0)
    assert calibration_error(torch.full((4,), -100.0)) == pytest.approx(1.0)


def test_the_results_of_pairs_are_without_the_margins_of_training():
    gaps = torch.tensor([GAP_OF_80, -2 * GAP_OF_80], dtype=torch.float64)
    rows = {"rewards/margins": gaps, "rewards/accuracies": (gaps > 0).double(), "loss": gaps.abs() + 10}
    tables, found = pair_results(rows, ("a", "b"))
    assert found["accuracy"].mean == 0.5
    # -log 0.8, and of odds 1 to 16 against: log 17.
    assert found["log-loss"].mean == pytest.approx((0.223144 + 2.833213) / 2, abs=1e-5)
    assert found["log-loss"].low < found["log-loss"].mean < found["log-loss"].high
    assert [t.title for t in tables] == ["Held-out data", "Calibration"]
    low, high = tables[1].rows
    assert low[:2] == ["0.8 to 0.9", 1]
    assert (low[3].mean, high[3].mean) == (1.0, 0.0)
    assert high[2] == pytest.approx(16 / 17)


def test_the_results_of_ratings_count_what_is_rated_in_its_own_units():
    predicted = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])
    target = torch.tensor([[1.0, 7.0], [2.0, 0.0], [3.0, 0.0]])
    rated = torch.tensor([[True, True], [True, False], [True, False]])
    tables, found = rating_results(predicted, target, rated, ("a", "b"), ("x", "y", "z"))
    assert found["a error"].mean == pytest.approx(1 / 3)
    assert found["a R2"].mean == pytest.approx(1 - 1 / 2)
    # One rating says nothing of a spread.
    assert "b R2" not in found
    assert tables[0].rows[1] == ["b", 1, None, None, None]


def test_predicting_the_mean_explains_nothing_and_a_constant_is_not_divided_by():
    y = torch.tensor([1.0, 2.0, 3.0])
    assert r_squared(torch.stack([torch.full((3,), 2.0), y], -1)) == 0
    assert r_squared(torch.stack([y, y], -1)) == 1
    assert r_squared(torch.stack([y, torch.ones(3)], -1)) == 0
