"""What the kernels are tested in, and the one rule for how far from exact a result may be."""

import torch
from torch import Tensor

# The interpreter's tl.dot is wrong in bf16 (triton#11584): that dtype needs a GPU.
DTYPES = [torch.float32, torch.float16]
if torch.cuda.is_available():
    DTYPES.append(torch.bfloat16)


def assert_as_accurate(actual: Tensor, exact: Tensor, eager: Tensor) -> None:
    """`actual` is as accurate as eager torch in the same dtype.

    exact: the result in fp64, from the same (rounded) inputs. eager: what torch computes from them
    in the dtype under test, dtype of the result included. The largest error of `actual` is at most
    twice the largest error of `eager`, plus one rounding of the largest value, which is what an
    error of zero by luck in `eager` costs.
    """
    assert exact.dtype == torch.float64
    assert actual.shape == exact.shape == eager.shape, (actual.shape, exact.shape, eager.shape)
    assert actual.dtype == eager.dtype, (actual.dtype, eager.dtype)
    if exact.numel() == 0:
        return
    assert actual.isfinite().all(), "not finite, or not written"
    error = (actual.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item()
    allowed = 2 * eager_error + torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g} (eager {eager_error:.3g})"
