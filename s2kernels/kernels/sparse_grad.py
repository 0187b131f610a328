"""Gradient of scattered entries of the weight, without a dense gradient in memory.

    grad[e] = sum over m of dy[m, row_e] x[m, col_e] = (dyᵀ x)[row_e, col_e]

dy (M, N), x (M, K); k entries at flat positions row * K + col. Tiles of dyᵀ x are computed as for
the dense gradient, at the speed of tensor cores; of each, the entries that a plan lists for it are
read out and the rest is dropped. A tile without entries is not computed.

Where there are few tiles for a GPU, the tokens are split over programs; the partial sums of the
entries are added in a fixed order. There are no atomics: equal inputs give bit-equal gradients.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from s2kernels.kernels.sparse_tile import BLOCK_E, store_tile, tile_launch
from s2kernels.kernels.target import num_sms, on_device
from s2kernels.plan import TILE, TilePlan, tile_plan

# At most so many partial sums an entry.
MAX_SPLITS = 8
# Storing a tile and reading its entries takes about as long as so many tokens more.
TOKENS_PER_READOUT = 256


# fmt: off
@triton.jit
def _sparse_grad_kernel(
    dy_ptr, x_ptr, tiles_ptr, offsets_ptr, order_ptr, places_ptr, workspace_ptr, grad_ptr,
    M, N, K, num_tiles, num_jobs, tokens_per_split,
    stride_dm, stride_dn,
    stride_xm, stride_xk,
    stride_split, stride_grad,
    ACCUMULATE: tl.constexpr, DESCRIPTORS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    # fmt: on
    program = tl.program_id(0)
    workspace_ptr += program.to(tl.int64) * (BLOCK_N * BLOCK_K)
    for job in range(program, num_jobs, tl.num_programs(0)):
        split, tile = job // num_tiles, job % num_tiles
        first_m = split * tokens_per_split
        store_tile(
            dy_ptr, x_ptr, workspace_ptr,
            tl.load(tiles_ptr + tile), first_m, min(first_m + tokens_per_split, M),
            M, N, K,
            stride_dm, stride_dn,
            stride_xm, stride_xk,
            DESCRIPTORS,
            BLOCK_M, BLOCK_N, BLOCK_K, BAND,
        )  # fmt: skip
        out_ptr = grad_ptr + split.to(tl.int64) * stride_split
        last = tl.load(offsets_ptr + tile + 1)
        for start in range(tl.load(offsets_ptr + tile), last, BLOCK_E):
            offs = start + tl.arange(0, BLOCK_E)
            mask = offs < last
            places = tl.load(places_ptr + offs, mask=mask, other=0)
            value = tl.load(workspace_ptr + places, mask=mask, other=0.0)
            entries = tl.load(order_ptr + offs, mask=mask, other=0).to(tl.int64)
            out_ptrs = out_ptr + entries * stride_grad
            if ACCUMULATE:
                value += tl.load(out_ptrs, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptrs, value.to(grad_ptr.dtype.element_ty), mask=mask)


def sparse_grad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    plan: TilePlan | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """(dyᵀ x)[index], (k,), for dy (M, N), x (M, K); plan is that of `tile_plan(index, (N, K))`.

    Returns it in fp32, or adds it into `grad` (k,), of any floating dtype, and returns `grad`.
    """
    (M, N), K, k = dy.shape, x.shape[1], index.shape[0]
    if plan is None:
        plan = tile_plan(index, (N, K))
    num_tiles = plan.tiles.shape[0]
    splits, tokens = _split(M, num_tiles, num_sms(dy.device))
    num_jobs = splits * num_tiles
    operands, tiles, launch = tile_launch(dy, x, TILE, num_jobs)
    accumulate = grad is not None
    if grad is None:
        grad = torch.empty(k, dtype=torch.float32, device=dy.device)
    target = grad
    if splits > 1:
        target = torch.empty((splits, k), dtype=torch.float32, device=dy.device)
    with on_device(dy):
        _sparse_grad_kernel[(tiles.shape[0],)](
            *operands, plan.tiles, plan.offsets, plan.order, plan.places, tiles, target,
            M, N, K, num_tiles, num_jobs, tokens,
            *dy.stride(),
            *x.stride(),
            k, target.stride(-1),
            ACCUMULATE=accumulate and splits == 1,
            BLOCK_E=BLOCK_E,
            **launch,
        )  # fmt: skip
        if splits > 1:
            total = target.sum(0)
            grad = grad.add_(total) if accumulate else grad.copy_(total)
    return grad


def _split(num_tokens: int, num_tiles: int, programs: int) -> tuple[int, int]:
    """(splits, tokens of each): what takes the fewest steps where `programs` tiles run at once.

    Tokens of a split are a multiple of 64, and no split is empty.
    """
    choices = [(n, max(1, triton.cdiv(num_tokens, n * 64)) * 64) for n in range(1, MAX_SPLITS + 1)]
    return min(
        (choice for choice in choices if choice[0] in (1, triton.cdiv(num_tokens, choice[1]))),
        key=lambda choice: (
            triton.cdiv(choice[0] * num_tiles, programs) * (choice[1] + TOKENS_PER_READOUT)
        ),
    )
