"""What PEFT gets in the place of the experts of a mixture: slices within each expert's channels.

transformers keeps all experts of a layer in two parameters, (E, 2 F, K) and (E, K, F). Each that is
trained is an S2FT layer here, under the parameter's own name; the module that holds the parameters
is wrapped once, and stays as it is.

Where nothing is trained and nothing added, the wrapped module runs, in whatever way it was told to.
Else its forward is the one of `s2kernels.autograd.experts`, which computes the same.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from s2kernels.autograd.experts import Routing, expert_delta, expert_linear, experts_forward
from s2kernels.coupling import Structure
from s2kernels.peft.host.holding import holding, keep_w0_for_backward_of
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.host.written_layer import Held
from s2kernels.peft.s2ft.config import S2FTConfig
from s2kernels.peft.s2ft.layer import PreparedCall, S2FTLayer
from s2kernels.peft.s2ft.selection import is_target


class S2FTExpertTensor(S2FTLayer):
    """A parameter (E, N, K) of `experts`, of which R channels of each expert are trained."""

    def __init__(
        self, experts: nn.Module, keeper: WeightKeeper, structure: Structure, leaf: str
    ) -> None:
        super().__init__(keeper, f"{structure.name}.{leaf}", (structure, structure.role(leaf)))
        # not registered here: it is a module of S2FTExperts, under one name alone
        self._experts, self._leaf = (experts,), leaf
        num_experts, self.out_features, self.in_features = self.weight.shape
        self.num_experts = (num_experts,)

    def check_mode(self, mode: str) -> None:
        """Raises ValueError, too, for a parameter of which no slice can be trained in any mode."""
        if not self.weight.is_floating_point():
            raise ValueError(
                f"{self.name} must be floating to be trained, it is {self.weight.dtype}"
            )
        if reason := self.obstacle():
            raise ValueError(f"{self.name} cannot be trained: {reason}")
        super().check_mode(mode)

    def get_base_layer(self) -> nn.Module:
        return self._experts[0]

    @property
    def weight(self) -> Tensor:
        return self.get_base_layer().get_parameter(self._leaf)

    def obstacle(self) -> str | None:
        spread = getattr(self.get_base_layer(), "_is_expert_parallel", False)
        return "the experts are spread over processes" if spread else None

    def note(self, premises: Premises, adapter: str | None) -> None:
        super().note(premises, adapter)
        premises.same_tensor(self.get_base_layer(), self._leaf)
        for tensor in (self.weight, *(delta for delta, _ in self.active_slices())):
            premises.unmoved(tensor)  # `entries` are views

    def entries(self, held: Held, delta: Tensor | None) -> list[tuple]:
        weight, base, where = held.weight.data, held.base, held.where
        if delta is not None:
            delta = delta.detach()
        if self.dim == "in" and isinstance(where, Tensor):
            return [
                (weight[e], base[e], None if delta is None else delta[e], where[e], self.dim)
                for e in range(len(weight))
            ]
        # all experts at once, in one matrix (E * N, K)
        if self.dim == "out":
            if isinstance(where, slice):
                where = torch.arange(where.start, where.stop, device=weight.device)
            first = torch.arange(len(weight), device=weight.device) * self.out_features
            where = (first.unsqueeze(1) + where).int().flatten()
        size = base.shape[2]
        delta = None if delta is None else delta.view(-1, size)
        return [(weight.view(-1, self.in_features), base.view(-1, size), delta, where, self.dim)]

    def prepare(self) -> PreparedCall:
        written, slices = self.written_adapter(), self.active_slices()
        given = None if written is None else slices.pop(0)
        return PreparedCall(
            *(self.keeper.changes, self.premises(written), {self: written}),
            operands=(given, holding(self.keeper, {self: written})),
            slices=slices,
        )

    def call_now(self) -> PreparedCall:
        """What a forward does now; operands: the slice that is written or None, and its holding."""
        return self.prepare() if torch.compiler.is_compiling() else self.prepared()

    def project(self, x: Tensor, routing: Routing, *, from_tokens: bool) -> Tensor:
        """What the parameter makes of each pair of a token and an expert, with the active adapters:
        (S, N); see `s2kernels.autograd.experts.expert_linear`.
        """
        call = self.call_now()
        written, held = call.operands
        options = {} if written is None else dict(delta=written[0], index=written[1], dim=self.dim)
        options |= dict(from_tokens=from_tokens, holding=held)
        y = expert_linear(x, self.weight, routing, **options)
        for delta, where in call.slices:
            y = expert_delta(y, x, delta, where, self.dim, routing, from_tokens=from_tokens)
        return y

    def bring_up_to_date(self) -> None:
        """The parameter holds what the next forward wants: W0, or one adapter's slice in it.

        Raises ValueError for a mixed batch.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        call, names = self.call_now(), self.keeper.forwards.rows
        if names is not None and not self.disable_adapters and self.present(sorted(set(names))):
            raise ValueError(
                f"adapter_names: {self.name} is a tensor of experts, which a mixed batch cannot "
                "have an adapter of for each row; use set_adapter"
            )
        wanted: dict[Any, str | None] = call.written if names is None else {self: None}
        if not self.keeper.are_ready(wanted):
            with self.keeper.forwards.lock:
                self.keeper.ensure_written(wanted)


class S2FTExperts(nn.Module, BaseTunerLayer):
    """The experts of one mixture, `base_layer`, with an `S2FTExpertTensor` for each parameter that
    an adapter trains, by the parameter's name. Those are tuner layers of their own, so that what
    PEFT does to every tuner layer it does to them.
    """

    adapter_layer_names = ()
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, keeper: WeightKeeper, structure: Structure) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.keeper, self.structure = keeper, structure

    def tensor(self, leaf: str) -> S2FTExpertTensor:
        """The layer of the parameter `leaf`; a new one without adapters where there was none."""
        if leaf not in self._modules:
            layer = S2FTExpertTensor(self.base_layer, self.keeper, self.structure, leaf)
            self.add_module(leaf, layer)
        return self.get_submodule(leaf)  # type: ignore[return-value]

    @property
    def tensors(self) -> list[S2FTExpertTensor]:
        return [layer for layer in self.children() if isinstance(layer, S2FTExpertTensor)]

    @property
    def active_adapter(self) -> str | list[str]:
        """Those of `tensors`, which all have the same; so too `merged_adapters`."""
        return self.tensors[0].active_adapter if self.tensors else []

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override] # an attribute elsewhere
        return self.tensors[0].merged_adapters if self.tensors else []

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y (M, K) of tokens (M, K), their experts (M, T) and the weights of these (M, T)."""
        for layer in self.tensors:
            layer.bring_up_to_date()
        if not self._is_ours(hidden_states):
            y = self.base_layer(hidden_states, top_k_index, top_k_weights)
            for layer in self.tensors:
                keep_w0_for_backward_of(y, layer)
            return y
        return experts_forward(
            self.base_layer,
            *(hidden_states, top_k_index, top_k_weights),
            gate_up=partial(self._project, "gate_up_proj", from_tokens=True),
            down=partial(self._project, "down_proj", from_tokens=False),
        )

    def _is_ours(self, x: Tensor) -> bool:
        """Whether there is something that the wrapped module does not do: gradients of slices that
        are in its parameters, or slices that are not.
        """
        if self.keeper.forwards.rows is not None:
            return False
        calls = [layer.call_now() for layer in self.tensors]
        if any(call.slices for call in calls):
            return True
        written = [call.operands[0] for call in calls if call.operands[0] is not None]
        # x alone is reason enough: dx, too, is to be that of the slices in the parameters now
        return torch.is_grad_enabled() and any(
            x.requires_grad or delta.requires_grad for delta, _ in written
        )

    def _project(self, leaf: str, x: Tensor, routing: Routing, *, from_tokens: bool) -> Tensor:
        if leaf in self._modules:
            return self.tensor(leaf).project(x, routing, from_tokens=from_tokens)
        weight = self.base_layer.get_parameter(leaf)
        return expert_linear(x, weight, routing, from_tokens=from_tokens)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing: `tensors` are merged, each as a layer of its own."""

    def unmerge(self) -> None:
        """Nothing, as in `merge`."""

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What PEFT puts in the place of this. It goes no deeper, to where there is to merge."""
        for layer in self.tensors if merge else []:
            layer.merge(safe_merge, adapter_names)
        return self.base_layer


def tensors_to_train(
    config: S2FTConfig, structures: Mapping[str, Structure], saved: Iterable[str] | None
) -> dict[str, list[str]]:
    """The tensors of experts that an adapter trains, by structure: those of the slices that are
    `saved`, where these names are given, else those that the configuration names.
    """
    found: dict[str, list[str]] = {}
    for name, structure in structures.items():
        for leaf in structure.projections if structure.kind == "experts" else ():
            if saved is None:
                wanted = is_target(config, structure, leaf)
            else:
                wanted = any(key.startswith(f"{name}.{leaf}.s2ft_") for key in saved)
            if wanted:
                found.setdefault(name, []).append(leaf)
    return found
