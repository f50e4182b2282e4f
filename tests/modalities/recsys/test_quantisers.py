import pytest
import torch

from triptych.modalities.recsys.quantisers import METHODS, quantise


def clustered(num=203, width=6, seed=0):
    """Points round five centres, most of them round the first."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, width, generator=generator) * 3
    weight = torch.tensor([8.0, 2, 1, 1, 1])
    which = torch.multinomial(weight, num, replacement=True, generator=generator)
    return centres[which] + 0.3 * torch.randn(num, width, generator=generator)


def run(method, labels="assigned", x=None, levels=3, num_codes=8, seed=0):
    x = clustered() if x is None else x
    generator = torch.Generator().manual_seed(seed)
    return x, *quantise(
        x, num_codes=num_codes, levels=levels, method=method, labels=labels, generator=generator
    )


def errors(x, books):
    """Squared error after each level."""
    found, residual = [], x.double()
    for book in books:
        residual = residual - book.centroids_KD[book.labels_I]
        found.append(float(residual.square().sum()))
    return found


@pytest.mark.parametrize("method", METHODS)
def test_the_error_falls_from_level_to_level_and_a_seed_gives_the_same_codes(method):
    x, codes, books = run(method)
    found = errors(x, books)
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.5 * float((x - x.mean(0)).square().sum())
    assert torch.equal(run(method)[1], codes)


@pytest.mark.parametrize("method", ["balanced", "paper_balanced"])
@pytest.mark.parametrize("num_codes", [7, 8, 203])
def test_balanced_clusters_differ_by_at_most_one_item(method, num_codes):
    _, codes, _ = run(method, num_codes=num_codes, levels=2)
    for level in range(2):
        sizes = torch.bincount(codes[:, level], minlength=num_codes)
        assert int(sizes.max() - sizes.min()) <= 1, sizes


def test_the_better_balanced_form_has_less_error_than_the_papers():
    x, _, ours = run("balanced")
    _, _, papers = run("paper_balanced")
    _, _, plain = run("kmeans")
    assert errors(x, ours)[0] < errors(x, papers)[0]
    assert errors(x, plain)[0] <= errors(x, ours)[0]


@pytest.mark.parametrize("method", METHODS)
def test_nearest_labels_are_what_encoding_an_item_again_gives(method):
    x, codes, books = run(method, "nearest")
    residual = x.double()
    for level, book in enumerate(books):
        distance = torch.cdist(residual, book.centroids_KD)
        assert torch.equal(distance.argmin(1), codes[:, level])
        residual = residual - book.centroids_KD[codes[:, level]]


def test_two_clear_clusters_are_found():
    x = torch.tensor([[0.0], [0.1], [10.0], [10.1]])
    for method in METHODS:
        _, codes, _ = run(method, x=x, levels=1, num_codes=2)
        assert codes[0, 0] == codes[1, 0] != codes[2, 0] == codes[3, 0], method


@pytest.mark.parametrize("method", METHODS)
def test_items_that_are_all_the_same_get_codes_all_the_same(method):
    _, codes, books = run(method, x=torch.ones(9, 2), levels=2, num_codes=3)
    assert codes.shape == (9, 2)
    assert all(bool(torch.isfinite(b.centroids_KD).all()) for b in books)


def test_vectors_that_are_not_finite_and_too_many_codes_are_refused():
    x = torch.ones(4, 2)
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match="the vector of item 2 is not finite"):
        run("kmeans", x=x, num_codes=2)
    with pytest.raises(ValueError, match="5 codes for 4 items"):
        run("kmeans", x=torch.ones(4, 2), num_codes=5)
