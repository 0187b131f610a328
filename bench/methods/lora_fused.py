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
from s2kernels import backend
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
            first = Stack([attention.q_proj, attention.k_proj, attention.v_proj], rank)
            attention.k_proj, attention.v_proj = Waiting(), Waiting()
            attention.q_proj = First(first, attention.k_proj, attention.v_proj)
            attention.o_proj = First(Stack([attention.o_proj], rank))
            layer.mlp = MLP(Stack([mlp.gate_proj, mlp.up_proj], rank), Stack([mlp.down_proj], rank))
        return model


class Stack(nn.Module):
    """Linear layers that read the same x, as one.

    weight  (N, K) and bias (N,) or None, frozen; N counts the outputs of all layers, `sizes` each
    A       (layers * r, K); Bt (r, N): trained, in the dtype of weight
    """

    def __init__(self, linears: list[nn.Linear], rank: int) -> None:
        super().__init__()
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


class Waiting(nn.Module):
    """In the place of k_proj and v_proj, which every attention calls right after q_proj."""

    y: Tensor | None = None  # computed by the first layer of the stack

    def forward(self, x: Tensor) -> Tensor:
        y, self.y = self.y, None
        return y


class First(nn.Module):
    """In the place of the first layer of a stack: computes all, and hands the others theirs."""

    def __init__(self, stack: Stack, *others: Waiting) -> None:
        super().__init__()
        self.stack, self._others = stack, others  # a tuple: modules would be in two places

    def forward(self, x: Tensor) -> Tensor:
        ys = StackFunction.apply(x.flatten(0, -2), *self.stack.tensors(), self.stack.sizes)
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
        dx, dA, dBt = _stack_backward(dys, *ctx.saved_tensors, ctx.needs_input_grad[0])
        return dx, None, None, dA, dBt, None


class MLPFunction(torch.autograd.Function):
    """down(silu(gate(x)) * up(x)), (M, N) from x (M, K); gate and up are one stack."""

    @staticmethod
    def forward(ctx, x, weight, bias, A, Bt, down_weight, down_bias, down_A, down_Bt):
        joined = backend.prefers_joined(weight)
        outputs = _products(x, weight, bias, [len(weight) // (1 if joined else 2)] * (2 - joined))
        gate, up = outputs[0].chunk(2, 1) if joined else outputs
        xa = _add_adapters([gate, up], x, A, Bt)
        h = backend.select(x).swiglu(gate, up)
        y = F.linear(h, down_weight, down_bias)
        ha = _add_adapters([y], h, down_A, down_Bt)
        made = x, outputs[0], None if joined else up, xa, ha
        ctx.save_for_backward(*made, weight, A, Bt, down_weight, down_A, down_Bt)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, gate, up, xa, ha, weight, A, Bt, down_weight, down_A, down_Bt = ctx.saved_tensors
        gate_up = gate if up is None else None
        if up is None:
            gate, up = gate_up.chunk(2, 1)
        dha = _scaled_product(dy, down_Bt.t())
        down_dBt = ha.t() @ dy
        dh = (dy @ down_weight).addmm_(dha, down_A)
        everything = slice(0, gate.shape[1])
        compiled = torch.compiler.is_compiling()  # which plans the memory itself
        d_gate_up, *out = (None,) if compiled else room_for_gradients(gate_up, gate, up)
        dgate, dup, h = backend.select(dy).swiglu_bwd(dh, gate, up, everything, tuple(out) or None)
        del dh
        down_dA = dha.t() @ h
        del h
        dx, dA, dBt = _stack_backward(
            (dgate, dup), x, xa, weight, A, Bt, ctx.needs_input_grad[0], d_gate_up
        )
        return dx, None, None, dA, dBt, None, None, down_dA, down_dBt


def _products(x: Tensor, weight: Tensor, bias: Tensor | None, widths: list[int]) -> list[Tensor]:
    """The outputs (M, n) of the layers of so many rows n each that lie in `weight`."""
    biases = [None] * len(widths) if bias is None else bias.split(widths)
    return [F.linear(x, w, b) for w, b in zip(weight.split(widths), biases, strict=True)]


def _scaled_product(a: Tensor, b: Tensor) -> Tensor:
    """SCALE * a @ b, by one product."""
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=SCALE)


def _add_adapters(ys: list[Tensor], x: Tensor, A: Tensor, Bt: Tensor) -> Tensor:
    """Adds xa Bt to the outputs of a stack, in place; returns xa (M, layers * r)."""
    xa = _scaled_product(x, A.t())
    widths = [y.shape[1] for y in ys]
    for y, xa_part, bt in zip(ys, xa.split(len(Bt), 1), Bt.split(widths, 1), strict=True):
        y.addmm_(xa_part, bt)
    return xa


def _stack_backward(
    dys: tuple[Tensor, ...],
    x: Tensor,
    xa: Tensor,
    weight: Tensor,
    A: Tensor,
    Bt: Tensor,
    needs_dx: bool,
    whole: Tensor | None = None,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """dx (None where it is not needed), dA and dBt of a stack.

    whole: the tensor (M, N) that dys lie side by side in, if they do: dx is one product then.
    """
    widths = [dy.shape[1] for dy in dys]
    dxa, dBt = torch.empty_like(xa), torch.empty_like(Bt)
    parts = zip(
        *(dys, weight.split(widths), Bt.split(widths, 1), dBt.split(widths, 1)),
        *(xa.split(len(Bt), 1), dxa.split(len(Bt), 1)),
        strict=True,
    )
    dx = None if whole is None or not needs_dx else whole @ weight
    for dy, w, bt, dbt, xa_part, dxa_part in parts:
        dxa_part.addmm_(dy, bt.t(), beta=0, alpha=SCALE)
        dbt.addmm_(xa_part.t(), dy, beta=0)
        if needs_dx and whole is None:
            dx = dy @ w if dx is None else dx.addmm_(dy, w)
    if needs_dx:
        dx.addmm_(dxa, A)
    return dx, dxa.t() @ x, dBt
