import dataclasses
import json

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from triptych.modalities.llm.critic import CriticConfig, TokenCritic
from triptych.modalities.llm.full_vocabulary import entropy_and_kl
from triptych.modalities.llm.model import LoraSettings, ModelConfig, adapt
from triptych.modalities.llm.policy import TokenPolicy
from triptych.modalities.llm.port import TextPort
from triptych.modalities.llm.prompts import TURN_BREAK, Completion, Prompt
from triptych.modalities.llm.rows import RowCost, candidate_key
from triptych.modalities.llm.turn_metrics import turn_metrics
from triptych.training.group_state import pack_groups, unpack_groups
from triptych.training.groups import Group, Verdict

COST = RowCost(per_token=1.0, per_pair=0.0)


def ids(seed, n):
    return np.random.default_rng(seed).integers(1, tiny.VOCAB, n).astype(np.int32)


def items():
    """Two prompts with three and two completions."""
    first = Prompt(key="a", ids=ids(1, 7), text="first", answer="4", fields={"group": "g"})
    second = Prompt(key="b", ids=ids(2, 4), text="second", prefix="so far")
    return [
        (first, [Completion(ids=ids(i, 3 + i), text=f"c{i}") for i in range(3)]),
        (second, [Completion(ids=ids(9, 5), text="x"), Completion(ids=ids(8, 1), text="y", finished=False)]),
    ]


def lora_policy(family="llama", **options):
    settings = LoraSettings(r=2, target_modules=["q_proj", "v_proj"])
    model = adapt(tiny.causal_lm(family), ModelConfig(name_or_path="x", lora=settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(
                    0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
                )
    return TokenPolicy(model, **options).eval()


def port(sharing="auto"):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return TextPort(tokenizer=tokenizer, cost=COST, sharing=sharing)


def logits_of(lm, prompt, completion):
    """Logits before each token of a completion, [U, V], from the whole text alone."""
    whole = torch.tensor([[*prompt.ids.tolist(), *completion.ids.tolist()]])
    return lm(input_ids=whole, use_cache=False).logits[0, len(prompt.ids) - 1 : -1]


@pytest.mark.parametrize("sharing", ["never", "always"])
def test_terms_are_the_log_probs_of_each_token(sharing):
    policy, made = lora_policy(), items()
    batch = port(sharing).collate(made)
    terms = port(sharing).terms(policy, batch)
    row = 0
    for prompt, completions in made:
        for c in completions:
            logp = logits_of(policy.model, prompt, c).log_softmax(-1)
            expected = logp[torch.arange(len(c.ids)), torch.from_numpy(c.ids).long()]
            torch.testing.assert_close(terms[row, : len(c.ids)], expected, atol=1e-4, rtol=1e-4)
            assert not terms[row, len(c.ids) :].any()
            row += 1
    assert batch.counts.tolist() == [len(c.ids) for _, cs in made for c in cs]
    assert batch.keys[0] == port().key(made[0][0], made[0][1][0]) == candidate_key(ids(1, 7), ids(0, 3))
    assert batch.ids == ("a", "b")
    assert port().length(*made[0]) == 7 + 3 + 4 + 5


def test_a_temperature_is_the_policys_own():
    cold, made = lora_policy(temperature=0.5), items()
    terms = port().terms(cold, port().collate(made))
    prompt, completions = made[0]
    logp = (logits_of(cold.model, prompt, completions[0]) / 0.5).log_softmax(-1)
    expected = logp[torch.arange(3), torch.from_numpy(completions[0].ids).long()]
    torch.testing.assert_close(terms[0, :3], expected, atol=1e-4, rtol=1e-4)


def test_entropy_and_kl_are_exact_over_the_vocabulary_and_have_gradients():
    policy, made = lora_policy(), items()
    found = port().readouts(policy, port().collate(made), frozenset({"entropy", "kl"}))
    prompt, completions = made[0]
    logp = logits_of(policy.model, prompt, completions[1]).log_softmax(-1)
    with policy.model.disable_adapter():
        base = logits_of(policy.model, prompt, completions[1]).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    kl = (logp.exp() * (logp - base)).sum(-1)
    torch.testing.assert_close(found["entropy"][1, :4], entropy, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found["kl"][1, :4], kl, atol=1e-4, rtol=1e-4)
    assert (kl > 0).all()
    torch.testing.assert_close(found["logp"], port().terms(policy, port().collate(made)))
    grads = torch.autograd.grad(found["kl"].sum(), [p for p in policy.parameters() if p.requires_grad])
    assert any(g.abs().sum() > 0 for g in grads)


def test_the_kl_of_a_policy_to_itself_is_zero_and_so_is_its_gradient():
    hidden = torch.randn(700, 4, requires_grad=True)
    weight = torch.randn(11, 4)
    entropy, kl = entropy_and_kl(hidden, hidden.detach(), weight, None, temperature=0.7, softcap=5.0)
    assert entropy.shape == kl.shape == (700,)
    assert kl.abs().max() < 1e-5
    assert torch.autograd.grad(kl.sum(), hidden)[0].abs().max() < 1e-5
    z = 5 * torch.tanh(hidden @ weight.T / 5) / 0.7
    torch.testing.assert_close(entropy, torch.distributions.Categorical(logits=z).entropy())


def test_a_kl_to_the_base_needs_adapters():
    policy = TokenPolicy(tiny.causal_lm("llama"))
    with pytest.raises(ValueError, match=r"exact KL to the base model needs adapters"):
        port().readouts(policy, port().collate(items()), frozenset({"kl"}))


def test_a_critic_reads_the_state_before_each_token_and_does_not_move_the_policy():
    policy = lora_policy()
    policy.critic = TokenCritic(16)
    nn.init.normal_(policy.critic.head.weight)
    made = items()
    values = port().readouts(policy, port().collate(made), frozenset({"value"}))["value"]
    prompt, completions = made[0]
    whole = torch.tensor([[*prompt.ids.tolist(), *completions[2].ids.tolist()]])
    hidden = policy.causal_lm.base_model(input_ids=whole, use_cache=False).last_hidden_state[0]
    expected = policy.critic.head(hidden[len(prompt.ids) - 1 : -1]).squeeze(-1)
    torch.testing.assert_close(values[2, :5], expected, atol=1e-4, rtol=1e-4)
    values.sum().backward()
    assert policy.critic.head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in policy.model.parameters())


def test_a_critic_with_a_body_of_its_own_starts_at_zero_and_trains_it():
    policy = lora_policy()
    policy.critic = TokenCritic(16, tiny.causal_lm("llama", seed=3))
    batch = port().collate(items())
    values = port().readouts(policy, batch, frozenset({"value"}))["value"]
    assert not values.any()
    nn.init.normal_(policy.critic.head.weight)
    port().readouts(policy, batch, frozenset({"value"}))["value"].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.critic.body.parameters())
    assert all(p.grad is None for p in policy.model.parameters())


def test_a_value_without_a_critic_is_refused():
    with pytest.raises(ValueError, match="no critic to give values"):
        port().readouts(lora_policy(), port().collate(items()), frozenset({"value"}))
    assert CriticConfig().kind == "head"


def test_groups_of_text_come_back_from_a_checkpoint_as_they_were():
    prompt, completions = items()[0]
    odd = dataclasses.replace(completions[0], own=np.array([True, False, True]), turns=np.arange(3))
    filled = dataclasses.replace(prompt, candidates=(odd,), relevance=(1.0,))
    group = Group(
        key="a",
        context=filled,
        candidates=(odd, completions[1]),
        mask=torch.tensor([[True, False, True, False], [True] * 4]),
        logp=torch.randn(2, 4),
        proposal=torch.randn(2),
        origin=("policy", "teacher"),
        depth=2,
        verdict=Verdict(score=torch.tensor([1.0, 2.0]), consistency=0.75),
    )
    tensors, state = pack_groups([group, group], port(), "groups0.")
    (back, _) = unpack_groups(tensors, json.loads(json.dumps(state)), port())
    for name in ("mask", "logp", "proposal"):
        assert torch.equal(getattr(back, name), getattr(group, name))
    assert torch.equal(back.verdict.score, group.verdict.score)
    assert (back.verdict.consistency, back.origin, back.depth, back.ref) == (0.75, group.origin, 2, None)
    assert (back.context.text, back.context.answer, back.context.relevance) == ("first", "4", (1.0,))
    assert back.context.fields == {"group": "g"}
    for a, b in zip(back.candidates, group.candidates, strict=True):
        assert np.array_equal(a.ids, b.ids)
        assert (a.text, a.finished) == (b.text, b.finished)
    assert np.array_equal(back.candidates[0].own, odd.own)
    assert back.candidates[1].own is None
    assert np.array_equal(back.context.candidates[0].turns, np.arange(3))
    assert port().key(back.context, back.candidates[0]) == port().key(prompt, completions[0])


def test_turn_metrics_count_what_the_second_attempt_fixed_and_broke():
    prompt = items()[0][0]
    answers = tuple(Completion(ids=ids(i, 2), text=f"a{TURN_BREAK}b", finished=i > 0) for i in range(4))
    units = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    group = Group(
        key="a",
        context=prompt,
        candidates=answers,
        mask=torch.ones(4, 2, dtype=torch.bool),
        turn=torch.arange(2).expand(4, 2),
        verdict=Verdict(units=units),
    )
    assert turn_metrics([group]) == {
        "round/finished": 0.75,
        "round/distinct": 1.0,
        "turns/first": 0.5,
        "turns/second": 0.5,
        "turns/fixed": 0.5,
        "turns/broken": 0.5,
    }
    assert turn_metrics([]) == {}
    same = dataclasses.replace(group, candidates=(answers[1],) * 4, turn=None)
    assert turn_metrics([same]) == {"round/finished": 1.0, "round/distinct": 0.25}
