"""The ELBO likelihood: published formulas, forward counts, invariances, on a real SDXL-class UNet."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from image_cases import draws, example, sdxl
from peft import LoraConfig
from tiny_diffusion import tiny_sd3, tiny_sd15

from triptych.modalities.diffusion.draws import NoiseConfig
from triptych.modalities.diffusion.likelihood import Collator, ElboLikelihood, effective_beta
from triptych.modalities.diffusion.policy import Conditions, Denoiser
from triptych.modalities.diffusion.schedule import schedule_of
from triptych.objectives import (
    LabelledLogLik,
    ListLogLik,
    LogLik,
    PairLogLik,
    Term,
    Terms,
    build,
    with_reference,
)
from triptych.training.loop import Task, referenced
from triptych.training.references import AdapterOff, Cached, FrozenCopy
from triptych.training.values import ValueStore


def collator(schedule, **options):
    return Collator(schedule=schedule, noise=NoiseConfig(**options))


def task_of(schedule, examples, objective, reference, **options):
    return Task(
        likelihood=ElboLikelihood(schedule=schedule),
        terms=Terms((Term(objective),)),
        references={"frozen": reference},
        collate=collator(schedule, **options),
        examples=examples,
        lengths=[1] * len(examples),
        sources=[e.source for e in examples],
    )


def released_diffusion_dpo(policy, schedule, batch, reference, beta):
    """The loss of the released script, line by line: mean errors, w - l, -0.5 beta (model - ref)."""
    (stack,) = batch.stacks
    noisy = schedule.add_noise(stack.latents, stack.noise, stack.times)
    own = Conditions(
        batch.conditions.embeds[stack.prompt], batch.conditions.pooled[stack.prompt], stack.time_ids
    )
    pred = policy([noisy], [stack.times], [own])[0]
    model_losses = (pred - stack.noise).pow(2).mean(dim=[1, 2, 3])
    model_losses_w, model_losses_l = model_losses[0::2], model_losses[1::2]
    with reference.active(policy) as module:
        ref_pred = module([noisy], [stack.times], [own])[0]
    ref_losses = (ref_pred - stack.noise).pow(2).mean(dim=[1, 2, 3])
    model_diff = model_losses_w - model_losses_l
    ref_diff = ref_losses[0::2] - ref_losses[1::2]
    return -F.logsigmoid(-0.5 * beta * (model_diff - ref_diff))


def test_dpo_on_the_elbo_is_diffusion_dpo_as_released():
    policy, schedule = sdxl(trained=True)
    examples = [example(i) for i in range(3)]
    task = task_of(schedule, examples, build("dpo", beta=5000.0), AdapterOff())
    batch = task.collate(examples, draws(3))
    loss, _ = task.terms(referenced(task, policy, batch))
    expected = released_diffusion_dpo(policy, schedule, batch, AdapterOff(), 5000.0)
    assert float((loss.detach() - math.log(2)).abs().min()) > 0.01, (
        "the adapter changes nothing, so nothing is tested"
    )
    torch.testing.assert_close(loss.float(), expected, rtol=2e-4, atol=2e-4)
    grads = []
    for value in (loss.sum(), expected.sum()):
        policy.zero_grad()
        value.backward()
        grads.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-6)


def test_at_step_zero_the_loss_is_ln_two_and_its_gradient_is_not_zero():
    policy, schedule = sdxl()
    examples = [example(i) for i in range(4)]
    task = task_of(schedule, examples, build("dpo", beta=5000.0), AdapterOff())
    loss, _ = task.terms(referenced(task, policy, task.collate(examples, draws(4))))
    assert float((loss.detach() - math.log(2)).abs().max()) < 1e-6
    loss.sum().backward()
    assert max(float(p.grad.abs().max()) for p in policy.parameters() if p.grad is not None) > 0


def test_without_its_adapter_the_policy_is_bitwise_the_base():
    policy, schedule = sdxl(trained=True)
    base, _ = sdxl(lora=False)
    likelihood = ElboLikelihood(schedule=schedule)
    batch = collator(schedule)([example(0)], draws(1))
    with AdapterOff().active(policy) as module:
        off = likelihood.predict(module, batch)
    with torch.no_grad():
        assert torch.equal(off[0], likelihood.predict(base, batch)[0])
        assert not torch.equal(off[0], likelihood.predict(policy, batch)[0])


def test_a_pair_costs_one_forward_of_two_and_none_of_a_cached_reference():
    policy, schedule = sdxl(trained=True)
    examples = [example(0)]
    live = task_of(schedule, examples, build("dpo", beta=5000.0), AdapterOff())
    batch = live.collate(examples, draws(1))
    policy.calls.clear()
    loss, _ = live.terms(referenced(live, policy, batch))
    assert policy.calls == [2, 2]
    store = ValueStore(None)
    cached = replace(live, references={"frozen": Cached(store, "base", AdapterOff())})
    cached.references["frozen"].fill(live.likelihood, policy, [batch], torch.device("cpu"))
    policy.calls.clear()
    again, _ = cached.terms(referenced(cached, policy, batch))
    assert policy.calls == [2]
    torch.testing.assert_close(again, loss, rtol=0, atol=1e-3)
    assert [len(v) for v in store.vectors(store.keys()).values()] == [1, 1]


def test_a_list_of_k_costs_one_forward_of_k():
    policy, schedule = sdxl()
    examples = [example(0, kind="list", num=4)]
    task = task_of(schedule, examples, build("rank_dpo", beta=5000.0), AdapterOff())
    policy.calls.clear()
    task.terms(referenced(task, policy, task.collate(examples, draws(1))))
    assert policy.calls == [4, 4]


def test_cached_values_are_those_of_the_very_time_and_noise():
    """Another epoch has other noise, so a table filled for one epoch has nothing for the next."""
    policy, schedule = sdxl()
    collate, examples = collator(schedule), [example(0)]
    first, second = (collate(examples, draws(1, epoch=e)) for e in (0, 1))
    assert not set(first.keys) & set(second.keys)
    assert first.keys == collate(examples, draws(1)).keys
    reference = Cached(ValueStore(None), "base")
    with pytest.raises(ValueError, match="2 candidates have no cached reference value"):
        reference(ElboLikelihood(schedule=schedule), policy, first)


def test_the_fused_difference_is_that_of_separate_terms():
    policy, schedule = sdxl(trained=True)
    likelihood = ElboLikelihood(schedule=schedule)
    batch = collator(schedule, num_draws=2)([example(i) for i in range(3)], draws(3))
    with torch.no_grad():
        with AdapterOff().active(policy) as module:
            theirs = likelihood.terms(module, batch)
            said = likelihood.predict(module, batch)
        mine, other = likelihood.beside(policy, said, batch)
        torch.testing.assert_close(other, theirs)
        torch.testing.assert_close(mine, likelihood.terms(policy, batch), rtol=1e-6, atol=1e-7)
    assert mine.shape == (6, 2)


def test_contexts_of_different_sizes_share_a_batch_and_keep_their_values():
    """Two latent shapes are two stacks of one call; nothing of one row depends on the others."""
    policy, schedule = sdxl(trained=True)
    examples = [example(0), example(1, height=4), example(2), example(3, height=4)]
    likelihood, collate = ElboLikelihood(schedule=schedule), collator(schedule)
    with torch.no_grad():
        whole = likelihood.terms(policy, collate(examples, draws(4)))
        alone = [likelihood.terms(policy, collate([e], [d])) for e, d in zip(examples, draws(4), strict=True)]
    assert len(collate(examples, draws(4)).stacks) == 2
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_ragged_lists_are_masked_and_padding_gets_no_gradient():
    policy, schedule = sdxl(trained=True)
    examples = [example(0, kind="list", num=4), example(1, kind="list", num=2)]
    task = task_of(schedule, examples, build("rank_dpo", beta=100.0), AdapterOff())
    batch = task.collate(examples, draws(2))
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    losses = task.terms(referenced(task, policy, batch))[0]
    for i, e in enumerate(examples):
        only = task.collate([e], [draws(2)[i]])
        alone = task.terms(referenced(task, policy, only))[0]
        torch.testing.assert_close(alone[0], losses[i], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "num", "made"),
    [
        ("pair", 2, PairLogLik),
        ("list", 3, ListLogLik),
        ("labelled", 1, LabelledLogLik),
        ("single", 1, LogLik),
    ],
)
def test_each_kind_makes_its_input(kind, num, made):
    policy, schedule = sdxl()
    batch = collator(schedule)([example(i, kind=kind, num=num) for i in range(2)], draws(2))
    found = ElboLikelihood(schedule=schedule)(policy, batch)
    assert type(found) is made
    assert batch.counts.tolist() == [1.0] * (2 * num)


def test_the_baseline_of_labelled_images_is_their_own_mean_log_ratio_at_least_zero():
    policy, schedule = sdxl()
    examples = [example(i, kind="labelled", num=1, relevance=(float(i % 2),)) for i in range(4)]
    likelihood, batch = ElboLikelihood(schedule=schedule), collator(schedule)(examples, draws(4))
    own = likelihood(policy, batch)
    assert own.desirable.tolist() == [False, True, False, True]
    lower = with_reference(own, likelihood.assemble(own.loglik.logp.detach().unsqueeze(1) - 2.0, batch))
    assert lower.baseline.item() == pytest.approx(2.0, rel=1e-5)
    higher = with_reference(own, likelihood.assemble(own.loglik.logp.detach().unsqueeze(1) + 2.0, batch))
    assert higher.baseline.item() == 0.0


def test_the_sum_weighs_an_image_by_its_size():
    policy, schedule = sdxl()
    batch = collator(schedule)([example(0)], draws(1))
    with torch.no_grad():
        mean = ElboLikelihood(schedule=schedule).terms(policy, batch)
        total = ElboLikelihood(schedule=schedule, reduction="sum").terms(policy, batch)
    torch.testing.assert_close(total, 256 * mean)
    assert effective_beta(5000.0, "mean", (4, 128, 128)) == (5000.0, pytest.approx(0.0763, abs=1e-4))
    assert effective_beta(0.305, "sum", (4, 64, 64)) == (pytest.approx(4997, abs=1), 0.305)


def test_a_prompt_is_dropped_for_all_candidates_of_a_context_alike():
    _, schedule = sdxl()
    empty = (torch.zeros(7, 40), torch.zeros(24))
    collate = Collator(schedule=schedule, empty=empty, dropout=0.5)
    batch = collate([example(i) for i in range(200)], draws(200))
    dropped = (batch.conditions.embeds == 0).flatten(1).all(1)
    assert 70 < int(dropped.sum()) < 130
    assert torch.equal(dropped, (batch.conditions.pooled == 0).all(1))
    (stack,) = batch.stacks
    assert torch.equal(stack.prompt[0::2], stack.prompt[1::2])
    plain = collator(schedule)([example(i) for i in range(200)], draws(200))
    same = [a == b for a, b in zip(batch.keys, plain.keys, strict=True)]
    assert [not s for s in same[0::2]] == dropped.tolist(), "a dropped prompt has reference values of its own"


def test_the_posterior_is_sampled_where_its_variance_was_kept():
    _, schedule = sdxl()
    plain = example(0)
    wide = example(0, logvar=torch.full((2, 4, 8, 8), 2 * math.log(0.5)))
    collate = collator(schedule)
    mean, drawn = (collate([e], draws(1)).stacks[0].latents for e in (plain, wide))
    again = collate([wide], draws(1)).stacks[0].latents
    assert torch.equal(drawn, again)
    assert float((drawn - mean).std()) == pytest.approx(0.5, rel=0.1)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_other_families_go_through_the_same_likelihood(family):
    pipeline = tiny_sd15() if family == "sd15" else tiny_sd3()
    model = pipeline.unet if family == "sd15" else pipeline.transformer
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    policy, schedule = Denoiser(model), schedule_of(pipeline.scheduler)
    config = model.config
    width = config.cross_attention_dim if family == "sd15" else config.joint_attention_dim
    pooled = None if family == "sd15" else torch.randn(config.pooled_projection_dim)
    examples = [
        example(
            i,
            latents=torch.randn(2, config.in_channels, 8, 8),
            embeds=torch.randn(7, width),
            pooled=pooled,
            time_ids=None,
        )
        for i in range(2)
    ]
    task = task_of(schedule, examples, build("dpo", beta=500.0), AdapterOff())
    batch = task.collate(examples, draws(2))
    policy.calls.clear()
    loss, _ = task.terms(referenced(task, policy, batch))
    loss.sum().backward()
    assert policy.calls == [4, 4]
    assert float((loss.detach() - math.log(2)).abs().max()) > 1e-4
    assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in policy.parameters())


def test_a_frozen_copy_is_the_same_reference_as_the_adapter_off():
    policy, schedule = sdxl()
    copy = FrozenCopy.of(policy)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3)
    examples = [example(0)]
    losses = []
    for reference in (copy, AdapterOff()):
        task = task_of(schedule, examples, build("dpo", beta=5000.0), reference)
        losses.append(task.terms(referenced(task, policy, task.collate(examples, draws(1))))[0])
    torch.testing.assert_close(losses[0], losses[1])
    assert float((losses[0].detach() - math.log(2)).abs()) > 1e-3


def test_the_reference_leaves_the_policy_as_it_was_also_on_an_exception():
    policy, _ = sdxl()
    before = {n: p.requires_grad for n, p in policy.named_parameters()}
    for fails in (False, True):
        try:
            with AdapterOff().active(policy):
                assert not policy.training
                if fails:
                    raise RuntimeError("in the middle")
        except RuntimeError:
            pass
        assert {n: p.requires_grad for n, p in policy.named_parameters()} == before
        assert policy.adapters.active_adapters == ["default"]
        enabled = [m.disable_adapters for m in policy.modules() if hasattr(m, "lora_A")]
        assert enabled
        assert not any(enabled)
