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

    _saved: dict[str, Any] | None
    _counts: dict[str, int]

    def _prepare_adding(self, model: nn.Module, config: Any, saved: dict[str, Any] | None) -> None:
        self._saved, self._counts = saved, {}

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
        ignored = getattr(model, _DDP_IGNORES, [])
        if left := [name for name in ignored if ".spiel_" not in name]:
            setattr(model, _DDP_IGNORES, left)
        elif ignored:
            delattr(model, _DDP_IGNORES)

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
        check_is_linear(current_key, base)
        shape = base.out_features, base.in_features
        with with_values():
            count = self._count(config, current_key)
            index = random_entries(config.seed, current_key, shape, count)
        dtype = None if config.delta_dtype is None else getattr(torch, config.delta_dtype)
        if isinstance(target, SpIELLinear):
            target.update_layer(adapter_name, index, config.mode, dtype)
            return
        layer = SpIELLinear(base, self.keeper, current_key)
        layer.update_layer(adapter_name, index, config.mode, dtype)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _count(self, config: SpIELConfig, name: str) -> int:
        """How many entries the adapter trains of the target: as many as a state_dict says, if that
        decides what the targets are.
        """
        if self._saved is not None:
            index = self._saved.get(f"{name}.spiel_index")
            if index is None:
                raise ValueError(f"the state_dict has no {name}.spiel_index")
            return len(index)
        if not self._counts:  # before PEFT has replaced anything, and after it shortened the names
            self._counts = budgets(self.keeper.model, config)
        return self._counts[name]

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """The deltas have the dtype that the configuration says."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "adapter_names, an adapter for each row of a batch, does not go with SpIEL"
            )
        yield


def budgets(model: nn.Module, config: SpIELConfig) -> dict[str, int]:
    """How many entries each target trains, by its plain name.

    The budget, which is noted in config.num_tunable_weights, is split in proportion to the targets'
    entries and rounded down, but to 1 at least.

    Raises TypeError for a target that is not a linear layer; ValueError for a budget above what the
    targets have.
    """
    layers = [name for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    inside = tuple(f"{name}." for name in layers)
    sizes: dict[str, int] = {}
    for raw, module in model.named_modules():
        name = plain_name(raw)
        if not name or raw.startswith(inside) or not check_target_module_exists(config, name):
            continue
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        check_is_linear(name, base)
        sizes[name] = base.out_features * base.in_features
    total = sum(sizes.values())
    if config.num_tunable_weights is None:
        config.num_tunable_weights = int(config.density * num_parameters(model))
    num = config.num_tunable_weights
    if sizes and num > total:
        raise ValueError(
            f"the budget must not exceed the {total} entries of the targets, got {num} "
            f"(density={config.density})"
        )
    return {name: max(1, num * size // total) for name, size in sizes.items()}


def check_is_linear(name: str, base: nn.Module) -> None:
    """Raises TypeError for a target that is no linear layer."""
    if type(base) is not nn.Linear and not (isinstance(base, nn.Linear) and is_quantized(base)):
        raise TypeError(
            f"target_modules must name torch.nn.Linear layers, or those that bitsandbytes or "
            f"torchao has quantized; {name} is a {type(base).__name__}"
        )


def num_parameters(model: nn.Module) -> int:
    """Of the base model without its adapters, shared ones once; those of a quantized layer as many
    as it stands for.
    """
    counts: dict[int, int] = {}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            packed = key == "weight" and isinstance(module, nn.Linear) and is_quantized(module)
            size = module.out_features * module.in_features if packed else parameter.numel()  # type: ignore[operator]
            if not any(added in f"{name}.{key}" for added in ("spiel_", ".modules_to_save.")):
                counts[id(parameter)] = int(size)  # type: ignore[call-overload]
    return sum(counts.values())


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
