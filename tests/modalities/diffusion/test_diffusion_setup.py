"""Diffusion runs put together from a configuration: references, refusals, steps however they are cut."""

import gc
import math
import re

import pytest
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from tiny_diffusion import FIRST_WIDTH, MAX_TOKENS, PROJECTION, SECOND_WIDTH, TINY, write_pipeline
from tiny_runs import no_bar

from triptych.modalities.diffusion.data import DataConfig
from triptych.modalities.diffusion.draws import NoiseConfig
from triptych.modalities.diffusion.model import LoraConfig, ModelConfig
from triptych.modalities.diffusion.setup import (
    DiffusionConfig,
    EvaluationConfig,
    LikelihoodConfig,
    fill_references,
    set_up,
)
from triptych.modalities.diffusion.shards import EncodedContext, EncodedPrompt, ShardWriter, prompt_hash
from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.evaluation import evaluate
from triptych.training.loop import make_learner, train_step
from triptych.training.meters import Meter
from triptych.training.references import AdapterOff, Cached, FrozenCopy, Untrained, trained

CPU = torch.device("cpu")
FULL = {"lora": None, "reference": "frozen_copy"}
CACHED = {**FULL, "cache_reference": True}
WIDTH = {"sd15": FIRST_WIDTH, "sdxl": FIRST_WIDTH + SECOND_WIDTH}
SHAPES = ((8, 8), (4, 16))  # equally many numbers: only their order of axes tells them apart


def write_data(folder, family="sd15", *, num=16, kind="pair", candidates=2, seed=0, margins=None):
    """Random latents of two shapes in turn, each context under a prompt of its own."""
    draw = torch.Generator().manual_seed(seed)

    def prompt():
        pooled = torch.randn(PROJECTION, generator=draw) if family == "sdxl" else None
        return EncodedPrompt(torch.randn(MAX_TOKENS, WIDTH[family], generator=draw), pooled)

    writer = ShardWriter(folder, {"seed": seed}, empty=prompt())
    contexts = [
        EncodedContext(
            id=f"c{i}",
            source=f"pairs.parquet[{i}]",
            kind=kind,
            prompt=f"prompt {i}",
            group=None,
            latents=torch.randn(candidates, 4, *SHAPES[i % 2], generator=draw),
            time_ids=((32, 32, 0, i, 32, 32),) * candidates,
            contents=tuple(f"{i}-{k}" for k in range(candidates)),
            relevance=tuple(float(candidates - k) for k in range(candidates)),
            margin=None if margins is None else margins[i],
        )
        for i in range(num)
    ]
    writer.write(contexts, {prompt_hash(c.prompt): prompt() for c in contexts})
    writer.finish({"family": family})
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """Tiny SD1.5 and SDXL pipelines and encoded data for each."""
    folder = tmp_path_factory.mktemp("setup")
    for family in ("sd15", "sdxl"):
        write_pipeline(TINY[family](), folder / family)
        write_data(folder / f"pairs-{family}", family)
    write_data(folder / "lists", kind="list", candidates=3)
    write_data(folder / "single", kind="single", candidates=1)
    return folder


def configuration(material, family="sd15", *, source=None, objective=("dpo", {"beta": 500.0}), **parts):
    """A complete configuration; `parts` override single settings of a group."""
    name, options = objective
    groups = {
        "model": {"name_or_path": str(material / family), "lora": LoraConfig(r=2)},
        "data": {"source": str(source or material / f"pairs-{family}"), "eval_share": 0.25},
        "optim": {"lr": 1e-2, "batch_size": 8, "micro_batch_size": 8, "num_steps": 3, "warmup": 0.0},
        "run": {"output_dir": "unused", "seed": 1},
        "likelihood": {},
        "noise": {},
    }
    settings = {group: values | parts.pop(group, {}) for group, values in groups.items()}
    return DiffusionConfig(
        model=ModelConfig(**settings["model"]),
        data=DataConfig(**settings["data"]),
        objective=ObjectiveConfig(name=name, options=options, **parts),
        optim=OptimConfig(**settings["optim"]),
        run=RunConfig(**settings["run"]),
        likelihood=LikelihoodConfig(**settings["likelihood"]),
        noise=NoiseConfig(**settings["noise"]),
        evaluation=EvaluationConfig(micro_batch_size=4),
    )


def make(config, cache, *, lines=None):
    return set_up(
        config,
        config.objective.terms(),
        device=CPU,
        cache_dir=cache,
        root=cache,
        report=(lambda line: None) if lines is None else lines.append,
    )


def fill(run):
    """What `fill_references` reports."""
    lines = []
    fill_references(run, Accelerator(cpu=True), report=lines.append, bar=no_bar)
    return lines


def steps(run, config, num=3):
    """Losses and gradient norms of some steps, and the trained weights after them."""
    accelerator = Accelerator(cpu=True)
    learner = make_learner(run.policy, config.optim, accelerator)
    numbers = []
    for _ in range(num):
        meter = Meter(CPU)
        norm = train_step(
            run.task, learner, config.optim, accelerator, seed=config.run.seed, num_steps=num, meter=meter
        )
        numbers.append((meter.read(lambda t: t)["loss"], float(norm)))
    return numbers, {name: p.detach().clone() for name, p in trained(learner.policy).items()}


def models_alive():
    gc.collect()
    # By their type: asking deprecated proxies for their class warns.
    return sum(issubclass(type(x), UNet2DConditionModel) for x in gc.get_objects())


@pytest.mark.parametrize(
    ("changes", "kind", "source"),
    [
        ({}, AdapterOff, None),
        ({"reference": "frozen_copy"}, FrozenCopy, None),
        (FULL, FrozenCopy, None),
        ({"cache_reference": True}, Cached, AdapterOff),
        (CACHED, Cached, Untrained),
    ],
    ids=["adapter off", "copy of lora", "copy", "cached adapter off", "cached copy"],
)
def test_the_reference_is_the_one_asked_for_and_dpo_starts_at_log_two(
    material, tmp_path, changes, kind, source
):
    config = configuration(material, model=changes)
    run = make(config, tmp_path)
    reference = run.references["frozen"]
    assert type(reference) is kind
    assert getattr(reference, "source", None) is None or type(reference.source) is source
    assert run.task.references is run.references
    fill(run)
    numbers, _ = steps(run, config, num=2)
    assert numbers[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert numbers[0][1] > 0
    assert numbers[1][0] != pytest.approx(math.log(2), abs=1e-4)


def test_a_run_without_a_reference_term_makes_none(material, tmp_path):
    before = models_alive()
    run = make(
        configuration(material, objective=("simpo", {"beta": 10.0, "gamma": 0.1}), model=FULL), tmp_path
    )
    assert run.references == {}
    assert models_alive() == before + 1


def test_cached_full_fine_tuning_keeps_no_second_model(material, tmp_path):
    before = models_alive()
    config = configuration(material, model=CACHED)
    run = make(config, tmp_path)
    assert models_alive() == before + 1
    assert isinstance(run.references["frozen"].source, Untrained)
    (line,) = fill(run)
    # 3 windows of 8 and the held-out pairs, two images each, at noise of their own.
    seen = 2 * (24 + len(run.eval_task.examples))
    assert line == f"reference: {seen} cached images at their noise, {seen} computed now"
    assert models_alive() == before + 1
    # Once training begins the policy is no reference any more, so it must not be asked.
    assert run.references["frozen"].source is None
    assert run.eval_task.references["frozen"].source is None
    live = make(configuration(material, model=FULL), tmp_path)
    assert models_alive() == before + 3
    assert isinstance(live.references["frozen"], FrozenCopy)


def test_a_table_is_filled_once_for_every_later_run_of_the_same_data(material, tmp_path):
    config = configuration(material, model=CACHED)
    first = make(config, tmp_path)
    fill(first)
    assert first.policy.calls
    again = make(config, tmp_path)
    (line,) = fill(again)
    assert line.endswith(", 0 computed now")
    assert again.policy.calls == []
    # Another beta reads the same table; another weight of the error does not.
    other = make(configuration(material, model=CACHED, objective=("dpo", {"beta": 2.0})), tmp_path)
    assert fill(other) == [line]
    wide = make(configuration(material, model=CACHED, likelihood={"reduction": "sum"}), tmp_path)
    assert not fill(wide)[0].endswith(", 0 computed now")


def test_a_table_does_not_serve_images_that_were_encoded_otherwise(material, tmp_path):
    """Images are known by their bytes, and these say nothing of the autoencoder."""
    fill(make(configuration(material, model=CACHED), tmp_path))
    source = write_data(tmp_path / "other", seed=5)
    other = make(configuration(material, model=CACHED, source=source), tmp_path)
    assert not fill(other)[0].endswith(", 0 computed now")
    zeros = make(configuration(material, model=CACHED, data={"empty_prompt": "zeros"}), tmp_path)
    assert not fill(zeros)[0].endswith(", 0 computed now")


@pytest.mark.parametrize(
    ("family", "model"), [("sd15", FULL), ("sdxl", {"lora": LoraConfig(r=2)})], ids=["sd15 full", "sdxl lora"]
)
def test_cached_training_equals_live_training(material, tmp_path, family, model):
    found = []
    for cached in (False, True):
        changes = model | {"cache_reference": cached}
        config = configuration(material, family, model=changes, optim={"eps": 1e-3, "micro_batch_size": 4})
        run = make(config, tmp_path)
        fill(run)
        run.policy.calls.clear()
        found.append((*steps(run, config), list(run.policy.calls)))
        assert evaluate_mean(run) == pytest.approx(evaluate_mean(run))
    (live_numbers, live, live_calls), (numbers, weights, calls) = found
    assert [x for x, _ in numbers] == pytest.approx([x for x, _ in live_numbers], abs=1e-4)
    for name in live:
        torch.testing.assert_close(weights[name], live[name], rtol=0, atol=2e-5, msg=name)
    # 3 steps of 8 pairs: 48 images through the policy, and of a live reference that is the policy as many.
    assert sum(calls) == 48
    assert sum(live_calls) == (96 if family == "sdxl" else 48)


def evaluate_mean(run):
    rows = evaluate(run.eval_task, run.policy, Accelerator(cpu=True), micro_batch_size=4, seed=1)
    return float(rows["loss"].mean())


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_step_is_the_same_however_its_window_is_cut(material, tmp_path, family):
    """Eight pairs of two latent shapes at once, or in fours, threes and twos; with prompt dropout."""
    model = FULL if family == "sd15" else {}
    found = []
    for size in (8, 4, 3, 2):
        config = configuration(
            material,
            family,
            model=model,
            data={"dropout": 0.5},
            noise={"stratified": True, "num_draws": 2},
            optim={"micro_batch_size": size, "eps": 1e-3},
        )
        run = make(config, tmp_path)
        found.append(steps(run, config, num=1))
        # A micro-batch with both shapes takes a forward of each, in policy and reference.
        assert sum(run.policy.calls) == (2 if family == "sdxl" else 1) * 8 * 2 * 2
    (numbers, whole), *others = found
    for other_numbers, weights in others:
        assert other_numbers[0] == pytest.approx(numbers[0], rel=1e-4)
        for name in whole:
            torch.testing.assert_close(weights[name], whole[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("reduction", "line"),
    [
        (
            "mean",
            "objective: dpo, beta 5000 on the mean of a 4x{}x{} latent's squared error = 19.53 on its sum",
        ),
        (
            "sum",
            "objective: dpo, beta 1.28e+06 on the mean of a 4x{}x{} latent's squared error = 5000 on its sum",
        ),
    ],
)
def test_what_beta_means_at_this_resolution_is_said(material, tmp_path, reduction, line):
    """5000 / (4 * 8 * 8) = 19.53; 5000 * 256 = 1.28e6."""
    lines = []
    config = configuration(material, objective=("dpo", {"beta": 5000}), likelihood={"reduction": reduction})
    run = make(config, tmp_path, lines=lines)
    assert line.format(*run.data.shape[1:]) in lines


def test_an_objective_without_beta_says_nothing_of_one(material, tmp_path):
    lines = []
    make(configuration(material, objective=("sft", {}), data={"form": "winners"}), tmp_path, lines=lines)
    assert lines[-1] == "objective: sft"


@pytest.mark.parametrize(
    ("objective", "data", "kind"),
    [
        (("dpo", {"beta": 1.0}), {}, "pair"),
        (("rank_dpo", {"beta": 1.0}), {}, "list"),
        (("kto", {"beta": 1.0}), {"form": "labelled"}, "labelled"),
        (("bco", {"beta": 1.0}), {"form": "labelled"}, "labelled"),
        (("sft", {}), {"form": "labelled"}, "labelled"),
        (("sft", {}), {"form": "winners"}, "single"),
        (("odpo", {"beta": 1.0, "alpha": 1.0}), {"form": "pairs", "keep": ["margin"]}, "pair"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_kind_of_data_is_learnt_from_and_evaluated_on(material, tmp_path, objective, data, kind):
    source = material / "lists"
    config = configuration(material, source=source, objective=objective, data=data)
    run = make(config, tmp_path)
    assert run.data.kind == kind
    numbers, _ = steps(run, config, num=1)
    assert math.isfinite(numbers[0][0])
    # Held-out examples carry what the objective reads, as those of training do.
    assert math.isfinite(evaluate_mean(run))


def test_bco_takes_its_own_shift_and_kto_the_batchs_baseline(material, tmp_path):
    for name, given in (("kto", True), ("bco", False)):
        config = configuration(material, objective=(name, {"beta": 1.0}), data={"form": "labelled"})
        assert make(config, tmp_path).task.likelihood.baseline is given


REFUSED = {
    "data for another family": (
        {"source": "pairs-sdxl"},
        "the data was encoded for a model of the kind sdxl, and .*sd15 is sd15: encode it again with",
    ),
    "an objective of samples": (
        {"objective": ("grpo", {"clip": 0.2})},
        "no kind of image data is taken by grpo: they need samples or exact log-probs",
    ),
    "an objective of probabilities": (
        {"objective": ("orpo", {"alpha": 0.1})},
        "orpo",
    ),
    "a form the objective does not take": (
        {"data": {"form": "lists"}},
        "data.form=lists makes list data, but the objective takes pair",
    ),
    "single images as pairs": (
        {"source": "single"},
        "holds single images, but the objective takes pair data",
    ),
    "no adapter to switch off": (
        {"model": {"lora": None}},
        "model.reference=adapter_off needs model.lora",
    ),
    "a time the model does not have": (
        {"noise": {"values": [249, 1000]}},
        "noise.values has 1000; the model's times are 0 to 999",
    ),
    "half an antithetic pair": (
        {"noise": {"antithetic": True}},
        "noise.antithetic needs an even noise.num_draws, not 1",
    ),
    "min-SNR with another space": (
        {"likelihood": {"min_snr": 5.0, "space": "x0"}},
        "min_snr weighs the error of eps; space=x0 cannot be combined with it",
    ),
    "a negative min-SNR": (
        {"likelihood": {"min_snr": -1.0}},
        "likelihood.min_snr=-1.0 must be positive",
    ),
    "an infinite weight": (
        {"likelihood": {"zero_terminal_snr": True, "space": "x0"}},
        "space=x0 is infinite where the schedule has no signal left",
    ),
    "a reference that moves": (
        {"reference": "ema"},
        "reference slot ema needs stages or rounds; here there is 'frozen'",
    ),
    "a margin nobody gave": (
        {"objective": ("odpo", {"beta": 1.0, "alpha": 1.0}), "data": {"keep": ["margin"]}},
        r"data.keep=margin, but 16 of 16 pairs have none, pairs\.parquet\[0\] the first",
    ),
    "a margin the objective needs": (
        {"objective": ("odpo", {"beta": 1.0, "alpha": 1.0})},
        "odpo.* margin",
    ),
    "a margin of lists": (
        {"objective": ("rank_dpo", {"beta": 1.0}), "source": "lists", "data": {"keep": ["margin"]}},
        "data.keep=margin is for pairs; this is list data",
    ),
    "a margin the objective does not use": (
        {"source": "lists", "data": {"keep": ["margin"], "form": "pairs"}},
        "the data provides margin, which objective 'dpo' does not use",
    ),
    "flow of a diffusion model": (
        {"model": {"prediction": "flow"}},
        "model.prediction=flow, but the model's scheduler is a DDIMScheduler",
    ),
    "a target that is not there": (
        {"model": {"lora": LoraConfig(r=2, targets=["to_qq"])}},
        r"model.lora.targets: no module's name ends with 'to_qq' \(did you mean to_q\?\)",
    ),
    "no data": ({"source": "nothing"}, "no encoded data set"),
    "no model": ({"model": {"name_or_path": "/no/such"}}, "model.name_or_path=/no/such: no such folder"),
    "a wrong reduction": (
        {"likelihood": {"reduction": "median"}},
        "reduction 'median' is not one of mean, sum",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_users_mistake_is_one_line(material, tmp_path, case):
    changes, message = REFUSED[case]
    changes = dict(changes)
    if "source" in changes:
        changes["source"] = material / changes["source"]
    with pytest.raises(ValueError, match=message) as refused:
        make(configuration(material, **changes), tmp_path)
    assert "\n" not in str(refused.value)


def test_what_can_be_refused_without_the_weights_is(material, tmp_path, monkeypatch):
    """A model of gigabytes is not loaded to say that the data is for another one."""
    monkeypatch.setattr("triptych.modalities.diffusion.setup.load_denoiser", None)
    for case in (
        "data for another family",
        "a time the model does not have",
        "a form the objective does not take",
    ):
        test_a_users_mistake_is_one_line(material, tmp_path, case)


def test_some_pairs_without_a_margin_are_found_before_training(material, tmp_path):
    source = write_data(tmp_path / "some", margins=[0.5] * 9 + [None] + [0.5] * 6)
    objective = ("odpo", {"beta": 1.0, "alpha": 1.0})
    config = configuration(material, source=source, objective=objective, data={"keep": ["margin"]})
    with pytest.raises(ValueError, match=re.escape("1 of 16 pairs have none, pairs.parquet[9] the first")):
        make(config, tmp_path)


def test_the_adapter_starts_from_the_runs_seed(material, tmp_path):
    def adapter(seed):
        run = make(configuration(material, run={"seed": seed}), tmp_path)
        return {n: p.detach() for n, p in trained(run.policy).items() if "lora_A" in n}

    first, again, other = adapter(3), adapter(3), adapter(4)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
