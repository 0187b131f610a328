"""What the public functions refuse, and how they say it: before anything is computed or changed."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import WeakIdKeyDictionary

from s2kernels.reference import Index

DIMS = ("in", "out")
MODES = ("inplace", "additive")

# index tensor -> (version, size) for which its content was found good: looking at it costs a
# synchronisation on a GPU, and the same index comes back in every step.
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError unless value is one of choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_floating(**tensors: Tensor | None) -> None:
    """Raises TypeError unless every tensor given is a floating one."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be of a floating dtype, got {tensor.dtype}")


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Raises ValueError unless every tensor given is on device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on the device of x, {device}, got {tensor.device}")


def check_shape(name: str, tensor: Tensor, *want: int, why: str) -> None:
    """Raises ValueError unless tensor has the shape want; why says where that shape comes from."""
    if tuple(tensor.shape) != want:
        raise ValueError(f"{name} must have shape {want} ({why}), got {tuple(tensor.shape)}")


def check_index(name: str, index: Index, size: int) -> int:
    """Checks the positions of trained channels on a dimension of that size; returns how many.

    index: int32 tensor (R,), or slice(start, stop) with step 1.

    Raises TypeError for any other type or dtype; ValueError where index is empty, not
    one-dimensional, not contiguous, holds a position twice, or one outside [0, size).
    """
    if isinstance(index, slice):
        start, stop = index.start, index.stop
        if not (isinstance(start, int) and isinstance(stop, int) and index.step in (None, 1)):
            raise TypeError(f"{name} must be slice(start, stop) with integers, got {index}")
        if not 0 <= start < stop <= size:
            raise ValueError(f"{name} must be a non-empty run inside [0, {size}), got {index}")
        return stop - start
    if not isinstance(index, Tensor):
        raise TypeError(f"{name} must be an int32 tensor or a slice, got {type(index).__name__}")
    check_list(name, index, torch.int32)
    if torch.compiler.is_compiling() or index.is_meta or isinstance(index, FakeTensor):
        return index.numel()
    if _checked.get(index) != (version_of(index), size):
        low, high = (int(bound) for bound in torch.aminmax(index))
        if low < 0 or high >= size:
            raise ValueError(f"{name} must lie in [0, {size}), got values from {low} to {high}")
        repeated = index.numel() - index.unique().numel()
        if repeated:
            raise ValueError(f"{name} must not repeat a position, got {repeated} repeated")
        _checked[index] = (version_of(index), size)
    return index.numel()


def check_list(name: str, index: Tensor, dtype: torch.dtype) -> None:
    """Raises TypeError unless index is of dtype, and ValueError unless it is a list of positions:
    not empty, of one dimension, contiguous.
    """
    if index.dtype != dtype:
        raise TypeError(f"{name} must be of dtype {dtype}, got {index.dtype}")
    if index.dim() != 1 or index.numel() == 0:
        raise ValueError(f"{name} must be non-empty and of one dimension, got {tuple(index.shape)}")
    if not index.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got stride {index.stride(0)}")


def version_of(tensor: Tensor) -> int:
    """How often the tensor was written to; 0 for one of inference mode, which does not count."""
    return 0 if tensor.is_inference() else tensor._version


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that x is multiplied in: that of autocast, which spares fp64, or else its own."""
    return torch.get_autocast_dtype(x.device.type) if is_autocast(x) else x.dtype


def is_autocast(x: Tensor) -> bool:
    """Whether autocast is on for the device of x, and does not spare x."""
    if not torch._C._is_any_autocast_enabled():  # one question instead of three in most calls
        return False
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # the meta device has none
    return has_autocast and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def check_weight(name: str, weight: Tensor, x: Tensor) -> None:
    """Raises unless weight is a frozen (N, K) matrix that x (..., K) can be multiplied with.

    TypeError for an integer dtype, or one that differs from that of x and that autocast, which is
    off or spares fp64, does not make the same; ValueError for a wrong rank, K or device, and for a
    weight that requires grad.
    """
    check_floating(x=x, **{name: weight})
    if weight.dim() != 2:
        raise ValueError(f"{name} must be a matrix (N, K), got shape {tuple(weight.shape)}")
    if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x must have shape (..., {weight.shape[1]}) to go with {name} "
            f"{tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    check_device(x.device, **{name: weight})
    if weight.requires_grad:
        raise ValueError(f"{name} must be frozen: it gets no gradient, its slice does")
    if compute_dtype(weight) != compute_dtype(x):
        raise TypeError(f"{name} must be of the dtype of x, {x.dtype}, got {weight.dtype}")


def check_slice(
    layer: str, shape: tuple[int, ...], device: torch.device, delta: Tensor, index: Index, dim: str
) -> None:
    """Raises unless delta and index describe a slice on dim of a layer of shape (N, K) on device.

    delta must be floating, and (N, R) for dim="in", (R, K) for dim="out".
    """
    check_choice("dim", dim, DIMS)
    check_floating(delta=delta)
    check_device(device, delta=delta)
    if isinstance(index, Tensor):
        check_device(device, index=index)
    out_features, in_features = shape
    num = check_index("index", index, in_features if dim == "in" else out_features)
    want = (out_features, num) if dim == "in" else (num, in_features)
    check_shape("delta", delta, *want, why=f"{num} trained {dim}put channels of {layer} {shape}")
