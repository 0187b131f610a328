"""q, k and v of an attention, three frozen linear layers of one input, as one Function.

On a GPU the weights of q and k are laid one after the other: with few tokens the pair is one GEMM.
Not those of v: attention saves v, which as a view of one tensor would keep q and k alive.
"""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor, nn

from s2kernels import backend
from s2kernels.autograd.checks import compute_dtype, version_of
from s2kernels.autograd.joined import Run, joined, joined_linear, runs_of
from s2kernels.coupling import Structure
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.s2ft.arranged_weights import arrangement_of
from s2kernels.peft.s2ft.fused_mlp import join_all
from s2kernels.peft.s2ft.fusion_checks import (
    are_alike,
    sole_active_adapter,
    weights_match_input,
)
from s2kernels.peft.s2ft.layer import S2FTLayer


class QKVCall(NamedTuple):
    """What the three compute together now; runs is None where each computes its own."""

    changes: int
    premises: Premises
    weights: list[Tensor]
    runs: list[Run] | None


def fuse_qkv(keeper: WeightKeeper, structure: Structure) -> None:
    """Give q, k and v forwards that share their input, if all are plain."""
    names = [name for name, member in structure.projections.items() if member.dim == "out"]
    module = keeper.model.get_submodule(structure.name)
    linears = [
        each
        for each in map(module.get_submodule, names)
        if type(each) is nn.Linear and "forward" not in vars(each)
    ]
    if len(names) != 3 or len(linears) != 3:
        return
    own = [layer for layer in keeper.layers if layer.structure == structure.name]
    inputs = SharedInput(linears, (own or keeper.layers)[0], keeper)
    for i, linear in enumerate(linears):
        linear.forward = Projection(inputs, i)  # type: ignore[method-assign]
    arrangement_of(keeper).pairs.append((linears[0], linears[1]))


class SharedInput:
    """q, k and v of one attention, which are called with the same x: the first call computes all.

    The others are handed out to calls with that very x. Nothing is kept for longer than x lives,
    nor after all were handed out.
    """

    def __init__(self, modules: list[nn.Linear], layer: S2FTLayer, keeper: WeightKeeper) -> None:
        self.modules, self.layer, self.keeper = modules, layer, keeper
        self._call: QKVCall | None = None
        self._waiting: _Waiting | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_call": None, "_waiting": None}

    def output(self, i: int, x: Tensor) -> Tensor:
        """What modules[i] gives for x."""
        if i > 0:
            y = None if self._waiting is None else self._handed_out(i, x)
        else:
            y = None if torch.compiler.is_compiling() else self._compute(x)
        if y is not None:
            return y
        return type(self.modules[i]).forward(self.modules[i], x)

    def _compute(self, x: Tensor) -> Tensor | None:
        self._waiting = None
        call = self._prepared()
        if (
            call.runs is None
            or self.keeper.forwards.rows is not None
            or not weights_match_input(call.weights[0], x)
        ):
            return None
        y, *others = joined_linear(x, call.weights, call.runs)
        outputs = dict(enumerate(others, start=1))
        self._waiting = _Waiting(weakref.ref(x, self._forget), _state(x), call, outputs)
        return y

    def _handed_out(self, i: int, x: Tensor) -> Tensor | None:
        waiting = self._waiting
        if waiting is None or waiting.x() is not x or waiting.state != _state(x):
            return None
        y = waiting.outputs.pop(i, None)
        if not waiting.outputs:
            self._waiting = None
        return y if self._call is waiting.call and waiting.call.premises.hold() else None

    def _prepared(self) -> QKVCall:
        """What the three compute together, until something changes."""
        call = self._call
        if call is None or call.changes != self.keeper.changes or not call.premises.hold():
            with torch.inference_mode(False):  # views made there could not be saved for a backward
                call = self._call = self._prepare()
        return call

    def _prepare(self) -> QKVCall:
        weights = [module.weight for module in self.modules]
        biases = [module.bias for module in self.modules]
        frozen = [*weights, *(bias for bias in biases if bias is not None)]
        # elsewhere than on a GPU the one Function would do no less than the three
        together = (
            backend.prefers_joined(weights[0])
            and are_alike(weights)
            and not any(tensor.requires_grad for tensor in frozen)
            and sole_active_adapter([self.layer]) is not None
        )
        if together and joined(*weights[:2]) is None:
            self.keeper.notice_call(self.layer)
            join_all(self.keeper)
        premises = Premises()
        for module in self.modules:
            # a hook may fetch the weight for the call, or change the output in place, where
            # autograd wants it not to be one of several views
            premises.unhooked(module)
            for name in ("weight", "bias"):
                premises.same_tensor(module, name)
        for tensor in frozen:
            premises.as_trainable(tensor)
            premises.unmoved(tensor)
            premises.unwritten(tensor)
        runs = runs_of(weights, biases) if together and premises.hold() else None
        return QKVCall(self.keeper.changes, premises, weights, runs)

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
    call: QKVCall
    outputs: dict[int, Tensor]


def _state(x: Tensor) -> tuple:
    """What an output depends on, besides x and the weights."""
    return version_of(x), compute_dtype(x), torch.is_grad_enabled()
