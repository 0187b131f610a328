"""SwiGLU, and a backward that rebuilds the slice of h which a trained down_proj needs.

    h     = silu(gate) * up = gate * s * up,  s = sigmoid(gate)
    dgate = dh * up * s * (1 + gate * (1 - s))
    dup   = dh * gate * s
    h[:, index]  as a compact (M, R)

gate, up, h, dh (M, K): M tokens, K channels of the FFN, R of them trained. The arithmetic is in
fp32; each output is rounded once. Since the backward rebuilds the slice from gate and up, which it
reads anyway, h need not be kept for the gradient of down_proj.

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
    gate_ptr, up_ptr, h_ptr,
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
    gate = tl.load(gate_ptr + m * stride_gm + offs * stride_gk, mask=mask).to(tl.float32)
    up = tl.load(up_ptr + m * stride_um + offs * stride_uk, mask=mask).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + m * stride_hm + offs * stride_hk, h.to(h_ptr.dtype.element_ty), mask=mask)


# fmt: off
@triton.jit
def _swiglu_bwd_kernel(
    dh_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, h_slice_ptr, index_ptr,
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
    # After the tiles of a token's K channels come those of its R trained ones.
    tiles_k = tl.cdiv(K, BLOCK)
    tiles = tiles_k + tl.cdiv(R, BLOCK)
    m = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    if tile < tiles_k:
        offs = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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
    elif h_slice_ptr is not None:
        offs = (tile - tiles_k).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offs < R
        channels = run_start + offs
        if index_ptr is not None:
            channels = tl.load(index_ptr + offs, mask=mask, other=0).to(tl.int64)
        gate = tl.load(gate_ptr + m * stride_gm + channels * stride_gk, mask=mask).to(tl.float32)
        up = tl.load(up_ptr + m * stride_um + channels * stride_uk, mask=mask).to(tl.float32)
        h = gate * tl.sigmoid(gate) * up
        h_ptrs = h_slice_ptr + m * stride_hm + offs * stride_hr
        tl.store(h_ptrs, h.to(h_slice_ptr.dtype.element_ty), mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """h = silu(gate) * up for gate, up (M, K)."""
    M, K = gate.shape
    launch = launch_parameters(LAUNCH, gate.dtype)
    h = torch.empty_like(gate, dtype=torch.promote_types(gate.dtype, up.dtype))
    with on_device(gate):
        _swiglu_kernel[(M * triton.cdiv(K, launch["BLOCK"]),)](
            gate, up, h,
            K,
            *gate.stride(),
            *up.stride(),
            *h.stride(),
            **launch,
        )  # fmt: skip
    return h


def swiglu_bwd(
    dh: Tensor, gate: Tensor, up: Tensor, index: Tensor | slice | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dgate (M, K), dup (M, K) and h[:, index] as a compact (M, R), or None for index=None."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    h_slice = None if index is None else _empty_slice(gate, index)
    _launch_bwd(dh, gate, up, dgate, dup, h_slice, index)
    return dgate, dup, h_slice


def slice_of_swiglu(gate: Tensor, up: Tensor, index: Tensor | slice) -> Tensor:
    """h[:, index] as a compact (M, R), alone."""
    h_slice = _empty_slice(gate, index)
    nothing = gate[:, :0]
    _launch_bwd(nothing, gate, up, nothing, nothing, h_slice, index)
    return h_slice


def _empty_slice(gate: Tensor, index: Tensor | slice) -> Tensor:
    R = index.stop - index.start if isinstance(index, slice) else index.shape[0]
    return gate.new_empty((gate.shape[0], R))


def _launch_bwd(
    dh: Tensor,
    gate: Tensor,
    up: Tensor,
    dgate: Tensor,
    dup: Tensor,
    h_slice: Tensor | None,
    index: Tensor | slice | None,
) -> None:
    """Writes dgate and dup on the K channels that dh has, and h_slice."""
    M, K = dh.shape
    R = 0 if h_slice is None else h_slice.shape[1]
    run_start = 0
    if isinstance(index, slice):
        run_start, index = index.start, None
    launch = launch_parameters(LAUNCH, gate.dtype)
    tiles = triton.cdiv(K, launch["BLOCK"]) + triton.cdiv(R, launch["BLOCK"])
    with on_device(gate):
        _swiglu_bwd_kernel[(M * tiles,)](
            dh, gate, up, dgate, dup, h_slice, index,
            K, R, run_start,
            *dh.stride(),
            *gate.stride(),
            *up.stride(),
            *dgate.stride(),
            *dup.stride(),
            *((0, 0) if h_slice is None else h_slice.stride()),
            **launch,
        )  # fmt: skip
