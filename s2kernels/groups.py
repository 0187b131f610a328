"""Which tokens of a batch use which rows of a pool: what `grouped_in_` and `grouped_out_` work on.

A pool (P, width) holds one vector for each trained channel of many adapters. A group is one adapter
with the tokens of the batch that use it; tokens of the base model belong to no group. An adapter
has R entries in a module, R from 0 up and its own: an entry is a row of the pool and the channel
that it belongs to. Plain torch, the same for the plain-torch ops and the kernels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# Tokens of a tile: one is a sum of rows, more are a matrix product, for few or for many.
BLOCKS = (1, 16, 64)
# On a CPU, groups of as many tokens are a matrix product each; all smaller ones are one sum of rows
# together. With 16 to 220 channels of 512 to 4096 the two took equally long at 4 to 16 tokens.
PRODUCT_TOKENS = 8
# So are groups of fewer tokens whose rows, adjacent in the pool, hold as many numbers or more: the
# sum of rows took 2.5 times as long with so many, and as long as products with half as many.
PRODUCT_NUMBERS = 2**17


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """The tokens of a batch by group; the same for all modules. T tokens belong to G groups.

    sizes    tokens of each group, on the host
    order    int32 (T,), the tokens, group after group, ascending within one
    tiles    int32 (num_tiles, 3): a group, its first place in order, and how many places, at most
             `block`
    """

    sizes: tuple[int, ...]
    order: Tensor
    tiles: Tensor
    block: int

    @cached_property
    def few(self) -> tuple[Tensor, Tensor]:
        """The tokens of groups of few tokens, ascending, and their groups; int64."""
        sizes = torch.tensor(self.sizes, dtype=torch.int64, device=self.order.device)
        group = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        chosen = (sizes < PRODUCT_TOKENS)[group]
        tokens, order = self.order.long()[chosen].sort()
        return tokens, group[chosen][order]

    @cached_property
    def layouts(self) -> "dict[tuple[int, ...], Layout]":
        """Of `few`, by the numbers of entries of the groups, which most modules share."""
        return {}


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of a batch in one module: E entries of all of its adapters.

    bounds   int32 (G, 2): group g has the entries from bounds[g, 0] up to bounds[g, 1]
    rows     int32 (E,), of each entry, its row of the pool
    channels int32 (E,), of each entry, its channel: of x for an in-slice, of y for an out-slice;
             no group has one twice
    widest   the largest number of entries of a group, on the host
    """

    tokens: TokenOrder
    bounds: Tensor
    rows: Tensor
    channels: Tensor
    widest: int

    def parts(self, width: int = 0) -> "tuple[Bags | None, list[Product]]":
        """How plain torch computes: sums of rows, None if there are none, and products.

        width: of the rows, where rows are summed; 0 where each is multiplied by a vector, which
        has no better way for few tokens.
        """
        if width not in self._parts:
            wide = self._wide(width)
            self._parts[width] = _bags(self, wide), _products(self, wide)
        return self._parts[width]

    @cached_property
    def _parts(self) -> "dict[int, tuple[Bags | None, list[Product]]]":
        return {}

    def _wide(self, width: int) -> list[bool]:
        """Which groups of few tokens are a product each."""
        if width * self.widest < PRODUCT_NUMBERS:
            return [False] * len(self.tokens.sizes)
        return [
            (last - first) * width >= PRODUCT_NUMBERS
            and size > 0
            and isinstance(_run(self.rows[first:last]), slice)
            for size, (first, last) in zip(self.tokens.sizes, self.bounds.tolist(), strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Layout:
    """Tokens with all of their entries written out, token by token; S entries of B tokens.

    tokens   int64 (B,), ascending
    offsets  int32 (B,), where the entries of each token begin
    token    int64 (S,), which token it is
    bag      int32 (S,), which place in tokens it is
    group    int64 (S,)
    entry    int64 (S,), counted from the first one of the group
    """

    tokens: Tensor
    offsets: Tensor
    token: Tensor
    bag: Tensor
    group: Tensor
    entry: Tensor

    @cached_property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class Bags:
    """A layout with the rows of the pool, int32 (S,), and the channels, int64 (S,), of a module."""

    layout: Layout
    rows: Tensor
    channels: Tensor

    def places(self, width: int) -> Tensor:
        """Where the entries' channels are in x (M, width), all in one dimension; int64 (S,)."""
        if width not in self._places:
            self._places[width] = torch.add(self.channels, self.layout.token, alpha=width)
        return self._places[width]

    @cached_property
    def _places(self) -> dict[int, Tensor]:
        return {}


@dataclass(frozen=True, eq=False)
class Product:
    """One group: its tokens, rows of the pool, both runs where they are such, and its channels."""

    tokens: slice | Tensor
    rows: slice | Tensor
    channels: Tensor


def order_tokens(group: Tensor, num_groups: int, device: torch.device | str) -> TokenOrder:
    """The order of a batch: group is integer (M,) on the CPU, -1 for tokens of the base model."""
    members = (group >= 0).nonzero().flatten()
    of_member = group[members]
    order = members[torch.argsort(of_member, stable=True)].int()
    sizes = torch.bincount(of_member, minlength=num_groups)
    largest = int(sizes.max()) if num_groups else 0
    block = next((block for block in BLOCKS if largest <= block), BLOCKS[-1])
    counts = (sizes + block - 1) // block
    of_tile = torch.repeat_interleave(torch.arange(num_groups), counts)
    place = (torch.arange(len(of_tile)) - (counts.cumsum(0) - counts)[of_tile]) * block
    first = (sizes.cumsum(0) - sizes)[of_tile] + place
    tiles = torch.stack([of_tile, first, (sizes[of_tile] - place).clamp(max=block)], 1).int()
    return TokenOrder(tuple(sizes.tolist()), order.to(device), tiles.contiguous().to(device), block)


def make_groups(
    group: Tensor,
    rows: Sequence[Sequence[int] | Tensor],
    channels: Sequence[Sequence[int] | Tensor],
    device: torch.device | str = "cpu",
) -> Groups:
    """The groups of one module: of each, the rows of the pool and their channels; see order_tokens.

    Where a batch goes through many modules, `s2kernels.serve` makes those of all of them at once.
    """
    counts = torch.tensor([len(part) for part in rows], dtype=torch.int64)
    ends = counts.cumsum(0)

    def joined(parts: Sequence[Sequence[int] | Tensor]) -> Tensor:
        empty = torch.empty(0, dtype=torch.int32)
        return torch.cat([empty, *(torch.as_tensor(part).int().cpu() for part in parts)]).to(device)

    return Groups(
        order_tokens(group, len(rows), device),
        torch.stack([ends - counts, ends], 1).int().to(device),
        joined(rows),
        joined(channels),
        max(counts.tolist(), default=0),
    )


def _bags(groups: Groups, wide: list[bool]) -> Bags | None:
    order = groups.tokens
    if not len(order.few[0]):
        return None
    counts = groups.bounds[:, 1] - groups.bounds[:, 0]
    if any(wide):
        counts = counts * ~torch.tensor(wide, device=counts.device)
        if not counts[order.few[1]].any():
            return None
    key = tuple(counts.tolist())
    if key not in order.layouts:
        order.layouts[key] = _layout(*order.few, counts.long())
    layout = order.layouts[key]
    entry = groups.bounds[:, 0].long()[layout.group] + layout.entry
    return Bags(layout, groups.rows[entry], groups.channels[entry].long())


def _layout(tokens: Tensor, group: Tensor, counts: Tensor) -> Layout:
    of_token = counts[group]
    offsets = of_token.cumsum(0) - of_token
    bag = torch.arange(len(tokens), device=tokens.device).repeat_interleave(of_token)
    entry = torch.arange(len(bag), device=tokens.device) - offsets[bag]
    return Layout(tokens, offsets.int(), tokens[bag], bag.int(), group[bag], entry)


def _products(groups: Groups, wide: list[bool]) -> list[Product]:
    products, start = [], 0
    bounds = groups.bounds.tolist()
    for size, (first, last), is_wide in zip(groups.tokens.sizes, bounds, wide, strict=True):
        tokens = groups.tokens.order[start : start + size]
        start += size
        if (size >= PRODUCT_TOKENS or is_wide) and last > first:
            rows, channels = groups.rows[first:last], groups.channels[first:last]
            products.append(Product(_run(tokens), _run(rows), channels.long()))
    return products


def _run(index: Tensor) -> slice | Tensor:
    """As a slice if it counts up by one, else as int64."""
    first, last = int(index[0]), int(index[-1])
    if last - first == len(index) - 1 and bool((index[1:] > index[:-1]).all()):
        return slice(first, last + 1)
    return index.long()
