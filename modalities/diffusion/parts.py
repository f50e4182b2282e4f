"""One part of an encoded data set while it is made: contexts that wait for their latents, in full batches."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from triptych.modalities.diffusion.crops import Size, Window, to_pixels
from triptych.modalities.diffusion.cutting import CutRecord, Picture, enough
from triptych.modalities.diffusion.encoders import NOT_FINITE, Encoders, Latent
from triptych.modalities.diffusion.records import ImageRecord
from triptych.modalities.diffusion.shards import EncodedContext, EncodedPrompt, ShardWriter, prompt_hash
from triptych.training.quarantine import DataError

# Crops of all shapes that may wait for a full batch, in batches.
_WAITING_BATCHES = 8
_Key = tuple[str, Window]


@dataclass(frozen=True, slots=True, kw_only=True)
class Storing:
    """What is kept of an image and a prompt, and how many are encoded at once."""

    keep_logvar: bool
    dtype: torch.dtype
    prompt_dtype: torch.dtype
    vae_batch_size: int
    text_batch_size: int


class Part:
    """Takes the records of one part, then writes it. An image in the same window is encoded once."""

    def __init__(self, encoders: Encoders, storing: Storing):
        self.num_read = self.num_images_read = 0
        self._encoders, self._storing = encoders, storing
        self._ids = hashlib.sha256()
        self._records: list[tuple[ImageRecord, list[tuple[int, _Key]]]] = []
        self._latents: dict[_Key, tuple[Tensor, ...] | None] = {}
        self._waiting: dict[Size, list[Picture]] = defaultdict(list)
        self._errors: list[DataError] = []

    def took(self, record: ImageRecord) -> None:
        """Note that a record was read for this part."""
        self.num_read += 1
        self.num_images_read += len(record.images)
        self._ids.update(record.id.encode())

    def add(self, cut: CutRecord) -> None:
        """Queue the images of a record and encode what makes a full batch."""
        self._errors += cut.errors
        self._records.append((cut.record, [(p.index, p.key) for p in cut.pictures]))
        size = self._storing.vae_batch_size
        for picture in cut.pictures:
            if picture.key not in self._latents:
                self._latents[picture.key] = None
                queue = self._waiting[picture.part.target]
                queue.append(picture)
                if len(queue) == size:
                    self._encode(picture.part.target)
        while sum(len(queue) for queue in self._waiting.values()) >= _WAITING_BATCHES * size:
            self._encode(max(self._waiting, key=lambda s: (len(self._waiting[s]), s)))

    def write(self, writer: ShardWriter) -> dict[str, Any]:
        """Encode what still waits, write the part, and return its facts."""
        for size in sorted(self._waiting):
            self._encode(size)
        contexts = [c for record, shown in self._records if (c := self._context(record, shown)) is not None]
        new = [p for p in dict.fromkeys(c.prompt for c in contexts) if prompt_hash(p) not in writer.known]
        shapes: Counter[str] = Counter()
        for c in contexts:
            shapes["x".join(map(str, c.latents.shape[1:]))] += len(c.latents)
        facts = {
            "num_read": self.num_read,
            "ids": self._ids.hexdigest(),
            "num_records": len(contexts),
            "num_images": shapes.total(),
            "num_grouped": sum(c.group is not None for c in contexts),
            "num_cut_prompts": self._encoders.text.num_cut(new),
            "kinds": dict(sorted(Counter(c.kind for c in contexts).items())),
            "shapes": dict(sorted(shapes.items())),
            "left_out": [_as_dict(e) for e in self._errors],
        }
        writer.write(contexts, stored_prompts(self._encoders, self._storing, new), facts)
        return facts

    def _encode(self, size: Size) -> None:
        """The latents of the images of one size that wait, None for those that are not finite."""
        batch = self._waiting.pop(size)
        pixels = torch.stack([to_pixels(p.image) for p in batch])
        found = self._encoders.vae.encode(pixels, [p.source.name for p in batch])
        for picture, latent in zip(batch, found, strict=True):
            stored = self._stored(latent) if isinstance(latent, Latent) else ()
            if not stored or not all(bool(t.isfinite().all()) for t in stored):
                remedy = "look at the image; if it looks right, use model.vae_dtype=float32"
                self._errors.append(picture.source.error(NOT_FINITE, remedy))
                continue
            self._latents[picture.key] = stored

    def _stored(self, latent: Latent) -> tuple[Tensor, ...]:
        kept = (latent.mean, latent.logvar) if self._storing.keep_logvar else (latent.mean,)
        return tuple(t.to(self._storing.dtype) for t in kept)

    def _context(self, record: ImageRecord, shown: Sequence[tuple[int, _Key]]) -> EncodedContext | None:
        """A record as it is stored, or None, with the reason noted, when too few of its images are left."""
        left = [(index, key, stored) for index, key in shown if (stored := self._latents[key]) is not None]
        if error := enough(record, len(left)):
            self._errors.append(error)
        if error or not left:
            return None
        return EncodedContext(
            id=record.id,
            source=record.source,
            kind=record.kind,
            prompt=record.prompt,
            group=record.group,
            latents=torch.stack([stored[0] for _, _, stored in left]),
            logvar=torch.stack([s[1] for _, _, s in left]) if self._storing.keep_logvar else None,
            time_ids=tuple(part.time_ids for _, (_, part), _ in left),
            contents=tuple(content for _, (content, _), _ in left),
            relevance=tuple(record.relevance[index] for index, _, _ in left),
            strength=record.strength,
            margin=record.margin,
        )


def stored_prompts(encoders: Encoders, storing: Storing, prompts: Sequence[str]) -> dict[str, EncodedPrompt]:
    """Hash -> embeddings of each prompt in the dtype that is stored."""
    found = encoders.text.encode(prompts, batch_size=storing.text_batch_size)
    dtype = storing.prompt_dtype
    stored = {
        prompt_hash(prompt): EncodedPrompt(
            e.embeds.to(dtype), None if e.pooled is None else e.pooled.to(dtype)
        )
        for prompt, e in found.items()
    }
    for prompt, e in zip(found, stored.values(), strict=True):
        if not all(bool(t.isfinite().all()) for t in (e.embeds, e.pooled) if t is not None):
            raise ValueError(
                f"the embeddings of {prompt[:80]!r} do not fit into {dtype}; use prompt_dtype=bfloat16"
            )
    return stored


def _as_dict(error: DataError) -> dict[str, str]:
    names = ("reason", "source", "field", "remedy", "preview")
    return {name: getattr(error, name) for name in names}
