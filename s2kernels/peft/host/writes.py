"""What is written into the weights of one model at a time."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from s2kernels.peft.host.kept_buffers import has_values

# Of entries that are all on one device: what writes them, as often as it is called, while their
# tensors stay where they lie in memory.
Writer = Callable[[list[tuple]], Callable[[], None]]


class Writes:
    """Entries of layers, see `WrittenLayer.entries`. `write` takes one launch a device, and looks
    things up anew only where a tensor has moved.
    """

    def __init__(self, entries: Iterable[tuple], writer: Writer) -> None:
        devices: dict[torch.device, list[tuple]] = {}
        for entry in entries:
            devices.setdefault(entry[0].device, []).append(entry)
        self._entries, self._writer = list(devices.values()), writer
        parts = (part for each in self._entries for entry in each for part in entry)
        self._tensors = [part for part in parts if isinstance(part, Tensor)]
        self._have_addresses = all(
            has_values(tensor) and not is_functorch_wrapped_tensor(tensor)
            for tensor in self._tensors
        )
        self._prepared: list[Callable[[], None]] = []
        self._places: list[tuple[int, ...]] | None = None

    def write(self) -> None:
        """Write them as they are now."""
        if torch.compiler.is_compiling() or not self._have_addresses:
            for entries in self._entries:
                self._writer(entries)()
            return
        places = [(tensor.data_ptr(), *tensor.stride()) for tensor in self._tensors]
        if places != self._places:
            with torch.inference_mode(False):  # what is made there cannot be written to elsewhere
                self._prepared = [self._writer(entries) for entries in self._entries]
            self._places = places
        for write in self._prepared:
            write()
