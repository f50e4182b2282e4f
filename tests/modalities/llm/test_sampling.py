import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from tiny import FAMILIES, causal_lm, example

from triptych.modalities.llm import sampling
from triptych.modalities.llm.model import LoraSettings, ModelConfig, adapt
from triptych.modalities.llm.policy import TokenPolicy
from triptych.modalities.llm.rows import RowCost, make_rows
from triptych.modalities.llm.sampling import Blend, Drawing, draw
from triptych.modalities.llm.sampling_cache import cache_argument
from triptych.training.references import AdapterOff, FrozenCopy

NUMBERS = np.random.default_rng(0)
# Of many lengths, some longer than the windows; with a third of the vocabulary ending a sequence, rows end
# at all times.
PROMPTS = [NUMBERS.integers(1, 320, n).astype(np.int32) for n in (9, 3, 14, 1, 3)]
SEEDS = [11, 12, 13, 14, 15]
ENDS = tuple(range(0, 320, 12))
SETTINGS = Drawing(max_new_tokens=8)


def drawn(policy, prompts=PROMPTS, num=3, settings=SETTINGS, *, seeds=SEEDS, ends=ENDS, mix=None):
    return draw(policy, prompts, num, settings, seeds=seeds, eos_ids=ends, pad_id=0, mix=mix)


def ids(found):
    return [[d.ids.tolist() for d in candidates] for candidates in found]


def policy_of(family="llama", *, seed=3, temperature=1.0, **changes):
    return TokenPolicy(causal_lm(family, seed=seed, **changes), temperature=temperature)


def logits(policy, tokens):
    return policy.causal_lm(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0, -1].double()


def forward_shapes(policy):
    """Shapes of the inputs of every forward pass of the body from now on."""
    shapes = []
    policy.causal_lm.base_model.register_forward_pre_hook(
        lambda module, args, options: shapes.append(tuple(options["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.fixture(scope="module")
def policy():
    return policy_of()


def nucleus(p, top_p):
    """The likeliest tokens one by one until they have top_p."""
    kept, total = torch.zeros_like(p), 0.0
    for i in p.argsort(descending=True).tolist():
        if total >= top_p:
            break
        kept[i], total = p[i], total + p[i].item()
    return kept / kept.sum()


def best(p, top_k):
    kept = torch.where(p >= p.sort(descending=True).values[top_k - 1], p, 0.0)
    return kept / kept.sum()


DISTRIBUTIONS = {
    "plain": ({}, lambda z: z.softmax(-1)),
    "cold": ({"temperature": 0.5}, lambda z: (2 * z).softmax(-1)),
    "nucleus": ({"top_p": 0.7}, lambda z: nucleus(z.softmax(-1), 0.7)),
    "best three": ({"top_k": 3}, lambda z: best(z.softmax(-1), 3)),
    "nucleus of the best, hot": (
        {"temperature": 1.5, "top_k": 4, "top_p": 0.8},
        lambda z: nucleus(best((z / 1.5).softmax(-1), 4), 0.8),
    ),
}
NUM, VOCAB = 20_000, 7


def check_frequencies(found, first, second):
    """Chi-square of the pairs of tokens against first[a] second[a][b], within five standard deviations."""
    counts = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for d in found:
        counts[d.ids[0], d.ids[1]] += 1
    expected = NUM * first[:, None] * second
    assert not counts[expected == 0].any()
    usual = expected > 5
    statistic = ((counts - expected) ** 2 / expected)[usual].sum().item()
    assert usual.sum() > 3
    assert abs(statistic - usual.sum().item()) < 5 * math.sqrt(2 * usual.sum().item())
    for d in found[:50]:
        exact = torch.stack([first[d.ids[0]], second[d.ids[0], d.ids[1]]]).log()
        assert d.proposal == pytest.approx(exact.numpy(), abs=1e-4)


@pytest.mark.parametrize("case", DISTRIBUTIONS)
def test_tokens_come_as_often_as_they_are_likely(case):
    options, distribution = DISTRIBUTIONS[case]
    policy = policy_of(vocab_size=VOCAB, initializer_range=0.6)
    prompt = np.array([3, 1, 5], dtype=np.int32)
    settings = Drawing(max_new_tokens=2, batch_size=5000, **options)
    (found,) = drawn(policy, [prompt], NUM, settings, seeds=[4], ends=())
    first = distribution(logits(policy, prompt))
    second = torch.stack([distribution(logits(policy, [*prompt, a])) for a in range(VOCAB)])
    check_frequencies(found, first.detach(), second.detach())
    for d in found[:20]:
        own = [logits(policy, prompt).log_softmax(-1), logits(policy, [*prompt, d.ids[0]]).log_softmax(-1)]
        exact = [z[t].item() for z, t in zip(own, d.ids, strict=True)]
        assert d.logp == pytest.approx(exact, abs=1e-4)


def test_a_blend_is_the_geometric_mixture_at_each_token():
    policy, other = (policy_of(vocab_size=VOCAB, initializer_range=0.6, seed=s) for s in (3, 4))
    prompt = np.array([3, 1, 5], dtype=np.int32)
    settings = Drawing(max_new_tokens=2, batch_size=5000, temperature=0.8)
    mix = Blend(weight=0.3, reference=lambda: contextlib.nullcontext(other))
    (found,) = drawn(policy, [prompt], NUM, settings, seeds=[4], ends=(), mix=mix)

    def mixture(tokens):
        p, q = ((logits(m, tokens) / 0.8).softmax(-1) for m in (policy, other))
        blended = p**0.7 * q**0.3
        return (blended / blended.sum()).detach()

    check_frequencies(found, mixture(prompt), torch.stack([mixture([*prompt, a]) for a in range(VOCAB)]))
    first = logits(policy, prompt).log_softmax(-1)
    assert [d.logp[0] for d in found[:20]] == pytest.approx(
        [first[d.ids[0]].item() for d in found[:20]], abs=1e-4
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_the_policys_forward(family, temperature):
    policy = policy_of(family, temperature=temperature)
    settings = Drawing(max_new_tokens=8, temperature=temperature, batch_size=7)
    found = drawn(policy, settings=settings)
    assert len({len(d.ids) for candidates in found for d in candidates}) > 3
    for prompt, candidates in zip(PROMPTS, found, strict=True):
        made = [example(prompt, *(d.ids for d in candidates))]
        exact = policy(make_rows(made, sharing="never", cost=RowCost(1, 0), pad_id=0))
        for d, row in zip(candidates, exact, strict=True):
            assert d.logp == pytest.approx(row[: len(d.ids)].detach().numpy(), abs=1e-4)
            assert d.proposal == pytest.approx(d.logp)
            assert (d.ids.dtype, d.logp.dtype, d.proposal.dtype) == (np.int32, np.float32, np.float32)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "gpt2"])
def test_candidates_do_not_depend_on_what_shares_their_batch(family):
    policy = policy_of(family)
    expected = drawn(policy, settings=Drawing(max_new_tokens=8, batch_size=64))
    alone = [drawn(policy, [p], seeds=[s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    batched = [drawn(policy, settings=Drawing(max_new_tokens=8, batch_size=n)) for n in (1, 2, 7)]
    turned = drawn(policy, PROMPTS[::-1], seeds=SEEDS[::-1])[::-1]
    for found in (alone, turned, *batched):
        assert ids(found) == ids(expected)
        for a, b in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
            assert a.logp == pytest.approx(b.logp, abs=1e-4)
            assert a.finished == b.finished


def test_a_shared_prefill_gives_what_independent_ones_give(policy, monkeypatch):
    numbers = torch.rand(4, SETTINGS.max_new_tokens, generator=torch.Generator().manual_seed(1)).double()
    monkeypatch.setattr(sampling, "_uniform", lambda seed, num, settings: numbers[seed : seed + num])
    (shared,) = drawn(policy, [PROMPTS[0]], 4, seeds=[0], ends=())
    alone = drawn(policy, [PROMPTS[0]] * 4, 1, seeds=range(4), ends=())
    assert ids([shared]) == [[one[0].ids.tolist() for one in alone]]
    for d, (one,) in zip(shared, alone, strict=True):
        assert d.logp == pytest.approx(one.logp, abs=1e-5)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_a_prompt_is_computed_once_whatever_number_of_candidates_continues_it(batch_size):
    policy = policy_of()
    shapes = forward_shapes(policy)
    drawn(policy, [PROMPTS[0]], 8, Drawing(max_new_tokens=3, batch_size=batch_size), seeds=[1], ends=())
    parts = {3: [3, 3, 2], 8: [8]}[batch_size]
    assert shapes == [(1, 9)] + [(n, 1) for n in parts for _ in range(2)]


def test_fewer_candidates_are_the_first_of_more(policy):
    more, fewer = (ids(drawn(policy, num=n)) for n in (5, 2))
    assert [m[:2] for m in more] == fewer


def test_seeds_say_what_is_drawn(policy):
    found = drawn(policy, [PROMPTS[0]] * 3, seeds=[1, 2, 1], ends=())
    assert ids(found)[0] == ids(found)[2] != ids(found)[1]
    assert len({tuple(d.ids) for d in found[0]}) == 3


def test_the_global_generator_is_left_as_it_was(policy):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    drawn(policy)
    assert torch.equal(torch.rand(3), expected)


def test_a_candidate_ends_with_its_first_end_of_sequence(policy):
    endless = drawn(policy, ends=())
    assert all(len(d.ids) == 8 and not d.finished for found in endless for d in found)
    for with_end, without in zip(drawn(policy), endless, strict=True):
        for d, whole in zip(with_end, without, strict=True):
            places = [i for i, token in enumerate(whole.ids) if token in ENDS]
            length = places[0] + 1 if places else 8
            assert d.ids.tolist() == whole.ids[:length].tolist()
            assert d.finished == bool(places)
            assert len(d.logp) == len(d.proposal) == length


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_dropping_ended_rows_changes_nothing_but_the_work(family, monkeypatch):
    policy = policy_of(family)
    shapes = forward_shapes(policy)
    results = []
    for share, every in ((0.0, 1), (1.0, 1), (0.75, 3)):
        monkeypatch.setattr(sampling, "WORTH_DROPPING", share)
        monkeypatch.setattr(sampling, "_steps_between_checks", lambda policy, n=every: n)
        shapes.clear()
        results.append((drawn(policy), sum(math.prod(s) for s in shapes)))
    (never, most), (always, least), (sometimes, between) = results
    assert least < between < most
    for found in (always, sometimes):
        assert ids(found) == ids(never)
        for a, b in zip(itertools.chain(*found), itertools.chain(*never), strict=True):
            assert a.logp == pytest.approx(b.logp, abs=1e-5)


def test_decoding_stops_when_all_have_ended():
    policy = policy_of()
    shapes = forward_shapes(policy)
    found = drawn(policy, ends=range(320))
    assert [len(d.ids) for candidates in found for d in candidates] == [1] * 15
    assert shapes == [(5, 14)]


def test_ranks_that_share_the_weights_go_on_together_when_their_own_rows_have_ended(monkeypatch):
    policy = policy_of()
    shapes = forward_shapes(policy)
    monkeypatch.setattr(sampling, "is_sharded", lambda policy: True)
    found = drawn(policy, ends=range(320))
    assert [len(d.ids) for candidates in found for d in candidates] == [1] * 15
    assert shapes == [(5, 14)] + [(15, 1)] * 7


def test_temperature_zero_takes_the_likeliest_token(policy):
    (found,) = drawn(policy, [PROMPTS[0]], 2, Drawing(max_new_tokens=5, temperature=0.0), seeds=[1], ends=())
    expected = PROMPTS[0].tolist()
    for _ in range(5):
        expected.append(logits(policy, expected).argmax().item())
    assert ids([found]) == [[expected[9:]] * 2]
    assert found[0].proposal.tolist() == [0.0] * 5
    assert (found[0].logp < 0).all()


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(policy, monkeypatch, number):
    monkeypatch.setattr(sampling, "_uniform", lambda *_: torch.full((1, 8), number, dtype=torch.float64))
    (found,) = drawn(policy, [PROMPTS[0]], 1, Drawing(max_new_tokens=8, top_k=2), seeds=[1], ends=())
    so_far = PROMPTS[0].tolist()
    for token in found[0].ids.tolist():
        assert token in logits(policy, so_far).topk(2).indices.tolist()
        so_far.append(token)
    assert np.isfinite(found[0].proposal).all()


def test_the_policy_is_left_as_it_was_and_checkpointing_of_activations_does_not_matter():
    expected = ids(drawn(policy_of("gpt2")))
    policy = policy_of("gpt2")
    settings = {"lora": None, "reference": "frozen_copy", "gradient_checkpointing": True, "dropout": True}
    adapt(policy.model, ModelConfig(name_or_path="-", **settings))
    policy.train()
    policy.causal_lm.transformer.h[0].eval()
    policy.causal_lm.lm_head.weight.requires_grad_(False)
    training = {n: m.training for n, m in policy.named_modules()}
    trained = {n: p.requires_grad for n, p in policy.named_parameters()}
    assert ids(drawn(policy)) == expected
    assert {n: m.training for n, m in policy.named_modules()} == training
    assert {n: p.requires_grad for n, p in policy.named_parameters()} == trained


def test_a_blend_with_all_weight_on_the_reference_draws_from_the_reference():
    torch.manual_seed(0)
    model = adapt(causal_lm("llama", seed=3), ModelConfig(name_or_path="-", lora=LoraSettings(r=2)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    policy = TokenPolicy(model)
    mix = Blend(weight=1.0, reference=lambda: AdapterOff().active(policy))
    found, plain = drawn(policy, mix=mix), drawn(policy_of())
    assert ids(found) == ids(plain) != ids(drawn(policy))
    for a, b in zip(itertools.chain(*found), itertools.chain(*plain), strict=True):
        assert a.proposal == pytest.approx(b.logp, abs=1e-4)
        assert np.abs(a.logp - b.logp).max() > 1e-2
    copied = FrozenCopy.of(policy_of())
    mix = Blend(weight=1.0, reference=lambda: copied.active(policy))
    assert ids(drawn(policy, mix=mix)) == ids(plain)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"temperature": -0.5}, "temperature=-0.5 must be at least 0"),
        ({"temperature": math.nan}, "temperature=nan must be at least 0"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 0.5, "temperature": 0.0}, "temperature=0 is greedy and has no use for top_p=0.5"),
    ],
)
def test_settings_outside_their_range_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Drawing(**({"max_new_tokens": 4} | wrong))


def test_a_blends_weight_must_be_a_share():
    with pytest.raises(ValueError, match=r"weight=1.5 must be in \[0, 1\]"):
        Blend(weight=1.5, reference=contextlib.nullcontext)


def test_prompts_that_cannot_be_continued_are_refused(policy):
    with pytest.raises(ValueError, match="a prompt has no token"):
        drawn(policy, [PROMPTS[0], PROMPTS[0][:0]], seeds=[1, 2])
    long = np.ones(250, dtype=np.int32)
    with pytest.raises(ValueError, match=r"250 tokens and max_new_tokens=8 are more than the 256 positions"):
        drawn(policy, [long], seeds=[1])
    with pytest.raises(ValueError, match="5 prompts need as many seeds, not 1"):
        drawn(policy, seeds=[1])
    assert drawn(policy, [], seeds=[]) == []


def test_the_cache_goes_by_the_name_that_the_model_gives_it():
    class New:
        def forward(self, input_ids, cache=None):
            pass

    class Old:
        def forward(self, input_ids, past_key_values=None):
            pass

    assert cache_argument(New) == "cache"
    assert cache_argument(Old) == "past_key_values"
