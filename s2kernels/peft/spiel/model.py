"""SpIEL in PEFT: which layers are replaced, and the entries they start with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import Tensor, nn

from s2kernels.peft.host.kept_buffers import with_values
from s2kernels.peft.host.model import AdapterModel
from s2kernels.peft.host.targets import plain_name
from s2kernels.peft.host.weights import WeightKeeper
from s2kernels.peft.spiel.config import SpIELConfig
from s2kernels.peft.spiel.dequantize import is_quantized
from s2kernels.peft.spiel.layer import SpIELLinear, sparse_writer
from s2kernels.plan import index_dtype
from s2kernels.select import seeded_generator

# what DistributedDataParallel asks a model for
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"


class SpIELModel(AdapterModel):
    """SpIEL adapters in a model; made by `get_peft_model` and its kin."""

    prefix: str = "spiel_"
    tuner_layer_cls = SpIELLinear
    target_module_mapping: dict = {}  # the default is all linear layers of any model

    def _new_keeper(self, model: nn.Module) -> WeightKeeper:
        return WeightKeeper(model, sparse_writer)

    # how many entries each target trains, while an adapter is added; None until that is decided
    _counts: dict[str, int] | None

    def _prepare_adding(self, model: nn.Module, config: Any, saved: dict[str, Any] | None) -> None:
        self._counts = None
        if saved is not None:  # which decides what the targets are
            end = ".spiel_index"
            found = {name: index for name, index in saved.items() if name.endswith(end)}
            self._counts = {name.removesuffix(end): len(index) for name, index in found.items()}

    def _attach(self) -> None:
        super()._attach()
        # DDP would copy the indices of process 0 to the others in every forward: a change, as after
        # loading, for nothing
        model = self.keeper.model
        names = [name for name, _ in model.named_buffers() if ".spiel_" in name]
        names += [f"base_model.model.{name}" for name in names]
        setattr(model, _DDP_IGNORES, [*getattr(model, _DDP_IGNORES, []), *names])

    def _detach(self) -> None:
        super()._detach()
        model = self.keeper.model
        ignored = vars(model).pop(_DDP_IGNORES, [])
        if left := [name for name in ignored if ".spiel_" not in name]:
            setattr(model, _DDP_IGNORES, left)

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
        config: SpIELConfig = peft_config
        current_key = plain_name(current_key)
        base = self._base_of(target, current_key)
        shape = base.out_features, base.in_features
        if self._counts is None:  # PEFT has shortened the names, and replaced nothing yet
            self._counts = self._budgets(config)
        if current_key not in self._counts:
            raise ValueError(f"the state_dict has no {current_key}.spiel_index")
        with with_values():
            index = random_entries(config.seed, current_key, shape, self._counts[current_key])
        dtype = None if config.delta_dtype is None else getattr(torch, config.delta_dtype)
        layer = target
        if not isinstance(layer, SpIELLinear):
            layer = SpIELLinear(base, self.keeper, current_key)
        layer.update_layer(adapter_name, index, config.mode, dtype)
        if layer is not target:
            if adapter_name not in self.active_adapters:
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _base_of(self, target: nn.Module, name: str) -> Any:
        """Raises TypeError, too, for a target that is no linear layer."""
        base = super()._base_of(target, name)
        if type(base) is not nn.Linear and not (isinstance(base, nn.Linear) and is_quantized(base)):
            raise TypeError(
                f"target_modules must name torch.nn.Linear layers, or those that bitsandbytes or "
                f"torchao has quantized; {name} is a {type(base).__name__}"
            )
        return base

    def _budgets(self, config: SpIELConfig) -> dict[str, int]:
        """How many entries each target trains, by its plain name.

        The budget, which is noted in config.num_tunable_weights, is split in proportion to the
        targets' entries and rounded down, but to 1 at least. Raises ValueError for one above what
        the targets have, and as `_base_of` does.
        """
        modules = dict(self.keeper.model.named_modules())
        layers = [name for name, module in modules.items() if isinstance(module, BaseTunerLayer)]
        inside = tuple(f"{name}." for name in layers)
        sizes: dict[str, int] = {}
        for raw, module in modules.items():
            name = plain_name(raw)
            if name and not raw.startswith(inside) and check_target_module_exists(config, name):
                base = self._base_of(module, name)
                sizes[name] = base.out_features * base.in_features
        total = sum(sizes.values())
        if config.num_tunable_weights is None:
            config.num_tunable_weights = int(config.density * num_parameters(self.keeper.model))
        num = config.num_tunable_weights
        if num > total:
            raise ValueError(
                f"the budget must not exceed the {total} entries of the targets, got {num} "
                f"(density={config.density})"
            )
        return {name: max(1, num * size // total) for name, size in sizes.items()}

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The deltas have the dtype that the configuration says."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names, an adapter for each row of a batch, does not go with SpIEL"
            )
        yield


def num_parameters(model: nn.Module) -> int:
    """Of the base model without its adapters, shared ones once; those of a quantized layer as many
    as it stands for.
    """
    packed = {
        module.weight: module.out_features * module.in_features
        for module in model.modules()
        if isinstance(module, nn.Linear) and is_quantized(module)
    }
    return sum(
        packed.get(parameter) or parameter.numel()
        for name, parameter in model.named_parameters()
        if "spiel_" not in name and ".modules_to_save." not in name
    )


def random_entries(seed: int, name: str, shape: tuple[int, int], num: int) -> Tensor:
    """num positions of a weight (N, K) at random, ascending, of `index_dtype`, on CPU.

    The answer follows from the arguments alone. Memory is O(num).
    """
    size = shape[0] * shape[1]
    generator = seeded_generator(seed, name)
    # the lesser of the entries and the others: drawn until there are as many different ones
    wanted = min(num, size - num)
    drawn = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(drawn) < wanted:
        more = torch.randint(size, (wanted - len(drawn),), generator=generator, device="cpu")
        drawn = torch.cat([drawn, more]).unique()
    if wanted < num:
        others = torch.ones(size, dtype=torch.bool, device="cpu")
        others[drawn] = False
        drawn = others.nonzero().squeeze(1)
    return drawn.to(index_dtype(shape))
