import pytest
import torch
from round_ranks import whole
from safetensors.torch import load_file
from toy import run_ranks


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """Weights at the end of one and of two ranks, uninterrupted and resumed."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        assert run_ranks(whole, ranks, str(folder)) == [0] * ranks
        found[ranks] = (load_file(folder / "whole.safetensors"), load_file(folder / "cut.safetensors"))
    return found


@pytest.mark.slow
def test_two_ranks_train_as_one_does(ends):
    one, two = ends[1][0], ends[2][0]
    torch.testing.assert_close(two["logits"], one["logits"], atol=2e-5, rtol=0)


@pytest.mark.slow
def test_a_judge_with_a_memory_sees_every_group_on_every_rank(ends):
    assert ends[1][0]["seen"] == ends[2][0]["seen"] == 14


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_resume_in_the_middle_of_a_round(ends, ranks):
    uninterrupted, resumed = ends[ranks]
    assert torch.equal(uninterrupted["logits"], resumed["logits"])
