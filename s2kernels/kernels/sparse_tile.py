"""One tile of dyᵀ x, laid where its single elements can be read.

    tile[n, c] = sum over m of dy[m, row0 + n] x[m, col0 + c]

dy (M, N), x (M, K). The sum is built in the registers of tensor-core instructions, of which no
thread can pick out an element that another holds. So the finished tile is stored to a workspace of
the program's own, which stays in L2, and is read from there: a GPU runs one or two programs a
multiprocessor, and the workspace of all of them is a few MB whatever the size of the weight.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from s2kernels.kernels.target import chip, launch_parameters, num_sms, takes_descriptors
from s2kernels.kernels.tiles import grouped_tile
from s2kernels.plan import BAND

# For tiles of 128 x 256. With plain pointers a step has few tokens: two buffers of such a tile are
# all that the shared memory of a compute unit of gfx942 holds.
LAUNCH = {
    "half": dict(BLOCK_M=32, num_warps=8, num_stages=3),
    "float32": dict(BLOCK_M=16, num_warps=8, num_stages=2),
}
# By chip, for the same tiles: three or four stages of 48 KB.
DESCRIPTOR_LAUNCH = {
    "sm_90": dict(BLOCK_M=64, num_warps=8, num_stages=4),
    "sm_100": dict(BLOCK_M=64, num_warps=8, num_stages=3),
}
BLOCK_E = 1024  # entries of a tile that are read together


# fmt: off
@triton.jit
def store_tile(
    dy_ptr, x_ptr, workspace_ptr,
    number, first_m, last_m,
    M, N, K,
    stride_dm, stride_dn,
    stride_xm, stride_xk,
    DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):
    # fmt: on
    """Stores tile `number`, summed over the tokens [first_m, last_m), row by row in the workspace.

    first_m is a multiple of BLOCK_M, and last_m, too, or M. Returns row0 and col0.
    """
    tile_row, tile_col = grouped_tile(number, tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), BAND)
    row0, col0 = tile_row * BLOCK_N, tile_col * BLOCK_K
    offs_n = row0.to(tl.int64) + tl.arange(0, BLOCK_N)
    offs_k = col0.to(tl.int64) + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(first_m, last_m, BLOCK_M):
        if DESCRIPTORS:
            dy = dy_ptr.load([start, row0])
            x = x_ptr.load([start, col0])
        else:
            offs_m = start + tl.arange(0, BLOCK_M).to(tl.int64)
            mask_m = offs_m[:, None] < M
            dy = tl.load(  # (BLOCK_M, BLOCK_N)
                dy_ptr + offs_m[:, None] * stride_dm + offs_n[None, :] * stride_dn,
                mask=mask_m & (offs_n[None, :] < N),
                other=0.0,
            )
            x = tl.load(  # (BLOCK_M, BLOCK_K)
                x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk,
                mask=mask_m & (offs_k[None, :] < K),
                other=0.0,
            )
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
    offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    # The program may still be reading the tile before this one.
    tl.debug_barrier()
    tl.store(workspace_ptr + offs, acc)
    tl.debug_barrier()
    return row0, col0


def tile_launch(
    dy: Tensor, x: Tensor, tile: tuple[int, int], num_jobs: int
) -> tuple[tuple, Tensor, dict]:
    """The operands and the launch parameters for num_jobs tiles of dyᵀ x, and a workspace with a
    line for each of the programs that share them.
    """
    descriptors = takes_descriptors(dy, x)
    launch = dict(
        DESCRIPTOR_LAUNCH[chip(dy.device).arch]
        if descriptors
        else launch_parameters(LAUNCH, dy.dtype)
    )
    operands: tuple = (dy, x)
    if descriptors:
        operands = tuple(
            TensorDescriptor.from_tensor(operand, [launch["BLOCK_M"], block])
            for operand, block in zip(operands, tile, strict=True)
        )
    launch.update(DESCRIPTORS=descriptors, BLOCK_N=tile[0], BLOCK_K=tile[1], BAND=BAND)
    return operands, workspace(dy.device, tile, num_jobs), launch


def workspace(device: torch.device, tile: tuple[int, int], num_jobs: int) -> Tensor:
    """(programs, elements of a tile), fp32: a program a multiprocessor, or for each job."""
    programs = max(1, min(num_jobs, num_sms(device)))
    return torch.empty((programs, tile[0] * tile[1]), dtype=torch.float32, device=device)
