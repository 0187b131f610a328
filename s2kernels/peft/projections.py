"""q, k and v of an attention, three frozen linear layers of one input, as one Function."""

import weakref
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from s2kernels import backend
from s2kernels.autograd.checks import compute_dtype, version_of
from s2kernels.autograd.joined import joined_linear
from s2kernels.peft.fusable import fit, has_hooks, one_adapter
from s2kernels.peft.layer import S2FTLayer

if TYPE_CHECKING:
    from s2kernels.peft.base_weights import BaseWeights


class SharedInput:
    """q, k and v of one attention, which are called with the same x: the first call computes all.

    The others are handed out to calls with that very x. Nothing is kept for longer than x lives,
    nor after all were handed out.
    """

    def __init__(
        self, modules: list[nn.Linear], layer: S2FTLayer, base_weights: "BaseWeights"
    ) -> None:
        self.modules, self.layer, self.base_weights = modules, layer, base_weights
        self._waiting: _Waiting | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_waiting": None}

    def output(self, i: int, x: Tensor) -> Tensor:
        """What modules[i] gives for x."""
        if not torch.compiler.is_compiling():
            y = self._compute(x) if i == 0 else self._handed_out(i, x)
            if y is not None:
                return y
        return type(self.modules[i]).forward(self.modules[i], x)

    def _compute(self, x: Tensor) -> Tensor | None:
        self._waiting = None
        weights = [module.weight for module in self.modules]
        # elsewhere the one Function would do no less than the three
        if not backend.prefers_joined(weights[0]) or not fit(x, weights):
            return None
        # a hook may fetch the weight for the call, or change the output in place, where autograd
        # wants it not to be one of several views
        if any(map(has_hooks, self.modules)):
            return None
        biases = [module.bias for module in self.modules]
        if one_adapter([self.layer]) is None or any(
            b is not None and b.requires_grad for b in biases
        ):
            return None
        self.base_weights.join(*weights[:2])
        y, *others = joined_linear(x, weights, biases)
        ref = weakref.ref(x, self._forget)
        self._waiting = _Waiting(ref, _state(x), {})
        for i, other in enumerate(others, start=1):
            self._waiting.outputs[i] = other, weights[i], version_of(weights[i])
        return y

    def _handed_out(self, i: int, x: Tensor) -> Tensor | None:
        waiting = self._waiting
        if waiting is None or waiting.x() is not x or waiting.state != _state(x):
            return None
        y, weight, version = waiting.outputs.pop(i, (None, None, 0))
        if not waiting.outputs:
            self._waiting = None
        if weight is not self.modules[i].weight or version != version_of(weight):
            return None
        return y

    def _forget(self, ref: weakref.ref) -> None:
        if self._waiting is not None and self._waiting.x is ref:
            self._waiting = None


class Projection:
    """The forward of one of the `modules` that share their input."""

    def __init__(self, inputs: SharedInput, i: int) -> None:
        self.inputs, self.i = inputs, i

    def __call__(self, input: Tensor) -> Tensor:  # as torch.nn.Linear names it
        return self.inputs.output(self.i, input)


class _Waiting(NamedTuple):
    x: weakref.ref
    state: tuple
    outputs: dict[int, tuple[Tensor, Tensor, int]]  # with the weight and its version


def _state(x: Tensor) -> tuple:
    """What an output depends on, besides x and the weight."""
    return version_of(x), compute_dtype(x), torch.is_grad_enabled()
