"""The port of tabular policies, and a round's way from a source to an objective through it."""

import json

import pytest
import torch
from tabular_cases import D, like, policy, same, tuples

from triptych.modalities.tabular import exact
from triptych.modalities.tabular.judges import JUDGES
from triptych.modalities.tabular.port import Arm, Context, TabularPort
from triptych.modalities.tabular.sources import SOURCES
from triptych.objectives import PairLogLik, UnitLogLik, build
from triptych.objectives.kl import exact_kl
from triptych.training.assembly import RoundLikelihood, SampleCollator
from triptych.training.groups import Sample
from triptych.training.references import FrozenCopy
from triptych.training.stages import Live, Port

PORT: Port = TabularPort(num_actions=3)
ASKED = Context(key="asked")
GRADED = Context(key="graded", prefix=(1,), candidates=(Arm((0,)), Arm((2,))), relevance=(1.0, 0.0))


def test_a_batch_has_the_candidates_in_order_with_their_lengths_and_names():
    batch = PORT.collate([(ASKED, [Arm((0, 2)), Arm((2,))]), (GRADED, [Arm((0,))])], [0, 0])
    assert batch.ids == ("asked", "graded")
    assert batch.counts.tolist() == [2, 1, 1]
    assert len(set(batch.keys)) == 3
    assert PORT.key(ASKED, Arm((2,))) == batch.keys[1] == PORT.key(Context(key="again"), Arm((2,)))
    assert PORT.key(Context(key="asked", index=1), Arm((2,))) != batch.keys[1]
    assert PORT.key(GRADED, Arm((2,))) != batch.keys[1]
    assert PORT.length(ASKED, [Arm((0, 2)), Arm((2,))]) == 3
    assert not PORT.bound


def test_terms_are_the_policys_and_begin_after_the_prefix():
    p = policy()
    batch = PORT.collate([(ASKED, [Arm((1, 0)), Arm((2,))]), (GRADED, [Arm((0,))])], [0, 0])
    found = PORT.terms(p, batch.to(torch.device("cpu")))
    log = p.conditionals()[0]
    same(found, torch.stack([torch.stack([log[0, 1], log[2, 0]]), torch.stack([log[0, 2], log.new_zeros(())]),
                             torch.stack([log[2, 0], log.new_zeros(())])]))  # fmt: skip


def test_readouts_are_exact_at_every_unit():
    p = policy(critic=True)
    ref = like(p, seed=1).conditionals().detach()
    assert p.critic is not None
    with torch.no_grad():
        p.critic.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=D))
    port = TabularPort(num_actions=3, reference=ref)
    batch = port.collate([(ASKED, [Arm((1, 0)), Arm((2,))])], [0])
    found = port.readouts(p, batch, frozenset({"value", "entropy", "kl"}))
    same(found["logp"], port.terms(p, batch))
    same(found["value"], torch.tensor([[0.1, 0.3], [0.1, 0.0]], dtype=D))
    kl, log = exact_kl(p.conditionals(), ref)[0], p.conditionals()[0]
    same(found["kl"], torch.stack([torch.stack([kl[0], kl[2]]), torch.stack([kl[0], kl.new_zeros(())])]))
    assert found["entropy"][0, 1].item() == pytest.approx(-(log[2].exp() * log[2]).sum().item())
    assert port.readouts(p, batch, frozenset()).keys() == {"logp"}


def test_a_readout_that_is_not_there_is_refused():
    batch = PORT.collate([(ASKED, [Arm((2,))])], [0])
    with pytest.raises(ValueError, match="no reference to measure 'kl' to"):
        PORT.readouts(policy(), batch, frozenset({"kl"}))
    with pytest.raises(ValueError, match="no readout 'value'"):
        PORT.readouts(policy(), batch, frozenset({"value"}))


@pytest.mark.parametrize("actions", [(), (3,), (0, -1)])
def test_unknown_actions_are_refused_with_the_context(actions):
    with pytest.raises(ValueError, match=r"context asked: candidate .* should be of actions from 0 to 2"):
        PORT.collate([(ASKED, [Arm(actions)])], [0])


def test_records_come_back_from_a_checkpoint():
    for kind, record in (("context", GRADED), ("context", ASKED), ("candidate", Arm((0, 2)))):
        packed = json.loads(json.dumps(PORT.pack(record)))
        assert PORT.unpack(kind, packed) == record


def round_of(p, port=PORT) -> Live:
    references = {"frozen": FrozenCopy.of(like(p, seed=1))}
    return Live(policy=p, port=port, references=references, device=torch.device("cpu"), seed=0)


def test_everything_through_a_round_is_the_population_gradient():
    """Source, judge, samples, collation and objective: sum over candidates of chance * loss."""
    p = policy()
    live = round_of(p)
    reward = [0.3, -1.0, 0.7, 1.4, 0.1, -0.4, 0.9]
    (group,) = SOURCES.build("everything")([ASKED], live)
    (verdict,) = JUDGES.build("table", {"reward": [reward]})([group], live)
    assert verdict.score is not None
    assert verdict.score.tolist() == pytest.approx(reward)
    advantage = verdict.score.unsqueeze(-1).expand(group.mask.shape)
    sample = Sample(kind="units", group=0, candidates=tuple(range(7)), fields={"advantage": advantage})
    batch = SampleCollator(PORT, [group])([sample])
    units = RoundLikelihood(PORT)(p, batch)
    assert isinstance(units, UnitLogLik)
    assert group.logp is not None
    loss = (group.logp.sum(-1).exp() * build("reinforce")(units)).sum()
    truth = exact.expected(p, torch.tensor(reward, dtype=D))
    assert torch.allclose(exact.gradient(loss, p), -exact.gradient(truth, p), atol=1e-6)


def test_pairs_of_a_round_have_the_reference_of_their_slot():
    p = policy()
    live = round_of(p)
    (group,) = SOURCES.build("everything")([ASKED], live)
    drawn, _ = tuples(p, 2)
    samples = [Sample(kind="pair", group=0, candidates=(int(i), int(j))) for i, j in drawn]
    batch = SampleCollator(PORT, [group])(samples)
    likelihood = RoundLikelihood(PORT)
    pair = likelihood(p, batch)
    ref = likelihood.assemble(live.references["frozen"](likelihood, p, batch), batch)
    assert isinstance(pair, PairLogLik)
    assert isinstance(ref, PairLogLik)
    same(pair.chosen.logp, p.distribution()[drawn[:, 0]])
    same(ref.rejected.logp, like(p, seed=1).distribution()[drawn[:, 1]])
