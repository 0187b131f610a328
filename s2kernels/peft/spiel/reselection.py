"""SpIEL at work: after every step of the optimizer, what the schedule wants done is done."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from s2kernels import backend
from s2kernels.optim import SM3, AgedAdamW, Support
from s2kernels.peft.host.sharding import is_gathered
from s2kernels.peft.spiel.gradient_window import GradientWindow, agree, close_step
from s2kernels.peft.spiel.layer import SpIELLinear
from s2kernels.peft.spiel.replace import (
    bare_optimizer,
    best_free,
    move_states,
    replacement,
    smallest,
)

# what a window keeps of a layer from one step to the next
WINDOW_FIELDS = ("candidates", "total", "squares")


class SpIELTuner:
    """Drops and grows the trained entries of a SpIEL model while it trains.

        tuner = SpIELTuner(model, optimizer, total_steps)
        for ...:
            loss.backward()          # one or more micro-batches
            optimizer.step()
            tuner.step()
            optimizer.zero_grad()

    As `SpIELConfig` says, after some steps every layer drops the entries of least |delta|, whose
    weights become W0 again, and grows as many: with selection="accumulated_gradient" those of
    largest summed gradient among candidates, with "momentum_approximation" those of largest
    row * col of SM3's statistics. The optimizer's states move with the entries; Adam's averages of
    a grown entry begin at the means of its gradients in the window.

    model: from `get_peft_model`, or wrapped in DistributedDataParallel. optimizer: that of its
    deltas, see `make_optimizer`; one wrapped by accelerate is fine. group: the processes that train
    replicas of the model, by default all there are; every process then selects the same.

    Raises ValueError for a model without the adapter or with sharded deltas, and an optimizer that
    does not hold them; TypeError for one whose states cannot be moved.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        total_steps: int,
        adapter_name: str = "default",
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.adapter_name = adapter_name
        self.layers = layers_of(model, adapter_name)
        config = self.layers[0].keeper.configs[adapter_name]
        self.selection = config.selection
        self.schedule = config.schedule(total_steps)
        self.optimizer: Optimizer = bare_optimizer(optimizer, self.selection)
        if is_gathered(model):
            raise ValueError(
                "the model is sharded by FSDP, and entries cannot be replaced then: train without "
                "SpIELTuner, or on replicas (DistributedDataParallel)"
            )
        known = {p for held in self.optimizer.param_groups for p in held["params"]}
        deltas = {layer.name: layer.spiel_delta[adapter_name] for layer in self.layers}
        if missing := [name for name, delta in deltas.items() if delta not in known]:
            raise ValueError(
                f"optimizer must hold the deltas of all layers, got one without {len(missing)} of "
                f"them, such as that of {missing[0]}"
            )
        self.group: Any = None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1:
            self.group = group or dist.group.WORLD
            if config.accumulation_steps < 2 and self.selection == "accumulated_gradient":
                raise ValueError(
                    "accumulation_steps must be at least 2 for several processes, which agree on "
                    f"candidates after the first step, got {config.accumulation_steps}"
                )
        self.steps = 0
        self.watches: list[GradientWindow] = []
        self._watch()

    @torch.no_grad()
    def step(self) -> None:
        """To be called after every optimizer.step(), while the gradients are still there.

        Raises ValueError where they are gone, or were set to 0.
        """
        naming = [each for each in self.watches if self.group is not None and not each.agreed]
        counting = [each for each in self.watches if self.group is None or each.agreed]
        if counting:
            close_step(counting, self.group)
        if naming:
            agree(naming, self.group)
        self.steps += 1
        if self.schedule.reselects(self.steps):
            self._reselect()
            self.close()
        self._watch()

    def close(self) -> None:
        """Stop watching the gradients; the model stays as it is."""
        self.watches = []
        for layer in self.layers:
            layer.observers.pop(self.adapter_name, None)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes up between two steps, as accelerate's
        `register_for_checkpointing` wants it: the steps done, the selection and, by the names of
        layers, what `GradientWindow` has counted: "window", the steps, and "tensors", such as
        NAME.total. The entries are in the adapter, their states in that of the optimizer.
        """
        named = [watch for watch in self.watches if watch.candidates is not None]
        tensors = {
            f"{watch.layer.name}.{field}": value
            for watch in named
            for field in WINDOW_FIELDS
            if (value := getattr(watch, field)) is not None
        }
        window = {watch.layer.name: watch.steps for watch in named}
        return dict(steps=self.steps, selection=self.selection, window=window, tensors=tensors)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there. The adapter must have been loaded before.

        Raises ValueError, before anything changes, for a state that is not complete, or that of
        another model or selection.
        """
        fields = (("steps", int), ("selection", str), ("window", dict), ("tensors", dict))
        for name, kind in fields:
            if not isinstance(state, dict) or not isinstance(state.get(name), kind):
                raise ValueError(f"the state is not that of a SpIELTuner: it has no {name}")
        window, tensors = state["window"], state["tensors"]
        if not all(isinstance(steps, int) for steps in window.values()):
            raise ValueError(f"the state's window must count steps, got {window!r:.100}")
        if state["selection"] != self.selection:
            raise ValueError(
                f"the state is of selection={state['selection']!r}, the tuner's is "
                f"{self.selection!r}"
            )
        sizes = {layer.name: len(layer.spiel_index[self.adapter_name]) for layer in self.layers}
        for key, value in tensors.items():
            name, _, field = key.rpartition(".")
            if field not in WINDOW_FIELDS or len(value) != sizes.get(name):
                raise ValueError(
                    f"the state does not go with the model: {key} has {len(value)} entries, "
                    f"the layer {sizes.get(name)}"
                )
        if lost := sorted(name for name in window if f"{name}.candidates" not in tensors):
            raise ValueError(f"the state has no {lost[0]}.candidates")
        self.resume(state["steps"], window, tensors)

    def resume(self, steps: int, window: dict[str, int], tensors: dict[str, Tensor]) -> None:
        """Go on after so many steps; window and tensors as in `state_dict`."""
        self.close()
        self.steps = steps
        self._watch()
        for watch in self.watches:
            name = watch.layer.name
            if name in window:
                for field in WINDOW_FIELDS:
                    if (value := tensors.get(f"{name}.{field}")) is not None:
                        setattr(watch, field, value.to(watch.delta.device))
                watch.steps, watch.agreed = window[name], True

    def _watch(self) -> None:
        """Open a window where the next step needs one."""
        by_gradient = self.selection == "accumulated_gradient"
        if by_gradient and not self.watches and self.schedule.watches(self.steps + 1):
            for layer in self.layers:
                watch = GradientWindow(layer, self.adapter_name)
                layer.observers[self.adapter_name] = watch.observe
                self.watches.append(watch)

    def _reselect(self) -> None:
        self.layers[0].keeper.restore(self.layers)
        for watch in self.watches:
            self._grow_by_gradient(watch)
        if self.selection == "momentum_approximation":
            for layer in self.layers:
                self._grow_by_momentum(layer)

    def _grow_by_gradient(self, watch: GradientWindow) -> None:
        layer, delta, index = watch.layer, watch.delta, watch.layer.spiel_index[self.adapter_name]
        num = self.schedule.count(self.steps, len(index))
        if num == 0 or watch.candidates is None or watch.total is None or watch.squares is None:
            return  # the layer has seen no gradient
        dropped = smallest(delta, num)
        chosen = best_free(watch.candidates, watch.total.abs(), index[~dropped], num)
        replaced = replacement(index, dropped, chosen)
        where = torch.searchsorted(watch.candidates, replaced.grown)
        mean, mean_square = watch.total[where] / watch.steps, watch.squares[where] / watch.steps
        move_states(self.optimizer, delta, replaced, (mean, mean_square, watch.steps))
        layer.replace(self.adapter_name, replaced)

    def _grow_by_momentum(self, layer: SpIELLinear) -> None:
        delta, index = layer.spiel_delta[self.adapter_name], layer.spiel_index[self.adapter_name]
        state = self.optimizer.state.get(delta, {})
        free = layer.in_features * layer.out_features - len(index)
        num = min(self.schedule.count(self.steps, len(index)), free)
        if num == 0 or not state:
            return
        if "row" not in state:
            raise TypeError(
                f"SM3 does not know the weight of {layer.name}: make it by make_optimizer(model), "
                "or with supports=support_of(model)"
            )
        chosen = backend.select(delta).sm3_growth(state["row"], state["col"], index, num)
        replaced = replacement(index, smallest(delta, num), chosen)
        move_states(self.optimizer, delta, replaced)
        layer.replace(self.adapter_name, replaced)


def make_optimizer(
    model: nn.Module, lr: float, adapter_name: str = "default", **options: Any
) -> Optimizer:
    """The optimizer that goes with the adapter's selection, over all that is trained in the model.

    `AgedAdamW` for selection="accumulated_gradient", `SM3` for "momentum_approximation"; options
    are theirs. For a Trainer: `Trainer(..., optimizers=(make_optimizer(model, lr), None))`.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    config = layers_of(model, adapter_name)[0].keeper.configs[adapter_name]
    if config.selection == "accumulated_gradient":
        return AgedAdamW(params, lr=lr, **options)
    return SM3(params, lr=lr, supports=support_of(model), **options)


def support_of(model: nn.Module) -> Callable[[Tensor], Support | None]:
    """What SM3 asks of a parameter: for a delta, the shape of its weight and its present index.

    It is copied along with model and optimizer: `copy.deepcopy((model, optimizer))`.
    """
    return _Supports([module for module in model.modules() if isinstance(module, SpIELLinear)])


class _Supports:
    """The deltas of some layers as they are in the first step: FSDP2 and a copy have others."""

    def __init__(self, layers: list[SpIELLinear]) -> None:
        self.layers = layers
        self._owners: dict[Tensor, tuple[SpIELLinear, str]] = {}

    def __getstate__(self) -> dict:
        return {"layers": self.layers, "_owners": {}}

    def __call__(self, parameter: Tensor) -> Support | None:
        if not self._owners:
            self._owners = {
                p: (layer, name) for layer in self.layers for name, p in layer.spiel_delta.items()
            }
        if parameter not in self._owners:
            return None
        layer, name = self._owners[parameter]
        return layer.shape, layer.spiel_index[name]


def layers_of(model: nn.Module, adapter_name: str) -> list[SpIELLinear]:
    """The model's layers with that adapter, in the order of its modules.

    Raises ValueError where there is none.
    """
    found = (module for module in model.modules() if isinstance(module, SpIELLinear))
    layers = [layer for layer in found if adapter_name in layer.modes]
    if not layers:
        raise ValueError(f"the model has no SpIEL adapter named {adapter_name!r}")
    return layers
