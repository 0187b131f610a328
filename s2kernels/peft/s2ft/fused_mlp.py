"""Gated FFNs as one Function, where that computes the same.

A FFN is given a forward of its own, beside that of its class. With one adapter active, not merged,
over plain dense weights and without hooks in between, it computes what the class would, to
rounding, by `S2MLPFunction`, which keeps less for the backward and makes fewer passes over memory.
With anything else, and under torch.compile, which fuses as well, it is the forward of the class.

On a GPU the weights of gate and up are laid one after the other: the pair is one GEMM.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s2kernels import backend
from s2kernels.autograd.first_order import apply
from s2kernels.autograd.joined import joined
from s2kernels.autograd.mlp import S2MLPFunction, operands
from s2kernels.capturing import is_capturing
from s2kernels.coupling import Structure
from s2kernels.peft.host.kept_buffers import with_values
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.s2ft.arranged_weights import arrangement_of
from s2kernels.peft.s2ft.fusion_checks import (
    are_alike,
    is_silu,
    linear_behind,
    note_bare_linear,
    sole_active_adapter,
    weights_match_input,
)
from s2kernels.peft.s2ft.linear import S2FTLinear, holding_for


class Gated(NamedTuple):
    """What a forward computes down(activation(gate(x)) * up(x)) with; gate_up may be one module."""

    gate_up: tuple[str, ...]
    down: str
    activation: str


_LLAMA = Gated(("gate_proj", "up_proj"), "down_proj", "act_fn")
_PHI3 = Gated(("gate_up_proj",), "down_proj", "activation_fn")
# The forwards that do: their class, and the model type that defines it.
_CLASSES = {
    ("LlamaMLP", "llama"): _LLAMA,
    ("MistralMLP", "mistral"): _LLAMA,
    ("Qwen2MLP", "qwen2"): _LLAMA,
    ("Qwen3MLP", "qwen3"): _LLAMA,
    ("Qwen3MoeMLP", "qwen3_moe"): _LLAMA,
    ("Phi3MLP", "phi3"): _PHI3,
}
# A class that inherits one of them computes the same; one that overrides it is not here.
GATED = {
    (f"transformers.models.{model}.modeling_{model}", f"{name}.forward"): gated
    for (name, model), gated in _CLASSES.items()
}


class MLPCall(NamedTuple):
    """What a forward of the FFN does now.

    written: for each layer the adapter that its weight is to hold. operands: of `S2MLPFunction`,
    with the weight of gate first; None where it is the forward of the class.
    """

    changes: int
    premises: Premises
    written: dict[S2FTLinear, str | None]
    operands: tuple | None = None


def fuse_mlp(keeper: WeightKeeper, structure: Structure) -> None:
    """Give the FFN a forward of its own, if that can be."""
    module = keeper.model.get_submodule(structure.name)
    forward = type(module).forward
    gated = GATED.get((forward.__module__, forward.__qualname__))
    if gated is None or "forward" in vars(module):
        return
    modules = [module.get_submodule(name) for name in (*gated.gate_up, gated.down)]
    if not any(isinstance(each, S2FTLinear) for each in modules):
        return
    module.forward = FusedMLP(module, gated, keeper)
    linears = [linear_behind(each) for each in modules[:-1]]
    if len(linears) == 2 and linears[0] is not None and linears[1] is not None:
        arrangement_of(keeper).pairs.append((linears[0], linears[1]))


def join_all(keeper: WeightKeeper) -> None:
    """Join the frozen weights of all `pairs` that are on a GPU and this model's alone to move.

    The weights of a pair lay in segments of the allocator that are too small for both together, so
    they stay reserved and empty: 86 + 86 MiB a layer of LLaMA-2-7B, about 5.5 GB in all.
    They are given back to the device once, after the last pair.
    """
    arrangement = arrangement_of(keeper)
    num_moved = 0
    for pair in arrangement.pairs:
        first, second = weights = [linear.weight for linear in pair]
        if not are_alike(weights) or not backend.prefers_joined(first):
            continue
        if all(keeper.obstacles.of(weight) is None for weight in weights):
            assert isinstance(first, nn.Parameter) and isinstance(second, nn.Parameter)
            num_moved += arrangement.join(first, second)
    if num_moved and torch.accelerator.is_available() and not is_capturing():
        torch.accelerator.empty_cache()


class FusedMLP:
    """The forward of one gated FFN, `module`."""

    def __init__(self, module: nn.Module, gated: Gated, keeper: WeightKeeper) -> None:
        self.module, self.gated, self.keeper = module, gated, keeper
        self._call: MLPCall | None = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_call": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or len(args) != 1 or kwargs:
            return type(self.module).forward(self.module, *args, **kwargs)
        keeper, call, (x,) = self.keeper, self._call, args
        is_ready = keeper.is_ready(call)
        if not is_ready and (
            call is None or call.changes != keeper.changes or not call.premises.hold()
        ):
            with torch.inference_mode(False):  # views made there could not be saved for a backward
                call = self._call = self._prepare()
        assert call is not None
        if (
            call.operands is None
            or keeper.forwards.rows is not None
            or not weights_match_input(call.operands[0], x)
        ):
            return type(self.module).forward(self.module, x)
        if is_ready or keeper.are_ready(call.written):
            return apply(S2MLPFunction, x, *call.operands)
        with keeper.forwards.lock:
            keeper.ensure_written(call.written)
            return apply(S2MLPFunction, x, *call.operands)

    def _prepare(self) -> MLPCall:
        """What a forward does until something changes."""
        names = (*self.gated.gate_up, self.gated.down)
        modules = [getattr(self.module, name) for name in names]
        layers = [each for each in modules if isinstance(each, S2FTLinear)]
        for layer in layers:
            self.keeper.notice_call(layer)
            layer.known.look()
        found = self._operands(modules, layers)
        premises = Premises()
        premises.unwatched()
        for name in (*names, self.gated.activation):
            premises.same_child(self.module, name)
            note_bare_linear(premises, getattr(self.module, name))
        if not premises.hold():  # there are hooks: each call looks whether they still are
            return MLPCall(-1, premises, {})
        written, given = found or ({}, None)
        for layer in written:
            layer.note(premises, written[layer])
        self.keeper.expect(premises)
        return MLPCall(self.keeper.changes, premises, written, given)

    def _operands(
        self, modules: list[nn.Module], layers: list[S2FTLinear]
    ) -> tuple[dict[S2FTLinear, str | None], tuple] | None:
        """What is to be written for one Function, and its operands; None where it would not compute
        what the modules do.
        """
        linears = [linear for linear in map(linear_behind, modules) if linear is not None]
        adapter = sole_active_adapter(layers)
        if adapter is None or len(linears) < len(modules):
            return None
        weights: list[Tensor] = [linear.weight for linear in linears]
        if not are_alike(weights) or not is_silu(getattr(self.module, self.gated.activation)):
            return None
        trained = [layer for layer in layers if adapter in layer.active()]
        if len(modules) == 2 and modules[0] in trained:
            return None  # the trained channels of gate and up in one weight are two sets of them
        written = {layer: layer.written_adapter() for layer in layers}
        arrived = {layer: layer.arrived_adapter() for layer in layers}
        modes = {(written[layer] or arrived[layer]) is not None for layer in trained}
        positions = [layer.positions[adapter] for layer in trained]
        if len(modes) > 1 or not _are_the_same([layer.s2ft_index[adapter] for layer in trained]):
            return None

        biases: list[Tensor | None] = [linear.bias for linear in linears]
        deltas = [layer.s2ft_delta[adapter] if layer in trained else None for layer in modules]
        if len(modules) == 2:
            both: Tensor | None = weights[0]
            weights = [*weights[0].chunk(2), weights[1]]
            biases = [*((None, None) if biases[0] is None else biases[0].chunk(2)), biases[1]]
            deltas = [None, *deltas]
        else:
            both = joined(*weights[:2])
            if both is None and backend.prefers_joined(weights[0]):
                join_all(self.keeper)
                both = joined(*weights[:2])
        mode = "inplace" if modes == {True} else "additive"
        held = holding_for(written)
        return written, operands(weights, biases, deltas, positions[0], mode, both, held)


def _are_the_same(indices: list[Tensor]) -> bool:
    with with_values():
        return all(torch.equal(indices[0], each) for each in indices[1:])
