"""Several models beside their base: the same noise, what each run exported, paired differences."""

import json

import image_material
import pytest
import torch
from image_material import words
from PIL import Image
from tiny_diffusion import TINY

from triptych.modalities.diffusion.export import export_lora
from triptych.modalities.diffusion.model import LoraConfig, ModelConfig, adapt, pipeline_class
from triptych.scripts import compare_images

PROMPTS = ["a red cat", "a blue cup"]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A base, an untrained adapter, a trained one, and a whole trained UNet, as runs export them."""
    folder = tmp_path_factory.mktemp("compare")
    image_material.write_model(folder / "base", "sd15")
    (folder / "prompts.txt").write_text("\n".join([*PROMPTS, "a hat"]))
    config = ModelConfig(name_or_path="x", lora=LoraConfig(r=4, alpha=4))
    for name, by in (("same", 0.0), ("moved", 0.3)):
        unet = adapt(TINY["sd15"]().unet, config)
        with torch.no_grad():
            for key, parameter in unet.named_parameters():
                if "lora_B" in key:
                    parameter.add_(by)
        export_lora(unet, folder / name / "model", pipeline_class("sd15"))
    whole = TINY["sd15"]().unet
    with torch.no_grad():
        whole.conv_out.weight.mul_(1.5)
    whole.save_pretrained(folder / "whole" / "model" / "unet")
    return folder


def run(material, out, **changes):
    settings = {
        "model.name_or_path": material / "base",
        "prompts": material / "prompts.txt",
        "output_dir": out,
        "models": json.dumps({name: str(material / name) for name in ("same", "moved", "whole")}),
        "sample.num_prompts": 2,
        "sample.num_steps": 2,
        "sample.measures": '["brightness", "redness"]',
    }
    return compare_images.main(words(settings | changes))


def test_models_are_drawn_from_the_same_noise_and_compared_with_the_base(material, tmp_path, monkeypatch):
    assert run(material, tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert [n for n in results if n.startswith("brightness")] == [
        f"brightness, {name} - base" for name in ("same", "moved", "whole")
    ]
    # An adapter that learnt nothing draws the base's pictures.
    assert results["brightness, same - base"]["mean"] == 0
    assert results["brightness, moved - base"]["mean"] != 0
    assert results["brightness, whole - base"]["mean"] != 0
    pictures = {
        p.name: sorted((tmp_path / "samples" / p.name).glob("*.png"))
        for p in (tmp_path / "samples").iterdir()
    }
    assert {name: len(found) for name, found in pictures.items()} == dict.fromkeys(
        ("base", "same", "moved", "whole"), 4
    )
    assert [p.read_bytes() for p in pictures["base"]] == [p.read_bytes() for p in pictures["same"]]
    with Image.open(pictures["moved"][0]) as image:
        assert image.size == (32, 32)
    report = (tmp_path / "report.html").read_text()
    assert "moved - base" in report
    assert "<h2>Training</h2>" not in report

    def never(*args, **options):
        raise AssertionError("drawn again")

    monkeypatch.setattr("triptych.modalities.diffusion.gallery.generate", never)
    assert run(material, tmp_path) == 0


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"models": '{"a": "nowhere"}'}, "models.a: nowhere holds no pytorch_lora_weights.safetensors"),
        ({"models": "{}"}, "at least one folder of a run"),
        ({"models": '{"base": "x"}'}, "none 'base'"),
        ({"prompts": "none.txt"}, "none.txt: there is no such file of prompts"),
        ({"sample.num_prompts": 0}, "leaves nothing to compare"),
    ],
)
def test_a_users_mistake_ends_in_one_line(material, tmp_path, capsys, changes, part):
    with pytest.raises(SystemExit) as left:
        run(material, tmp_path, **changes)
    assert left.value.code == 2
    assert part in capsys.readouterr().err.strip().splitlines()[-1]
