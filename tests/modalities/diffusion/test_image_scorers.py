"""Scorers on CLIP towers: formulas from the towers' own features, and loaders on small stand-ins."""

import json

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_diffusion import text_config, tokenizer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from triptych.modalities.diffusion.image_scorers import AESTHETIC_LAYERS, AESTHETIC_SIZES, AestheticHead
from triptych.modalities.diffusion.image_scoring import build_scorer, scores_of_images

WIDTH = 24
PROMPTS = ["a red cat", "a dog", "a red cat", "a very blue hat"]


def pictures(num=4):
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 255, (20 + 7 * i, 40, 3), dtype=np.uint8)) for i in range(num)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=WIDTH,
    )
    text = text_config(16, projection=WIDTH)
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    )
    model.save_pretrained(folder, safe_serialization=True)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessor(**size).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_clip_weights(tmp_path_factory):
    """A small architecture of open_clip's own kind, and its weights as a safetensors file."""
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": WIDTH,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / "tiny-ViT.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / "tiny-ViT.json")
    torch.manual_seed(1)
    model = open_clip.create_model("tiny-ViT")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    return str(folder / "weights.safetensors")


def expected_cosines(folder):
    """By transformers' own forward, one picture and prompt at a time."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor, words = CLIPImageProcessor.from_pretrained(folder), tokenizer()
    found = []
    for image, prompt in zip(pictures(), PROMPTS, strict=True):
        with torch.no_grad():
            out = model(
                pixel_values=processor(images=image, return_tensors="pt")["pixel_values"],
                **words(prompt, return_tensors="pt"),
            )
        found.append(float(out.logits_per_image / model.logit_scale.detach().exp()))
    return found, float(model.logit_scale.detach().exp())


def test_clip_score_and_pickscore_are_the_towers_cosines_in_their_gains(clip_folder):
    cosines, scale = expected_cosines(clip_folder)
    pick = build_scorer({"name": "pickscore", "options": {"name_or_path": str(clip_folder), "batch_size": 3}})
    assert pick(pictures(), PROMPTS).tolist() == pytest.approx([scale * c for c in cosines], abs=2e-3)
    clip = build_scorer({"name": "clip", "options": {"name_or_path": str(clip_folder)}})
    assert clip(pictures(), PROMPTS).tolist() == pytest.approx([2.5 * max(c, 0) for c in cosines], abs=4e-4)
    assert min(cosines) < 0 or min(clip(pictures(), PROMPTS)) >= 0


def test_a_batch_scores_as_its_pictures_one_by_one_and_in_their_order(clip_folder):
    scorer = build_scorer({"name": "pickscore", "options": {"name_or_path": str(clip_folder)}})
    together = scorer(pictures(), PROMPTS)
    alone = [float(scorer([i], [p])) for i, p in zip(pictures(), PROMPTS, strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    turned = scorer(pictures()[::-1], PROMPTS[::-1])
    assert turned.tolist() == pytest.approx(alone[::-1], abs=1e-5)
    assert together.dtype == torch.float32
    assert len(set(together.tolist())) == 4
    assert scorer([], []).shape == (0,)
    half = build_scorer(
        {"name": "pickscore", "options": {"name_or_path": str(clip_folder), "dtype": "bfloat16"}}
    )
    assert half(pictures(), PROMPTS).tolist() == pytest.approx(alone, abs=0.3)


def test_long_prompts_are_cut_and_pictures_of_any_mode_are_read(clip_folder):
    scorer = build_scorer({"name": "pickscore", "options": {"name_or_path": str(clip_folder)}})
    long = "a red cat " * 200
    grey = pictures(1)[0].convert("L").convert("RGB")
    assert scores_of_images(scorer, [grey], [long], "pick").shape == (1,)
    with pytest.raises(ValueError, match="2 pictures need as many prompts, not 1"):
        scores_of_images(scorer, pictures(2), ["a"], "pick")


def test_hpsv2_is_the_open_clip_cosine_of_padded_pictures(open_clip_weights):
    scorer = build_scorer(
        {"name": "hpsv2", "options": {"weights": open_clip_weights, "architecture": "tiny-ViT"}}
    )
    model, _, prepare = open_clip.create_model_and_transforms("tiny-ViT", image_resize_mode="longest")
    from safetensors.torch import load_file

    model.load_state_dict(load_file(open_clip_weights))
    words = open_clip.get_tokenizer("tiny-ViT")
    for image, prompt in zip(pictures(), PROMPTS, strict=True):
        with torch.no_grad():
            seen, said = model.eval().encode_image(prepare(image)[None]), model.encode_text(words([prompt]))
        expected = float(torch.nn.functional.cosine_similarity(seen, said))
        assert float(scorer([image], [prompt])) == pytest.approx(expected, abs=1e-5)


def head_file(path, width=768, **changes):
    torch.manual_seed(2)
    sizes = [width, *AESTHETIC_SIZES[1:]]
    state = {k: v.clone() for k, v in AestheticHead(sizes).state_dict().items()} | changes
    save_file(state, path)
    return path


def test_the_aesthetic_head_has_the_released_names_and_shapes_and_no_activation(tmp_path):
    state = AestheticHead.load(head_file(tmp_path / "head.safetensors")).state_dict()
    shapes = {
        f"layers.{i}.weight": s
        for i, s in zip(
            (0, 2, 4, 6, 7), ((1024, 768), (128, 1024), (64, 128), (16, 64), (1, 16)), strict=True
        )
    }
    assert {k: tuple(v.shape) for k, v in state.items() if k.endswith("weight")} == shapes
    head, x = AestheticHead(), torch.randn(3, 768)
    # Without activations the layers are one affine map.
    middle = head((x[:1] + x[1:2]) / 2)
    torch.testing.assert_close(middle, (head(x[:1]) + head(x[1:2])) / 2)


@pytest.mark.parametrize("towers", ["transformers", "open_clip"])
def test_the_aesthetic_score_is_the_head_on_unit_features_whatever_the_prompt(
    towers, clip_folder, open_clip_weights, tmp_path
):
    path = head_file(tmp_path / "head.safetensors", WIDTH)
    where = (
        {"name_or_path": str(clip_folder)}
        if towers == "transformers"
        else {"architecture": "tiny-ViT", "weights": open_clip_weights}
    )
    scorer = build_scorer({"name": "aesthetic", "options": {"head": str(path), **where}})
    scores = scorer(pictures(), PROMPTS)
    assert torch.equal(scores, scorer(pictures(), PROMPTS[::-1]))
    if towers == "transformers":
        model, processor = (
            CLIPModel.from_pretrained(clip_folder).eval(),
            CLIPImageProcessor.from_pretrained(clip_folder),
        )
        with torch.no_grad():
            found = model.get_image_features(
                **processor(images=pictures(), return_tensors="pt")
            ).pooler_output
            expected = AestheticHead.load(path)(torch.nn.functional.normalize(found, dim=-1))
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    wide = build_scorer(
        {"name": "aesthetic", "options": {"head": str(head_file(tmp_path / "wide.safetensors")), **where}}
    )
    with pytest.raises(ValueError, match="takes 768 features, and the tower gives 24"):
        wide(pictures(), PROMPTS)


def test_weights_that_do_not_fit_are_named(clip_folder, open_clip_weights, tmp_path):
    from safetensors.torch import load_file

    path = head_file(tmp_path / "odd.safetensors", **{"layers.1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"odd.safetensors: it is no aesthetic head.*layers.1.weight"):
        AestheticHead.load(path)
    path = head_file(tmp_path / "nan.safetensors", **{"layers.7.bias": torch.tensor([float("nan")])})
    with pytest.raises(ValueError, match=r"layers.7.bias holds inf or nan"):
        AestheticHead.load(path)
    state = load_file(open_clip_weights)
    lost = tmp_path / "lost.safetensors"
    save_file({k: v for k, v in state.items() if k != "visual.proj"}, lost)
    scorer = build_scorer({"name": "hpsv2", "options": {"weights": str(lost), "architecture": "tiny-ViT"}})
    with pytest.raises(ValueError, match=r"lost.safetensors lacks visual.proj \(1 tensors\)"):
        scorer(pictures(1), PROMPTS[:1])
    missing = build_scorer({"name": "pickscore", "options": {"name_or_path": str(tmp_path / "none")}})
    with pytest.raises(ValueError, match="cannot load the scorer"):
        missing(pictures(1), PROMPTS[:1])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hpsv2", {"weights": "HPS_v2.1_compressed.pt"}, "pickled weights can run code"),
        ("aesthetic", {"head": "sac+logos+ava1-l14-linearMSE.pth"}, "pickled weights can run code"),
        ("clip", {"architecture": "ViT-L-14"}, "architecture and weights go together"),
        ("pickscore", {"dtype": "int8"}, "dtype=int8"),
        ("pickscore", {"batch_size": 0}, "batch_size=0"),
        ("pikscore", {}, "Did you mean 'pickscore'"),
    ],
)
def test_what_cannot_be_a_scorer_is_refused_before_anything_is_loaded(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_scorer({"name": name, "options": options})


def test_the_real_architectures_have_the_sizes_that_the_scorers_expect():
    """PickScore's and HPSv2's CLIP-H is 1280 wide with 1024 features; the aesthetic head's ViT-L has 768."""
    for name, features, width, layers in (("ViT-H-14", 1024, 1280, 32), ("ViT-L-14", 768, 1024, 24)):
        config = open_clip.get_model_config(name)
        assert (config["embed_dim"], config["vision_cfg"]["width"], config["vision_cfg"]["layers"]) == (
            features,
            width,
            layers,
        )
        assert config["vision_cfg"]["image_size"] == 224
    assert AESTHETIC_SIZES[0] == open_clip.get_model_config("ViT-L-14")["embed_dim"]
    assert AESTHETIC_LAYERS == (0, 2, 4, 6, 7)
