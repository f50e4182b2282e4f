"""The step-aware preference model: a CLIP that is told how noisy the picture is that it sees.

Liang et al. 2024 (SPO, arXiv 2406.04314), section 3.1. Shapes: N pictures, P patches and the class token, D
width of the vision tower, R its pixels a side, L tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from triptych.modalities.diffusion.image_scorers import refuse_pickle
from triptych.training.atomic import clean_temporary, make_temporary, publish

# OpenAI's, which every CLIP here was trained with.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
MODULATION = "modulation.safetensors"
SETTINGS = "step_scorer.json"
_FREQUENCIES = 256


def clip_pixels(pictures: Tensor, size: int) -> Tensor:
    """Pictures [N, 3, H, W] about in [-1, 1] as a CLIP of `size` pixels sees them, [N, 3, R, R] float32.

    As CLIP's processor, on the device: the short side is resized (bicubic, antialiased), the centre is cut,
    and channels are normalised.
    """
    pictures = (pictures.float() / 2 + 0.5).clamp(0, 1)
    height, width = pictures.shape[-2:]
    scale = size / min(height, width)
    shape = [max(size, round(side * scale)) for side in (height, width)]
    if shape != [height, width]:
        pictures = nn.functional.interpolate(
            pictures, shape, mode="bicubic", antialias=True, align_corners=False
        ).clamp(0, 1)
    top, left = ((side - size) // 2 for side in shape)
    pictures = pictures[..., top : top + size, left : left + size]
    mean, std = (torch.tensor(x, device=pictures.device).view(1, 3, 1, 1) for x in (MEAN, STD))
    return (pictures - mean) / std


class TimeEmbedding(nn.Module):
    """Times [N] -> [N, D]: sinusoids of 256 numbers through a network with one SiLU."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(_FREQUENCIES, width), nn.Linear(width, width)

    def forward(self, times: Tensor) -> Tensor:
        """The embeddings."""
        half = _FREQUENCIES // 2
        rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=times.device) / half)
        angles = times.float()[:, None] * rates
        waves = torch.cat([angles.cos(), angles.sin()], -1).to(self.first.weight.dtype)
        return self.second(nn.functional.silu(self.first(waves)))


class Modulation(nn.Module):
    """n vectors of the width from the time, [N, n, D]; all 0 at the start, so that nothing is changed."""

    def __init__(self, width: int, num: int):
        super().__init__()
        self.num, self.linear = num, nn.Linear(width, num * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, time: Tensor) -> Tensor:
        """shift, scale (and gate less 1) of each part."""
        return self.linear(nn.functional.silu(time)).unflatten(-1, (self.num, -1))


class StepScorer(nn.Module):
    """score = exp(logit_scale) cos(f(x, t), g(prompt)), f CLIP's vision tower with adaLN in every layer.

    x -> x + (1 + gate_a) attention((1 + scale_a) norm(x) + shift_a), and so for the MLP; the pooled output is
    scaled and shifted, too. The network of the time ends in zeros: gates are 1, shifts and scales 0, so
    before training it is the CLIP it was made of (PickScore, for SPO) at every time. checkpointing: layers
    are computed again in the backward pass.
    """

    def __init__(self, clip: Any, tokenizer: Any, *, checkpointing: bool = False):
        super().__init__()
        self.clip, self.checkpointing = clip, checkpointing
        # Not a module, so not in the state.
        self.tokenizer = tokenizer
        width = clip.config.vision_config.hidden_size
        self.time = TimeEmbedding(width)
        self.layers = nn.ModuleList([Modulation(width, 6) for _ in clip.vision_model.encoder.layers])
        self.last = Modulation(width, 2)

    @classmethod
    def from_clip(cls, clip: Any, tokenizer: Any, **options: Any) -> StepScorer:
        """Untrained, on a transformers CLIPModel."""
        return cls(clip, tokenizer, **options).to(clip.dtype)

    @property
    def image_size(self) -> int:
        """R."""
        return self.clip.config.vision_config.image_size

    def image_features(self, pixels: Tensor, times: Tensor) -> Tensor:
        """Of unit length, [N, E] float32, of normalised pixels [N, 3, R, R] seen from times [N]."""
        vision = self.clip.vision_model
        # transformers has spelt it so since its first CLIP.
        x = vision.pre_layrnorm(vision.embeddings(pixels.to(self.clip.dtype)))
        time = self.time(times)
        for layer, modulation in zip(vision.encoder.layers, self.layers, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(_modulated, layer, x, modulation(time), use_reentrant=False)
            else:
                x = _modulated(layer, x, modulation(time))
        shift, scale = self.last(time).unbind(1)
        pooled = vision.post_layernorm(x[:, 0]) * (1 + scale) + shift
        return nn.functional.normalize(self.clip.visual_projection(pooled).float(), dim=-1)

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Of unit length, [N, E] float32; each different text is encoded once, cut at the tower's length."""
        different = list(dict.fromkeys(texts))
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            different, padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        asked = {name: tokens[name].to(self.clip.device) for name in ("input_ids", "attention_mask")}
        found = self.clip.get_text_features(**asked)
        found = found if isinstance(found, Tensor) else found.pooler_output
        rows = torch.tensor([different.index(text) for text in texts], device=found.device)
        return nn.functional.normalize(found.float(), dim=-1)[rows]

    def score(self, pixels: Tensor, texts: Sequence[str], times: Tensor) -> Tensor:
        """Scores [N] float32 of normalised pixels [N, 3, R, R] (`clip_pixels`) at times [N]."""
        cosines = (self.image_features(pixels, times) * self.text_features(texts)).sum(-1)
        return self.clip.logit_scale.float().exp() * cosines


def _modulated(layer: Any, x: Tensor, modulation: Tensor) -> Tensor:
    """One layer of the tower, [N, P, D]; modulation: [N, 6, D]."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (m.unsqueeze(1) for m in modulation.unbind(1))
    inner = layer.layer_norm1(x) * (1 + scale_a) + shift_a
    x = x + (1 + gate_a) * layer.self_attn(hidden_states=inner, attention_mask=None)[0]
    return x + (1 + gate_m) * layer.mlp(layer.layer_norm2(x) * (1 + scale_m) + shift_m)


def load_clip(name_or_path: str, revision: str | None = None, *, tokenizer: str | None = None) -> Any:
    """(CLIPModel, tokenizer) of a hub name or folder, safetensors alone.

    tokenizer: where it is, if elsewhere. ValueError in one line for what cannot be loaded.
    """
    from transformers import AutoTokenizer, CLIPModel

    refuse_pickle(Path(name_or_path))
    any_model: Any = CLIPModel
    any_tokenizer: Any = AutoTokenizer
    try:
        clip = any_model.from_pretrained(name_or_path, revision=revision, use_safetensors=True)
        own = revision if tokenizer is None else None
        return clip, any_tokenizer.from_pretrained(tokenizer or name_or_path, revision=own)
    except OSError as error:
        raise ValueError(
            f"cannot load CLIP from {name_or_path}: {' '.join(str(error).split())[:300]}"
        ) from error


def save_step_scorer(scorer: StepScorer, folder: Path) -> None:
    """Write the CLIP as transformers does, the network of the time beside it, and what makes them one."""
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    clean_temporary(folder.parent)
    temporary = make_temporary(folder)
    scorer.clip.save_pretrained(temporary)
    scorer.tokenizer.save_pretrained(temporary)
    own = {
        k: v.detach().cpu().contiguous() for k, v in scorer.state_dict().items() if not k.startswith("clip.")
    }
    save_file(own, temporary / MODULATION)
    (temporary / SETTINGS).write_text(json.dumps({"type": "step_scorer"}) + "\n", "utf-8")
    publish(temporary, folder)


def load_step_scorer(folder: Path) -> StepScorer:
    """A saved scorer in evaluation mode, frozen; ValueError naming what the folder lacks."""
    from safetensors.torch import load_file

    for name in (SETTINGS, MODULATION):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no step-aware scorer: it has no {name}")
    scorer = StepScorer(*load_clip(str(folder)))
    state = load_file(folder / MODULATION)
    own = {k: v for k, v in scorer.state_dict().items() if not k.startswith("clip.")}
    odd = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
    if odd:
        raise ValueError(f"{folder / MODULATION} does not fit the CLIP beside it: see {', '.join(odd[:3])}")
    scorer.load_state_dict(state, strict=False)
    return scorer.eval().requires_grad_(False)
