"""Which threads are inside a forward of a model, and what must wait for that."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.utils._pytree import tree_leaves


class Forwards:
    """The forwards of one model that are running, by thread, and the lock of its weights.

    A copy of it, or a pickle, has no forwards and a lock of its own.
    """

    def __init__(self) -> None:
        self.lock = threading.Condition(threading.RLock())
        self._running: dict[int, int] = {}  # thread -> forwards that it is inside of
        # threads inside of one that is no mixed batch, and in which nobody exchanges weights
        self.plain: set[int] = set()
        self._seen: set[int] = set()  # threads in which one has run
        self._local = threading.local()
        self._pending: WeakSet[_Pending] = WeakSet()  # whose backward is to come

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()  # type: ignore[misc]

    @property
    def here(self) -> bool:
        """Whether this thread is inside a forward."""
        return get_ident() in self._running

    def enter(self, plain: bool) -> None:
        """This thread is inside of one more; see `plain`. The caller holds the lock."""
        thread = get_ident()
        if plain:
            self.plain.add(thread)
        self._seen.add(thread)
        self._running[thread] = self._running.get(thread, 0) + 1

    def leave(self) -> bool:
        """And of one less; whether no thread is inside of any now. The caller holds the lock."""
        thread = get_ident()
        self._running[thread] -= 1
        if not self._running[thread]:
            del self._running[thread]
            self.plain.discard(thread)
            self.lock.notify_all()
        return not self._running

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the lock, once no other thread is inside a forward. A thread that is inside of one
        itself does not wait: another one might wait for it.
        """
        with self.lock:
            if not self.here:
                self.lock.wait_for(lambda: not self._running)
            yield

    @property
    def elsewhere(self) -> bool:
        """Whether forwards have run in other threads than this one."""
        return bool(self._seen - {get_ident()})

    @property
    def pending(self) -> bool:
        """Whether the backward of a forward that was `expected` has not begun, and may come."""
        return bool(self._pending)

    def expect_backward(self, output: Any) -> None:
        """A backward of this output of a forward is to be expected, for as long as it lives."""
        pending = _Pending()
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(_begin, self._pending, pending))
                self._pending.add(pending)

    @property
    def rows(self) -> list[str] | None:
        """Of a mixed batch in this thread: the adapter of each row, while its forward runs."""
        return getattr(self._local, "rows", None)

    @contextmanager
    def mixed(self, rows: list[str] | None) -> Iterator[None]:
        """Forwards of this thread within are those of a mixed batch with these `rows`."""
        before, self._local.rows = self.rows, rows
        was_plain = rows is not None and get_ident() in self.plain
        if was_plain:
            self.plain.discard(get_ident())
        try:
            yield
        finally:
            self._local.rows = before
            if was_plain:
                self.plain.add(get_ident())


class _Pending:
    """A forward; hooks on its outputs alone keep it alive."""


def _begin(waiting: WeakSet, pending: _Pending, grad: Tensor) -> None:
    waiting.discard(pending)
