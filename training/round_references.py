"""Reference values of a round's samples: what is known is put in place, what is missing is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import gather_object

from triptych.training.fit import Session
from triptych.training.groups import Group
from triptych.training.loop import Task
from triptych.training.order import Draw, key, longest_first
from triptych.training.references import Cached
from triptych.training.round_state import main_slot
from triptych.training.stages import Live, Part, Stage


def remember(
    references: Mapping[str, Cached],
    new: Sequence[Group],
    past: Sequence[Group],
    part: Part,
    stage: Stage,
    live: Live,
) -> None:
    """Put what is known already into the references' stores: nothing that was computed is computed again.

    The reference 'stage' that became the policy at this round's start is the policy that drew, so its values
    are the log-probs of drawing. Of past groups only the values of the reference that never moves hold.
    """
    keep = stage.keep
    as_drawn = live.round == 0 or (keep.stage == "each_round" and live.round % keep.every == 0)
    for slot, reference in references.items():
        for g in (*new, *(past if slot == "frozen" else ())):
            table, own = (g.ref, range(g.size)) if slot == main_slot(part) else (None, range(0))
            if table is None and slot == "stage" and as_drawn:
                # Units that others put in between have no log-prob of drawing; they count nothing either.
                table, own = g.logp, [i for i in range(g.size) if g.origin[i] in ("policy", "beam")]
            if table is None or not len(own):
                continue
            names = [live.port.key(g.context, g.candidates[i]) for i in own]
            length = (g.mask * torch.arange(1, g.mask.shape[1] + 1)).amax(-1)
            rows = torch.tensor(list(own))
            reference.store.add(reference.keys_of(names), table[rows], length[rows])


def fill_references(task: Task, live: Live, session: Session, seed: int) -> None:
    """Compute what the references lack, in batches that no interruption changes; ranks share the work."""
    accelerator, size = session.accelerator, session.config.micro_batch_size
    order = longest_first(task.lengths)
    cuts = [order[i : i + size] for i in range(0, len(order), size)]
    for reference in task.references.values():
        assert isinstance(reference, Cached)
        known = set(reference.store.keys())
        with accelerator.autocast():
            for cut in cuts[accelerator.process_index :: accelerator.num_processes]:
                draws = [Draw(i, 0, key("sample", seed, 0, i)) for i in cut]
                batch = task.collate([task.examples[i] for i in cut], draws)
                if all(k in known for k in reference.keys(batch)):
                    continue
                reference.fill(task.likelihood, live.policy, [batch], live.device)
        if accelerator.num_processes > 1:
            for found in gather_object([reference.store.vectors(set(reference.store.keys()) - known)]):
                reference.store.merge(found)
