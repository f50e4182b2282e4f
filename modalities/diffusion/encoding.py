"""The offline step of a diffusion run: preference records in, an encoded data set out, once and for all.

Training then needs no image, VAE or text encoder. Records are streamed; what is in memory is one part's
latents, the crops that wait for a batch, and a hash of each different prompt.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from triptych.modalities.diffusion.crops import Crop, buckets
from triptych.modalities.diffusion.cutting import Cutting, ahead, cut_record
from triptych.modalities.diffusion.encoders import EncoderConfig, Encoders
from triptych.modalities.diffusion.images import ImageLimits
from triptych.modalities.diffusion.model import DTYPES
from triptych.modalities.diffusion.parts import Part, Storing, stored_prompts
from triptych.modalities.diffusion.records import ImageRecord
from triptych.modalities.diffusion.shards import ShardWriter, prompt_hash
from triptych.modalities.diffusion.sources import RecordSource, SourceConfig
from triptych.training.atomic import is_full_disk
from triptych.training.logs import Progress
from triptych.training.quarantine import DataError

# A part also ends when it holds this many images a context, so that long lists do not fill the memory.
_IMAGES_A_CONTEXT = 4
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """One encoding.

    resolution: the side of the square whose area every image has; null is what the model was made for.
    buckets 'aspect' keeps the images' shape, in steps of bucket_step pixels. crop, flip (a probability),
    max_upscale: see `crops`; one draw a context, for all epochs. keep 'mean_logvar' stores the posterior, so
    that training can sample from it; dtype: of what is stored. contexts_per_part: records that one file set
    holds, and that a killed run repeats at most. num_workers: threads that open and cut images; it and the
    batch sizes change speed and memory only.
    """

    model: EncoderConfig
    data: SourceConfig
    output_dir: str
    resolution: int | None = None
    buckets: Literal["aspect", "square"] = "aspect"
    bucket_step: int = 64
    crop: Crop = "center"
    flip: float = 0.0
    max_upscale: float = 2.0
    keep: Literal["mean", "mean_logvar"] = "mean"
    dtype: Dtype = "float16"
    prompt_dtype: Dtype = "float16"
    contexts_per_part: int = 512
    vae_batch_size: int = 4
    text_batch_size: int = 64
    num_workers: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("contexts_per_part", "vae_batch_size", "text_batch_size", "num_workers", "bucket_step"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"flip={self.flip} is a probability and must be in [0, 1]")
        if not self.max_upscale >= 1:
            raise ValueError(f"max_upscale={self.max_upscale} must be at least 1")
        if self.resolution is not None:
            buckets(self.resolution, step=self.bucket_step)


def encode(
    config: EncodeConfig,
    encoders: Encoders,
    records: RecordSource,
    *,
    report: Callable[[str], None],
    bar: Callable[[int, int], Progress],
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Write the encoded data set of `records` into config.output_dir; its facts, or None if `stop` said so.

    Started again after whatever end, it goes on with the next part, and the files are byte for byte those of
    an uninterrupted run (same device and batch sizes). bar: maker of a progress bar from (total, start).
    ValueError (DataError among them) in one line for anything the user can mend.
    """
    cutting, storing = _cutting(config, encoders), _storing(config)
    empty = stored_prompts(encoders, storing, [""])[prompt_hash("")]
    writer = ShardWriter(Path(config.output_dir), _identity(config, encoders, cutting), empty=empty)
    found = [_skip_part(records, writer, i) for i in range(writer.num_parts)]
    if found:
        report(f"going on after {len(found)} parts with {records.num_read:,} records")
    with closing(_Pace(records, writer, report, bar)) as pace, ThreadPoolExecutor(config.num_workers) as pool:
        while True:
            part = Part(encoders, storing)
            chosen = _of_part(records, part, config.contexts_per_part)
            for cut in ahead(pool, partial(cut_record, cutting=cutting), chosen, config.num_workers + 1):
                if stop():
                    return None
                part.add(cut)
                pace.update()
            if not part.num_read:
                break
            facts = _write(part, writer)
            records.leave_out(facts)
            found.append(_counts(facts))
            pace.part_done(found)
        pace.finish()
    if not sum(f["num_records"] for f in found):
        why = records.quarantine.summary()
        raise DataError("gave nothing to learn from", source=config.data.source, remedy=why)
    facts = _facts(config, encoders, cutting, found)
    facts |= {"left_out": dict(sorted(records.quarantine.counts.items())), "num_rows": records.num_rows}
    facts |= {"num_bytes": _num_bytes(writer.folder)}
    writer.finish(facts)
    return facts


def _of_part(records: RecordSource, part: Part, num_contexts: int) -> Iterator[ImageRecord]:
    """Records until a part has enough of them or of their images."""
    while part.num_read < num_contexts and part.num_images_read < _IMAGES_A_CONTEXT * num_contexts:
        record = records.take()
        if record is None:
            return
        part.took(record)
        yield record


def _skip_part(records: RecordSource, writer: ShardWriter, index: int) -> dict[str, Any]:
    """Go past the records of a part that is there; ValueError when they are not those it was made of."""
    facts = writer.part_facts(index)
    ids = hashlib.sha256()
    for _ in range(facts["num_read"]):
        record = records.take()
        ids.update(b"" if record is None else record.id.encode())
    if ids.hexdigest() != facts["ids"]:
        raise ValueError(
            f"{writer.folder} was begun with other data: part {index} holds records that are no longer what "
            "data.source gives; give another output folder or remove this one"
        )
    records.leave_out(facts)
    return _counts(facts)


def _counts(facts: dict[str, Any]) -> dict[str, Any]:
    """A part's facts without its list of what was left out, which may be long."""
    return {name: value for name, value in facts.items() if name != "left_out"}


def _write(part: Part, writer: ShardWriter) -> dict[str, Any]:
    try:
        return part.write(writer)
    except Exception as error:
        if not is_full_disk(error):
            raise
        raise ValueError(
            f"{writer.folder}: the disk is full after {writer.num_parts} parts; make room, and the same "
            "command goes on"
        ) from error


class _Pace:
    """What a person sees of an encoding: a bar where the total is known, else a line a part."""

    def __init__(
        self,
        records: RecordSource,
        writer: ShardWriter,
        report: Callable[[str], None],
        bar: Callable[[int, int], Progress],
    ):
        self._records, self._writer, self._report = records, writer, report
        self._bar = None if records.total is None else bar(max(records.total, 1), records.num_rows)
        self._first = True

    def update(self) -> None:
        """Move the bar to the rows that are done with."""
        if self._bar is not None and self._records.total is not None:
            self._bar.update(min(self._records.num_rows, self._records.total))

    def part_done(self, found: list[dict[str, Any]]) -> None:
        """After the first part of this start, say what the whole will take; without a bar, where it is."""
        num_images = sum(f["num_images"] for f in found)
        if self._bar is None:
            self._report(f"{self._records.num_read:,} records read, {num_images:,} images encoded")
        if self._first and self._records.total is not None and self._records.num_rows:
            size = _num_bytes(self._writer.folder)
            whole = size * self._records.total / self._records.num_rows
            free = shutil.disk_usage(self._writer.folder).free
            fits = "" if whole - size <= free else f", MORE than the {size_text(free)} that are free"
            self._report(f"about {size_text(whole)} in all{fits}")
        self._first = False

    def finish(self) -> None:
        """Move the bar to its end."""
        if self._bar is not None and self._records.total is not None:
            self._bar.update(self._records.total)

    def close(self) -> None:
        """End the bar where it is."""
        if self._bar is not None:
            self._bar.close()


def _cutting(config: EncodeConfig, encoders: Encoders) -> Cutting:
    factor = encoders.vae.factor
    if config.bucket_step % factor:
        raise ValueError(f"bucket_step={config.bucket_step} must be a multiple of the VAE's {factor} pixels")
    data = config.data
    return Cutting(
        sizes=buckets(
            config.resolution or encoders.resolution,
            step=config.bucket_step,
            square=config.buckets == "square",
        ),
        crop=config.crop,
        flip=config.flip,
        max_upscale=config.max_upscale,
        seed=config.seed,
        limits=ImageLimits(max_pixels=data.max_pixels, min_side=data.min_side, max_aspect=data.max_aspect),
    )


def _storing(config: EncodeConfig) -> Storing:
    return Storing(
        keep_logvar=config.keep == "mean_logvar",
        dtype=DTYPES[config.dtype],
        prompt_dtype=DTYPES[config.prompt_dtype],
        vae_batch_size=config.vae_batch_size,
        text_batch_size=config.text_batch_size,
    )


def _identity(config: EncodeConfig, encoders: Encoders, cutting: Cutting) -> dict[str, Any]:
    """Everything that decides the content of the parts but the records, whose ids each part knows."""
    model, data = config.model, config.data
    return {
        "model": encoders.facts,
        "dtypes": [model.vae_dtype, model.text_dtype, config.dtype, config.prompt_dtype],
        "max_t5_tokens": model.max_t5_tokens,
        "data": [data.layout, data.split, data.ties, data.max_records],
        "limits": [data.max_pixels, data.min_side, data.max_aspect],
        "resolution": config.resolution or encoders.resolution,
        "buckets": [list(size) for size in cutting.sizes],
        "crop": [config.crop, config.flip, config.max_upscale, config.seed],
        "keep": config.keep,
        "contexts_per_part": config.contexts_per_part,
    }


def _facts(
    config: EncodeConfig,
    encoders: Encoders,
    cutting: Cutting,
    found: list[dict[str, Any]],
) -> dict[str, Any]:
    """What dataset.json says of the data set besides its identity."""
    counts = ("num_read", "num_records", "num_images", "num_grouped", "num_cut_prompts")
    return {
        **encoders.facts,
        "resolution": config.resolution or encoders.resolution,
        "num_buckets": len(cutting.sizes),
        "keep": config.keep,
        "dtype": config.dtype,
        **{name: sum(f[name] for f in found) for name in counts},
        **{name: _sum([f[name] for f in found]) for name in ("kinds", "shapes")},
    }


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    return dict(sorted(sum((Counter(c) for c in counts), Counter()).items()))


def _num_bytes(folder: Path) -> int:
    """Bytes of the parts and the empty prompt."""
    return (
        sum(f.stat().st_size for f in folder.glob("part-*/*")) + (folder / "empty.safetensors").stat().st_size
    )


def size_text(num_bytes: float) -> str:
    """Bytes for people: 1.2 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"
