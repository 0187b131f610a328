"""What the tuners of both methods are: how adapters are added to a model, merged and unloaded."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from s2kernels.peft.host.layer import AdapterLayer
from s2kernels.peft.host.loaded_tensors import as_integers, check_tensors
from s2kernels.peft.host.model_hooks import ModelHooks
from s2kernels.peft.host.sharding import check_is_whole
from s2kernels.peft.host.targets import name_all_linear, names_for_peft, plain_name
from s2kernels.peft.host.weights import WeightKeeper


class AdapterModel(BaseTuner):
    """Adapters in a model, whose layers share `keeper`."""

    tuner_layer_cls: type[AdapterLayer]
    takes_plans = False  # whether adapters may lie in weights that a tp_plan has split
    keeper: WeightKeeper
    _template: str | None = None  # while an adapter is added: the one that it starts as a copy of

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        configs = getattr(model, "peft_config", None)  # which PEFT shares with other tuners
        before = dict(configs or {})
        try:
            super().__init__(model, *args, **kwargs)
        except BaseException:
            if configs is not None:
                configs.clear()
                configs.update(before)
            raise

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter. If anything fails, the model is as it was before.

        Its configuration stays the caller's object, with the fields that the caller set: see
        `AdapterConfig`. Where it is another adapter's, too, the new one starts as a copy of that.

        Raises ValueError for what the configuration asks for and the model does not admit, for a
        target that another tuner has, and for weights that are offloaded or sharded; TypeError for
        a target of a wrong kind.
        """
        check_is_whole(model, self.takes_plans)
        given: Any = self.peft_config[adapter_name]
        others = (name for name, config in self.peft_config.items() if config is given)
        self._template = next((name for name in others if name != adapter_name), None)
        config = self.peft_config[adapter_name] = copy.copy(given)
        try:
            existing = self._existing_layers(model)
            self.keeper = existing[0].keeper if existing else self._new_keeper(model)
            self.keeper.release()
            self.keeper.obstacles.look()
            name_all_linear(model, config)
            saved = kwargs.get("state_dict")
            if saved is not None:
                saved = {plain_name(name): value for name, value in saved.items()}
            self._prepare_adding(model, config, saved)
            if saved is not None:
                kwargs["state_dict"] = names_for_peft(model, saved, self.prefix)
            with self._adding(model, adapter_name, existing):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                self._check_added(config, adapter_name)
        finally:
            self.peft_config[adapter_name] = given
        self.keeper.configs[adapter_name] = given
        given.resolved = self.keeper.resolved[adapter_name] = given.differences(config)

    def _new_keeper(self, model: nn.Module) -> WeightKeeper:
        """The keeper of a model that has no layers of this tuner yet."""
        raise NotImplementedError

    def _prepare_adding(self, model: nn.Module, config: Any, saved: dict[str, Any] | None) -> None:
        """What each method does before PEFT looks for targets: by `config`, which is the tuner's
        own for as long as the adapter is added, or the names in `saved`, a state_dict.
        """

    def _check_added(self, config: Any, adapter_name: str) -> None:
        """Raises ValueError for an adapter whose layers are not what its configuration says."""

    def _check_target_module_exists(  # type: ignore[override] # PEFT calls it on the instance
        self, peft_config: Any, key: str
    ) -> Any:
        return super()._check_target_module_exists(peft_config, plain_name(key))

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

    def _existing_layers(self, model: nn.Module) -> list[Any]:
        """Those that the adapters before have made.

        Raises ValueError where they go by other names than in `model`.
        """
        layers = self._layers_of(model)
        if layers and layers[0].keeper.model is not model:
            raise ValueError(
                "the model is inside of a PeftModel with such adapters: add another one by its own "
                "add_adapter(name, config), or call its unload() first"
            )
        return layers

    def _base_of(self, target: nn.Module, name: str) -> Any:
        """The layer whose weight the adapter is for. Raises ValueError for that of another tuner,
        which would be lost.
        """
        if not isinstance(target, BaseTunerLayer):
            return target
        if not isinstance(target, self.tuner_layer_cls):
            raise ValueError(
                f"{name} has an adapter of another method, a {type(target).__module__}."
                f"{type(target).__name__}: name other target_modules, or merge or unload it first"
            )
        return target.get_base_layer()

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
            self._detach()
            self._attach()
        except BaseException:
            self._detach()
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

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        """PEFT's, which moves the layer to the device of the weight. It is there already, and fake
        tensors cannot be moved.
        """
        weight = next(child.parameters(), None)
        if weight is not None and isinstance(weight, FakeTensor):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    # Tensors on their way out and in

    @classmethod
    def _get_adapter_state_dict(  # type: ignore[override] # PEFT names its arguments
        cls, model: nn.Module, config: Any, adapter_name: str, **options: Any
    ) -> dict[str, Tensor]:
        """PEFT's; what is saved of the configuration is then what this very model made of it, and
        what is loaded from now on is not what the configuration came with.
        """
        config.digests = None
        layers = (module for module in model.modules() if isinstance(module, cls.tuner_layer_cls))
        if (layer := next(layers, None)) is not None:
            config.resolved = layer.keeper.resolved.get(adapter_name, {})
        return super()._get_adapter_state_dict(
            model=model, config=config, adapter_name=adapter_name, **options
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Raises ValueError for tensors of the method that the model has no place for, for averages
        of adapters that train different entries, and, where the configuration came from a file with
        digests, for others than those that were saved.
        """
        given = {cls._plain_key(key): value for key, value in state_dict.items()}
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, given)
        check_tensors(cls.prefix, model, config, adapter_name, given, loaded)
        return as_integers(model, loaded)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """PEFT's; and what is saved of our layers is as if the model had not been compiled."""
        return cls._plain_key(super()._remove_adapter_name_from_key(key, adapter_name))

    @classmethod
    def _plain_key(cls, key: str) -> str:
        return plain_name(key) if f".{cls.prefix}" in key else key

    def _attach(self) -> None:
        """Have the keeper take charge of all layers."""
        self._take_charge(self._layers_of(self.model))

    def _take_charge(self, layers: list[Any], writes: bool = True) -> None:
        self.keeper.attach(layers)
        self.keeper.hooks = ModelHooks(self.keeper, self, writes)

    def _detach(self) -> None:
        """Restore the weights; the keeper is in charge of nothing any more."""
        self.keeper.detach()
        if self.keeper.hooks is not None:
            self.keeper.hooks.remove()
            self.keeper.hooks = None

    def _layers_of(self, model: nn.Module) -> list[Any]:
        return [module for module in model.modules() if isinstance(module, self.tuner_layer_cls)]

    def disable_adapter_layers(self) -> None:
        self.keeper.restore()
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
        self._detach()
        if not merge:
            for layer in self.keeper.layers:
                layer.unmerge()
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Every layer is looked at before the first one is changed."""
        self.keeper.release()
        for layer in self.keeper.layers:
            layer.check_merge(safe_merge, adapter_names)
