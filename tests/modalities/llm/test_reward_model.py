import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from triptych.modalities.llm.judges import JUDGES
from triptych.modalities.llm.model import LoraSettings, load_model, load_tokenizer
from triptych.modalities.llm.policy import TokenPolicy
from triptych.modalities.llm.prompts import Completion, Prompt
from triptych.modalities.llm.reward_judges import GapJudge, RewardModelJudge
from triptych.modalities.llm.reward_model import (
    SEPARATOR,
    BodyConfig,
    RewardCollator,
    RewardExample,
    RewardModel,
    collator_of,
    last_tokens,
    load_reward_model,
    save_reward_model,
    with_reference_answer,
)
from triptych.modalities.llm.reward_setup import gap_example
from triptych.modalities.llm.rows import make_rows
from triptych.objectives import Term, Terms, build
from triptych.training.groups import Group
from triptych.training.references import content_hash
from triptych.training.scorers import Standardise
from triptych.training.scoring import ScoreLikelihood, ScoreSample

FAMILIES = ["llama", "llama_tied", "gpt2", "qwen2", "gemma2", "mistral"]
CPU = torch.device("cpu")


def reward(family="llama", *, names=("reward",), outputs=None, seed=0):
    """A reward model whose head is not zero any more."""
    model = RewardModel(tiny.causal_lm(family), names=names, outputs=outputs).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.normal_(generator=generator)
    return model


def contexts():
    """Prompts with one to three candidates of different lengths; some have a single token."""
    return [
        tiny.random_example(0, 5, 4, 7),
        tiny.random_example(1, 3, 1, 6, 1),
        tiny.random_example(2, 8, 1),
        tiny.random_example(3, 1, 2, 1),
    ]


def rows(cost, found, sharing):
    return make_rows(found, sharing=sharing, cost=cost, pad_id=0)


@torch.no_grad()
def by_hand(model, context, candidate):
    """Score of one sequence by itself, without rows."""
    ids = torch.from_numpy(np.concatenate([context.prompt_ids, candidate]).astype(np.int64))[None]
    hidden = model.causal_lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return model.head(hidden[0, -1])


def test_the_last_token_of_every_candidate_is_found_in_rows_of_both_kinds():
    found = contexts()
    cost = TokenPolicy(tiny.causal_lm("llama")).row_cost()
    expected = [int(c[-1]) for context in found for c in context.candidate_ids]
    lengths = [len(context.prompt_ids) + len(c) for context in found for c in context.candidate_ids]
    for sharing in ("always", "never"):
        laid = rows(cost, found, sharing)
        places = last_tokens(laid)
        assert laid.input_ids.flatten()[places].tolist() == expected
        assert (laid.positions.flatten()[places] + 1).tolist() == lengths


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_each_sequence_alone_with_and_without_shared_prompts(family):
    model, found = reward(family, names=("a", "b")), contexts()
    collate = collator_of(model.model, SimpleNamespace(pad_token_id=0), "auto")
    expected = torch.stack([by_hand(model, e, c) for e in found for c in e.candidate_ids])
    for sharing in ("always", "never"):
        with torch.no_grad():
            scores = model(rows(collate.cost, found, sharing))
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, expected, atol=2e-5, rtol=1e-5)


def test_an_untrained_head_calls_every_pair_a_tie_and_has_a_bias_for_ratings_alone():
    model = RewardModel(tiny.causal_lm("llama"))
    cost = TokenPolicy(model.model).row_cost()
    assert model(rows(cost, contexts(), "never")).abs().max() == 0
    assert model.head.bias is None
    assert RewardModel(tiny.causal_lm("llama"), outputs=Standardise.identity(1)).head.bias is not None


def test_the_unused_head_of_the_language_model_is_not_trained_and_a_tied_one_is():
    free = RewardModel(tiny.causal_lm("llama"))
    assert not free.causal_lm.get_output_embeddings().weight.requires_grad
    tied = RewardModel(tiny.causal_lm("llama_tied"))
    assert tied.causal_lm.get_input_embeddings().weight.requires_grad
    cost = TokenPolicy(free.model).row_cost()
    free.head.weight.data.fill_(1.0)
    free(rows(cost, contexts(), "never")).sum().backward()
    assert all(p.grad is not None for p in free.parameters() if p.requires_grad)


def test_the_score_is_float32_under_bfloat16_autocast():
    model = reward()
    cost = TokenPolicy(model.model).row_cost()
    laid = rows(cost, contexts(), "never")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(laid)
    assert mixed.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(mixed, model(laid), atol=0.3, rtol=0.1)


def test_pairs_and_lists_become_one_batch_with_their_margins():
    model = reward()
    collate = RewardCollator(TokenPolicy(model.model).row_cost(), 0)
    examples = [tiny.random_example(i, 4, 3, 5) for i in range(3)]
    samples = [ScoreSample(id=e.id, grades=(1.0, 0.0), margin=float(i)) for i, e in enumerate(examples)]
    batch = collate([RewardExample(s, (e,), e.source) for s, e in zip(samples, examples, strict=True)])
    with torch.no_grad():
        pair = ScoreLikelihood()(model, batch)
    assert pair.margin.tolist() == [0.0, 1.0, 2.0]
    for i, e in enumerate(examples):
        for side, candidate in zip((pair.chosen, pair.rejected), e.candidate_ids, strict=True):
            assert side.logp[i].item() == pytest.approx(by_hand(model, e, candidate).item(), abs=2e-5)
    assert len(set(batch.keys)) == 6


class Told:
    """Scores each candidate by what it and the answer that its prompt shows are."""

    def __init__(self, table):
        self.table = table
        self.gaps = {("w", "l"): 1.2, ("w", "w"): 0.1, ("l", "l"): -0.1, ("l", "w"): -0.9}

    def __call__(self, laid):
        rows_of = []
        for start, end in zip(last_tokens(laid) - laid.count.long() + 1, last_tokens(laid) + 1, strict=True):
            width = laid.input_ids.shape[1]
            row = int(start) // width
            shown = laid.input_ids[row, 2:4].tolist()
            candidate = laid.input_ids.flatten()[start:end].tolist()
            rows_of.append(self.gaps[self.table[candidate[0]], self.table[shown[0]]])
        return torch.tensor(rows_of)[:, None]


@pytest.mark.parametrize("sharing", ["always", "never"])
def test_a_pair_becomes_the_four_gaps_of_pit_and_has_its_published_loss(sharing):
    eos = 0
    example = tiny.example([9, 8], [21, 22, eos], [31, 32, eos])
    made = gap_example(example, [7], eos=eos)
    assert [c.prompt_ids.tolist() for c in made.contexts] == [[9, 8, 31, 32, 7], [9, 8, 21, 22, 7]]
    assert made.num_tokens == 22
    collate = RewardCollator(TokenPolicy(tiny.causal_lm("llama")).row_cost(), 0, sharing)
    batch = collate([made, made])
    ranked = ScoreLikelihood()(Told({21: "w", 31: "l"}), batch)
    assert ranked.loglik.logp[0].tolist() == pytest.approx([1.2, -0.1, 0.1, -0.9])
    loss, _ = Terms((Term(build("pit_gap")),))({"none": ranked})
    assert loss.tolist() == pytest.approx([1.328226] * 2, abs=1e-6)


def test_a_reference_answer_is_shown_without_its_end():
    shown = with_reference_answer(np.array([1, 2], dtype=np.int32), np.array([5, 0]), [7], eos=0)
    assert shown.dtype == np.int32
    assert shown.tolist() == [1, 2, 5, 7]
    assert with_reference_answer(np.array([1]), np.array([5]), [7], eos=0).tolist() == [1, 5, 7]


def exported(folder, *, lora=True, names=("reward",), reads="answer", outputs=None, base="base"):
    """A reward model on a saved base, with an adapter and a head that are not zero, written to a folder."""
    if not (folder / base).is_dir():
        tiny.save(folder / base)
    body = BodyConfig(name_or_path=str(folder / base), lora=LoraSettings(r=2) if lora else None)
    config = body.model_config()
    model = load_model(str(folder / base), config)
    base_hash = content_hash(model)
    from triptych.modalities.llm.model import adapt

    policy = RewardModel(adapt(model, config), names=names, outputs=outputs)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if parameter.requires_grad or "head" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    tokenizer = load_tokenizer(str(folder / base), config)
    save_reward_model(
        policy,
        tokenizer,
        folder / "model",
        body=body,
        base_hash=base_hash,
        base_folder=str(folder / base),
        reads=reads,
        facts={"objective": "reward_bt"},
    )
    return policy.eval(), tokenizer


def completion(tokenizer, text, *, finished=True):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * finished
    return Completion(ids=np.asarray(ids, dtype=np.int32), text=text, finished=finished)


def group(tokenizer, prompt, *answers, finished=True, **fields):
    ids = np.asarray(tokenizer(prompt, add_special_tokens=False)["input_ids"], dtype=np.int32)
    candidates = tuple(completion(tokenizer, a, finished=finished) for a in answers)
    width = max(len(c.ids) for c in candidates)
    mask = torch.arange(width) < torch.tensor([[len(c.ids)] for c in candidates])
    return Group(
        key=prompt,
        context=Prompt(key=prompt, ids=ids, text=prompt, **fields),
        candidates=candidates,
        mask=mask,
    )


LIVE = SimpleNamespace(device=CPU)


@torch.no_grad()
def alone(policy, tokenizer, prompt_ids, text):
    """Score of a prompt and an ended answer by the policy that was trained, in its own units."""
    ids = [*prompt_ids, *tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    laid = rows(TokenPolicy(policy.model).row_cost(), [tiny.example(ids[:-1], ids[-1:])], "never")
    return policy.rate(laid)[0]


@pytest.mark.parametrize("lora", [True, False])
def test_an_exported_model_judges_with_the_scores_of_the_trained_one(lora, tmp_path):
    policy, tokenizer = exported(tmp_path, lora=lora)
    names = {p.name for p in (tmp_path / "model").iterdir()}
    assert {"reward.json", "reward_head.safetensors", "tokenizer.json"} < names
    assert ("adapter_model.safetensors" in names) == lora
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl"))]
    judge = RewardModelJudge(path=str(tmp_path / "model"), batch_size=2)
    assert (judge.gives, judge.needs) == ({"score"}, set())
    answers = [(" red blue", " warm"), (" flat flat round", " cold", " soft")]
    groups = [group(tokenizer, f"{i} plain:", *a) for i, a in enumerate(answers)]
    # A completion that was cut off is scored as if it ended there.
    groups.append(group(tokenizer, "2 plain:", " red blue", finished=False))
    verdicts = judge(groups, LIVE)
    for found, g in zip(verdicts, groups, strict=True):
        assert found.given() == {"score"}
        expected = [alone(policy, tokenizer, g.context.ids, c.text).item() for c in g.candidates]
        assert found.score.tolist() == pytest.approx(expected, abs=1e-5)
        assert len(set(expected)) == len(expected)
    assert judge([], LIVE) == []


def test_several_objectives_are_users_and_weights_make_a_score_of_them(tmp_path):
    outputs = Standardise(torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5]))
    policy, tokenizer = exported(tmp_path, names=("helpful", "long"), outputs=outputs)
    path = str(tmp_path / "model")
    found = group(tokenizer, "plain:", " red blue", " warm")
    expected = torch.stack([alone(policy, tokenizer, found.context.ids, c.text) for c in found.candidates])
    plain = RewardModelJudge(path=path)
    assert plain.gives == {"users"}
    torch.testing.assert_close(plain([found], LIVE)[0].users, expected, atol=1e-5, rtol=0)
    weighed = RewardModelJudge(path=path, weights={"long": -0.6, "helpful": 0.8})
    assert weighed.gives == {"users", "score"}
    score = weighed([found], LIVE)[0].score
    torch.testing.assert_close(score, expected @ torch.tensor([0.8, -0.6]), atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="weights name helpful; the model scores helpful, long"):
        RewardModelJudge(path=path, weights={"helpful": 1.0})


def test_a_gap_judge_shows_the_reference_answer_as_training_did(tmp_path):
    policy, tokenizer = exported(tmp_path, names=("gap",), reads="gap")
    path = str(tmp_path / "model")
    answers = (" red blue", " warm")
    own = group(tokenizer, "plain:", *answers, answer=" cold")
    # Reference and separator are tokenised apart, as training joins ids.
    parts = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (" cold", SEPARATOR)]
    shown = [*own.context.ids, *parts[0], *parts[1]]
    expected = [alone(policy, tokenizer, shown, a).item() for a in answers]
    assert GapJudge(path=path)([own], LIVE)[0].score.tolist() == pytest.approx(expected, abs=1e-5)
    field = group(tokenizer, "plain:", *answers, fields={"draft": " cold"})
    found = GapJudge(path=path, reference="draft")([field], LIVE)
    assert found[0].score.tolist() == pytest.approx(expected, abs=1e-5)
    ready = group(tokenizer, "plain:", *answers)
    ids = np.asarray(shown, dtype=np.int32)
    ready = Group(
        key="x", context=Prompt(key="x", ids=ids, text=""), candidates=ready.candidates, mask=ready.mask
    )
    found = GapJudge(path=path, reference="prompt")([ready], LIVE)
    assert found[0].score.tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="has no text 'answer' to compare with"):
        GapJudge(path=path)([field], LIVE)


def test_a_judge_of_the_wrong_kind_or_of_no_model_is_refused_when_it_is_made(tmp_path):
    with pytest.raises(ValueError, match=r"is no reward model: it has no reward\.json"):
        RewardModelJudge(path=str(tmp_path))
    exported(tmp_path, names=("gap",), reads="gap")
    with pytest.raises(ValueError, match="reads gaps: use judge 'pit_gap'"):
        RewardModelJudge(path=str(tmp_path / "model"))
    judge = JUDGES.build("pit_gap", {"path": str(tmp_path / "model")})
    assert isinstance(judge, GapJudge)
    assert judge.reference == "answer"
    with pytest.raises(ValueError, match="it takes path, reference, batch_size, base"):
        JUDGES.build("pit_gap", {"paths": "x"})
    assert JUDGES.factory("reward_model") is RewardModelJudge


def test_an_adapter_is_not_put_on_another_base_than_its_own(tmp_path):
    policy, tokenizer = exported(tmp_path)
    tiny.save(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="was trained on another base than"):
        load_reward_model(tmp_path / "model", device=CPU, base=str(tmp_path / "other"))
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="no such folder"):
        load_reward_model(tmp_path / "model", device=CPU)
    judge = RewardModelJudge(path=str(tmp_path / "model"), base=str(tmp_path / "moved"))
    found = group(tokenizer, "plain:", " red")
    expected = alone(policy, tokenizer, found.context.ids, " red").item()
    assert judge([found], LIVE)[0].score.item() == pytest.approx(expected, abs=1e-5)


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    _, tokenizer = exported(tmp_path)
    judge = RewardModelJudge(path=str(tmp_path / "model"))
    strange = group(tokenizer, "plain:", " red blue")
    moved = Completion(ids=strange.candidates[0].ids + 1, text=" red blue")
    wrong = Group(key="x", context=strange.context, candidates=(moved,), mask=strange.mask)
    with pytest.raises(ValueError, match="use a reward model with the policy's tokenizer"):
        judge([wrong], LIVE)
    beyond = Completion(ids=np.array([5000], dtype=np.int32), text=" red")
    wrong = Group(
        key="x", context=strange.context, candidates=(beyond,), mask=torch.ones(1, 1, dtype=torch.bool)
    )
    with pytest.raises(ValueError, match="use a reward model with the policy's tokenizer"):
        judge([wrong], LIVE)


def test_what_is_written_holds_the_settings_and_a_loaded_model_is_frozen(tmp_path):
    exported(tmp_path)
    settings = json.loads((tmp_path / "model" / "reward.json").read_text())
    assert settings["names"] == ["reward"]
    assert settings["body"]["lora"]["r"] == 2
    loaded = load_reward_model(tmp_path / "model", device=CPU)
    assert not loaded.policy.training
    assert not any(p.requires_grad for p in loaded.policy.parameters())
    assert loaded.facts == {"objective": "reward_bt"}
