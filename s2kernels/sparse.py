"""The ops of scattered entries in plain torch: the part of `s2kernels.reference` for SpIEL.

Sizes: M tokens, N out_features, K in_features, k trained entries. A weight is (N, K). `index` (k,)
holds the flat positions row * K + column of its trained entries, ascending and without repeats:
int32 where all positions of the weight fit, else int64. `delta` (k,) holds their change, so that

    W = W0 + scatter(delta, index)      d_delta[e] = sum over m of dy[m, row_e] x[m, col_e]

None of these ops has a tensor of N * K elements: what is dense is computed for a few rows at a
time. `s2kernels.kernels` holds the same names and signatures in Triton.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from s2kernels.plan import TilePlan, index_dtype, largest, rows_and_columns

# What is dense at a time: this many rows of the weight, or more where they are a sixteenth of all
# and of no more elements than so many. Larger products are faster, until they leave the cache.
_LEAST_ROWS = 16
_SHARE = 16
_ELEMENTS = 2**18


def sparse_write(
    weights: Sequence[Tensor],
    base: Sequence[Tensor],
    delta: Sequence[Tensor] | None,
    index: Sequence[Tensor],
) -> None:
    """Overwrite the entries at index[i] of weights[i] (N, K) with base[i] + delta[i], in place.

    base[i] (k,) are the entries of W0, in the weight's dtype; the sum is rounded once, to it. With
    delta=None the entries of W0 are put back bit for bit. Every other entry is left alone. Neither
    autograd nor the weight's version counter sees the write, as in `slice_write`.
    """
    for i, (weight, original, where) in enumerate(zip(weights, base, index, strict=True)):
        value = original
        if delta is not None:
            acc = torch.promote_types(
                torch.promote_types(original.dtype, delta[i].dtype), torch.float32
            )
            value = (original.to(acc) + delta[i].detach().to(acc)).to(weight.dtype)
        weight.data[rows_and_columns(where, weight.shape[1])] = value


def sparse_grad(
    dy: Tensor,
    x: Tensor,
    index: Tensor,
    plan: TilePlan | None = None,
    grad: Tensor | None = None,
) -> Tensor:
    """Gradient of the entries at index: (dyᵀ x)[index], (k,), for dy (M, N) and x (M, K).

    plan: that of `tile_plan(index, (N, K))`, which the kernels otherwise make themselves.
    Returns it in fp32 (fp64 for fp64 operands), or adds it into `grad` (k,), of any floating dtype,
    and returns `grad`.
    """
    acc = _accumulator(dy)
    N, K = dy.shape[1], x.shape[1]
    x, rows = x.to(acc), _rows_of_strip(N, K)
    values = torch.empty(index.shape, dtype=acc, device=dy.device)
    starts = range(0, N, rows)
    bounds = torch.tensor([*(start * K for start in starts), N * K], device=index.device)
    first = torch.searchsorted(index, bounds.to(index.dtype)).tolist()
    for i, start in enumerate(starts):
        entries = slice(first[i], first[i + 1])
        if entries.start == entries.stop:
            continue
        strip = dy[:, start : start + rows].to(acc).t() @ x
        values[entries] = strip.view(-1)[index[entries] - start * K]
    if grad is None:
        return values
    return grad.copy_(grad.to(acc) + values)


def growth_candidates(dy: Tensor, x: Tensor, k: int) -> Tensor:
    """Positions of the k entries of largest |dyᵀ x|, ascending, for dy (M, N) and x (M, K).

    Of equal entries those of lowest position; NaN counts as the largest. 1 <= k <= N * K.
    """
    acc = _accumulator(dy)
    x = x.to(acc)

    def score(start: int, stop: int) -> tuple[Tensor, Tensor]:
        strip = dy[:, start:stop].to(acc).t() @ x
        keys = _keys(strip.view(-1))
        return keys, torch.arange(len(keys), device=keys.device) + start * x.shape[1]

    return _largest_of_strips(score, (dy.shape[1], x.shape[1]), k)


def sm3_update(row: Tensor, col: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """One step of SM3's statistics with the gradient (k,) of the entries at index.

    nu = min(row[row_e], col[col_e]) + grad², with the statistics before the step; row (N,) and
    col (K,), fp32, are then raised in place to the largest nu of their entries. Returns nu (k,).
    """
    rows, cols = rows_and_columns(index, col.shape[0])
    nu = torch.minimum(row[rows], col[cols]) + grad.to(row.dtype).square()
    row.scatter_reduce_(0, rows, nu, "amax")
    col.scatter_reduce_(0, cols, nu, "amax")
    return nu


def sm3_growth(row: Tensor, col: Tensor, index: Tensor, k: int) -> Tensor:
    """The k positions not in index of largest row[n] * col[c], ascending; row (N,), col (K,).

    row and col are non-negative. Of equal products those of lowest position.
    1 <= k <= N * K - len(index).
    """
    N, K = row.shape[0], col.shape[0]

    def score(start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys = _keys((row[start:stop, None] * col).view(-1))
        positions = torch.arange(len(keys), device=keys.device) + start * K
        bounds = torch.tensor([start * K, start * K + len(keys)], device=index.device)
        first, last = torch.searchsorted(index.long(), bounds).tolist()
        inactive = torch.ones_like(keys, dtype=torch.bool)
        inactive[index[first:last].long() - start * K] = False
        return keys[inactive], positions[inactive]

    return _largest_of_strips(score, (N, K), k)


def _keys(scores: Tensor) -> Tensor:
    """Integers in the order of |scores|; NaN is the largest."""
    integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
    return scores.abs().view(integer)


def _largest_of_strips(
    score: Callable[[int, int], tuple[Tensor, Tensor]], shape: tuple[int, int], k: int
) -> Tensor:
    """Positions of the k largest keys; score(start, stop) gives those of these rows, and keys."""
    found: list[tuple[Tensor, Tensor]] = []
    waiting, rows = 0, _rows_of_strip(*shape)
    for start in range(0, shape[0], rows):
        found.append(score(start, start + rows))
        waiting += len(found[-1][0])
        # As many new ones as kept ones, and the time to select is linear in what was computed.
        if waiting > 2 * k or start + rows >= shape[0]:
            keys, positions = (torch.cat(parts) for parts in zip(*found, strict=True))
            found = [largest(keys, positions, k)]
            waiting = len(found[0][0])
    return found[0][1].to(index_dtype(shape))


def _rows_of_strip(N: int, K: int) -> int:
    return max(_LEAST_ROWS, min(N // _SHARE, _ELEMENTS // K))


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
