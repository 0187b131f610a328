"""Channels written in words, for every layout: the bits of all memory, also around the weight."""

import pytest
import torch

from s2kernels.serve import words as words_module
from s2kernels.serve.words import Words, exchange

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn]
N, K = 13, 11
STRIDES = {
    "rows": (K, 1),
    "wide rows": (K + 3, 1),
    "columns": (1, N),  # as of a Conv1D
    "wide columns": (1, N + 3),
    "no neighbours": (2 * K, 2),
    "no neighbours, columns": (3, 3 * N),
}
INDEX = {
    "one": [4],
    "run": [3, 4, 5, 6],
    "groups": [8, 9, 2, 3, 5, 6],
    "uneven groups": [0, 1, 2, 7, 8, 9, 10],
    "scattered": [7, 0, 3, 9, 1],
    "all": list(range(11)),
}
each_layout = pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES)
each_axis = pytest.mark.parametrize("axis", [0, 1])


def random(*shape, dtype):
    """Any bits, among them those of NaN and of negative zero."""
    *outer, last = shape
    return torch.randint(0, 256, (*outer, last * dtype.itemsize), dtype=torch.uint8).view(dtype)


class Problem:
    """A weight that lies within `memory`, and what that must hold."""

    def __init__(self, strides, dtype):
        self.memory = random(3 * N * K + 9, dtype=dtype)
        self.wanted = self.memory.clone()
        self.strides = strides
        self.weight = self.view(self.memory)

    def view(self, memory):
        return memory.as_strided((N, K), self.strides, 4)

    def words(self, axis, index):
        index = torch.tensor(index, dtype=torch.int32)
        base = self.weight.index_select(axis, index)
        value = random(*base.shape, dtype=base.dtype)
        return Words(self.weight, axis, index, base, value), index, value

    def want(self, axis, index, value):
        weight = self.view(self.wanted)
        for place, channel in enumerate(index.tolist()):
            weight.select(axis, channel).copy_(value.select(axis, place))

    def check(self):
        assert torch.equal(self.memory.view(torch.uint8), self.wanted.view(torch.uint8))


@each_layout
@each_axis
@pytest.mark.parametrize("index", INDEX.values(), ids=INDEX)
@pytest.mark.parametrize("rows", [1024, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_written_and_restored(strides, axis, index, rows, dtype, monkeypatch):
    monkeypatch.setattr(words_module, "_ROWS", rows)
    problem = Problem(strides, dtype)
    words, channels, value = problem.words(axis, index)
    before = problem.wanted.clone()
    words.write(restore=False)
    problem.want(axis, channels, value)
    problem.check()
    words.write(restore=True)
    problem.wanted = before
    problem.check()


@each_layout
@each_axis
@pytest.mark.parametrize(("words", "rows"), [(2**14, 1024), (12, 1024), (2**14, 5)])
def test_the_new_value_wins_where_old_and_new_meet(strides, axis, words, rows, monkeypatch):
    """Blocks of either have other sizes, where as many words as fit make a block."""
    monkeypatch.setattr(words_module, "_ROWS", rows)
    monkeypatch.setattr(words_module, "_WORDS", words)
    problem = Problem(strides, torch.float32)
    made = {name: problem.words(axis, index) for name, index in INDEX.items()}
    for old, _, _ in made.values():
        for new, channels, value in made.values():
            before = problem.wanted.clone()
            old.write(restore=False)
            exchange(old, new)
            problem.want(axis, channels, value)
            problem.check()
            new.write(restore=True)
            problem.wanted = before
            problem.check()


def test_a_word_is_as_large_as_the_layout_allows():
    def sizes(strides, axis):
        problem = Problem(strides, torch.float32)
        found = {name: problem.words(axis, index)[0] for name, index in INDEX.items()}
        return {name: words._memory.itemsize // 4 for name, words in found.items()}

    runs = dict(zip(INDEX, [1, 4, 2, 1, 1, 11], strict=True))
    assert sizes(STRIDES["rows"], 0) == dict.fromkeys(INDEX, K)
    assert sizes(STRIDES["columns"], 1) == dict.fromkeys(INDEX, N)
    assert sizes(STRIDES["rows"], 1) == sizes(STRIDES["wide columns"], 0) == runs
    assert sizes(STRIDES["no neighbours"], 1) == dict.fromkeys(INDEX, 1)
