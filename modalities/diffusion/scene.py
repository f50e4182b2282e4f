"""What pictures of a run are drawn with: the same for runs on data and for rounds."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace

from triptych.modalities.diffusion.model import ModelConfig
from triptych.modalities.diffusion.policy import Denoiser
from triptych.modalities.diffusion.rollout import SampleConfig, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A policy in its model, the held-out prompts, and how pictures of them are drawn.

    source: folder or hub name of the model; family: 'sd15', 'sdxl' or 'sd3'. prompts: those drawn. precision:
    optim.precision of the training. resolution: pixels where `sample` gives no size; None is what the model
    was made for. seed: of intervals.
    """

    policy: Denoiser
    source: str
    family: str
    base_hash: str
    model: ModelConfig
    sample: SampleConfig
    precision: str
    prompts: tuple[str, ...]
    resolution: int | None = None
    seed: int = 0

    @property
    def wanted(self) -> bool:
        """Whether pictures are asked for, and there are held-out prompts to make them of."""
        return bool(self.prompts)

    def sampling(self) -> Sampling:
        """How pictures are drawn."""
        asked, side = self.sample.sampling(), self.resolution
        return replace(asked, height=asked.height or side, width=asked.width or side)

    def fingerprint(self) -> str:
        """Hash of all that decides on the pictures but the trained weights."""
        # The number of pictures at a time changes them by rounding alone.
        sampling = {k: v for k, v in asdict(self.sampling()).items() if k != "batch_size"}
        model = (self.model.dtype, self.model.prediction, self.precision)
        facts = [sampling, self.prompts, model, self.base_hash]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
