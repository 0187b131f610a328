"""Gated FFNs as one Function, and the q, k and v of an attention as one, where that is the same.

A FFN and the three projections are given a forward of their own, beside that of their class. At
every call it looks at what is there: with one adapter active, not merged, over plain dense weights
and without hooks in between, it computes what the class would, to rounding, by `mlp` and
`joined_linear`, which keep less for the backward and make fewer passes over memory. With anything
else, and under torch.compile, which fuses as well, it is the forward of the class.

On a GPU the weights of gate and up are laid one after the other, at once or at the next call after
they were moved, and so are those of q and k: each pair is one GEMM. Not those of v: attention saves
v, which as a view of one tensor would keep q and k alive.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from s2kernels import backend
from s2kernels.autograd.checks import version_of
from s2kernels.autograd.mlp import mlp
from s2kernels.coupling import Structure
from s2kernels.peft.fusable import are_alike, fit, is_silu, is_watched, linear_behind, one_adapter
from s2kernels.peft.linear import S2FTLinear
from s2kernels.peft.projections import Projection, SharedInput
from s2kernels.reference import Index

if TYPE_CHECKING:
    from s2kernels.peft.base_weights import BaseWeights


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


def fuse(base_weights: "BaseWeights") -> list[nn.Module]:
    """Gives the FFNs and projections of the model their forwards; returns which have one now."""
    fused = []
    for structure in base_weights.structures.values():
        if structure.kind == "ffn":
            fused += _fuse_ffn(base_weights, structure)
        elif structure.kind == "attention":
            fused += _fuse_projections(base_weights, structure)
    return fused


def unfuse(modules: Iterable[nn.Module]) -> None:
    """Takes the forwards off again, those that something else has not replaced."""
    for module in modules:
        if isinstance(vars(module).get("forward"), (FusedFFN, Projection)):
            del module.forward


def _fuse_ffn(base_weights: "BaseWeights", structure: Structure) -> list[nn.Module]:
    module = base_weights.model.get_submodule(structure.name)
    forward = type(module).forward
    gated = GATED.get((forward.__module__, forward.__qualname__))
    if gated is None or "forward" in vars(module):
        return []
    modules = [module.get_submodule(name) for name in (*gated.gate_up, gated.down)]
    if not any(isinstance(each, S2FTLinear) for each in modules):
        return []
    module.forward = FusedFFN(module, gated, base_weights)
    _join(base_weights, [linear_behind(each) for each in modules[:-1]])
    return [module]


def _fuse_projections(base_weights: "BaseWeights", structure: Structure) -> list[nn.Module]:
    names = [name for name, member in structure.projections.items() if member.dim == "out"]
    module = base_weights.model.get_submodule(structure.name)
    linears = [
        each
        for each in map(module.get_submodule, names)
        if type(each) is nn.Linear and "forward" not in vars(each)
    ]
    if len(names) != 3 or len(linears) != 3:
        return []
    own = [layer for layer in base_weights.layers if layer.structure == structure.name]
    inputs = SharedInput(linears, (own or base_weights.layers)[0], base_weights)
    for i, linear in enumerate(linears):
        linear.forward = Projection(inputs, i)  # type: ignore[method-assign]
    _join(base_weights, linears[:2])
    return [*linears]


def _join(base_weights: "BaseWeights", linears: Sequence[nn.Linear | None]) -> None:
    """As early as can be: a GEMM may round otherwise where its operands lie elsewhere."""
    weights = [linear.weight for linear in linears if linear is not None]
    if len(weights) == 2 and are_alike(weights) and backend.prefers_joined(weights[0]):
        base_weights.join(*weights)


class Operands(NamedTuple):
    """The arguments of `mlp` after x."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    deltas: Sequence[Tensor | None]
    where: Index
    mode: str
    before_dx: Callable[[], None]


class FusedFFN:
    """The forward of one gated FFN, `module`."""

    def __init__(self, module: nn.Module, gated: Gated, base_weights: "BaseWeights") -> None:
        self.module, self.gated, self.base_weights = module, gated, base_weights
        # positions that were compared, with their versions, and whether they are the same
        self._compared: tuple[list[tuple[Tensor, int]], bool] = ([], True)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling() and len(args) == 1 and not kwargs:
            operands = self._operands(args[0])
            if operands is not None:
                return mlp(args[0], *operands)
        return type(self.module).forward(self.module, *args, **kwargs)

    def _operands(self, x: Tensor) -> Operands | None:
        """What the one Function takes; None where it would not compute what the modules do."""
        if is_watched():
            return None
        modules = [getattr(self.module, name) for name in (*self.gated.gate_up, self.gated.down)]
        layers = [module for module in modules if isinstance(module, S2FTLinear)]
        for layer in layers:
            layer.refresh()
        name = one_adapter(layers)
        linears = [linear for linear in map(linear_behind, modules) if linear is not None]
        if name is None or len(linears) < len(modules) or not fit(x, [m.weight for m in linears]):
            return None
        if not is_silu(getattr(self.module, self.gated.activation)):
            return None
        trained = [
            layer for layer in layers if name in layer.s2ft_delta and name in layer.active_adapters
        ]
        if len(modules) == 2 and modules[0] in trained:
            return None  # the trained channels of gate and up in one weight are two sets of them
        inplace = {layer.inplace_adapter() == name for layer in trained}
        positions = [layer.positions[name] for layer in trained]
        if len(inplace) > 1 or not self._are_the_same(positions):
            return None

        written = trained if inplace == {True} else []
        for layer in layers:
            if layer not in written:
                layer.restore()
        if written:
            self.base_weights.write_before(written, name)
        calls = [layer.before_dx(name if layer in written else None) for layer in layers]
        weights: list[Tensor] = [linear.weight for linear in linears]
        biases: list[Tensor | None] = [linear.bias for linear in linears]
        deltas = [layer.s2ft_delta[name] if layer in trained else None for layer in modules]
        if len(modules) == 3 and backend.prefers_joined(weights[0]):
            self.base_weights.join(*weights[:2])
        if len(modules) == 2:
            weights = [*weights[0].chunk(2), weights[1]]
            biases = [*((None, None) if biases[0] is None else biases[0].chunk(2)), biases[1]]
            deltas = [None, *deltas]
        mode = "inplace" if written else "additive"
        before_dx = partial(_call_all, calls)
        return Operands(weights, biases, deltas, positions[0], mode, before_dx)

    def _are_the_same(self, positions: list[Index]) -> bool:
        first = positions[0]
        if any(isinstance(each, slice) for each in positions):
            return all(isinstance(each, slice) and each == first for each in positions)
        # comparing them waits for the device, and they are the same ones in every step
        seen = [(each, version_of(each)) for each in positions if isinstance(each, Tensor)]
        before, same = self._compared
        if [(id(each), version) for each, version in before] != [(id(p), v) for p, v in seen]:
            others = [each for each, _ in seen[1:]]
            same = all(not each.is_meta and torch.equal(seen[0][0], each) for each in others)
            self._compared = (seen, same)
        return same


def _call_all(functions: list[Callable[[], None] | None]) -> None:
    for function in functions:
        if function is not None:
            function()
