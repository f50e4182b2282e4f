"""RQ-VAE: semantic ids from a residual quantiser that is learnt between an encoder and a decoder.

Shapes: I items, D width of vectors, Z width of the latent space, B items of a batch, K codes of a level.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from triptych.modalities.recsys.quantisers import Codebook, kmeans


@dataclass(frozen=True, kw_only=True)
class RqVaeConfig:
    """TIGER's settings for small catalogues. hidden: widths of the encoder's layers, the decoder's turned.

    latent: Z. commitment: weight of what draws the encoder to its codes, 0.25 in TIGER. restart_every: epochs
    after which codes that nobody uses are moved to residuals that are far from theirs.
    """

    hidden: tuple[int, ...] = (128, 64)
    latent: int = 32
    num_epochs: int = 300
    batch_size: int = 256
    lr: float = 1e-3
    weight_decay: float = 1e-4
    commitment: float = 0.25
    restart_every: int = 20

    def __post_init__(self) -> None:
        for name in ("latent", "num_epochs", "batch_size", "lr", "restart_every"):
            if getattr(self, name) <= 0:
                raise ValueError(f"ids.make.rq_vae.{name}={getattr(self, name)} must be positive")
        if any(width < 1 for width in self.hidden):
            raise ValueError(f"ids.make.rq_vae.hidden={list(self.hidden)}: every width must be positive")
        if self.commitment < 0 or self.weight_decay < 0:
            raise ValueError("ids.make.rq_vae.commitment and weight_decay must be 0 or positive")


@dataclass(frozen=True, slots=True)
class Quantised:
    """sum_BZ: the codes' vectors added up; codes_BL; loss: of codebooks and commitment, a mean over items."""

    sum_BZ: Tensor
    codes_BL: Tensor
    loss: Tensor


class RqVae(nn.Module):
    """decoder(z + sg[q(z) - z]), q(z) = sum_l e^l_{c_l}, c_l = argmin_k ||r_l - e^l_k||, r_{l+1} = r_l - e^l.

    Loss ||x - x'||^2 + sum_l (||sg[r_l] - e^l||^2 + commitment ||r_l - sg[e^l]||^2): TIGER (2305.05065), 3.1;
    the gradient passes the quantiser straight through.
    """

    def __init__(self, width: int, *, num_codes: int, levels: int, config: RqVaeConfig):
        super().__init__()
        self.commitment = config.commitment
        self.encoder = _layers([width, *config.hidden, config.latent])
        self.decoder = _layers([config.latent, *reversed(config.hidden), width])
        self.books = nn.ParameterList(
            nn.Parameter(torch.randn(num_codes, config.latent) * 0.02) for _ in range(levels)
        )

    def quantise(self, latent_BZ: Tensor) -> Quantised:
        """The nearest code of each level, of what the levels before left over."""
        residual_BZ = latent_BZ
        total, loss, codes = torch.zeros_like(latent_BZ), latent_BZ.new_zeros(()), []
        for book_KZ in self.books:
            code_B = torch.cdist(residual_BZ.detach(), book_KZ.detach()).argmin(1)
            chosen_BZ = book_KZ[code_B]
            loss = loss + (residual_BZ.detach() - chosen_BZ).square().sum(1).mean()
            loss = loss + self.commitment * (residual_BZ - chosen_BZ.detach()).square().sum(1).mean()
            # Later levels quantise the residual, and do not push the codes of earlier ones.
            residual_BZ = residual_BZ - chosen_BZ.detach()
            total = total + chosen_BZ
            codes.append(code_B)
        return Quantised(total, torch.stack(codes, 1), loss)

    def loss(self, x_BD: Tensor) -> Tensor:
        """Reconstruction and quantisation loss, a mean over items."""
        latent_BZ = self.encoder(x_BD)
        found = self.quantise(latent_BZ)
        straight_BZ = latent_BZ + (found.sum_BZ - latent_BZ).detach()
        return (self.decoder(straight_BZ) - x_BD).square().sum(1).mean() + found.loss

    @torch.no_grad()
    def place_codes(self, x_BD: Tensor, generator: torch.Generator) -> None:
        """Codebooks by residual k-means over the encoder's outputs, against collapse.

        Over the items given, where TIGER takes the first batch: that may hold fewer items than codes.
        """
        residual_BZ = self.encoder(x_BD).double()
        for book_KZ in self.books:
            found = kmeans(residual_BZ, len(book_KZ), generator, 20)
            book_KZ.copy_(found.centroids_KD.to(book_KZ.dtype))
            residual_BZ = residual_BZ - found.centroids_KD[found.labels_I]

    @torch.no_grad()
    def restart(self, x_ID: Tensor) -> int:
        """Move codes that nobody uses to the residuals farthest from their codes; how many were moved."""
        residual, moved = self.encoder(x_ID), 0
        for book_KZ in self.books:
            distance, code = torch.cdist(residual, book_KZ).min(1)
            unused = (torch.bincount(code, minlength=len(book_KZ)) == 0).nonzero()[:, 0][: len(residual)]
            book_KZ[unused] = residual[distance.argsort(descending=True, stable=True)[: len(unused)]]
            residual = residual - book_KZ[torch.cdist(residual, book_KZ).argmin(1)]
            moved += len(unused)
        return moved


def rq_vae(
    vectors_ID: Tensor,
    *,
    num_codes: int,
    levels: int,
    generator: torch.Generator,
    config: RqVaeConfig,
    progress: Callable[[int], None] = lambda epoch: None,
) -> tuple[Tensor, list[Codebook], list[Tensor]]:
    """Codes [I, L], every level's codebook in the latent space, and the vectors decoded after each level.

    Vectors are centred and scaled to unit variance for training, and decoded ones scaled back. progress: is
    told the number of epochs done. ValueError for vectors that are not finite, more codes than items, or a
    loss that is no longer finite.
    """
    if bool((~torch.isfinite(vectors_ID)).any()):
        odd = int((~torch.isfinite(vectors_ID)).any(1).nonzero()[0, 0])
        raise ValueError(f"the vector of item {odd} is not finite")
    num = len(vectors_ID)
    if not 1 <= num_codes <= num:
        raise ValueError(f"{num_codes} codes for {num} items; valid: 1 to the number of items")
    mean_D = vectors_ID.float().mean(0)
    scale = (vectors_ID.float() - mean_D).square().mean().sqrt().clamp(min=1e-12)
    x_ID = (vectors_ID.float() - mean_D) / scale
    seed = int(torch.randint(2**31, (1,), generator=generator))
    with torch.random.fork_rng(devices=[]):
        # `torch.manual_seed` would seed the accelerators too, whose generators are not put back.
        torch.default_generator.manual_seed(seed)
        model = RqVae(x_ID.shape[1], num_codes=num_codes, levels=levels, config=config)
        _fit(model, x_ID, generator, config, progress)
    with torch.no_grad():
        latent = model.encoder(x_ID)
        codes_IL = model.quantise(latent).codes_BL
        books, decoded, total = [], [], torch.zeros_like(latent)
        for level, book in enumerate(model.books):
            books.append(Codebook(book.detach().double(), codes_IL[:, level]))
            total = total + book[codes_IL[:, level]]
            decoded.append(model.decoder(total) * scale + mean_D)
    return codes_IL, books, decoded


def _fit(
    model: RqVae,
    x_ID: Tensor,
    generator: torch.Generator,
    config: RqVaeConfig,
    progress: Callable[[int], None],
) -> None:
    """Epochs over shuffled items, the last tenth without restarts; codes then still unused move once more.

    No such move raises the error of its level. One can leave another code unused: hence again, within
    bounds, as items that are all the same never use all codes.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    model.place_codes(x_ID, generator)
    last_restart = config.num_epochs * 9 // 10
    for epoch in range(config.num_epochs):
        order = torch.randperm(len(x_ID), generator=generator)
        for rows in order.split(config.batch_size):
            optimizer.zero_grad()
            loss = model.loss(x_ID[rows])
            if not bool(torch.isfinite(loss)):
                raise ValueError(
                    f"the loss of the RQ-VAE is not finite in epoch {epoch + 1}: lower "
                    f"ids.make.rq_vae.lr={config.lr}"
                )
            loss.backward()
            optimizer.step()
        if (epoch + 1) % config.restart_every == 0 and epoch < last_restart:
            model.restart(x_ID)
        progress(epoch + 1)
    for _ in range(10):
        if not model.restart(x_ID):
            break


def _layers(widths: Sequence[int]) -> nn.Sequential:
    parts: list[nn.Module] = []
    for i, (into, out) in enumerate(pairwise(widths)):
        parts += [nn.Linear(into, out), *([nn.ReLU()] if i < len(widths) - 2 else [])]
    return nn.Sequential(*parts)


def relative_error(vectors_ID: Tensor, decoded_ID: Tensor) -> float:
    """||x - x'||^2 / ||x - mean||^2 over all items."""
    vectors = vectors_ID.double()
    total = (vectors - vectors.mean(0)).square().sum().clamp(min=1e-30)
    return float(functional.mse_loss(decoded_ID.double(), vectors, reduction="sum") / total)
