"""The blocks of a Llama with what is neither product nor attention in few kernels.

A block of transformers computes

    s = x + attention(norm₁(x))        x' = s + ffn(norm₂(s))

and the next one begins with norm₁(x'). Each addition and the norm behind it are one kernel of
liger-kernel, forward and backward: the second one at the end of a block, which hands its result to
the block behind it. silu(gate) * up is one kernel of ours (`s2kernels.autograd.swiglu`).

At every call a block looks at what is there. Where a norm or a FFN has hooks, a forward of its own
(that of a FFN with trained slices), another dtype than x, or a sharded weight, that part does what
its class does. So does all of a block that transformers checkpoints, since newer releases do that
in the forward of the class, and all under torch.compile, which fuses as well.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from s2kernels.attention import is_recomputed
from s2kernels.autograd.checks import version_of
from s2kernels.autograd.swiglu import silu_mul

# Model types whose blocks compute what is said above, under the names that Llama gave its parts.
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")

# Of (x, residual, weight, eps): the norm of x + residual, and x + residual.
AddNorm = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


class FastBlock:
    """The forward of one block; `following` is the norm that the next one begins with."""

    def __init__(
        self, block: Any, following: nn.Module | None, handed: "Handed", add_norm: AddNorm
    ) -> None:
        self.block, self.following, self.handed = block, following, handed
        self.add_norm = add_norm

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        block = self.block
        is_checkpointed = block.gradient_checkpointing and block.training
        if is_checkpointed or torch.compiler.is_compiling() or args or _has_any_global_hook():
            return type(block).forward(block, hidden_states, *args, **kwargs)
        x = self.handed.take(block.input_layernorm, hidden_states)
        if x is None:
            x = block.input_layernorm(hidden_states)
        x, _ = block.self_attn(hidden_states=x, **kwargs)
        norm = block.post_attention_layernorm
        if _fits(norm, x, hidden_states):
            x, residual = self._add(norm, x, hidden_states)
        else:
            residual = hidden_states + x
            x = norm(residual)
        x = _ffn(block.mlp, x)
        following = self.following
        # A checkpoint around this block alone, somebody else's, would compute it again alone.
        if following is None or is_recomputed() or not _fits(following, x, residual):
            return residual + x
        x, residual = self._add(following, x, residual)
        self.handed.put(following, residual, x)
        return residual

    def _add(self, norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return self.add_norm(x, residual, norm.weight, norm.variance_epsilon)


class Handed:
    """What a block computed for the one behind it: of a norm and its operand, the result."""

    def __init__(self) -> None:
        self._waiting: _Waiting | None = None

    def __getstate__(self) -> dict:
        return {"_waiting": None}

    def put(self, norm: nn.Module, operand: Tensor, result: Tensor) -> None:
        ref = weakref.ref(operand, self._forget)
        self._waiting = _Waiting(norm, ref, version_of(operand), torch.is_grad_enabled(), result)

    def take(self, norm: nn.Module, operand: Tensor) -> Tensor | None:
        """norm(operand), if it is here. It is given away once, and kept while operand lives."""
        waiting, self._waiting = self._waiting, None
        if (
            waiting is None
            or waiting.norm is not norm
            or waiting.operand() is not operand
            or waiting.version != version_of(operand)
            or waiting.grad_enabled != torch.is_grad_enabled()
            or is_recomputed()
            or not _is_bare(norm)
        ):
            return None
        return waiting.result

    def _forget(self, ref: weakref.ref) -> None:
        if self._waiting is not None and self._waiting.operand is ref:
            self._waiting = None


class _Waiting(NamedTuple):
    norm: nn.Module
    operand: weakref.ref
    version: int
    grad_enabled: bool
    result: Tensor


def _fits(norm: Any, x: Tensor, residual: Tensor) -> bool:
    """Whether the fused kernel computes what norm(residual + x) is."""
    weight = norm.weight
    return (
        _is_bare(norm)
        and type(weight) is nn.Parameter
        and weight.shape == x.shape[-1:]
        and x.shape == residual.shape
        and x.dtype == residual.dtype == weight.dtype
        and x.device == residual.device == weight.device
    )


def _is_bare(norm: nn.Module) -> bool:
    """Whether a call of norm is RMSNorm, be it that of transformers or of `use_fast_ops`."""
    forward = vars(norm).get("forward")
    function = getattr(forward, "__func__", None)
    own = forward is None or getattr(function, "__module__", None) == "s2kernels.fast_ops"
    return own and type(norm).__name__.endswith("RMSNorm") and not _has_hooks(norm)


def _ffn(mlp: Any, x: Tensor) -> Tensor:
    if "forward" in vars(mlp) or _has_hooks(mlp) or not _is_gated(mlp):
        return mlp(x)
    return mlp.down_proj(silu_mul(mlp.gate_proj(x), mlp.up_proj(x)))


def _is_gated(mlp: Any) -> bool:
    """Whether it is a FFN of transformers' own with silu between its matrices."""
    activation = mlp.act_fn
    return (
        type(mlp).__module__.startswith("transformers.models.")
        and type(activation).__name__ in ("SiLU", "SiLUActivation")
        and not _has_hooks(activation)
    )


def _has_hooks(module: nn.Module) -> bool:
    own = vars(module)
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
    )
