"""Write an adapter into the dense weights of a served model, and take it out again, exactly.

    weight[:, index] = base + delta    in-slice, (N, R)
    weight[index, :] = base + delta    out-slice, (R, K)

The sum is rounded once, to the weight's dtype. `base` is a copy of what the weight held, so that
switching to another adapter, to the base, or an exception on the way, leaves no trace: W0 comes
back bit for bit, however many switches there were (S2FT section 6.2, Figure 6b, adds the next
adapter to what is there, which drifts).
"""

import itertools
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from s2kernels import backend
from s2kernels.adapter import Slice
from s2kernels.serve.words import Words, exchange

# Adapters whose values are kept ready to be written: that before, and this one.
_PREPARED = 2


@dataclass(frozen=True, eq=False)
class _Patch:
    """What an adapter writes into one weight (N, K), and what was there.

    index int32 (R,); base and value (N, R) for axis 1, (R, K) for axis 0, in the weight's dtype.
    words: how a CPU writes them, None on a GPU.
    """

    name: str
    weight: Tensor
    axis: int
    index: Tensor
    base: Tensor
    value: Tensor
    words: Words | None
    parameter: Tensor
    version: int

    @property
    def dim(self) -> str:
        return "in" if self.axis == 1 else "out"

    @cached_property
    def address(self) -> int:
        return self.weight.data_ptr()

    @property
    def layout(self) -> Hashable:
        """Equal for channels along the same axis of the same weight."""
        return self.address, self.axis, *self.weight.shape, *self.weight.stride()


# Of one adapter, by layout, or each by itself where several are of one weight, and on a GPU.
_Patches = dict[Hashable, _Patch]


class Switcher:
    """The dense linear layers of `model`, and which adapter is written into them.

    It alone knows what the weights hold. Nothing else may write into them while an adapter is in.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._written: list[_Patches] = []  # more than one only while one replaces another
        self._prepared: OrderedDict[Hashable, _Patches] = OrderedDict()
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
        for patch in itertools.chain.from_iterable(of.values() for of in self._written):
            if patch.weight.data_ptr() != weight.data_ptr():
                continue
            if patch.axis == axis:
                same = (index[:, None] == patch.index[None, :].long()).nonzero()
                found.index_copy_(axis, same[:, 0], patch.base.index_select(axis, same[:, 1]))
            else:
                values = patch.base.index_select(axis, index)
                found.index_copy_(patch.axis, patch.index.long(), values)
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
        new = {} if slices is None else self._prepare(key, slices)
        written = self._written
        self._written = [*written, new]
        self.active = None if slices is None else key
        try:
            for old in written[1:]:  # of a switch whose end was interrupted twice
                _exchange(old, {})
            _exchange(written[0] if written else {}, new)
        except BaseException:
            self.active = None
            for patches in self._written:
                _exchange(patches, {})
            self._written = []
            raise
        self._written = [new]

    def _prepare(self, key: Hashable, slices: Mapping[str, Slice]) -> _Patches:
        patches = self._prepared.pop(key, None)
        if patches is None or not all(self._is_current(patch) for patch in patches.values()):
            made = [self._patch(name, part) for name, part in slices.items()]
            alone = len({patch.address for patch in made}) == len(made)
            patches = {patch.layout if alone and patch.words else patch: patch for patch in made}
        self._prepared[key] = patches
        while len(self._prepared) > _PREPARED:
            self._prepared.popitem(last=False)
        return patches

    def _is_current(self, patch: _Patch) -> bool:
        """Whether the weight is as it was when its base was copied, as far as autograd knows."""
        parameter = self._module(patch.name)._parameters.get("weight")
        if parameter is not patch.parameter:
            return False
        return parameter.data_ptr() == patch.address and parameter._version == patch.version

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
        index, value = part.index.to(weight.device), (base + delta).to(weight.dtype)
        return _Patch(
            name,
            weight,
            part.axis,
            index,
            base,
            value,
            Words(weight, part.axis, index, base, value) if _is_on_cpu(weight) else None,
            parameter := cast(Tensor, self._module(name).weight),
            parameter._version,
        )

    def _module(self, name: str) -> nn.Module:
        module: Any = self._model
        try:  # Not by get_submodule, which takes longer than all checks of a switch.
            for part in name.split("."):
                module = module._modules[part]
        except (AttributeError, KeyError):
            raise ValueError(f"{name}: the model has no such layer") from None
        return module

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


def _exchange(old: _Patches, new: _Patches) -> None:
    """Restore the old ones, then write the new ones: where the two meet, the new value has to win.

    On a CPU those of the same layout go together.
    """
    differ = old.keys() != new.keys()
    if differ:
        _write([patch for layout, patch in old.items() if layout not in new], restore=True)
    for layout, patch in new.items():
        other = old.get(layout)
        if other and other.words and patch.words:
            exchange(other.words, patch.words)
    if differ:
        _write([patch for layout, patch in new.items() if layout not in old], restore=False)


def _write(patches: list[_Patch], restore: bool) -> None:
    """What the base held there, or the values of the adapter; one launch on a GPU."""
    rest = []
    for patch in patches:
        if patch.words is None:
            rest.append(patch)
        else:
            patch.words.write(restore)
    if rest:
        backend.select(rest[0].weight).slice_write(
            [patch.weight for patch in rest],
            [patch.base if restore else patch.value for patch in rest],
            [None] * len(rest),
            [patch.index for patch in rest],
            [patch.dim for patch in rest],
        )


def _is_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu"
