"""torch's SDPA, by cuDNN for shapes that come again.

cuDNN plans a computation anew for every shape of its operands, and torch keeps the plans: where
each batch is padded to a length of its own, and in generation, where keys get one longer with every
token, most of the time would go into plans. So an attention layer takes Flash attention for a shape
that it meets for the first time, and where queries and keys differ in length.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from s2kernels.capturing import is_capturing

# What one cannot do (a mask, an odd head_dim) goes to the next one that can.
WITHOUT_CUDNN = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *WITHOUT_CUDNN]

# Shapes that a layer remembers, the latest ones.
MAX_SHAPES = 64

# layer -> shape -> whether it came again
_seen: WeakKeyDictionary[nn.Module, dict[tuple, bool]] = WeakKeyDictionary()


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
    if torch.compiler.is_compiling() or _is_recomputed():
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


def _is_recomputed() -> bool:
    """Whether a checkpoint computes this once more in the backward, or will: it wants to meet the
    same backend, as each saves other tensors.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[attr-defined]
