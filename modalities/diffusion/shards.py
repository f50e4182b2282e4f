"""An encoded data set on disk: latents, prompt embeddings and records, read at constant memory.

    dataset.json                          what was encoded, by which models, with which settings
    empty.safetensors                     embeddings of the empty prompt: `embeds` [L, D], `pooled` [P]
    part-00000/records.arrow              one row a context, memory-mapped
    part-00000/latents-4x128x128.safetensors   `mean` [n, Z, H, W] (and `logvar`), scaled as for the model
    part-00000/prompts.safetensors        `embeds` [n, L, D], `pooled` [n, P] of prompts new in this part
    part-00000/prompts.json               their hashes, in order
    part-00000/part.json                  what was read for the part, and what of it was left out

A part is whole or absent, so an interrupted encoding goes on with the next one. Each prompt is kept once, and
so is each latent of a part: records whose images are the same name the same rows.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from triptych.training.atomic import clean_temporary, make_temporary, publish, sha256_of, sync, write_json
from triptych.training.quarantine import DataError

FORMAT = "triptych-latents-1"
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("prompt", pa.string()),
        ("group", pa.string()),
        ("prompt_part", pa.int32()),
        ("prompt_row", pa.int32()),
        ("shape", pa.string()),
        ("rows", pa.list_(pa.int32())),
        ("contents", pa.list_(pa.string())),
        ("time_ids", pa.list_(pa.list_(pa.int32()))),
        ("relevance", pa.list_(pa.float32())),
        ("strength", pa.float32()),
        ("margin", pa.float32()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedContext:
    """One context as it is stored. kind: 'single', 'pair' (chosen first) or 'list'.

    latents [K, Z, H, W] (and logvar); time_ids: six integers an image, see `policy.Conditions`. contents:
    SHA-256 of each image's bytes, which with the time ids says what is shown; ':mirrored' ends it where the
    image was flipped.
    """

    id: str
    source: str
    kind: str
    prompt: str
    group: str | None
    latents: Tensor
    time_ids: tuple[tuple[int, ...], ...]
    contents: tuple[str, ...]
    relevance: tuple[float, ...]
    strength: float | None = None
    margin: float | None = None
    logvar: Tensor | None = None


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """Embeddings of one prompt: embeds [L, D], pooled [P] or None."""

    embeds: Tensor
    pooled: Tensor | None = None


def prompt_hash(prompt: str) -> str:
    """Key of a prompt's embeddings."""
    return hashlib.sha256(prompt.encode("utf-8", errors="surrogatepass")).hexdigest()


class ShardWriter:
    """Writes an encoded data set part by part and goes on where an earlier start of the same one stopped.

    identity: what decides the content (models, settings, input); a folder that holds another one's parts is
    refused with ValueError. known: prompt hash -> (part, row) of every prompt that is written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, empty: EncodedPrompt):
        self.folder = Path(folder)
        self.known: dict[str, tuple[int, int]] = {}
        self._identity = json.loads(json.dumps(dict(identity)))
        self.folder.mkdir(parents=True, exist_ok=True)
        clean_temporary(self.folder)
        self._check_identity()
        write_json(self.folder / "encoding.json", self._identity)
        if not (self.folder / "empty.safetensors").is_file():
            aside = self.folder / "empty.tmp"
            _save(aside, _prompt_tensors([empty], stacked=False))
            aside.replace(self.folder / "empty.safetensors")
        self.num_parts = 0
        while (self.folder / _part(self.num_parts)).is_dir():
            listed = self.folder / _part(self.num_parts) / "prompts.json"
            for row, name in enumerate(json.loads(listed.read_text("utf-8"))):
                self.known[name] = (self.num_parts, row)
            self.num_parts += 1

    def write(
        self,
        contexts: Sequence[EncodedContext],
        prompts: Mapping[str, EncodedPrompt],
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """The next part. prompts: hash -> embeddings of those not `known` yet. facts: see `part_facts`."""
        final = self.folder / _part(self.num_parts)
        temporary = make_temporary(final)
        for row, name in enumerate(prompts):
            self.known[name] = (self.num_parts, row)
        if prompts:
            _save(temporary / "prompts.safetensors", _prompt_tensors(list(prompts.values()), stacked=True))
        write_json(temporary / "prompts.json", list(prompts))
        write_json(temporary / "part.json", dict(facts or {}))
        stacks: dict[str, _Stack] = defaultdict(_Stack)
        rows = [self._row(c, stacks[_shape_name(c.latents.shape[1:])].add(c)) for c in contexts]
        for shape, stack in stacks.items():
            _save(temporary / f"latents-{shape}.safetensors", stack.tensors())
        table = pa.Table.from_pylist(rows, schema=_SCHEMA)
        with pa.OSFile(str(temporary / "records.arrow"), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as out:
            out.write_table(table.combine_chunks())
        for path in temporary.iterdir():
            sync(path)
        publish(temporary, final)
        self.num_parts += 1
        return final

    def part_facts(self, index: int) -> dict[str, Any]:
        """What was given as facts when a part was written."""
        return json.loads((self.folder / _part(index) / "part.json").read_text("utf-8"))

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write dataset.json; without it the data set counts as unfinished."""
        count = {"format": FORMAT, "num_parts": self.num_parts, "num_prompts": len(self.known)}
        write_json(self.folder / "dataset.json", count | {"identity": self._identity} | dict(facts))

    def _row(self, context: EncodedContext, place: list[int]) -> dict[str, Any]:
        part, row = self.known[prompt_hash(context.prompt)]
        return {
            "id": context.id,
            "source": context.source,
            "kind": context.kind,
            "prompt": context.prompt,
            "group": context.group,
            "prompt_part": part,
            "prompt_row": row,
            "shape": _shape_name(context.latents.shape[1:]),
            "rows": place,
            "contents": list(context.contents),
            "time_ids": [list(ids) for ids in context.time_ids],
            "relevance": list(context.relevance),
            "strength": context.strength,
            "margin": context.margin,
        }

    def _check_identity(self) -> None:
        path = self.folder / "encoding.json"
        if not path.is_file():
            return
        before = json.loads(path.read_text("utf-8"))
        names = sorted(before.keys() | self._identity.keys())
        if changed := [k for k in names if before.get(k) != self._identity.get(k)]:
            raise ValueError(
                f"{self.folder} holds a data set that was encoded with another {', '.join(changed)}; "
                "give another output folder or remove this one"
            )


class _Stack:
    """Latents of one shape in a part, equal ones once."""

    def __init__(self) -> None:
        self._rows: dict[bytes, int] = {}
        self._mean: list[Tensor] = []
        self._logvar: list[Tensor] = []

    def add(self, context: EncodedContext) -> list[int]:
        """Rows of a context's images, new ones for those that are not here yet."""
        both = [context.latents] if context.logvar is None else [context.latents, context.logvar]
        return [self._place(*image) for image in zip(*both, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """`mean` and, where there is one, `logvar`, [n, Z, H, W]."""
        found = {"mean": torch.stack(self._mean)}
        return found | ({"logvar": torch.stack(self._logvar)} if self._logvar else {})

    def _place(self, mean: Tensor, logvar: Tensor | None = None) -> int:
        digest = hashlib.sha256()
        for tensor in (mean, logvar) if logvar is not None else (mean,):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        row = self._rows.setdefault(digest.digest(), len(self._mean))
        if row == len(self._mean):
            self._mean.append(mean)
            self._logvar += [] if logvar is None else [logvar]
        return row


class EncodedDataset:
    """A finished encoded data set. Records and tensors are read when asked for; nothing else is in memory.

    num_records: contexts. ValueError or DataError for a folder that is not one, or not whole.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        facts = self.folder / "dataset.json"
        if not facts.is_file():
            unfinished = (self.folder / "encoding.json").is_file()
            what = (
                "an encoding that was interrupted; run scripts/encode_images.py again"
                if unfinished
                else ("no encoded data set (dataset.json is missing); make one with scripts/encode_images.py")
            )
            raise ValueError(f"{self.folder}: {what}")
        self.facts: dict[str, Any] = json.loads(facts.read_text("utf-8"))
        if self.facts.get("format") != FORMAT:
            raise ValueError(
                f"{facts}: format is {self.facts.get('format')!r}; this version reads {FORMAT!r}"
            )
        self._tables = [self._table(i) for i in range(self.facts["num_parts"])]
        self._ends = list(accumulate(t.num_rows for t in self._tables))
        self.num_records = self._ends[-1] if self._ends else 0
        self._open = lru_cache(maxsize=64)(_open)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what was encoded and how, for checkpoints: names every part's records."""
        digest = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode())
        for i in range(len(self._tables)):
            digest.update(sha256_of(self.folder / _part(i) / "records.arrow").encode())
        return digest.hexdigest()

    def column(self, name: str) -> pa.ChunkedArray:
        """One column of all records, memory-mapped."""
        return pa.chunked_array(
            [c for t in self._tables for c in t.column(name).chunks], _SCHEMA.field(name).type
        )

    def record(self, index: int) -> dict[str, Any]:
        """One record's columns; see EncodedContext. `part` is added."""
        part = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[part - 1] if part else 0)
        return self._tables[part].slice(row, 1).to_pylist()[0] | {"part": part}

    def latents(self, record: Mapping[str, Any], candidates: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """(mean, logvar or None) of some of a record's images, [K, Z, H, W] each."""
        name = f"latents-{record['shape']}.safetensors"
        file = self._open(self.folder / _part(record["part"]) / name)
        rows = [record["rows"][k] for k in candidates]
        names = [n for n in ("mean", "logvar") if n in set(file.keys())]
        found = [torch.stack([file.get_slice(n)[r] for r in rows]) for n in names]
        return found[0], found[1] if len(found) > 1 else None

    def prompt(self, record: Mapping[str, Any]) -> EncodedPrompt:
        """Embeddings of a record's prompt."""
        file = self._open(self.folder / _part(record["prompt_part"]) / "prompts.safetensors")
        row = record["prompt_row"]
        pooled = file.get_slice("pooled")[row] if "pooled" in set(file.keys()) else None
        return EncodedPrompt(file.get_slice("embeds")[row], pooled)

    def empty_prompt(self) -> EncodedPrompt:
        """Embeddings of the empty prompt."""
        file = self._open(self.folder / "empty.safetensors")
        return EncodedPrompt(
            file.get_tensor("embeds"), file.get_tensor("pooled") if "pooled" in set(file.keys()) else None
        )

    def _table(self, part: int) -> pa.Table:
        path = self.folder / _part(part) / "records.arrow"
        try:
            return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        except (OSError, pa.ArrowInvalid) as error:
            remedy = "remove the part's folder and dataset.json, and run scripts/encode_images.py again"
            raise DataError("cannot be read", source=str(path), remedy=remedy, preview=str(error)) from error


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        remedy = "remove the part's folder and dataset.json, and run scripts/encode_images.py again"
        raise DataError("cannot be read", source=str(path), remedy=remedy, preview=str(error)) from error


def _prompt_tensors(prompts: Sequence[EncodedPrompt], *, stacked: bool) -> dict[str, Tensor]:
    embeds = [p.embeds for p in prompts]
    pooled = [p.pooled for p in prompts if p.pooled is not None]
    if not stacked:
        return {"embeds": embeds[0]} | ({"pooled": pooled[0]} if pooled else {})
    return {"embeds": torch.stack(embeds)} | ({"pooled": torch.stack(pooled)} if pooled else {})


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def _part(index: int) -> str:
    return f"part-{index:05d}"


def _shape_name(shape: Sequence[int]) -> str:
    return "x".join(str(n) for n in shape)
