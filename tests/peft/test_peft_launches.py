"""What a layer of an S2FT model launches: GEMMs and sums, forward and backward together."""

from collections import Counter

import pytest
from peft import get_peft_model
from tiny_models import tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode

from s2kernels import backend
from s2kernels.peft import S2FTConfig

GEMMS = {"mm", "addmm", "addmm_", "linear"}
SUMS = {"add", "add_"}


class Count(TorchDispatchMode):
    """How often each op of aten ran."""

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def of_a_layer(fuse: bool) -> Counter:
    """What one more layer adds to a step without the optimizer; not the first, which ends early."""
    counts = []
    for num_layers in (2, 3):
        model = tiny_model("llama", num_hidden_layers=num_layers).train()
        model = get_peft_model(model, S2FTConfig(heads=1, channels=8, fuse=fuse))
        ids = token_ids()
        for _ in range(2):  # the first step lays out weights
            with Count() as count:
                model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        counts.append(count.ops)
    counts[1].subtract(counts[0])
    return counts[1]


def num(ops: Counter, names: set[str]) -> int:
    return sum(ops[name] for name in names)


@pytest.mark.parametrize("joined", (True, False), ids=("joined", "apart"))
def test_gemms_of_a_layer(joined, monkeypatch):
    """Forward q, k, v, o, gate_up, down; dx of each; two slice gradients."""
    monkeypatch.setattr(backend, "prefers_joined", lambda weight: joined)
    fused, apart = of_a_layer(fuse=True), of_a_layer(fuse=False)
    assert num(apart, GEMMS) == 7 + 7 + 2
    assert num(fused, GEMMS) == (6 + 6 + 2 if joined else 7 + 7 + 2)


def test_gradients_of_gate_and_up_are_summed_within_gemms(monkeypatch):
    """autograd would add two of (M, K)."""
    monkeypatch.setattr(backend, "prefers_joined", lambda weight: True)
    fused, apart = of_a_layer(fuse=True), of_a_layer(fuse=False)
    assert num(apart, SUMS) - num(fused, SUMS) == 1
