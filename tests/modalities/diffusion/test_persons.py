"""Attention to users: bitwise the base at the start and without a user; it learns tastes, and is exported."""

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from tiny_diffusion import FIRST_WIDTH, LATENT, MAX_TOKENS, PROJECTION, SECOND_WIDTH, TINY, denoiser_inputs
from tiny_diffusion import write_pipeline as write_model
from tiny_runs import move, no_bar

from triptych.modalities.diffusion.data import DataConfig, load_data
from triptych.modalities.diffusion.draws import NoiseConfig
from triptych.modalities.diffusion.export import export_full, export_persons, load_exported, load_persons
from triptych.modalities.diffusion.likelihood import Collator, ElboLikelihood, Example
from triptych.modalities.diffusion.model import LoraConfig, ModelConfig, adapt
from triptych.modalities.diffusion.persons import (
    PersonsConfig,
    UserAttention,
    UserOff,
    Users,
    add_persons,
    drawn_for,
    mixed,
    pair_vectors,
    switch_of,
    user_attentions,
    user_embeddings,
)
from triptych.modalities.diffusion.picture_report import snippet
from triptych.modalities.diffusion.policy import Conditions, Denoiser
from triptych.modalities.diffusion.rollout import Sampling, generate
from triptych.modalities.diffusion.schedule import schedule_of
from triptych.modalities.diffusion.setup import DiffusionConfig, EvaluationConfig, fill_references, set_up
from triptych.modalities.diffusion.shards import EncodedContext, EncodedPrompt, ShardWriter, prompt_hash
from triptych.scripts import train_diffusion
from triptych.training.config import ObjectiveConfig, OptimConfig, RunConfig
from triptych.training.logs import read_metrics
from triptych.training.loop import make_learner, train_step
from triptych.training.meters import Meter
from triptych.training.order import Draw
from triptych.training.references import FrozenCopy, content_hash, trained

RECIPE = Path(train_diffusion.__file__).parent / "recipes" / "diffusion" / "ppd_sdxl.yaml"
WIDTH = {"sd15": FIRST_WIDTH, "sdxl": FIRST_WIDTH + SECOND_WIDTH}
# Twelve persons; those of odd number like what the others do not.
PERSONS = tuple(f"person {i}" for i in range(12))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def unet(family="sdxl", *, width=5, scale=1.0, moved=True):
    """A tiny UNet that attends to users; moved: after some training."""
    model = TINY[family]().unet
    add_persons(model, width=width, scale=scale, generator=seeded())
    if moved:
        move(model, 0.5)
    return model


def users_of(rows, *, tokens=1, width=5, seed=1):
    return torch.randn(rows, tokens, width, generator=seeded(seed))


def said(model, family="sdxl", users=None, batch=2):
    given = {} if users is None else {"cross_attention_kwargs": {"ip_hidden_states": users}}
    return model(**denoiser_inputs(family, batch=batch), **given).sample


def test_an_embedding_is_the_mean_difference_of_the_pairs_with_mean_square_one():
    # Differences (3, 0) and (5, 8): their mean is (4, 4), whose mean square is 16.
    pairs = torch.tensor([[[3.0, 0.0], [0.0, 0.0]], [[6.0, 9.0], [1.0, 1.0]]])
    table = user_embeddings({"ann": pairs, "bob": pairs.flip(1)})
    assert table["ann"].tolist() == [[1.0, 1.0]]
    assert table["bob"].tolist() == [[-1.0, -1.0]]
    # (9 + 0 + 25 + 64) / 4 = 24.5
    size = math.sqrt(24.5)
    expected = torch.tensor([[3.0, 0.0], [5.0, 8.0]]) / size
    torch.testing.assert_close(pair_vectors({"ann": pairs})["ann"], expected)
    with pytest.raises(ValueError, match="the pairs of user 'cy' differ in no feature"):
        user_embeddings({"cy": torch.cat([pairs, pairs.flip(1)])})


def test_a_table_of_users_comes_back_from_its_file(tmp_path):
    table = Users({"ann": torch.randn(2, 3), "bob \u00e9": torch.randn(2, 3)})
    table.save(tmp_path / "deep" / "users.safetensors")
    again = Users.load(tmp_path / "deep" / "users.safetensors")
    assert again.vectors.keys() == table.vectors.keys()
    assert all(torch.equal(again[name], table[name]) for name in table.vectors)
    assert again.fingerprint == table.fingerprint
    assert replace(table, vectors=table.vectors | {"ann": table["ann"] + 1e-6}).fingerprint != (
        table.fingerprint
    )
    assert (again.width, again.nobody.tolist()) == (3, [[0.0] * 3] * 2)
    # One vector may be written as such, in any precision.
    save_file({"cy": torch.ones(4, dtype=torch.float16)}, tmp_path / "one.safetensors")
    assert Users.load(tmp_path / "one.safetensors")["cy"].tolist() == [[1.0] * 4]


def test_a_table_that_is_none_is_refused_with_the_user_and_the_reason(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        Users({})
    with pytest.raises(ValueError, match=r"user 'b' has vectors of shape \(1, 4\), the first one \(1, 3\)"):
        Users({"a": torch.zeros(1, 3), "b": torch.zeros(1, 4)})
    with pytest.raises(ValueError, match="vectors of user 'a' are not finite"):
        Users({"a": torch.tensor([[math.nan]])})
    with pytest.raises(ValueError, match="no user 'zoe' among the 1 of the table"):
        Users({"a": torch.zeros(1, 3)})["zoe"]
    with pytest.raises(ValueError, match="no user can be called"):
        Users({"__metadata__": torch.zeros(1, 3)}).save(tmp_path / "users.safetensors")
    with pytest.raises(ValueError, match="nowhere is no table of users"):
        Users.load(tmp_path / "nowhere")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10" * 20)
    with pytest.raises(ValueError, match=r"cut\.safetensors is no table of users"):
        Users.load(tmp_path / "cut.safetensors")


def test_a_mixture_ends_at_its_two_users_exactly():
    first, second = users_of(2, tokens=2)
    assert torch.equal(mixed(first, second, 0.0), first)
    assert torch.equal(mixed(first, second, 1.0), second)
    torch.testing.assert_close(mixed(first, second, 0.25), 0.75 * first + 0.25 * second)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_the_first_step_is_the_base_bit_for_bit(family, tokens):
    base = TINY[family]().unet
    model = unet(family, moved=False)
    expected = said(base, family)
    assert torch.equal(said(model, family, users_of(2, tokens=tokens)), expected)
    assert torch.equal(said(model, family), expected)


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_user_of_zeros_is_the_base_whatever_was_learnt(family):
    model, expected = unet(family), said(TINY[family]().unet, family)
    for tokens in (1, 3):
        assert torch.equal(said(model, family, torch.zeros(2, tokens, 5)), expected)
    assert not torch.equal(said(model, family, users_of(2)), expected)
    # A row is its own user's: the second is nobody's.
    rows = torch.stack([users_of(1)[0], torch.zeros(1, 5)])
    found = said(model, family, rows)
    torch.testing.assert_close(found[1], expected[1])
    assert (found[0] - expected[0]).abs().max() > 1e-3


def test_attention_to_a_user_is_the_formula_worked_by_hand():
    model = unet(scale=0.7)
    name, added = next(iter(user_attentions(model).items()))
    attn = model.get_submodule(name)
    picture = torch.randn(2, 6, attn.to_q.in_features, generator=seeded(2))
    text = torch.randn(2, 4, attn.to_k.in_features, generator=seeded(3))
    users = users_of(2, tokens=3)

    def attention(query, key, value):
        heads = [t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (query, key, value)]
        weights = (heads[0] @ heads[1].mT / math.sqrt(heads[0].shape[-1])).softmax(-1)
        return (weights @ heads[2]).transpose(1, 2).flatten(2)

    query = attn.to_q(picture)
    own = attention(query, users @ added.to_k.weight.T, users @ added.to_v.weight.T)
    inside = attention(query, attn.to_k(text), attn.to_v(text)) + 0.7 * own
    found = attn(picture, encoder_hidden_states=text, ip_hidden_states=users)
    torch.testing.assert_close(found, attn.to_out[0](inside), atol=1e-5, rtol=1e-5)
    # A mask of prompt tokens is the text's alone.
    mask = torch.zeros(2, 1, 4)
    mask[:, :, 2:] = -1e9
    masked = attn(picture, encoder_hidden_states=text, attention_mask=mask, ip_hidden_states=users)
    short = attn(picture, encoder_hidden_states=text[:, :2], ip_hidden_states=users)
    torch.testing.assert_close(masked, short, atol=1e-5, rtol=1e-5)


def test_every_cross_attention_gets_its_own_and_nothing_else_changes():
    base, model = TINY["sdxl"]().unet, unet(moved=False)
    names = {n for n, m in base.named_modules() if n.endswith("attn2")}
    assert set(user_attentions(model)) == names
    own = {n: v for n, v in model.state_dict().items() if ".processor." not in n}
    assert content_hash(base) == content_hash(TINY["sdxl"]().unet)
    assert own.keys() == base.state_dict().keys()
    assert all(torch.equal(v, base.state_dict()[n]) for n, v in own.items())
    assert set(trained(model)) == {f"{n}.processor.to_{part}.weight" for n in names for part in "kv"}


def gradients(model, users):
    model.zero_grad()
    said(model, users=users).square().mean().backward()
    sizes = {n: 0.0 if p.grad is None else float(p.grad.abs().max()) for n, p in model.named_parameters()}
    ends = {part: [v for n, v in sizes.items() if n.endswith(f"processor.{part}.weight")] for part in KV}
    others = [v for n, v in sizes.items() if ".processor." not in n]
    return ends["to_k"], ends["to_v"], others


KV = ("to_k", "to_v")


def test_gradient_reaches_the_values_first_then_the_keys_and_never_the_base():
    model, users = unet(moved=False), users_of(2, tokens=3)
    keys, values, others = gradients(model, users)
    assert max(keys) == max(others) == 0 < min(values)
    with torch.no_grad():
        for added in user_attentions(model).values():
            added.to_v.weight -= 0.1 * added.to_v.weight.grad
    keys, values, others = gradients(model, users)
    assert max(others) == 0 < min(keys + values)
    # One vector leaves nothing to choose, so that its key does not matter; zeros teach nothing.
    keys, values, _ = gradients(model, users[:, :1])
    assert max(keys) < 1e-9 < min(values)
    keys, values, _ = gradients(model, torch.zeros(2, 3, 5))
    assert max(keys + values) == 0


def test_gradient_checkpointing_keeps_the_user():
    plain, users = unet().train(), users_of(2, tokens=2)
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    for found, expected in zip(gradients(checkpointed, users), gradients(plain, users), strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_a_base_in_half_precision_keeps_what_trains_in_single_precision():
    model = TINY["sdxl"]().unet.to(torch.bfloat16)
    add_persons(model, width=5)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    move(model)
    inputs = denoiser_inputs("sdxl")
    conditions = Conditions(
        inputs["encoder_hidden_states"],
        inputs["added_cond_kwargs"]["text_embeds"],
        inputs["added_cond_kwargs"]["time_ids"],
        users_of(2),
    )
    (found,) = Denoiser(model)([inputs["sample"]], [inputs["timestep"]], [conditions])
    (base,) = Denoiser(model)([inputs["sample"]], [inputs["timestep"]], [replace(conditions, users=None)])
    assert found.dtype == torch.bfloat16
    assert not torch.equal(found, base)


def test_what_cannot_attend_to_a_user_is_refused():
    with pytest.raises(ValueError, match="SD3Transformer2DModel has no cross-attention"):
        add_persons(TINY["sd3"]().transformer, width=5)
    lora = ModelConfig(name_or_path="-", lora=LoraConfig(r=2))
    with pytest.raises(ValueError, match="the model has adapters"):
        add_persons(adapt(TINY["sd15"]().unet, lora), width=5)
    with pytest.raises(ValueError, match=r"is not diffusers' plain attention \(processor UserAttention"):
        add_persons(unet(), width=5)
    plain = TINY["sdxl"]().unet
    with pytest.raises(ValueError, match="attends to no user"):
        switch_of(plain)
    inputs = denoiser_inputs("sd3")
    policy = Denoiser(TINY["sd3"]().transformer)
    seen = Conditions(inputs["encoder_hidden_states"], inputs["pooled_projections"], users=users_of(2))
    with pytest.raises(ValueError, match="attends to no user"):
        policy([inputs["hidden_states"]], [inputs["timestep"]], [seen])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"persons": PersonsConfig(users="u")}, "reference=adapter_off: user_off goes with model.persons"),
        ({"reference": "user_off"}, "user_off goes with model.persons alone"),
        ({"persons": PersonsConfig(users="u"), "reference": "user_off"}, "set model.lora=null"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(name_or_path="-", **settings)


def test_persons_are_for_runs_that_know_them():
    config = ModelConfig(
        name_or_path="-", lora=None, persons=PersonsConfig(users="u"), reference="user_off", dtype="float16"
    )
    with pytest.raises(ValueError, match="is for training on encoded preferences"):
        adapt(TINY["sd15"]().unet, config)
    for wrong in ({"scale": 0.0}, {"dropout": 1.0}):
        with pytest.raises(ValueError, match=f"model.persons.{next(iter(wrong))}="):
            PersonsConfig(users="u", **wrong)


def example(person, *, seed=0):
    draw = seeded(seed)
    return Example(
        id=f"e{seed}",
        source=f"made:{seed}",
        kind="pair",
        latents=torch.randn(2, 4, LATENT, LATENT, generator=draw),
        embeds=torch.randn(MAX_TOKENS, WIDTH["sdxl"], generator=draw),
        pooled=torch.randn(PROJECTION, generator=draw),
        time_ids=torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2),
        relevance=(1.0, 0.0),
        keys=(f"{seed}-0", f"{seed}-1"),
        group=person,
    )


TABLE = Users({name: torch.randn(2, 5, generator=seeded(i)) for i, name in enumerate(PERSONS)})
SCHEDULE = schedule_of(TINY["sdxl"]().scheduler)


def batch_of(persons, **options):
    examples = [example(p, seed=i) for i, p in enumerate(persons)]
    draws = [Draw(i, 0, 100 + i) for i in range(len(persons))]
    return Collator(schedule=SCHEDULE, **options)(examples, draws)


def test_a_batch_carries_its_users_or_none():
    assert batch_of(["person 1", None]).conditions.users is None
    batch = batch_of(["person 1", None, "person 0"], users=TABLE)
    assert batch.conditions.users.tolist() == [
        TABLE["person 1"].tolist(),
        [[0.0] * 5] * 2,
        TABLE["person 0"].tolist(),
    ]
    assert batch.to(torch.device("cpu")).conditions.rows(torch.tensor([2])).users.tolist() == [
        TABLE["person 0"].tolist()
    ]
    # References do not see users, so values of theirs are the same for all.
    assert batch.keys == batch_of(["person 1", None, "person 0"]).keys
    with pytest.raises(ValueError, match="no user 'stranger'"):
        batch_of(["stranger"], users=TABLE)
    with pytest.raises(ValueError, match="user dropout needs"):
        Collator(schedule=SCHEDULE, user_dropout=0.5)


def test_users_are_dropped_at_their_rate_whatever_becomes_of_the_prompt():
    many = ["person 1"] * 400
    empty = (torch.zeros(MAX_TOKENS, WIDTH["sdxl"]), torch.zeros(PROJECTION))
    batch = batch_of(many, users=TABLE, user_dropout=0.3, empty=empty, dropout=0.5)
    gone = (batch.conditions.users == 0).flatten(1).all(1)
    unprompted = (batch.conditions.embeds == 0).flatten(1).all(1)
    assert float(gone.float().mean()) == pytest.approx(0.3, abs=0.07)
    assert float(gone[unprompted].float().mean()) == pytest.approx(0.3, abs=0.1)
    kept = batch.conditions.users[~gone]
    assert torch.equal(kept, TABLE["person 1"].expand_as(kept))
    again = batch_of(many, users=TABLE, user_dropout=0.3, empty=empty, dropout=0.5)
    assert torch.equal(again.conditions.users, batch.conditions.users)


def policy_of(**options):
    return Denoiser(unet(**options))


LIKELIHOOD = ElboLikelihood(schedule=SCHEDULE)


def test_the_reference_is_the_base_and_leaves_the_policy_as_it_was():
    policy, base = policy_of(), Denoiser(TINY["sdxl"]().unet)
    batch = batch_of(["person 1", "person 2"], users=TABLE)
    before = content_hash(policy)
    expected = LIKELIHOOD.terms(base, replace(batch, conditions=replace(batch.conditions, users=None)))
    policy.train()
    assert torch.equal(UserOff()(LIKELIHOOD, policy, batch), expected)
    own = LIKELIHOOD.terms(policy, batch)
    assert own.requires_grad
    assert not torch.equal(own, expected)
    assert (policy.training, switch_of(policy).on) == (True, True)
    assert content_hash(policy) == before
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == set(trained(policy))
    inside = []

    def fails():
        with UserOff().active(policy):
            inside.extend([torch.is_grad_enabled(), policy.training, switch_of(policy).on])
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        fails()
    assert inside == [False] * 3
    assert (policy.training, switch_of(policy).on) == (True, True)
    # A reference of those at hand would be the wrong one: a copy sees the user.
    assert torch.equal(FrozenCopy.of(policy)(LIKELIHOOD, policy, batch), own)
    with pytest.raises(ValueError, match="attends to no user"):
        UserOff()(LIKELIHOOD, base, batch)


def test_a_copy_has_a_switch_of_its_own():
    policy = policy_of()
    copied = FrozenCopy.of(policy).model
    with UserOff().active(policy):
        assert switch_of(copied).on
    switches = {id(m.switch) for m in copied.modules() if isinstance(m, UserAttention)}
    assert switches == {id(switch_of(copied))} != {id(switch_of(policy))}


def write_data(folder, family="sdxl", *, persons=PERSONS, num_prompts=6, nobody=0):
    """Pairs of a picture of high and one of low first channel; persons of odd number prefer the other one."""
    draw = seeded(5)

    def prompt():
        pooled = torch.randn(PROJECTION, generator=draw) if family == "sdxl" else None
        return EncodedPrompt(torch.randn(MAX_TOKENS, WIDTH[family], generator=draw), pooled)

    writer = ShardWriter(folder, {"made": family}, empty=prompt())
    contexts = []
    for j in range(num_prompts):
        latents = 0.5 * torch.randn(2, 4, LATENT, LATENT, generator=draw)
        latents[:, 0] += torch.tensor([1.0, -1.0]).view(2, 1, 1)
        judges = [*persons, *[None] * nobody]
        for i, person in enumerate(judges):
            order = [0, 1] if i % 2 == 0 else [1, 0]
            contexts.append(
                EncodedContext(
                    id=f"{j}-{i}",
                    source=f"made[{j}-{i}]",
                    kind="pair",
                    prompt=f"prompt {j}",
                    group=person,
                    latents=latents[order],
                    time_ids=((32, 32, 0, 0, 32, 32),) * 2,
                    contents=tuple(f"{j}-{k}" for k in order),
                    relevance=(1.0, 0.0),
                )
            )
    writer.write(contexts, {prompt_hash(f"prompt {j}"): prompt() for j in range(num_prompts)})
    writer.finish({"family": family})
    return folder


def opposite_users(width=4):
    """Vectors of one sign for those of even number, of the other for the others, with noise of their own."""
    signs = {name: 1.0 - 2.0 * (i % 2) for i, name in enumerate(PERSONS)}
    return Users(
        {n: s + 0.2 * torch.randn(1, width, generator=seeded(i)) for i, (n, s) in enumerate(signs.items())}
    )


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("persons")
    for family in ("sd15", "sdxl", "sd3"):
        write_model(TINY[family](), folder / family)
    write_data(folder / "data")
    opposite_users().save(folder / "users.safetensors")
    return folder


def loaded(folder, **options):
    lines = []
    persons = options.pop("persons", None)
    data = load_data(
        DataConfig(source=str(folder), **options), ["pair"], seed=3, report=lines.append, persons=persons
    )
    return data, lines


def people(view):
    return {e.group for e in view}


def prompts(view):
    return {e.id.split("-")[0] for e in view}


def test_examples_say_whose_they_are(material):
    data, _ = loaded(material / "data", eval_share=0.0)
    assert people(data.train) == set(PERSONS)
    assert all(PERSONS[int(e.id.split("-")[1])] == e.group for e in data.train)


def test_no_person_is_on_both_sides_of_a_split_by_person(material):
    data, _ = loaded(material / "data", split_by="group", eval_share=0.3)
    assert people(data.train) | people(data.held_out) == set(PERSONS)
    assert not people(data.train) & people(data.held_out)


def test_a_split_by_both_learns_from_neither_a_new_person_nor_a_new_prompt(material):
    data, lines = loaded(material / "data", split_by="both", eval_share=0.3)
    assert data.held_out is not None
    assert not people(data.train) & people(data.held_out)
    assert not prompts(data.train) & prompts(data.held_out)
    taken = len(data.train) + len(data.held_out)
    learnt = len(people(data.train)) * len(prompts(data.train))
    assert (len(data.train), 0 < taken < 72) == (learnt, True)
    assert f"data: {72 - taken} examples left out by data.split_by=both" in lines
    assert set(data.eval_clusters) == people(data.held_out)


def test_contexts_of_nobody_in_the_table_are_left_out(tmp_path):
    write_data(tmp_path / "data", nobody=2, num_prompts=3)
    known = Users({name: torch.ones(1, 2) for name in PERSONS[:5]})
    data, lines = loaded(tmp_path / "data", eval_share=0.0, persons=known)
    assert people(data.train) == set(PERSONS[:5])
    assert len(data.train) == 15
    assert f"data: {3 * 9} contexts of nobody in model.persons.users left out" in lines
    # Nobody's contexts are in nobody's way where they are left out.
    split, _ = loaded(tmp_path / "data", eval_share=0.3, persons=known, split_by="group")
    assert people(split.train) <= set(PERSONS[:5])
    with pytest.raises(ValueError, match="split_by=both, but not every record names a person"):
        loaded(tmp_path / "data", split_by="both")


def configuration(material, *, family="sdxl", **parts):
    groups = {
        "model": {
            "name_or_path": str(material / family),
            "lora": None,
            "persons": PersonsConfig(users=str(material / "users.safetensors")),
            "reference": "user_off",
        },
        "data": {"source": str(material / "data"), "split_by": "group", "eval_share": 0.3, "dropout": 0.0},
        "optim": {"lr": 5e-2, "batch_size": 16, "micro_batch_size": 16, "num_steps": 40, "warmup": 0.0},
    }
    settings = {name: values | parts.pop(name, {}) for name, values in groups.items()}
    return DiffusionConfig(
        model=ModelConfig(**settings["model"]),
        data=DataConfig(**settings["data"]),
        objective=ObjectiveConfig(name="dpo", options={"beta": 200.0}),
        optim=OptimConfig(**settings["optim"]),
        run=RunConfig(output_dir="unused", seed=5),
        evaluation=EvaluationConfig(micro_batch_size=16),
        **parts,
    )


def make(config, folder):
    lines = []
    run = set_up(
        config,
        config.objective.terms(),
        device=torch.device("cpu"),
        cache_dir=folder,
        root=folder,
        report=lines.append,
    )
    return run, lines


def steps(run, config, num):
    accelerator, meter, losses = Accelerator(cpu=True), Meter(torch.device("cpu")), []
    learner = make_learner(run.policy, config.optim, accelerator)
    for _ in range(num):
        train_step(run.task, learner, config.optim, accelerator, seed=1, num_steps=num, meter=meter)
        losses.append(meter.read(lambda t: t)["loss"])
    return losses


def margins(run, view, users):
    """Implicit reward margin of every example, averaged over times and noise."""
    examples, noise = list(view), NoiseConfig(num_draws=16, stratified=True)
    collate = Collator(schedule=SCHEDULE, users=users, noise=noise)
    batch = collate(examples, [Draw(i, -1, i) for i in range(len(examples))])
    with torch.no_grad():
        own = LIKELIHOOD.terms(run.policy, batch).sum(-1)
        ref = UserOff()(LIKELIHOOD, run.policy, batch).sum(-1)
    chosen, rejected = batch.slots.T
    return (own - ref)[chosen] - (own - ref)[rejected]


def test_two_tastes_for_the_same_pictures_are_learnt_and_carry_over_to_new_persons(material, tmp_path):
    config = configuration(material)
    run, lines = make(config, tmp_path)
    assert f"persons: 12 with vectors; pictures are drawn for '{run.data.held_out[0].group}'" in lines
    losses = steps(run, config, 40)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    # What half of the people like the other half do not: without users the loss could not fall.
    assert sum(losses[-5:]) / 5 < 0.55
    table = opposite_users()
    others = Users({name: -value for name, value in table.vectors.items()})
    assert {int(name.split()[1]) % 2 for name in people(run.data.held_out)} == {0, 1}
    for view in (run.data.train, run.data.held_out):
        assert margins(run, view, table).gt(0).all()
        assert margins(run, view, others).lt(0).all()


def trained_weights(material, folder, **parts):
    config = configuration(material, **parts)
    run, _ = make(config, folder)
    accelerator = Accelerator(cpu=True)
    fill_references(run, accelerator, report=lambda line: None, bar=no_bar)
    losses = steps(run, config, 3)
    return losses, {n: p.detach().clone() for n, p in trained(run.policy).items()}


def test_neither_micro_batches_nor_cached_references_change_what_is_learnt(material, tmp_path):
    dropping = PersonsConfig(users=str(material / "users.safetensors"), dropout=0.3)
    # Adam's division makes rounding of tiny gradients large.
    optim = {"num_steps": 3, "eps": 1e-2}
    losses, weights = trained_weights(material, tmp_path, optim=optim, model={"persons": dropping})
    cut = trained_weights(
        material, tmp_path, optim=optim | {"micro_batch_size": 3}, model={"persons": dropping}
    )
    cached = trained_weights(
        material, tmp_path, optim=optim, model={"persons": dropping, "cache_reference": True}
    )
    for others, found in (cut, cached):
        assert others == pytest.approx(losses, abs=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-3)
    assert max(float(value.abs().max()) for name, value in weights.items() if "to_v" in name) > 1e-3


def test_a_run_is_what_its_settings_say(material, tmp_path):
    few = Users({name: TABLE[name] for name in PERSONS[:9]})
    few.save(tmp_path / "few.safetensors")
    persons = PersonsConfig(users=str(tmp_path / "few.safetensors"), scale=0.5, dropout=0.25)
    run, lines = make(configuration(material, model={"persons": persons}), tmp_path)
    assert "data: 18 contexts of nobody in model.persons.users left out" in lines
    assert people(run.data.train) | people(run.data.held_out) == set(few.vectors)
    assert switch_of(run.policy).scale == 0.5
    assert (run.task.collate.user_dropout, run.eval_task.collate.user_dropout) == (0.25, 0.0)
    assert run.references == {"frozen": UserOff()}
    changed = {"persons": persons, "cache_reference": True}
    cached, _ = make(configuration(material, model=changed), tmp_path)
    assert cached.references["frozen"].source == UserOff()


def test_another_table_of_users_is_other_data(material, tmp_path):
    first, _ = make(configuration(material), tmp_path)
    TABLE.save(tmp_path / "other.safetensors")
    changed = PersonsConfig(users=str(tmp_path / "other.safetensors"), shown="person 3")
    second, lines = make(configuration(material, model={"persons": changed}), tmp_path)
    assert first.data.fingerprint != second.data.fingerprint
    assert "persons: 12 with vectors; pictures are drawn for 'person 3'" in lines
    assert torch.equal(switch_of(second.policy).shown, TABLE["person 3"])
    stranger = PersonsConfig(users=str(tmp_path / "other.safetensors"), shown="zoe")
    with pytest.raises(ValueError, match="no user 'zoe'"):
        make(configuration(material, model={"persons": stranger}), tmp_path)
    with pytest.raises(ValueError, match="this model is sd3"):
        make(configuration(material, family="sd3"), tmp_path)


def drawn(pipe, vectors, **options):
    with drawn_for(pipe, vectors):
        return plain_drawn(pipe, **options)


def plain_drawn(pipe, **options):
    images = generate(pipe, ["a red cat", "a dog"], Sampling(**{"num_steps": 3, "guidance": 3.0} | options))
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_pictures_are_drawn_for_a_user(family):
    pipe = TINY[family]()
    base = plain_drawn(pipe)
    add_persons(pipe.unet, width=5, generator=seeded())
    first, second = users_of(2, seed=4)
    assert drawn(pipe, first) == base
    move(pipe.unet, 1.0)
    one, other = drawn(pipe, first), drawn(pipe, second)
    assert len({tuple(x) for x in (base, one, other)}) == 3
    assert plain_drawn(pipe) == base
    assert drawn(pipe, torch.zeros(1, 5)) == base
    assert drawn(pipe, mixed(first, second, 0.0)) == one
    assert drawn(pipe, mixed(first, second, 1.0)) == other
    assert drawn(pipe, mixed(first, second, 0.5)) not in (one, other)
    with pytest.raises(RuntimeError, match="halfway"), drawn_for(pipe, first):
        raise RuntimeError("halfway")
    assert switch_of(pipe.unet).shown is None


def test_both_halves_of_guidance_see_the_user():
    model, vectors = unet(), users_of(1)[0]
    with drawn_for(model, vectors):
        found = said(model)
    assert torch.equal(found, said(model, users=vectors.expand(2, 1, 5)))


def test_exported_attention_comes_back_in_a_pipeline_and_in_training(tmp_path):
    policy = unet(scale=0.8)
    path = export_persons(policy, tmp_path)
    names = load_file(path).keys()
    assert all(n.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) for n in names)
    assert len(names) == 2 * len(user_attentions(policy))
    fresh = TINY["sdxl"]().unet
    load_persons(fresh, tmp_path)
    users = users_of(2)
    assert torch.equal(said(fresh, users=users), said(policy, users=users))
    again = unet(scale=0.8, moved=False)
    held = dict(again.named_parameters())
    load_exported(again, tmp_path)
    assert torch.equal(said(again, users=users), said(policy, users=users))
    # In place, so that an optimizer made before trains them.
    assert all(held[n] is p for n, p in again.named_parameters())


def test_files_that_do_not_fit_are_refused(tmp_path):
    export_persons(unet(), tmp_path)
    with pytest.raises(ValueError, match=r"has scale=1, the model's is 0.5"):
        load_persons(unet(scale=0.5), tmp_path)
    with pytest.raises(ValueError, match="does not fit the model"):
        load_persons(unet(width=6), tmp_path)
    with pytest.raises(ValueError, match=r"does not hold persons\.safetensors"):
        load_persons(unet(), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="attends to no user, so there is nothing"):
        export_persons(TINY["sdxl"]().unet, tmp_path)
    with pytest.raises(ValueError, match="the model attends to users: export that"):
        export_full(unet(), tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "persons.safetensors")
    with pytest.raises(ValueError, match="does not say its width and scale"):
        load_persons(unet(), tmp_path)


def test_the_recipe_trains_evaluates_and_exports(material, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPTYCH_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "run"
    settings = {
        "config": RECIPE,
        "model.name_or_path": material / "sdxl",
        "model.variant": "null",
        "model.dtype": "float32",
        "model.persons.users": material / "users.safetensors",
        "data.source": material / "data",
        "data.eval_share": 0.4,
        "optim.lr": 0.05,
        "optim.batch_size": 8,
        "optim.micro_batch_size": 4,
        "optim.num_steps": 4,
        "optim.precision": "float32",
        "run.output_dir": out,
        "run.log_every": 1,
        "run.eval_every": 2,
        "sample.num_prompts": 1,
        "sample.num_per_prompt": 1,
        "sample.num_steps": 2,
    }
    args = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    assert train_diffusion.main(args) == 0
    logged = list(read_metrics(out / "metrics.jsonl"))
    losses = [e["loss"] for e in logged if e["split"] == "train"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(losses) == 4
    evaluations = [e for e in logged if e["split"] == "eval"]
    assert evaluations[0]["drift"] == 0 < evaluations[-1]["drift"]
    weights = load_file(out / "model" / "persons.safetensors")
    assert all(float(v.abs().max()) > 0 for v in weights.values())
    assert not (out / "model" / "unet").exists()
    # The card's lines load what was learnt, for somebody.
    (shown,) = (p.read_bytes() for p in (out / "samples" / "base").glob("*.png"))
    (aligned,) = (p.read_bytes() for p in (out / "samples" / "step-000004").glob("0*.png"))
    assert shown != aligned
    card = (out / "model" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert 'load_persons(pipe.unet, ".")' in code
    assert "with drawn_for(pipe, next(iter(" in code
    monkeypatch.chdir(out / "model")
    scope = {}
    exec(code.replace("num_inference_steps=30", "num_inference_steps=2"), scope)
    assert scope["image"].size == (32, 32)


def test_the_lines_of_the_card_name_the_person_that_is_shown(material, tmp_path):
    shown = PersonsConfig(users=str(material / "users.safetensors"), shown="person 3")
    run, _ = make(configuration(material, model={"persons": shown}), tmp_path)
    assert "with drawn_for(pipe, users['person 3']):\n    image = pipe(" in snippet(run.scene())
