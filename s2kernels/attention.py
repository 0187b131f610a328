"""torch's SDPA, by cuDNN for shapes that come again.

cuDNN plans a computation anew for every shape of its operands, and torch keeps the plans: where
each batch is padded to a length of its own, and in generation, where keys get one longer with every
token, most of the time would go into plans. So an attention layer takes Flash attention for a shape
that it meets for the first time, and where queries and keys differ in length.

`torch_choice` says which backend torch takes by itself, and why none of the others.
"""

import re
import warnings
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.backends import cuda as sdp
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2kernels.capturing import is_capturing

# What one cannot do (a mask, an odd head_dim) goes to the next one that can.
WITHOUT_CUDNN = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *WITHOUT_CUDNN]

_USABLE = {
    SDPBackend.CUDNN_ATTENTION: sdp.can_use_cudnn_attention,
    SDPBackend.FLASH_ATTENTION: sdp.can_use_flash_attention,
    SDPBackend.EFFICIENT_ATTENTION: sdp.can_use_efficient_attention,
}
_ENABLED = {
    SDPBackend.CUDNN_ATTENTION: sdp.cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: sdp.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: sdp.mem_efficient_sdp_enabled,
    SDPBackend.MATH: sdp.math_sdp_enabled,
}

# Shapes that a layer remembers, the latest ones.
MAX_SHAPES = 64

# layer -> shape -> whether it came again
_seen: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Choice:
    """What torch's SDPA takes by itself for causal attention in training.

    backend    that it takes
    others     those that it does not take, in its own order, and why
    operands   what was asked for, in words
    """

    backend: SDPBackend
    others: dict[SDPBackend, str]
    operands: str

    def __str__(self) -> str:
        lines = [f"torch's SDPA takes {self.backend.name} for {self.operands}"]
        return "\n".join(lines + [f"  {b.name}: {reason}" for b, reason in self.others.items()])


def torch_choice(model: nn.Module, num_tokens: int = 512) -> Choice:
    """The backend that torch's SDPA takes for a training step of `model` without a mask.

    model: of transformers, whose config says its heads. It is asked for one sequence of num_tokens,
    in the dtype and on the device of the model; nothing is computed.

    Raises ValueError for a model whose config has no num_attention_heads.
    """
    given: Any = model
    config: Any = getattr(given, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if heads is None:
        raise ValueError(f"model must have a config with num_attention_heads, got {type(model)}")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    query, key = (
        torch.empty(
            (1, num_tokens, count, head_dim),
            dtype=given.dtype,
            device=given.device,
            requires_grad=True,
        ).transpose(1, 2)
        for count in (heads, kv_heads)
    )
    grouped = heads != kv_heads
    backend = SDPBackend(
        torch._fused_sdp_choice(query, key, key, None, 0.0, True, enable_gqa=grouped)
    )
    params = sdp.SDPAParams(query, key, key, None, 0.0, True, grouped)
    # Before its first choice torch has not yet looked at the device to order them.
    order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]  # type: ignore[attr-defined]
    others = {
        other: _why_not(other, backend, params, query.is_cuda)
        for other in order
        if other != backend and other in _ENABLED
    }
    operands = (
        f"{heads} heads and {kv_heads} of keys of {head_dim} channels, {num_tokens} tokens, "
        f"{str(given.dtype).removeprefix('torch.')}, on {given.device.type}"
    )
    return Choice(backend, others, operands)


def _why_not(other: SDPBackend, backend: SDPBackend, params: sdp.SDPAParams, is_cuda: bool) -> str:
    if not _ENABLED[other]():
        return "it is switched off"
    if other in _USABLE and is_cuda:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            usable = _USABLE[other](params, True)
        if not usable:
            reasons = [re.sub(r"\s*\(Triggered internally.*", "", str(w.message)) for w in said]
            return "; ".join(reasons) or "it cannot be used here"
    elif other in _USABLE and other != SDPBackend.FLASH_ATTENTION:
        return f"it is not for the device {params.query.device.type}"
    return f"it comes after {backend.name} in torch's order"


def sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of `module`, a layer, as transformers calls it.

    query (B, H, L, D), key and value (B, H or fewer, S, D); returns (B, L, H, D), and None.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    with sdpa_kernel(_backends(module, query, key, attention_mask), set_priority=True):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _backends(
    module: nn.Module, query: Tensor, key: Tensor, attention_mask: Tensor | None
) -> list[SDPBackend]:
    if torch.compiler.is_compiling() or is_recomputed():
        return CUDNN_FIRST
    if query.shape[2] != key.shape[2]:
        return WITHOUT_CUDNN
    shapes = _seen.setdefault(module, {})
    shape = (query.shape, key.shape[1], query.dtype, attention_mask is None)
    if is_capturing():  # what ran in the last step before, rather than what it would be next
        return CUDNN_FIRST if shapes.get(shape, False) else WITHOUT_CUDNN
    comes_again = shape in shapes
    shapes.pop(shape, None)
    shapes[shape] = comes_again  # the latest one is the last
    if len(shapes) > MAX_SHAPES:
        del shapes[next(iter(shapes))]
    return CUDNN_FIRST if comes_again else WITHOUT_CUDNN


def is_recomputed() -> bool:
    """Whether a checkpoint computes this once more in the backward, or will: it wants to meet the
    same backend, as each saves other tensors.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[attr-defined]
