"""Searches that spread out: groups of beams kept apart, and samples without replacement.

Plain beams of sessions are near copies of one another, which makes poor preference pairs.

Shapes: U users, W rows (beams) of a user, G groups, M candidates, L levels, m items of a session, j items so
far, X anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from triptych.modalities.recsys.beams import (
    Beams,
    Decoding,
    Normalise,
    Rows,
    Rules,
    Step,
    Within,
    chosen,
    walk,
    widened,
)
from triptych.modalities.recsys.trie import Children, Trie

# Odd 64-bit constants of splitmix64 as signed integers (Steele et al. 2014).
_STEP, _MIX_1, _MIX_2 = -7046029254386353131, -4658895280553007687, -7723592293110705685


@dataclass(frozen=True, slots=True, kw_only=True)
class Draws:
    """Sessions that were drawn, highest key first; fewer than W: -1 and -inf as in `Beams`.

    beams: the sessions, logp_UW over whole codebooks. legal_UW: log-prob under the policy that was drawn
    from, renormalised over legal codes, float32. keys_UW: legal_UW plus Gumbel noise, float64, falling.
    """

    beams: Beams
    legal_UW: Tensor
    keys_UW: Tensor


def user_seeds(num_users: int, generator: torch.Generator) -> Tensor:
    """A seed for every user, [U] int64, on the generator's device."""
    return torch.randint(2**62, (num_users,), generator=generator, device=generator.device)


def gumbel(
    decoding: Decoding,
    trie: Trie,
    *,
    width: int,
    seeds: Tensor,
    num_items: int = 1,
    no_repeats: bool = True,
    within: Within | None = None,
) -> Draws:
    """Stochastic beam search: `width` distinct sessions, each draw from what is left of the policy.

    key(session) = log p + Gumbel(0) noise, independent between sessions; the highest `width` are a sample
    without replacement, in the order of drawing. Top down: a child's noise is drawn, then shifted so that
    the highest child has its parent's key (Kool et al. 2019, 1903.06059, eq. 10-11 and appendix B.3). Unlike
    the paper's algorithm 1 the root's key is drawn and not 0, so keys have their true distribution and
    P(key > t) = 1 - exp(-exp(log p - t)).

    p is renormalised over legal codes, as a search that never sees illegal ones can only draw from that.
    Noise is a hash of the user's seed and the session's prefix: a user draws the same alone or in a batch,
    and the first W of a wider search are the draws of width W. seeds: see `user_seeds`.

    ValueError for another number of seeds than users.
    """

    def step_of(rules: Rules) -> Step:
        num_users = rules.num_users
        if seeds.shape != (num_users,):
            raise ValueError(f"seeds have shape {tuple(seeds.shape)}; valid: [{num_users}], one a user")

        def step(rows: Rows, logp_UWK: Tensor, level: int) -> Rows:
            bits_UW = _prefix_bits(seeds, rows, level)
            if not level and not rows.leaves.shape[-1]:
                rows = replace(rows, keys=_gumbel(_mixed(~bits_UW)))
            children = rules.children(rows, logp_UWK, level)
            logp_UM, legal_UM = rules.totals(rows, children)
            assert legal_UM is not None
            noise_UM = _gumbel(_mixed(children.spread(bits_UW) + _mixed(children.nodes())))
            keys_UM = _keys(children, rows.keys, legal_UM.double(), noise_UM)
            return chosen(trie, level, rows, children, (logp_UM, legal_UM, keys_UM), width)

        return step

    return _drawn(decoding, trie, step_of, width, num_items=num_items, no_repeats=no_repeats, within=within)


def sampled(
    decoding: Decoding,
    trie: Trie,
    *,
    num: int,
    seeds: Tensor,
    num_items: int = 1,
    no_repeats: bool = True,
    within: Within | None = None,
) -> Draws:
    """`num` independent draws for each user, in order of drawing; two may be the same session.

    Ancestral sampling of p over legal codes, by the highest of log p + Gumbel noise at every step; the noise
    is a hash of the user's seed, the draw's number and the place, so a user draws the same alone or in a
    batch. `keys_UW` are 0, and -inf for a user who may get nothing. ValueError as `gumbel`'s.
    """

    def step_of(rules: Rules) -> Step:
        if seeds.shape != (rules.num_users,):
            raise ValueError(f"seeds have shape {tuple(seeds.shape)}; valid: [{rules.num_users}], one a user")
        number_W = torch.arange(num, device=seeds.device)
        bits_UW = _mixed(_mixed(seeds).unsqueeze(1) ^ _mixed(number_W + 1))

        def step(rows: Rows, logp_UWK: Tensor, level: int) -> Rows:
            at_root = not level and not rows.leaves.shape[-1]
            if at_root:
                rows, logp_UWK = rows.repeated(num), logp_UWK.expand(-1, num, -1)
            place = rows.terms.shape[-1]
            children = rules.children(rows, logp_UWK, level)
            logp_UM, legal_UM = rules.totals(rows, children)
            assert legal_UM is not None
            noise_UM = _gumbel(
                _mixed(children.spread(_mixed(bits_UW + place + 1)) + _mixed(children.nodes()))
            )
            g_UM = legal_UM.double() + noise_UM
            best_UM = (g_UM == children.spread(children.highest(g_UM))) & (g_UM > -math.inf)
            # One candidate a row; falling keys keep the rows in the order of their draws.
            order_M = -torch.arange(g_UM.shape[1], device=g_UM.device, dtype=g_UM.dtype)
            keys_UM = torch.where(best_UM, order_M, -math.inf)
            found = chosen(trie, level, rows, children, (logp_UM, legal_UM, keys_UM), num)
            keys = torch.where(found.keys > -math.inf, 0.0, -math.inf)
            # The first call of the decoding had one row a user, which all draws go on from.
            parents = torch.zeros_like(found.parents) if at_root else found.parents
            return replace(found, keys=keys, parents=parents)

        return step

    return _drawn(decoding, trie, step_of, num, num_items=num_items, no_repeats=no_repeats, within=within)


def _drawn(
    decoding: Decoding, trie: Trie, step_of: Callable[[Rules], Step], width: int, **where: Any
) -> Draws:
    rules, rows = walk(decoding, trie, step_of, normalise="codebook", legal=True, **where)
    assert rows.legal is not None
    spare = (0, width - rows.keys.shape[1])
    legal = rows.legal.masked_fill(rows.keys == -math.inf, -math.inf)
    return Draws(
        beams=rules.finished(rows, width),
        legal_UW=functional.pad(legal, spare, value=-math.inf),
        keys_UW=functional.pad(rows.keys, spare, value=-math.inf),
    )


def diverse(
    decoding: Decoding,
    trie: Trie,
    *,
    width: int,
    groups: int,
    strength: float,
    num_items: int = 1,
    no_repeats: bool = True,
    within: Within | None = None,
    normalise: Normalise = "codebook",
) -> Beams:
    """Beams in `groups` groups of width / groups, kept apart in the first item of the session.

    Group g chooses by  log p - strength * sum over levels l of the first item of #{rows of groups < g whose
    first l codes are the same}:  Hamming diversity (Vijayakumar et al. 2018, 1610.02424, eq. 6) over
    prefixes, as a code alone means little; it stays with a row for good. No session is found twice. The
    beams of all groups come back sorted by log-prob, without the penalty.

    ValueError for a width that groups do not divide, or a negative strength.
    """
    if groups < 1 or width % groups:
        raise ValueError(f"groups={groups} must divide width={width}")
    if not 0 <= strength < math.inf:
        raise ValueError(f"strength={strength}; valid: 0 or more, finite")

    def step_of(rules: Rules) -> Step:
        def step(rows: Rows, logp_UWK: Tensor, level: int) -> Rows:
            at_root = not level and not rows.leaves.shape[-1]
            share = 1 if at_root else rows.logp.shape[1] // groups
            found: list[Rows] = []
            for group in range(groups):
                start = 0 if at_root else group * share
                part, logp = rows.part(start, start + share), logp_UWK[:, start : start + share]
                kept = _apart(rules, part, logp, level, found, strength, width // groups, num_items)
                found.append(replace(kept, parents=kept.parents + start))
            return _joined(found)

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
    return _sorted(rules.finished(rows, width))


def _apart(
    rules: Rules,
    rows: Rows,
    logp_UWK: Tensor,
    level: int,
    found: list[Rows],
    strength: float,
    width: int,
    num_items: int,
) -> Rows:
    """One group's next rows, given those that earlier groups have found at this step."""
    trie, before = rules.stock.trie, rows.leaves.shape[-1]
    children = rules.children(rows, logp_UWK, level)
    logp_UM, legal_UM = rules.totals(rows, children)
    keys_UM = children.after(rows.keys if legal_UM is None else rows.keys - children.log_mass())
    finishes = level == len(trie.levels) - 1 and before == num_items - 1
    for earlier in found:
        nodes_UWX = _nodes(rows, earlier)
        if not before:
            keys_UM = keys_UM - strength * children.tally(nodes_UWX)
        if finishes:
            same_UWX = (rows.leaves.unsqueeze(2) == earlier.leaves.unsqueeze(1)).all(-1)
            taken = replace(children, logp=keys_UM).without(nodes_UWX, same_UWX)
            keys_UM = taken.logp
    return chosen(trie, level, rows, children, (logp_UM, legal_UM, keys_UM), width)


def _nodes(rows: Rows, others: Rows) -> Tensor:
    """Nodes of the other rows beside each row, [U, W, X]; -1 for a row that is none."""
    nodes_UX = torch.where(others.keys > -math.inf, others.nodes, -1)
    return nodes_UX.unsqueeze(1).expand(-1, rows.logp.shape[1], -1)


def _joined(groups: list[Rows]) -> Rows:
    """The groups' rows side by side, each group as wide as the widest, so that a place tells the group."""
    most = max(group.logp.shape[1] for group in groups)

    def cat(name: str, fill: float) -> Tensor:
        parts = [getattr(group, name) for group in groups]
        return torch.cat([widened(part, most - part.shape[1], fill) for part in parts], 1)

    whole = {name: cat(name, 0) for name in ("parents", "codes", "nodes", "leaves")}
    legal = None if groups[0].legal is None else cat("legal", -math.inf)
    scores = {name: cat(name, -math.inf) for name in ("logp", "keys")}
    return Rows(**whole, **scores, terms=cat("terms", 0.0), legal=legal)


def _sorted(beams: Beams) -> Beams:
    order_UW = beams.logp_UW.argsort(dim=1, descending=True, stable=True)

    def ordered(x_UWX: Tensor) -> Tensor:
        index = order_UW.view(*order_UW.shape, *(1,) * (x_UWX.ndim - 2))
        return x_UWX.gather(1, index.expand_as(x_UWX))

    return beams.mapped(ordered)


def _keys(children: Children, parent_UW: Tensor, logp_UM: Tensor, noise_UM: Tensor) -> Tensor:
    """Perturbed log-probs of the candidates whose highest in each row is the row's own key, [U, M] float64.

    G = T - relu(v) - log(1 + exp(-|v|)),  v = T - g + log(1 - exp(g - Z)),  g = log p + noise, Z = max g of
    the row, T = the row's key: -log(exp(-T) - exp(-Z) + exp(-g)) without overflow.
    """
    g_UM = logp_UM + noise_UM
    highest_UM, parent_UM = children.spread(children.highest(g_UM)), children.spread(parent_UW)
    v_UM = parent_UM - g_UM + _log1m_exp((g_UM - highest_UM).clamp(max=0.0))
    keys_UM = parent_UM - v_UM.relu() - torch.log1p((-v_UM.abs()).exp())
    return torch.where(g_UM > -math.inf, keys_UM, -math.inf)


def _log1m_exp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x <= 0."""
    return torch.where(x > -math.log(2), (-torch.expm1(x)).log(), torch.log1p(-x.exp()))


def _gumbel(bits: Tensor) -> Tensor:
    """-log(-log u), u in (0, 1) from 52 of 64 random bits, float64."""
    u = (((bits >> 12) & (2**52 - 1)).double() + 0.5) * 2.0**-52
    return -(-u.log()).log()


def _prefix_bits(seeds_U: Tensor, rows: Rows, level: int) -> Tensor:
    """A hash of the user's seed and the items so far, [U, W] int64."""
    bits = _mixed(seeds_U.to(rows.leaves.device)).unsqueeze(1).expand_as(rows.nodes)
    for leaf_UW in rows.leaves.unbind(-1):
        bits = _mixed(bits ^ _mixed(leaf_UW + 1))
    return _mixed(bits + (level + 1) * 2**32)


def _mixed(x: Tensor) -> Tensor:
    """splitmix64: integers to integers that look random; products wrap around at 64 bits."""
    x = x + _STEP
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _MIX_2
    return x ^ ((x >> 31) & (2**33 - 1))
