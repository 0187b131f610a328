"""The layer that PEFT puts in the place of a Linear: its deltas, and how they reach the output."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from s2kernels.adapter import Slice, check_fingerprint, fingerprint
from s2kernels.architectures import Member
from s2kernels.autograd.checks import check_index, version_of
from s2kernels.autograd.linear import delta_linear, linear
from s2kernels.coupling import is_conv1d, is_dense
from s2kernels.reference import Index, take

if TYPE_CHECKING:
    from s2kernels.peft.base_weights import BaseWeights


class S2FTLinear(nn.Module, BaseTunerLayer):
    """A frozen base layer (N, K) with, per adapter, a trained slice on `dim`.

    Saved per adapter, in the original basis:

        s2ft_delta   Parameter, fp32 by default: (N, R) for dim="in", (R, K) for dim="out"
        s2ft_index   int32 (R,), the trained channels
        s2ft_dim     int32 (), the axis of the weight they lie on: 1 for "in", 0 for "out"
        s2ft_fingerprint  int64 (R,), of W0 there: an adapter is refused on another base. Zeros, for
                     "not known", where the weight is not dense and floating

    `structure` and `member` say where the layer sits in the coupling table, None if nowhere.
    """

    adapter_layer_names = ("s2ft_delta",)
    other_param_names = (
        *("s2ft_index", "s2ft_dim", "s2ft_fingerprint"),
        *("modes", "layouts", "positions", "_seen"),
    )

    def __init__(
        self,
        base_layer: nn.Module,
        base_weights: "BaseWeights",
        name: str,
        dim: str,
        structure: str | None = None,
        member: Member | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.base_weights = base_weights
        self.name, self.dim, self.structure, self.member = name, dim, structure, member
        self.in_features, self.out_features = features(base_layer)
        self.quantization_backend = resolve_quantization_backend(base_layer)
        self.s2ft_delta = nn.ParameterDict()
        self.s2ft_index = BufferDict({}, persistent=True)
        self.s2ft_dim = BufferDict({}, persistent=True)
        self.s2ft_fingerprint = BufferDict({}, persistent=True)
        self.modes: dict[str, str] = {}
        self.layouts: dict[str, str] = {}
        # where the channels of each adapter lie in the present basis; see BaseWeights
        self.positions: dict[str, Index] = {}
        # the buffers that positions were made from, and their versions: loading replaces them
        self._seen: dict[str, list[tuple[Tensor, int]]] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self._merged_slices: list[Tensor] = []
        # the adapter whose slice is in the weight (inplace), and what it took the place of
        self.written: str | None = None
        self.base_slice: Tensor | None = None
        self.register_load_state_dict_post_hook(_after_load)

    @torch.inference_mode(False)  # or they could never be trained
    def update_layer(self, adapter_name: str, index: Tensor, mode: str, layout: str) -> None:
        """Add an adapter that trains the channels `index`, int32 (R,), in the original basis.

        Raises ValueError for mode="inplace" where the base layer does not admit it.
        """
        if mode == "inplace" and (reason := self.not_inplace()):
            raise ValueError(f"mode='inplace' needs a plain dense weight: {reason}")
        weight = self.weight
        num = check_index("index", index, self.num_channels)
        shape = (self.out_features, num) if self.dim == "in" else (num, self.in_features)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        # On the meta device PEFT loads the tensors afterwards; then they are only declared here.
        self.s2ft_delta[adapter_name] = nn.Parameter(
            torch.zeros(shape, dtype=dtype, device=weight.device)
        )
        self.s2ft_index[adapter_name] = index.to(weight.device)
        self.s2ft_dim[adapter_name] = torch.tensor(
            self.axis, dtype=torch.int32, device=weight.device
        )
        self.modes[adapter_name], self.layouts[adapter_name] = mode, layout
        self.locate()
        self.s2ft_fingerprint[adapter_name] = self._fingerprint(adapter_name)
        self._seen[adapter_name] = self._sources(adapter_name)

    @property
    def axis(self) -> int:
        """The axis of the weight on which the trained channels lie."""
        return 1 if self.dim == "in" else 0

    @property
    def num_channels(self) -> int:
        """Channels on that axis, trained or not."""
        return self.in_features if self.dim == "in" else self.out_features

    @property
    def matrix(self) -> Tensor:
        """The weight as (N, K), a view of it where the base layer stores the transpose."""
        return self.weight.t() if is_conv1d(self.get_base_layer()) else self.weight

    def not_inplace(self) -> str | None:
        """Why no slice can be written into the base weight; None if it can."""
        base, weight = self.get_base_layer(), self.weight
        if not is_dense(base):
            return f"the base layer is a {type(base).__name__}"
        if type(weight) is not nn.Parameter or weight.is_meta:
            return f"the weight is a {type(weight).__name__} on {weight.device}"
        if not weight.is_floating_point():
            return f"the weight is {weight.dtype}"
        return self.base_weights.not_inplace(weight)

    @torch.inference_mode(False)  # autograd saves positions, which it would not of such a tensor
    def locate(self) -> None:
        """Look up, for the present basis, where the channels of each adapter lie.

        Raises ValueError for an index or a dim that does not fit the layer.
        """
        for name, index in self.s2ft_index.items():
            if index.is_meta:
                continue
            check_index(f"s2ft_index of adapter {name!r}", index, self.num_channels)
            if int(self.s2ft_dim[name]) != self.axis:
                raise ValueError(
                    f"s2ft_dim of adapter {name!r} must be {self.axis}, that of {self.dim}put "
                    f"channels, got {int(self.s2ft_dim[name])}"
                )
            working = self.base_weights.to_working(self, index)
            start, stop = int(working[0]), int(working[0]) + len(working)
            is_run = torch.equal(
                working.cpu(), torch.arange(start, stop, dtype=torch.int32, device="cpu")
            )
            self.positions[name] = slice(start, stop) if is_run else working

    @torch.inference_mode(False)
    def refresh(self, loaded: bool = False) -> None:
        """Take note of adapters that were loaded since the last time.

        loaded: the base may have been loaded, too. Adapters that did not come along are from then
        on those of the new base.

        Raises ValueError for one that does not fit the layer, or was trained on another base.
        """
        if torch.compiler.is_compiling():
            return
        changed = {}
        for name in self.s2ft_index:
            pairs = zip(self._seen.get(name, ()), self._sources(name), strict=False)
            same = [old[0] is new[0] and old[1] == new[1] for old, new in pairs]
            if loaded or same != [True, True]:
                changed[name] = same[1:] == [True]
        if not changed:
            return
        self.restore()
        self.locate()
        for name, is_own in changed.items():
            expected = self.s2ft_fingerprint[name]
            if is_own or not expected.any():  # the fingerprint did not come along
                if not self.merged:
                    self.s2ft_fingerprint[name] = self._fingerprint(name)
            elif not self.merged and self._is_dense():
                check_fingerprint(self.name, expected, self.take_base_slice(name), self.dim)
            self._seen[name] = self._sources(name)

    def _sources(self, name: str) -> list[tuple[Tensor, int]]:
        buffers = self.s2ft_index[name], self.s2ft_fingerprint[name]
        return [(buffer, version_of(buffer)) for buffer in buffers]

    def _fingerprint(self, name: str) -> Tensor:
        if not self._is_dense():
            index = self.s2ft_index[name]
            return torch.zeros(index.numel(), dtype=torch.int64, device=index.device)
        return fingerprint(self.take_base_slice(name), self.dim).to(self.weight.device)

    def _is_dense(self) -> bool:
        """Whether the weight can be read as the (N, K) floats that it stands for."""
        weight = self.weight
        return type(weight) is nn.Parameter and weight.is_floating_point() and not weight.is_meta

    def inplace_adapter(self) -> str | None:
        """The adapter whose slice belongs in the weight now; None where there is none.

        Raises ValueError where an adapter demands mode="inplace" and is not the only active one.
        """
        if self.disable_adapters or self.merged or self.base_weights.adapter_names is not None:
            return None
        names = self._present(self.active_adapters)
        if len(names) == 1:
            mode = self.modes[names[0]]
            legal = mode == "inplace" or (mode == "auto" and self.not_inplace() is None)
            return names[0] if legal else None
        for name in names:
            if self.modes[name] == "inplace":
                raise ValueError(
                    f"adapter {name!r} has mode='inplace', which needs exactly one active adapter, "
                    f"got {names}; use mode='auto' or 'additive'"
                )
        return None

    def slice_of(self, adapter_name: str) -> Slice:
        """The adapter's part of this layer, in the original basis."""
        return Slice(
            self.dim,
            self.s2ft_index[adapter_name],
            self.s2ft_delta[adapter_name].detach(),
            self.s2ft_fingerprint[adapter_name],
        )

    def entry(self, adapter_name: str, delta: Tensor | None) -> tuple:
        """Arguments of `slice_write` for this layer."""
        return self.matrix, self.base_slice, delta, self.positions[adapter_name], self.dim

    def take_base_slice(self, adapter_name: str) -> Tensor:
        """A copy of what the weight holds where the adapter's channels lie, shaped like delta."""
        weight = self.matrix.data
        where = self.positions[adapter_name]
        return take(weight, where) if self.dim == "in" else take(weight.t(), where).t().contiguous()

    def restore(self) -> None:
        """Put back, bit for bit, what an inplace adapter has taken the place of."""
        if self.written is not None:
            self.base_weights.restore([self])

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """The base layer's output with the active adapters: (..., N) for x (..., K)."""
        self.refresh()
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.base_weights.adapter_names is not None and not self.disable_adapters:
            return self._forward_mixed(x, self.base_weights.adapter_names, *args, **kwargs)
        name = self.inplace_adapter()
        if name is not None:
            return self._forward_inplace(x, name)

        self.restore()
        names = [] if self.disable_adapters or self.merged else self._present(self.active_adapters)
        if names and is_dense(self.base_layer):
            first, *names = names
            delta, where = self.s2ft_delta[first], self.positions[first]
            y = linear(x, self.matrix, delta, where, self.dim, self.bias, "additive")
        else:
            y = self.base_layer(x, *args, **kwargs)
        for name in names:
            y = delta_linear(y, x, self.s2ft_delta[name], self.positions[name], self.dim)
        return y

    def _forward_inplace(self, x: Tensor, name: str) -> Tensor:
        # A forward of the whole model has written all slices by one launch. What comes from
        # elsewhere (a recomputed checkpoint, a call of a submodule) writes its own.
        if self.written != name or not self.base_weights.in_forward:
            self.base_weights.write([(self, name)])
        before_dx = None if torch.compiler.is_compiling() else partial(self._before_dx, name)
        delta, where = self.s2ft_delta[name], self.positions[name]
        return linear(
            x, self.matrix, delta, where, self.dim, self.bias, "inplace", before_dx=before_dx
        )

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args, **kwargs) -> Tensor:
        """Row i of the batch through adapter_names[i]; "__base__", or an adapter that this layer
        lacks, leaves the row as the base layer has it.
        """
        if self.merged:
            raise ValueError("adapter_names does not go with merged adapters: call unmerge_adapter")
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names must name an adapter for each of the {len(x)} rows of the batch, "
                f"got {len(adapter_names)}"
            )
        self.restore()
        y = self.base_layer(x, *args, **kwargs)
        for name in self._present(sorted(set(adapter_names))):
            rows = [row for row, wanted in enumerate(adapter_names) if wanted == name]
            index = torch.tensor(rows, device=x.device)
            delta, where = self.s2ft_delta[name], self.positions[name]
            part = delta_linear(y[index], x[index], delta, where, self.dim)
            y = y.index_copy(0, index, part)
        return y

    def _before_dx(self, name: str) -> None:
        """What the forward saw in the weight is put back, if something else is there by now.

        Raises RuntimeError where it cannot be: the weight is no longer ours to change.
        """
        if self.merged or not self.base_weights.attached:
            raise RuntimeError("the adapter was merged or unloaded between forward and backward")
        if self.written != name:
            self.base_weights.engage()
            self.base_weights.write([(self, name)])

    def check_merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> list[str]:
        """The adapters that `merge` would merge, in that order.

        Raises ValueError for a base that is not a plain dense weight, and with safe_merge for a
        result that is not finite.
        """
        names = self._present(check_adapters_to_merge(self, adapter_names))
        if names and (reason := self.not_inplace()):
            raise ValueError(
                f"an adapter can only be merged into a plain dense weight: {reason}; "
                "load the base in a floating dtype to merge"
            )
        self.restore()
        for name in names if safe_merge else []:
            if not torch.isfinite(self.take_base_slice(name) + self.s2ft_delta[name]).all():
                raise ValueError(f"adapter {name!r} gives a merged weight that is not finite")
        return names

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write base + delta into the weight, rounded once, until `unmerge` restores every bit.

        Raises as `check_merge` does, before anything changes.
        """
        for name in self.check_merge(safe_merge, adapter_names):
            self.base_slice = self.take_base_slice(name)
            self._merged_slices.append(self.base_slice)
            self.base_weights.write_entries([self.entry(name, self.s2ft_delta[name])])
            self.merged_adapters.append(name)
        self.base_slice = None

    def unmerge(self) -> None:
        """Undo every `merge`, the last one first: the weight is what it was, bit for bit."""
        self.restore()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self.base_slice = self._merged_slices.pop()
            self.base_weights.write_entries([self.entry(name, None)])
        self.base_slice = None

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.restore()
        super().enable_adapters(enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        # the permutation may have been made for that adapter
        self.base_weights.release()
        super().delete_adapter(adapter_name)

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.s2ft_delta]

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for name, where in self.positions.items():
            if isinstance(where, Tensor):
                self.positions[name] = fn(where)
        if self.base_slice is not None:
            self.base_slice = fn(self.base_slice)
        self._merged_slices = [fn(base_slice) for base_slice in self._merged_slices]
        self._seen = {name: self._sources(name) for name in self.s2ft_index}
        return self

    def extra_repr(self) -> str:
        sizes = {name: index.numel() for name, index in self.s2ft_index.items()}
        return f"dim={self.dim!r}, channels={sizes}"


def features(layer: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear layer, or of a Conv1D, which calls them otherwise."""
    linear: Any = layer
    return (linear.nx, linear.nf) if is_conv1d(layer) else (linear.in_features, linear.out_features)


def _after_load(layer: S2FTLinear, incompatible_keys) -> None:
    layer.refresh(loaded=True)
