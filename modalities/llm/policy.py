"""A causal LM as a function from rows of tokens to the log-probs of their candidates' tokens.

Shapes: R rows, T tokens, H hidden, V vocabulary, N candidate tokens, C candidates, U longest candidate.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from triptych.modalities.llm.critic import TokenCritic
from triptych.modalities.llm.full_vocabulary import entropy_and_kl
from triptych.modalities.llm.kernels import Impl, token_logps
from triptych.modalities.llm.rows import RowCost, Rows, Sharing, make_rows, tree_mask

logger = logging.getLogger(__name__)

# Attention implementations that accept a mask of any shape; the others can only do causal rows.
MASKABLE = ("sdpa", "eager")
FULL, SLIDING = "full_attention", "sliding_attention"


class TokenPolicy(nn.Module):
    """Wraps a Hugging Face causal LM, plain or PEFT; `forward` is what DDP and FSDP see.

    The LM head is applied to the positions that predict candidate tokens and to no other, in chunks, so
    logits never exist.
    """

    def __init__(self, model: nn.Module, *, impl: Impl = "auto", temperature: float = 1.0):
        """temperature: the policy is softmax(logits / temperature), as its samples are drawn."""
        super().__init__()
        self.model = model
        self.impl: Impl = impl
        self.temperature = temperature
        self.critic: TokenCritic | None = None
        check_head(self.causal_lm)

    @property
    def causal_lm(self) -> Any:
        """The Hugging Face model, with adapters injected where there are any."""
        inner: Any = self.model
        return inner.get_base_model() if hasattr(inner, "get_base_model") else inner

    @property
    def _no_split_modules(self) -> Any:
        """Names of the layer classes, by which accelerate shards a model layer by layer."""
        return getattr(self.causal_lm, "_no_split_modules", None)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def can_share(self) -> bool:
        """Whether the model's attention takes a tree mask, in every layer."""
        return self.causal_lm.config._attn_implementation in MASKABLE and _kinds(self.causal_lm) <= {
            FULL,
            SLIDING,
        }

    def forward(self, rows: Rows, names: tuple[str, ...] = ()) -> Any:
        """Log-prob of every candidate token, [C, U] float32; 0 after a candidate's end.

        With names, a dictionary of such tables: 'logp' and, as named, 'value' (the critic's, before each
        token), 'entropy' and 'kl' (to the base model, adapters off), both exact over the vocabulary.
        ValueError for a value without a critic, or a KL without adapters.
        """
        lm = self.causal_lm
        hidden_NH = self._hidden(lm, rows)
        head = lm.get_output_embeddings()
        bias = getattr(head, "bias", None)
        logp_N = token_logps(
            hidden_NH,
            head.weight,
            rows.labels,
            bias=bias,
            impl=self.impl,
            all_labelled=True,
            temperature=self.temperature,
            **logit_options(lm.config),
        )
        if not names:
            return _table(logp_N, rows)
        found = {"logp": logp_N}
        if "value" in names:
            if self.critic is None:
                raise ValueError("the policy has no critic to give values")
            found["value"] = self.critic(hidden_NH, lambda body: self._hidden(body, rows))
        if {"entropy", "kl"} & set(names):
            ref_NH = self._base_hidden(rows) if "kl" in names else None
            logit_map = logit_options(lm.config) | {"temperature": self.temperature}
            found["entropy"], found["kl"] = entropy_and_kl(hidden_NH, ref_NH, head.weight, bias, **logit_map)
        return {name: _table(found[name], rows) for name in ("logp", *names)}

    def _hidden(self, lm: Any, rows: Rows) -> Tensor:
        """Hidden states that predict candidate tokens, [N, H]."""
        hidden_RTH = lm.base_model(
            input_ids=rows.input_ids,
            position_ids=rows.positions,
            attention_mask=row_mask(lm, rows),
            use_cache=False,
        ).last_hidden_state
        return hidden_RTH.flatten(0, 1).index_select(0, rows.source)

    @torch.no_grad()
    def _base_hidden(self, rows: Rows) -> Tensor:
        model: Any = self.model
        if not hasattr(model, "disable_adapter"):
            raise ValueError("an exact KL to the base model needs adapters (model.lora)")
        with model.disable_adapter():
            return self._hidden(self.causal_lm, rows)

    def row_cost(self) -> RowCost:
        """FLOPs of the body per token and per query-key pair, from the model's own sizes."""
        config = self.causal_lm.config.get_text_config()
        layers = (m for m in self.causal_lm.base_model.modules() if not isinstance(m, nn.Embedding))
        body = sum(p.numel() for layer in layers for p in layer.parameters(recurse=False))
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_attention_heads * head_dim
        penalty = 1.0 if self.device.type == "cpu" else 2.0
        return RowCost(2.0 * body, 4.0 * width * config.num_hidden_layers, penalty)


def _table(values_N: Tensor, rows: Rows) -> Tensor:
    """Values of candidate tokens as a table, [C, U], 0 after a candidate's end."""
    table = torch.zeros(rows.num_candidates * rows.width, dtype=values_N.dtype, device=values_N.device)
    return table.index_copy(0, rows.target, values_N).view(rows.num_candidates, rows.width)


def logit_options(config: Any) -> dict[str, Any]:
    """How a model turns head outputs into logits: Granite's and Cohere's scale, Gemma-2's softcap."""
    config = config.get_text_config()
    scale = 1.0
    if divisor := getattr(config, "logits_scaling", None):
        scale = 1.0 / divisor
    elif factor := getattr(config, "logit_scale", None):
        scale = float(factor)
    return {"scale": scale, "softcap": getattr(config, "final_logit_softcapping", None)}


def check_head(lm: Any) -> None:
    """Refuse an LM head whose logits are more than one matrix: an adapter on it would be ignored silently."""
    if lm.base_model is lm:
        raise ValueError(f"{type(lm).__name__} is no body with an LM head: its hidden states are not known")
    head = lm.get_output_embeddings()
    wrapped = hasattr(head, "base_layer") or hasattr(head, "modules_to_save")
    if wrapped or not isinstance(getattr(head, "weight", None), Tensor):
        kind = f"{type(head).__module__.partition('.')[0]}.{type(head).__name__}"
        raise ValueError(
            f"the LM head of {type(lm).__name__} is {kind}, not a plain linear layer; "
            "leave 'lm_head' out of model.lora.target_modules and model.lora.modules_to_save"
        )


def row_mask(lm: Any, rows: Rows) -> Tensor | Mapping[str, Tensor] | None:
    """The attention mask of these rows as this model takes it; None for causal rows."""
    if rows.segments is None:
        return None
    config, kinds = lm.config.get_text_config(), _kinds(lm)

    def make(window: int | None) -> Tensor:
        assert rows.segments is not None
        mask = tree_mask(rows.segments, rows.positions, window=window)
        if config._attn_implementation != "eager":
            return mask
        dtype = lm.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(
            ~mask, torch.finfo(dtype).min
        )

    if getattr(config, "layer_types", None) is None:
        return make(config.sliding_window if SLIDING in kinds else None)
    if kinds == {FULL}:
        return make(None)
    return {FULL: make(None), SLIDING: make(config.sliding_window)}


def _kinds(lm: Any) -> set[str]:
    """Kinds of attention among the layers; Mistral's configuration has a window for all, and no list."""
    config = lm.config.get_text_config()
    if listed := getattr(config, "layer_types", None):
        return set(listed)
    return {FULL if getattr(config, "sliding_window", None) is None else SLIDING}


class _Probe:
    """A small context with two candidates of different lengths."""

    def __init__(self, vocab_size: int):
        ids = np.random.default_rng(0).integers(0, vocab_size, 17, dtype=np.int32)
        self.prompt_ids, self.candidate_ids = ids[:6], (ids[6:13], ids[13:])


@torch.no_grad()
def supported_sharing(policy: TokenPolicy, sharing: Sharing) -> Sharing:
    """Check the policy's log-probs on a small input against its own logits, and sharing against not sharing.

    Returns 'never' for 'auto' where the model cannot share prompts; raises ValueError for 'always' there, and
    where the head's log-probs are not those of the model's own logits.
    """
    lm, was_training = policy.causal_lm, policy.training
    policy.eval()
    try:
        probe = _Probe(lm.config.get_text_config().vocab_size)
        cost = RowCost(1, 0)
        alone = make_rows([probe], sharing="never", cost=cost, pad_id=0).to(policy.device)
        ours = policy(alone)
        logits = lm(input_ids=alone.input_ids, use_cache=False).logits.float().log_softmax(-1)
        theirs = torch.zeros_like(ours).flatten()
        rows = logits.flatten(0, 1)[alone.source, alone.labels]
        theirs = theirs.index_copy(0, alone.target, rows.to(ours.dtype)).view_as(ours)
        tolerance = 1e-3 if lm.dtype == torch.float32 else 0.25
        if (gap := (ours - theirs).abs().max().item()) > tolerance:
            raise ValueError(
                f"log-probs of {type(lm).__name__} differ from its own logits by {gap:.3g}: "
                "it changes its logits after the head in a way that is not known here"
            )
        if sharing == "never":
            return sharing
        obstacle = (
            None if policy.can_share else f"attention '{lm.config._attn_implementation}' takes no tree mask"
        )
        if obstacle is None:
            shared = make_rows([probe], sharing="always", cost=cost, pad_id=0).to(policy.device)
            obstacle = _difference(policy, shared, ours, tolerance)
    finally:
        policy.train(was_training)
    if obstacle is None:
        return sharing
    if sharing == "always":
        raise ValueError(f"model.prefix_sharing=always: {obstacle}")
    logger.warning("prompts are not shared between candidates: %s", obstacle)
    return "never"


def _difference(policy: TokenPolicy, shared: Rows, expected: Tensor, tolerance: float) -> str | None:
    """Why shared rows cannot be used: the model fails on the mask, or gives other log-probs."""
    try:
        gap = (policy(shared) - expected).abs().max().item()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"the model fails on a tree mask ({type(error).__name__}: {error})"
    return None if gap <= tolerance else f"shared rows differ from separate ones by {gap:.3g}"
