"""What the training of image scorers is given: a tiny CLIP, picture files and encoded pairs to learn."""

import hashlib

import torch
from image_files import encoded, write_lines
from PIL import Image
from tiny_diffusion import (
    FIRST_WIDTH,
    LATENT,
    MAX_TOKENS,
    PIXELS,
    TINY,
    text_config,
    tokenizer,
    write_pipeline,
)
from tiny_runs import CHANNELS, POOLED, WIDTHS
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig

from triptych.modalities.diffusion.shards import EncodedContext, EncodedPrompt, ShardWriter, prompt_hash

SIDE = 16


def write_clip(folder, *, seed=0):
    """A CLIP of 16 pixels with tokenizer and image processor, as one is published."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        projection_dim=12,
    )
    text = text_config(FIRST_WIDTH, projection=12)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    size = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size).save_pretrained(folder)
    return folder


def picture(bright, seed, *, width=24, height=20):
    """A grey picture with a little noise, light or dark."""
    draw = torch.Generator().manual_seed(seed)
    pixels = (190 if bright else 60) + torch.randint(-30, 30, (height, width, 3), generator=draw)
    return Image.fromarray(pixels.to(torch.uint8).numpy())


def write_pictures(folder, num=24, *, ties=2, spoilt=1, repeated=3):
    """Pairs of PNG files, the light one preferred; ties, a broken file, and one prompt with several pairs."""
    folder.mkdir(parents=True)
    rows = []
    for i in range(num):
        names = [f"{i}-light.png", f"{i}-dark.png"]
        for k, name in enumerate(names):
            (folder / name).write_bytes(encoded(picture(k == 0, 2 * i + k), "PNG"))
        prompt = "the first cat" if i < repeated else f"cat number {i}"
        row = {"prompt": prompt, "chosen": names[0], "rejected": names[1]}
        rows.append(row | ({"strength": 0.5} if num - ties <= i else {}))
    for i in range(num - ties - spoilt, num - ties):
        (folder / f"{i}-dark.png").write_bytes(b"\x89PNG\r\n\x1a\n and then nothing")
    write_lines(folder / "metadata.jsonl", rows)
    return folder


def latents(bright, draw, channels, width=LATENT):
    """Noise around +1 or -1."""
    return (1.0 if bright else -1.0) + 0.3 * torch.randn(channels, LATENT, width, generator=draw)


def write_encoded_pairs(folder, family, num=24, *, ties=2, repeated=3, widths=(LATENT,)):
    """Encoded pairs whose light latent is preferred; ties, and one prompt with several pairs.

    widths: of the latents, in turn.
    """
    draw = torch.Generator().manual_seed(0)
    pooled = POOLED[family]
    # Embeddings of all prompts have much in common.
    shared = torch.randn(WIDTHS[family], generator=draw), torch.randn(pooled or 1, generator=draw)

    def embedded():
        own = shared[0] + 0.5 * torch.randn(MAX_TOKENS, WIDTHS[family], generator=draw)
        if pooled is None:
            return EncodedPrompt(own)
        return EncodedPrompt(own, shared[1] + 0.5 * torch.randn(pooled, generator=draw))

    contexts, prompts = [], {}
    for i in range(num):
        text = "the first cat" if i < repeated else f"cat number {i}"
        if prompt_hash(text) not in prompts:
            prompts[prompt_hash(text)] = embedded()
        width = widths[i % len(widths)]
        pair = torch.stack([latents(k == 0, draw, CHANNELS[family], width) for k in range(2)])
        contexts.append(
            EncodedContext(
                id=f"{i:032x}",
                source=f"made:{i}",
                kind="pair",
                prompt=text,
                group=None,
                latents=pair,
                time_ids=((PIXELS, PIXELS, 0, 0, PIXELS, PIXELS),) * 2,
                contents=tuple(hashlib.sha256(f"{i} {k}".encode()).hexdigest() for k in range(2)),
                relevance=(1.0, 0.0),
                strength=0.5 if num - ties <= i else None,
            )
        )
    writer = ShardWriter(folder, {"made": family}, empty=embedded())
    writer.write(contexts, prompts)
    writer.finish({"family": family})
    return folder


def write_material(folder):
    """A tiny CLIP, pipelines of two families, and data for each."""
    write_clip(folder / "clip")
    write_pictures(folder / "pictures")
    for family in ("sd15", "sdxl"):
        write_pipeline(TINY[family](), folder / family)
        write_encoded_pairs(folder / f"pairs-{family}", family)
    return folder
