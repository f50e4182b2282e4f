import io
import json
import math

import numpy as np
import peft
import pytest
import torch
from PIL import Image
from tiny_diffusion import LATENT, tiny_sd15

from triptych.modalities.diffusion.draws import NoiseConfig
from triptych.modalities.diffusion.likelihood import Collator, ElboLikelihood, Example
from triptych.modalities.diffusion.measures import (
    MEASURES,
    brightness,
    colourfulness,
    diversity,
    diversity_estimate,
    drift,
    ink,
    jpeg_size,
    label_pairs,
    measure_of,
    redness,
    saturation,
    sharpness,
    warm_share,
    write_lists,
    write_pairs,
)
from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.readers import read_records
from triptych.modalities.diffusion.schedule import schedule_of
from triptych.training.order import Draw
from triptych.training.quarantine import Quarantine
from triptych.training.references import AdapterOff


def flat(*colour, size=(6, 4)):
    return Image.new("RGB", size, colour)


def rows_of(*colours):
    """A picture with one row of four pixels a colour."""
    return Image.fromarray(np.array([[colour] * 4 for colour in colours], dtype=np.uint8))


RED, BLUE, WHITE, BLACK, GREY = (255, 0, 0), (0, 0, 255), (255,) * 3, (0,) * 3, (102,) * 3


def test_redness_is_mean_red_minus_blue():
    images = [flat(*RED), flat(*BLUE), flat(*GREY), flat(255, 90, 51), rows_of(RED, WHITE)]
    assert redness(images) == pytest.approx([1, -1, 0, 0.8, 0.5])


@pytest.mark.parametrize(
    ("colour", "warm"),
    [
        ((255, 0, 0), 1),  # 0 degrees
        ((255, 255, 0), 1),  # 60
        ((255, 0, 60), 1),  # 346
        ((255, 0, 100), 0),  # 336
        ((200, 255, 0), 0),  # 73
        ((0, 255, 0), 0),
        ((0, 0, 255), 0),
        ((255, 128, 0), 1),
    ],
)
def test_warm_hues_are_red_to_yellow(colour, warm):
    assert warm_share([flat(*colour)]) == [warm]


def test_only_coloured_pixels_vote_on_warmth():
    # Dark red has too little chroma to be a colour: 50 / 255 < 0.2.
    image = rows_of(RED, RED, RED, BLUE, WHITE, BLACK, GREY, (50, 0, 0))
    assert warm_share([image, flat(*WHITE), flat(*GREY)]) == [0.75, 0.0, 0.0]


def test_colourfulness_is_that_of_the_paper():
    # Red: rg = 255, yb = 127.5, both without spread. Half red, half blue: rg = 255, 0; yb = 127.5, -255.
    alone = 0.3 * math.hypot(255, 127.5)
    both = math.hypot(127.5, 191.25) + 0.3 * math.hypot(127.5, -63.75)
    found = colourfulness([flat(*RED), rows_of(RED, BLUE), flat(*GREY)])
    assert found == pytest.approx([alone, both, 0], abs=1e-9)
    assert both == pytest.approx(272.6, abs=0.1)


def test_brightness_saturation_and_ink_of_flat_pictures():
    images = [flat(*RED), flat(*WHITE), flat(*BLACK), rows_of(RED, WHITE), flat(100, 50, 50)]
    assert brightness(images) == pytest.approx([0.299, 1, 0, 0.6495, (29.9 + 35.05) / 255], abs=1e-3)
    assert saturation(images) == pytest.approx([1, 0, 0, 0.5, 0.5])
    assert ink(images) == [1, 0, 1, 0.5, 1]
    # 240 / 255 is white enough, 220 / 255 is not.
    assert ink([flat(240, 250, 255), flat(255, 255, 220)]) == [0, 1]


def test_transparency_counts_as_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert (ink([image]), redness([image]), brightness([image])) == ([0], [0], pytest.approx([1]))


def test_sharpness_is_the_variance_of_the_laplacian():
    array = np.zeros((5, 5, 3), dtype=np.uint8)
    array[2, 2] = 255
    # Inside, 3 x 3: -4 in the middle, 1 at four sides, 0 at the corners: mean 0, variance (16 + 4) / 9.
    image = Image.fromarray(array)
    assert sharpness([image, flat(*RED), flat(*RED, size=(2, 2))]) == pytest.approx([20 / 9, 0, 0])
    ramp = Image.fromarray(np.repeat(np.arange(0, 250, 10, dtype=np.uint8), 3).reshape(1, 25, 3).repeat(5, 0))
    assert sharpness([ramp]) == pytest.approx([0], abs=1e-12)


def test_jpeg_size_is_in_thousands_of_bytes():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    plain, noisy = jpeg_size([flat(*GREY, size=(32, 32)), image])
    assert noisy == len(buffer.getvalue()) / 1000
    assert noisy > 2 * plain > 0


def test_every_measure_gives_a_number_a_picture_in_order_and_none_for_none():
    images = [flat(*RED), rows_of(RED, BLUE, WHITE), flat(*GREY)]
    for name, measure in MEASURES.items():
        values = measure(images)
        assert [measure([image])[0] for image in images] == values, name
        assert all(isinstance(v, float) and math.isfinite(v) for v in values)
        assert measure([]) == []
    with pytest.raises(ValueError, match="measure 'warmth' is not one of brightness"):
        measure_of("warmth")


def test_diversity_is_the_mean_distance_of_a_prompts_pictures():
    three = [flat(*BLACK), flat(*WHITE), flat(*BLACK)]
    # Distances 1, 0, 1; of red and black sqrt(1/3).
    groups = [three, [flat(*RED), flat(*BLACK)], [flat(*GREY)] * 4]
    expected = [2 / 3, math.sqrt(1 / 3), 0]
    assert diversity(groups) == pytest.approx(expected)
    found = diversity_estimate(groups)
    assert (found.mean, found.n) == (pytest.approx(sum(expected) / 3), 3)
    assert found.low < found.mean < found.high
    with pytest.raises(ValueError, match="at least 2 pictures"):
        diversity([[flat(*RED)]])


def examples(number, sizes=((LATENT, LATENT),)):
    made = []
    for i in range(number):
        draw = torch.Generator().manual_seed(i)
        shape = (2, 4, *sizes[i % len(sizes)])
        made.append(
            Example(
                id=str(i),
                source="",
                kind="pair",
                latents=torch.randn(shape, generator=draw),
                embeds=torch.randn(16, 16, generator=draw),
                relevance=(1.0, 0.0),
                keys=(f"{i}a", f"{i}b"),
            )
        )
    return made


def adapted():
    pipeline = tiny_sd15()
    pipeline.unet.requires_grad_(False)
    pipeline.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    return pipeline, Denoiser(pipeline.unet)


def test_drift_is_the_mean_squared_difference_of_predictions():
    pipeline, policy = adapted()
    likelihood = ElboLikelihood(schedule=schedule_of(pipeline.scheduler))
    collate = Collator(schedule=likelihood.schedule, noise=NoiseConfig(num_draws=2))
    # Two latent shapes, so that a batch has two stacks.
    data = examples(3, sizes=((LATENT, LATENT), (4, 12)))
    batches = [collate(data[:2], [Draw(i, 0, i) for i in range(2)]), collate(data[2:], [Draw(2, 0, 2)])]
    assert drift(likelihood, policy, AdapterOff(), batches).tolist() == [0, 0, 0]
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    found = drift(likelihood, policy, AdapterOff(), batches)
    assert found.shape == (3,)
    assert (found > 0).all()
    for batch, rows in ((batches[0], found[:2]), (batches[1], found[2:])):
        with torch.no_grad():
            mine = likelihood.predict(policy, batch)
            policy.model.disable_adapters()
            theirs = likelihood.predict(policy, batch)
            policy.model.enable_adapters()
        for stack, a, b in zip(batch.stacks, mine, theirs, strict=True):
            for i in set(stack.prompt.tolist()):
                expected = (a - b)[stack.prompt == i].square().mean()
                assert rows[i].item() == pytest.approx(expected.item(), rel=1e-5)


PROMPTS = ["a red thing", "a blue\nthing", "grey"]
# Redness of each prompt's pictures: 1, 0, -1, 0.8 / -1, -1, 0.8 / 0, 0.
PICTURES = [
    [flat(*RED), flat(*GREY), flat(*BLUE), flat(255, 90, 51)],
    [flat(*BLUE), flat(1, 1, 255), flat(255, 90, 51)],
    [flat(*GREY), flat(*GREY)],
]


def test_pairs_are_the_two_ends_or_all_of_a_ranking_without_ties():
    found = label_pairs(PROMPTS, PICTURES, redness)
    assert found.pairs == ((0, 0, 2), (1, 2, 0))
    assert found.scores[0] == pytest.approx((1, 0, -1, 0.8))
    every = label_pairs(PROMPTS, PICTURES, redness, pairs="all").pairs
    assert {p[1:] for p in every if p[0] == 0} == {(0, 3), (0, 1), (0, 2), (3, 1), (3, 2), (1, 2)}
    assert {p[1:] for p in every if p[0] == 1} == {(2, 0), (2, 1), (1, 0)}
    wide = label_pairs(PROMPTS, PICTURES, redness, pairs="all", margin=0.9).pairs
    assert {p[1:] for p in wide if p[0] == 0} == {(0, 1), (0, 2), (3, 2), (1, 2)}
    assert not [p for p in every if p[0] == 2]


def test_a_measure_of_ones_own_and_what_it_may_not_give():
    flipped = label_pairs(PROMPTS, PICTURES, lambda images: [-r for r in redness(images)])
    assert flipped.pairs == ((0, 2, 0), (1, 0, 2))
    with pytest.raises(ValueError, match="inf or nan"):
        label_pairs(PROMPTS, PICTURES, lambda images: [math.nan] * len(images))
    with pytest.raises(ValueError, match="one group a prompt"):
        label_pairs(PROMPTS[:2], PICTURES, redness)
    with pytest.raises(ValueError, match="'best' is not one of best_worst, all"):
        label_pairs(PROMPTS, PICTURES, redness, pairs="best")


def test_written_pairs_are_read_back_as_pairs_of_the_same_pixels(tmp_path):
    labelled = label_pairs(PROMPTS, PICTURES, redness)
    assert write_pairs(labelled, tmp_path / "data" / "pairs") == 2
    left_out = Quarantine()
    records = list(read_records(tmp_path / "data" / "pairs", quarantine=left_out))
    assert (left_out.total, len(records)) == (0, 2)
    assert [r.prompt for r in records] == PROMPTS[:2]
    assert [(r.kind, r.relevance) for r in records] == [("pair", (1.0, 0.0))] * 2
    assert [r.margin for r in records] == pytest.approx([2, 1.8])
    for record, (i, *which) in zip(records, labelled.pairs, strict=True):
        for image, k in zip(record.images, which, strict=True):
            assert np.array_equal(
                np.asarray(Image.open(io.BytesIO(image.read()))), np.asarray(PICTURES[i][k])
            )
    # Pictures of no pair are not written.
    assert len(list((tmp_path / "data" / "pairs" / "images").iterdir())) == 4


def test_written_lists_are_read_back_with_their_order_of_scores(tmp_path):
    labelled = label_pairs(PROMPTS, PICTURES, redness)
    assert write_lists(labelled, tmp_path / "lists") == 2
    records = list(read_records(tmp_path / "lists", quarantine=Quarantine()))
    assert [len(r.images) for r in records] == [4, 3]
    assert np.argsort(records[0].relevance).tolist() == [2, 1, 3, 0]
    line = json.loads((tmp_path / "lists" / "metadata.jsonl").read_text("utf-8").splitlines()[0])
    assert line["scores"] == pytest.approx([1, 0, -1, 0.8])


def test_a_folder_without_any_pair_is_not_written(tmp_path):
    labelled = label_pairs(PROMPTS[2:], PICTURES[2:], redness)
    for write in (write_pairs, write_lists):
        with pytest.raises(ValueError, match="no pair is left"):
            write(labelled, tmp_path / "none")
    assert not (tmp_path / "none").exists()
