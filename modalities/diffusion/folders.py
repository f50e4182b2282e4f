"""What a folder of a diffusers pipeline may hold before anything is loaded from it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

Family = Literal["sd15", "sdxl", "sd3"]
FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
}
SAFETY = ("safety_checker", "feature_extractor", "image_encoder")
_LIBRARIES = (None, "diffusers", "transformers", "stable_diffusion")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CODE_KEYS = ("auto_map", "custom_pipeline", "trust_remote_code", "_custom_pipeline")


def check_folder(folder: Path, *, variant: str | None = None) -> None:
    """Refuse a pipeline folder of an unknown kind, without safetensors, or that asks for code of its own.

    variant: an infix that the weights' files must have.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"model folder {folder} has no model_index.json: it is not a diffusers pipeline")
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    check_index(index, where=str(folder))
    parts = [name for name, value in index.items() if isinstance(value, list) and value[0] is not None]
    for name in (n for n in parts if n not in SAFETY):
        if not (folder / name).is_dir():
            raise ValueError(f"model folder {folder} lacks the folder '{name}' of its model_index.json")
        for path in (folder / name).glob("*.json"):
            _check_json(path)
        if name in ("vae", "unet", "transformer") or name.startswith("text_encoder"):
            _check_weights(folder / name, variant)


def check_index(index: dict[str, Any], *, where: str) -> Family:
    """The family that a model_index.json describes; ValueError for one that is not offered or brings code."""
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise ValueError(f"{where} is a {kind}; supported are {', '.join(FAMILIES)}")
    for key in _CODE_KEYS:
        if index.get(key):
            raise ValueError(f"{where}: model_index.json has '{key}'; a model's own code is never run")
    for name, value in index.items():
        if isinstance(value, list) and value[0] not in _LIBRARIES:
            raise ValueError(
                f"{where}: model_index.json takes '{name}' from '{value[0]}'; a model's own code is never run"
            )
    return FAMILIES[kind]


def _check_json(path: Path) -> None:
    """No configuration names code, and an index of shards names files of its folder only."""
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        return
    for key in content:
        if (key in _CODE_KEYS or key.endswith("_internal")) and content[key]:
            raise ValueError(f"{path} has '{key}'; a model's own code is never run")
    shards = content.get("weight_map", {}) if path.name.endswith(".index.json") else {}
    for name in set(shards.values()):
        if Path(name).name != name or not (path.parent / name).is_file():
            raise ValueError(f"{path}: weight_map names '{name}', which is not a file of this folder")


def _check_weights(folder: Path, variant: str | None) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        found = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLED)
        hint = f"; {', '.join(found)} would need pickle, convert it to safetensors" if found else ""
        raise ValueError(f"model folder {folder} has no .safetensors file{hint}")
    if variant and not any(f".{variant}." in p.name or f".{variant}-" in p.name for p in files):
        raise ValueError(f"model.variant={variant}: {folder} has only {', '.join(p.name for p in files)}")
