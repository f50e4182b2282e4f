"""The catalogue's semantic ids as a prefix tree on tensors, and what of it each user may still be given.

Shapes: I items, L levels, K codes of a level, S ids in use (leaves), P nodes of the level above, n nodes of
a level, U users, W rows (beams) of a user, F the largest fan-out of a level, M candidates of a user, X any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# A padded table of children is used where the widest node has at most this many, or this often the mean.
_SMALL_FAN, _SKEW = 16, 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """Nodes of one level, ordered by parent, then code, so that the children of a node are contiguous.

    size: K. codes: [n]. parents: [n]. first: [P + 1], children of node p are first[p]:first[p + 1].
    num_items: items below each node, [n]. fan: F. table: codes of the children padded with 0, [P, F]; none
    where fan-outs are skewed. complete: every node above has all K children.
    """

    size: int
    codes: Tensor
    parents: Tensor
    first: Tensor
    num_items: Tensor
    fan: int
    table: Tensor | None
    complete: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Children:
    """The next codes of W rows, laid end to end for each user.

    logp: log-prob of each candidate given its row, -inf where it is padding or illegal, [U, M]. starts: place
    of a row's first candidate, [U, W]. firsts: node of that candidate. fans: candidates of a row, [U, W].
    owners: row of each candidate, [U, M]; none where every row takes the same number of places.
    """

    logp: Tensor
    starts: Tensor
    firsts: Tensor
    fans: Tensor
    owners: Tensor | None

    def spread(self, x_UW: Tensor) -> Tensor:
        """A row's value at each of its candidates, [U, M]."""
        if self.owners is not None:
            return x_UW.gather(1, self.owners)
        return x_UW.repeat_interleave(self.logp.shape[1] // x_UW.shape[1], 1)

    def after(self, x_UW: Tensor) -> Tensor:
        """logp plus a row's value, [U, M]."""
        if self.owners is not None:
            return self.logp + x_UW.gather(1, self.owners)
        return (self.logp.view(*x_UW.shape, -1) + x_UW.unsqueeze(-1)).flatten(1)

    def nodes(self) -> Tensor:
        """Node of each candidate, [U, M]; 0 at padding."""
        places = torch.arange(self.logp.shape[1], device=self.logp.device)
        within = places - self.spread(self.starts)
        real = within < self.spread(self.fans)
        return torch.where(real, self.spread(self.firsts) + within, 0)

    def highest(self, x_UM: Tensor) -> Tensor:
        """Largest value of each row's candidates, [U, W]; -inf where there is none."""
        users, rows = self.starts.shape
        if self.owners is None:
            return x_UM.view(users, rows, -1).amax(-1)
        return x_UM.new_full((users, rows), -math.inf).scatter_reduce(1, self.owners, x_UM, "amax")

    def log_mass(self) -> Tensor:
        """log sum exp of each row's legal candidates, [U, W]; 0 where there is none."""
        top = self.highest(self.logp)
        top = torch.where(top > -math.inf, top, 0.0)
        users, rows = self.starts.shape
        share_UM = (self.logp - self.spread(top)).exp()
        if self.owners is None:
            total = share_UM.view(users, rows, -1).sum(-1)
        else:
            total = torch.zeros_like(top).scatter_add(1, self.owners, share_UM)
        return torch.where(total > 0, top + total.log(), 0.0)

    def without(self, nodes_UWX: Tensor, gone_UWX: Tensor) -> Children:
        """Candidate `nodes` of a row made illegal where `gone`; a node that is no candidate is let be."""
        slots, child = self._slots(nodes_UWX)
        values = torch.where(child & gone_UWX, -math.inf, math.inf).to(self.logp.dtype)
        return replace(self, logp=self.logp.scatter_reduce(1, slots.flatten(1), values.flatten(1), "amin"))

    def tally(self, nodes_UWX: Tensor) -> Tensor:
        """How often each candidate is among the `nodes` of its row, [U, M] float32."""
        slots, child = self._slots(nodes_UWX)
        counts = torch.zeros(self.logp.shape, device=self.logp.device)
        return counts.scatter_add(1, slots.flatten(1), child.flatten(1).float())

    def _slots(self, nodes_UWX: Tensor) -> tuple[Tensor, Tensor]:
        within = nodes_UWX - self.firsts.unsqueeze(-1)
        child = (within >= 0) & (within < self.fans.unsqueeze(-1))
        return torch.where(child, self.starts.unsqueeze(-1) + within, 0), child


@dataclass(frozen=True, slots=True, kw_only=True)
class Trie:
    """All prefixes of all semantic ids. A leaf is an id in use; several items may share it.

    levels: L of them; node 0 above the first is the root. paths: node of each leaf on every level, [S, L].
    item_first: [S + 1], items: [I]; the items of leaf s are items[item_first[s]:item_first[s + 1]] in order
    of item. leaf_of_item: [I].
    """

    levels: tuple[Level, ...]
    paths: Tensor
    item_first: Tensor
    items: Tensor
    leaf_of_item: Tensor

    @classmethod
    def of(cls, codes_IL: Tensor, sizes: Sequence[int]) -> Trie:
        """Built level by level: a node is a distinct (node above, code), found by sorting.

        ValueError for no items, a number of levels other than len(sizes), or a code outside its codebook.
        """
        codes_IL = _checked(codes_IL, sizes)
        above_I, num_above, levels = torch.zeros_like(codes_IL[:, 0]), 1, []
        for size, code_I in zip(sizes, codes_IL.unbind(1), strict=True):
            keys_n, above_I = torch.unique(above_I * size + code_I, return_inverse=True)
            levels.append(_level(keys_n, above_I, size, num_above))
            num_above = len(keys_n)
        path_S = torch.arange(num_above, device=codes_IL.device)
        paths = [path_S]
        for level in levels[:0:-1]:
            paths.append(level.parents[paths[-1]])
        return cls(
            levels=tuple(levels),
            paths=torch.stack(paths[::-1], 1),
            item_first=_offsets(levels[-1].num_items),
            items=above_I.argsort(stable=True),
            leaf_of_item=above_I,
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Codes of each level."""
        return tuple(level.size for level in self.levels)

    @property
    def num_leaves(self) -> int:
        """S."""
        return len(self.paths)

    @property
    def num_items(self) -> int:
        """I."""
        return len(self.items)

    def to(self, device: torch.device | str) -> Trie:
        """The same on a device."""
        tensors = ("paths", "item_first", "items", "leaf_of_item")
        moved = {name: getattr(self, name).to(device) for name in tensors}
        return Trie(levels=tuple(_level_to(level, device) for level in self.levels), **moved)

    def codes(self, leaves_X: Tensor) -> Tensor:
        """Semantic id of each leaf, [X, L]."""
        path = self.paths[leaves_X]
        return torch.stack([level.codes[path[..., at]] for at, level in enumerate(self.levels)], -1)

    def find(self, codes_XL: Tensor) -> Tensor:
        """Leaf of each semantic id, [X]; -1 for one that no item has."""
        node, known = torch.zeros_like(codes_XL[..., 0]), torch.ones_like(codes_XL[..., 0], dtype=torch.bool)
        for level, code in zip(self.levels, codes_XL.unbind(-1), strict=True):
            keys = level.parents * level.size + level.codes
            wanted = node * level.size + code
            place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
            known &= (keys[place] == wanted) & (code >= 0) & (code < level.size)
            node = torch.where(known, place, 0)
        return torch.where(known, node, -1)

    def mask(self, level: int, nodes_X: Tensor) -> Tensor:
        """Which codes may follow each node of the level above (0 = the root of level 0), [X, K] bool."""
        at = self.levels[level]
        flat = nodes_X.flatten()
        fans = at.first[flat + 1] - at.first[flat]
        rows = torch.repeat_interleave(fans)
        steps = torch.arange(len(rows), device=rows.device)
        legal = torch.zeros(len(flat), at.size, dtype=torch.bool, device=rows.device)
        legal[rows, at.codes[(at.first[flat] - fans.cumsum(0) + fans)[rows] + steps]] = True
        return legal.view(*nodes_X.shape, at.size)

    def children(self, level: int, nodes_UW: Tensor, logp_UWK: Tensor, alive_UW: Tensor) -> Children:
        """Candidates of every row with their log-probs.

        Those of a row that is not alive mean nothing: it must score -inf itself.
        """
        at = self.levels[level]
        firsts = at.first[nodes_UW]
        fans = torch.where(alive_UW, at.first[nodes_UW + 1] - firsts, 0)
        if at.table is None:
            return _ragged(at, firsts, fans, logp_UWK)
        logp_UWF = logp_UWK
        if not at.complete:
            places = torch.arange(at.fan, device=nodes_UW.device)
            logp_UWF = logp_UWK.gather(2, at.table[nodes_UW])
            logp_UWF = logp_UWF.masked_fill(places >= fans.unsqueeze(-1), -math.inf)
        starts = (torch.arange(nodes_UW.shape[1], device=nodes_UW.device) * at.fan).expand_as(nodes_UW)
        return Children(logp=logp_UWF.flatten(1), starts=starts, firsts=firsts, fans=fans, owners=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stock:
    """What each user may be given: items below every node, less the ones that user must not get.

    counts: a level's [n], or [U, n] where users differ. allowed: how many of the items up to each place in
    the trie's order a user may get, [U, I] int32; none where that is all.
    """

    trie: Trie
    counts: tuple[Tensor, ...]
    allowed: Tensor | None

    @classmethod
    def of(cls, trie: Trie, forbidden: tuple[Tensor, Tensor] | None, num_users: int) -> Stock:
        """forbidden: offsets [U + 1] and items; user u must not get items[offsets[u]:offsets[u + 1]].

        ValueError for offsets of another number of users, or an item that the trie lacks.
        """
        if forbidden is None:
            return cls(trie=trie, counts=tuple(level.num_items for level in trie.levels), allowed=None)
        offsets, items = (t.to(trie.items.device) for t in forbidden)
        if len(offsets) != num_users + 1 or int(offsets[-1]) != len(items) or int(offsets[0]) != 0:
            raise ValueError(
                f"forbidden: {len(offsets)} offsets over {len(items)} items do not fit {num_users} users"
                "; valid: users + 1 offsets from 0 to the number of items"
            )
        if len(items) and not (int(items.min()) >= 0 and int(items.max()) < trie.num_items):
            raise ValueError(
                f"forbidden items go from {int(items.min())} to {int(items.max())};"
                f" valid: 0 to {trie.num_items - 1}"
            )
        keys = torch.unique(torch.repeat_interleave(offsets.diff()) * trie.num_items + items)
        user_E, item_E = keys // trie.num_items, keys % trie.num_items
        taken = torch.tensor(-1, dtype=torch.int32, device=items.device)
        path_EL, counts = trie.paths[trie.leaf_of_item[item_E]], []
        for at, level in enumerate(trie.levels):
            count = level.num_items.to(torch.int32).repeat(num_users, 1)
            counts.append(count.index_put_((user_E, path_EL[:, at]), taken, accumulate=True))
        place_I = torch.empty_like(trie.items)
        place_I[trie.items] = torch.arange(trie.num_items, device=items.device)
        allowed = torch.ones(num_users, trie.num_items, dtype=torch.int32, device=items.device)
        allowed[user_E, place_I[item_E]] = 0
        return cls(trie=trie, counts=tuple(counts), allowed=allowed.cumsum(1, dtype=torch.int32))

    def left(self, level: int, nodes_UX: Tensor) -> Tensor:
        """Items that a user may get below each node, [U, X]."""
        counts = self.counts[level]
        if counts.ndim == 1:
            return counts[nodes_UX]
        return counts.gather(1, nodes_UX.flatten(1)).view(nodes_UX.shape)

    def legal(self, level: int, children: Children) -> Children:
        """Candidates below which a user may get nothing made illegal."""
        if self.allowed is None:
            return children
        none_left = self.left(level, children.nodes()) <= 0
        return replace(children, logp=children.logp.masked_fill(none_left, -math.inf))

    def items(self, leaves_UX: Tensor, places_UX: Tensor) -> Tensor:
        """The item at each place (0, 1, ...) among those of a leaf that the user may get, in order."""
        first = self.trie.item_first[leaves_UX]
        if self.allowed is None:
            return self.trie.items[(first + places_UX).clamp(max=self.trie.num_items - 1)]
        before = torch.where(first > 0, self.allowed.gather(1, (first - 1).clamp(min=0)), 0)
        at = torch.searchsorted(self.allowed, (before + places_UX + 1).to(torch.int32).contiguous())
        return self.trie.items[at.clamp(max=self.trie.num_items - 1)]


def _ragged(at: Level, firsts_UW: Tensor, fans_UW: Tensor, logp_UWK: Tensor) -> Children:
    """Children of skewed rows without a place for every absent one: a user's total is padded, not a row's."""
    users, rows = fans_UW.shape
    starts_UW = fans_UW.cumsum(1) - fans_UW
    most = max(int((starts_UW[:, -1] + fans_UW[:, -1]).max()), 1)
    fans_R = fans_UW.flatten()
    before_R = fans_R.cumsum(0) - fans_R
    row_T = torch.repeat_interleave(fans_R)
    step_T = torch.arange(len(row_T), device=row_T.device)
    code_T = at.codes[(firsts_UW.flatten() - before_R)[row_T] + step_T]
    user_R = torch.arange(users * rows, device=row_T.device) // rows
    slot_T = (starts_UW.flatten() + user_R * most - before_R)[row_T] + step_T
    logp = logp_UWK.new_full((users * most,), -math.inf)
    logp[slot_T] = logp_UWK.flatten()[row_T * at.size + code_T]
    owners = row_T.new_zeros(users * most)
    owners[slot_T] = row_T % rows
    shape = (users, most)
    return Children(
        logp=logp.view(shape), starts=starts_UW, firsts=firsts_UW, fans=fans_UW, owners=owners.view(shape)
    )


def _level(keys_n: Tensor, node_I: Tensor, size: int, num_above: int) -> Level:
    parents, codes = keys_n // size, keys_n % size
    fans = torch.bincount(parents, minlength=num_above)
    first, fan = _offsets(fans), int(fans.max())
    table = None
    if fan <= max(_SMALL_FAN, _SKEW * len(keys_n) / num_above):
        table = codes.new_zeros(num_above, fan)
        table[parents, torch.arange(len(keys_n), device=codes.device) - first[parents]] = codes
    return Level(
        size=size,
        codes=codes,
        parents=parents,
        first=first,
        num_items=torch.bincount(node_I, minlength=len(keys_n)),
        fan=fan,
        table=table,
        complete=len(keys_n) == num_above * size,
    )


def _level_to(level: Level, device: torch.device | str) -> Level:
    moved = {name: getattr(level, name).to(device) for name in ("codes", "parents", "first", "num_items")}
    return replace(level, table=None if level.table is None else level.table.to(device), **moved)


def _offsets(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _checked(codes_IL: Tensor, sizes: Sequence[int]) -> Tensor:
    if codes_IL.ndim != 2 or codes_IL.shape[1] != len(sizes) or not codes_IL.numel():
        raise ValueError(
            f"codes have shape {tuple(codes_IL.shape)}; valid: [items, {len(sizes)}], 1 item or more"
        )
    for at, (size, code_I) in enumerate(zip(sizes, codes_IL.unbind(1), strict=True)):
        low, high = int(code_I.min()), int(code_I.max())
        if low < 0 or high >= size:
            raise ValueError(f"codes of level {at} go from {low} to {high}; valid: 0 to {size - 1}")
    return codes_IL.long()
