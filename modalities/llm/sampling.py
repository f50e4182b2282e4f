"""Sampling from a policy with the log-probs of what is drawn; the K candidates of a prompt share its prefill.

Shapes: P prompts of a batch, K candidates of each, R rows being decoded, S steps (new tokens), V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from triptych.modalities.llm.policy import TokenPolicy
from triptych.modalities.llm.sampling_cache import Decoder
from triptych.training.order import longest_first
from triptych.training.references import unchanged
from triptych.training.sharding import is_sharded, outside_root

# An accelerator is asked only now and then which rows have ended, as each answer waits for it.
STEPS_BETWEEN_CHECKS = 8
# Ended rows are dropped, which copies the cache of the others, when no more than this share is left.
WORTH_DROPPING = 0.75


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How candidates are drawn. temperature 0 is greedy; top_k 0 and top_p 1 leave every token possible.

    top_k comes before top_p, which is of what top_k leaves. batch_size: rows decoded at once.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("top_k", 0), ("temperature", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")
        if self.temperature == 0 and self.truncated:
            raise ValueError(
                f"temperature=0 is greedy and has no use for top_p={self.top_p}, top_k={self.top_k}"
            )

    @property
    def truncated(self) -> bool:
        """Whether some tokens cannot be drawn at all."""
        return self.top_p < 1 or self.top_k > 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """One candidate. ids: [U] int32, the end-of-sequence token included where one was drawn.

    logp: [U] float32, log-prob of each token under the policy at the policy's own temperature, as its forward
    gives it. proposal: [U] float32, the same under the distribution that really drew it: after temperature,
    truncation and blend. finished: whether it came to an end by itself.
    """

    ids: np.ndarray
    logp: np.ndarray
    proposal: np.ndarray
    finished: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Blend:
    """Draw each token from pi_b ~ pi^(1 - weight) ref^weight instead of pi.

    The mixture of Nash-MD (Munos et al. 2312.00886) and IPO-MD (Calandriello et al. 2403.08635), token by
    token, as that of whole sequences cannot be sampled. `reference` switches to the reference, and is entered
    for each of its steps.
    """

    weight: float
    reference: Callable[[], AbstractContextManager[TokenPolicy]]

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight} must be in [0, 1]")


def draw(
    policy: TokenPolicy,
    prompts: Sequence[np.ndarray],
    num_candidates: int,
    settings: Drawing,
    *,
    seeds: Sequence[int],
    eos_ids: Sequence[int],
    pad_id: int,
    mix: Blend | None = None,
) -> list[list[Drawn]]:
    """K candidates of each prompt, in order. A prompt's candidates depend on its own seed alone.

    Which prompts share a batch changes them by no more than rounding, and the global generator is left alone.
    Equal prompts with equal seeds get equal candidates. The policy is left as it was found.
    Raises ValueError for an empty prompt and for one that is too long for the model with what may follow.
    """
    if num_candidates < 1 or len(seeds) != len(prompts):
        raise ValueError(
            f"num_candidates={num_candidates} must be at least 1, and {len(prompts)} prompts need as many "
            f"seeds, not {len(seeds)}"
        )
    _check_lengths(policy, prompts, settings)
    found: list[list[Drawn]] = [[] for _ in prompts]
    order = longest_first([len(p) for p in prompts])
    size = max(1, settings.batch_size // num_candidates)
    eos = torch.tensor(sorted(set(eos_ids)), dtype=torch.int64, device=policy.device)
    with torch.no_grad(), unchanged(policy), outside_root(policy):
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            decoders = _prefilled(policy, mix, [prompts[i] for i in chosen], settings, pad_id)
            numbers = torch.stack([_uniform(seeds[i], num_candidates, settings) for i in chosen])
            # A prompt with more candidates than a batch holds is still computed once.
            for part in numbers.split(settings.batch_size, dim=1):
                rows = _decode(policy, decoders, part.contiguous(), settings, eos, mix)
                for place, i in enumerate(chosen):
                    found[i] += rows[place * part.shape[1] : (place + 1) * part.shape[1]]
    return found


def _check_lengths(policy: TokenPolicy, prompts: Sequence[np.ndarray], settings: Drawing) -> None:
    if not all(len(p) for p in prompts):
        raise ValueError("a prompt has no token")
    most = getattr(policy.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    longest = max((len(p) for p in prompts), default=0)
    if most is not None and longest + settings.max_new_tokens > most:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={settings.max_new_tokens} are more than the "
            f"{most} positions of the model"
        )


def _uniform(seed: int, num_candidates: int, settings: Drawing) -> Tensor:
    """Numbers in [0, 1) for each candidate and step of a prompt, [K, S] float64."""
    generator = torch.Generator().manual_seed(seed)
    size = (num_candidates, settings.max_new_tokens)
    return torch.rand(size, generator=generator, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class _Prefilled:
    """A decoder after the prompts, and the logits that it gave, [P, V]."""

    decoder: Decoder
    logits: Tensor


def _prefilled(
    policy: TokenPolicy, mix: Blend | None, prompts: Sequence[np.ndarray], settings: Drawing, pad_id: int
) -> list[_Prefilled]:
    """The policy's decoder, and the reference's where there is a blend."""
    entries: list[Callable[[], AbstractContextManager[TokenPolicy]]] = [lambda: nullcontext(policy)]
    entries += [] if mix is None else [mix.reference]
    found: list[_Prefilled] = []
    for enter in entries:
        decoder = Decoder(enter)
        logits = decoder.prefill(prompts, pad_id, policy.device, settings.max_new_tokens)
        found.append(_Prefilled(decoder, logits))
    return found


def _decode(
    policy: TokenPolicy,
    prefilled: Sequence[_Prefilled],
    uniform_PKS: Tensor,
    settings: Drawing,
    eos: Tensor,
    mix: Blend | None,
) -> list[Drawn]:
    """Candidates of the prefilled prompts, [P * K] with a prompt's side by side."""
    count, num_steps = uniform_PKS.shape[1:]
    decoders = [p.decoder.fan_out(count, num_steps) for p in prefilled]
    logits = [p.logits.repeat_interleave(count, 0) for p in prefilled]
    device = logits[0].device
    uniform_RS = uniform_PKS.flatten(0, 1).to(device=device, dtype=_widest(device))
    ids_RS = torch.zeros(uniform_RS.shape, dtype=torch.int64, device=device)
    logp_RS, proposal_RS = (torch.zeros(ids_RS.shape, device=device) for _ in range(2))
    rows = torch.arange(len(ids_RS), device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    every = _steps_between_checks(policy)
    weight = 0.0 if mix is None else mix.weight
    is_own = mix is None and not settings.truncated and settings.temperature == policy.temperature
    for step in range(num_steps):
        mixed = logits[0] if len(logits) == 1 else (1 - weight) * logits[0] + weight * logits[1]
        token, proposal = _choose(mixed, uniform_RS[rows, step], settings)
        own = proposal
        if not is_own:
            own = _log_softmax(logits[0], policy.temperature).gather(1, token[:, None])[:, 0]
        ids_RS[rows, step], logp_RS[rows, step], proposal_RS[rows, step] = (
            token,
            own.float(),
            proposal.float(),
        )
        ended = ended | torch.isin(token, eos)
        if step + 1 == num_steps:
            break
        if (step + 1) % every == 0 and (num_left := len(ended) - int(ended.sum())) <= WORTH_DROPPING * len(
            ended
        ):
            if num_left == 0:
                break
            left = (~ended).nonzero()[:, 0]
            rows, token, ended = rows[left], token[left], ended[left]
            for decoder in decoders:
                decoder.keep(left)
        logits = [decoder.step(token) for decoder in decoders]
    return _cut(ids_RS, logp_RS, proposal_RS, eos)


def _steps_between_checks(policy: TokenPolicy) -> int:
    """Every step on a CPU; never where ranks must make the same calls, whenever their own rows end."""
    if is_sharded(policy):
        return sys.maxsize
    return 1 if policy.device.type == "cpu" else STEPS_BETWEEN_CHECKS


def _widest(device: torch.device) -> torch.dtype:
    """What cumulative sums over a vocabulary are taken in: float64, except where there is none."""
    return torch.float32 if device.type == "mps" else torch.float64


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1)


def _choose(logits_RV: Tensor, uniform_R: Tensor, settings: Drawing) -> tuple[Tensor, Tensor]:
    """A token of each row by the inverse of its distribution function, and the token's log-prob, [R] each."""
    if settings.temperature == 0:
        token = logits_RV.argmax(-1)
        return token, torch.zeros(token.shape, device=token.device)
    logp_RV = _truncated(_log_softmax(logits_RV, settings.temperature), settings)
    sums_RV = logp_RV.exp().cumsum(-1, dtype=uniform_R.dtype)
    total_R = sums_RV[:, -1]
    # Below the total, so that the token found has a share of it even if the product is rounded up.
    sought_R = torch.minimum(uniform_R * total_R, torch.nextafter(total_R, torch.zeros_like(total_R)))
    token_R1 = torch.searchsorted(sums_RV, sought_R[:, None], right=True).clamp(max=sums_RV.shape[1] - 1)
    return token_R1[:, 0], logp_RV.gather(1, token_R1)[:, 0]


def _truncated(logp_RV: Tensor, settings: Drawing) -> Tensor:
    """Log-probs among the tokens that top_k and then top_p leave; -inf for the others."""
    if settings.top_k and settings.top_k < logp_RV.shape[1]:
        best = logp_RV.topk(settings.top_k, dim=-1)
        kept = torch.full_like(logp_RV, -torch.inf).scatter(1, best.indices, best.values)
        logp_RV = torch.log_softmax(kept, -1)
    if settings.top_p < 1:
        ranked = logp_RV.sort(dim=-1, descending=True, stable=True)
        share = ranked.values.exp()
        # A token stays if those above it have less than top_p; so the first always does.
        beyond = share.cumsum(-1) - share >= settings.top_p
        kept = ranked.values.masked_fill(beyond, -torch.inf)
        logp_RV = torch.log_softmax(torch.empty_like(kept).scatter(1, ranked.indices, kept), -1)
    return logp_RV


def _cut(ids_RS: Tensor, logp_RS: Tensor, proposal_RS: Tensor, eos: Tensor) -> list[Drawn]:
    """Each row up to its first end of sequence, that token included."""
    is_end = torch.isin(ids_RS, eos)
    finished = is_end.any(1)
    length = torch.where(finished, is_end.int().argmax(1) + 1, ids_RS.shape[1])
    tables = [t.cpu().numpy() for t in (ids_RS.int(), logp_RS, proposal_RS)]
    return [
        Drawn(ids=ids[:n].copy(), logp=logp[:n].copy(), proposal=proposal[:n].copy(), finished=done)
        for ids, logp, proposal, n, done in zip(*tables, length.tolist(), finished.tolist(), strict=True)
    ]
