"""Decoding and session likelihoods here and as the usual ways do them, side by side on the same weights.

    python scripts/bench_recsys.py                # about 4 minutes on one CPU core (Linux)

decode: the `width` best items of a catalogue for every user, against transformers' `generate` with
`prefix_allowed_tokens_fn` over a dictionary of prefixes and its own caches, on the same weights. The items
and their log-probs must agree before times are compared.
cornac: the same against cornac's TIGER (`generate_beam`: a dictionary of prefixes, a user at a time, no cache
of keys and values), if cornac is installed. Layers, width, heads, codebooks, history and a token a code are
the same; it is a T5, so the weights are random on both sides and the items differ: both must give each user
as many different items of the catalogue as asked.
sessions: forward and backward of the log-probs of C candidate sessions a user, against a row a candidate.
jagged: a training step on histories of real lengths end to end, against the same histories padded.
catalogue, history: decoding as the catalogue grows from 2k to 200k items, and the history from 50 to 1,000.
Every case is a process of its own with one thread; CPU seconds, the least of the repetitions after the first.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from dataclasses import fields
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from triptych.modalities.recsys.beams import beam_search
from triptych.modalities.recsys.decoding import begin
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.model import ModelConfig, SessionPolicy, Sessions
from triptych.modalities.recsys.trie import Trie
from triptych.scripts.common import quiet_libraries, versions
from triptych.scripts.measuring import as_child, run_child, say

SIZES = (256, 256, 256)
WIDTH, HEADS, LAYERS = 128, 4, 2
REPEATS = 4
CORNAC = "cornac==3.0.1"


def make(*, num_items: int = 2000, context: str = "bidirectional", tokens: str = "sum") -> Any:
    """A model with random weights that has opinions, and the semantic ids of its catalogue."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.randperm(SIZES[0] * SIZES[1] * SIZES[2], generator=generator)[:num_items]
    codes = torch.stack([flat // (SIZES[1] * SIZES[2]), flat // SIZES[2] % SIZES[1], flat % SIZES[2]], 1)
    torch.manual_seed(0)
    config = ModelConfig(
        context=context,  # type: ignore[arg-type]
        history_tokens=tokens,  # type: ignore[arg-type]
        width=WIDTH,
        heads=HEADS,
        encoder_layers=0 if context == "lazy" else LAYERS,
        decoder_layers=LAYERS,
        dropout=0.0,
    )
    policy = SessionPolicy(config, codes, SIZES).eval()
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    return policy, codes


def histories(num_users: int, length: int, num_items: int) -> list[Tensor]:
    """Random histories of one length."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(num_items, (length,), generator=generator) for _ in range(num_users)]


def least(step: Callable[[], Any], repeats: int = REPEATS) -> tuple[float, Any]:
    """Least CPU seconds of the repetitions after the first, and what the last one gave."""
    seconds, found = [], None
    for _ in range(repeats):
        start = time.process_time()
        found = step()
        seconds.append(time.process_time() - start)
    return min(seconds[1:]), found


def decode_ours(
    *,
    width: int,
    users: int,
    length: int,
    num_items: int,
    context: str = "bidirectional",
    tokens: str = "sum",
    together: int | None = None,
) -> dict[str, Any]:
    """Beams of single items, `together` users in a batch: all unless said."""
    policy, codes = make(num_items=num_items, context=context, tokens=tokens)
    rows, step = histories(users, length, num_items), together or users
    trie, batches = Trie.of(codes, SIZES), [Jagged.of(rows[i : i + step]) for i in range(0, users, step)]
    seconds, found = least(lambda: [beam_search(begin(policy, b), trie, width=width) for b in batches])
    return {
        "ms": seconds / users * 1e3,
        "items": torch.cat([beams.items_UWm[:, :, 0] for beams in found]).tolist(),
        "logp": torch.cat([beams.logp_UW for beams in found]).tolist(),
        "weights": num_weights(policy),
    }


def num_weights(model: nn.Module) -> int:
    """Numbers in a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def decode_cornac(*, width: int, users: int, length: int, num_items: int) -> dict[str, Any]:
    """Beams of single items by cornac's TIGER, which takes a user at a time."""
    from cornac.models.tiger.recom_tiger import TIGER  # type: ignore[import-not-found]
    from cornac.models.tiger.tiger import TIGERSeq2Seq  # type: ignore[import-not-found]

    _, codes = make(num_items=num_items)
    recommender = TIGER(rqvae_num_levels=len(SIZES), rqvae_codebook_size=SIZES[0], n_beams=width)
    # Its fourth level tells items of one id apart; these have an id each, so it is left out, in its favour.
    recommender._build_semantic_ids(codes.numpy())
    torch.manual_seed(0)
    model = TIGERSeq2Seq(
        SIZES,
        d_model=WIDTH,
        # Two matrices of T5 hold the weights of three of ours at 8/3 of the width.
        d_ff=4 * WIDTH,
        num_heads=HEADS,
        d_kv=WIDTH // HEADS,
        num_enc_layers=LAYERS,
        num_dec_layers=LAYERS,
    ).eval()
    offsets: Any = model.offsets
    inputs = [(codes[row] + offsets).view(1, -1) for row in histories(users, length, num_items)]
    trie, mask = recommender.prefix_children, torch.ones(1, length * len(SIZES))
    seconds, found = least(lambda: [model.generate_beam(ids, mask, width, trie)[0] for ids in inputs])
    item_of = {tuple(row): item for item, row in enumerate(codes.tolist())}
    return {
        "ms": seconds / users * 1e3,
        "items": [[item_of.get(id, -1) for id in ids] for ids in found],
        "weights": num_weights(model),
    }


def decode_transformers(*, width: int, users: int, length: int, num_items: int) -> dict[str, Any]:
    """The same beams by `generate`, all users in a batch."""
    policy, codes = make(num_items=num_items)
    model, allowed, item_of = as_transformers(policy, codes)
    rows = torch.stack(histories(users, length, num_items))
    options = {
        "num_beams": width,
        "num_return_sequences": width,
        "max_new_tokens": len(SIZES),
        "min_new_tokens": len(SIZES),
        "length_penalty": 0.0,
        "do_sample": False,
        "prefix_allowed_tokens_fn": allowed,
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    mask = torch.ones_like(rows)
    seconds, out = least(lambda: model.generate(inputs=rows, attention_mask=mask, **options), repeats=3)
    sequences = out.sequences[:, 1 : 1 + len(SIZES)].tolist()
    return {
        "ms": seconds / users * 1e3,
        "items": torch.tensor([item_of[tuple(s)] for s in sequences]).view(users, width).tolist(),
        "logp": out.sequences_scores.view(users, width).tolist(),
    }


def as_transformers(
    policy: SessionPolicy, codes: Tensor
) -> tuple[Any, Callable[[int, Tensor], list[int]], dict]:
    """The policy as an encoder-decoder of transformers, its dictionary trie, and tokens -> item."""
    from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.cache_utils import EncoderDecoderCache
    from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

    starts = torch.tensor([1, *SIZES[:-1]]).cumsum(0)
    num_tokens = 2 + sum(SIZES)

    class Encoder(nn.Module):
        main_input_name = "input_ids"

        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
            rows = Jagged.of(list(input_ids))
            tokens = policy.tokens(rows, policy.codes_of(rows.values))
            assert policy.encoder is not None
            return BaseModelOutput(last_hidden_state=tokens.padded(policy.encoder(tokens)))  # type: ignore[arg-type]

    class Model(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig
        main_input_name = "input_ids"
        _supports_cache_class = True

        def __init__(self, config: PretrainedConfig):
            super().__init__(config)
            self.encoder, self.policy = Encoder(), policy

        def get_encoder(self, *_: Any, **__: Any) -> nn.Module:
            return self.encoder

        def forward(
            self,
            input_ids: Tensor | None = None,
            attention_mask: Tensor | None = None,
            decoder_input_ids: Tensor | None = None,
            encoder_outputs: Any = None,
            past_key_values: EncoderDecoderCache | None = None,
            cache: EncoderDecoderCache | None = None,
            **_: Any,
        ) -> Any:
            assert decoder_input_ids is not None
            # transformers calls it `cache` from 5.24 on.
            cache = past_key_values if cache is None else cache
            states = encoder_outputs.last_hidden_state
            assert cache is not None
            past = cache.get_seq_length()
            fresh = decoder_input_ids[:, past:] if decoder_input_ids.shape[1] > 1 else decoder_input_ids
            table = torch.cat([policy.begin_D[None], policy.codes.table.weight, policy.begin_D[None]])
            x = table[fresh]
            for index, layer in enumerate(policy.layers):
                kept = None
                if past:
                    entry: Any = cache.self_attention_cache.layers[index]
                    kept = (entry.keys, entry.values)
                x, (k, v) = layer(x, past, kept, self._cross(index, cache, states))
                cache.self_attention_cache.update(k[:, :, past:], v[:, :, past:], index)
            hidden = policy.norm(x[:, -1:])
            logits = x.new_full((len(x), 1, num_tokens), -torch.inf)
            level = min(past, len(SIZES) - 1)
            first = int(starts[level])
            logits[..., first : first + SIZES[level]] = hidden @ policy.head(level).T
            made: Any = Seq2SeqLMOutput
            names = {f.name for f in fields(Seq2SeqLMOutput)}
            return made(logits=logits, **{"cache" if "cache" in names else "past_key_values": cache})

        def _cross(self, index: int, cache: EncoderDecoderCache, states: Tensor) -> Callable[..., Tensor]:
            from triptych.modalities.recsys.layers import attend, rotated

            length = states.shape[1]
            if not cache.is_updated.get(index):
                projected = policy.reader.into[index](states).view(*states.shape[:2], 2, 4, -1)
                k, v = projected.unbind(2)
                k = rotated(k, torch.arange(length).unsqueeze(-1))
                cache.cross_attention_cache.update(k.transpose(1, 2), v.transpose(1, 2), index)
                cache.is_updated[index] = True
            entry: Any = cache.cross_attention_cache.layers[index]

            def attention(q: Tensor, rate: float) -> Tensor:
                turned = rotated(q, torch.full((1, 1, 1), length)).transpose(1, 2)
                return attend(turned, entry.keys, entry.values, None, rate).transpose(1, 2)

            return attention

    settings: Any = PretrainedConfig
    config = settings(
        is_encoder_decoder=True,
        decoder_start_token_id=0,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=num_tokens - 1,
        vocab_size=num_tokens,
        num_hidden_layers=len(policy.layers),
        hidden_size=policy.config.width,
    )
    model = Model(config).eval()
    children: dict[tuple[int, ...], list[int]] = {}
    tokens = (codes + starts).tolist()
    for row in tokens:
        for level in range(len(row)):
            under = children.setdefault(tuple(row[:level]), [])
            if row[level] not in under:
                under.append(row[level])

    def allowed(_: int, ids: Tensor) -> list[int]:
        return children.get(tuple(ids[1:].tolist()), [num_tokens - 1])

    return model, allowed, {tuple(row): item for item, row in enumerate(tokens)}


def sessions(*, candidates: int, users: int, length: int, items: int, shared: bool) -> dict[str, Any]:
    """Forward and backward of the log-probs of candidate sessions."""
    policy, codes = make()
    rows = histories(users, length, len(codes))
    generator = torch.Generator().manual_seed(2)
    wanted = torch.randint(len(codes), (users * candidates, items), generator=generator)
    owner = torch.arange(users).repeat_interleave(candidates)
    if not shared:
        rows = [rows[i] for i in owner.tolist()]
    asked = Sessions(
        items=wanted,
        user=owner if shared else torch.arange(len(owner)),
        seen=torch.full((len(owner),), length),
        most=candidates if shared else 1,
    )
    history = Jagged.of(rows)

    def step() -> Tensor:
        policy.zero_grad()
        logps = policy(history, asked).sum(1)
        logps.sum().backward()
        return logps.detach()

    seconds, logps = least(step)
    return {"ms": seconds / users * 1e3, "logp": logps.tolist()}


def jagged(*, padded: bool, users: int) -> dict[str, Any]:
    """Forward and backward on log-normal lengths as MovieLens-100k has them (median 65), cut at 200."""
    policy, codes = make()
    generator = torch.Generator().manual_seed(3)
    lengths = (65 * torch.exp(torch.randn(users, generator=generator))).clamp(20, 200).long()
    rows = [torch.randint(len(codes), (int(n),), generator=generator) for n in lengths]
    if padded:
        longest = int(lengths.max())
        rows = [torch.nn.functional.pad(row, (0, longest - len(row))) for row in rows]
    asked = Sessions(
        items=torch.randint(len(codes), (users, 5), generator=generator),
        user=torch.arange(users),
        seen=lengths,
        most=1,
    )
    history = Jagged.of(rows)

    def step() -> None:
        policy.zero_grad()
        policy(history, asked).sum().backward()

    return {"ms": least(step)[0] / users * 1e3, "tokens": len(history.values)}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "ours": decode_ours,
    "transformers": decode_transformers,
    "cornac": decode_cornac,
    "sessions": sessions,
    "jagged": jagged,
}


def main() -> int:
    """Run the benchmarks, print their tables, write runs/bench/recsys.json."""
    parser = argparse.ArgumentParser(prog="bench_recsys", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    quiet_libraries()
    if options.child:
        as_child(options.child, CHILDREN)
        return 0
    results = {
        "decode": _decode(),
        "cornac": _cornac(),
        "sessions": _sessions(),
        "jagged": _jagged(),
        "catalogue": _growing("num_items", (2_000, 20_000, 200_000), width=50, users=16, length=100),
        "history": _growing("length", (50, 200, 1000), width=50, users=16, num_items=2_000),
    }
    report = {"versions": versions(), "device": f"CPU, 1 thread of {os.cpu_count()}", **results}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "recsys.json").write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    return 0


def _decode() -> dict[str, Any]:
    found = {}
    for width in (20, 50):
        work = {"width": width, "users": 16, "length": 100, "num_items": 2_000}
        ours, theirs = run_child(__file__, "ours", **work), run_child(__file__, "transformers", **work)
        gap = (torch.tensor(ours["logp"]) - torch.tensor(theirs["logp"])).abs().max()
        same = torch.tensor(ours["items"]) == torch.tensor(theirs["items"])
        if gap > 1e-3 or same.float().mean() < 0.99:
            raise SystemExit(f"beams differ: log-probs by {gap:.2g}, {same.float().mean():.1%} items agree")
        ratio = theirs["ms"] / ours["ms"]
        say(
            f"decode, {width} beams",
            transformers=f"{theirs['ms']:.1f} ms a user",
            here=f"{ours['ms']:.2f} ms",
            ratio=f"{ratio:.1f}x",
            items_that_agree=f"{same.float().mean():.1%}",
        )
        found[str(width)] = {"transformers_ms": theirs["ms"], "ms": ours["ms"], "ratio": ratio}
    return found


def _cornac() -> dict[str, Any] | None:
    if find_spec("cornac") is None:
        print(
            f"decode against cornac's TIGER: left out, cornac is not installed (pip install {CORNAC})",
            flush=True,
        )
        return None
    found: dict[str, Any] = {"version": version("cornac")}
    for width in (20, 50):
        work = {"width": width, "users": 16, "length": 100, "num_items": 2_000}
        theirs = run_child(__file__, "cornac", **work)
        ours = run_child(__file__, "ours", tokens="codes", **work)
        single = run_child(__file__, "ours", tokens="codes", together=1, **work)
        for name, case in (("cornac", theirs), ("here", ours), ("here, a user at a time", single)):
            _check_legal(name, case["items"], **work)
        # Ours have a table of code vectors more: the history and the session do not share theirs.
        if not theirs["weights"] <= ours["weights"] <= 1.1 * theirs["weights"]:
            raise SystemExit(f"models differ in size: {theirs['weights']:,} and {ours['weights']:,} weights")
        ratio, ratio_single = theirs["ms"] / ours["ms"], theirs["ms"] / single["ms"]
        say(
            f"decode, {width} beams, against cornac's TIGER",
            cornac=f"{theirs['ms']:.1f} ms a user ({theirs['weights']:,} weights)",
            here=f"{ours['ms']:.2f} ms ({ours['weights']:,})",
            ratio=f"{ratio:.1f}x",
            a_user_at_a_time_here=f"{single['ms']:.2f} ms ({ratio_single:.1f}x)",
        )
        found[str(width)] = {
            "cornac_ms": theirs["ms"],
            "ms": ours["ms"],
            "ratio": ratio,
            "single_ms": single["ms"],
            "single_ratio": ratio_single,
        }
    return found


def _check_legal(
    name: str, items: list[list[int]], *, width: int, users: int, num_items: int, **_: int
) -> None:
    legal = [len({item for item in row if 0 <= item < num_items}) for row in items]
    if legal != [width] * users:
        raise SystemExit(f"decode, {name}: users get {legal} items of the catalogue, not {width} each")


def _sessions() -> dict[str, Any]:
    found = {}
    for candidates in (2, 8):
        work = {"candidates": candidates, "users": 4, "length": 256, "items": 5}
        ours = run_child(__file__, "sessions", shared=True, **work)
        theirs = run_child(__file__, "sessions", shared=False, **work)
        gap = (torch.tensor(ours["logp"]) - torch.tensor(theirs["logp"])).abs().max()
        if gap > 1e-3:
            raise SystemExit(f"log-probs of sessions differ by {gap:.2g}")
        ratio = theirs["ms"] / ours["ms"]
        say(
            f"{candidates} sessions of 5 items",
            row_each=f"{theirs['ms']:.0f} ms a user",
            shared=f"{ours['ms']:.0f} ms",
            ratio=f"{ratio:.1f}x",
        )
        found[str(candidates)] = {"row_each_ms": theirs["ms"], "ms": ours["ms"], "ratio": ratio}
    return found


def _jagged() -> dict[str, Any]:
    ours, theirs = (run_child(__file__, "jagged", padded=p, users=32) for p in (False, True))
    ratio = theirs["ms"] / ours["ms"]
    say(
        "training step",
        padded=f"{theirs['ms']:.1f} ms a user ({theirs['tokens']} items)",
        jagged=f"{ours['ms']:.1f} ms ({ours['tokens']})",
        ratio=f"{ratio:.2f}x",
    )
    return {"padded_ms": theirs["ms"], "ms": ours["ms"], "ratio": ratio}


def _growing(name: str, values: tuple[int, ...], **work: Any) -> dict[str, Any]:
    found = {}
    for context in ("bidirectional", "lazy"):
        times = [run_child(__file__, "ours", context=context, **work, **{name: v})["ms"] for v in values]
        shown = {f"{v:,}": f"{t:.2f} ms a user" for v, t in zip(values, times, strict=True)}
        say(f"decode, 50 beams, {context}, {name.replace('num_items', 'catalogue')}", **shown)
        found[context] = dict(zip(map(str, values), times, strict=True))
    return found


if __name__ == "__main__":
    raise SystemExit(main())
