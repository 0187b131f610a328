"""The GEMMs with a weight W0 + scatter(delta, index) that is dense a panel at a time.

A panel p is a run of rows of W0, of limited size. The entries of delta are added to a copy of it,
which is used up before the next one is made:

    y[:, p] = x W[p]ᵀ + b[p]        dx = sum over p of dy[:, p] W[p]

So a weight that is held quantized, or that must not be written into, costs one panel of memory and
not a dense copy.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import lcm
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from s2kernels import reference
from s2kernels.autograd.checks import version_of
from s2kernels.plan import rows_and_columns

# Elements of a panel, at most: 8 MiB in half precision. A weight of no more is one panel.
WORKSPACE = 4 * 2**20
# Rows of a panel come in so many where the workspace admits it: panels then begin where vectors of
# y and dy do, and GEMMs have no ragged edge but at the end of the weight.
ALIGNED = 64

# index tensor -> (version, bounds, K), and where in it the entries of each panel begin: finding
# that costs a synchronisation on a GPU, and the same index comes back in every step.
_firsts: WeakIdKeyDictionary = WeakIdKeyDictionary()


@dataclass(frozen=True)
class Panels:
    """A weight (N, K) that does not lie in memory as it is multiplied with.

    shape  (N, K)
    rows   rows(start, stop) makes rows [start, stop) of it: (stop - start, K), of a floating dtype,
           frozen, a new tensor at every call, since entries are written into it. Called in forward
           and again in backward.
    step   start is a multiple of so many rows, and stop is one or N: where the blocks begin that
           the weight was quantized in. N for a weight that can be made as a whole only.
    """

    shape: tuple[int, int]
    rows: Callable[[int, int], Tensor]
    step: int = 1


Weight = Tensor | Panels
Ops = ModuleType | SimpleNamespace


def linear_by_panels(
    ops: Ops, x: Tensor, weight: Weight, bias: Tensor | None, delta: Tensor, index: Tensor
) -> Tensor:
    """y (M, N) = x Wᵀ + b for x (M, K), W0 = weight, bias (N,) in x.dtype; ops of `backend`.

    Beside y and one panel, the part of y that comes from that panel is in memory.
    """
    y = x.new_empty(0)
    for rows, panel in _with_entries(weight, delta, index, x.dtype):
        part = ops.linear(x, panel, None if bias is None else bias[rows])
        del panel  # before the next one is made
        if part.shape[1] == weight.shape[0]:
            return part
        if rows.start == 0:
            y = part.new_empty(len(x), weight.shape[0])
        y[:, rows] = part
    return y


def linear_dx_by_panels(
    ops: Ops, dy: Tensor, weight: Weight, delta: Tensor, index: Tensor
) -> Tensor:
    """dx (M, K) = dy W for dy (M, N), W0 = weight; ops of `backend`.

    The sum over panels is in fp32, or fp64 for fp64 operands: rounded to a half dtype after every
    panel, it would be less exact than one GEMM.
    """
    dx = dy.new_empty(0)
    for rows, panel in _with_entries(weight, delta, index, dy.dtype):
        part = ops.linear_dx(dy[:, rows], panel)
        del panel
        if rows.start == 0:
            dx = part
        else:
            dx = dx.to(torch.promote_types(dx.dtype, torch.float32)).add_(part)
    return dx.to(dy.dtype)


def bounds(shape: tuple[int, int], step: int = 1) -> list[int]:
    """Rows at which the panels of a weight (N, K) begin, and N: ascending from 0.

    Panels are about equal in size, and have at most WORKSPACE elements, or `step` rows where these
    are more.
    """
    N, K = shape
    if N * K <= WORKSPACE:
        return [0, N]
    most = WORKSPACE // K
    unit = lcm(step, ALIGNED)
    if unit > most:
        unit = step
    most = max(unit, most // unit * unit)
    num = -(-N // most)
    rows = -(-N // (num * unit)) * unit
    return [*range(0, N, rows), N]


def _with_entries(
    weight: Weight, delta: Tensor, index: Tensor, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """The rows of every panel of W0 + scatter(delta, index), and these rows in dtype: new tensors.

    By plain torch: the kernel's table of addresses is made for weights that stay where they are.
    """
    N, K = weight.shape
    where = bounds((N, K), 1 if isinstance(weight, Tensor) else weight.step)
    firsts = [*_first_entries(index, where[:-1], K), len(index)]
    for rows, entries in zip(pairwise(where), pairwise(firsts), strict=True):
        panel = _rows(weight, *rows)
        here = index[slice(*entries)] - rows[0] * K
        base = panel[rows_and_columns(here, K)]  # rounded to dtype after the sum alone
        used = panel.to(dtype)
        if used is panel and isinstance(weight, Tensor):
            used = panel.clone()
        del panel
        reference.sparse_write([used], [base], [delta[slice(*entries)]], [here])
        yield slice(*rows), used
        del used


def _rows(weight: Weight, start: int, stop: int) -> Tensor:
    """Rows [start, stop) of the weight: a view of a tensor, or what `Panels.rows` makes.

    Raises ValueError for another shape than these rows have, TypeError where they are not floating.
    """
    if isinstance(weight, Tensor):
        return weight[start:stop]
    made, want = weight.rows(start, stop), (stop - start, weight.shape[1])
    if tuple(made.shape) != want:
        raise ValueError(
            f"weight.rows({start}, {stop}) must have shape {want}, got {tuple(made.shape)}"
        )
    if not made.is_floating_point():
        raise TypeError(f"weight.rows must give a floating dtype, got {made.dtype}")
    return made


def _first_entries(index: Tensor, rows: list[int], K: int) -> list[int]:
    """Places in index of the first entries that lie in these rows of the weight, or after them."""
    if len(rows) == 1:
        return [0]
    key = version_of(index), rows, K
    compiling = torch.compiler.is_compiling()
    found = None if compiling else _firsts.get(index)
    if found is None or found[0] != key:
        starts = torch.tensor([row * K for row in rows], dtype=index.dtype, device=index.device)
        found = key, torch.searchsorted(index, starts).tolist()
        if not compiling:
            _firsts[index] = found
    return found[1]
