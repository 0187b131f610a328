"""Gated FFNs as one Function, where that computes the same.

A FFN is given a forward of its own, beside that of its class. With one adapter active, not merged,
over plain dense weights and without hooks in between, it computes what the class would, to
rounding, by `S2MLPFunction`, which keeps less for the backward and makes fewer passes over memory.
With anything else, and under torch.compile, which fuses as well, it is the forward of the class.

On a GPU the weights of gate and up are laid one after the other: the pair is one GEMM.
"""

from typing import Any

import torch
from torch import Tensor, nn

from s2kernels import backend
from s2kernels.autograd.checks import is_autocast
from s2kernels.autograd.first_order import apply
from s2kernels.autograd.joined import joined
from s2kernels.autograd.mlp import S2MLPFunction, operands
from s2kernels.coupling import Structure
from s2kernels.peft.host.kept_buffers import with_values
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.s2ft.arranged_weights import are_alike, arrangement_of
from s2kernels.peft.s2ft.layer import PreparedCall
from s2kernels.peft.s2ft.linear import S2FTLinear, holding_for

_LLAMA = ("gate_proj", "up_proj", "down_proj", "act_fn")
_PHI3 = ("gate_up_proj", "down_proj", "activation_fn")
# The forwards that compute down(activation(gate(x)) * up(x)), and the names of their modules, the
# activation last. A class that inherits a forward computes the same; one that overrides it is not
# here.
GATED = {
    ("transformers.models.llama.modeling_llama", "LlamaMLP.forward"): _LLAMA,
    ("transformers.models.mistral.modeling_mistral", "MistralMLP.forward"): _LLAMA,
    ("transformers.models.qwen2.modeling_qwen2", "Qwen2MLP.forward"): _LLAMA,
    ("transformers.models.qwen3.modeling_qwen3", "Qwen3MLP.forward"): _LLAMA,
    ("transformers.models.qwen3_moe.modeling_qwen3_moe", "Qwen3MoeMLP.forward"): _LLAMA,
    ("transformers.models.phi3.modeling_phi3", "Phi3MLP.forward"): _PHI3,
}


def fuse_mlp(keeper: WeightKeeper, structure: Structure) -> None:
    """Give the FFN a forward of its own, if that can be."""
    module = keeper.model.get_submodule(structure.name)
    forward = type(module).forward
    names = GATED.get((forward.__module__, forward.__qualname__))
    if names is None or "forward" in vars(module):
        return
    modules = [module.get_submodule(name) for name in names[:-1]]
    if not any(isinstance(each, S2FTLinear) for each in modules):
        return
    module.forward = FusedMLP(module, names, keeper)
    gate_up = [linear_behind(each) for each in modules[:-1]]
    if len(gate_up) == 2 and all(type(linear) is nn.Linear for linear in gate_up):
        arrangement_of(keeper).pairs.append((gate_up[0], gate_up[1]))


class FusedMLP:
    """The forward of one gated FFN, `module`; names: see `GATED`."""

    def __init__(self, module: nn.Module, names: tuple[str, ...], keeper: WeightKeeper) -> None:
        self.module, self.names, self.keeper = module, names, keeper
        self._call: PreparedCall | None = None  # of `S2MLPFunction`, with the weight of gate first

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_call": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling() or len(args) != 1 or kwargs:
            return type(self.module).forward(self.module, *args, **kwargs)
        keeper, call, (x,) = self.keeper, self._call, args
        is_ready = keeper.is_ready(call)
        if not (is_ready or keeper.is_up_to_date(call)):
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

    def _prepare(self) -> PreparedCall:
        """What a forward does until something changes."""
        *modules, activation = (getattr(self.module, name) for name in self.names)
        layers = [each for each in modules if isinstance(each, S2FTLinear)]
        for layer in layers:
            self.keeper.notice_call(layer)
            layer.known.look()
        linears = [linear_behind(each) for each in modules]
        premises = Premises()
        premises.unwatched()
        for name in self.names:
            premises.same_child(self.module, name)
        for layer in layers:
            premises.same_child(layer, "base_layer")
        for each in (*modules, *linears, activation):
            premises.bare(each)
        if not premises.hold():  # there are hooks: each call looks whether they still are
            return PreparedCall(-1, premises, {})
        is_plain = is_silu(activation) and all(type(linear) is nn.Linear for linear in linears)
        found = self._operands(modules, layers, linears) if is_plain else None
        for linear in linears if is_plain else ():  # only now: they may have been joined
            for name in ("weight", "bias"):
                premises.same_tensor(linear, name)
            premises.as_trainable(linear.weight)
            premises.unmoved(linear.weight)
        written, given = found or ({}, None)
        for layer in written:
            layer.note(premises, written[layer])
        self.keeper.expect(premises)
        return PreparedCall(self.keeper.changes, premises, written, given)

    def _operands(
        self, modules: list[nn.Module], layers: list[S2FTLinear], linears: list[nn.Linear]
    ) -> tuple[dict[S2FTLinear, str | None], tuple] | None:
        """What is to be written for one Function, and its operands; None where it would not compute
        what the modules do.
        """
        adapters = {name for layer in layers for name in layer.active()}
        if len(adapters) != 1 or any(layer.disable_adapters or layer.merged for layer in layers):
            return None
        (adapter,) = adapters
        weights: list[Tensor] = [linear.weight for linear in linears]
        if not are_alike(weights) or not all(layer.fuse.get(adapter, True) for layer in layers):
            return None
        trained = [layer for layer in layers if adapter in layer.active()]
        if len(modules) == 2 and modules[0] in trained:
            return None  # the trained channels of gate and up in one weight are two sets of them
        written = {layer: layer.written_adapter() for layer in layers}
        arrived = {layer: layer.arrived_adapter() for layer in layers}
        modes = {(written[layer] or arrived[layer]) is not None for layer in trained}
        positions = [layer.positions[adapter] for layer in trained]
        with with_values():
            first, *others = (layer.s2ft_index[adapter] for layer in trained)
            if len(modes) > 1 or not all(torch.equal(first, other) for other in others):
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
                arrangement_of(self.keeper).join_pairs(self.keeper.obstacles)
                both = joined(*weights[:2])
        mode = "inplace" if modes == {True} else "additive"
        held = holding_for(written)
        return written, operands(weights, biases, deltas, positions[0], mode, both, held)


def linear_behind(module: Any) -> Any:
    """What multiplies in a call of the module: that itself, or what our layer is for."""
    return module.base_layer if isinstance(module, S2FTLinear) else module


def is_silu(activation: nn.Module) -> bool:
    """Whether a call computes silu; transformers has a class of its own for it."""
    kind = type(activation)
    names = kind.__module__, kind.__name__
    return kind is nn.SiLU or names == ("transformers.activations", "SiLUActivation")


def weights_match_input(weight: Tensor, x: Tensor) -> bool:
    """Whether torch.nn.Linear would multiply x with the weight as they are."""
    return (x.dtype == weight.dtype or is_autocast(x)) and x.device == weight.device
