"""Training image scorers: losses by hand, shared noise, what a step costs, and accuracy by time."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import scorer_material
import torch
from accelerate import Accelerator
from image_files import Errors, encoded, write_lines
from PIL import Image
from tiny_runs import no_bar
from torch import nn
from transformers import CLIPImageProcessor, CLIPModel

from triptych.modalities.diffusion.draws import NoiseConfig
from triptych.modalities.diffusion.image_scoring import build_scorer
from triptych.modalities.diffusion.reward_models import load_reward
from triptych.modalities.diffusion.rollout import decoded
from triptych.modalities.diffusion.scorer_batches import ClipPolicy, Seen, noisy_stacks
from triptych.modalities.diffusion.scorer_config import (
    EncodedConfig,
    PictureConfig,
    ScorerConfig,
    ScorerTrainingConfig,
    StepModelConfig,
    bradley_terry,
)
from triptych.modalities.diffusion.scorer_data import LatentPairs, PictureStore, load_pictures, prompt_weights
from triptych.modalities.diffusion.scorer_outcome import EVAL_SEED, accuracy_by_time, curve, parts_of
from triptych.modalities.diffusion.scorer_setup import set_up
from triptych.modalities.diffusion.step_scorer import clip_pixels
from triptych.objectives import LogLik, PairLogLik
from triptych.training.config import OptimConfig, RunConfig
from triptych.training.loop import make_learner, train_step
from triptych.training.meters import Meter
from triptych.training.order import Draw, key
from triptych.training.plugs import PlugConfig
from triptych.training.quarantine import DataError
from triptych.training.stats import Estimate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return scorer_material.write_material(tmp_path_factory.mktemp("scorers"))


def config(material, out, kind, *, family="sd15", data=None, noise=None, eval_share=0.3, **scorer):
    groups = {
        "clip": {"pictures": PictureConfig(source=str(material / "pictures"), eval_share=eval_share)},
        "step": {},
        "latent": {},
    }[kind]
    if kind != "clip":
        groups = {
            "model": StepModelConfig(name_or_path=str(material / family)),
            "data": EncodedConfig(source=str(data or material / f"pairs-{family}"), eval_share=eval_share),
            "noise": noise,
        }
    clip = {} if kind == "latent" else {"clip": str(material / "clip")}
    return ScorerTrainingConfig(
        scorer=ScorerConfig(type=kind, **clip, **{"time_bins": 3} | scorer),
        optim=OptimConfig(lr=1e-3, batch_size=8, micro_batch_size=4),
        run=RunConfig(output_dir=str(out)),
        **groups,
    )


def made(material, out, kind, *, report=lambda line: None, quarantine=None, **options):
    settings = config(material, out, kind, **options)
    return set_up(
        settings,
        settings.chosen_objective().terms(),
        device=CPU,
        cache_dir=out / "cache",
        root=out,
        quarantine=quarantine or Errors(),
        report=report,
        bar=no_bar,
    )


def draws(num, *, first=0):
    return [Draw(i, 0, 1000 + i, i) for i in range(first, first + num)]


def batch_of(task, num, *, first=0):
    at = draws(num, first=first)
    return task.collate([task.examples[d.index] for d in at], at)


def count_calls(module):
    """Sizes of the batches that a module is called with."""
    sizes = []
    module.register_forward_hook(lambda m, args, out: sizes.append(len(out)))
    return sizes


def pair_of(chosen, rejected, strength):
    sides = (LogLik(torch.tensor(s), torch.ones(len(s))) for s in (chosen, rejected))
    return PairLogLik(*sides, strength=torch.tensor(strength))


def test_the_loss_is_the_published_cross_entropy_less_its_constant_at_ties():
    """-log sigmoid(2) = 0.126928, -log sigmoid(-2) = 2.126928; a tie is their mean, less log 2 = 0.433781."""
    pair = pair_of([3.0, 3.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.5, 0.5])
    loss, _ = bradley_terry().terms()({"none": pair})
    assert loss.tolist() == pytest.approx([0.126928, 1.126928, math.log(2)], abs=1e-6)
    logits = torch.stack([pair.chosen.logp, pair.rejected.logp], -1)
    labels = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    published = nn.functional.cross_entropy(logits, labels, reduction="none")
    published = published + math.log(0.5) * (labels[:, 0] == labels[:, 1])
    assert published.tolist() == pytest.approx([0.126928, 0.433781, 0.0], abs=1e-6)
    ties = (pair.strength == 0.5).float()
    torch.testing.assert_close(loss - math.log(2) * ties, published)


def test_a_pairs_weight_is_one_over_the_pairs_of_its_prompt_with_mean_one():
    weights = prompt_weights(["a", "a", "b", "a"])
    assert weights.tolist() == pytest.approx([2 / 3, 2 / 3, 2.0, 2 / 3])
    losses = torch.tensor([1.0, 2.0, 10.0, 3.0], dtype=torch.float64)
    # The published sum of losses times weights over the sum of weights; each prompt's mean counts the same.
    published = (losses * torch.tensor([1 / 3, 1 / 3, 1.0, 1 / 3])).sum() / 2
    assert float((losses * torch.from_numpy(weights)).mean()) == pytest.approx(float(published))
    assert float(published) == pytest.approx((2.0 + 10.0) / 2)


@pytest.mark.parametrize("weigh", ["prompts", "pairs"])
@pytest.mark.parametrize("kind", ["clip", "latent"])
def test_losses_are_weighted_so_that_prompts_count_the_same(material, tmp_path, kind, weigh):
    task = made(material, tmp_path, kind, weigh=weigh, eval_share=0.0).reward.task
    num = len(task.examples)
    batch = batch_of(task, num)
    folded = task.fold(torch.ones(num), batch)
    assert float(folded.mean()) == pytest.approx(1.0)
    # 23 or 24 pairs, three of them of one prompt.
    prompts = {"clip": num - 2, "latent": 22}[kind]
    repeated = [p.prompt == "the first cat" for p in task.examples]
    assert sum(repeated) == 3
    expected = [num / prompts * (1 / 3 if again else 1.0) for again in repeated]
    assert folded.tolist() == pytest.approx(expected if weigh == "prompts" else [1.0] * num)


def test_an_optimizer_step_has_the_weighted_loss_and_its_gradient(material, tmp_path):
    settings = config(material, tmp_path, "clip", eval_share=0.0)
    run = made(material, tmp_path, "clip", eval_share=0.0).reward
    num = len(run.task.examples)
    optim = replace(settings.optim, batch_size=num, micro_batch_size=5)
    pair = run.task.likelihood(run.policy, batch_of(run.task, num))
    target = torch.tensor([p.sample.strength for p in run.task.examples])
    gap = pair.chosen.logp - pair.rejected.logp
    own = -(target * nn.functional.logsigmoid(gap) + (1 - target) * nn.functional.logsigmoid(-gap))
    weights = torch.from_numpy(prompt_weights([p.prompt for p in run.task.examples])).float()
    expected = (own * weights).mean()
    expected.backward()
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in run.policy.parameters()))
    run.policy.zero_grad()
    accelerator, meter = Accelerator(cpu=True), Meter(CPU)
    learner = make_learner(run.policy, optim, accelerator)
    found = train_step(run.task, learner, optim, accelerator, seed=0, num_steps=1, meter=meter)
    assert float(found) == pytest.approx(norm, rel=1e-4)
    logged = meter.read(lambda t: t)
    assert logged["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert logged["loss"] != pytest.approx(own.mean().item(), rel=1e-3)
    wins = 0.5 * (torch.sign(gap.detach()) + 1)
    assert logged["rewards/accuracies"] == pytest.approx(float((wins * weights).mean()), abs=1e-6)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_step_costs_one_evaluation_and_one_decoding_a_micro_batch(material, tmp_path, family):
    run = made(material, tmp_path, "step", family=family)
    task, sight = run.reward.task, run.reward.task.likelihood.sight
    decodings, looks = count_calls(sight.vae.vae.decoder), count_calls(run.reward.policy)
    batch = batch_of(task, 4)
    task.likelihood(run.reward.policy, batch)
    # Two sides and the two halves of guidance in one batch.
    assert sight.denoiser.calls == [4 * 2 * 2]
    assert decodings == [4 * 2]
    assert looks == [4 * 2]
    frozen = [*sight.denoiser.parameters(), *sight.vae.vae.parameters()]
    assert not any(p.requires_grad for p in frozen)
    own = {id(p) for p in run.reward.policy.parameters()}
    assert own.isdisjoint(map(id, frozen))


def test_without_guidance_a_step_costs_half(material, tmp_path):
    run = made(material, tmp_path, "step", guidance=1.0)
    run.reward.task.likelihood(run.reward.policy, batch_of(run.reward.task, 3))
    assert run.reward.task.likelihood.sight.denoiser.calls == [3 * 2]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_what_a_step_sees_is_what_the_published_code_shows_side_by_side(material, tmp_path, family):
    """Each side on its own: e = e_empty + 5 (e_prompt - e_empty), x_0 = (x_t - sigma e) / alpha, decoded."""
    run = made(material, tmp_path, "step", family=family)
    task, sight = run.reward.task, run.reward.task.likelihood.sight
    batch = batch_of(task, 3)
    seen = sight(batch.inputs)
    unet, schedule = sight.denoiser.model, sight.likelihood.schedule
    (stack,) = batch.inputs.latents.stacks
    for row in range(6):
        # Both sides of a pair have its time and its noise.
        assert float(stack.times[row]) == float(stack.times[row - row % 2])
        assert torch.equal(stack.noise[row], stack.noise[row - row % 2])
        time = stack.times[row : row + 1]
        alpha = schedule.alphas_cumprod[int(time)].sqrt().float()
        sigma = (1 - alpha**2).sqrt()
        noisy = (alpha * stack.latents[row] + sigma * stack.noise[row])[None]
        own = batch.inputs.latents.conditions.rows(torch.tensor([row // 2]))
        found = []
        for given in (sight.empty, own):
            added = None
            if family == "sdxl":
                added = {"text_embeds": given.pooled, "time_ids": stack.time_ids[row : row + 1]}
            with torch.no_grad():
                out = unet(noisy, time, encoder_hidden_states=given.embeds, added_cond_kwargs=added)
            found.append(out.sample)
        guided = found[0] + 5.0 * (found[1] - found[0])
        clean = (noisy - sigma * guided) / alpha
        expected = clip_pixels(decoded(sight.vae, clean), scorer_material.SIDE)
        torch.testing.assert_close(seen.pixels[row : row + 1], expected, rtol=1e-3, atol=2e-4)
    assert not seen.pixels.requires_grad
    assert seen.times.tolist() == stack.times.tolist()
    assert seen.texts == tuple(p.prompt for p in task.examples[:3] for _ in range(2))


def test_a_latent_reward_costs_one_evaluation_and_decodes_nothing(material, tmp_path):
    run = made(material, tmp_path, "latent", family="sdxl")
    entries = []
    run.reward.policy.scorer.unet.conv_in.register_forward_hook(lambda m, args, out: entries.append(len(out)))
    scores = run.reward.task.likelihood.terms(run.reward.policy, batch_of(run.reward.task, 4))
    assert entries == [4 * 2 * 2]
    assert scores.shape == (8, 1)
    assert not hasattr(run.reward.task.likelihood, "sight")


@pytest.mark.parametrize("kind", ["step", "latent"])
def test_scores_depend_on_the_draws_seed_and_not_on_the_cut(material, tmp_path, kind):
    run = made(material, tmp_path, kind)
    task, policy = run.reward.task, run.reward.policy.eval()
    with torch.no_grad():
        whole = task.likelihood.terms(policy, batch_of(task, 4))
        parts = [task.likelihood.terms(policy, batch_of(task, 2, first=i)) for i in (0, 2)]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-3, atol=1e-4)
        at = [replace(d, seed=d.seed + 7) for d in draws(4)]
        other = task.likelihood.terms(policy, task.collate(task.examples[:4], at))
    assert not torch.allclose(other, whole)


@pytest.mark.parametrize("kind", ["step", "latent"])
def test_pairs_of_several_shapes_keep_their_scores(material, tmp_path, kind):
    data = scorer_material.write_encoded_pairs(tmp_path / "data", "sdxl", 6, widths=(8, 12))
    run = made(material, tmp_path, kind, family="sdxl", data=data, eval_share=0.0)
    task, policy = run.reward.task, run.reward.policy.eval()
    whole = batch_of(task, 4)
    assert len(whole.inputs.latents.stacks) == 2
    with torch.no_grad():
        scores = task.likelihood.terms(policy, whole)
        for i in range(4):
            own = task.likelihood.terms(policy, batch_of(task, 1, first=i))
            torch.testing.assert_close(scores[2 * i : 2 * i + 2], own, rtol=1e-3, atol=1e-4)
    if kind == "step":
        # One evaluation a shape, then one a pair.
        assert task.likelihood.sight.denoiser.calls == [8, 8, 4, 4, 4, 4]


def test_the_gradient_reaches_the_scorer_alone(material, tmp_path):
    run = made(material, tmp_path, "step")
    task, sight = run.reward.task, run.reward.task.likelihood.sight
    before = copy.deepcopy(sight.denoiser.state_dict())
    loss, _ = task.terms({"none": task.likelihood(run.reward.policy, batch_of(task, 4))})
    loss.sum().backward()
    assert all(p.grad is None for p in sight.denoiser.parameters())
    assert all(torch.equal(v, before[k]) for k, v in sight.denoiser.state_dict().items())
    names = {n for n, p in run.reward.policy.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"scorer.clip.logit_scale", "scorer.layers.0.linear.weight", "scorer.last.linear.bias"} <= names


def test_held_out_ties_are_left_out_and_the_others_learnt(material, tmp_path):
    for kind in ("clip", "latent"):
        lines = []
        run = made(material, tmp_path / kind, kind, eval_share=0.5, report=lines.append)
        train, held_out = run.reward.task.examples, run.reward.eval_task.examples
        assert {p.sample.strength for p in held_out} == {1.0}
        assert len(run.reward.clusters) == len(held_out)
        assert run.reward.clusters == tuple(p.prompt for p in held_out)
        assert not {p.prompt for p in train} & {p.prompt for p in held_out}
    every = made(material, tmp_path, "latent", eval_share=0.0).reward
    assert sorted(p.sample.strength for p in every.task.examples)[:3] == [0.5, 0.5, 1.0]
    assert every.eval_task is None


def test_the_same_prompts_are_held_out_of_pictures_and_of_latents(material, tmp_path):
    found = [made(material, tmp_path / k, k, eval_share=0.5).reward.clusters for k in ("clip", "latent")]
    # One picture is broken.
    assert set(found[0]) <= set(found[1])
    assert len(set(found[1])) - len(set(found[0])) <= 1


def test_ties_that_the_objective_cannot_use_are_refused(material, tmp_path):
    settings = config(material, tmp_path, "latent")
    for name, data, message in (
        ("reward_bt", settings.data, "the data provides strength, which objective 'reward_bt' does not use"),
        ("dpo", settings.data, "a scorer has no reference"),
    ):
        objective = replace(bradley_terry(), name=name, options={}, reference="none")
        if name == "dpo":
            objective = replace(objective, options={"beta": 1.0}, reference="frozen")
        with pytest.raises(ValueError, match=message):
            set_up(
                replace(settings, data=data),
                objective.terms(),
                device=CPU,
                cache_dir=tmp_path,
                root=tmp_path,
                quarantine=Errors(),
                report=lambda line: None,
                bar=no_bar,
            )


def store_of(material, folder):
    from transformers import AutoImageProcessor

    return PictureStore.of(folder, AutoImageProcessor.from_pretrained(material / "clip", backend="pil"))


def read(material, folder, tmp_path, errors=None, **options):
    settings = PictureConfig(source=str(folder), **{"eval_share": 0.0} | options)
    return load_pictures(
        settings,
        store_of(material, tmp_path),
        seed=0,
        quarantine=errors or Errors(),
        report=lambda line: None,
        bar=no_bar,
    )


def test_stored_pictures_are_what_the_processor_makes_of_the_files(material, tmp_path):
    data = read(material, material / "pictures", tmp_path)
    store = store_of(material, tmp_path)
    processor = store.processor
    for pair in data.train[:3]:
        number = int(pair.source.rsplit(":", 1)[-1]) - 1
        images = [
            Image.open(material / "pictures" / f"{number}-{side}.png").convert("RGB")
            for side in ("light", "dark")
        ]
        expected = processor(images=images, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(store.pixels(pair.names), expected, rtol=0, atol=1e-6)


def test_a_broken_picture_is_named_and_its_pair_left_out(material, tmp_path):
    errors = Errors()
    data = read(material, material / "pictures", tmp_path, errors)
    assert len(data.train) == 23
    assert errors.told() == [("metadata.jsonl:22", "rejected", "is a broken image")]
    # Another start finds the pictures, and the same bad one.
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")}
    assert len(before) == 47
    again = Errors()
    assert read(material, material / "pictures", tmp_path, again).fingerprint == data.fingerprint
    assert again.told() == errors.told()
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.png")} == before
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_list_makes_its_pairs_with_the_gap_of_grades_as_margin(material, tmp_path):
    folder = tmp_path / "lists"
    folder.mkdir()
    for k in range(4):
        (folder / f"{k}.png").write_bytes(encoded(scorer_material.picture(k % 2, k), "PNG"))
    (folder / "one.png").write_bytes(encoded(scorer_material.picture(True, 9), "PNG"))
    names = [f"{k}.png" for k in range(4)]
    rows = [
        {"prompt": "a cat", "images": names, "relevance": [0.5, 2.0, 0.5, 0.0]},
        {"prompt": "a dog", "image": "one.png"},
    ]
    write_lines(folder / "metadata.jsonl", rows)
    errors = Errors()
    data = read(material, folder, tmp_path / "a", errors, keep=["margin"])
    found = {(p.sample.id.split("[")[1], p.sample.margin) for p in data.train}
    assert found == {("1,0]", 1.5), ("0,3]", 0.5), ("1,2]", 1.5), ("1,3]", 2.0), ("2,3]", 0.5)}
    assert [reason for _, _, reason in errors.told()] == ["is a single picture"]
    assert {p.sample.strength for p in data.train} == {1.0}
    few = read(material, folder, tmp_path / "b", min_margin=1.0)
    assert len(few.train) == 3
    assert read(material, folder, tmp_path / "c", ties="drop").train[0].sample.strength is None


def test_prompts_of_the_evaluation_split_are_not_learnt_from(material, tmp_path):
    folder = tmp_path / "splits"
    for split, num in (("train", 8), ("validation_unique", 4)):
        scorer_material.write_pictures(folder / split, num, ties=1, spoilt=0)
    data = read(material, folder, tmp_path, eval_split="validation_unique", max_eval=2)
    assert {p.prompt for p in data.train} == {f"cat number {i}" for i in range(4, 8)}
    assert len(data.held_out) == 2
    assert {p.sample.strength for p in data.held_out} == {1.0}
    folder = tmp_path / "same"
    for split in ("train", "validation_unique"):
        scorer_material.write_pictures(folder / split, 4, ties=0, spoilt=0)
    with pytest.raises(DataError, match="has nothing left to learn from"):
        read(material, folder, tmp_path, eval_split="validation_unique")


def test_parts_of_the_noise_cover_its_range_once():
    parts = parts_of(NoiseConfig(low=0.1, high=0.9), 4)
    assert [(p.low, p.high) for p in parts] == [
        (pytest.approx(a), pytest.approx(b)) for a, b in ((0.1, 0.3), (0.3, 0.5), (0.5, 0.7), (0.7, 0.9))
    ]
    assert parts[-1].high == 0.9
    assert len(parts_of(NoiseConfig(values=[1, 500]), 8)) == 2


class RightWhenEarly(nn.Module):
    """Light latents score higher before time 500, and lower from there on."""

    def forward(self, noised):
        (stack,) = noised.latents.stacks
        sign = torch.where(stack.times < 500, 1.0, -1.0)
        return (sign * stack.latents.mean((1, 2, 3))).unsqueeze(-1)


def test_accuracy_is_told_apart_by_time(material, tmp_path):
    run = made(material, tmp_path, "latent", eval_share=0.5, time_bins=4)
    held_out = run.reward.eval_task.examples
    for one, (low, high) in zip(run.bins, ((0, 249), (250, 499), (500, 749), (750, 999)), strict=True):
        assert low <= float(one.times.min()) <= float(one.times.max()) <= high
        at = [Draw(i, -1, key("eval", EVAL_SEED, i)) for i in range(len(held_out))]
        (stack,) = one.task.collate(held_out[:], at).inputs.latents.stacks
        assert stack.times[::2].tolist() == one.times.tolist()
    accuracies, gaps = accuracy_by_time(
        run.bins,
        RightWhenEarly(),
        Accelerator(cpu=True),
        clusters=run.reward.clusters,
        micro_batch_size=3,
    )
    assert [a.mean for a in accuracies] == [1.0, 1.0, 0.0, 0.0]
    assert gaps[0] > 1.5 > -1.5 > gaps[-1]
    assert accuracies[0].n == len(set(run.reward.clusters))


def test_the_curve_is_drawn_where_an_interval_is_not_bounded():
    picture = curve([100.0, 900.0], [Estimate(0.9, 0.8, 1.0, 9), Estimate(0.6, -math.inf, math.inf, 1)])
    assert picture.startswith(b"\x89PNG")


def test_a_distilled_models_few_times_are_the_bins(material, tmp_path):
    run = made(material, tmp_path, "latent", noise=NoiseConfig(values=[249, 749]))
    assert [set(b.times.tolist()) for b in run.bins] == [{249.0}, {749.0}]


def test_an_exported_clip_scores_pictures_as_it_was_trained(material, tmp_path):
    run = made(material, tmp_path, "clip")
    with torch.no_grad():
        run.reward.policy.scorer.logit_scale.add_(0.5)
    run.reward.export(tmp_path / "model", None)
    assert not [p for p in (tmp_path / "model").iterdir() if p.suffix in (".bin", ".pt", ".pkl")]
    options = {"name_or_path": str(tmp_path / "model"), "device": "cpu"}
    scorer = build_scorer(PlugConfig(name="pickscore", options=options))
    pair = run.reward.task.examples[0]
    number = int(pair.source.rsplit(":", 1)[-1]) - 1
    images = [
        Image.open(material / "pictures" / f"{number}-{side}.png").convert("RGB")
        for side in ("light", "dark")
    ]
    batch = run.reward.task.collate([pair], [])
    with torch.no_grad():
        expected = run.reward.task.likelihood.terms(run.reward.policy.eval(), batch)[:, 0]
    torch.testing.assert_close(scorer(images, [pair.prompt] * 2), expected, rtol=1e-4, atol=1e-4)


def test_the_clip_score_is_transformers_own(material):
    clip = CLIPModel.from_pretrained(material / "clip").eval()
    words = scorer_material.tokenizer()
    pixels = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = ("a red cat", "a dog", "a red cat")
    with torch.no_grad():
        found = ClipPolicy(clip, words)(Seen(pixels=pixels, texts=texts, weights=torch.ones(1)))
        tokens = words(list(texts), return_tensors="pt", padding=True)
        logits = clip(pixel_values=pixels, **tokens).logits_per_image
    torch.testing.assert_close(found[:, 0], logits.diagonal(), rtol=1e-5, atol=1e-5)
    assert CLIPImageProcessor.from_pretrained(material / "clip").crop_size.height == scorer_material.SIDE


@pytest.mark.parametrize("kind", ["step", "latent"])
def test_an_exported_scorer_of_steps_judges_as_it_was_trained(material, tmp_path, kind):
    run = made(material, tmp_path, kind, family="sdxl")
    policy, task = run.reward.policy.eval(), run.reward.task
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02)
    run.reward.export(tmp_path / "model", None)
    reward = load_reward(kind, tmp_path / "model", device=CPU)
    batch = batch_of(task, 3)
    noised = batch.inputs
    with torch.no_grad():
        expected = task.likelihood.terms(policy, batch)[:, 0]
    (stack,) = noised.latents.stacks
    if kind == "step":
        sight = task.likelihood.sight
        ((x, times, own),) = noisy_stacks(noised.latents, sight.likelihood.schedule)
        (prediction,) = sight.likelihood.predict(sight.denoiser, [x], [times], [own], sight.empty)
        shown = decoded(sight.vae, sight.likelihood.schedule.clean_and_noise(prediction, x, times)[0])
        found = reward(shown, noised.texts, times, own, None)
    else:
        ((x, times, own),) = noisy_stacks(noised.latents, policy.schedule)
        found = reward(x, noised.texts, times, own, policy.empty)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(stack.times) == 6


def test_slices_of_latent_pairs_are_their_items(material, tmp_path):
    task = made(material, tmp_path, "latent", eval_share=0.0).reward.task
    pairs = task.examples
    assert isinstance(pairs, LatentPairs)
    both = pairs[1:3]
    assert [p.example.id for p in both] == [pairs[1].example.id, pairs[2].example.id]
    assert both[0].weight == pairs[1].weight != 1.0
    assert both[0].sample.grades == (1.0, 0.0)


REFUSED = [
    ({"type": "clip"}, {}, "scorer.type=clip needs pictures"),
    ({"type": "clip", "clip": "x"}, {"model": StepModelConfig(name_or_path="x")}, "does not use model"),
    ({"type": "latent", "clip": "x"}, {}, "scorer.type=latent does not use scorer.clip; it uses data"),
    ({"type": "step", "clip": "x", "multi_scale": True}, {}, "does not use scorer.multi_scale"),
    ({"type": "step"}, {}, "scorer.type=step needs scorer.clip"),
    ({"type": "latent", "guidance": 0.5}, {}, "scorer.guidance=0.5 must be at least 1"),
    ({"type": "latent", "time_bins": 0}, {}, "scorer.time_bins=0 must be at least 1"),
    (
        {"type": "latent"},
        {"model": StepModelConfig(name_or_path="x", vae_dtype="float32")},
        "scorer.type=latent does not use model.vae_dtype",
    ),
]


@pytest.mark.parametrize(("scorer", "groups", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_a_setting_that_means_nothing_is_refused(scorer, groups, message):
    rest = {"model": StepModelConfig(name_or_path="x"), "data": EncodedConfig(source="x")}
    if scorer["type"] == "clip":
        rest = {}
    with pytest.raises(ValueError, match=message):
        ScorerTrainingConfig(
            scorer=ScorerConfig(**scorer),
            optim=OptimConfig(lr=1e-3, batch_size=8, micro_batch_size=4),
            run=RunConfig(output_dir="x"),
            **rest | groups,
        )


@pytest.mark.parametrize(("name", "value"), [("shared", False), ("num_draws", 2)])
def test_pairs_without_one_shared_noise_are_refused(material, tmp_path, name, value):
    with pytest.raises(ValueError, match=f"noise.{name}=.*: pairs are compared at one time with one noise"):
        made(material, tmp_path, "step", noise=NoiseConfig(**{name: value}))


def test_x0_that_does_not_exist_at_some_time_is_refused(material, tmp_path, monkeypatch):
    from triptych.modalities.diffusion import scorer_setup

    real = scorer_setup.schedule_of

    def no_signal_left(scheduler, *, prediction):
        found = real(scheduler, prediction=prediction)
        return replace(
            found, alphas_cumprod=found.alphas_cumprod.clone().index_fill(0, torch.tensor([999]), 0)
        )

    monkeypatch.setattr(scorer_setup, "schedule_of", no_signal_left)
    with pytest.raises(ValueError, match="space=x0 is infinite"):
        made(material, tmp_path, "step")
    assert made(material, tmp_path, "latent").reward.task is not None


@pytest.mark.parametrize("kind", ["step", "latent"])
def test_new_weights_come_from_the_runs_seed(material, tmp_path, kind):
    hashes = []
    for state in (1, 2):
        torch.manual_seed(state)
        hashes.append(made(material, tmp_path, kind).reward.base_hash)
    assert hashes[0] == hashes[1]


def test_data_of_another_family_is_refused(material, tmp_path):
    settings = config(material, tmp_path, "latent")
    other = replace(settings.model, name_or_path=str(material / "sdxl"))
    with pytest.raises(ValueError, match="encoded for a model of the kind sd15"):
        set_up(
            replace(settings, model=other),
            settings.chosen_objective().terms(),
            device=CPU,
            cache_dir=tmp_path,
            root=tmp_path,
            quarantine=Errors(),
            report=lambda line: None,
            bar=no_bar,
        )


def test_the_store_is_of_one_cut(material, tmp_path):
    processor = store_of(material, tmp_path).processor
    other = SimpleNamespace(size=1, crop_size=1, resample=3, do_center_crop=True)
    assert PictureStore.of(tmp_path, other).folder != PictureStore.of(tmp_path, processor).folder
