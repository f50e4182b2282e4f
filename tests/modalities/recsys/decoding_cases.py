"""A decoding that is a table of random conditionals of whole prefixes, and exhaustive search over it."""

import functools
import itertools
import math
import random
from collections import Counter
from dataclasses import replace

import torch

from triptych.modalities.recsys.trie import Trie


@functools.cache
def conditional(user, prefix, size):
    """Log-probs of the next code after a prefix of codes, [K]."""
    numbers = random.Random(f"{user} {prefix}")
    return torch.tensor([1.5 * numbers.gauss(0, 1) for _ in range(size)]).log_softmax(0)


class TableDecoding:
    """Rows of the users named; keeps every row's prefix as a tuple."""

    def __init__(self, users, sizes):
        self.users, self.sizes = list(users), sizes
        self.prefixes = [[()] for _ in self.users]
        self.widths = []

    def advance(self, parents_UW, codes_UW):
        if parents_UW is not None:
            assert parents_UW.shape == codes_UW.shape
            assert len(parents_UW) == len(self.users)
            size = self.sizes[len(self.prefixes[0][0]) % len(self.sizes)]
            assert ((codes_UW >= 0) & (codes_UW < size)).all()
            assert ((parents_UW >= 0) & (parents_UW < len(self.prefixes[0]))).all()
            pairs = zip(self.prefixes, parents_UW.tolist(), codes_UW.tolist(), strict=True)
            self.prefixes = [
                [rows[p] + (c,) for p, c in zip(parents, codes, strict=True)]
                for rows, parents, codes in pairs
            ]
        self.widths.append(len(self.prefixes[0]))
        size = self.sizes[len(self.prefixes[0][0]) % len(self.sizes)]
        found = zip(self.users, self.prefixes, strict=True)
        return torch.stack([torch.stack([conditional(u, p, size) for p in rows]) for u, rows in found])


def ids_of(codes_IL):
    """Items of every semantic id in order of item, {codes: [item, ...]}."""
    found = {}
    for item, codes in enumerate(codes_IL.tolist()):
        found.setdefault(tuple(codes), []).append(item)
    return found


def legal_sessions(codes_IL, *, num_items, no_repeats=True, forbidden=()):
    """Every session a user may get, {codes of all items end to end: its items}."""
    allowed = {k: [i for i in v if i not in forbidden] for k, v in ids_of(codes_IL).items()}
    found = {}
    for ids in itertools.product([k for k, v in allowed.items() if v], repeat=num_items):
        used, items = Counter(), []
        for key in ids:
            items.append(allowed[key][used[key]] if used[key] < len(allowed[key]) else None)
            used[key] += no_repeats
        if None not in items:
            found[sum(ids, ())] = items
    return found


def prefixes_of(sessions):
    """Codes that may follow each prefix, {prefix: {code, ...}}."""
    found = {}
    for codes in sessions:
        for at in range(len(codes)):
            found.setdefault(codes[:at], set()).add(codes[at])
    return found


def scores_of(user, prefix, sizes, legal, normalise):
    """Log-probs of the codes that may follow a prefix, {code: log-prob}."""
    logp = conditional(user, prefix, sizes[len(prefix) % len(sizes)])
    codes = sorted(legal[prefix])
    shift = logp[codes].logsumexp(0).item() if normalise == "children" else 0.0
    return {code: logp[code].item() - shift for code in codes}


def exhaustive(user, sizes, sessions, normalise="codebook"):
    """All sessions with their log-probs, best first, [(items, log-prob)]."""
    legal, found = prefixes_of(sessions), []
    for codes, items in sessions.items():
        parts = (scores_of(user, codes[:at], sizes, legal, normalise)[c] for at, c in enumerate(codes))
        found.append((items, math.fsum(parts)))
    return sorted(found, key=lambda pair: -pair[1])


def narrow(user, sizes, sessions, width, normalise="codebook"):
    """Beam search written out: prefixes extended by legal codes, the best kept, [(items, log-prob)]."""
    legal, beams = prefixes_of(sessions), [((), 0.0)]
    for _ in range(len(next(iter(sessions)))):
        longer = [
            ((*prefix, code), score + gain)
            for prefix, score in beams
            for code, gain in scores_of(user, prefix, sizes, legal, normalise).items()
        ]
        beams = sorted(longer, key=lambda pair: -pair[1])[:width]
    return [(sessions[codes], score) for codes, score in beams]


def random_codes(num_items, sizes, seed):
    """Semantic ids with collisions, [I, L]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randint(k, (num_items,), generator=generator) for k in sizes], 1)


def trie_in(form, codes_IL, sizes):
    """A trie whose levels all gather children padded, or all laid end to end ('ragged')."""
    trie = Trie.of(codes_IL, sizes)
    if form == "ragged":
        return replace(trie, levels=tuple(replace(x, table=None, complete=False) for x in trie.levels))
    assert all(level.table is not None for level in trie.levels)
    return trie


def blocked(rows):
    """Forbidden items of each user as offsets and items."""
    lengths = torch.tensor([len(row) for row in rows])
    items = torch.tensor([item for row in rows for item in row], dtype=torch.int64)
    return torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), items


def found_in(beams, user):
    """A user's sessions, [(items, log-prob)], without the places that hold none."""
    pairs = zip(beams.items_UWm[user].tolist(), beams.logp_UW[user].tolist(), strict=True)
    return [(items, logp) for items, logp in pairs if logp > -math.inf]


def assert_same(found, wanted):
    """Sessions and order alike, log-probs to float32's accuracy."""
    assert [items for items, _ in found] == [items for items, _ in wanted]
    got, want = ([logp for _, logp in pairs] for pairs in (found, wanted))
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), atol=1e-5, rtol=1e-5)
