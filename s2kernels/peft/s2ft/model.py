"""The tuner: which layers are replaced, which of their channels are trained, mixed batches."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper, resolve_quantization_backend
from torch import Tensor, nn

from s2kernels.adapter import combine
from s2kernels.architectures import TABLE, in_projections
from s2kernels.coupling import find, is_conv1d, structures
from s2kernels.peft.host.model import AdapterModel
from s2kernels.peft.host.sharding import num_shards
from s2kernels.peft.host.targets import plain_name
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.s2ft.arranged_weights import ArrangedWeights, arrangement_of
from s2kernels.peft.s2ft.config import S2FTConfig
from s2kernels.peft.s2ft.experts import S2FTExperts, tensors_to_train
from s2kernels.peft.s2ft.fused_mlp import FusedMLP, fuse_mlp
from s2kernels.peft.s2ft.layer import S2FTLayer, slice_writer
from s2kernels.peft.s2ft.linear import S2FTLinear
from s2kernels.peft.s2ft.mixed import Rows, hook_whole_modules
from s2kernels.peft.s2ft.parallel import (
    ParallelLinear,
    check_parallel,
    indices_of_parallel,
    receive_all,
)
from s2kernels.peft.s2ft.selection import check_budget_pattern, select_indices, target_index


class S2FTModel(AdapterModel):
    """S2FT adapters in a transformers model; made by `get_peft_model` and its kin."""

    arrangement: ArrangedWeights
    takes_plans = True
    prefix: str = "s2ft_"
    tuner_layer_cls = S2FTLayer
    target_module_mapping = {model_type: in_projections(model_type) for model_type in TABLE}

    def _new_keeper(self, model: nn.Module) -> WeightKeeper:
        return WeightKeeper(model, slice_writer, ArrangedWeights(model))

    def _prepare_adding(self, model: nn.Module, config: Any, saved: dict[str, Any] | None) -> None:
        """Raises ValueError for a model type that the coupling table lacks (layout="gather" does
        without it), a selection that needs calibration data, and no indices.
        """
        if config.indices is not None and not config.indices:
            raise ValueError("indices must name at least one target, got none")
        if num_shards(model) > 1:
            check_parallel(config)
        try:
            found = structures(model)
        except ValueError:
            if config.layout != "gather":
                raise
            found = {}
        self.arrangement = arrangement_of(self.keeper)
        self.arrangement.structures = found

        if config.indices is None and (config.selection, config.scope) != ("random", "layer"):
            if config.selection not in ("random", "weight"):
                raise ValueError(
                    f"selection={config.selection!r} needs calibration data: pass "
                    "select_indices(model, config, batches) in the place of config"
                )
            config.indices = select_indices(model, config, progress=False).indices

        # PEFT looks for modules alone: those of the experts stand in for their tensors
        self._expert_targets = tensors_to_train(config, found, saved)
        if saved is not None:
            saved.update({f"{name}.{self.prefix}experts": None for name in self._expert_targets})

    def _check_added(self, config: Any, adapter_name: str) -> None:
        """Raises ValueError for a budget, or indices, of what is no target."""
        trained = {
            layer.name for layer in self._layers_of(self.model) if adapter_name in layer.modes
        }
        # PEFT shortens many names until they match no other *module*, and tensors are none.
        if tensors_to_train(config, self.arrangement.structures, None) != self._expert_targets:
            config.target_modules = trained
        if config.indices is None:
            check_budget_pattern(config, trained)
        elif lost := sorted(set(config.indices) - trained):
            raise ValueError(
                f"indices names what is not a target of the adapter: {', '.join(lost)}"
            )

    def _attach(self) -> None:
        layers = self._layers_of(self.model)
        why_not = self.keeper.obstacles.of(layers[0].weight) if layers else None
        self.arrangement.plan(layers, why_not)
        writes = any(mode != "additive" for layer in layers for mode in layer.modes.values())
        self._take_charge(layers, writes or self.arrangement.moves(layers))
        for structure in self.arrangement.structures.values():
            if structure.kind == "ffn":
                fuse_mlp(self.keeper, structure)
        # as early as can be: a GEMM may round otherwise elsewhere in memory
        self.arrangement.join_pairs(self.keeper.obstacles)

    def _detach(self) -> None:
        for layer in self.keeper.layers:
            if isinstance(layer, S2FTLinear) and layer.gathered is not None:
                layer.gathered.check_given_back()
        super()._detach()
        self.arrangement.pairs = []
        for module in self.keeper.model.modules():
            if isinstance(vars(module).get("forward"), FusedMLP):
                del module.forward

    def _check_target_module_exists(  # type: ignore[override] # PEFT calls it on the instance
        self, peft_config: Any, key: str
    ) -> Any:
        if plain_name(key) in self._expert_targets:
            return True
        return super()._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        name = plain_name(current_key)
        adapted = self._adapted_experts if name in self._expert_targets else self._adapted_linear
        layer = adapted(target, name, peft_config, adapter_name)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _adapted_linear(
        self, target: nn.Module, name: str, config: S2FTConfig, adapter_name: str
    ) -> nn.Module:
        """What takes the place of a target: the target itself if it was replaced before, or if the
        indices do not name it. Raises TypeError for one that is no linear layer.
        """
        base, known = self._base_of(target, name), self.arrangement.structures
        is_linear = isinstance(base, nn.Linear) or is_conv1d(base)
        if not is_linear and resolve_quantization_backend(base) is None:
            tensors = name in known and known[name].kind == "experts"
            raise TypeError(
                f"target_modules must name linear layers, {name} is a {type(base).__name__}"
                + ("; name its tensors, such as 'experts.down_proj'" if tensors else "")
            )
        if config.indices is not None and name not in config.indices:
            return target
        found, shards = find(known, name), num_shards(self.keeper.model)
        if found is None and config.layout != "gather":
            raise ValueError(
                f"{name} is not in the coupling table, layout={config.layout!r} needs "
                "that; layout='gather' trains input channels of any linear layer"
            )
        kind = ParallelLinear if shards > 1 else S2FTLinear
        layer = target if isinstance(target, S2FTLinear) else kind(base, self.keeper, name, found)
        index = target_index(config, layer, shards)
        layer.update_layer(adapter_name, index, config.mode, config.layout, config.fuse)
        return layer

    def _adapted_experts(
        self, target: nn.Module, name: str, config: S2FTConfig, adapter_name: str
    ) -> nn.Module:
        """See `_adapted_linear`."""
        if num_shards(self.keeper.model) > 1:
            raise ValueError(f"{name}: experts are not trained under tensor parallelism")
        layer = target
        for leaf in self._expert_targets[name]:
            if config.indices is None or f"{name}.{leaf}" in config.indices:
                if not isinstance(layer, S2FTExperts):
                    layer = S2FTExperts(target, self.keeper, self.arrangement.structures[name])
                tensor = layer.tensor(leaf)
                index = target_index(config, tensor)
                tensor.update_layer(adapter_name, index, config.mode, config.layout, config.fuse)
        return layer

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if isinstance(child, S2FTExperts):  # PEFT would move its weight, and it has none
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """A mixed batch: `adapter_names` names the adapter of each row, "__base__" for none."""
        names = kwargs.get("adapter_names")
        if names is not None:
            if self.training:
                raise ValueError("adapter_names is for inference: call model.eval() first")
            if unknown := set(names) - set(self.peft_config) - {"__base__"}:
                raise ValueError(
                    f"adapter_names must be among {sorted(self.peft_config)} or '__base__', got "
                    f"{sorted(unknown)}"
                )
            names = Rows(names, kwargs.get("num_beams") or 1)
        hooks = [] if names is None else hook_whole_modules(self, names)
        try:
            with self.keeper.forwards.mixed(names):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The host's; of a model that is split by tensor parallelism, each process takes its part.
        Raises ValueError for an adapter that is not balanced over the parts.
        """
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        receive_all(model, adapter_name, loaded)
        return loaded

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override] # PEFT names its arguments
        cls, model: nn.Module, config: Any, adapter_name: str, **options: Any
    ) -> dict[str, Tensor]:
        """The host's. One process would draw other channels than the parts of a split model have:
        there they are in the configuration.
        """
        state = super()._get_adapter_state_dict(model, config, adapter_name, **options)
        if drawn := indices_of_parallel(model, adapter_name):
            config.resolved = config.resolved | {"indices": (config.indices, drawn)}
        return state

    @torch.no_grad()
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str
    ) -> None:
        """Add the exact weighted sum of adapters as one of its own, which trains their union.

        Channels that several adapters train get the weighted sum of their deltas; negative weights
        subtract. See `s2kernels.adapter.combine`.

        Raises ValueError for names that are unknown, an adapter_name that exists, weights that do
        not go with the adapters, and adapters with modules_to_save, which are not deltas to be
        summed.
        """
        if num_shards(self.model) > 1:
            raise ValueError(
                "a model that is split by tensor parallelism has parts of its adapters only: save "
                "them, and combine them in a model without a tp_plan"
            )
        if unknown := sorted(set(adapters) - set(self.peft_config)):
            raise ValueError(f"adapters must be among {sorted(self.peft_config)}, got {unknown}")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name {adapter_name!r} exists already")
        for name, module in self.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                if saving := sorted(set(adapters) & set(module.modules_to_save)):
                    raise ValueError(
                        f"adapters must not train modules whole: {name} is in modules_to_save of "
                        f"{', '.join(saving)}"
                    )
        layers = {layer.name: layer for layer in self.keeper.layers}
        parts = [
            {name: layer.slice_of(each) for name, layer in layers.items() if layer.present([each])}
            for each in adapters
        ]
        combined = combine(parts, weights)
        config: Any = copy.copy(self.peft_config[adapters[0]])
        config.indices = {name: part.index.tolist() for name, part in combined.items()}
        config.target_modules = set(combined)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for name, part in combined.items():
            layers[name].s2ft_delta[adapter_name].copy_(part.delta)
