"""A store of per-term values on disk: content-addressed, append-only, verified, without pickle.

Each shard is one safetensors file named by the SHA-256 of its content, written aside and renamed. Values are
float32 vectors of any length; a key that is already there is never overwritten, so values never change.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from triptych.training.atomic import sha256_of, sync

SUFFIX = ".values.safetensors"


class ValueStore:
    """Key (64 hex digits) -> float32 vector. With `folder` None it lives in memory only."""

    def __init__(self, folder: Path | None, *, flush_every: int = 4096):
        self.folder = folder
        self.flush_every = flush_every
        self._values: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._shards: set[Path] = set()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)

    def keys(self) -> list[str]:
        """Every key."""
        return list(self._values)

    def vectors(self, keys: Collection[str]) -> dict[str, Tensor]:
        """The vectors of `keys`; KeyError for others."""
        return {k: self._values[k] for k in keys}

    def merge(self, vectors: Mapping[str, Tensor]) -> None:
        """Add vectors that another store has; keys that are there stay as they are."""
        for k, vector in vectors.items():
            self.add([k], vector.unsqueeze(0), torch.tensor([len(vector)]))

    def refresh(self) -> None:
        """Read the shards that others wrote since the last look; what is known stays as it is."""
        if self.folder is None:
            return
        for path in sorted(set(self.folder.glob(f"*{SUFFIX}")) - self._shards):
            self._read(path)
            self._shards.add(path)

    def add(self, keys: Sequence[str], table: Tensor, counts: Tensor) -> None:
        """Keep row i of `table` [C, U], as far as counts[i], under keys[i], unless the key is there."""
        rows, lengths = table.detach().float().cpu(), counts.long().tolist()
        for key, row, length in zip(keys, rows, lengths, strict=True):
            if key not in self._values:
                self._values[key] = self._pending[key] = row[:length].clone()
        if len(self._pending) >= self.flush_every:
            self.flush()

    def table(self, keys: Sequence[str]) -> Tensor:
        """The vectors of `keys` as zero-padded rows, [C, U] float32 on the CPU; KeyError for others."""
        return torch.nn.utils.rnn.pad_sequence([self._values[k] for k in keys], batch_first=True)

    def flush(self) -> None:
        """Write what is new as one shard; whole or not at all."""
        if self.folder is None or not self._pending:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".tmp-{os.getpid()}"
        vectors = list(self._pending.values())
        lengths = torch.tensor([len(v) for v in vectors], dtype=torch.int64)
        names = np.frombuffer(bytes.fromhex("".join(self._pending)), dtype=np.uint8).reshape(len(vectors), 32)
        shard = {"keys": torch.from_numpy(names.copy()), "lengths": lengths, "values": torch.cat(vectors)}
        try:
            save_file(shard, temporary)
            sync(temporary)
            shard_path = self.folder / f"{sha256_of(temporary)}{SUFFIX}"
            os.replace(temporary, shard_path)
        finally:
            temporary.unlink(missing_ok=True)
        sync(self.folder)
        self._shards.add(shard_path)
        self._pending = {}

    def _read(self, path: Path) -> None:
        if sha256_of(path) != path.name.removesuffix(SUFFIX):
            raise ValueError(
                f"{path} is damaged: its content does not match its name; delete it to recompute"
            )
        try:
            shard = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it to recompute") from error
        vectors = shard["values"].split(shard["lengths"].tolist())
        for name, vector in zip(shard["keys"].numpy(), vectors, strict=True):
            self._values.setdefault(name.tobytes().hex(), vector)
