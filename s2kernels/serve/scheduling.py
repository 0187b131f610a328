"""What transformers' continuous batching has to know of adapters: when it may run a request, whose
tokens a batch holds, and whose cached keys a request may share.

A request is let in once its adapter is on the device, which it then stays until the request is
over. Those that have to wait for room wait in line. Blocks of the cache are known by a hash of
their tokens alone: here the tokens are marked with the adapter first, so that no request ever finds
the keys of another adapter, and those of its own it still does.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import Scheduler

from s2kernels.serve.batch import Assignment
from s2kernels.serve.content import Adapter
from s2kernels.serve.layers import GroupedLayers
from s2kernels.serve.store import AdapterStore, NoRoom

CHILD = "__child#"  # what transformers puts between a request's id and the number of a fork of it
# How many requests, whose adapters are on the device, may overtake one that waits for room.
_OVERTAKING = 32


class Requests:
    """The adapters of the requests of one manager. Its loop's thread alone calls what is not said
    to be for others.

    fail(state, error) ends a request; cancelled(request_id) is told of one that was cancelled, of
    which nothing more will be heard.
    """

    def __init__(
        self,
        store: AdapterStore,
        layers: GroupedLayers,
        vocab_size: int,
        fail: Callable[[RequestState, Exception], None],
        cancelled: Callable[[str], None],
    ) -> None:
        self.fail, self.cancelled = fail, cancelled
        self._store, self._layers, self._vocab_size = store, layers, vocab_size
        self._adapters: dict[str, Adapter | None] = {}
        self._held: dict[str, Adapter | None] = {}
        self._marks: dict[str, int] = {}
        self._last: Assignment | None = None

    def add(self, request_id: str, adapter: Adapter | None) -> None:
        """From any thread, before the request is queued. ValueError for an id that is in use."""
        if request_id in self._adapters:
            raise ValueError(f"request_id {request_id!r} is in use")
        self._adapters[request_id] = adapter

    def forget(self, request_id: str) -> None:
        """From any thread, when the request is over."""
        self._adapters.pop(request_id, None)

    def is_held(self, request_id: str) -> bool:
        return request_id in self._held

    def is_resident(self, request_id: str) -> bool:
        adapter = self._adapters.get(request_id)
        return adapter is None or adapter.resident is not None

    def hold(self, state: RequestState) -> None:
        """Have the adapter of a request, and of what it will be forked into, on the device.

        Raises NoRoom.
        """
        adapter = self._adapters.get(state.request_id)
        ids = [state.request_id, *_children(state)]
        self._store.acquire([adapter] * len(ids))
        for request_id in ids:
            self._adapters[request_id] = self._held[request_id] = adapter

    def release(self, state: RequestState | None, request_id: str) -> None:
        """The request leaves the batch, maybe to come back."""
        for released in [request_id, *([] if state is None else _children(state))]:
            if released in self._held:
                self._store.release([self._held.pop(released)])

    def release_all(self) -> None:
        """Once the loop is over."""
        for request_id in list(self._held):
            self._store.release([self._held.pop(request_id)])
        self._adapters.clear()

    def can_wait(self) -> bool:
        """Whether room may come: something is in flight."""
        return self._store.is_in_flight()

    def assign(self, batch: list[tuple[str, int]]) -> None:
        """The next forward of this thread is of these requests, with so many tokens each."""
        assignment = Assignment(
            self._store,
            [self._held[request_id] for request_id, _ in batch],
            [length for _, length in batch],
        )
        if self._last is None or self._last.key != assignment.key:
            self._last = assignment
        self._layers.assign(self._last)

    def marked(self, request_id: str, tokens: list[int]) -> list[int]:
        """The tokens, different for each adapter in the first two of them, and only there.

        They stay integers of 32 bits. A full block of the cache has more than two.
        """
        adapter = self._adapters.get(request_id)
        if adapter is None or len(tokens) < 2:
            return tokens
        mark = self._marks.setdefault(adapter.key, len(self._marks) + 1)
        high, low = divmod(mark, 2**31 // self._vocab_size - 1)
        first, second = tokens[0] + low * self._vocab_size, tokens[1] + high * self._vocab_size
        return [first, second, *tokens[2:]]


class AdapterScheduling(Scheduler):
    """To be mixed in before a scheduler of transformers."""

    def __init__(self, requests: Requests, cache: Any, **options: Any) -> None:
        self._requests = requests
        super().__init__(cache=cache, **options)
        _mark_blocks(cache, requests)

    def reset(self) -> None:
        super().reset()
        self._parked: deque[RequestState] = deque()
        self._overtaken = 0

    def add_waiting_request(self, state: RequestState) -> None:
        if self._requests.is_held(state.request_id):  # a fork, for which there was no block
            super().add_waiting_request(state)
        else:
            self._parked.append(state)
            self._let_in()

    def has_pending_requests(self) -> bool:
        return bool(self._parked) or super().has_pending_requests()

    def finish_request(self, request_id: str) -> None:
        state = self.active_requests.get(request_id)
        super().finish_request(request_id)
        self._requests.release(state, request_id)
        self._let_in()

    def clear_cancelled_requests(self) -> list[RequestState]:
        with self._cancellation_lock:
            cancelled = set(self._requests_to_cancel)
        parked = [state for state in self._parked if state.request_id in cancelled]
        for state in parked:
            self._parked.remove(state)
        states = [*super().clear_cancelled_requests(), *parked]
        for state in states:
            self._requests.release(state, state.request_id)
            for request_id in [state.request_id, *_children(state)]:
                self._requests.forget(request_id)
                self._requests.cancelled(request_id)
        if states:
            self._let_in()
        return states

    def schedule_batch(self, token_budget: int, cache_budget: int) -> Any:
        self._let_in()
        result = super().schedule_batch(token_budget, cache_budget)  # type: ignore[safe-super]
        if result[0]:
            self._requests.assign(
                [(future.state.request_id, future.query_length) for future in result[0]]
            )
        return result

    def let_all_in(self) -> None:
        """When the loop is over: what waits for room is to fail like what waits for a turn."""
        while self._parked:
            super().add_waiting_request(self._parked.popleft())

    def _let_in(self) -> None:
        for state in list(self._parked):
            first = state is self._parked[0]
            if not first and not (
                self._overtaken < _OVERTAKING and self._requests.is_resident(state.request_id)
            ):
                continue
            try:
                self._requests.hold(state)
            except Exception as error:  # a copy to the device can fail in many ways
                if not isinstance(error, NoRoom) or (first and not self._requests.can_wait()):
                    self._parked.remove(state)
                    self._requests.fail(state, error)
                continue
            self._parked.remove(state)
            self._overtaken = 0 if first else self._overtaken + 1
            super().add_waiting_request(state)


def _children(state: RequestState) -> list[str]:
    """Ids of the forks that a request is still to have."""
    return [f"{state.request_id}{CHILD}{number}" for number in range(state.num_children)]


def _mark_blocks(cache: Any, requests: Requests) -> None:
    """Have the cache hash the blocks of each adapter as if their tokens were others."""
    search = cache.search_prefix_match

    def search_prefix_match(request_id: str, prompt_ids: list[int]) -> int:
        return search(request_id, requests.marked(request_id, prompt_ids))

    def marking(mark: Callable[[str, list[int], int], None]) -> Callable:
        def mark_complete_blocks(request_id: str, token_ids: list[int], num: int) -> None:
            mark(request_id, requests.marked(request_id, token_ids), num)

        return mark_complete_blocks

    cache.search_prefix_match = search_prefix_match
    for allocator in cache.cache_allocators.values():
        allocator.mark_complete_blocks = marking(allocator.mark_complete_blocks)
