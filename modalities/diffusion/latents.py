"""Records of online diffusion runs: prompts, and denoising states on their way to a picture.

Shapes: Z latent channels, H x W; n states of one path.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ImagePrompt:
    """What pictures are drawn of. key: its name in the run's randomness and in messages."""

    key: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Latents:
    """States of one path from denoising step `step` on, [n, Z, H, W]; step `step + i` begins at state i.

    As a context: the one state that its candidates leave. As a candidate: the states that follow that of its
    context, or, where it begins at the context's own step or the context is a prompt, a path with a start of
    its own. clean: x_0 as the model sees it from where denoising step `clean_step` begins, [Z, H, W], for
    judges; after the last step it is the last state.
    """

    key: str
    text: str
    step: int
    states: Tensor
    clean: Tensor | None = None
    clean_step: int = 0

    def __post_init__(self) -> None:
        if self.states.ndim != 4 or not len(self.states):
            raise ValueError(
                f"latents {self.key}: states have shape {tuple(self.states.shape)}; expected [n, Z, H, W]"
            )
        if self.clean is not None and self.clean.shape != self.states.shape[1:]:
            raise ValueError(
                f"latents {self.key}: clean has shape {tuple(self.clean.shape)}, a state "
                f"{tuple(self.states.shape[1:])}"
            )

    @property
    def end(self) -> int:
        """The denoising step that begins at the last state; their number where the path is complete."""
        return self.step + len(self.states) - 1


def follows(context: ImagePrompt | Latents, candidate: Latents) -> bool:
    """Whether the candidate goes on from its context's state rather than from one of its own."""
    return isinstance(context, Latents) and candidate.step == context.end + 1
