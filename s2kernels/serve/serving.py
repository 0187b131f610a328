"""One model of transformers that serves many S2FT adapters."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch

from s2kernels.adapter import Slice, combine
from s2kernels.serve.batch import Assignment
from s2kernels.serve.layers import GroupedLayers
from s2kernels.serve.pool import RowPool
from s2kernels.serve.store import AdapterStore
from s2kernels.serve.switch import Switcher

if TYPE_CHECKING:
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.requests import GenerationOutput

    from s2kernels.serve.continuous import AdapterManager

OVERLAPS = ("sum", "refuse")


class Serving:
    """`model`, a causal language model of transformers, with adapters by name.

    pool_bytes is the memory on the model's device for the channels of adapters in use; all others
    wait on the host. The model stays usable as it is, and computes its base, outside of the calls
    here; `close` takes the hooks off that they need.

    A batch may mix adapters and the base: every row has its own (`generate`, `rows`), or every one
    of many requests (`continuous_batching`). Or one adapter, or a weighted sum, is written into the
    weights (`switch`, `fuse`), at no cost in any forward. That is refused while requests are in
    flight, and while it is so, no other adapter is served.
    """

    def __init__(self, model: Any, *, pool_bytes: int = 2**30) -> None:
        width = model.config.get_text_config().hidden_size
        num_rows = pool_bytes // (width * model.dtype.itemsize)
        if num_rows < 1:
            raise ValueError(f"pool_bytes must hold at least one row, got {pool_bytes}")
        self.model = model
        pool = RowPool(width, num_rows, model.dtype, model.device)
        self.switcher = Switcher(model)
        self.layers = GroupedLayers(model, pool.rows)
        self.store = AdapterStore(self.switcher, pool, self.layers.attach)
        self._sessions = 0
        self._continuous = False
        self._lock = RLock()

    def register(self, name: str, source: str | Path | Mapping[str, Slice]) -> None:
        """Take in the adapter in a folder, or one of slices; see `AdapterStore.register`."""
        with self._lock:  # the base is read for it, and must not change meanwhile
            self.store.register(name, source)

    def unregister(self, name: str) -> None:
        """Forget an adapter; requests that are in flight end with what they began with."""
        self.store.unregister(name)

    @contextmanager
    def rows(self, adapters: Sequence[str | None]) -> Iterator[None]:
        """Forwards of the model by this thread within have adapters[i] in row i of the batch.

        None is the base. Where a batch has a multiple of these rows, each is for that many which
        follow each other, as generate arranges beams. Raises ValueError for an unknown name or no
        adapters, RuntimeError while an adapter is written into the weights, NoRoom where the pool
        does not hold all of them.
        """
        if not adapters:
            raise ValueError("adapters must name one for each row, None for the base; got none")
        with self._session():
            held = self.store.acquire(adapters)
            try:
                with self.layers.assigned(Assignment(self.store, held)):
                    yield
            finally:
                self.store.release(held)

    def generate(
        self, inputs: torch.Tensor, *, adapters: Sequence[str | None], **options: Any
    ) -> Any:
        """`model.generate(inputs, **options)` with adapters[i] for prompt i; see `rows`."""
        with self.rows(adapters):
            return self.model.generate(inputs, **options)

    @contextmanager
    def continuous_batching(
        self,
        generation_config: "GenerationConfig | None" = None,
        continuous_batching_config: "ContinuousBatchingConfig | None" = None,
    ) -> Iterator["AdapterManager"]:
        """A running manager of transformers whose `add_request` takes an adapter.

        Until it ends, nothing else may call the model, as with any manager of transformers: its
        configuration says other things then. In the end what was added is finished; after an
        exception it fails. Raises RuntimeError where that would be within `rows`.
        Raises ValueError for a configuration with CUDA graphs or compilation, and RuntimeError for
        a transformers that has not the parts which are needed.
        """
        try:
            from s2kernels.serve.continuous import AdapterManager
        except (ImportError, AttributeError) as error:
            raise RuntimeError(
                f"this transformers has no continuous batching as it was tested with: {error}"
            ) from error

        with self._session(continuous=True):
            manager = AdapterManager(
                *(self.model, self.store, self.layers),
                *(generation_config, continuous_batching_config),
            )
            try:
                manager.warmup()
                manager.start()
                yield manager
            except BaseException:
                manager.close(at_once=True)
                raise
            manager.close()

    def generate_batch(
        self,
        inputs: Sequence[Sequence[int]],
        *,
        adapters: Sequence[str | None],
        generation_config: "GenerationConfig | None" = None,
        continuous_batching_config: "ContinuousBatchingConfig | None" = None,
        max_new_tokens: int | None = None,
    ) -> list["GenerationOutput"]:
        """Continue every prompt with its adapter, in continuous batching.

        Outputs are in the order of inputs, of several answers one after another. An output may have
        failed: it says so. Raises ValueError for another number of adapters than of inputs.
        """
        if len(inputs) != len(adapters):
            raise ValueError(
                f"adapters must name one for each input, None for the base; got {len(adapters)} "
                f"for {len(inputs)} inputs"
            )
        with self.continuous_batching(generation_config, continuous_batching_config) as manager:
            ids = [
                manager.add_request(list(tokens), adapter=adapter, max_new_tokens=max_new_tokens)
                for tokens, adapter in zip(inputs, adapters, strict=True)
            ]
            return manager.results([child for id in ids for child in manager.with_children(id)])

    def switch(self, name: str | None) -> None:
        """Have the weights hold the base and this adapter, or the base alone, exactly.

        Raises RuntimeError while requests are in flight.
        """
        with self._lock:
            self._check_idle()
            if name is None:
                self.switcher.switch(None, None)
            else:
                self.switcher.switch(self.store.adapter(name).key, self.store.slices(name))

    def fuse(
        self, names: Sequence[str], weights: Sequence[float] | None = None, overlap: str = "sum"
    ) -> None:
        """Have the weights hold the base and a weighted sum of adapters (S2FT section 6.2).

        weights are 1 unless given. A channel that several adapters train gets the sum of theirs,
        rounded once; overlap="refuse" raises ValueError instead, naming the module. Raises
        RuntimeError while requests are in flight.
        """
        if overlap not in OVERLAPS:
            raise ValueError(f"overlap must be one of {OVERLAPS}, got {overlap!r}")
        factors = [1.0] * len(names) if weights is None else list(weights)
        with self._lock:
            self._check_idle()
            parts = [self.store.slices(name) for name in names]
            if overlap == "refuse":
                _check_apart(names, parts)
            key = tuple(
                (self.store.adapter(n).key, w) for n, w in zip(names, factors, strict=False)
            )
            self.switcher.switch(key, combine(parts, factors))

    def close(self) -> None:
        """Put the base back and take the hooks off the model."""
        self.switch(None)
        self.layers.detach()

    @contextmanager
    def _session(self, continuous: bool = False) -> Iterator[None]:
        with self._lock:
            if self.switcher.active is not None:
                raise RuntimeError(
                    "an adapter is written into the weights: switch(None) before others are served"
                )
            # transformers says in model.config, for the time of a forward, that attention is not
            # causal: a forward of another thread would read it there.
            if self._continuous or (continuous and self._sessions):
                raise RuntimeError("continuous batching needs the model for itself")
            self._sessions += 1
            self._continuous = continuous
        try:
            yield
        finally:
            with self._lock:
                self._sessions -= 1
                self._continuous = False

    def _check_idle(self) -> None:
        if self._sessions:
            raise RuntimeError("the weights cannot change while requests may be in flight")


def _check_apart(names: Sequence[str], adapters: Sequence[Mapping[str, Slice]]) -> None:
    for module in {module: None for slices in adapters for module in slices}:
        index = torch.cat([slices[module].index for slices in adapters if module in slices])
        repeated = index.numel() - index.unique().numel()
        if repeated:
            raise ValueError(
                f"{module}: {repeated} channels are trained by more than one of {', '.join(names)}"
            )
