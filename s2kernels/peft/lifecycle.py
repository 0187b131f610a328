"""The life of adapters, where all methods lead it alike: added, disabled, merged, unloaded."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn


class AdapterLayer(nn.Module, BaseTunerLayer):
    """A frozen base weight with adapters, whose names are the keys of `modes`."""

    modes: dict[str, str]
    name: str

    def check_is_loaded(self) -> None:
        """Raises ValueError for a weight that accelerate keeps elsewhere: it fetches it for the
        forward of the base layer alone. One that is on the meta device without that is loaded
        later.
        """
        if self.weight.is_meta and hasattr(self.get_base_layer(), "_hf_hook"):
            raise ValueError(
                f"{self.name} cannot be trained: accelerate has offloaded its weight (device_map, "
                "cpu_offload, disk_offload); keep the targets on a device"
            )

    def not_inplace(self) -> str | None:
        """Why nothing can be written into the base weight; None if it can."""
        raise NotImplementedError

    def restore(self) -> None:
        """Put back, bit for bit, what an inplace adapter has taken the place of."""
        raise NotImplementedError

    def copy_adapter(self, source: str, adapter_name: str) -> None:
        """Have an adapter of this layer hold what another one, `source`, does.

        The weight must hold W0. Raises ValueError where `source` was trained on another base.
        """
        raise NotImplementedError

    def merged_values(self, adapter_name: str) -> Tensor:
        """What a merge would write into the weight, shaped like delta, before it is rounded."""
        raise NotImplementedError

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
            if not torch.isfinite(self.merged_values(name).to(self.weight.dtype)).all():
                raise ValueError(f"adapter {name!r} gives a merged weight that is not finite")
        return names

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled:
            self.restore()
        super().enable_adapters(enabled)

    def _present(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.modes]


class AdapterModel(BaseTuner):
    """Adapters in a model. Whoever inherits makes `base_weights`, the keeper of what the weights
    hold, in `inject_adapter`.
    """

    tuner_layer_cls: type[AdapterLayer]
    base_weights: Any
    _template: str | None = None  # while an adapter is added: the one that it starts as a copy of

    def _own_config(self, adapter_name: str) -> Any:
        """The adapter's configuration, from now on a copy: what the model makes of it is noted
        there, and the caller's can be used for another model.

        So it is another adapter's only where somebody has taken it out of `peft_config`. The new
        adapter then starts as a copy of that one.
        """
        given = self.peft_config[adapter_name]
        others = (name for name, config in self.peft_config.items() if config is given)
        self._template = next((name for name in others if name != adapter_name), None)
        config = copy.copy(given)
        self.peft_config[adapter_name] = config
        return config

    def _copy_template(self, model: nn.Module, adapter_name: str) -> None:
        """Have the adapter start as a copy, if it is to be one: what it trains whole, too.

        Raises ValueError where the configuration does not name all layers of the other adapter, as
        when that was loaded by the names in a file alone.
        """
        template = self._template
        if template is None:
            return
        layers = [layer for layer in self._layers_of(model) if template in layer.modes]
        if lost := [layer.name for layer in layers if adapter_name not in layer.modes]:
            raise ValueError(
                f"adapter {adapter_name!r} cannot start as a copy of {template!r}, whose "
                f"configuration does not name {', '.join(lost)}"
            )
        for layer in layers:
            layer.copy_adapter(template, adapter_name)
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper) and template in module.modules_to_save:
                state = module.modules_to_save[template].state_dict()
                module.modules_to_save[adapter_name].load_state_dict(state)

    def _check_is_whole(self, model: nn.Module) -> None:
        """Raises ValueError for a model that DeepSpeed has partitioned."""
        if any(hasattr(value, "ds_id") for value in model.parameters()):
            raise ValueError(
                "the parameters are partitioned by DeepSpeed ZeRO-3, which gathers them for the "
                "forward of their own module alone: use FSDP2"
            )

    def _existing_layers(self, model: nn.Module) -> list[Any]:
        """Those that the adapters before have made.

        Raises ValueError where one is merged.
        """
        layers = self._layers_of(model)
        if any(layer.merged for layer in layers):
            raise ValueError("no adapter can be added to merged ones: call unmerge_adapter first")
        return layers

    @contextmanager
    def _adding(self, model: nn.Module, adapter_name: str, existing: list[Any]) -> Iterator[None]:
        """Layers and adapters that are made inside are attached at the end. If anything fails, the
        model is as it was before, with the layers `existing` alone.
        """
        children = [(module, dict(module._modules)) for module in model.modules()]
        trainable = [(value, value.requires_grad) for value in model.parameters()]
        try:
            yield
            self._copy_template(model, adapter_name)
            self._attach()
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
                self._attach()
            raise

    def _attach(self) -> None:
        """Have the keeper take charge of all layers."""
        self.base_weights.attach(self._layers_of(self.model))

    def _layers_of(self, model: nn.Module) -> list[Any]:
        return [module for module in model.modules() if isinstance(module, self.tuner_layer_cls)]

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
        if not merge:
            for layer in self.base_weights.layers:
                layer.unmerge()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Every layer is looked at before the first one is changed."""
        for layer in self.base_weights.layers:
            layer.check_merge(safe_merge, adapter_names)
