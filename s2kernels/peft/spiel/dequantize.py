"""Linear layers that bitsandbytes or torchao has quantized: their weights, a panel at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from s2kernels.autograd.panels import Panels

# Kinds of torchao that can be sliced along their rows between two blocks of them. Others are made
# dense as a whole: a slice of these is refused, or of other values.
_SLICEABLE = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")


def is_quantized(layer: nn.Module) -> bool:
    """Whether it is a linear layer whose weight bitsandbytes or torchao holds quantized."""
    kind = type(layer.weight)
    return kind.__name__ in ("Params4bit", "Int8Params") or kind.__module__.startswith("torchao.")


def panels_of(layer: nn.Module) -> Panels:
    """The dense weight that a quantized layer stands for now, bit for bit that of PEFT's
    `dequantize_module_weight`, as panels of rows. A weight that is assigned later is another one.

    bitsandbytes' 4-bit types and int8, torchao's int8, float8 and intx are made dense a panel at a
    time. All else is a single panel, the whole dense weight in every forward and again in every
    backward: other types of torchao, and 4-bit weights of which a row is not a whole number of
    blocks, since not all of bitsandbytes' kernels agree on where blocks lie then.

    Raises as `check_order` does, and ValueError for a weight that bitsandbytes has not quantized.
    """
    check_order(layer)
    linear: Any = layer
    (N, K), weight = (linear.out_features, linear.in_features), linear.weight
    if type(weight).__name__ == "Params4bit":
        state = _quantized(weight.quant_state)
        packed = weight.data.reshape(-1).view(torch.uint8)  # two entries a byte
        rows = partial(_rows_of_4bit, packed, state, K)
        return Panels((N, K), rows, step=N if K % state.blocksize else 1)
    if type(weight).__name__ == "Int8Params":
        # a first forward moves them from the weight to the layer
        scales = _quantized(linear.state.SCB if weight.SCB is None else weight.SCB)
        return Panels((N, K), partial(_rows_of_int8, weight.data, scales))
    if type(weight).__name__ in _SLICEABLE:
        block = weight.block_size[0]
        return Panels((N, K), partial(_rows_of_torchao, weight), 1 if block == N else block)
    return Panels((N, K), partial(_rows_of_torchao, weight), step=N)


def check_order(layer: nn.Module) -> None:
    """Raises ValueError for a 4-bit weight that was rearranged: see `keeping_order`."""
    if getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False):
        raise ValueError(
            "bitsandbytes has rearranged the 4-bit weight in a forward for inference, and what it "
            "was before is lost: load the model again and add the adapter before the first forward"
        )


@contextmanager
def keeping_order(layer: Any) -> Iterator[None]:
    """Forwards of the layer in which bitsandbytes leaves a 4-bit weight in its order.

    On CPUs with AVX512-BF16, one without gradients rearranges the weight for good, and rounds its
    scales. Nothing else can read it then.
    """
    if not getattr(layer, "support_avx512bf16_for_cpu", False):
        yield
        return
    layer.support_avx512bf16_for_cpu = False
    try:
        yield
    finally:
        layer.support_avx512bf16_for_cpu = True


def _quantized(state: Any) -> Any:
    """What bitsandbytes keeps beside a weight that it has quantized; raises ValueError for None."""
    if state is None:
        raise ValueError(
            "bitsandbytes has not quantized the weight: it does when the layer is moved to its "
            "device, unless it was made with has_fp16_weights=True"
        )
    return state


def _rows_of_4bit(packed: Tensor, state: Any, K: int, start: int, stop: int) -> Tensor:
    from bitsandbytes import functional

    first, last = start * K // state.blocksize, -(-stop * K // state.blocksize)
    part = functional.QuantState(
        absmax=_scales(functional, state, first, last),
        shape=torch.Size((stop - start, K)),
        code=state.code,
        blocksize=state.blocksize,
        quant_type=state.quant_type,
        dtype=state.dtype,
    )
    return functional.dequantize_4bit(packed[start * K // 2 : -(-stop * K // 2)], part)


def _scales(functional: Any, state: Any, first: int, last: int) -> Tensor:
    """The largest magnitudes of blocks [first, last) of a 4-bit weight, fp32, which double
    quantization holds in blocks of their own.
    """
    absmax = state.absmax.view(-1)
    if not state.nested:
        return absmax[first:last]
    outer = state.state2
    begin = first // outer.blocksize * outer.blocksize
    scales = functional.dequantize_blockwise(
        absmax[begin:last],
        absmax=outer.absmax[begin // outer.blocksize : -(-last // outer.blocksize)],
        code=outer.code,
        blocksize=outer.blocksize,
    )
    scales += state.offset
    return scales[first - begin :]


def _rows_of_int8(weight: Tensor, scales: Tensor, start: int, stop: int) -> Tensor:
    from bitsandbytes import functional

    return functional.int8_vectorwise_dequant(
        weight[start:stop], scales[start:stop].to(weight.device)
    )


def _rows_of_torchao(weight: Tensor, start: int, stop: int) -> Tensor:
    N = weight.shape[0]
    # the whole is not sliced, which some types refuse
    part: Any = weight if (start, stop) == (0, N) else weight[start:stop]
    return part.dequantize()
