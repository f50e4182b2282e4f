import math
from dataclasses import replace

import pytest
import torch
from tiny_sessions import NUM_ITEMS, policy

from triptych.modalities.recsys.likelihood import (
    Collator,
    Example,
    SessionLikelihood,
    cropped,
    per_sample,
)
from triptych.objectives import LabelledLogLik, ListLogLik, LogLik, PairLogLik, build, with_reference
from triptych.training.order import Draw


def example(kind="pair", num=2, length=5, items=2, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator}
    return Example(
        id=f"{kind}{seed}",
        source=f"log:{seed}",
        kind=kind,
        history=torch.randint(NUM_ITEMS, (length,), **draw),
        sessions=torch.randint(NUM_ITEMS, (num, items), **draw),
        seen=torch.full((num,), length),
        relevance=tuple(float(num - i) for i in range(num)),
        **options,
    )


def test_a_session_is_the_sum_of_its_codes_and_counts_them():
    model, likelihood = policy(), SessionLikelihood()
    batch = Collator(levels=3)([example(seed=1), example(seed=2, length=3)])
    terms = likelihood.terms(model, batch)
    found = likelihood(model, batch)
    assert isinstance(found, PairLogLik)
    assert terms.shape == (4, 6)
    torch.testing.assert_close(found.chosen.logp, terms.sum(1)[[0, 2]])
    torch.testing.assert_close(found.rejected.logp, terms.sum(1)[[1, 3]])
    assert found.chosen.count.tolist() == [6.0, 6.0]


def test_dpo_at_its_reference_is_log_two_and_one_step_raises_the_margin():
    model, likelihood, dpo = policy(), SessionLikelihood(), build("dpo", beta=0.1)
    batch = Collator(levels=3)([example(seed=s) for s in range(4)])
    frozen = likelihood(model, batch)
    loss = dpo(with_reference(likelihood(model, batch), frozen))
    assert loss.tolist() == pytest.approx([math.log(2)] * 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    loss.sum().backward()
    optimizer.step()
    after = likelihood(model, batch)
    before = frozen.chosen.logp - frozen.rejected.logp
    # What the step is downhill on is the mean over pairs; one pair may pay for another.
    assert (after.chosen.logp - after.rejected.logp).mean() > before.mean()


def test_a_pair_of_equal_sessions_has_no_gradient():
    model, likelihood = policy(), SessionLikelihood()
    one = example(seed=3)
    same = Example(
        id="same",
        source="log:1",
        kind="pair",
        history=one.history,
        sessions=one.sessions[:1].repeat(2, 1),
        seen=one.seen,
    )
    batch = Collator(levels=3)([same])
    pair = likelihood(model, batch)
    build("dpo", beta=0.1)(with_reference(pair, likelihood(model, batch))).sum().backward()
    assert max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None) < 1e-6


def test_lists_of_different_lengths_are_masked():
    model = policy()
    batch = Collator(levels=3)([example("list", 4, seed=1), example("list", 2, seed=2)])
    found = SessionLikelihood()(model, batch)
    assert isinstance(found, ListLogLik)
    assert found.valid().tolist() == [[True] * 4, [True, True, False, False]]
    assert found.relevance.tolist() == [[4.0, 3.0, 2.0, 1.0], [2.0, 1.0, 0.0, 0.0]]


def test_labelled_sessions_carry_their_label():
    found = SessionLikelihood()(policy(), Collator(levels=3)([example("labelled", 1, seed=1)]))
    assert isinstance(found, LabelledLogLik)
    assert found.desirable.tolist() == [True]


def next_example(seed, places, length=6):
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(NUM_ITEMS, (length,), generator=generator)
    return Example(
        id=f"u{seed}",
        source=f"user {seed}",
        kind="next",
        history=history,
        sessions=torch.randint(NUM_ITEMS, (len(places), 1), generator=generator),
        seen=torch.tensor(places),
    )


def test_every_place_of_every_user_weighs_the_same():
    model = policy(context="causal")
    examples = [next_example(1, [1, 2, 3, 4]), next_example(2, [2, 5])]
    batch = Collator(levels=3, per_sample=3.0)(examples)
    found = SessionLikelihood()(model, batch)
    assert isinstance(found, LogLik)
    loss = build("sft", reduce="sum")(found)
    folded = per_sample(loss, batch)
    torch.testing.assert_close(folded, torch.stack([loss[:4].sum() / 3, loss[4:].sum() / 3]))
    # Two samples of 3 places on average: the mean over samples is the mean over places.
    torch.testing.assert_close(folded.mean(), loss.mean())


def test_keys_tell_what_is_scored():
    one, other = next_example(1, [1, 2]), next_example(1, [2, 3])
    batch = Collator(levels=3)([one, one, other])
    assert batch.keys[:2] == batch.keys[2:4]
    assert len(set(batch.keys)) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seen": torch.tensor([9, 9])}, "log:0: seen should hold 2 counts of at most 5"),
        ({"sessions": torch.tensor([[-1, 2], [1, 2]])}, "every session needs an item"),
        (
            {"kind": "pair", "sessions": torch.tensor([[1], [2], [3]]), "seen": torch.ones(3)},
            "2 sessions, not 3",
        ),
    ],
)
def test_an_example_that_makes_no_sense_is_refused(options, message):
    plain = example()
    fields = {n: getattr(plain, n) for n in ("id", "source", "kind", "history", "sessions", "seen")}
    with pytest.raises(ValueError, match=message):
        Example(**(fields | options))


def test_kinds_are_not_mixed():
    with pytest.raises(ValueError, match="one kind"):
        Collator(levels=3)([example("pair"), example("list")])


def test_a_crop_leaves_out_the_oldest_items_and_sessions_that_would_see_nothing():
    history = torch.arange(10)
    seen = torch.tensor([1, 4, 10])
    whole = Example(
        id="a", source="a", kind="next", history=history, sessions=torch.tensor([[1], [4], [9]]), seen=seen
    )
    found = [cropped(whole, 0.9, torch.Generator().manual_seed(seed)) for seed in range(200)]
    lengths = {len(e.history) for e in found}
    assert lengths == set(range(2, 11))
    for example in found:
        dropped = 10 - len(example.history)
        assert example.history.tolist() == history[dropped:].tolist()
        assert example.seen.tolist() == [s - dropped for s in seen.tolist() if s > dropped]
        assert example.sessions.flatten().tolist() == [1, 4, 9][-len(example.seen) :]
    # The one session of this example sees one item, which stays.
    short = replace(whole, sessions=torch.tensor([[1]]), seen=torch.tensor([1]))
    assert all(cropped(short, 0.9, torch.Generator().manual_seed(s)) is short for s in range(9) if s)


def test_every_epoch_crops_anew_and_the_same_epoch_alike():
    whole = Example(
        id="a",
        source="a",
        kind="next",
        history=torch.arange(50),
        sessions=torch.tensor([[49]]),
        seen=torch.tensor([50]),
    )
    collate = Collator(levels=1, crop=0.8)
    lengths = [
        len(collate([whole], [Draw(index=0, epoch=0, seed=seed)]).history.values) for seed in (1, 2, 3, 1)
    ]
    assert lengths[0] == lengths[3]
    assert len(set(lengths)) > 1
