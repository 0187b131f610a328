"""What every S2FT layer is: the adapters of one base weight, their slices, and their life."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from s2kernels.adapter import Slice, check_fingerprint, fingerprint
from s2kernels.architectures import Member
from s2kernels.autograd.experts import check_positions
from s2kernels.coupling import not_plain
from s2kernels.peft.lifecycle import AdapterLayer
from s2kernels.peft.loaded import Sources, changed, moved, sources
from s2kernels.reference import Index

if TYPE_CHECKING:
    from s2kernels.peft.base_weights import BaseWeights


class S2FTLayer(AdapterLayer):
    """A frozen base weight (N, K) with, per adapter, a trained slice on `dim`.

    Saved per adapter, in the original basis:

        s2ft_delta   Parameter, fp32 by default: (N, R) for dim="in", (R, K) for dim="out"
        s2ft_index   int32 (R,), the trained channels
        s2ft_dim     int32 (), the axis of the weight they lie on: 1 for "in", 0 for "out"
        s2ft_fingerprint  int64 (R,), of W0 there: an adapter is refused on another base. Zeros, for
                     "not known", where the weight is not dense and floating

    All but s2ft_dim have an axis of experts in front where the weight is (E, N, K).

    `structure` and `member` say where the weight sits in the coupling table, None if nowhere.

    Whoever inherits says what the base weight is, and brings a forward:

        weight             the Parameter
        take_base_slice    what it holds where an adapter's channels lie
        entries            the same places as `slice_write` takes them
        obstacle           why no slice can be written into it
    """

    # (E,) of experts, () of a single matrix
    num_experts: tuple[int, ...] = ()
    in_features: int
    out_features: int

    adapter_layer_names = ("s2ft_delta",)
    other_param_names: tuple[str, ...] = (
        *("s2ft_index", "s2ft_dim", "s2ft_fingerprint"),
        *("modes", "layouts", "fuse", "positions", "_seen"),
    )

    def __init__(
        self,
        base_weights: "BaseWeights",
        name: str,
        dim: str,
        structure: str | None = None,
        member: Member | None = None,
    ) -> None:
        super().__init__()
        self.base_weights = base_weights
        self.name, self.dim, self.structure, self.member = name, dim, structure, member
        self.s2ft_delta = nn.ParameterDict()
        self.s2ft_index = BufferDict({}, persistent=True)
        self.s2ft_dim = BufferDict({}, persistent=True)
        self.s2ft_fingerprint = BufferDict({}, persistent=True)
        self.modes: dict[str, str] = {}
        self.layouts: dict[str, str] = {}
        self.fuse: dict[str, bool] = {}  # whether s2kernels.peft.fused may compute it; True if not
        # where the channels of each adapter lie in the present basis; see BaseWeights
        self.positions: dict[str, Index] = {}
        # the buffers that positions were made from, and their versions: loading replaces them
        self._seen: dict[str, Sources] = {}
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
        """Add an adapter that trains the channels `index`, int32 (R,) or (E, R), in the original
        basis.

        Raises ValueError for an offloaded weight, and for mode="inplace" where the base layer does
        not admit it.
        """
        self.check_is_loaded()
        if mode == "inplace" and (reason := self.not_inplace()):
            raise ValueError(f"mode='inplace' needs a plain dense weight: {reason}")
        weight = self.weight
        num = self._check_index("index", index)
        shape = (self.out_features, num) if self.dim == "in" else (num, self.in_features)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        # On the meta device PEFT loads the tensors afterwards; then they are only declared here.
        self.s2ft_delta[adapter_name] = nn.Parameter(
            torch.zeros(*self.num_experts, *shape, dtype=dtype, device=weight.device)
        )
        self.s2ft_index[adapter_name] = index.to(weight.device)
        self.s2ft_dim[adapter_name] = torch.tensor(
            self.axis, dtype=torch.int32, device=weight.device
        )
        self.modes[adapter_name], self.layouts[adapter_name] = mode, layout
        self.locate()
        self.s2ft_fingerprint[adapter_name] = self._fingerprint(adapter_name)
        self._seen[adapter_name] = self._sources(adapter_name)

    @torch.inference_mode(False)
    def copy_adapter(self, source: str, adapter_name: str) -> None:
        self.refresh()
        requires_grad = self.s2ft_delta[adapter_name].requires_grad
        delta = self.s2ft_delta[source].detach().clone()
        self.s2ft_delta[adapter_name] = nn.Parameter(delta, requires_grad=requires_grad)
        self.s2ft_index[adapter_name] = self.s2ft_index[source].clone()
        self.locate()
        known = self.s2ft_fingerprint[source]  # of the dense base, where this one is quantized
        self.s2ft_fingerprint[adapter_name] = (
            known.clone() if known.any() else self._fingerprint(adapter_name)
        )
        self._seen[adapter_name] = self._sources(adapter_name)

    @property
    def axis(self) -> int:
        """The axis of the weight on which the trained channels lie."""
        return 1 if self.dim == "in" else 0

    @property
    def num_channels(self) -> int:
        """Channels on that axis, trained or not."""
        return self.in_features if self.dim == "in" else self.out_features

    def not_inplace(self) -> str | None:
        """Why no slice can be written into the base weight; None if it can."""
        if reason := self.obstacle():
            return reason
        return not_plain(self.weight) or self.base_weights.not_inplace(self.weight)

    @torch.inference_mode(False)  # autograd saves positions, which it would not of such a tensor
    def locate(self) -> None:
        """Look up, for the present basis, where the channels of each adapter lie.

        Raises ValueError for an index or a dim that does not fit the layer.
        """
        for name, index in self.s2ft_index.items():
            if index.is_meta:
                continue
            self._check_index(f"s2ft_index of adapter {name!r}", index)
            if int(self.s2ft_dim[name]) != self.axis:
                raise ValueError(
                    f"s2ft_dim of adapter {name!r} must be {self.axis}, that of {self.dim}put "
                    f"channels, got {int(self.s2ft_dim[name])}"
                )
            working = self.base_weights.to_working(self, index)
            here = working.cpu()
            start = int(here.flatten()[0])
            stop = start + here.shape[-1]
            run = torch.arange(start, stop, dtype=torch.int32, device="cpu")
            is_run = bool((here == run).all())  # the same one in every expert
            self.positions[name] = slice(start, stop) if is_run else working

    def _check_index(self, name: str, index: Tensor) -> int:
        name = f"{self.name}: {name}"
        if tuple(index.shape[:-1]) != self.num_experts:
            raise ValueError(
                f"{name} must have shape {(*self.num_experts, 'R')}, got {tuple(index.shape)}"
            )
        return check_positions(name, index, self.num_channels)

    @torch.inference_mode(False)
    def refresh(self, loaded: bool = False) -> None:
        """Take note of adapters that were loaded since the last time.

        loaded: the base may have been loaded, too. Adapters that did not come along are from then
        on those of the new base.

        Raises ValueError for one that does not fit the layer, or was trained on another base.
        """
        if torch.compiler.is_compiling():
            return
        found = changed(self.s2ft_index, self.s2ft_fingerprint, self._seen, loaded)
        if not found:
            return
        self.restore()
        self.locate()
        for name, is_own in found.items():
            expected = self.s2ft_fingerprint[name]
            if is_own or not expected.any():  # the fingerprint did not come along
                if not self.merged:
                    self.s2ft_fingerprint[name] = self._fingerprint(name)
            elif not self.merged and not_plain(self.weight) is None:
                check_fingerprint(self.name, expected, self.take_base_slice(name), self.dim)
            self._seen[name] = self._sources(name)

    def _sources(self, name: str) -> Sources:
        return sources(self.s2ft_index[name], self.s2ft_fingerprint[name])

    def _fingerprint(self, name: str) -> Tensor:
        if not_plain(self.weight):
            return torch.zeros_like(self.s2ft_index[name], dtype=torch.int64)
        return fingerprint(self.take_base_slice(name), self.dim).to(self.weight.device)

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

    def obstacle(self) -> str | None:
        """Why no slice can be written into the weight, as far as the kind of the layer decides."""
        raise NotImplementedError

    def entries(self, adapter_name: str, delta: Tensor | None) -> list[tuple]:
        """Arguments of `slice_write` for this layer: matrices, their base slices, deltas, indices
        and dims. A delta of None restores the base slice.
        """
        raise NotImplementedError

    def take_base_slice(self, adapter_name: str) -> Tensor:
        """A copy of what the weight holds where the adapter's channels lie, shaped like delta."""
        raise NotImplementedError

    def restore(self) -> None:
        """Put back, bit for bit, what an inplace adapter has taken the place of."""
        if self.written is not None:
            self.base_weights.restore([self])

    def before_dx(self, name: str | None) -> Callable[[], None] | None:
        """What a backward is to call before it reads the weight, so that it meets what the forward
        saw there: the slice of the adapter `name`, or W0 for None.
        """
        if torch.compiler.is_compiling() or self.merged:
            return None
        return partial(self._before_dx, name)

    def put_back_before_backward_of(self, y: Tensor) -> None:
        """The backward of the base layer's output y meets W0, whatever is written until then."""
        if y.requires_grad and (before_dx := self.before_dx(None)):
            y.register_hook(lambda dy: before_dx())

    def _before_dx(self, name: str | None) -> None:
        """Raises RuntimeError where the weight is no longer ours to change."""
        if self.merged or (name is not None and not self.base_weights.attached):
            raise RuntimeError("the adapter was merged or unloaded between forward and backward")
        if name is None:
            self.restore()
        elif self.written != name:
            self.base_weights.engage()
            self.base_weights.write([(self, name)])

    def merged_values(self, adapter_name: str) -> Tensor:
        return self.take_base_slice(adapter_name) + self.s2ft_delta[adapter_name].detach()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write base + delta into the weight, rounded once, until `unmerge` restores every bit.

        Raises as `check_merge` does, before anything changes.
        """
        for name in self.check_merge(safe_merge, adapter_names):
            self.base_slice = self.take_base_slice(name)
            self._merged_slices.append(self.base_slice)
            self.base_weights.write_entries(self.entries(name, self.s2ft_delta[name]))
            self.merged_adapters.append(name)
        self.base_slice = None

    def unmerge(self) -> None:
        """Undo every `merge`, the last one first: the weight is what it was, bit for bit."""
        self.restore()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self.base_slice = self._merged_slices.pop()
            self.base_weights.write_entries(self.entries(name, None))
        self.base_slice = None

    def delete_adapter(self, adapter_name: str) -> None:
        # the permutation may have been made for that adapter
        self.base_weights.release()
        super().delete_adapter(adapter_name)

    def _apply(self, fn, recurse: bool = True):
        found = changed(self.s2ft_index, self.s2ft_fingerprint, self._seen, loaded=False)
        super()._apply(fn, recurse)
        for name, where in self.positions.items():
            if isinstance(where, Tensor):
                self.positions[name] = fn(where)
        if self.base_slice is not None:
            self.base_slice = fn(self.base_slice)
        self._merged_slices = [fn(base_slice) for base_slice in self._merged_slices]
        self._seen = moved(self.s2ft_index, self.s2ft_fingerprint, self._seen, found)
        return self

    def extra_repr(self) -> str:
        sizes = {name: index.shape[-1] for name, index in self.s2ft_index.items()}
        return f"dim={self.dim!r}, channels={sizes}"


def _after_load(layer: S2FTLayer, incompatible_keys) -> None:
    layer.refresh(loaded=True)
