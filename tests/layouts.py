"""The same values under other strides, and index sets of both kinds."""

import torch
from torch import Tensor


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def every_other_row(x: Tensor) -> Tensor:
    return _view_of_nan(x, (2 * x.shape[0], x.shape[1]), (slice(None, None, 2), slice(None)))


def every_other_column(x: Tensor) -> Tensor:
    return _view_of_nan(x, (x.shape[0], 2 * x.shape[1]), (slice(None), slice(None, None, 2)))


def some_columns(x: Tensor) -> Tensor:
    """Columns of a wider tensor, starting where no alignment is left."""
    columns = slice(3, 3 + x.shape[1])
    return _view_of_nan(x, (x.shape[0], x.shape[1] + 5), (slice(None), columns))


def transposed(x: Tensor) -> Tensor:
    return x.t().contiguous().t()


LAYOUTS = [contiguous, every_other_row, every_other_column, some_columns, transposed]


def _view_of_nan(x: Tensor, shape: tuple[int, int], where: tuple[slice, slice]) -> Tensor:
    """x as a view of a larger tensor whose other entries are NaN: reading one of them shows."""
    view = x.new_full(shape, float("nan"))[where]
    return view.copy_(x)


def make_index(kind: str, size: int, R: int, device: torch.device | str = "cpu") -> Tensor | slice:
    """R of `size` channels: a run that ends at the last one, or any, in any order."""
    if kind == "run":
        return slice(size - R, size)
    return torch.randperm(size)[:R].to(torch.int32).to(device)


def slice_operands(shape, dim, kind, dtype, device, layout=contiguous):
    """dy, x, index. kind: one of `make_index`, or "compact": no index, a narrow operand."""
    M, N, K, R = shape
    index = None
    if kind == "compact":
        N, K = (N, R) if dim == "in" else (R, K)
    else:
        index = make_index(kind, K if dim == "in" else N, R, device)
    dy = layout(torch.randn(M, N, device=device).to(dtype))
    x = layout(torch.randn(M, K, device=device).to(dtype))
    return dy, x, index
