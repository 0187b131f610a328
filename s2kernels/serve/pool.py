"""One block of device memory for the trained channels of all adapters that are there.

In a block of a Llama, every trained channel is one vector as wide as the hidden size: an input
channel of o_proj or down_proj is a column, an output channel of q, k, v, gate or up a row. So one
pool of such rows serves the whole model, whatever R an adapter has where: no padding, no classes.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor


class RowPool:
    """num_rows rows of `width` numbers, handed out in runs. `rows` (num_rows, width) holds them.

    What a row holds before it is written is not defined.
    """

    def __init__(
        self, width: int, num_rows: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        if width < 1 or num_rows < 1:
            raise ValueError(f"width and num_rows must be positive, got {width} and {num_rows}")
        self.rows = torch.empty((num_rows, width), dtype=dtype, device=device)
        self._free = [range(num_rows)]  # ascending, none touches the next

    @property
    def num_rows(self) -> int:
        return self.rows.shape[0]

    @property
    def num_free(self) -> int:
        return sum(map(len, self._free))

    def allocate(self, num: int) -> list[range] | None:
        """`num` rows, as one run where there is one, the shortest that holds them; None if there
        are not so many.
        """
        whole = [run for run in self._free if len(run) >= num]
        if not num or self.num_free < num:
            return None if num else []
        taken = []
        for run in [min(whole, key=len)] if whole else list(self._free):
            part = run[:num]
            num -= len(part)
            taken.append(part)
            place = self._free.index(run)
            self._free[place : place + 1] = [run[len(part) :]] if len(part) < len(run) else []
            if not num:
                break
        return taken

    def free(self, runs: Sequence[range]) -> None:
        """Give rows of `allocate` back. Raises ValueError for rows that are free."""
        ordered = sorted([*self._free, *(run for run in runs if run)], key=lambda run: run.start)
        merged: list[range] = []
        for run in ordered:
            if merged and run.start < merged[-1].stop:
                raise ValueError(f"runs must have been allocated, got {list(runs)}")
            if merged and run.start == merged[-1].stop:
                merged[-1] = range(merged[-1].start, run.stop)
            else:
                merged.append(run)
        self._free = merged

    def write(self, runs: Sequence[range], values: Tensor) -> None:
        """Copy values (num, width) into the rows of `runs`, one copy a run; on a GPU, from pinned
        memory, the host does not wait.
        """
        ends = list(accumulate(map(len, runs)))
        for run, end in zip(runs, ends, strict=True):
            part = values[end - len(run) : end]
            self.rows[run.start : run.stop].copy_(part, non_blocking=True)
