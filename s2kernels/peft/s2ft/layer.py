"""What every S2FT layer is: a base weight of which each adapter trains a slice."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from s2kernels import backend
from s2kernels.adapter import Slice, check_fingerprint, fingerprint
from s2kernels.architectures import Member
from s2kernels.autograd.experts import check_positions
from s2kernels.coupling import Structure
from s2kernels.peft.host.kept_buffers import KeptBuffers, beside, home_of, with_values
from s2kernels.peft.host.layer import AdapterLayer
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.host.written_layer import Held
from s2kernels.peft.s2ft.arranged_weights import arrangement_of
from s2kernels.reference import Index

Found = tuple[Structure, Member] | None  # what `s2kernels.coupling.find` finds


def slice_writer(entries: list[tuple]) -> Callable[[], None]:
    """What writes the slices of layers, all on one device; see `Writes`."""
    return backend.select(entries[0][0]).slice_writer(*zip(*entries, strict=True))


def copy_of_channels(weight: Tensor, where: Index, dim: str) -> Tensor:
    """A copy of what a weight (N, K), or one of experts (E, N, K), or a shard of one, has at these
    channels, shaped like delta.
    """
    axis = weight.dim() - (1 if dim == "in" else 2)
    if isinstance(where, slice):
        part = weight.narrow(axis, where.start, where.stop - where.start)
        return part.clone(memory_format=torch.contiguous_format)
    if where.dim() == 1:
        return weight.index_select(axis, where).contiguous()
    return torch.take_along_dim(weight, where.long().unsqueeze(3 - axis), axis)


class PreparedCall(NamedTuple):
    """What a forward of a layer, or of several as one Function, does; see `AdapterLayer.prepared`.

    written:  of each layer, the adapter whose slice is to be in the weight; None for W0
    operands: of the Function, which takes the weight with the first slice; None where the modules
              compute their own output
    slices:   (delta, positions) of the other active adapters
    """

    changes: int
    premises: Premises
    written: dict[Any, str | None]
    operands: Any = None
    slices: Sequence[tuple[Tensor, Index]] = ()


class S2FTLayer(AdapterLayer):
    """A frozen base weight (N, K) with, per adapter, a trained slice on `dim`.

    Saved per adapter, in the original basis:

        s2ft_delta   Parameter, fp32 by default: (N, R) for dim="in", (R, K) for dim="out"
        s2ft_index   int32 (R,), the trained channels
        s2ft_dim     int32 (), the axis of the weight they lie on: 1 for "in", 0 for "out"
        s2ft_fingerprint  int64 (R,), of W0 there: an adapter is refused on another base. Zeros, for
                     "not known", where the weight is not dense and floating

    All but s2ft_dim have an axis of experts in front where the weight is (E, N, K).

    found: `structure` and `member`, where the weight sits in the coupling table. If nowhere, input
    channels are trained.
    """

    # (E,) of experts, () of a single matrix
    num_experts: tuple[int, ...] = ()
    in_features: int
    out_features: int

    s2ft_delta: nn.ParameterDict
    s2ft_index: KeptBuffers
    s2ft_fingerprint: KeptBuffers
    delta_name, index_name = "s2ft_delta", "s2ft_index"
    fingerprint_name = "s2ft_fingerprint"
    adapter_layer_names = ("s2ft_delta",)
    other_param_names = (
        *("s2ft_index", "s2ft_dim", "s2ft_fingerprint"),
        *("modes", "layouts", "fuse", "positions"),
    )

    def __init__(self, keeper: WeightKeeper, name: str, found: Found) -> None:
        super().__init__(keeper, name)
        self.structure: Structure | None = None
        self.member: Member | None = None
        self.dim = "in"
        if found is not None:
            self.structure, self.member = found
            self.dim = self.member.dim
        self.s2ft_dim = KeptBuffers()
        self.layouts: dict[str, str] = {}
        self.fuse: dict[str, bool] = {}  # whether it may be computed together with others
        # where the channels of each adapter lie in the present basis
        self.positions: dict[str, Index] = {}

    @torch.inference_mode(False)  # or they could never be trained
    def update_layer(
        self, adapter_name: str, index: Tensor, mode: str, layout: str, fuse: bool
    ) -> None:
        """Add an adapter that trains the channels `index`, int32 (R,) or (E, R), in the original
        basis. Raises ValueError as `check_mode` does.
        """
        self.check_mode(mode)
        home = home_of(self.weight)
        with with_values():
            num = self._check_index("index", index)
            self.s2ft_dim[adapter_name] = torch.tensor(self.axis, dtype=torch.int32, device=home)
        shape = (self.out_features, num) if self.dim == "in" else (num, self.in_features)
        self.layouts[adapter_name], self.fuse[adapter_name] = layout, fuse
        self.add(adapter_name, mode, (*self.num_experts, *shape), index)

    @property
    def axis(self) -> int:
        """The axis of the weight on which the trained channels lie."""
        return 1 if self.dim == "in" else 0

    @property
    def num_channels(self) -> int:
        """Channels on that axis, trained or not."""
        return self.in_features if self.dim == "in" else self.out_features

    @torch.inference_mode(False)  # autograd saves positions, which it would not of such a tensor
    def place(self, adapter: str) -> None:
        """Look up, for the present basis, where the channels of the adapter lie.

        Raises ValueError for an index or a dim that does not fit the layer.
        """
        index, dim = self.s2ft_index[adapter], int(self.s2ft_dim[adapter])
        self._check_index(f"s2ft_index of adapter {adapter!r}", index)
        if dim != self.axis:
            raise ValueError(
                f"s2ft_dim of adapter {adapter!r} must be {self.axis}, that of {self.dim}put "
                f"channels, got {dim}"
            )
        working = self.working(index)
        if working.is_inference():
            working = working.clone()
        here = working.cpu()
        start = int(here.flatten()[0])
        stop = start + here.shape[-1]
        run = torch.arange(start, stop, dtype=torch.int32, device="cpu")
        is_run = bool((here == run).all())  # the same one in every expert
        self.positions[adapter] = slice(start, stop) if is_run else beside(working, self.weight)

    def working(self, index: Tensor) -> Tensor:
        """Where the channels lie in the weight as it is."""
        return arrangement_of(self.keeper).to_working(self, index)

    def _check_index(self, name: str, index: Tensor) -> int:
        name = f"{self.name}: {name}"
        if tuple(index.shape[:-1]) != self.num_experts:
            raise ValueError(
                f"{name} must have shape {(*self.num_experts, 'R')}, got {tuple(index.shape)}"
            )
        return check_positions(name, index, self.num_channels)

    def take(self, adapter: str) -> Held:
        where = self.positions[adapter]
        base = copy_of_channels(self.matrix_of(self.weight).data, where, self.dim)
        return Held(adapter, self.weight, where, base, self.s2ft_delta[adapter])

    def matrix_of(self, weight: Tensor) -> Tensor:
        """The weight as (N, K), or of experts (E, N, K), a view of it."""
        return weight

    def active_slices(self) -> list[tuple[Tensor, Index]]:
        """(delta, positions) of each active adapter."""
        return [(self.s2ft_delta[name], self.positions[name]) for name in self.active()]

    def premises(self, adapter: str | None) -> Premises:
        """What `prepare` takes for granted; see `note`. Nothing under torch.compile."""
        premises = Premises()
        if not torch.compiler.is_compiling():
            self.note(premises, adapter)
        return premises

    def note(self, premises: Premises, adapter: str | None) -> None:
        super().note(premises, adapter)
        for name in self.active():
            premises.same_tensor(self.s2ft_delta, name)
            premises.same_tensor(self.s2ft_index, name)

    def fingerprint_of(self, base: Tensor) -> Tensor:
        return fingerprint(base, self.dim)

    def check_fingerprint(self, expected: Tensor, base: Tensor) -> None:
        check_fingerprint(self.name, expected, base, self.dim)

    def unknown_fingerprint(self, adapter: str) -> Tensor:
        return torch.zeros_like(self.s2ft_index[adapter], dtype=torch.int64)

    def slice_of(self, adapter_name: str) -> Slice:
        """The adapter's part of this layer, in the original basis."""
        index, fingerprint = self.s2ft_index[adapter_name], self.s2ft_fingerprint[adapter_name]
        return Slice(self.dim, index, self.s2ft_delta[adapter_name].detach(), fingerprint)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        with with_values():
            self.locate()
        return self

    def extra_repr(self) -> str:
        sizes = {name: index.shape[-1] for name, index in self.s2ft_index.items()}
        return f"dim={self.dim!r}, channels={sizes}"
