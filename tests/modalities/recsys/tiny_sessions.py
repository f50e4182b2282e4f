"""A small catalogue, small session models and histories for the tests."""

import torch

from triptych.modalities.recsys.features import Sides
from triptych.modalities.recsys.jagged import Jagged
from triptych.modalities.recsys.model import ExpertsConfig, ModelConfig, SessionPolicy, Sessions
from triptych.modalities.recsys.semantic_ids import SemanticIds
from triptych.modalities.recsys.setup import make_policy

SIZES = (4, 3, 3)
NUM_ITEMS = 20


def codes(num_items=NUM_ITEMS, sizes=SIZES, seed=0):
    """Different semantic ids for every item, [I, L]."""
    every = torch.cartesian_prod(*[torch.arange(k) for k in sizes])
    return every[torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:num_items]]


def policy(*, context="bidirectional", num_items=NUM_ITEMS, seed=0, **options):
    """A session model in evaluation mode, with weights large enough to have opinions."""
    torch.manual_seed(seed)
    settings = {
        "context": context,
        "width": 16,
        "heads": 2,
        "encoder_layers": 0 if context == "lazy" else 2,
        "decoder_layers": 2,
        "dropout": 0.1,
        "kernel": "reference",
    }
    ids = SemanticIds(codes_IL=codes(num_items), sizes=SIZES, items=tuple(map(str, range(num_items))))
    made = make_policy(ModelConfig(**(settings | options)), ids, Sides(num_items=num_items))
    assert isinstance(made, SessionPolicy)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
    return made.eval()


EXPERTS = ExpertsConfig(num_experts=4, top_k=2)
FORMS = {
    "bidirectional": {},
    "causal": {"context": "causal"},
    "lazy": {"context": "lazy", "kv_heads": 1},
    "codes": {"history_tokens": "codes"},
    "separated": {"history_tokens": "separated"},
    "experts": {"experts": EXPERTS},
    "item vectors": {"item_vectors": True},
    "tied": {"tie": True},
}


def histories(*lengths, seed=1):
    """Random histories of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return Jagged.of([torch.randint(NUM_ITEMS, (n,), generator=generator) for n in lengths])


def sessions(history, num, items=2, seed=2):
    """`num` random sessions of every user, which see the whole history."""
    generator = torch.Generator().manual_seed(seed)
    total = history.num_rows * num
    return Sessions(
        items=torch.randint(NUM_ITEMS, (total, items), generator=generator),
        user=torch.arange(history.num_rows).repeat_interleave(num),
        seen=history.lengths.repeat_interleave(num),
        most=num,
    )
