"""The latent reward model: a diffusion UNet's own features as the reward of a step, without decoding.

Zhang et al. 2025 (LPO, arXiv 2502.01051). Shapes: N latents [Z, H, W], D widths of the UNet's stages, E width
of the shared embedding.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.modalities.diffusion.policy import Conditions
from triptych.training.atomic import clean_temporary, make_temporary, publish

HEAD = "head.safetensors"
SETTINGS = "latent_reward.json"
LOGIT_SCALE = math.log(1 / 0.07)


class LatentReward(nn.Module):
    """score = exp(logit_scale) cos(W f(x_t, t, c), V c), f the UNet's stages averaged over space.

    f: what every down block and the middle end in, each averaged over space and put one after the other
    (multi-scale; the middle alone without). guidance: the middle's features are enhanced,
    f_empty + guidance (f_c - f_empty), as in the released code, which has 7.5; 1 is without, at half the
    cost. The text is the pooled prompt, or, where a model has none (SD 1.5), the mean of its embeddings. The
    up blocks are left out. Deviation: V is learnt, from the identity where the widths are equal (SDXL), and
    the text encoders stay as they are; the release has no V and trains them.
    """

    def __init__(self, unet: Any, text_width: int, *, guidance: float = 7.5, multi_scale: bool = True):
        super().__init__()
        if not guidance >= 1:
            raise ValueError(f"guidance={guidance} must be at least 1, which is without")
        unet.up_blocks, unet.conv_norm_out, unet.conv_act, unet.conv_out = nn.ModuleList(), None, None, None
        self.unet, self.guidance, self.multi_scale = unet, guidance, multi_scale
        widths = list(unet.config.block_out_channels)
        embed = widths[-1]
        self.visual_projection = nn.Linear(sum(widths) + embed if multi_scale else embed, embed, bias=False)
        self.text_projection = nn.Linear(text_width, embed, bias=False)
        nn.init.normal_(self.visual_projection.weight, std=0.02)
        if text_width == embed:
            nn.init.eye_(self.text_projection.weight)
        else:
            nn.init.normal_(self.text_projection.weight, std=0.02)
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))

    @classmethod
    def from_unet(cls, unet: Any, text_width: int, **options: Any) -> LatentReward:
        """Untrained, on a copy of the UNet's down and middle blocks; ValueError for a transformer."""
        if not hasattr(unet, "down_blocks"):
            raise ValueError(f"a latent reward is made of a UNet, not of {type(unet).__name__}")
        ups, unet.up_blocks = unet.up_blocks, nn.ModuleList()
        try:
            body = copy.deepcopy(unet)
        finally:
            unet.up_blocks = ups
        return cls(body, text_width, **options)

    def features(self, latents: Tensor, times: Tensor, conditions: Conditions) -> list[Tensor]:
        """What each down block, then the middle, ends in, averaged over space: [N, D] each."""
        unet = self.unet
        dtype = next(unet.parameters()).dtype
        x, embeds = latents.to(dtype), conditions.embeds.to(dtype)
        emb = unet.time_embedding(unet.get_time_embed(sample=x, timestep=times), None)
        if conditions.pooled is not None and conditions.time_ids is not None:
            added = {"text_embeds": conditions.pooled.to(dtype), "time_ids": conditions.time_ids}
            more = unet.get_aug_embed(emb=emb, encoder_hidden_states=embeds, added_cond_kwargs=added)
            emb = emb if more is None else emb + more
        x, found = unet.conv_in(x), []
        for block in unet.down_blocks:
            if getattr(block, "has_cross_attention", False):
                x, skips = block(hidden_states=x, temb=emb, encoder_hidden_states=embeds)
            else:
                x, skips = block(hidden_states=x, temb=emb)
            # The last before the downsampler, as the block's own resolution sees it.
            found.append(skips[-2] if block.downsamplers is not None else skips[-1])
        x = unet.mid_block(x, emb, encoder_hidden_states=embeds)
        return [stage.float().mean((2, 3)) for stage in [*found, x]]

    def score(
        self, latents: Tensor, times: Tensor, conditions: Conditions, empty: Conditions | None = None
    ) -> Tensor:
        """Scores [N] float32 at times [N]. empty: the empty prompt, one row, if and only if guided."""
        if (self.guidance == 1) != (empty is None):
            raise ValueError(f"guidance={self.guidance:g}: the empty prompt is needed if and only if above 1")
        num = len(latents)
        if empty is not None:
            both = _with_empty(empty, conditions)
            twice = self.features(torch.cat([latents, latents]), torch.cat([times, times]), both)
            *stages, middle = [stage[num:] for stage in twice]
            without = twice[-1][:num]
            middle = without + self.guidance * (middle - without)
        else:
            *stages, middle = self.features(latents, times, conditions)
        seen = torch.cat([*stages, middle], -1) if self.multi_scale else middle
        text = conditions.embeds.float().mean(1) if conditions.pooled is None else conditions.pooled.float()
        image = nn.functional.normalize(self.visual_projection(seen), dim=-1)
        return self.logit_scale.exp() * (
            image * nn.functional.normalize(self.text_projection(text), dim=-1)
        ).sum(-1)


def _with_empty(empty: Conditions, own: Conditions) -> Conditions:
    """The empty prompt for as many rows as `own` has, then `own`."""
    num = len(own.embeds)
    pooled = None
    if own.pooled is not None and empty.pooled is not None:
        pooled = torch.cat([empty.pooled.expand(num, -1).to(own.pooled), own.pooled])
    ids = None if own.time_ids is None else torch.cat([own.time_ids, own.time_ids])
    return Conditions(torch.cat([empty.embeds.expand(num, -1, -1).to(own.embeds), own.embeds]), pooled, ids)


def save_latent_reward(model: LatentReward, folder: Path) -> None:
    """Write the UNet's configuration, all weights and the settings."""
    from safetensors.torch import save_file

    folder.parent.mkdir(parents=True, exist_ok=True)
    clean_temporary(folder.parent)
    temporary = make_temporary(folder)
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, temporary / HEAD)
    settings = {
        "type": "latent_reward",
        "guidance": model.guidance,
        "multi_scale": model.multi_scale,
        "text_width": model.text_projection.in_features,
        "unet": json.loads(model.unet.to_json_string()),
    }
    (temporary / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    publish(temporary, folder)


def load_latent_reward(folder: Path) -> LatentReward:
    """A saved reward in evaluation mode, frozen; ValueError naming what the folder lacks."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    for name in (SETTINGS, HEAD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no latent reward: it has no {name}")
    settings = json.loads((folder / SETTINGS).read_text("utf-8"))
    any_unet: Any = UNet2DConditionModel
    unet = any_unet.from_config(settings["unet"])
    model = LatentReward(
        unet, settings["text_width"], guidance=settings["guidance"], multi_scale=settings["multi_scale"]
    )
    state, own = load_file(folder / HEAD), model.state_dict()
    odd = sorted(own.keys() ^ state.keys()) or sorted(k for k in own if own[k].shape != state[k].shape)
    if odd:
        raise ValueError(f"{folder / HEAD} is of another model: see {', '.join(odd[:3])}")
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)
