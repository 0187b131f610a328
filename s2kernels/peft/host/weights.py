"""The keeper: what the weights of one model hold at any time, and the way back to W0.

Two things are done to weights, and both are undone bit for bit:

    adapters     W0 + delta is written where an adapter is trained in place
    arrangement  channels are reordered (layout "permute"), weights are laid one after the other

A forward of the whole model writes every such adapter, by one launch a device. A layer that is used
outside of one, and a backward, ask for what they need. `state_dict`, `load_state_dict`, unloading
and deleting an adapter restore W0 and undo the arrangement. A disabled adapter and an exception in
a forward restore W0.

Threads: one lock guards all that is written. Whatever restores weights waits until no other thread
is inside a forward of the model.
"""

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from threading import get_ident
from typing import Any

from torch import Tensor, nn

from s2kernels.capturing import is_capturing
from s2kernels.coupling import not_plain
from s2kernels.peft.host.forwards import Forwards
from s2kernels.peft.host.obstacles import Obstacles
from s2kernels.peft.host.premises import Premises
from s2kernels.peft.host.sharding import check_not_partitioned
from s2kernels.peft.host.writes import Writer, Writes
from s2kernels.peft.host.written_layer import Arrangement, Held, WrittenLayer


class WeightKeeper:
    """Keeper of the base weights of one model, which is the one that PEFT injects into.

    writer:  of the entries of layers; see `Writes`
    arrangement: None where weights are never arranged otherwise than in the checkpoint
    changes: counts the changes of what a forward does. Whoever has prepared a call compares it.
    """

    def __init__(
        self, model: nn.Module, writer: Writer, arrangement: Arrangement | None = None
    ) -> None:
        self.model, self._writer, self.arrangement = model, writer, arrangement
        self.forwards = Forwards()
        self.obstacles = Obstacles(model)
        self.hooks: Any = None  # those on the model while it is attached
        self.layers: list[Any] = []  # each is a WrittenLayer
        self.called: set[Any] = set()  # the layers that a forward has called
        self.attached, self.changes = False, 0
        # by adapter: its configuration, and what this model made of it (`AdapterConfig.resolved`)
        self.configs: dict[str, Any] = {}
        self.resolved: dict[str, dict[str, tuple[Any, Any]]] = {}
        self.held_by_layer: dict[WrittenLayer, Held] = {}  # of those that hold an adapter
        self.merged: dict[WrittenLayer, list[Held]] = {}  # what merged adapters took the place of
        self._weights: dict[WrittenLayer, Tensor] = {}  # when they were last looked at
        self.writes: Writes | None = None  # of a forward; None until that is decided
        self._premises = Premises()  # of that, and of the calls that are prepared

    def __getstate__(self) -> dict:
        return self.__dict__ | {"writes": None, "_premises": Premises()}  # a copy has other tensors

    def changed(self) -> None:
        """What decides what a forward does, or what weights hold, has changed."""
        self.writes = None  # first, lest an interrupt leave what is out of date
        self.changes += 1
        self._premises = Premises()

    def expect(self, premises: Premises) -> None:
        """A call that is prepared now takes these for granted."""
        if not self.obstacles.sharded:  # FSDP2 exchanges weights inside of a forward
            with self.forwards.lock:
                self._premises.include(premises)

    def is_up_to_date(self, call: Any) -> bool:
        """Whether a prepared call, or None, is what would be prepared now, by its own premises."""
        if call is None or call.changes != self.changes:
            return False
        if not (holds := call.premises.hold()) and not self.obstacles.sharded:
            self.changed()
        return holds

    # Its life

    def attach(self, layers: Iterable[Any]) -> None:
        """Take charge of `layers`: all layers of this tuner in the model."""
        self.layers = list(layers)
        self.obstacles.look()
        self._weights = {layer: layer.weight for layer in self.layers}
        self.attached = True
        self.changed()

    def detach(self) -> None:
        """Restore the weights, and be in charge of nothing any more."""
        self.release()
        if self.arrangement is not None:
            self.arrangement.engaged = False  # other layers may want another one
        self.attached = False
        self.changed()

    # First verb: an adapter is written

    def is_ready(self, call: Any) -> bool:
        """Whether a prepared call, or None, may run as it is: nothing has changed since, and the
        forward that this thread is in has looked at its premises and written what it wants.
        """
        up_to_date = call is not None and call.changes == self.changes
        return up_to_date and get_ident() in self.forwards.plain

    def are_ready(self, adapters: Mapping[Any, str | None]) -> bool:
        """Whether the forward that this thread is in has written these adapters of layers, or for
        None whether the weight holds W0.
        """
        return self._hold(adapters) and (self.forwards.here or not any(adapters.values()))

    def _hold(self, adapters: Mapping[Any, str | None]) -> bool:
        """Whether the weights of these layers hold these adapters, or for None W0."""
        for layer, adapter in adapters.items():
            held = self.held_by_layer.get(layer)
            if held is None:
                if adapter is not None:
                    return False
            elif held.adapter != adapter or held.weight is not layer.weight:
                return False
            elif held.delta is not layer.deltas[adapter]:
                return False
        return True

    def begin(self) -> None:
        """A forward of the model begins in this thread: write what it needs."""
        with self.forwards.lock:
            is_first, is_mixed = not self.forwards.here, self.forwards.rows is not None
            if is_first:
                if not self._premises.hold():
                    self.changed()
                if is_mixed:
                    self.restore()
                elif self.writes is None:
                    self.prepare()
                self.write()
            self.forwards.enter(is_first and not (is_mixed or self.obstacles.sharded))

    def write(self) -> None:
        """Write what was decided, as it is now; nothing where a backward has written all of it."""
        held = self.held_by_layer.values()
        # a CUDA graph writes in any case: replays do not ask who has changed a delta
        is_current = held and all(each.is_current() for each in held) and not is_capturing()
        if self.writes is not None and not is_current:
            self.writes.write()

    def end(self, failed: bool) -> None:
        """It ends. One that has failed leaves W0 behind, unless other threads are inside one."""
        with self.forwards.lock:
            if self.forwards.leave() and failed:
                self.restore()

    def ensure_written(self, adapters: dict[Any, str | None]) -> None:
        """The weights of the layers hold these adapters, as they are now, or for None W0: of layers
        used outside of a forward of the model, or restored inside of one. The caller has the lock.
        """
        if any(adapters.values()):
            self._engage(whole=False)
        self._take(adapters).write()

    def prepare(self) -> None:
        """Decide what a forward writes, and arrange the weights for it; torch.compile cannot."""
        self._notice_changes()
        for layer in self.layers:
            layer.known.look()
        with self.forwards.alone():
            self._engage()
            adapters = {layer: layer.written_adapter() for layer in self.layers}
            writes = self._take(adapters)
        if self.arrangement is not None:
            self.arrangement.note(self._premises)
        for layer in self.layers:
            layer.note(self._premises, adapters[layer])
        self.writes = writes

    def _take(self, adapters: Mapping[Any, str | None]) -> Writes:
        """What writes these adapters, once what they take the place of is kept; of layers with None
        W0 is restored.
        """
        holding = self.held_by_layer
        self.restore([layer for layer, name in adapters.items() if not self._hold({layer: name})])
        names = {layer: name for layer, name in adapters.items() if name is not None}
        if new := [layer for layer in names if layer not in holding]:
            holding.update([(layer, layer.take(names[layer])) for layer in new])
            self.changed()
        entries = (layer.entries(holding[layer], holding[layer].delta) for layer in names)
        return Writes(chain.from_iterable(entries), self._writer)

    def _notice_changes(self) -> None:
        """Look at the model again: FSDP2 comes after the adapter was made, and anybody may assign a
        weight.

        Raises ValueError for weights that DeepSpeed ZeRO-3 has partitioned, and RuntimeError for
        those that were sharded while they held what was trained.
        """
        check_not_partitioned(layer.weight for layer in self.layers)
        self._look()
        if self.arrangement is not None and not self.arrangement.intact:
            self.release()
        for layer in self.layers:
            self.notice_weight(layer)

    def _look(self) -> None:
        self.obstacles.look()
        held = self.held_by_layer or (self.arrangement is not None and self.arrangement.moved)
        if held and self.obstacles.sharded:
            raise RuntimeError(
                "the model was sharded after its first forward, while the weights held what was "
                "trained: shard it before, or call state_dict() first"
            )

    def notice_call(self, layer: WrittenLayer) -> None:
        """A layer is called, perhaps not from the forward of the model: then nobody has looked
        whether FSDP2 has come. Where it has, the weight is another one. Raises RuntimeError as
        `prepare` does.
        """
        if layer.weight is not self._weights.get(layer) and not self.obstacles.sharded:
            self._look()
        self.called.add(layer)
        self.notice_weight(layer)

    def notice_weight(self, layer: WrittenLayer) -> None:
        """A layer whose dense weight is another one than it was has another base."""
        before, now = self._weights.get(layer), layer.weight
        if before is None or before is now:
            return
        self._weights[layer] = now
        if not self.obstacles.sharded and not (not_plain(before) or not_plain(now)):
            layer.known.look(loaded=True)

    # Second verb: restore

    def restore(self, layers: Iterable[Any] | None = None) -> None:
        """Put W0 back into the weights of these layers, by default of all."""
        with self.forwards.lock:
            asked = self.layers if layers is None else layers
            found = [layer for layer in asked if layer in self.held_by_layer]
            if not found:
                return
            with self.forwards.alone():
                each = [layer.entries(self.held_by_layer[layer], None) for layer in found]
                Writes(chain.from_iterable(each), self._writer).write()
                self.changed()  # before they are forgotten, lest an interrupt keep `writes`
                for layer in found:
                    del self.held_by_layer[layer]

    def release(self) -> None:
        """Give the weights back as they were: W0, in the order of the checkpoint, each in a storage
        of its own.

        Raises RuntimeError in the middle of a forward over permuted weights: the layers still to
        come would not be in the order of those that went before.
        """
        arrangement = self.arrangement
        moved = arrangement is not None and arrangement.moved
        if moved and self.forwards.here:
            raise RuntimeError(
                "the base weights cannot be given back inside a forward, by a merge in a hook "
                "for one: call it after the forward, or use layout='gather'"
            )
        with self.forwards.alone():
            self.restore()
            if arrangement is None:
                return
            try:
                if arrangement.release():
                    self.changed()
            finally:
                if moved:
                    self._locate()

    def _engage(self, whole: bool = True) -> None:
        """Bring the weights into the working basis, if there is one and nothing is merged."""
        if self.arrangement is None or self.arrangement.engaged or self.merged:
            return
        try:
            self.arrangement.engage(self.layers, self.obstacles.of(self.layers[0].weight), whole)
        finally:
            if self.arrangement.moved:
                self._locate()

    def _locate(self) -> None:
        for layer in self.layers:
            layer.locate()
        self.changed()

    # Merged adapters

    def merge(self, layer: WrittenLayer, adapter: str) -> None:
        """Write base + delta into the layer's weight, rounded once, until `unmerge`."""
        with self.forwards.alone():
            self.release()
            held = layer.take(adapter)
            Writes(layer.entries(held, held.delta), self._writer).write()
            self.merged.setdefault(layer, []).append(held)
            self.changed()

    def unmerge(self, layer: WrittenLayer) -> None:
        """Undo the last `merge` of the layer: the weight is what it was before, bit for bit."""
        with self.forwards.alone():
            held = self.merged[layer].pop()
            self.merged = {layer: each for layer, each in self.merged.items() if each}
            Writes(layer.entries(held, None), self._writer).write()
            self.changed()

    # Weights that move, or are laid out otherwise

    def moving(self, layer: WrittenLayer) -> None:
        """The layer's weight is about to be moved or cast."""
        held = self.held_by_layer.get(layer)
        if held is not None and held.weight is not layer.weight:
            self.restore([layer])

    def moved(self, layer: WrittenLayer, before: Tensor, fn: Callable[[Tensor], Tensor]) -> None:
        """The layer's weight, which was `before`, was moved or cast by fn."""
        held = self.held_by_layer.get(layer)
        for each in [*([held] if held is not None else []), *self.merged.get(layer, [])]:
            each.base = fn(each.base)
            if isinstance(each.where, Tensor):
                each.where = fn(each.where)
            if each.weight is before:
                each.weight = layer.weight
        if self._weights.get(layer) is before:
            self._weights[layer] = layer.weight
        self.changed()
