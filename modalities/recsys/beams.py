"""Beam search over sessions of items: any model that gives the next code's log-probs, held to real ids.

Shapes: U users, W rows (beams) of a user, V rows of the step after, M candidates, K codes of a level, L
levels, m items of a session, j items so far, X anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from triptych.modalities.recsys.trie import Children, Stock, Trie

Normalise = Literal["codebook", "children"]
Within = tuple[Tensor, Tensor]


class Decoding(Protocol):
    """One autoregressive decoding of U users; owns its cache."""

    def advance(self, parents_UW: Tensor | None, codes_UW: Tensor | None) -> Tensor:
        """Log-probs of the next code, [U, W, K_l] float32, normalised over the whole codebook of that level.

        First call: (None, None) -> [U, 1, K_0]. Later: row (u, w) continues row parents_UW[u, w] of the
        previous call with code codes_UW[u, w]; W may differ from call to call. After an item's last level
        comes level 0 of the next item.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Beams:
    """Sessions found for each user, best first. Where a user has fewer than W: -1, and a log-prob of -inf.

    items_UWm: int64. logp_UW: float32, falling. codes_UWmL: semantic ids. leaves_UWm: the same as leaves of
    the trie. terms_UWS: log-prob of every code over its whole codebook, S = m L; 0 where there is no session.
    """

    items_UWm: Tensor
    logp_UW: Tensor
    codes_UWmL: Tensor
    leaves_UWm: Tensor
    terms_UWS: Tensor

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Beams:
        """The same with every tensor changed."""
        return Beams(**{f.name: change(getattr(self, f.name)) for f in fields(self)})


def joined(parts: Sequence[Beams]) -> Beams:
    """The sessions of several groups of users, one group below the other."""
    return Beams(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Beams)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Unfinished sessions. parents, codes: what the decoding is fed next, [U, W]. node: prefix of the item at
    hand. leaves: finished items, [U, W, j]. logp: over whole codebooks, and terms: of each code so far,
    [U, W, codes]. legal: over legal codes, where asked for. keys: what rows are chosen by, -inf for a row
    that is none.
    """

    parents: Tensor
    codes: Tensor
    nodes: Tensor
    leaves: Tensor
    logp: Tensor
    terms: Tensor
    legal: Tensor | None
    keys: Tensor

    def part(self, start: int, stop: int) -> Rows:
        """Rows start:stop of every user."""
        cut = {n: getattr(self, n)[:, start:stop] for n in _ROW_FIELDS}
        return Rows(**cut, legal=None if self.legal is None else self.legal[:, start:stop])

    def repeated(self, num: int) -> Rows:
        """Every user's only row, `num` times."""
        wide = {n: getattr(self, n).expand(-1, num, *[-1] * (getattr(self, n).ndim - 2)) for n in _ROW_FIELDS}
        return Rows(**wide, legal=None if self.legal is None else self.legal.expand(-1, num))


_ROW_FIELDS = ("parents", "codes", "nodes", "leaves", "logp", "terms", "keys")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a session may hold, and the log-prob it is reported with."""

    stock: Stock
    num_users: int
    no_repeats: bool
    normalise: Normalise

    def children(self, rows: Rows, logp_UWK: Tensor, level: int) -> Children:
        """Legal candidates of the rows: below each is an item the user may get and the session lacks.

        A node is spent when the session has used as many items below it as the user may get there, so no
        prefix is entered that cannot be finished.
        """
        trie = self.stock.trie
        children = trie.children(level, rows.nodes, logp_UWK, rows.keys > -math.inf)
        children = self.stock.legal(level, children)
        if not self.no_repeats or not rows.leaves.shape[-1]:
            return children
        used_UWj = trie.paths[:, level][rows.leaves]
        times_UWj = (used_UWj.unsqueeze(-1) == used_UWj.unsqueeze(-2)).sum(-1)
        return children.without(used_UWj, self.stock.left(level, used_UWj) <= times_UWj)

    def totals(self, rows: Rows, children: Children) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the candidates' prefixes from the start: over whole codebooks and over legal codes."""
        logp_UM = children.after(rows.logp)
        if rows.legal is None:
            return logp_UM, None
        return logp_UM, children.after(rows.legal - children.log_mass())

    def finished(self, rows: Rows, width: int) -> Beams:
        """Rows as sessions of items: the n-th use of an id in a session is its n-th item the user may get.

        Where repeats are allowed every use is the first.
        """
        trie, leaves = self.stock.trie, rows.leaves
        places = torch.zeros_like(leaves)
        if self.no_repeats:
            places = (leaves.unsqueeze(-1) == leaves.unsqueeze(-2)).tril(-1).sum(-1)
        items = self.stock.items(leaves.flatten(1), places.flatten(1)).view(leaves.shape)
        none_UW1 = (rows.keys == -math.inf).unsqueeze(-1)
        logp = rows.logp if self.normalise == "codebook" or rows.legal is None else rows.legal
        logp = logp.masked_fill(none_UW1.squeeze(-1), -math.inf)
        spare = width - leaves.shape[1]
        return Beams(
            items_UWm=widened(items.masked_fill(none_UW1, -1), spare, -1),
            logp_UW=widened(logp, spare, -math.inf),
            codes_UWmL=widened(trie.codes(leaves).masked_fill(none_UW1.unsqueeze(-1), -1), spare, -1),
            leaves_UWm=widened(leaves.masked_fill(none_UW1, -1), spare, -1),
            terms_UWS=widened(rows.terms.masked_fill(none_UW1, 0.0), spare, 0.0),
        )


Step = Callable[[Rows, Tensor, int], Rows]


def beam_search(
    decoding: Decoding,
    trie: Trie,
    *,
    width: int,
    num_items: int = 1,
    no_repeats: bool = True,
    within: Within | None = None,
    widths: Sequence[int] | None = None,
    normalise: Normalise = "codebook",
) -> Beams:
    """The `width` likeliest sessions of `num_items` items, all users at once.

    score = sum over codes of log p(code | history, codes before), over whole codebooks: log P(session), the
    number that preference pairs need. normalise='children' scores with p renormalised over the codes that
    are legal there, so that all legal sessions sum to 1. Which rows survive follows the same score. A search
    as wide as there are legal prefixes is exact; equal scores come in no set order.

    no_repeats: no item twice in a session; an id of several items may come once for each. within: offsets
    [U + 1] and items that each user must not get. widths: rows kept after each level of an item, L of them,
    the last `width`; early levels decide most, so they deserve more.

    ValueError for widths that do not fit.
    """
    levels = len(trie.levels)
    kept = [width] * levels if widths is None else list(widths)
    if len(kept) != levels or min(kept) < 1 or kept[-1] != width:
        raise ValueError(
            f"widths={kept} with width={width}; valid: {levels} positive widths, the last {width}"
        )

    def step_of(rules: Rules) -> Step:
        def step(rows: Rows, logp_UWK: Tensor, level: int) -> Rows:
            children = rules.children(rows, logp_UWK, level)
            logp_UM, legal_UM = rules.totals(rows, children)
            keys_UM = logp_UM if legal_UM is None else legal_UM
            return chosen(trie, level, rows, children, (logp_UM, legal_UM, keys_UM), kept[level])

        return step

    rules, rows = walk(
        decoding,
        trie,
        step_of,
        num_items=num_items,
        no_repeats=no_repeats,
        within=within,
        normalise=normalise,
    )
    return rules.finished(rows, width)


def ranked_items(beams: Beams, trie: Trie, *, k: int, within: Within | None = None) -> Tensor:
    """The first k items of a search for single items, [U, k]; -1 where there are fewer.

    An id's items follow one another in order of item, less those that a user must not get.
    """
    if beams.leaves_UWm.shape[-1] != 1:
        raise ValueError(f"the beams are sessions of {beams.leaves_UWm.shape[-1]} items; a ranking needs 1")
    leaves_UW = beams.leaves_UWm.squeeze(-1)
    stock = Stock.of(trie, within, len(leaves_UW))
    fans_UW = stock.left(len(trie.levels) - 1, leaves_UW.clamp(min=0)).long() * (leaves_UW >= 0)
    ends_UW = fans_UW.cumsum(1)
    place_k = torch.arange(k, device=leaves_UW.device).expand(len(leaves_UW), k).contiguous()
    beam_Uk = torch.searchsorted(ends_UW, place_k, right=True).clamp(max=leaves_UW.shape[1] - 1)
    places = place_k - (ends_UW - fans_UW).gather(1, beam_Uk)
    items = stock.items(leaves_UW.clamp(min=0).gather(1, beam_Uk), places)
    return torch.where(place_k < ends_UW[:, -1:], items, -1)


def walk(
    decoding: Decoding,
    trie: Trie,
    step_of: Callable[[Rules], Step],
    *,
    num_items: int,
    no_repeats: bool,
    within: Within | None,
    normalise: Normalise,
    legal: bool = False,
) -> tuple[Rules, Rows]:
    """Drive a decoding through the levels of `num_items` items; a step turns rows into those that go on.

    legal: rows carry log-probs over legal codes even where they are not what is reported.
    """
    if num_items < 1:
        raise ValueError(f"num_items is {num_items}; valid: 1 or more")
    if normalise not in ("codebook", "children"):
        raise ValueError(f"normalise is {normalise!r}; valid: 'codebook', 'children'")
    logp_UWK = decoding.advance(None, None)
    rules = Rules(
        stock=Stock.of(trie, within, len(logp_UWK)),
        no_repeats=no_repeats,
        normalise=normalise,
        num_users=len(logp_UWK),
    )
    step, rows = step_of(rules), _roots(logp_UWK, legal or normalise == "children")
    for place in range(num_items * len(trie.levels)):
        level = place % len(trie.levels)
        if place:
            logp_UWK = decoding.advance(rows.parents, rows.codes)
        if logp_UWK.shape[-1] != trie.sizes[level]:
            raise ValueError(
                f"the decoding gives {logp_UWK.shape[-1]} codes for level {level}; "
                f"the trie has {trie.sizes[level]}"
            )
        rows = step(rows, logp_UWK.float(), level)
        if level == len(trie.levels) - 1:
            leaves = torch.cat([rows.leaves, rows.nodes.unsqueeze(-1)], -1)
            rows = replace(rows, leaves=leaves, nodes=torch.zeros_like(rows.nodes))
    return rules, rows


def chosen(
    trie: Trie,
    level: int,
    rows: Rows,
    children: Children,
    scores: tuple[Tensor, Tensor | None, Tensor],
    width: int,
) -> Rows:
    """The candidates of highest key as rows. scores: logp, legal and keys of every candidate, [U, M]."""
    logp_UM, legal_UM, keys_UM = scores
    keys, picks = keys_UM.topk(min(width, keys_UM.shape[1]), 1)
    alive = keys > -math.inf
    parents = torch.searchsorted(children.starts.contiguous(), picks, right=True) - 1
    nodes = children.firsts.gather(1, parents) + picks - children.starts.gather(1, parents)
    nodes = torch.where(alive, nodes, 0)
    leaves = rows.leaves.gather(1, parents.unsqueeze(-1).expand(-1, -1, rows.leaves.shape[-1]))
    terms = rows.terms.gather(1, parents.unsqueeze(-1).expand(-1, -1, rows.terms.shape[-1]))
    logp = logp_UM.gather(1, picks)
    return Rows(
        parents=parents,
        codes=trie.levels[level].codes[nodes],
        nodes=nodes,
        leaves=leaves,
        logp=logp,
        terms=torch.cat([terms, (logp - rows.logp.gather(1, parents)).unsqueeze(-1)], -1),
        legal=None if legal_UM is None else legal_UM.gather(1, picks),
        keys=keys,
    )


def _roots(logp_UWK: Tensor, legal: bool) -> Rows:
    users, device = len(logp_UWK), logp_UWK.device
    zero = torch.zeros(users, 1, dtype=torch.int64, device=device)
    score = torch.zeros(users, 1, device=device)
    return Rows(
        parents=zero,
        codes=zero,
        nodes=zero,
        leaves=zero.new_zeros(users, 1, 0),
        logp=score,
        terms=score.new_zeros(users, 1, 0),
        legal=score if legal else None,
        keys=score,
    )


def widened(x_UWX: Tensor, spare: int, value: float) -> Tensor:
    """`spare` more rows of one value."""
    return functional.pad(x_UWX, (0, 0) * (x_UWX.ndim - 2) + (0, spare), value=value)
