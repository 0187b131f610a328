"""Which tokens of a batch use which adapter, worked out once for all modules."""

from collections.abc import Sequence

import torch

from s2kernels.groups import Groups, order_tokens
from s2kernels.serve.content import Adapter
from s2kernels.serve.store import AdapterStore


class BatchPlan:
    """The groups of a batch of `sum(lengths)` tokens, in the order in which the model sees them.

    adapters, acquired and not yet released, and lengths: of each run of tokens, whose it is (None
    is the base) and how long. Made on the stream that the batch will run on.
    """

    def __init__(
        self, store: AdapterStore, adapters: Sequence[Adapter | None], lengths: Sequence[int]
    ) -> None:
        distinct = list({id(a): a for a in adapters if a is not None}.values())
        store.before_reading(distinct)
        number = {id(adapter): group for group, adapter in enumerate(distinct)}
        of_run = [-1 if adapter is None else number[id(adapter)] for adapter in adapters]
        group = torch.tensor(of_run, device="cpu").repeat_interleave(
            torch.tensor(lengths, device="cpu")
        )
        self._groups: list[Groups | None] = []
        if not distinct:
            return
        device = store.pool.rows.device
        tokens = order_tokens(group, len(distinct), device)
        places = max(len(adapter.bounds) for adapter in distinct)
        table = torch.zeros((places, len(distinct), 2), dtype=torch.int32, device="cpu")
        first, rows, channels = 0, [], []
        for group_number, adapter in enumerate(distinct):
            assert adapter.resident is not None, "adapters must be acquired"
            table[: len(adapter.bounds), group_number] = adapter.bounds + first
            first += len(adapter.rows)
            rows.append(adapter.resident.rows)
            channels.append(adapter.resident.channels)
        widest = (table[..., 1] - table[..., 0]).amax(1).tolist()
        on_device = table.to(device, non_blocking=True)
        all_rows, all_channels = torch.cat(rows), torch.cat(channels)
        self._groups = [
            Groups(tokens, bounds, all_rows, all_channels, size) if size else None
            for bounds, size in zip(on_device.unbind(), widest, strict=True)
        ]

    def groups(self, place: int) -> Groups | None:
        """Those of a place of the store; None where no adapter of the batch has entries."""
        return self._groups[place] if place < len(self._groups) else None


class Assignment:
    """Which adapter has which rows of a batch; it makes plans for the lengths that come up.

    adapters are those of the rows of a batch; each may stand for several rows that follow each
    other, as generate makes of one prompt for beams and several answers. With lengths, the batch
    has one row instead, in which they follow each other; tokens beyond are the base model's.
    """

    def __init__(
        self,
        store: AdapterStore,
        adapters: Sequence[Adapter | None],
        lengths: Sequence[int] | None = None,
    ) -> None:
        self._store, self._adapters, self._lengths = store, list(adapters), lengths
        self._plans: dict[tuple[int, int], BatchPlan] = {}
        # What these plans depend on: an adapter that was copied again may lie elsewhere.
        self.key = (
            tuple(None if a is None else (a.key, a.loads) for a in adapters),
            None if lengths is None else tuple(lengths),
        )

    def plan(self, num_rows: int, length: int) -> BatchPlan:
        """That of a batch of so many rows and tokens a row. ValueError if it cannot be this one."""
        plan = self._plans.get((num_rows, length))
        if plan is None:
            adapters, lengths = self._runs(num_rows, length)
            plan = self._plans[num_rows, length] = BatchPlan(self._store, adapters, lengths)
        return plan

    def _runs(self, num_rows: int, length: int) -> tuple[list[Adapter | None], list[int]]:
        if self._lengths is not None:
            rest = num_rows * length - sum(self._lengths)
            if rest < 0:
                raise ValueError(f"a batch of {sum(self._lengths)} tokens wanted, got {length}")
            return [*self._adapters, None], [*self._lengths, rest]
        times, rest = divmod(num_rows, len(self._adapters))
        if rest or not times:
            raise ValueError(
                f"the batch has {num_rows} rows, which is no multiple of the "
                f"{len(self._adapters)} adapters given"
            )
        return self._adapters, [times * length] * len(self._adapters)
