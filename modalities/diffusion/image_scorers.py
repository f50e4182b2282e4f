"""Scorers of pictures that people use, on CLIP towers: CLIP score, PickScore, HPSv2, LAION's aesthetic head.

Weights come from a hub or a folder through transformers or open_clip, as safetensors alone; they are loaded
at the first call. Shapes: N pictures, D width of the shared embedding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from triptych.modalities.diffusion.image_scoring import SCORERS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Literal["float32", "bfloat16", "float16"]
Resize = Literal["shortest", "longest"]
PICKSCORE = "yuvalkirstain/PickScore_v1"
PICKSCORE_PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
# Tensor names and shapes of LAION's head; between its layers there is dropout and no activation.
AESTHETIC_SIZES = (768, 1024, 128, 64, 16, 1)
AESTHETIC_LAYERS = (0, 2, 4, 6, 7)
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Towers(Protocol):
    """A CLIP model's two sides: features of unit length, [N, D] float32 on its device."""

    @property
    def scale(self) -> float:
        """exp(logit_scale)."""
        ...

    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """Features of pictures."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Features of prompts, cut at the tower's length."""
        ...


@dataclass(frozen=True, slots=True)
class TransformersTowers:
    """A transformers CLIPModel with its image processor and tokenizer."""

    model: Any
    processor: Any
    tokenizer: Any

    @classmethod
    def load(
        cls, name: str, *, processor: str | None, revision: str | None, device: torch.device, dtype: Dtype
    ) -> TransformersTowers:
        """From a hub name or folder. processor: where image processor and tokenizer are, if elsewhere."""
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        refuse_pickle(Path(name))
        with _loading(name):
            any_model: Any = CLIPModel
            model = any_model.from_pretrained(
                name, revision=revision, use_safetensors=True, dtype=DTYPES[dtype]
            )
            where = processor or name
            own = revision if processor is None else None
            prepare: Any = AutoImageProcessor.from_pretrained(where, revision=own, backend="pil")
            tokenizer: Any = AutoTokenizer.from_pretrained(where, revision=own)
        return cls(model.to(device).eval().requires_grad_(False), prepare, tokenizer)

    @property
    def scale(self) -> float:
        """exp(logit_scale)."""
        return float(self.model.logit_scale.detach().float().exp())

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """See `Towers`."""
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        found = self.model.get_image_features(pixel_values=pixels.to(self.model.device, self.model.dtype))
        return _unit(_pooled(found))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """See `Towers`."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        asked = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return _unit(_pooled(self.model.get_text_features(**asked)))


@dataclass(frozen=True, slots=True)
class OpenClipTowers:
    """An open_clip model with its own transform and tokenizer."""

    model: Any
    prepare: Callable[[Image.Image], Tensor]
    tokenizer: Any

    @classmethod
    def load(
        cls, architecture: str, weights: str, *, resize: Resize, device: torch.device, dtype: Dtype
    ) -> OpenClipTowers:
        """architecture: open_clip's name. weights: a safetensors file, or 'hub-name:file' of one.

        ValueError for another format, and for weights that are not those of the architecture.
        """
        import open_clip
        from safetensors.torch import load_file

        path = _weights_file(weights)
        model, _, prepare = open_clip.create_model_and_transforms(
            architecture, pretrained=None, image_resize_mode=resize
        )
        _load_state(model, load_file(path), path)
        model = model.to(device, DTYPES[dtype]).eval().requires_grad_(False)
        transform: Any = prepare
        return cls(model, transform, open_clip.get_tokenizer(architecture))

    @property
    def scale(self) -> float:
        """exp(logit_scale)."""
        return float(self.model.logit_scale.detach().float().exp())

    @torch.no_grad()
    def images(self, images: Sequence[Image.Image]) -> Tensor:
        """See `Towers`."""
        own = next(self.model.parameters())
        pixels = torch.stack([self.prepare(image.convert("RGB")) for image in images])
        return _unit(self.model.encode_image(pixels.to(own.device, own.dtype)))

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """See `Towers`."""
        tokens = self.tokenizer(list(texts)).to(next(self.model.parameters()).device)
        return _unit(self.model.encode_text(tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where a scorer's towers are: a transformers model, or an open_clip architecture with its weights.

    name_or_path: a hub name or folder of a transformers CLIPModel; processor: of its image processor and
    tokenizer, if elsewhere. architecture, weights: open_clip's name, and a safetensors file or
    'hub-name:file'; resize 'longest' pads a picture where 'shortest' cuts it. device 'auto' is a GPU where
    there is one. batch_size: pictures at a time.
    """

    name_or_path: str | None = None
    processor: str | None = None
    revision: str | None = None
    architecture: str | None = None
    weights: str | None = None
    resize: Resize = "shortest"
    device: str = "auto"
    dtype: Dtype = "float32"
    batch_size: int = 32

    def __post_init__(self) -> None:
        if (self.name_or_path is None) == (self.architecture is None):
            raise ValueError("give name_or_path (transformers) or architecture and weights (open_clip)")
        if (self.architecture is None) != (self.weights is None):
            raise ValueError("architecture and weights go together")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype} is not one of {', '.join(DTYPES)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")
        for place in (self.name_or_path, self.weights):
            if place is not None:
                refuse_pickle(Path(place))

    def on(self) -> torch.device:
        """The device."""
        best = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(best if self.device == "auto" else self.device)

    def load(self) -> Towers:
        """The towers."""
        if self.name_or_path is not None:
            return TransformersTowers.load(
                self.name_or_path,
                processor=self.processor,
                revision=self.revision,
                device=self.on(),
                dtype=self.dtype,
            )
        assert self.architecture is not None
        assert self.weights is not None
        return OpenClipTowers.load(
            self.architecture, self.weights, resize=self.resize, device=self.on(), dtype=self.dtype
        )


class CosineScorer:
    """gain <f(image), g(prompt)> of features of unit length, at least `floor`."""

    def __init__(self, places: _Places, *, gain: float | None, floor: float = -math.inf):
        self.places, self.gain, self.floor = places, gain, floor
        self._towers: Towers | None = None

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores, [N]; each different prompt is encoded once a batch."""
        towers = self._towers = self._towers or self.places.load()
        gain = towers.scale if self.gain is None else self.gain
        scores: list[Tensor] = []
        for start in range(0, len(images), self.places.batch_size):
            cut = slice(start, start + self.places.batch_size)
            texts = list(dict.fromkeys(prompts[cut]))
            rows = torch.tensor([texts.index(prompt) for prompt in prompts[cut]])
            features = towers.texts(texts)[rows.to(self.places.on())]
            scores.append(
                (gain * (towers.images(images[cut]) * features).sum(-1)).clamp(min=self.floor).cpu()
            )
        return torch.cat(scores) if scores else torch.zeros(0)


@SCORERS.register("clip")
def clip_scorer(
    *,
    name_or_path: str | None = "openai/clip-vit-large-patch14",
    processor: str | None = None,
    revision: str | None = None,
    architecture: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_size: int = 32,
) -> CosineScorer:
    """CLIP score: 2.5 max(cos, 0). Hessel et al. 2021 (CLIPScore), eq. 1."""
    name = None if architecture is not None else name_or_path
    places = _Places(
        name_or_path=name,
        processor=processor,
        revision=revision,
        architecture=architecture,
        weights=weights,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
    )
    return CosineScorer(places, gain=2.5, floor=0.0)


@SCORERS.register("pickscore")
def pickscore(
    *,
    name_or_path: str = PICKSCORE,
    processor: str | None = None,
    revision: str | None = None,
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_size: int = 32,
) -> CosineScorer:
    """exp(logit_scale) cos of the CLIP-H that learnt Pick-a-Pic. Kirstain et al. 2023, arXiv 2305.01569.

    The release has no processor of its own and CLIP-H's is taken; a folder is taken to have one.
    """
    own = None if Path(name_or_path).is_dir() else PICKSCORE_PROCESSOR
    places = _Places(
        name_or_path=name_or_path,
        processor=processor or own,
        revision=revision,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
    )
    return CosineScorer(places, gain=None)


@SCORERS.register("hpsv2")
def hpsv2(
    *,
    weights: str,
    architecture: str = "ViT-H-14",
    device: str = "auto",
    dtype: Dtype = "float32",
    batch_size: int = 32,
) -> CosineScorer:
    """cos of an open_clip ViT-H-14 that learnt HPD; pictures are padded. Wu et al. 2023, arXiv 2306.09341.

    weights: a safetensors file. The release (xswu/HPSv2, HPS_v2.1_compressed.pt) is a pickle; once, where you
    trust it: save_file({k: v.contiguous() for k, v in torch.load(file,
    weights_only=True)['state_dict'].items()}, 'hps_v2.1.safetensors').
    """
    places = _Places(
        architecture=architecture,
        weights=weights,
        resize="longest",
        device=device,
        dtype=dtype,
        batch_size=batch_size,
    )
    return CosineScorer(places, gain=1.0)


class AestheticHead(nn.Module):
    """LAION's improved aesthetic predictor: linear layers with dropout between them, and no activation.

    Names and shapes are the release's (sac+logos+ava1-l14-linearMSE): layers.0 [1024, 768], layers.2 [128,
    1024], layers.4 [64, 128], layers.6 [16, 64], layers.7 [1, 16].
    """

    def __init__(self, sizes: Sequence[int] = AESTHETIC_SIZES):
        super().__init__()
        made = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
        self.layers = nn.ModuleDict({str(i): layer for i, layer in zip(AESTHETIC_LAYERS, made, strict=True)})

    def forward(self, features: Tensor) -> Tensor:
        """About 1 to 10 for features of unit length, [N, D] -> [N]."""
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)

    @classmethod
    def load(cls, path: Path) -> AestheticHead:
        """From safetensors with the release's names; ValueError naming what does not fit."""
        from safetensors.torch import load_file

        refuse_pickle(path)
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file of an aesthetic head")
        state = load_file(path)
        wanted = {f"layers.{i}.{part}" for i in AESTHETIC_LAYERS for part in ("weight", "bias")}
        if state.keys() != wanted:
            odd = ", ".join(sorted(state.keys() ^ wanted))
            raise ValueError(f"{path}: it is no aesthetic head, which has layers 0, 2, 4, 6, 7; see {odd}")
        weights = [state[f"layers.{i}.weight"] for i in AESTHETIC_LAYERS]
        head = cls([weights[0].shape[1], *(w.shape[0] for w in weights)])
        _load_state(head, state, path)
        return head.eval().requires_grad_(False)


@SCORERS.register("aesthetic")
@dataclass(frozen=True, slots=True, kw_only=True)
class AestheticScorer:
    """LAION's aesthetic score of the picture alone, about 1 to 10 (Schuhmann et al. 2022, section on V2).

    head: its safetensors file (the release is a pickle; convert it once, see `hpsv2`). The tower is CLIP
    ViT-L/14, through transformers, or open_clip where architecture and weights are given.
    """

    head: str
    name_or_path: str | None = "openai/clip-vit-large-patch14"
    processor: str | None = None
    revision: str | None = None
    architecture: str | None = None
    weights: str | None = None
    device: str = "auto"
    dtype: Dtype = "float32"
    batch_size: int = 32
    _made: list[tuple[Towers, AestheticHead]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        refuse_pickle(Path(self.head))
        self._places()

    def _places(self) -> _Places:
        return _Places(
            name_or_path=None if self.architecture is not None else self.name_or_path,
            processor=self.processor,
            revision=self.revision,
            architecture=self.architecture,
            weights=self.weights,
            device=self.device,
            dtype=self.dtype,
            batch_size=self.batch_size,
        )

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores, [N]; ValueError for a head of another width than the tower's."""
        if not self._made:
            places = self._places()
            self._made.append((places.load(), AestheticHead.load(Path(self.head)).to(places.on())))
        towers, head = self._made[0]
        width = next(head.parameters()).shape[1]
        scores: list[Tensor] = []
        for start in range(0, len(images), self.batch_size):
            features = towers.images(images[start : start + self.batch_size])
            if features.shape[1] != width:
                raise ValueError(
                    f"{self.head}: it takes {width} features, and the tower gives {features.shape[1]}"
                )
            scores.append(head(features).cpu())
        return torch.cat(scores) if scores else torch.zeros(0)


def refuse_pickle(path: Path) -> None:
    """ValueError with the remedy for a file that would be unpickled."""
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path}: pickled weights can run code and are not read; where you trust the file, convert it "
            "once with safetensors.torch.save_file(torch.load(file, weights_only=True), ...)"
        )


def _weights_file(weights: str) -> Path:
    """The local file of 'path' or 'hub-name:file'."""
    if ":" in weights and not Path(weights).exists():
        from huggingface_hub import hf_hub_download

        name, _, file = weights.partition(":")
        refuse_pickle(Path(file))
        with _loading(weights):
            return Path(hf_hub_download(name, file))
    path = Path(weights)
    refuse_pickle(path)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file of weights")
    return path


def _load_state(model: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Strictly; ValueError naming the first tensors that do not fit."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [n for n in own.keys() & state.keys() if own[n].shape != state[n].shape]
    for what, names in (("lacks", missing), ("has besides", extra), ("has other shapes of", sorted(shapes))):
        if names:
            raise ValueError(f"{path} {what} {', '.join(names[:3])} ({len(names)} tensors)")
    broken = [n for n, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{path}: {broken[0]} holds inf or nan")
    model.load_state_dict(state)


class _loading:
    """What a library says of a model that it cannot load, as one line naming the model."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"cannot load the scorer {self.name}: {reason}") from error


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=-1)


def _pooled(found: Any) -> Tensor:
    """transformers 5 gives an output object, transformers 4 the tensor."""
    return found if isinstance(found, Tensor) else found.pooler_output
