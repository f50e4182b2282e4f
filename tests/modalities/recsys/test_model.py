import math

import pytest
import torch
from tiny_sessions import (
    FORMS,
    NUM_ITEMS,
    SIZES,
    codes,
    histories,
    policy,
    sessions,
)

from triptych.modalities.recsys.decoding import begin
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.model import ModelConfig, SessionPolicy, Sessions
from triptych.modalities.recsys.sasrec import SasRec

forms = pytest.mark.parametrize("form", FORMS)


def one_by_one(model, history, asked):
    """Every session alone with its user's seen history: what folding must equal."""
    rows = []
    for items, user, seen in zip(asked.items, asked.user, asked.seen, strict=True):
        start = int(history.offsets[user])
        alone = Jagged.of([history.values[start : start + int(seen)]])
        single = Sessions(items=items[None], user=torch.tensor([0]), seen=seen[None], most=1)
        rows.append(model(alone, single)[0])
    return torch.stack(rows)


@forms
def test_candidates_folded_into_one_query_score_as_a_row_each_with_equal_gradients(form):
    model = policy(**FORMS[form])
    history = histories(3, 7, 1)
    asked = sessions(history, 4)
    weight = torch.randn(len(asked.items), 6, generator=torch.Generator().manual_seed(3))
    found = {}
    for name, score in (("folded", model), ("alone", lambda h, s: one_by_one(model, h, s))):
        model.zero_grad()
        logps = score(history, asked)
        (logps * weight).sum().backward()
        found[name] = (logps, {n: p.grad.clone() for n, p in model.named_parameters()})
    torch.testing.assert_close(found["folded"][0], found["alone"][0], rtol=1e-4, atol=1e-5)
    for name, gradient in found["folded"][1].items():
        torch.testing.assert_close(gradient, found["alone"][1][name], rtol=2e-3, atol=2e-4, msg=name)


@forms
def test_step_by_step_decoding_gives_the_log_probs_of_the_forward_pass(form):
    model = policy(**FORMS[form])
    history = histories(3, 7, 1)
    asked = sessions(history, 2)
    expected = model(history, asked).view(3, 2, -1)
    labels = model.codes_of(asked.items).flatten(1).view(3, 2, -1)
    decoding = begin(model, history)
    logps = decoding.advance(None, None).expand(-1, 2, -1)
    parents = torch.zeros(3, 2, dtype=torch.int64)
    for place in range(labels.shape[-1]):
        code = labels[:, :, place]
        torch.testing.assert_close(
            logps.gather(2, code[:, :, None])[:, :, 0], expected[:, :, place], rtol=1e-4, atol=1e-5
        )
        if place + 1 < labels.shape[-1]:
            logps = decoding.advance(parents, code)
            parents = torch.arange(2).expand(3, 2)


def test_beams_that_change_places_take_their_caches_with_them():
    model, history = policy(), histories(4, 2)
    asked = sessions(history, 3, items=1)
    codes_UWL = model.codes_of(asked.items)[:, 0].view(2, 3, -1)
    straight, crossed = begin(model, history), begin(model, history)
    turned = torch.tensor([2, 0, 1])
    for decoding in (straight, crossed):
        decoding.advance(None, None)
        decoding.advance(torch.zeros(2, 3, dtype=torch.int64), codes_UWL[:, :, 0])
    one = straight.advance(torch.arange(3).expand(2, 3), codes_UWL[:, :, 1])
    two = crossed.advance(turned.expand(2, 3), codes_UWL[:, turned, 1])
    torch.testing.assert_close(one[:, turned], two)


@pytest.mark.parametrize("form", ["causal", "lazy"])
def test_a_session_sees_only_the_history_before_it(form):
    model = policy(**FORMS[form])
    history = histories(6)
    items = torch.tensor([[3], [5], [7]])
    asked = Sessions(
        items=items, user=torch.zeros(3, dtype=torch.int64), seen=torch.tensor([0, 2, 6]), most=3
    )
    together = model(history, asked)
    torch.testing.assert_close(together, one_by_one(model, history, asked), rtol=1e-4, atol=1e-5)
    changed = Jagged(history.values.roll(0).index_fill(0, torch.tensor([4]), 0), history.offsets, 6)
    other = model(changed, asked)
    torch.testing.assert_close(other[:2], together[:2])
    assert not torch.allclose(other[2], together[2])


def test_an_absent_item_of_a_shorter_session_counts_nothing():
    model, history = policy(), histories(4)
    asked = sessions(history, 1, items=2)
    short = Sessions(items=asked.items.clone(), user=asked.user, seen=asked.seen, most=1)
    short.items[0, 1] = -1
    long, found = model(history, asked), model(history, short)
    torch.testing.assert_close(found[0, :3], long[0, :3])
    assert found[0, 3:].tolist() == [0.0, 0.0, 0.0]


def test_the_probabilities_of_all_semantic_ids_sum_to_one_and_those_of_the_catalogue_to_less():
    every = torch.cartesian_prod(*[torch.arange(k) for k in SIZES])
    torch.manual_seed(0)
    whole = SessionPolicy(ModelConfig(width=16, heads=2, kernel="reference"), every, SIZES).eval()
    history = histories(5)
    asked = Sessions(
        items=torch.arange(len(every)).unsqueeze(1),
        user=torch.zeros(len(every), dtype=torch.int64),
        seen=torch.full((len(every),), 5),
        most=len(every),
    )
    total = whole(history, asked).detach().sum(1).exp()
    assert float(total.sum()) == pytest.approx(1, abs=1e-4)
    assert float(total[:NUM_ITEMS].sum()) < 1


def test_every_form_trains_every_weight():
    for form, options in FORMS.items():
        model = policy(**options).train()
        history = histories(3, 5)
        model(history, sessions(history, 2)).sum().backward()
        still = [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()]
        assert not still, (form, still)


def test_sasrec_scores_an_item_as_its_softmax_over_the_catalogue():
    torch.manual_seed(0)
    config = ModelConfig(kind="sasrec", context="causal", width=16, heads=2, kernel="reference")
    model = SasRec(config, NUM_ITEMS).eval()
    history = histories(4, 2)
    scores = model.scores(history)
    assert scores.exp().sum(-1).tolist() == pytest.approx([1.0, 1.0], abs=1e-5)
    asked = sessions(history, 2, items=1)
    torch.testing.assert_close(model(history, asked)[:, 0], scores[asked.user, asked.items[:, 0]])
    with pytest.raises(ValueError, match="sessions of 1 item, not of 2"):
        model(history, sessions(history, 1, items=2))


def test_an_untrained_model_is_about_as_unsure_as_its_codebooks_are_large():
    torch.manual_seed(0)
    model = SessionPolicy(ModelConfig(width=16, heads=2, kernel="reference"), codes(), SIZES).eval()
    history = histories(5, 5, 5)
    mean = float(-model(history, sessions(history, 50, items=1)).detach().sum(1).mean())
    assert mean == pytest.approx(sum(math.log(k) for k in SIZES), rel=0.25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 10, "heads": 4}, "model.width=10 must be an even multiple"),
        ({"kind": "sasrec"}, "model.kind=sasrec needs model.context=causal"),
        ({"context": "lazy"}, "set model.encoder_layers=0"),
        ({"encoder_layers": 0}, "needs model.encoder_layers of at least 1"),
        ({"heads": 4, "kv_heads": 3}, "model.kv_heads=3 must divide"),
        ({"dropout": 1.0}, "model.dropout=1.0"),
        ({"item_vectors": True, "history_tokens": "codes"}, "need model.history_tokens=sum, not codes"),
        ({"kind": "sasrec", "context": "causal", "user_vectors": True}, "has the items' vectors alone"),
        ({"tables": "torchrec"}, "model.tables=torchrec has nothing to hold"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**options)
