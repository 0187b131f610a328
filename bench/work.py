"""Bytes and FLOPs of a launch: what any program for the same result has to move and to multiply.

Every operand is read once and every result written once, whatever a cache would make of it. A
multiplication and an addition are two FLOPs. The functions take a launch's arguments by name, and
its grid; the names are those of the kernels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    bytes: int
    flops: int


def _linear(a: dict[str, Any], grid: tuple[int, ...]) -> Work:
    M, C, D, size = a["M"], a["C"], a["D"], a["c_ptr"].element_size()
    bias = 0 if a["bias_ptr"] is None else C
    return Work((M * D + D * C + M * C + bias) * size, 2 * M * C * D)


def _linear_descriptor(a: dict[str, Any], grid: tuple[int, ...]) -> Work:
    M, C, size = a["M"], a["C"], a["c_desc"].base.element_size()
    D = a["D"] + a["R"]
    bias = 0 if a["bias_ptr"] is None else C
    return Work((M * D + D * C + M * C + bias) * size, 2 * M * C * D)


def _linear_dx_swiglu_bwd(a: dict[str, Any], grid: tuple[int, ...]) -> Work:
    M, N, K, size = a["M"], a["N"], a["K"], a["dy_desc"].base.element_size()
    return Work((M * N + N * K + 4 * M * K) * size, 2 * M * N * K + 12 * M * K)


def _slice_grad(a: dict[str, Any], grid: tuple[int, ...]) -> Work:
    M, P, R = a["M"], a["P"], a["R"]
    results = grid[1] * P * R * (2 if a["ACCUMULATE"] else 1)
    size, out_size = a["wide_ptr"].element_size(), a["out_ptr"].element_size()
    return Work(M * (P + R) * size + results * out_size, 2 * M * P * R)


def _slice_grad_each(a: dict[str, Any], grid: tuple[int, ...]) -> Work:
    S, P, R = a["wide_ptr"].shape[0], a["P"], a["R"]
    size, out_size = a["wide_ptr"].element_size(), a["out_ptr"].element_size()
    return Work(S * (P + R) * size + 2 * grid[1] * P * R * out_size, 2 * S * P * R)


def _reduce(a: dict[str, Any], grid: tuple[int, ...]) -> Work:
    results = a["rows"] * a["cols"]
    moved = results * (2 if a["ACCUMULATE"] else 1) * a["out_ptr"].element_size()
    return Work(a["num_splits"] * results * 4 + moved, a["num_splits"] * results)


def _slice_linear(a: dict[str, Any], grid: tuple[int, ...]) -> Work:
    M, C, D, size = a["M"], a["C"], a["D"], a["c_ptr"].element_size()
    delta = D * C * a["b_ptr"].element_size()
    return Work(M * (D + 2 * C) * size + delta, 2 * M * C * D)


def _swiglu(a: dict[str, Any], grid: tuple[int, ...]) -> Work:
    M, K = a["gate_ptr"].shape
    return Work(3 * M * K * a["gate_ptr"].element_size(), 5 * M * K)


def _swiglu_bwd(a: dict[str, Any], grid: tuple[int, ...]) -> Work:
    M, K, R = a["gate_ptr"].shape[0], a["K"], a["R"]
    # Without channels of dh only the slice is rebuilt, from that much of gate and up.
    moved = 5 * K + R if K else 3 * R
    return Work(M * moved * a["gate_ptr"].element_size(), M * (12 * K + 5 * R))


WORK: dict[str, Callable[[dict[str, Any], tuple[int, ...]], Work]] = {
    "_linear_kernel": _linear,
    "_linear_descriptor_kernel": _linear_descriptor,
    "_linear_dx_swiglu_bwd_kernel": _linear_dx_swiglu_bwd,
    "_slice_grad_kernel": _slice_grad,
    "_slice_grad_each_kernel": _slice_grad_each,
    "_reduce_kernel": _reduce,
    "_slice_linear_kernel": _slice_linear,
    "_swiglu_kernel": _swiglu,
    "_swiglu_bwd_kernel": _swiglu_bwd,
}
