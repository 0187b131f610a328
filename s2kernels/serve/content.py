"""What an adapter is to a server: its content, laid out to be copied to the device in one piece."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from s2kernels.adapter import Slice

Place = tuple[str, str]  # a module and the dimension, "in" or "out", that is trained there


@dataclass(frozen=True, eq=False)
class Resident:
    """An adapter on the device: its rows of the pool, by entry and as runs, and their channels.

    rows and channels are int32 (R,). copied is when they and the rows are there, on a GPU.
    """

    runs: list[range]
    rows: Tensor
    channels: Tensor
    copied: "torch.cuda.Event | None"


@dataclass(eq=False)
class Adapter:
    """One content: R entries in all of its modules together, on the host and maybe on the device.

    key        hash of the slices
    ranges     of each module and dimension, its entries
    rows       (R, width), in the dtype of the pool; pinned for a GPU
    channels   int32 (R,)
    source     where its slices are, if `rows` does not hold them exactly
    bounds     int32 (num_places, 2): `ranges` by the numbers that a store has for places
    resident   where it is on the device, if it is
    loads      how often it was copied there
    in_flight  how many users it has at the moment
    """

    key: str
    ranges: dict[Place, range]
    rows: Tensor
    channels: Tensor
    source: Path | Mapping[str, Slice] | None
    bounds: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.int32))
    names: set[str] = field(default_factory=set)
    pins: set[str] = field(default_factory=set)
    resident: Resident | None = None
    loads: int = 0
    in_flight: int = 0

    @property
    def is_idle(self) -> bool:
        return not self.in_flight and not self.pins

    def slices_of_rows(self) -> dict[str, Slice]:
        """The slices that `rows` holds; they share its memory."""
        slices = {}
        for (module, dim), entries in self.ranges.items():
            delta = self.rows[entries.start : entries.stop]
            index = self.channels[entries.start : entries.stop]
            slices[module] = Slice(dim, index, delta.t() if dim == "in" else delta)
        return slices


def make_content(
    slices: Mapping[str, Slice],
    source: Path | Mapping[str, Slice],
    width: int,
    dtype: torch.dtype,
    pinned: bool,
) -> Adapter:
    """The content of slices whose channels are all `width` wide, for a pool of that dtype."""
    total = sum(part.index.numel() for part in slices.values())
    rows = torch.empty((total, width), dtype=dtype, device="cpu", pin_memory=pinned)
    ranges, start = {}, 0
    for module, part in slices.items():
        entries = ranges[module, part.dim] = range(start, start + part.index.numel())
        start = entries.stop
        delta = part.delta.detach()
        rows[entries.start : entries.stop].copy_(delta.t() if part.dim == "in" else delta)
    exact = all(part.delta.dtype == dtype for part in slices.values())
    channels = torch.cat([part.index.cpu() for part in slices.values()])
    return Adapter(content_key(slices), ranges, rows, channels, None if exact else source)


def content_key(slices: Mapping[str, Slice]) -> str:
    """A hash of modules, dimensions, positions and deltas: what identifies an adapter."""
    digest = hashlib.blake2b(digest_size=16)
    for module, part in sorted(slices.items()):
        delta = part.delta.detach()
        digest.update(f"{module}\0{part.dim}\0{delta.dtype}\0{tuple(delta.shape)}\0".encode())
        for tensor in (part.index, delta):
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
