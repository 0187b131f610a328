"""Write an adapter into the dense weights of a served model, and take it out again, exactly.

    weight[:, index] = base + delta    in-slice, (N, R)
    weight[index, :] = base + delta    out-slice, (R, K)

The sum is rounded once, to the weight's dtype. `base` is a copy of what the weight held, so that
switching to another adapter, to the base, or an exception on the way, leaves no trace: W0 comes
back bit for bit, however many switches there were (S2FT section 6.2, Figure 6b, adds the next
adapter to what is there, which drifts).
"""

from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from s2kernels import backend
from s2kernels.adapter import Slice

# Adapters whose values are kept ready to be written: that before, and this one.
_PREPARED = 2
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, eq=False)
class _Patch:
    """What an adapter writes into one weight (N, K), and what was there.

    index int32 (R,); base and value (N, R) for axis 1, (R, K) for axis 0, in the weight's dtype.
    """

    name: str
    weight: Tensor
    axis: int
    index: Tensor
    base: Tensor
    value: Tensor
    parameter: Tensor
    version: int

    @property
    def dim(self) -> str:
        return "in" if self.axis == 1 else "out"

    def is_current(self) -> bool:
        """Whether the weight is as it was when `base` was copied, as far as autograd knows."""
        same = self.parameter.data_ptr() == self.weight.data_ptr()
        return same and self.parameter._version == self.version

    @cached_property
    def where(self) -> slice | Tensor:
        """The index as int64, or as a slice where it is a run."""
        first, size = int(self.index[0]), len(self.index)
        run = torch.arange(first, first + size, dtype=torch.int32, device=self.index.device)
        return slice(first, first + size) if torch.equal(self.index, run) else self.index.long()

    @cached_property
    def bits(self) -> tuple:
        """The index, and the weight, base and value as integers, which NumPy has in all sizes."""
        integers = _INTEGERS[self.weight.itemsize]
        tensors = (self.weight, self.base, self.value)
        return self.index.numpy(), *(tensor.view(integers).numpy() for tensor in tensors)


class Switcher:
    """The dense linear layers of `model`, and which adapter is written into them.

    It alone knows what the weights hold. Nothing else may write into them while an adapter is in.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._written: list[_Patch] = []
        self._prepared: OrderedDict[Hashable, list[_Patch]] = OrderedDict()
        self.active: Hashable = None

    def base_slice(self, name: str, index: Tensor, dim: str) -> Tensor | None:
        """What the base holds at the channels of module `name`: (N, R) or (R, K), a copy.

        None for a weight that is not a floating matrix, as a quantized one is not. Raises
        ValueError where there is no such layer, or it has no such channels.
        """
        shape, axis = self.shape(name), 1 if dim == "in" else 0
        if index.numel() and int(index.max()) >= shape[axis]:
            raise ValueError(
                f"{name}: index must lie in [0, {shape[axis]}), the {dim}put channels of the layer,"
                f" got {int(index.max())}"
            )
        weight = self._weight(name)
        if weight is None:
            return None
        index = index.to(weight.device).long()
        found = weight.index_select(axis, index)
        for patch in self._written:
            if patch.weight.data_ptr() != weight.data_ptr():
                continue
            if patch.axis == axis:
                same = (index[:, None] == patch.index[None, :].long()).nonzero()
                found.index_copy_(axis, same[:, 0], patch.base.index_select(axis, same[:, 1]))
            else:
                found.index_copy_(patch.axis, patch.index.long(), patch.base[_at(axis, index)])
        return found

    def shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a linear layer. Raises ValueError, naming it, where there is none."""
        module = self._module(name)
        for out_name, in_name in (("out_features", "in_features"), ("nf", "nx")):
            sizes = getattr(module, out_name, None), getattr(module, in_name, None)
            if all(isinstance(size, int) for size in sizes):
                return sizes  # type: ignore[return-value]
        raise ValueError(f"{name} is no linear layer of the model but a {type(module).__name__}")

    def switch(self, key: Hashable, slices: Mapping[str, Slice] | None) -> None:
        """Have the weights hold W0 + slices, or W0 for None, whatever they hold.

        key names the content of `slices`: equal keys, equal slices. Raises ValueError, before
        anything is changed, where a layer is missing, does not fit or has no dense floating weight.
        After any other exception the weights hold W0.
        """
        new = [] if slices is None else self._prepare(key, slices)
        old, self._written = self._written, [*self._written, *new]
        self.active = None if slices is None else key
        try:
            # Restored first: where the two meet, the new value has to win.
            _write(old, restore=True)
            _write(new, restore=False)
        except BaseException:
            self.active = None
            _write(self._written, restore=True)
            self._written = []
            raise
        self._written = new

    def _prepare(self, key: Hashable, slices: Mapping[str, Slice]) -> list[_Patch]:
        patches = self._prepared.pop(key, None)
        if patches is None or not all(self._is_current(patch) for patch in patches):
            patches = [self._patch(name, part) for name, part in slices.items()]
        self._prepared[key] = patches
        while len(self._prepared) > _PREPARED:
            self._prepared.popitem(last=False)
        return patches

    def _is_current(self, patch: _Patch) -> bool:
        return self._module(patch.name).weight is patch.parameter and patch.is_current()

    def _patch(self, name: str, part: Slice) -> _Patch:
        if part.delta.dim() == 3:
            raise ValueError(f"{name}: adapters of experts cannot be switched in")
        base, weight = self.base_slice(name, part.index, part.dim), self._weight(name)
        if base is None or weight is None:
            raise ValueError(
                f"{name}: only a dense floating weight can have an adapter written into it"
            )
        delta = part.delta.detach().to(weight.device)
        if delta.shape != base.shape:
            raise ValueError(
                f"{name}: delta must have shape {tuple(base.shape)}, got {tuple(delta.shape)}"
            )
        return _Patch(
            name,
            weight,
            part.axis,
            part.index.to(weight.device),
            base,
            (base + delta).to(weight.dtype),
            parameter := cast(Tensor, self._module(name).weight),
            parameter._version,
        )

    def _module(self, name: str) -> nn.Module:
        try:
            return self._model.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{name}: the model has no such layer") from None

    def _weight(self, name: str) -> Tensor | None:
        """(N, K), which shares the memory of the parameter; None if it is not a dense matrix."""
        module = self._module(name)
        weight: Any = getattr(module, "weight", None)
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            return None
        # Not through detach: neither autograd nor the version counter is to see a switch.
        matrix = weight.data
        if hasattr(module, "nf"):  # the Conv1D of GPT-2, whose weight is (K, N)
            matrix = matrix.t()
        return matrix if tuple(matrix.shape) == self.shape(name) else None


def _at(axis: int, index: Tensor | slice) -> Any:
    return (slice(None), index) if axis == 1 else index


def _write(patches: list[_Patch], restore: bool) -> None:
    """What the base held there, or the values of the adapter; one launch on a GPU."""
    rest = [patch for patch in patches if not _is_on_cpu(patch)]
    if rest:
        backend.select(rest[0].weight).slice_write(
            [patch.weight for patch in rest],
            [patch.base if restore else patch.value for patch in rest],
            [None] * len(rest),
            [patch.index for patch in rest],
            [patch.dim for patch in rest],
        )
    for patch in patches:
        if _is_on_cpu(patch):
            _write_on_cpu(patch, restore)


def _is_on_cpu(patch: _Patch) -> bool:
    return patch.weight.device.type == "cpu"


def _write_on_cpu(patch: _Patch, restore: bool) -> None:
    """Rows by NumPy, a scatter for columns: torch's index_copy_ takes up to three times as long."""
    if isinstance(patch.where, Tensor) and patch.axis == 0:
        index, weight, base, value = patch.bits
        weight[index] = base if restore else value
        return
    value = patch.base if restore else patch.value
    if isinstance(patch.where, slice):
        patch.weight[_at(patch.axis, patch.where)] = value
    else:
        patch.weight.scatter_(1, patch.where.expand(len(patch.weight), -1), value)
