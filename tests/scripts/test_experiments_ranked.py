"""The experiments of ranked lists and of gradient noise: what they measure with is right, and they run."""

import pytest
import torch

from triptych.scripts.experiments import diffusion_ranked, diffusion_variance
from triptych.scripts.experiments.common import save_figure
from triptych.scripts.experiments.diffusion_variance import Spread


@pytest.mark.parametrize("module", [diffusion_variance, diffusion_ranked])
def test_an_experiment_runs_small_and_draws(module, tmp_path):
    outcome = module.run(seeds=2, quick=True)
    for claim in outcome.claims:
        assert claim.family == "Diffusion"
        assert f"python -m triptych.scripts.experiments.{module.NAME}" in module.__doc__
        assert claim.command.endswith(f".{module.NAME}")
    assert save_figure(outcome, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_variance_of_gradients_is_that_worked_by_hand():
    # Two batches: 1 and 3 around 2, 5 and 9 around 7. E g^2 = 29, product of the batches' means 14.
    spread = Spread.of(torch.tensor([[[1.0], [3.0]], [[5.0], [9.0]]]))
    both = torch.arange(2)
    assert spread.mean_square(both) == pytest.approx(14)
    assert spread.total(both) == pytest.approx(29 - 14)
    assert spread.drawn(both) == pytest.approx((4 / 2 + 16 / 2) / 2)


def test_variance_of_gradients_is_that_of_their_law():
    generator = torch.Generator().manual_seed(0)
    context = 2 * torch.randn(1000, 1, 3, generator=generator)
    spread = Spread.of(1 + context + torch.randn(1000, 2, 3, generator=generator))
    rows = torch.arange(1000)
    assert spread.total(rows) == pytest.approx(3 * (4 + 1), rel=0.1)
    assert spread.drawn(rows) == pytest.approx(3, rel=0.1)
    assert spread.mean_square(rows) == pytest.approx(3, abs=0.5)


def test_a_batch_is_seen_twice_with_the_same_pairs_and_other_randomness():
    first, other = diffusion_variance.batch_draws(5, num_samples=40, size=8)
    assert [d.index for d in first] == [d.index for d in other]
    assert not {d.seed for d in first} & {d.seed for d in other}
    assert not {d.place for d in first} & {d.place for d in other}
    assert len({d.index for d in first}) == 8


def test_order_accuracy_counts_ties_as_half():
    truth = torch.tensor([[3.0, 2.0, 1.0]])
    assert diffusion_ranked.order_accuracy(truth, truth) == 1
    assert diffusion_ranked.order_accuracy(-truth, truth) == 0
    # 3 > 2 is a tie, 3 > 1 and 2 > 1 are said.
    assert diffusion_ranked.order_accuracy(torch.tensor([[2.0, 2.0, 1.0]]), truth) == pytest.approx(2.5 / 3)


def test_top_and_bottom_look_at_the_best_and_at_the_two_worst():
    truth = torch.tensor([[4.0, 1.0, 3.0, 2.0], [4.0, 1.0, 3.0, 2.0]])
    said = torch.tensor([[9.0, 5.0, 0.0, 1.0], [1.0, 0.0, 9.0, 5.0]])
    assert diffusion_ranked.top_and_bottom(said, truth) == (0.5, 0.5)


def test_votes_outdo_scorers_of_independent_errors():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    scores = truth + torch.randn(5, 200, 4, generator=generator, dtype=torch.float64)
    single = [diffusion_ranked.order_accuracy(one, truth) for one in scores]
    assert diffusion_ranked.order_accuracy(diffusion_ranked.votes(scores), truth) > max(single) + 0.02


def test_rank_dpo_of_two_is_gain_weighted_dpo_and_a_tie_has_no_gradient():
    difference, tied = diffusion_ranked.two_as_weighted_dpo()
    assert difference < 1e-12
    assert tied == 0
