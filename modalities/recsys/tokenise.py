"""From events to semantic ids: vectors of items, quantised, with a report of how well."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from triptych.modalities.recsys.interactions import Interactions
from triptych.modalities.recsys.item_vectors import item_vectors
from triptych.modalities.recsys.quantisers import Codebook, Labels, Method, quantise
from triptych.modalities.recsys.rq_vae import RqVaeConfig, relative_error, rq_vae
from triptych.modalities.recsys.semantic_ids import Collisions, SemanticIds
from triptych.training.report import Table


@dataclass(frozen=True, kw_only=True)
class TokeniseConfig:
    """How semantic ids are made.

    vectors: 'svd' of which items follow one another in the training events, 'text' by a sentence encoder, or
    'both'. dim: their width (0: as they come). encoder: of texts. method: see `quantisers`, or 'rq_vae' with
    the settings rq_vae. labels: of the balanced methods, the clusters found or the nearest centroids.
    collisions: see `SemanticIds.without_collisions`.
    """

    vectors: Literal["svd", "text", "both"] = "svd"
    dim: int = 64
    encoder: str = "minilm"
    levels: int = 3
    codebook_size: int = 64
    method: Method | Literal["rq_vae"] = "balanced"
    labels: Labels = "assigned"
    collisions: Collisions = "suffix"
    seed: int = 0
    rq_vae: RqVaeConfig | None = None

    def __post_init__(self) -> None:
        if self.rq_vae is not None and self.method != "rq_vae":
            raise ValueError(f"ids.make.rq_vae is of method rq_vae, not of {self.method}: leave it out")
        if self.labels == "nearest" and self.method not in ("balanced", "paper_balanced"):
            raise ValueError(
                f"ids.make.labels=nearest: the codes of {self.method} are the nearest ones anyway"
            )
        for name, least in {"dim": 0, "levels": 1, "codebook_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"ids.make.{name}={getattr(self, name)} must be at least {least}")


def tokenise(
    events: Interactions, config: TokeniseConfig, report: Callable[[str], None]
) -> tuple[SemanticIds, Tensor, Table]:
    """Ids of all items, the vectors [I, D] that they were made of, and how well the codes describe them."""
    vectors_ID = item_vectors(events, kind=config.vectors, dim=config.dim, encoder=config.encoder)
    if bool((~torch.isfinite(vectors_ID)).any()):
        odd = int((~torch.isfinite(vectors_ID)).any(1).nonzero()[0, 0])
        raise ValueError(
            f"ids.make.vectors={config.vectors}: the vector of {events.items[odd]} is not finite"
        )
    num_codes = min(config.codebook_size, len(events.items))
    generator = torch.Generator().manual_seed(config.seed)
    if config.method == "rq_vae":
        codes_IL, books, decoded = rq_vae(
            vectors_ID,
            num_codes=num_codes,
            levels=config.levels,
            generator=generator,
            config=config.rq_vae or RqVaeConfig(),
        )
    else:
        codes_IL, books = quantise(
            vectors_ID,
            num_codes=num_codes,
            levels=config.levels,
            method=config.method,
            labels=config.labels,
            generator=generator,
        )
        decoded = list(accumulate(book.centroids_KD[book.labels_I] for book in books))
    sizes = tuple(len(book.centroids_KD) for book in books)
    raw = SemanticIds(codes_IL=codes_IL, sizes=sizes, items=events.items)
    popularity = torch.bincount(events.item_E, minlength=len(events.items))
    order = popularity.argsort(descending=True, stable=True)
    ids = raw.without_collisions(config.collisions, order=order)
    report(
        f"semantic ids: {'x'.join(map(str, ids.sizes))}; {raw.num_colliding} items share theirs before "
        f"collisions={config.collisions}, {ids.num_colliding} after"
    )
    return ids, vectors_ID, quantisation_table(vectors_ID, codes_IL, books, decoded)


def quantisation_table(
    vectors_ID: Tensor, codes_IL: Tensor, books: Sequence[Codebook], decoded: Sequence[Tensor]
) -> Table:
    """For each level: relative squared error, codes in use, normalised entropy, items in collisions.

    decoded: vectors [I, D] as the codes up to each level describe them.
    """
    lines = []
    for level, book in enumerate(books):
        counts = torch.bincount(book.labels_I, minlength=len(book.centroids_KD)).double()
        share = counts / counts.sum()
        most = torch.log(torch.tensor(float(max(2, len(counts)))))
        _, inverse, sizes = codes_IL[:, : level + 1].unique(dim=0, return_inverse=True, return_counts=True)
        lines.append(
            [
                f"level {level + 1}",
                f"{relative_error(vectors_ID, decoded[level]):.3f}",
                f"{float((counts > 0).double().mean()):.1%}",
                f"{float(torch.special.entr(share).sum() / most):.3f}",
                f"{int(counts.min())} to {int(counts.max())}",
                int((sizes[inverse] > 1).sum()),
            ]
        )
    columns = ["", "relative MSE", "codes in use", "entropy", "items a code", "items in collisions"]
    return Table("Semantic ids", columns, lines, "Cumulated over levels, before collisions are resolved.")
