"""One reselection in one layer: which entries go, which come, and what moves along with them.

An entry sits in a slot, its place in `index`. As `index` is sorted, new entries shift the others:
all that is kept per entry is moved by one `Replacement`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Replacement:
    """What a reselection does to the k entries of a layer.

    index   (k,) the positions from then on, sorted
    kept    (k - r,) slots of the entries that stay, int64, ascending
    grown   (r,) the new positions, sorted
    order   (k,) int64: slot e is filled from place order[e] of the kept and then the grown ones
    """

    index: Tensor
    kept: Tensor
    grown: Tensor
    order: Tensor

    def apply_(self, values: Tensor, of_grown: Tensor | float = 0.0) -> None:
        """Move the values (k,) with their entries, in place; new entries get of_grown, (r,)."""
        new = values.new_empty(len(self.grown))
        new[:] = of_grown
        values.copy_(torch.cat([values[self.kept], new])[self.order])


def replacement(index: Tensor, dropped: Tensor, chosen: Tensor) -> Replacement:
    """Entries for which `dropped`, bool (k,), is true give way to those at `chosen`.

    chosen: as many positions, sorted, none of them that of an entry which stays. One that is
    dropped and chosen at the same time is left as it is.
    """
    regrown = dropped & contains(chosen, index)
    grown = chosen[~contains(index, chosen)]
    kept = (~dropped | regrown).nonzero().squeeze(1)
    positions, order = torch.cat([index[kept], grown]).sort()
    return Replacement(positions, kept, grown, order)


def smallest(delta: Tensor, num: int) -> Tensor:
    """Bool (k,), true for the num deltas of least magnitude; of equal ones those at the front."""
    mask = torch.zeros_like(delta, dtype=torch.bool)
    mask[delta.detach().abs().sort(stable=True).indices[:num]] = True
    return mask


def best_free(candidates: Tensor, scores: Tensor, staying: Tensor, num: int) -> Tensor:
    """The num candidates of highest score that are not in `staying`, sorted; all of them sorted.

    scores: (m,) of the candidates, not negative. Of equal ones those of lowest position.
    """
    free = ~contains(staying, candidates)
    assert num <= len(candidates) - len(staying), "as many candidates as entries are wanted"
    ranked = scores.masked_fill(~free, -1).sort(descending=True, stable=True).indices
    return candidates[ranked[:num].sort().values]


def contains(positions: Tensor, wanted: Tensor) -> Tensor:
    """Which of `wanted` are among `positions`, both sorted: bool, shaped like wanted."""
    if not len(positions):
        return torch.zeros_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(positions, wanted).clamp_(max=len(positions) - 1)
    return positions[place] == wanted
