"""K samples of one prompt: prefill shared, against K independent samples and against transformers' generate.

    python scripts/bench_sampling.py                     # about 8 minutes on one CPU core
    python scripts/bench_sampling.py --num-prompts 4 --lengths 64 256 --ways shared batched

A model of SmolLM2-135M's shape with random weights draws 8 candidates of 32 tokens after prompts of several
lengths; none ends early. 'batched' are the same 8 rows in one batch, each with a prefill of its own, by the
same engine; 'one by one' is a row at a time; 'generate' is the library's, with num_return_sequences. Before
anything is timed, the greedy tokens of all are compared. CPU seconds of one thread, median of the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from triptych.modalities.llm.policy import TokenPolicy
from triptych.modalities.llm.sampling import Drawing, draw
from triptych.scripts.common import quiet_libraries, versions

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
WAYS = ("shared", "batched", "one by one", "generate")


def main() -> int:
    """Time every way at every prompt length, print the table, write runs/bench/sampling.json."""
    parser = argparse.ArgumentParser(prog="bench_sampling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--num-prompts", type=int, default=1)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    policy = _make_policy()
    _check_equal(policy)
    rows = [_measure(policy, length, options) for length in options.lengths]
    _print_table(rows, options)
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"versions": versions(), "device": "CPU, 1 thread", "options": vars(options), "rows": rows}
    (options.output / "sampling.json").write_text(json.dumps(report, indent=1, default=str) + "\n", "utf-8")
    return 0


def _make_policy() -> TokenPolicy:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", bos_token_id=None, eos_token_id=None, pad_token_id=None, **SHAPE)
    return TokenPolicy(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval())


def _sampler(
    way: str, policy: TokenPolicy, prompts: list[np.ndarray], options: Any, temperature: float
) -> Callable[[], np.ndarray]:
    """A function that draws K candidates of each prompt and returns their tokens, [P * K, S]."""
    count, ids = options.candidates, torch.from_numpy(np.stack(prompts).astype(np.int64))
    size = count * len(prompts)
    settings = Drawing(max_new_tokens=options.tokens, temperature=temperature, batch_size=size)

    def ours(copies: int, each: int) -> np.ndarray:
        rows = [p for p in prompts for _ in range(copies)]
        found = draw(policy, rows, each, settings, seeds=range(len(rows)), eos_ids=(), pad_id=0)
        return np.stack([d.ids for drawn in found for d in drawn])

    def one_by_one(prompt: np.ndarray) -> np.ndarray:
        (found,) = draw(policy, [prompt], 1, settings, seeds=[0], eos_ids=(), pad_id=0)
        return found[0].ids[None]

    def theirs() -> np.ndarray:
        how = {"do_sample": False, "num_return_sequences": 1}
        if temperature:
            how = {"do_sample": True, "top_k": 0, "num_return_sequences": count}
        out = policy.causal_lm.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=options.tokens,
            pad_token_id=0,
            **how,
        )
        return out[:, ids.shape[1] :].numpy()

    ways = {
        "shared": lambda: ours(1, count),
        "batched": lambda: ours(count, 1),
        "one by one": lambda: np.concatenate([one_by_one(p) for p in prompts for _ in range(count)]),
        "generate": theirs,
    }
    return ways[way]


def _check_equal(policy: TokenPolicy) -> None:
    """Every way must find the same greedy tokens."""
    options = argparse.Namespace(candidates=2, tokens=8)
    found = {way: _sampler(way, policy, _prompts(40, 1), options, 0.0)() for way in WAYS}
    for way, tokens in found.items():
        if any(not np.array_equal(row, found["generate"][0]) for row in tokens):
            raise SystemExit(f"greedy tokens of '{way}' are not those of generate: {tokens}")


def _prompts(length: int, num: int) -> list[np.ndarray]:
    numbers = np.random.default_rng(length)
    return [numbers.integers(0, SHAPE["vocab_size"], length, dtype=np.int32) for _ in range(num)]


def _measure(policy: TokenPolicy, length: int, options: Any) -> dict[str, Any]:
    """Median seconds of each way; the ways take turns, so that a slow minute of the machine hits all."""
    prompts = _prompts(length, options.num_prompts)
    runs = {way: _sampler(way, policy, prompts, options, 1.0) for way in options.ways}
    seconds: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(options.repeats):
        for way, run in runs.items():
            start = time.process_time()
            tokens = run()
            seconds[way].append(time.process_time() - start)
            assert tokens.shape == (len(prompts) * options.candidates, options.tokens)
    return {
        "prompt": length,
        "seconds": {way: statistics.median(s) for way, s in seconds.items()},
        "all": seconds,
    }


def _print_table(rows: list[dict[str, Any]], options: Any) -> None:
    what = f"{options.num_prompts} x {options.candidates} candidates of {options.tokens} tokens"
    print(f"{what}, CPU seconds, 1 thread")
    print("prompt  " + "  ".join(f"{way:>18}" for way in options.ways))
    for row in rows:
        seconds = row["seconds"]
        base = seconds.get("shared", next(iter(seconds.values())))
        cells = (f"{seconds[way]:8.2f} s ({seconds[way] / base:4.2f}x)" for way in options.ways)
        print(f"{row['prompt']:6d}  " + "  ".join(f"{cell:>18}" for cell in cells))


if __name__ == "__main__":
    raise SystemExit(main())
