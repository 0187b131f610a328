"""The trained entries of a layer, per adapter: made, loaded, replaced, and told from others'."""

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from s2kernels.adapter import fingerprint
from s2kernels.autograd.sparse import Observer, check_entries
from s2kernels.coupling import not_plain
from s2kernels.peft.lifecycle import AdapterLayer
from s2kernels.peft.loaded import Sources, changed, sources
from s2kernels.peft.spiel.dequantize import check_order
from s2kernels.peft.spiel.replace import Replacement
from s2kernels.peft.spiel.weights import Entries
from s2kernels.plan import TilePlan, rows_and_columns

if TYPE_CHECKING:
    from s2kernels.peft.spiel.weights import EntryWeights


class EntryLayer(AdapterLayer):
    """A frozen linear layer, weight (N, K), with k trained entries per adapter.

    Saved per adapter:

        spiel_delta        Parameter (k,), fp32 by default
        spiel_index        (k,) positions row * K + column, ascending: see `index_dtype`
        spiel_fingerprint  int64 (1,), of W0 there: an adapter is refused on another base. 0, for
                           "not known", where the weight is quantized

    `name` is that of the layer in the model.
    """

    adapter_layer_names = ("spiel_delta",)
    other_param_names = (
        *("spiel_index", "spiel_fingerprint", "modes", "observers"),
        *("_plans", "_renew", "_seen"),
    )

    def __init__(self, base_layer: nn.Module, weights: "EntryWeights", name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.weights, self.name = weights, name
        linear_layer: Any = base_layer
        self.in_features: int = linear_layer.in_features
        self.out_features: int = linear_layer.out_features
        self.spiel_delta = nn.ParameterDict()
        self.spiel_index = BufferDict({}, persistent=True)
        self.spiel_fingerprint = BufferDict({}, persistent=True)
        self.modes: dict[str, str] = {}
        self.observers: dict[str, Observer] = {}
        self._plans: dict[str, TilePlan] = {}
        # adapters whose fingerprint is 0 until somebody asks for the state_dict
        self._renew: dict[str, bool] = {}
        # the buffers that were looked at, and their versions: loading replaces them
        self._seen: dict[str, Sources] = {}
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self._merged_entries: list[Entries] = []
        # the adapter whose entries are in the weight (inplace), what they took the place of, and
        # where: weight and spiel_index may have been assigned anew since
        self.written: str | None = None
        self.displaced: Entries | None = None
        self.register_load_state_dict_post_hook(_after_load)

    @torch.inference_mode(False)  # or they could never be trained
    def update_layer(
        self, adapter_name: str, index: Tensor, mode: str, dtype: torch.dtype | None
    ) -> None:
        """Add an adapter that trains the entries at `index` (k,), sorted, deltas in dtype.

        Raises ValueError for an offloaded weight, for mode="inplace" where the base layer does not
        admit it, and for a 4-bit weight that bitsandbytes has rearranged.
        """
        self.check_is_loaded()
        check_order(self.get_base_layer())
        if mode == "inplace" and (reason := self.not_inplace()):
            raise ValueError(f"mode='inplace' needs a plain dense weight: {reason}")
        weight = self.weight
        num = check_entries("index", index, self.shape)
        if dtype is None:
            dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        # On the meta device PEFT loads the tensors afterwards; then they are only declared here.
        self.spiel_delta[adapter_name] = nn.Parameter(
            torch.zeros(num, dtype=dtype, device=weight.device)
        )
        self.spiel_index[adapter_name] = index.to(weight.device)
        self.modes[adapter_name] = mode
        self.spiel_fingerprint[adapter_name] = self._fingerprint(adapter_name)
        self._seen[adapter_name] = self._sources(adapter_name)

    @torch.inference_mode(False)
    def copy_adapter(self, source: str, adapter_name: str) -> None:
        self.refresh()
        requires_grad = self.spiel_delta[adapter_name].requires_grad
        delta = self.spiel_delta[source].detach().clone()
        self.spiel_delta[adapter_name] = nn.Parameter(delta, requires_grad=requires_grad)
        self.spiel_index[adapter_name] = self.spiel_index[source].clone()
        known = self.spiel_fingerprint[source]  # of the dense base, where this one is quantized
        self.spiel_fingerprint[adapter_name] = (
            known.clone() if known.any() else self._fingerprint(adapter_name)
        )
        self._seen[adapter_name] = self._sources(adapter_name)

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight, which a quantized one does not have."""
        return self.out_features, self.in_features

    def not_inplace(self) -> str | None:
        """Why no entries can be written into the base weight; None if they can."""
        base, weight = self.get_base_layer(), self.weight
        if type(base) is not nn.Linear:
            return f"the base layer is a {type(base).__name__}"
        if reason := not_plain(weight):
            return reason
        if not weight.is_contiguous():
            return f"the weight is not contiguous, its stride is {weight.stride()}"
        return self.weights.not_inplace(weight)

    @torch.inference_mode(False)
    def refresh(self, loaded: bool = False) -> None:
        """Take note of adapters that were loaded since the last time.

        loaded: the base may have been loaded, too. Adapters that did not come along are from then
        on those of the new base.

        Raises ValueError for one that does not fit the layer, or was trained on another base.
        """
        if torch.compiler.is_compiling():
            return
        found = changed(self.spiel_index, self.spiel_fingerprint, self._seen, loaded)
        if not found:
            return
        self.restore()
        for name, is_own in found.items():
            index = self.spiel_index[name]
            if index.is_meta:
                continue
            num = check_entries(f"{self.name}: spiel_index of adapter {name!r}", index, self.shape)
            if num != len(self.spiel_delta[name]):
                raise ValueError(
                    f"{self.name}: spiel_index of adapter {name!r} must have the "
                    f"{len(self.spiel_delta[name])} entries of spiel_delta, got {num}"
                )
            self._plans.pop(name, None)
            expected = self.spiel_fingerprint[name]
            if is_own or not expected.any():  # the fingerprint did not come along
                self.spiel_fingerprint[name] = torch.zeros_like(expected)
                self._renew[name] = True
            elif not self.merged and not_plain(self.weight) is None:
                self._renew.pop(name, None)
                if not torch.equal(self._fingerprint(name), expected):
                    raise ValueError(
                        f"{self.name}: the adapter was trained on another base: what the weight "
                        f"holds at its {num} trained entries is not as it was; load the base that "
                        "it was trained on"
                    )
            self._seen[name] = self._sources(name)

    @torch.inference_mode(False)
    def renew_fingerprints(self) -> None:
        """Make the fingerprints those of the present indices; the weight must hold W0."""
        if self.merged:
            return
        for name in list(self._renew):
            self.spiel_fingerprint[name] = self._fingerprint(name)
            del self._renew[name]
            self._seen[name] = self._sources(name)

    def _sources(self, name: str) -> Sources:
        return sources(self.spiel_index[name], self.spiel_fingerprint[name])

    def _fingerprint(self, name: str) -> Tensor:
        index = self.spiel_index[name]
        if not_plain(self.weight) or index.is_meta:
            return torch.zeros(1, dtype=torch.int64, device=index.device)
        return fingerprint(self.take_base_entries(name)[None], "out").to(index.device)

    def take_base_entries(self, adapter_name: str) -> Tensor:
        """A copy of what the weight holds at the adapter's entries, (k,)."""
        return self.weight.data[rows_and_columns(self.spiel_index[adapter_name], self.in_features)]

    def merged_values(self, adapter_name: str) -> Tensor:
        return self.take_base_entries(adapter_name) + self.spiel_delta[adapter_name].detach()

    def is_moved(self) -> bool:
        """Whether the entries are written in a weight that is not the layer's any more."""
        return self.displaced is not None and self.displaced[0] is not self.weight

    def restore(self) -> None:
        """Put back, bit for bit, what an inplace adapter has taken the place of."""
        if self.written is not None:
            self.weights.restore([self])

    @torch.no_grad()
    def replace(self, adapter_name: str, replaced: Replacement) -> None:
        """Train other entries from now on: the delta of grown ones is 0, gradients move along.

        The weight must hold W0. States of an optimizer are the caller's.
        """
        delta = self.spiel_delta[adapter_name]
        replaced.apply_(delta)
        if delta.grad is not None:
            replaced.apply_(delta.grad)
        self.spiel_index[adapter_name].copy_(replaced.index)
        check_entries(f"{self.name}: index", self.spiel_index[adapter_name], self.shape)
        self._plans.pop(adapter_name, None)
        self.spiel_fingerprint[adapter_name] = torch.zeros(
            1, dtype=torch.int64, device=delta.device
        )
        self._renew[adapter_name] = True
        self._seen[adapter_name] = self._sources(adapter_name)


def _after_load(layer: EntryLayer, incompatible_keys) -> None:
    layer.refresh(loaded=True)
