"""Adapters by name: all of them in host memory, those in use on the device.

An adapter is its content: two names for equal slices share one copy, here and on the device. On the
host its rows lie in one block, ready to be copied; on the device they lie in a `RowPool`, from
which the least recently used leaves when another one needs the room. An adapter in flight, which a
running batch reads, and a pinned one never leave.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from threading import RLock
from typing import Protocol

import torch
from torch import Tensor

from s2kernels.adapter import Slice, check_fingerprint, read_adapter
from s2kernels.serve.content import Adapter, Place, Resident, content_key, make_content
from s2kernels.serve.pool import RowPool


class NoRoom(RuntimeError):
    """All that could leave the device has left, and the rows do not suffice."""


class Base(Protocol):
    """What a store must know of the base model, to refuse adapters that do not fit it."""

    def shape(self, name: str) -> tuple[int, int]:
        """(N, K) of a linear layer. Raises ValueError, naming it, where there is none."""

    def base_slice(self, name: str, index: Tensor, dim: str) -> Tensor | None:
        """What its weight holds at these channels, (N, R) or (R, K); None where that is not known.

        Raises ValueError where it has no such channels.
        """


class AdapterStore:
    """The adapters of one base model. All methods may be called from any thread.

    base knows the weights, to check shapes and fingerprints; pool is the device's memory for rows.
    places numbers the modules that any adapter has trained, in the order in which they came up;
    attach is told new ones before an adapter with them can be acquired. read makes slices of the
    folder of an adapter.
    """

    def __init__(
        self,
        base: Base,
        pool: RowPool,
        attach: Callable[[Mapping[Place, int]], None] = lambda places: None,
        read: Callable[[Path], Mapping[str, Slice]] = read_adapter,
    ) -> None:
        self.pool = pool
        self._attach, self._read = attach, read
        self.places: dict[Place, int] = {}
        self._base = base
        self._names: dict[str, Adapter] = {}
        self._contents: dict[str, Adapter] = {}
        self._resident: OrderedDict[str, Adapter] = OrderedDict()  # least recently used first
        self._lock = RLock()
        device = pool.rows.device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._readers: set[torch.cuda.Stream] = set()

    def register(self, name: str, source: str | Path | Mapping[str, Slice]) -> None:
        """Take an adapter in: the folder of one, or its slices.

        Raises ValueError, with nothing changed, for a name that is taken, a folder without an S2FT
        adapter, modules that the base does not have or of another width than the pool's, tensors of
        experts, an adapter larger than the pool, and one that was trained on another base. The
        latter cannot be told where a weight is quantized, or the adapter has no fingerprint.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"name must be a non-empty string, got {name!r}")
        self._check_free(name)
        kept = source if isinstance(source, Mapping) else Path(source)
        slices = kept if isinstance(kept, Mapping) else self._read(kept)
        if not slices:
            raise ValueError(f"adapter {name!r}: slices must name at least one module, got none")
        for module, part in slices.items():
            self._check(module, part)
        total = sum(part.index.numel() for part in slices.values())
        if total > self.pool.num_rows:
            raise ValueError(
                f"adapter {name!r} trains {total} channels, more than the {self.pool.num_rows} "
                "rows that the pool has: give it more bytes"
            )
        # What takes long is done: running requests wait for the lock, too.
        rows = self.pool.rows
        content = make_content(slices, kept, rows.shape[1], rows.dtype, rows.is_cuda)
        with self._lock:
            self._check_free(name)
            adapter = self._contents.setdefault(content.key, content)
            if adapter is content:
                new = [place for place in content.ranges if place not in self.places]
                numbers = {place: len(self.places) + i for i, place in enumerate(new)}
                self.places.update(numbers)
                self._attach(numbers)
                adapter.bounds = torch.zeros((len(self.places), 2), dtype=torch.int32, device="cpu")
                for place, entries in content.ranges.items():
                    bounds = torch.tensor([entries.start, entries.stop], device="cpu")
                    adapter.bounds[self.places[place]] = bounds
            adapter.names.add(name)
            self._names[name] = adapter

    def unregister(self, name: str) -> None:
        """Forget a name. Requests that are in flight end with what they began with.

        Raises ValueError for a name that is not known.
        """
        with self._lock:
            adapter = self._of(name)
            del self._names[name]
            adapter.names.discard(name)
            adapter.pins.discard(name)
            self._drop_if_unused(adapter)

    def names(self) -> list[str]:
        with self._lock:
            return list(self._names)

    def resident(self) -> list[str]:
        """Names on the device, least recently used first."""
        with self._lock:
            return [name for adapter in self._resident.values() for name in sorted(adapter.names)]

    def is_in_flight(self) -> bool:
        with self._lock:
            return any(adapter.in_flight for adapter in self._contents.values())

    def adapter(self, name: str) -> Adapter:
        """What is called so now; ValueError if nothing is."""
        with self._lock:
            return self._of(name)

    def slices(self, name: str) -> Mapping[str, Slice]:
        """The slices that `name` was registered with.

        They are read again if the pool's dtype does not hold them exactly: ValueError if the files
        are no longer the same.
        """
        with self._lock:
            adapter = self._of(name)
        if adapter.source is None:
            return adapter.slices_of_rows()
        if isinstance(adapter.source, Mapping):
            return adapter.source
        slices = self._read(adapter.source)
        if content_key(slices) != adapter.key:
            raise ValueError(
                f"{adapter.source} holds another adapter than when {name!r} was registered"
            )
        return slices

    def acquire(self, adapters: Sequence[str | Adapter | None]) -> list[Adapter | None]:
        """Bring adapters to the device and keep them there until `release`; None is the base.

        They are given by name, or as what `adapter` returned, whatever has become of the name.
        Every mention counts and is to be released. Raises ValueError for an unknown name, and
        NoRoom, with none of them acquired, where others in flight or pinned leave no room.
        """
        with self._lock:
            found = [self._of(name) if isinstance(name, str) else name for name in adapters]
            given = [adapter for adapter in found if adapter is not None]
            for adapter in given:
                adapter.in_flight += 1
            try:
                self._make_resident(given)
            except BaseException:
                for adapter in given:
                    adapter.in_flight -= 1
                raise
            return found

    def release(self, adapters: Iterable[Adapter | None]) -> None:
        """Give adapters of `acquire` back."""
        with self._lock:
            for adapter in adapters:
                if adapter is not None:
                    assert adapter.in_flight > 0
                    adapter.in_flight -= 1
                    self._drop_if_unused(adapter)

    def prefetch(self, name: str) -> bool:
        """Begin to copy an adapter to the device; False if there is no room for it now."""
        with self._lock:
            try:
                self._make_resident([self._of(name)])
            except NoRoom:
                return False
            return True

    def pin(self, name: str) -> None:
        """Keep an adapter on the device. Raises NoRoom where there is none."""
        with self._lock:
            adapter = self._of(name)
            self._make_resident([adapter])
            adapter.pins.add(name)

    def unpin(self, name: str) -> None:
        with self._lock:
            self._of(name).pins.discard(name)

    def before_reading(self, adapters: Iterable[Adapter]) -> None:
        """To be called on the stream that is about to read rows: it waits for their copies, and
        later copies wait for it.
        """
        if self._copies is None:
            return
        stream = torch.cuda.current_stream(self.pool.rows.device)
        with self._lock:
            self._readers.add(stream)
            for adapter in adapters:
                if adapter.resident is not None and adapter.resident.copied is not None:
                    stream.wait_event(adapter.resident.copied)

    def _check_free(self, name: str) -> None:
        if name in self._names:
            raise ValueError(f"name {name!r} is taken: unregister it first")

    def _of(self, name: str) -> Adapter:
        adapter = self._names.get(name)
        if adapter is None:
            raise ValueError(f"no adapter is called {name!r}")
        return adapter

    def _check(self, module: str, part: Slice) -> None:
        if part.delta.dim() != 2:
            raise ValueError(f"{module}: adapters of experts cannot be served, only merged")
        shape, width = self._base.shape(module), self.pool.rows.shape[1]
        wanted = shape[0] if part.dim == "in" else shape[1]
        if part.delta.shape[1 - part.axis] != wanted:
            raise ValueError(
                f"{module}: delta must fit a weight of shape {shape}, "
                f"got {tuple(part.delta.shape)} for {part.dim}put channels"
            )
        if wanted != width:
            raise ValueError(
                f"{module}: {part.dim}put channels of it are {wanted} wide, and the pool is for "
                f"{width}, the hidden size"
            )
        held = self._base.base_slice(module, part.index, part.dim)
        if held is not None and part.fingerprint is not None:
            check_fingerprint(module, part.fingerprint, held, part.dim)

    def _make_resident(self, adapters: Iterable[Adapter]) -> None:
        wanted = list({adapter.key: adapter for adapter in adapters}.values())
        keys = {adapter.key for adapter in wanted}
        missing = [adapter for adapter in wanted if adapter.resident is None]
        needed = sum(len(adapter.rows) for adapter in missing) - self.pool.num_free
        leaving = []
        if needed > 0:
            for adapter in self._resident.values():
                if adapter.is_idle and adapter.key not in keys:
                    leaving.append(adapter)
                    needed -= len(adapter.rows)
                    if needed <= 0:
                        break
            if needed > 0:
                raise NoRoom(
                    f"{needed} more rows are needed on the device than requests in flight and "
                    "pinned adapters leave"
                )
        for adapter in leaving:
            self._evict(adapter)
        for adapter in wanted:
            if adapter.resident is None:
                self._load(adapter)
            self._resident[adapter.key] = adapter
            self._resident.move_to_end(adapter.key)

    def _load(self, adapter: Adapter) -> None:
        runs = self.pool.allocate(len(adapter.rows))
        assert runs is not None
        try:
            if self._copies is None:
                adapter.resident = self._copy(adapter, runs)
            else:
                for stream in self._readers:  # which may still read what was in these rows
                    self._copies.wait_stream(stream)
                with torch.cuda.stream(self._copies):
                    adapter.resident = self._copy(adapter, runs)
        except BaseException:
            self.pool.free(runs)
            raise
        adapter.loads += 1

    def _copy(self, adapter: Adapter, runs: list[range]) -> Resident:
        device = self.pool.rows.device
        ids = [torch.arange(run.start, run.stop, dtype=torch.int32, device=device) for run in runs]
        channels = adapter.channels.to(device)
        self.pool.write(runs, adapter.rows)
        copied = None if self._copies is None else self._copies.record_event()
        return Resident(runs, torch.cat(ids), channels, copied)

    def _evict(self, adapter: Adapter) -> None:
        assert adapter.resident is not None
        self.pool.free(adapter.resident.runs)
        adapter.resident = None
        del self._resident[adapter.key]

    def _drop_if_unused(self, adapter: Adapter) -> None:
        if adapter.names or adapter.in_flight:
            return
        if adapter.resident is not None:
            self._evict(adapter)
        self._contents.pop(adapter.key, None)
