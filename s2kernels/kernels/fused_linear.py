"""Dense products with what follows them in the same launch.

    linear_plus_slice:     y  = x Wᵀ + b + x_slice deltaᵀ     (additive mode, in-slice)
    linear_dx_plus_slice:  dx = dy W + dy_slice delta         (additive mode, out-slice)
    linear_dx_swiglu_bwd:  dh = dy W, then dgate, dup = swiglu_bwd(dh, gate, up), h[:, index]

M tokens, N out_features, K in_features, R trained channels; x, dx (M, K), y, dy (M, N), W (N, K),
gate, up, dgate, dup (M, K). x_slice = x[:, index] and dy_slice = dy[:, index] are the compact
(M, R) that the gradient of delta reads too.

The trained part is a second, short loop into the same accumulator, rather than W + delta formed
while W is loaded: that would pass the operands of wgmma through registers. dh is never stored.
Where the descriptors of `linear` do not serve, the same is done by separate launches.

Limits: those of `linear`, 2 M N K FLOPs. The slice adds 2 M N R of them where a launch of its own
would move 2 M N more elements; the SwiGLU epilogue moves 4 M K elements where two launches move 6.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from s2kernels.kernels.linear import dot_tiles, launch_descriptors, linear, linear_dx
from s2kernels.kernels.slice_linear import slice_linear_
from s2kernels.kernels.swiglu import slice_of_swiglu, swiglu_bwd
from s2kernels.kernels.target import chip, num_sms, on_device, takes_descriptors, tuned_parameters
from s2kernels.kernels.tiles import column_halves, grouped_tile

# By chip, as of `linear`.
_TILE = dict(BLOCK_M=128, BLOCK_C=256, BLOCK_D=64, GROUP_M=8, PROGRAMS=1)
SWIGLU_LAUNCH = {
    "sm_90": dict(_TILE, num_warps=8, num_stages=4),
    "sm_100": dict(_TILE, num_warps=8, num_stages=4),
}


def linear_plus_slice(
    x: Tensor, weight: Tensor, bias: Tensor | None, x_slice: Tensor, delta: Tensor
) -> Tensor:
    """y = x Wᵀ + b + x_slice deltaᵀ, (M, N) in x.dtype.

    x (M, K), weight (N, K), bias (N,), x_slice (M, R), delta (N, R), which takes x.dtype.
    """
    part = x_slice, delta.to(x.dtype)
    y = x.new_empty(x.shape[0], weight.shape[0])
    if not takes_descriptors(x, weight, y, *part):
        return slice_linear_(linear(x, weight, bias), *part, None, "in")
    launch_descriptors("linear_plus_slice", x, weight, bias, y, transposed=True, part=part)
    return y


def linear_dx_plus_slice(dy: Tensor, weight: Tensor, dy_slice: Tensor, delta: Tensor) -> Tensor:
    """dx = dy W + dy_slice delta, (M, K) in dy.dtype.

    dy (M, N), weight (N, K), dy_slice (M, R), delta (R, K), which takes dy.dtype.
    """
    part = dy_slice, delta.to(dy.dtype)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    if not takes_descriptors(dy, weight, dx, *part):
        return slice_linear_(linear_dx(dy, weight), dy_slice, part[1].t(), None, "in")
    launch_descriptors("linear_dx_plus_slice", dy, weight, None, dx, transposed=False, part=part)
    return dx


# fmt: off
@triton.jit
def _linear_dx_swiglu_bwd_kernel(
    dy_desc, weight_desc, gate_ptr, up_ptr, dgate_desc, dup_desc,
    M, N, K,
    stride_gm, stride_um,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
):
    # fmt: on
    # Gate and up by pointers: two loads by descriptors would wait for one another.
    QUARTER: tl.constexpr = BLOCK_C // 4
    tiles_m, tiles_k = tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_C)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_k, tl.num_programs(0), flatten=True):
        pid_m, pid_k = grouped_tile(tile, tiles_m, tiles_k, GROUP_M)
        first_m, first_k = pid_m * BLOCK_M, pid_k * BLOCK_C
        dh = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for start in range(0, N, BLOCK_D):
            dh = dot_tiles(dy_desc, weight_desc, first_m, first_k, start, dh, False)

        offs_m = first_m.to(tl.int64) + tl.arange(0, BLOCK_M)
        mask_m = offs_m[:, None] < M
        gate_rows = gate_ptr + offs_m[:, None] * stride_gm
        up_rows = up_ptr + offs_m[:, None] * stride_um
        left, right = column_halves(dh)
        for half in tl.static_range(2):
            first, second = column_halves(left if half == 0 else right)
            for quarter in tl.static_range(2):
                column = first_k + (2 * half + quarter) * QUARTER
                offs_k = column + tl.arange(0, QUARTER)
                mask = mask_m & (offs_k[None, :] < K)
                gate = tl.load(gate_rows + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
                up = tl.load(up_rows + offs_k[None, :], mask=mask, other=0.0).to(tl.float32)
                part = first if quarter == 0 else second
                s = tl.sigmoid(gate)
                silu = gate * s
                # dgate first: it needs gate and up, so that both are read before either is
                # written over, which dgate and dup may do
                dgate = part * up * (s + silu * (1 - s))
                dgate_desc.store([first_m, column], dgate.to(dgate_desc.dtype))
                dup_desc.store([first_m, column], (part * silu).to(dup_desc.dtype))


def linear_dx_swiglu_bwd(
    dy: Tensor,
    weight: Tensor,
    gate: Tensor,
    up: Tensor,
    index: Tensor | slice | None = None,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """swiglu_bwd(dy W, gate, up, index): dgate, dup (M, K), h[:, index] (M, R), or None.

    dy (M, N), weight (N, K) of down_proj, gate, up (M, K); `out` as of swiglu_bwd.
    """
    dgate, dup = (torch.empty_like(gate), torch.empty_like(up)) if out is None else out
    if not takes_descriptors(dy, weight, gate, up, dgate, dup):
        return swiglu_bwd(linear_dx(dy, weight), gate, up, index, out)
    # Any index set is the few columns of gate and up that a launch of its own reads in no time.
    h_slice = None if index is None else slice_of_swiglu(gate, up, index)
    M, (N, K) = dy.shape[0], weight.shape
    default = SWIGLU_LAUNCH[chip(dy.device).arch]
    launch = dict(tuned_parameters("linear_dx_swiglu_bwd", dy, (N, K), M, default))
    block_m, block_c, block_d = (launch[f"BLOCK_{dim}"] for dim in "MCD")
    tiles = triton.cdiv(M, block_m) * triton.cdiv(K, block_c)
    programs = launch.pop("PROGRAMS") * num_sms(dy.device)
    with on_device(dy):
        _linear_dx_swiglu_bwd_kernel[(min(tiles, programs),)](
            TensorDescriptor.from_tensor(dy, [block_m, block_d]),
            TensorDescriptor.from_tensor(weight, [block_d, block_c]),
            gate, up,
            *(TensorDescriptor.from_tensor(x, [block_m, block_c // 4]) for x in (dgate, dup)),
            M, N, K,
            gate.stride(0), up.stride(0),
            **launch,
        )  # fmt: skip
    return dgate, dup, h_slice
