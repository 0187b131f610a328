"""The tuner: which layers are replaced, which of their channels are trained, and the life cycle."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn

from s2kernels.coupling import TABLE, Structure, Unit, channels_of_heads, structures
from s2kernels.peft.base_weights import BaseWeights
from s2kernels.peft.config import S2FTConfig
from s2kernels.peft.layer import S2FTLinear
from s2kernels.select import budget, random_units

BLOCK = 64  # channels in a run of layout="block": whole tiles of the kernels, whole NF4 groups


class S2FTModel(BaseTuner):
    """S2FT adapters in a transformers model; made by `get_peft_model` and its kin."""

    prefix: str = "s2ft_"
    tuner_layer_cls = S2FTLinear
    target_module_mapping = {model_type: ["o_proj", "down_proj"] for model_type in TABLE}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter. If anything fails, the model is as it was before.

        Raises ValueError for a model type that the coupling table lacks (layout="gather" does
        without it), a budget or a layout that the model does not admit; TypeError for a target
        that is not a linear layer.
        """
        config: Any = self.peft_config[adapter_name]
        try:
            found = structures(model)
        except ValueError:
            if config.layout != "gather":
                raise
            found = {}
        existing = [module for module in model.modules() if isinstance(module, S2FTLinear)]
        self.base_weights = existing[0].base_weights if existing else BaseWeights(model)
        self.base_weights.release()
        self.base_weights.inspect()
        self.base_weights.structures = found

        children = [(module, dict(module._modules)) for module in model.modules()]
        trainable = [(value, value.requires_grad) for value in model.parameters()]
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._attach(found)
        except BaseException:
            self.base_weights.detach()
            for module, modules in children:
                module._modules.clear()
                module._modules.update(modules)
            for layer in existing:
                layer.delete_adapter(adapter_name)
            for value, requires_grad in trainable:
                value.requires_grad_(requires_grad)
            if existing:
                self._attach(found)
            raise

    def _attach(self, found: dict[str, Structure]) -> None:
        layers = [module for module in self.model.modules() if isinstance(module, S2FTLinear)]
        self.base_weights.attach(layers, found)

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
        config: S2FTConfig = peft_config
        base: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not isinstance(base, nn.Linear) and resolve_quantization_backend(base) is None:
            raise TypeError(
                f"target_modules must name linear layers, {current_key} is a {type(base).__name__}"
            )
        structure = self.base_weights.structures.get(current_key.rpartition(".")[0])
        if structure is None:
            if config.layout != "gather":
                raise ValueError(
                    f"{current_key} is not in the coupling table, layout={config.layout!r} needs "
                    "that; layout='gather' trains input channels of any linear layer"
                )
            dim: str = "in"
            unit: Unit | None = None
            count = budget(config.channels, base.in_features, "channels")
            index = random_units(config.seed, current_key, base.in_features, count)
        else:
            role = structure.role(target_name)
            dim, unit = role.dim, role.unit
            index = _select(config, structure, role.unit)

        if isinstance(target, S2FTLinear):
            target.update_layer(adapter_name, index, config.mode, config.layout)
            return
        name = None if structure is None else structure.name
        layer = S2FTLinear(base, self.base_weights, dim, name, unit)
        layer.update_layer(adapter_name, index, config.mode, config.layout)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """A mixed batch: `adapter_names` names the adapter of each row, "__base__" for none."""
        names = kwargs.get("adapter_names")
        if names is not None:
            if self.training:
                raise ValueError("adapter_names is for inference: call model.eval() first")
            unknown = set(names) - set(self.peft_config) - {"__base__"}
            if unknown:
                raise ValueError(
                    f"adapter_names must be among {sorted(self.peft_config)} or '__base__', got "
                    f"{sorted(unknown)}"
                )
            names = [name for name in names for _ in range(kwargs.get("num_beams") or 1)]
        self.base_weights.adapter_names = names
        try:
            yield
        finally:
            self.base_weights.adapter_names = None

    def disable_adapter_layers(self) -> None:
        self.base_weights.restore(self.base_weights.layers)
        super().disable_adapter_layers()

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            self._check_merge(safe_merge, adapter_names)
        self.base_weights.detach()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Every layer is looked at before the first one is changed."""
        for layer in self.base_weights.layers:
            layer.check_merge(safe_merge, adapter_names)


def _select(config: S2FTConfig, structure: Structure, unit: Unit) -> Tensor:
    """The channels that an adapter trains where `unit` lies along the slice, int32 (R,).

    The selection is a function of (seed, name of the structure): see `random_units`.
    """
    total = structure.count(structure.unit)
    if structure.kind == "ffn":
        block = BLOCK if config.layout == "block" else 1
        count = budget(config.channels, total, "channels", block)
        return random_units(config.seed, structure.name, total, count, block)
    count = budget(config.heads, total, "heads")
    heads = random_units(config.seed, structure.name, total, count)
    if unit == "kv_head":
        heads = torch.unique(heads // (structure.num_heads // structure.num_kv_heads))
    return channels_of_heads(heads, structure.head_dim)
