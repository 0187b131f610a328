"""S2FT adapters in one worker of vLLM: what they hold lies in a row pool, not in slots of LoRAs.

A slot of vLLM is padded to one rank in every layer, with both factors. Here the adapters in slots
share the pool of `s2kernels.serve`: an adapter takes as many rows as it trains channels. vLLM says
which adapters are in slots and which token has which adapter; the rest is done as in
`s2kernels.serve.Serving`: one plan a batch, one grouped op a layer, after the base layer's output.
"""

import weakref
from collections.abc import Callable, Iterable, Mapping
from itertools import count, groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import envs
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel

from s2kernels import backend
from s2kernels.adapter import Slice, read_adapter
from s2kernels.serve.batch import BatchPlan
from s2kernels.serve.content import Adapter, Place
from s2kernels.serve.pool import RowPool
from s2kernels.serve.store import AdapterStore

SETTING = "s2ft_channels"  # in --additional-config


class NativeModel(LoRAModel):
    """An S2FT adapter among the LoRAs of vLLM, for which it has no layers."""

    def __init__(self, lora_id: int, adapter: Adapter) -> None:
        super().__init__(lora_id, 0, {})
        self.adapter = adapter


class NativeAdapters:
    """The S2FT adapters of one LoRAModelManager, `manager`.

    The memory for them is that of `SETTING` channels in each of --max-loras slots, taken at once;
    without that setting as many bytes as the slots of LoRAs have, taken with the first S2FT
    adapter.
    """

    def __init__(self, manager: Any, config: Any) -> None:
        self._manager, self._layers = manager, Layers(manager)
        self._obstacle = _obstacle(manager, config)
        self._width = config.model_config.get_hidden_size()
        self._channels = _setting(config)
        self._store: AdapterStore | None = None
        self._names = count()
        self._active: dict[int, Adapter] = {}  # in slots, acquired
        self._planned: tuple[tuple[int, ...], list] | None = None
        if self._channels is not None and self._obstacle is None:
            self._store = self._make_store()

    def load(self, lora_id: int, path: str) -> NativeModel:
        """Take in the adapter in the folder `path`; it is forgotten when the result is.

        Raises ValueError, as `AdapterStore.register`, and for one larger than a slot, or where vLLM
        is set up in a way that is not supported.
        """
        if self._obstacle is not None:
            raise ValueError(f"S2FT adapters cannot be served here: {self._obstacle}")
        if self._store is None:
            self._store = self._make_store()
        name = f"{lora_id}, {next(self._names)}"  # load_inplace has two of one id for a moment
        self._store.register(name, path)
        model = NativeModel(lora_id, self._store.adapter(name))
        weakref.finalize(model, self._store.unregister, name)
        return model

    def follow_slots(self) -> None:
        """Have exactly the adapters in the slots of vLLM be on the device."""
        if self._store is None:
            return
        known = self._manager.list_adapters()
        slots = (known.get(lora_id) for lora_id in self._manager.lora_index_to_id)
        wanted = {model.id: model.adapter for model in slots if isinstance(model, NativeModel)}
        gone = [i for i, adapter in self._active.items() if wanted.get(i) is not adapter]
        self._store.release([self._active.pop(i) for i in gone])
        new = {i: adapter for i, adapter in wanted.items() if i not in self._active}
        self._store.acquire(list(new.values()))
        self._active.update(new)

    def plan(self, ids: tuple[int, ...]) -> None:
        """Prepare the next batch: of every token the id of its adapter, 0 for none."""
        distinct = set(ids)
        adapters = {i: adapter for i, adapter in self._active.items() if i in distinct}
        where = [(i, adapter.key, adapter.loads) for i, adapter in adapters.items()]
        if self._planned == (ids, where):
            return
        self._layers.has_loras = any(i and i not in adapters for i in distinct)
        self._layers.plan = None
        if adapters and self._store is not None:
            runs = [(i, len(list(run))) for i, run in groupby(ids)]
            of_runs = [adapters.get(i) for i, _ in runs]
            self._layers.plan = BatchPlan(self._store, of_runs, [length for _, length in runs])
        self._planned = ids, where

    def _make_store(self) -> AdapterStore:
        config = self._manager.lora_config
        if self._channels is None:
            bytes_of_a_row = self._width * config.lora_dtype.itemsize
            self._channels = max(1, _bytes_of_a_slot(self._manager) // bytes_of_a_row)
        num_rows = config.max_loras * self._channels
        pool = RowPool(self._width, num_rows, config.lora_dtype, self._manager.device)
        self._layers.install(pool.rows)
        return AdapterStore(self._layers, pool, self._layers.attach, self._read)

    def _read(self, path: Path) -> dict[str, Slice]:
        slices = self._layers.read(path)
        total = sum(part.index.numel() for part in slices.values())
        if self._channels is not None and total > self._channels:
            raise ValueError(
                f"{path} trains {total} channels, and a slot has room for {self._channels}: start "
                f"vLLM with --additional-config '{{\"{SETTING}\": {total}}}' or more"
            )
        return slices


class Layers:
    """The linear layers of a model in vLLM, by their names there, and what their adapters add."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._layers: dict[str, BaseLinearLayerWithLoRA] = {
            name: module
            for name, module in manager.modules.items()
            if isinstance(module, BaseLinearLayerWithLoRA)
        }
        # of a projection that vLLM computes as part of another layer: that one, and which part
        self._parts = {
            part: (name, number)
            for name, parts in manager.packed_modules.items()
            for number, part in enumerate(parts)
        }
        self._places: dict[str, list[tuple[int, Callable[..., Tensor]]]] = {}
        # of the batch that is computed
        self.plan: BatchPlan | None = None
        self.has_loras = True

    def install(self, pool: Tensor) -> None:
        """Have every layer add the rows of `pool` that the plan names; no adapter, no cost."""
        self._pool = pool
        for name, layer in self._layers.items():
            places = self._places.setdefault(name, [])
            layer._apply_lora_to_output = self._adding(layer._apply_lora_to_output, places)

    def attach(self, places: Mapping[Place, int]) -> None:
        ops = backend.select(self._pool)
        for (name, dim), number in places.items():
            op = ops.grouped_in_ if dim == "in" else ops.grouped_out_
            self._places[name].append((number, op))

    def read(self, path: Path) -> dict[str, Slice]:
        """The slices of an adapter, by the names of vLLM; those of q, k, v or gate, up as one."""
        mapper = getattr(self._manager.model, "hf_to_vllm_mapper", None)
        renamed: dict[str, Slice] = {}
        parts: dict[str, list[tuple[int, str, Slice]]] = {}
        for hf_name, part in read_adapter(path).items():
            name = hf_name if mapper is None else mapper.get_rename_mapper()._map_name(hf_name)
            if name in self._parts:
                whole, number = self._parts[name]
                parts.setdefault(whole, []).append((number, hf_name, part))
            else:
                renamed[name or hf_name] = part
        return renamed | {whole: self._joined(whole, found) for whole, found in parts.items()}

    def shape(self, name: str) -> tuple[int, int]:
        if name not in self._layers:
            raise ValueError(f"{name} is no linear layer of this model in vLLM")
        base = self._layers[name].base_layer
        return base.output_size, base.input_size

    def base_slice(self, name: str, index: Tensor, dim: str) -> Tensor | None:
        shape, axis = self.shape(name), 1 if dim == "in" else 0
        if int(index.max()) >= shape[axis]:
            raise ValueError(
                f"{name}: index must lie in [0, {shape[axis]}), the {dim}put channels of the layer,"
                f" got {int(index.max())}"
            )
        weight = getattr(self._layers[name].base_layer, "weight", None)
        # On a CPU vLLM packs weights and forgets them; quantized ones have another shape or dtype.
        if weight is None or tuple(weight.shape) != shape or not weight.is_floating_point():
            return None
        return weight.data.index_select(axis, index.to(weight.device).long())

    def _joined(self, whole: str, found: list[tuple[int, str, Slice]]) -> Slice:
        """One slice of output channels of layer `whole`, whose parts have their own sizes."""
        sizes = self._layers[whole].base_layer.output_sizes if whole in self._layers else []
        indices, deltas, prints = [], [], []
        for number, name, part in sorted(found, key=lambda item: item[0]):
            if part.dim != "out" or part.delta.dim() != 2 or number >= len(sizes):
                raise ValueError(
                    f"{name}: vLLM computes it as a part of {whole.rpartition('.')[2]}, of which "
                    "only output channels can be served"
                )
            if int(part.index.max()) >= sizes[number]:
                raise ValueError(
                    f"{name}: index must lie in [0, {sizes[number]}), the output channels of the "
                    f"layer, got {int(part.index.max())}"
                )
            indices.append(part.index + sum(sizes[:number]))
            deltas.append(part.delta)
            known = part.fingerprint
            prints.append(
                torch.zeros_like(part.index, dtype=torch.int64) if known is None else known
            )
        return Slice("out", torch.cat(indices), torch.cat(deltas), torch.cat(prints))

    def _adding(self, add_loras: Callable[..., Tensor], places: list) -> Callable[..., Tensor]:
        def add(x: Tensor, output: Tensor) -> Tensor:
            if self.has_loras:
                output = add_loras(x, output)
            if self.plan is not None:
                for number, op in places:
                    groups = self.plan.groups(number)
                    if groups is not None:
                        y = output.view(-1, output.shape[-1])
                        op(y, x.reshape(-1, x.shape[-1]), self._pool, groups)
            return output

        return add


def _obstacle(manager: Any, config: Any) -> str | None:
    """Why S2FT adapters are not supported in this setup, and what to do; None if they are."""
    parallel, compilation = config.parallel_config, config.compilation_config
    if parallel.tensor_parallel_size > 1 or parallel.pipeline_parallel_size > 1:
        return "the model must be on one device, without tensor or pipeline parallelism"
    if parallel.use_ubatching:
        return "batches must not be split, as --enable-dbo does"
    if manager.lora_config.fully_sharded_loras:
        return "LoRAs must not be sharded: leave --fully-sharded-loras out"
    if envs.VLLM_LORA_ENABLE_DUAL_STREAM:
        return "unset VLLM_LORA_ENABLE_DUAL_STREAM"
    if manager.supports_mm:
        return "the model must be a language model, not a multimodal one"
    graphs = manager.device.type != "cpu" and compilation.cudagraph_mode != CUDAGraphMode.NONE
    if graphs or compilation.mode != CompilationMode.NONE:
        return "the model must run without compilation and CUDA graphs: give --enforce-eager"
    return None


def _setting(config: Any) -> int | None:
    additional = config.additional_config
    value = additional.get(SETTING) if isinstance(additional, dict) else None
    if value is not None and (type(value) is not int or value < 1):
        raise ValueError(
            f"{SETTING} in --additional-config must be a positive number of channels, got {value!r}"
        )
    return value


def _bytes_of_a_slot(manager: Any) -> int:
    """Those of the linear layers' buffers for LoRAs."""
    stacks: Iterable[Tensor] = (
        stack
        for module in manager.modules.values()
        if isinstance(module, BaseLinearLayerWithLoRA)
        for stack in (*module.lora_a_stacked, *module.lora_b_stacked)
    )
    return sum(stack[0].nbytes for stack in stacks)
