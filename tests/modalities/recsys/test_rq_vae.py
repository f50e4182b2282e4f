import pytest
import torch

from triptych.modalities.recsys.rq_vae import RqVae, RqVaeConfig, _fit, relative_error, rq_vae
from triptych.modalities.recsys.tokenise import TokeniseConfig

QUICK = RqVaeConfig(hidden=(16,), latent=8, num_epochs=60, batch_size=64, restart_every=10)


def clusters(num=200, centres=8, width=12, seed=0):
    """Points close to a few centres."""
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, width, generator=generator) * 3
    return middle[torch.arange(num) % centres] + 0.3 * torch.randn(num, width, generator=generator)


def made(vectors, *, seed=1, config=QUICK, num_codes=8, levels=3):
    generator = torch.Generator().manual_seed(seed)
    return rq_vae(vectors, num_codes=num_codes, levels=levels, generator=generator, config=config)


def line(codes):
    """A model of one number, without layers, whose codebooks are given."""
    config = RqVaeConfig(hidden=(), latent=1)
    model = RqVae(1, num_codes=len(codes[0]), levels=len(codes), config=config)
    with torch.no_grad():
        for part in (model.encoder, model.decoder):
            part[0].weight.fill_(1.0)
            part[0].bias.zero_()
        for book, values in zip(model.books, codes, strict=True):
            book.copy_(torch.tensor(values).unsqueeze(1))
    return model


def test_each_level_takes_the_nearest_code_of_what_is_left_over():
    model = line([[0.0, 4.0], [-1.0, 0.5]])
    found = model.quantise(torch.tensor([[3.2], [0.6]]))
    # 3.2 -> 4, left -0.8 -> -1; 0.6 -> 0, left 0.6 -> 0.5.
    assert found.codes_BL.tolist() == [[1, 0], [0, 1]]
    assert found.sum_BZ.flatten().tolist() == pytest.approx([3.0, 0.5])
    # (1 + 0.25) times the mean of 0.8^2 + 0.2^2 and 0.6^2 + 0.1^2.
    assert found.loss.item() == pytest.approx(1.25 * (0.64 + 0.04 + 0.36 + 0.01) / 2)


def test_gradients_pass_the_quantiser_straight_and_each_loss_moves_its_own_side():
    model = line([[0.0, 4.0]])
    model.loss(torch.tensor([[3.0]])).backward()
    # Reconstruction (4 - 3)^2: its gradient 2 reaches the encoder's output as it is; commitment adds
    # 0.25 * 2 * (3 - 4) = -0.5; times the input, 3.
    assert float(model.encoder[0].weight.grad) == pytest.approx(3 * (2 - 0.5))
    # The codebook sees ||3 - e||^2 alone: 2 (4 - 3), and code 0 nothing.
    assert model.books[0].grad.flatten().tolist() == pytest.approx([0.0, 2.0])
    assert float(model.decoder[0].weight.grad) == pytest.approx(2 * 4)


def test_clusters_are_found_with_all_codes_in_use_and_more_exactly_by_every_level():
    vectors = clusters()
    codes, books, decoded = made(vectors)
    assert codes.shape == (200, 3)
    for level, book in enumerate(books):
        assert codes[:, level].unique().tolist() == list(range(8))
        assert torch.equal(book.labels_I, codes[:, level])
    errors = [relative_error(vectors, d) for d in decoded]
    assert errors[0] < 0.4
    assert errors[-1] < 0.25
    assert errors == sorted(errors, reverse=True)
    # Nobody shares an id with an item of another cluster.
    cluster = torch.arange(200) % 8
    for code in codes.unique(dim=0):
        assert len(cluster[(codes == code).all(1)].unique()) == 1


def test_training_lowers_the_loss_and_the_error_that_untrained_layers_leave():
    vectors, losses = clusters(), []
    x = (vectors - vectors.mean(0)) / (vectors - vectors.mean(0)).square().mean().sqrt()
    torch.manual_seed(0)
    model = RqVae(12, num_codes=8, levels=3, config=QUICK)
    generator = torch.Generator().manual_seed(0)
    model.place_codes(x, generator)
    before = float(model.loss(x).detach())
    _fit(model, x, generator, QUICK, lambda epoch: losses.append(float(model.loss(x).detach())))
    assert len(losses) == QUICK.num_epochs
    assert losses[-1] < losses[29] < losses[0] < before
    assert losses[-1] < 0.4 * before


def test_learnt_codes_describe_items_far_better_than_codes_at_random():
    vectors = clusters()
    learnt = relative_error(vectors, made(vectors)[2][-1])
    # Codebooks of vectors drawn at random from the items, the nearest taken, level by level.
    generator = torch.Generator().manual_seed(5)
    residual = vectors.clone()
    for scale in (1.0, 0.5, 0.25):
        book = scale * vectors.std() * torch.randn(8, 12, generator=generator)
        residual = residual - book[torch.cdist(residual, book).argmin(1)]
    assert learnt < 0.3 * relative_error(vectors, vectors - residual)


def test_epochs_are_told_as_they_end():
    told = []
    config = RqVaeConfig(hidden=(4,), latent=2, num_epochs=3)
    generator = torch.Generator().manual_seed(0)
    rq_vae(clusters(), num_codes=4, levels=1, generator=generator, config=config, progress=told.append)
    assert told == [1, 2, 3]


def test_generators_of_accelerators_are_not_seeded(monkeypatch):
    # They are not put back afterwards, and the CPU's is all that is drawn from.
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    made(clusters(), config=RqVaeConfig(hidden=(), latent=2, num_epochs=1))
    assert seeded == []


def test_a_loss_that_is_no_longer_finite_stops_with_what_to_lower():
    config = RqVaeConfig(hidden=(16,), latent=8, num_epochs=60, lr=1e18)
    with pytest.raises(
        ValueError, match=r"the loss of the RQ-VAE is not finite .* ids\.make\.rq_vae\.lr=1e\+18"
    ):
        made(clusters(), config=config)


def test_the_same_generator_gives_the_same_ids_and_leaves_the_global_one_alone():
    vectors = clusters()
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = made(vectors)[0]
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(5)
    assert torch.equal(first, made(vectors)[0])


@pytest.mark.parametrize("seed", [2, 4, 6])
def test_no_code_is_left_unused_at_the_end_of_training(seed):
    codes, *_ = made(clusters(), seed=seed)
    assert [len(codes[:, level].unique()) for level in range(3)] == [8, 8, 8]


def test_items_that_are_all_the_same_end_with_the_same_code():
    codes, books, decoded = made(torch.ones(9, 2), num_codes=3, levels=2)
    assert len(codes.unique(dim=0)) == 1
    assert all(bool(torch.isfinite(b.centroids_KD).all()) for b in books)
    assert torch.allclose(decoded[-1], torch.ones(9, 2), atol=1e-4)


def test_codes_that_nobody_uses_are_moved_to_where_items_are():
    model = line([[0.0, 100.0, 200.0]])
    x = torch.tensor([[1.0], [2.0], [7.0]])
    assert model.restart(x) == 2
    assert sorted(model.books[0].flatten().tolist()) == [0, 2, 7]
    assert model.restart(x) == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="item 1 is not finite"):
        made(torch.tensor([[1.0], [float("nan")]]), num_codes=1)
    with pytest.raises(ValueError, match="300 codes for 200 items"):
        made(clusters(), num_codes=300)
    with pytest.raises(ValueError, match=r"ids\.make\.rq_vae\.latent=0"):
        RqVaeConfig(latent=0)
    with pytest.raises(ValueError, match=r"ids\.make\.rq_vae\.hidden=\[16, 0\]"):
        RqVaeConfig(hidden=(16, 0))
    with pytest.raises(ValueError, match="is of method rq_vae, not of balanced"):
        TokeniseConfig(rq_vae=RqVaeConfig())
    with pytest.raises(ValueError, match=r"labels=nearest: the codes of rq_vae"):
        TokeniseConfig(method="rq_vae", labels="nearest")
