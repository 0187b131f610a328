"""The fastest LoRA that we can write, so that S2FT is compared with that as well.

Of each linear layer the weight W (N, K) is frozen, A (r, K) and Bt (r, N), B transposed, are
trained. With M tokens, r the rank and s = alpha / r:

    xa = s x Aᵀ         y = x Wᵀ + b + xa Bt
    dxa = s dy Btᵀ      dx = dy W + dxa A
    dA = dxaᵀ x         dBt = xaᵀ dy

The small dimension is contracted first, what is as wide as x or y is accumulated by the products
themselves (addmm), and no product is made twice: xa (M, r) is saved.

Layers that read the same x are one `Stack`: q, k, v; gate, up. Their frozen weights lie one below
the other in one tensor, in the place of the modules' own, and so do their A; their Bt lie side by
side. gate and up are one product where `backend.prefers_joined` has S2FT join them. The FFN is one
Function that saves x, gate and up; the backward of SwiGLU rebuilds h, and writes over gate and up.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from bench.methods.base import Method
from s2kernels import backend, reference
from s2kernels.autograd.joined import add_dx
from s2kernels.autograd.mlp import room_for_gradients

SCALE = 2.0  # alpha / r, as in the rows of PEFT's LoRA


class LoRAFused(Method):
    """LoRA on all linear layers by manual autograd; adapters in the dtype of the model."""

    name = "lora_fused"

    def attach(self, model: PreTrainedModel) -> nn.Module:
        torch.manual_seed(self.budget.seed)
        rank = self.budget.rank
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
            attention.k_proj, attention.v_proj = Waiting(), Waiting()
            attention.q_proj = Stack([q, k, v], rank, (attention.k_proj, attention.v_proj))
            attention.o_proj = Stack([attention.o_proj], rank)
            layer.mlp = MLP(Stack([mlp.gate_proj, mlp.up_proj], rank), Stack([mlp.down_proj], rank))
        return model


class Waiting(nn.Module):
    """In the place of k_proj and v_proj, which every attention calls right after q_proj."""

    y: Tensor | None = None  # computed by the stack

    def forward(self, x: Tensor) -> Tensor:
        y, self.y = self.y, None
        return y


class Stack(nn.Module):
    """Linear layers that read the same x, as one, in the place of the first of them.

    weight  (N, K) and bias (N,) or None, frozen; N counts the outputs of all layers, `sizes` each
    A       (layers * r, K); Bt (r, N): trained, in the dtype of weight
    others  in the places of the other layers, which are handed their outputs
    """

    def __init__(self, linears: list[nn.Linear], rank: int, others: tuple[Waiting, ...] = ()):
        super().__init__()
        self._others = others  # a tuple: modules would be in two places
        self.sizes = [linear.out_features for linear in linears]
        for name in ("weight", "bias"):
            parts = [getattr(linear, name) for linear in linears]
            stacked = None if parts[0] is None else nn.Parameter(torch.cat(parts).detach(), False)
            self.register_parameter(name, stacked)
        self.A = nn.Parameter(self.weight.new_empty(len(linears) * rank, self.weight.shape[1]))
        self.Bt = nn.Parameter(self.weight.new_zeros(rank, sum(self.sizes)))
        for part in self.A.detach().split(rank):
            nn.init.kaiming_uniform_(part, a=math.sqrt(5))  # as PEFT draws it

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        return self.weight, self.bias, self.A, self.Bt

    def forward(self, x: Tensor) -> Tensor:
        ys = StackFunction.apply(x.flatten(0, -2), *self.tensors(), self.sizes)
        y, *others = (each.unflatten(0, x.shape[:-1]) for each in ys)
        for module, other in zip(self._others, others, strict=True):
            module.y = other
        return y


class MLP(nn.Module):
    """In the place of the gated FFN."""

    def __init__(self, gate_up: Stack, down: Stack) -> None:
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        y = MLPFunction.apply(x.flatten(0, -2), *self.gate_up.tensors(), *self.down.tensors())
        return y.unflatten(0, x.shape[:-1])


class StackFunction(torch.autograd.Function):
    """The outputs (M, n) of a stack, from x (M, K). sizes: the widths n."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, Bt, sizes):
        ys = _products(x, weight, bias, sizes)
        xa = _add_adapters(ys, x, A, Bt)
        ctx.save_for_backward(x, xa, weight, A, Bt)
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        x, xa, weight, A, Bt = ctx.saved_tensors
        dxa, dBt = _adapter_gradients(dys, xa, Bt)
        dx = _dx(dys, weight, dxa, A) if ctx.needs_input_grad[0] else None
        return dx, None, None, dxa.t() @ x, dBt, None


class MLPFunction(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), (M, N) from x (M, K); gate and up are one stack."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, Bt, down_weight, down_bias, down_A, down_Bt):
        if backend.prefers_joined(weight):
            gate_up = F.linear(x, weight, bias)
            gate, up = gate_up.chunk(2, 1)
        else:
            gate_up = None
            gate, up = _products(x, weight, bias, [len(weight) // 2] * 2)
        xa = _add_adapters([gate, up], x, A, Bt)
        h = backend.select(x).swiglu(gate, up)
        y = F.linear(h, down_weight, down_bias)
        ha = _add_adapters([y], h, down_A, down_Bt)
        made = (gate, up) if gate_up is None else (gate_up, None)
        ctx.save_for_backward(x, *made, xa, ha, weight, A, Bt, down_weight, down_A, down_Bt)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, up, xa, ha, weight, A, Bt, down_weight, down_A, down_Bt = ctx.saved_tensors
        gate_up = gate if up is None else None
        if up is None:
            gate, up = gate_up.chunk(2, 1)
        dha, down_dBt = _adapter_gradients((dy,), ha, down_Bt)
        dh = _dx((dy,), down_weight, dha, down_A)
        everything = slice(0, gate.shape[1])
        compiled = torch.compiler.is_compiling()  # which plans the memory itself
        d_gate_up, *out = (None,) if compiled else room_for_gradients(gate_up, gate, up)
        dgate, dup, h = backend.select(dy).swiglu_bwd(dh, gate, up, everything, tuple(out) or None)
        del dh
        down_dA = dha.t() @ h
        del h
        dxa, dBt = _adapter_gradients((dgate, dup), xa, Bt)
        wide = (dgate, dup) if d_gate_up is None else (d_gate_up,)
        dx = _dx(wide, weight, dxa, A) if ctx.needs_input_grad[0] else None
        return dx, None, None, dxa.t() @ x, dBt, None, None, down_dA, down_dBt


def _products(x: Tensor, weight: Tensor, bias: Tensor | None, widths: list[int]) -> list[Tensor]:
    """The outputs (M, n) of the layers of so many rows n each that lie in `weight`."""
    biases = [None] * len(widths) if bias is None else bias.split(widths)
    return [F.linear(x, w, b) for w, b in zip(weight.split(widths), biases, strict=True)]


def _add_adapters(ys: list[Tensor], x: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
    """Adds xa Bt to the outputs of a stack, in place; returns xa (M, layers * r)."""
    xa = x.new_empty(len(x), len(A)).addmm_(x, A.t(), beta=0, alpha=SCALE)
    widths = [y.shape[1] for y in ys]
    for y, xa_part, bt in zip(ys, xa.split(len(Bt), 1), Bt.split(widths, 1), strict=True):
        y.addmm_(xa_part, bt)
    return xa


def _adapter_gradients(dys: tuple[Tensor, ...], xa: Tensor, Bt: Tensor) -> tuple[Tensor, Tensor]:
    """dxa and dBt of a stack."""
    widths = [dy.shape[1] for dy in dys]
    dxa, dBt = torch.empty_like(xa), torch.empty_like(Bt)
    parts = zip(
        *(dys, Bt.split(widths, 1), dBt.split(widths, 1)),
        *(xa.split(len(Bt), 1), dxa.split(len(Bt), 1)),
        strict=True,
    )
    for dy, bt, dbt, xa_part, dxa_part in parts:
        dxa_part.addmm_(dy, bt.t(), beta=0, alpha=SCALE)
        dbt.addmm_(xa_part.t(), dy, beta=0)
    return dxa, dBt


def _dx(dys: tuple[Tensor, ...], weight: Tensor, dxa: Tensor, A: Tensor) -> Tensor:
    """dx of a stack. dys may lie side by side in one tensor, which makes their products one."""
    dx = None
    for dy, w in zip(dys, weight.split([dy.shape[1] for dy in dys]), strict=True):
        dx = add_dx(reference, dx, dy, w)
    return dx.addmm_(dxa, A)
