"""Write channels of a weight in the memory of a CPU, in pieces as large as their layout allows.

A word is what is adjacent in memory of the channels: a whole row, some columns of a row that are
neighbours, or a single number. NumPy copies words of any size to any places. torch's `index_copy_`
takes up to three times as long for rows.

Columns are written in blocks of rows. The places of a block's words, 8 bytes each, are counted from
its first row, so that they are the same in all blocks and stay in the cache. `exchange` has every
block of the new channels follow that of the old ones, whose pages and cache lines it shares.
"""

import math

import numpy as np
import torch
from torch import Tensor

# The most rows and words of a block. With 32 columns, 64 to 512 rows took about equally long, all
# rows at once up to a fifth longer; the words' places have to fit into the second level's cache.
_ROWS, _WORDS = 1024, 2**14


class Words:
    """Some channels of a weight, and two sets of values for them: the base's and an adapter's.

    weight (N, K) has any strides, and is on the CPU and without a gradient; index int32 (R,); base
    and value (R, K) for axis 0, (N, R) for axis 1, in the dtype of the weight.
    """

    def __init__(
        self, weight: Tensor, axis: int, index: Tensor, base: Tensor, value: Tensor
    ) -> None:
        step, along = weight.stride(axis), weight.stride(1 - axis)
        length, channels = weight.shape[1 - axis], index.numpy().astype(np.int64)
        whole = along == 1  # a channel is a word
        size = length if whole else _neighbours(channels) if step == 1 else 1
        first = (channels if whole else channels[::size]) * step
        self._along, self._in_row = along, len(first)
        self.num_rows = 1 if whole else length
        self.block_rows = max(1, min(self.num_rows, _ROWS, _WORDS // len(first)))
        rows = np.arange(self.block_rows) * along
        # Of the words of the first block; a slice takes about half as long as so many places.
        self._where: slice | np.ndarray = (rows[:, None] + first).ravel()
        if len(first) == 1:
            self._where = slice(int(first[0]), int(first[0]) + self.block_rows * along, along)

        word = np.dtype(f"V{size * weight.itemsize}")
        numbers = 1 + sum((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True))
        memory = _bytes(weight.as_strided((numbers,), (1,)))
        # A word begins at every number: they overlap.
        self._memory = np.ndarray(
            numbers - size + 1, word, buffer=memory, strides=(weight.itemsize,)
        )
        # One row of the values for each row of the blocks.
        flip = whole == (axis == 1)
        self._values = [_bytes(v.t() if flip else v).view(word) for v in (value, base)]

    def write_block(self, first: int, restore: bool) -> None:
        """The values of the adapter, or of the base, for the block that begins at row `first`."""
        memory, where, words = self._memory, self._where, self._values[restore]
        if self.block_rows < self.num_rows:
            memory = memory[first * self._along :]
            words = words[first * self._in_row : (first + self.block_rows) * self._in_row]
            if isinstance(where, slice):
                where = slice(where.start, where.start + len(words) * self._along, self._along)
            else:
                where = where[: len(words)]
        memory[where] = words

    def write(self, restore: bool) -> None:
        for first in range(0, self.num_rows, self.block_rows):
            self.write_block(first, restore)


def exchange(old: Words, new: Words) -> None:
    """Restore the old channels and write the new ones, of the same weight along the same axis."""
    done = 0
    for first in range(0, new.num_rows, new.block_rows):
        # Where the two meet, the new value has to win.
        while done < min(first + new.block_rows, old.num_rows):
            old.write_block(done, restore=True)
            done += old.block_rows
        new.write_block(first, restore=False)


def _neighbours(channels: np.ndarray) -> int:
    """The largest size such that the channels are runs of that size, one after another."""
    begins = np.flatnonzero(np.diff(channels) != 1) + 1
    return math.gcd(len(channels), *begins.tolist())


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy()
