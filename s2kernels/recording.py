"""Recording work of a GPU as a CUDA graph, and what must not change while it is replayed."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Recording:
    """A CUDA graph and what it returned while it was recorded: tensors that replays write to."""

    def __init__(self, graph: torch.cuda.CUDAGraph, result: Any, kept: list) -> None:
        self.result = result
        self._graph, self._kept = graph, kept

    def replay(self) -> None:
        """Do on the current stream what was recorded, on what lies at the same addresses now."""
        self._graph.replay()


class Recorder:
    """Runs and records on a stream of its own, as CUDA wants it; its graphs share their memory.

    They may, since no two of them run at a time, and what outlasts a replay is held by tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._recordings: weakref.WeakSet[Recording] = weakref.WeakSet()

    def run(self, work: Callable[[], Tensor]) -> Tensor:
        """What `work` returns. It runs where it will be recorded, so that nodes of autograd and
        workspaces of libraries are made for that stream.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return work()
        finally:  # a forward that fails puts W0 back there
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], Tensor]) -> Recording:
        """Record what `work` launches, without doing it. Raises whatever CUDA refuses to record."""
        from s2kernels.kernels.slice_write import keeping_tables

        if not self._recordings:
            # Once its last graph is gone torch takes no more graphs into a pool, unless all of its
            # memory was given back: a gradient that somebody still holds is enough to prevent it.
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        device = self._device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        try:
            with (
                keeping_tables() as tables,
                torch.cuda.device(self._device),
                # "thread_local", lest the thread of a DataLoader that pins memory spoil it
                torch.cuda.graph(
                    graph,
                    pool=self._pool,
                    stream=self._stream,
                    capture_error_mode="thread_local",
                ),
                # A weight that was cast before the recording would never be cast anew.
                torch.autocast(device, dtype, enabled, cache_enabled=False),
            ):
                result = work()
        finally:
            torch.cuda.set_stream(current)  # which torch does not, where the recording failed
        recording = Recording(graph, result, tables)
        self._recordings.add(recording)
        return recording


class Premises:
    """What a recording of a training step takes for granted.

    parts      modules, parameters and buffers are the same ones, and lie where they lay
    moments    and so is what the optimizer keeps of the parameters
    settings   of the optimizer, save the rates, which are tensors themselves
    state      of the adapters: which one is active, and what is written into the base weights
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._modules = list(model.modules())
        self._parts = [
            (parts, name, part)
            for module in self._modules
            for parts in (module._modules, module._parameters, module._buffers)
            for name, part in parts.items()
        ]
        self._tensors = [*model.parameters(), *model.buffers()]
        self._addresses = [x.data_ptr() for x in self._tensors]  # 0 of a quantized one
        self._moments = [(p, dict(kept)) for p, kept in optimizer.state.items()]
        self._settings = list(self._settings_now())
        self._adapters: list[Any] = [m for m in model.modules() if "merged_adapters" in vars(m)]
        # the keepers of the weights that S2FT writes to
        keepers = {id(m.keeper): m.keeper for m in self._adapters if "keeper" in vars(m)}
        self._keepers: list[Any] = list(keepers.values())
        self._held = [dict(keeper.held_by_layer) for keeper in self._keepers]
        self._state = list(self._state_now())

    def hold(self) -> bool:
        """Whether all of it still is as it was."""
        return (
            all(parts.get(name) is part for parts, name, part in self._parts)
            and all(x.data_ptr() == a for x, a in zip(self._tensors, self._addresses, strict=True))
            and self._has_moments()
            and _all_same(self._settings_now(), self._settings)
            and _all_same(self._state_now(), self._state)
        )

    def put_back(self) -> None:
        """Make true again what the keepers say of the weights, after a recording that failed.

        A forward that fails takes the slices out of the weights; but what a recording launches is
        not done, and they are still in there.
        """
        for keeper, held in zip(self._keepers, self._held, strict=True):
            keeper.held_by_layer = held
            keeper.changed()

    def _has_moments(self) -> bool:
        state = self._optimizer.state
        return all(
            p in state and all(state[p].get(name) is x for name, x in kept.items())
            for p, kept in self._moments
        )

    def _settings_now(self) -> Iterator[Any]:
        for group in self._optimizer.param_groups:
            for name, value in group.items():
                if name not in ("params", "lr", "initial_lr"):
                    yield value
            for p in group["params"]:
                yield p.requires_grad

    def _state_now(self) -> Iterator[Any]:
        for module in self._modules:
            yield module.training
        for layer in self._adapters:
            own = vars(layer)  # there are hundreds of layers, and modules look attributes up slowly
            yield layer._disable_adapters
            yield tuple(layer._active_adapter)
            yield len(own["merged_adapters"])
            yield dict(own.get("scaling", ()))  # of LoRA
        for keeper in self._keepers:
            yield keeper.changes
            yield [(id(layer), id(held)) for layer, held in keeper.held_by_layer.items()]


def _all_same(now: Iterator[Any], then: list[Any]) -> bool:
    """Tensors must be the very same, other values equal."""
    values = list(now)
    return len(values) == len(then) and all(
        old is new or (not isinstance(old, Tensor) and old == new)
        for old, new in zip(then, values, strict=True)
    )
