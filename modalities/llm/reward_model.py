"""A text reward model: a causal LM's body and a linear head on the last token of prompt and completion.

It reads the same rows as a policy, so candidates of one prompt can share it. Shapes: C candidates, R rows, T
tokens, H hidden, N objectives.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from triptych.modalities.llm.model import (
    PACKAGE,
    LoraSettings,
    ModelConfig,
    adapt,
    load_model,
    load_tokenizer,
    load_trained,
    locate,
)
from triptych.modalities.llm.policy import TokenPolicy, row_mask, supported_sharing
from triptych.modalities.llm.rows import Context, RowCost, Rows, Sharing, make_rows
from triptych.training.atomic import clean_temporary, make_temporary, publish
from triptych.training.references import content_hash
from triptych.training.scorers import Standardise
from triptych.training.scoring import ScoreBatch, ScoreSample, score_batch

HEAD, SETTINGS = "reward_head.safetensors", "reward.json"
SEPARATOR = "\n\nA better answer:\n"
Reads = Literal["answer", "gap"]


@dataclass(frozen=True, kw_only=True)
class BodyConfig:
    """The language model under a reward head: the settings of `ModelConfig` that concern one."""

    name_or_path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    lora: LoraSettings | None = field(default_factory=LoraSettings)
    prefix_sharing: Sharing = "auto"
    gradient_checkpointing: bool = False
    dropout: bool = False

    def model_config(self) -> ModelConfig:
        """As the loading functions take it; what concerns references is not read."""
        return ModelConfig(reference="frozen_copy" if self.lora is None else "adapter_off", **vars(self))


class RewardModel(nn.Module):
    """Scores of the candidates in rows; `forward` is what DDP and FSDP see.

    names: of the objectives, N. The head begins at zero, so that an untrained model calls every pair a tie,
    and is computed in float32. outputs: from the head's standardised units to those of the ratings it was
    trained on; without ratings the head has no bias, which no comparison could see.
    """

    def __init__(
        self, model: nn.Module, *, names: Sequence[str] = ("reward",), outputs: Standardise | None = None
    ):
        super().__init__()
        self.model, self.names = model, tuple(names)
        lm = self.causal_lm
        self.head = nn.Linear(lm.config.get_text_config().hidden_size, len(names), bias=outputs is not None)
        for parameter in self.head.parameters():
            nn.init.zeros_(parameter)
        self.outputs = outputs or Standardise.identity(len(names))
        # Nothing reads the LM's own head; a tied one is the embedding, too.
        own = lm.get_output_embeddings()
        if own is not None and own.weight is not lm.get_input_embeddings().weight:
            own.requires_grad_(False)

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
        return self.head.weight.device

    def forward(self, rows: Rows) -> Tensor:
        """Scores in standardised units, [C, N] float32."""
        lm = self.causal_lm
        hidden_RTH = lm.base_model(
            input_ids=rows.input_ids,
            position_ids=rows.positions,
            attention_mask=row_mask(lm, rows),
            use_cache=False,
        ).last_hidden_state
        hidden_CH = hidden_RTH.flatten(0, 1).index_select(0, last_tokens(rows))
        with torch.autocast(hidden_CH.device.type, enabled=False):
            return self.head(hidden_CH.float())

    def rate(self, rows: Rows) -> Tensor:
        """Scores in the ratings' own units, [C, N]; those of pairs as they are."""
        return self.outputs.inverse(self(rows))


def last_tokens(rows: Rows) -> Tensor:
    """Place in the flattened [R * T] of each candidate's last token, [C].

    A row's candidates follow each other and its prompt, whose last token predicts the first of each.
    """
    count = rows.count.long()
    end = count.cumsum(0)
    prompt = rows.source[end - count]
    first = torch.ones_like(prompt, dtype=torch.bool)
    first[1:] = prompt[1:] != prompt[:-1]
    before = torch.where(first, end - count, 0).cummax(0).values
    return prompt + end - before


@dataclass(frozen=True, slots=True)
class RewardExample:
    """Contexts whose candidates, in order, are those of one sample."""

    sample: ScoreSample
    contexts: tuple[Context, ...]
    source: str

    @property
    def num_tokens(self) -> int:
        """Tokens of shared rows."""
        return sum(len(c.prompt_ids) + sum(map(len, c.candidate_ids)) for c in self.contexts)


@dataclass(frozen=True, slots=True)
class RewardCollator:
    """Reward examples -> one batch of rows."""

    cost: RowCost
    pad_id: int
    sharing: Sharing = "auto"

    def rows(self, contexts: Sequence[Context]) -> Rows:
        """Rows of every candidate of the contexts, in order."""
        return make_rows(contexts, sharing=self.sharing, cost=self.cost, pad_id=self.pad_id)

    def __call__(self, examples: Sequence[RewardExample], draws: Sequence[object] = ()) -> ScoreBatch:
        """One batch; ValueError when the examples are not all of one kind."""
        rows = self.rows([c for e in examples for c in e.contexts])
        return score_batch([e.sample for e in examples], rows, rows.keys)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedReward:
    """A reward model ready to score. reads: an answer, or an answer's gap over a reference answer."""

    policy: RewardModel
    tokenizer: Any
    collate: RewardCollator
    reads: Reads
    separator: str
    facts: Mapping[str, Any]

    @torch.no_grad()
    def scores(self, contexts: Sequence[Context], *, batch_size: int) -> list[Tensor]:
        """Scores of each context's candidates, [K, N] each, in the ratings' units, batch by batch."""
        found: list[Tensor] = []
        for start in range(0, len(contexts), batch_size):
            cut = contexts[start : start + batch_size]
            rated = self.policy.rate(self.collate.rows(cut).to(self.policy.device)).cpu()
            found += rated.split([len(c.candidate_ids) for c in cut])
        return found


def collator_of(model: nn.Module, tokenizer: Any, sharing: Sharing) -> RewardCollator:
    """How this model's rows are laid out; the model is where it will compute. As `supported_sharing`."""
    policy = TokenPolicy(model).train(model.training)
    return RewardCollator(policy.row_cost(), tokenizer.pad_token_id, supported_sharing(policy, sharing))


def with_reference_answer(
    prompt_ids: np.ndarray, reference_ids: np.ndarray, separator_ids: Sequence[int], *, eos: int
) -> np.ndarray:
    """A prompt that shows an answer to be improved on: prompt, answer without its end, separator; int32.

    A policy that learns to improve answers (PIT) reads the same ids.
    """
    ended = len(reference_ids) > 0 and reference_ids[-1] == eos
    reference_ids = reference_ids[:-1] if ended else reference_ids
    parts = (prompt_ids, reference_ids, np.asarray(separator_ids))
    return np.concatenate([np.asarray(p, dtype=np.int32) for p in parts])


def save_reward_model(
    policy: RewardModel,
    tokenizer: Any,
    folder: Path,
    *,
    body: BodyConfig,
    base_hash: str,
    base_folder: str,
    reads: Reads,
    facts: Mapping[str, Any],
    state: Mapping[str, Tensor] | None = None,
) -> None:
    """Write adapter or whole model, head, tokenizer and settings as safetensors and JSON.

    base_folder: where the base was read from. state: the policy's gathered state dict where it is sharded.
    facts: JSON values for whoever reads it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    clean_temporary(folder.parent)
    temporary = make_temporary(folder)
    whole = dict(policy.state_dict() if state is None else state)
    options = {}
    if state is not None:
        options = {
            "state_dict": {k.removeprefix("model."): v for k, v in whole.items() if k.startswith("model.")}
        }
    policy.model.save_pretrained(temporary, **options)  # type: ignore[operator]
    tokenizer.save_pretrained(temporary)
    head = {k: v.detach().cpu() for k, v in whole.items() if k.startswith(("head.", "outputs."))}
    save_file({k: v.contiguous() for k, v in head.items()}, temporary / HEAD)
    settings = {
        "names": policy.names,
        "rated": policy.head.bias is not None,
        "reads": reads,
        "separator": SEPARATOR,
        "body": asdict(body),
        "base_hash": base_hash,
        "base_folder": base_folder,
        "facts": dict(facts),
    }
    (temporary / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    publish(temporary, folder)


def read_settings(folder: Path) -> dict[str, Any]:
    """reward.json of an exported reward model; ValueError naming what the folder lacks."""
    for name in (SETTINGS, HEAD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no reward model: it has no {name}")
    return json.loads((folder / SETTINGS).read_text("utf-8"))


def load_reward_model(
    folder: Path,
    *,
    device: torch.device,
    base: str | None = None,
    cache_dir: Path | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> LoadedReward:
    """An exported reward model in evaluation mode, with its weights as they were trained.

    base: the base model under an adapter, where it is not where it was (a folder or hub name). cache_dir:
    where a packaged base is converted to, if the one of the training is gone. ValueError when the base is
    another model than the one that was trained on, which would give other scores without a sign of it.
    """
    settings = read_settings(folder)
    lora = settings["body"].pop("lora")
    body = BodyConfig(lora=None if lora is None else LoraSettings(**lora), **settings["body"])
    config = body.model_config()
    if lora is None:
        source = str(folder)
    elif base is None and body.name_or_path.startswith(PACKAGE) and Path(settings["base_folder"]).is_dir():
        source = settings["base_folder"]
    elif base is None and body.name_or_path.startswith(PACKAGE) and cache_dir is None:
        raise ValueError(f"{folder}: the converted {body.name_or_path} is gone; give base or cache_dir")
    else:
        named = ModelConfig(name_or_path=base or body.name_or_path, revision=body.revision)
        source = locate(named, cache_dir=cache_dir or folder, report=report)
    model = load_model(source, config)
    if lora is not None and (found := content_hash(model)) != settings["base_hash"]:
        raise ValueError(f"{folder} was trained on another base than {source}: {found[:12]} is its hash, not "
                         f"{settings['base_hash'][:12]}")  # fmt: skip
    model = adapt(model, config)
    if lora is not None:
        load_trained(model, folder)
    head = load_file(folder / HEAD)
    outputs = Standardise(head["outputs.mean"], head["outputs.scale"]) if settings["rated"] else None
    policy = RewardModel(model, names=settings["names"], outputs=outputs)
    policy.head.load_state_dict(
        {k.removeprefix("head."): v for k, v in head.items() if k.startswith("head.")}
    )
    policy = policy.to(device).eval().requires_grad_(False)
    tokenizer = load_tokenizer(str(folder), config)
    return LoadedReward(
        policy=policy,
        tokenizer=tokenizer,
        collate=collator_of(model, tokenizer, body.prefix_sharing),
        reads=settings["reads"],
        separator=settings["separator"],
        facts=settings["facts"],
    )
