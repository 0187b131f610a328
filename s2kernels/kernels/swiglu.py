"""SwiGLU, and a backward that rebuilds the slice of h which a trained down_proj needs.

    h     = silu(gate) * up = gate * s * up,  s = sigmoid(gate)
    dgate = dh * up * s * (1 + gate * (1 - s))
    dup   = dh * gate * s
    h[:, index]  as a compact (M, R)

gate, up, h, dh (M, K): M tokens, K channels of the FFN, R of them trained. The arithmetic is in
fp32; each output is rounded once. Since the backward rebuilds the slice from gate and up, which it
reads anyway, h need not be kept for the gradient of down_proj. dgate and dup may be written over
gate and up: the program that writes an element is the only one that reads it.

Limit: bytes. The forward moves 3 M K elements, the backward 5 M K + M R; both do some 10 FLOPs an
element, far below what the chip could do meanwhile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.target import launch_parameters, on_device

LAUNCH = {
    "half": dict(BLOCK=1024, num_warps=4),
    "float32": dict(BLOCK=1024, num_warps=4),
}


# fmt: off
@triton.jit
def _swiglu_kernel(
    gate_ptr, up_ptr, h_ptr, index_ptr,
    K,
    stride_gm, stride_gk,
    stride_um, stride_uk,
    stride_hm, stride_hk,
    BLOCK: tl.constexpr,
):
    # fmt: on
    # Tokens and tiles share axis 0 of the grid: the other axes end at 65535.
    tiles = tl.cdiv(K, BLOCK)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    offs = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    channels = offs
    if index_ptr is not None:
        channels = tl.load(index_ptr + offs, mask=mask, other=0).to(tl.int64)
    gate = tl.load(gate_ptr + m * stride_gm + channels * stride_gk, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + m * stride_um + channels * stride_uk, mask=mask).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + m * stride_hm + offs * stride_hk, h.to(h_ptr.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit
def _swiglu_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_slice_ptr,
    K, R, run_start,
    stride_dhm, stride_dhk,
    stride_gm, stride_gk,
    stride_um, stride_uk,
    stride_dgm, stride_dgk,
    stride_dum, stride_duk,
    stride_hm, stride_hr,
    BLOCK: tl.constexpr,
):
    # fmt: on
    tiles = tl.cdiv(K, BLOCK)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    offs = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < K
    dh = tl.load(dh_ptr + m * stride_dhm + offs * stride_dhk, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + m * stride_gm + offs * stride_gk, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + m * stride_um + offs * stride_uk, mask=mask).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    dgate = dh * up * (s + silu * (1 - s))
    dup = dh * silu
    dgate_ptrs = dgate_ptr + m * stride_dgm + offs * stride_dgk
    dup_ptrs = dup_ptr + m * stride_dum + offs * stride_duk
    tl.store(dgate_ptrs, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
    tl.store(dup_ptrs, dup.to(dup_ptr.dtype.element_ty), mask=mask)
    if h_slice_ptr is not None:
        offs_r = offs - run_start
        h_ptrs = h_slice_ptr + m * stride_hm + offs_r * stride_hr
        mask_r = mask & (offs_r >= 0) & (offs_r < R)
        tl.store(h_ptrs, (silu * up).to(h_slice_ptr.dtype.element_ty), mask=mask_r)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """h = silu(gate) * up for gate, up (M, K)."""
    return _swiglu(gate, up, None)


def slice_of_swiglu(gate: Tensor, up: Tensor, index: Tensor | slice) -> Tensor:
    """h[:, index] as a compact (M, R), alone."""
    if isinstance(index, slice):
        return _swiglu(gate[:, index], up[:, index], None)
    return _swiglu(gate, up, index)


def _swiglu(gate: Tensor, up: Tensor, index: Tensor | None) -> Tensor:
    M, K = gate.shape[0], gate.shape[1] if index is None else index.shape[0]
    launch = launch_parameters(LAUNCH, gate.dtype)
    h = gate.new_empty((M, K), dtype=torch.promote_types(gate.dtype, up.dtype))
    with on_device(gate):
        _swiglu_kernel[(M * triton.cdiv(K, launch["BLOCK"]),)](
            gate, up, h, index,
            K,
            *gate.stride(),
            *up.stride(),
            *h.stride(),
            **launch,
        )  # fmt: skip
    return h


def swiglu_bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    index: Tensor | slice | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dgate (M, K), dup (M, K) and h[:, index] as a compact (M, R), or None for index=None.

    With `out`, dgate and dup are written there; out=(gate, up) writes them over their operands.
    """
    dgate, dup = (torch.empty_like(gate), torch.empty_like(up)) if out is None else out
    M, K = gate.shape
    run = index if isinstance(index, slice) else slice(0, 0)
    h_slice = gate.new_empty((M, run.stop - run.start)) if run is index else None
    scattered = None
    if isinstance(index, Tensor):
        # a launch of its own, before gate and up are written over: scattered channels are not
        # those that a program of the other one writes
        scattered = slice_of_swiglu(gate, up, index)
    launch = launch_parameters(LAUNCH, gate.dtype)
    with on_device(gate):
        _swiglu_bwd_kernel[(M * triton.cdiv(K, launch["BLOCK"]),)](
            dh, gate, up, dgate, dup, h_slice,
            K, run.stop - run.start, run.start,
            *dh.stride(),
            *gate.stride(),
            *up.stride(),
            *dgate.stride(),
            *dup.stride(),
            *((0, 0) if h_slice is None else h_slice.stride()),
            **launch,
        )  # fmt: skip
    return dgate, dup, h_slice if scattered is None else scattered
