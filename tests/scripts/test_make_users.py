"""Vectors of persons from their own pairs: whose, how many, and which way they point."""

import pytest
import torch
from image_files import jpeg, pick, write_pickapic
from image_material import words
from test_image_scorers import clip_folder  # noqa: F401
from transformers import CLIPImageProcessor, CLIPModel

from triptych.modalities.diffusion.persons import Users
from triptych.scripts import make_users


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three pairs of person 1, two of person 2, one of person 3; the second picture of person 2 wins."""
    folder = tmp_path_factory.mktemp("users")
    rows = []
    for i, person in enumerate((1, 1, 2, 1, 2, 3)):
        images = {"jpg_0": jpeg(2 * i, width=32, height=32), "jpg_1": jpeg(2 * i + 1, width=32, height=32)}
        rows.append(
            pick(i, 0.0 if person == 2 else 1.0, caption=f"a picture of {i}", user_id=person, **images)
        )
    write_pickapic(folder / "train-00000-of-00001.parquet", rows)
    return folder


def run(data, clip, out, **changes):
    settings = {"data.source": data, "output": out, "clip": clip, "num_pairs": 2} | changes
    return make_users.main(words(settings))


def test_a_persons_vector_points_from_what_they_rejected_to_what_they_preferred(
    data,
    clip_folder,  # noqa: F811
    tmp_path,
    capsys,
):
    out = tmp_path / "users.safetensors"
    assert run(data, clip_folder, out) == 0
    users = Users.load(out)
    assert sorted(users.vectors) == ["1", "2"]
    assert users.width == 24
    said = capsys.readouterr().err
    assert "2 persons with 2 pairs each; 1 persons with fewer" in said
    # By hand for person 2, whose first pairs are records 2 and 4.
    import io

    from PIL import Image

    model, processor = (
        CLIPModel.from_pretrained(clip_folder).eval(),
        CLIPImageProcessor.from_pretrained(clip_folder),
    )

    def features(seed):
        with Image.open(io.BytesIO(jpeg(seed, width=32, height=32))) as image:
            pixels = processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return torch.nn.functional.normalize(
                model.get_image_features(pixel_values=pixels).pooler_output, dim=-1
            )

    difference = sum(features(2 * i + 1) - features(2 * i) for i in (2, 4))
    expected = torch.nn.functional.cosine_similarity(users["2"], difference)
    assert abs(float(expected)) > 0.99


def test_a_vector_a_pair_and_the_first_persons_only(data, clip_folder, tmp_path):  # noqa: F811
    out = tmp_path / "users.safetensors"
    assert run(data, clip_folder, out, vectors="pairs", max_users=1) == 0
    users = Users.load(out)
    assert list(users.vectors) == ["1"]
    assert users["1"].shape == (2, 24)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_pairs": 4}, "nobody has 4 pairs (3 persons have fewer, 0 pairs name nobody)"),
        ({"num_pairs": 0}, "num_pairs=0"),
        ({"output": "users.pt"}, "must end in .safetensors"),
    ],
)
def test_a_users_mistake_ends_in_one_line(data, clip_folder, tmp_path, capsys, changes, part):  # noqa: F811
    with pytest.raises(SystemExit) as left:
        run(data, clip_folder, changes.pop("output", tmp_path / "users.safetensors"), **changes)
    assert left.value.code == 2
    assert part in capsys.readouterr().err.strip().splitlines()[-1]
