"""Weights that the backward pass itself updates: tables of embeddings that ranks share out among them.

No rank holds them whole and no gradient of theirs is left when backward returns, so a step cannot be taken
back: what would spoil it has to be seen before. A modality gives what the loop needs of them as a `Fused`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from triptych.training.config import OptimConfig

_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


class Fused(Protocol):
    """A policy of which some weights are updated in its backward pass, by an optimizer of their own.

    policy: wrapped for its ranks, which average its gradients. dense: its other trained parameters, whole on
    every rank. shapes: of the fused weights, whole; names are those of the policy before it was wrapped.
    """

    @property
    def policy(self) -> nn.Module:
        """What a step calls."""
        ...

    @property
    def dense(self) -> Mapping[str, nn.Parameter]:
        """What the learner's optimizer updates."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of every fused weight."""
        ...

    def follow(self, ratio: float) -> None:
        """Use this share of the fused weights' own rate from the next backward pass on."""
        ...

    def weights(self) -> Mapping[str, Tensor]:
        """The fused weights whole, on the CPU of the first rank; {} elsewhere. A collective."""
        ...

    def moments(self) -> Mapping[str, Tensor]:
        """What their optimizer remembers, in the same way."""
        ...

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor] | None) -> None:
        """Take over whole weights, dense ones too, and moments; None: their optimizer begins anew.

        A collective. ValueError for moments that are not of this optimizer.
        """
        ...


def check_fused(config: OptimConfig, accelerator: Accelerator) -> None:
    """Raise ValueError for settings that cannot be kept when backward updates weights."""
    if accelerator.distributed_type not in _PLAIN:
        raise ValueError(
            f"tables are shared out over ranks that hold the rest whole, not with "
            f"{accelerator.distributed_type}: start the script with plain torchrun or accelerate"
        )
    most = math.ceil(config.batch_size / accelerator.num_processes)
    if most > config.micro_batch_size:
        raise ValueError(
            f"optim.micro_batch_size={config.micro_batch_size}: every backward pass updates tables that are "
            f"shared out, so a step is one micro-batch on each of {accelerator.num_processes} ranks: "
            f"set optim.micro_batch_size={most}"
        )
    if config.average:
        raise ValueError(
            f"optim.average={config.average} wants every weight whole on every rank, and tables are "
            "shared out: set optim.average=0"
        )
    if config.on_nonfinite != "stop":
        raise ValueError(
            f"optim.on_nonfinite={config.on_nonfinite}: every backward pass updates tables that are shared "
            "out, which cannot be taken back where the gradient is not finite: set optim.on_nonfinite=stop"
        )
