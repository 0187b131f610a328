"""transformers' continuous batching with an adapter for each request."""

import copy
import inspect
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers import __version__ as version
from transformers.generation.continuous_batching import scheduler as schedulers
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cache_allocators import cache_allocator
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    OutputRouter,
)
from transformers.generation.continuous_batching.model_runner import (
    infer_max_single_request_tokens,
)
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestState

from s2kernels.serve.layers import GroupedLayers
from s2kernels.serve.scheduling import CHILD, AdapterScheduling, Requests
from s2kernels.serve.store import AdapterStore

TESTED = "5.23"

# What is hooked into, and the parameters it must have.
_SEAMS: dict[Callable[..., Any], tuple[str, ...]] = {
    schedulers.Scheduler.__init__: ("cache", "safety_margin", "max_requests_per_batch"),
    schedulers.Scheduler.add_waiting_request: ("state",),
    schedulers.Scheduler.finish_request: ("request_id",),
    schedulers.Scheduler.schedule_batch: ("token_budget", "cache_budget"),
    PagedAttentionCache.search_prefix_match: ("request_id", "prompt_ids"),
    cache_allocator.CacheAllocator.mark_complete_blocks: ("request_id", "token_ids"),
}


class AdapterManager(ContinuousBatchingManager):
    """A manager of transformers whose requests have adapters, from `Serving.continuous_batching`.

    Everything of a manager is there; `add_request` takes an adapter, too. Prompts that begin alike
    share cached keys within one adapter and never across. Forks and requests that the cache has no
    room for keep the adapter that they began with, even if its name is unregistered meanwhile.

    max_request_tokens is how many one request may have, prompt and answer together.
    """

    max_request_tokens: int

    def __init__(
        self,
        model: Any,
        store: AdapterStore,
        layers: GroupedLayers,
        generation_config: GenerationConfig | None,
        continuous_batching_config: ContinuousBatchingConfig | None,
    ) -> None:
        check_transformers()
        if getattr(model, "_device_mesh", None) is not None:
            raise ValueError("the model must be on one device, got one that is sharded")
        # Copies: transformers completes both in place.
        generation = copy.deepcopy(generation_config or model.generation_config)
        if generation.eos_token_id is None:
            generation.eos_token_id = -1
        batching = _eager(continuous_batching_config)
        self._scheduler_type = f"{batching.scheduler_type} with adapters {id(self)}"
        base = schedulers.SCHEDULER_MAPPING.get(batching.scheduler_type)
        if base is None:
            raise ValueError(
                f"scheduler_type must be one of {sorted(schedulers.SCHEDULER_MAPPING)}, "
                f"got {batching.scheduler_type!r}"
            )
        batching.scheduler_type = self._scheduler_type
        super().__init__(model, generation, batching)
        self._store = store
        vocabulary = model.config.get_text_config().vocab_size
        self._requests = Requests(store, layers, vocabulary, self._fail, self.forget_handler)
        self.output_router = _Router(self._requests)
        kind = type(f"Adapter{base.__name__}", (AdapterScheduling, base), {})
        make: Any = partial(kind, self._requests)
        schedulers.SCHEDULER_MAPPING[self._scheduler_type] = make

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        *args: Any,
        adapter: str | None = None,
        **options: Any,
    ) -> str:
        """As of a manager, for the adapter of that name, or the base.

        Returns the id of the request. Raises ValueError for an unknown adapter, an empty prompt,
        tokens that the model does not have, an id that is in use and a prompt that with its answer
        has no room in the cache; RuntimeError if the manager does not run.
        """
        if not len(input_ids):
            raise ValueError("input_ids must have at least one token, got none")
        vocabulary = self.model.config.get_text_config().vocab_size
        if min(input_ids) < 0 or max(input_ids) >= vocabulary:
            raise ValueError(
                f"input_ids must lie in [0, {vocabulary}), got values from {min(input_ids)} to "
                f"{max(input_ids)}"
            )
        if request_id is not None and CHILD in request_id:
            raise ValueError(f"request_id must not contain {CHILD!r}, got {request_id!r}")
        room = self.max_request_tokens
        if max_new_tokens is None:
            max_new_tokens = self.generation_config.max_new_tokens
        if max_new_tokens is None:
            max_new_tokens = max(1, room - len(input_ids))
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be positive, got {max_new_tokens}")
        if len(input_ids) + max_new_tokens > room:
            raise ValueError(
                f"input_ids and max_new_tokens must be at most {room} tokens together, for which "
                f"the cache has room; got {len(input_ids)} and {max_new_tokens}"
            )
        content = None if adapter is None else self._store.adapter(adapter)
        request_id = request_id or f"req_{uuid.uuid4().hex}"
        self._requests.add(request_id, content)
        added = super().add_request(input_ids, request_id, max_new_tokens, *args, **options)
        if added is None:
            self._requests.forget(request_id)
            raise RuntimeError("the manager does not run") from (
                self.background_thread_status.fatal_error
            )
        return added

    def warmup(self) -> None:
        super().warmup()
        assert self.batch_processor is not None
        # Asked while the cache is empty.
        self.max_request_tokens = infer_max_single_request_tokens(self.batch_processor.cache)

    def with_children(self, request_id: str) -> list[str]:
        """The ids of a request and of its forks, of which there are num_return_sequences - 1."""
        children = range(self.num_return_sequences - 1)
        return [request_id, *(f"{request_id}{CHILD}{number}" for number in children)]

    def results(self, request_ids: Sequence[str]) -> list[GenerationOutput]:
        """Wait for all of these requests, and no others. Raises RuntimeError if the loop ends."""
        found: dict[str, GenerationOutput] = {}
        while len(found) < len(request_ids):
            output = self.get_result(timeout=1)
            if output is not None and output.is_finished():
                found[output.request_id] = output
            elif output is None and not self.is_running():
                raise RuntimeError("generation ended early") from (
                    self.background_thread_status.fatal_error
                )
        return [found[request_id] for request_id in request_ids]

    def close(self, at_once: bool = False) -> None:
        """Finish what has been added, or have it fail, and end."""
        try:
            if self._generation_thread is not None:
                self.stop(block=True, hard_stop=at_once)
            self.destroy()
        finally:
            self._requests.release_all()
            schedulers.SCHEDULER_MAPPING.pop(self._scheduler_type, None)

    def forget_handler(self, request_id: str) -> None:
        """Undo `register_result_handler`, for a request that will have no last result."""
        with self.output_router._lock:
            self.output_router.result_handlers.pop(request_id, None)

    def _fail(self, state: RequestState, error: Exception) -> None:
        self.output_router.fail_and_deliver(state, error)

    def _fail_all_remaining_requests(self, error: Exception, batch_processor: Any) -> None:
        if batch_processor is not None:
            batch_processor.scheduler.let_all_in()
        super()._fail_all_remaining_requests(error, batch_processor)


class _Router(OutputRouter):
    """Sees which requests are over."""

    def __init__(self, requests: Requests) -> None:
        super().__init__()
        self._requests = requests

    def deliver(self, output: GenerationOutput) -> None:
        self._forget([output])
        super().deliver(output)

    def deliver_batch(self, outputs: list[GenerationOutput]) -> None:
        self._forget(outputs)
        super().deliver_batch(outputs)

    def _forget(self, outputs: list[GenerationOutput]) -> None:
        for output in outputs:
            if output.is_finished():
                self._requests.forget(output.request_id)


def check_transformers() -> None:
    """Raises RuntimeError if transformers has not the parts that continuous batching hooks into."""
    for function, names in _SEAMS.items():
        parameters = inspect.signature(function).parameters
        if not all(name in parameters for name in names):
            raise RuntimeError(
                f"transformers {version} has another {function.__qualname__} than the {TESTED} "
                "that adapters in continuous batching were tested with"
            )


def _eager(config: ContinuousBatchingConfig | None) -> ContinuousBatchingConfig:
    """A copy without CUDA graphs, which would replay the adapters that they were recorded with."""
    config = ContinuousBatchingConfig() if config is None else copy.deepcopy(config)
    graphs = config.use_cuda_graph
    compiled = (
        config.varlen_compile_config or config.decode_compile_config or config.default_compile_level
    )
    if compiled or (any(graphs) if isinstance(graphs, tuple) else graphs):
        raise ValueError(
            "continuous_batching_config must not ask for CUDA graphs or compilation: adapters "
            "change from one batch to the next"
        )
    config.use_cuda_graph = False
    return config
