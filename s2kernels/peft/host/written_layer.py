"""What the keeper of the weights asks of a layer, and of what arranges weights in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from s2kernels.peft.host.loading import KnownAdapters
from s2kernels.peft.host.premises import Premises


@dataclass
class Held:
    """What an adapter took the place of in one weight.

    weight: the Parameter that was written to; the layer may have been given another since.
    where: the channels or entries; base: what the weight held there; delta: what was added to it.
    written: the version and address of the delta that a backward has written into the weight along
    with it (`Holding.writing`); None where that is a forward's to do.
    """

    adapter: str
    weight: Tensor
    where: Any
    base: Tensor
    delta: Tensor
    written: tuple[int, int] | None = None

    def is_current(self) -> bool:
        """Whether a backward has written the delta as it is now."""
        delta = self.delta
        return self.written is not None and self.written == (delta._version, delta.data_ptr())


class WrittenLayer(Protocol):
    """A layer whose weight is written to. It describes itself, and holds nothing of its weight.
    `AdapterLayer` says what the methods without a text do.
    """

    name: str
    known: KnownAdapters

    @property
    def weight(self) -> Tensor: ...

    @property
    def merged(self) -> bool: ...

    @property
    def deltas(self) -> nn.ParameterDict: ...

    def written_adapter(self) -> str | None: ...

    def take(self, adapter: str) -> Held:
        """A copy of what the weight holds where the adapter's values lie."""

    def entries(self, held: Held, delta: Tensor | None) -> list[tuple]:
        """Arguments of the writing op: base + delta, or for None base alone, into held.weight."""

    def operands(self, adapter: str) -> tuple[Tensor, ...] | None: ...

    def note(self, premises: Premises, adapter: str | None) -> None: ...

    def locate(self) -> None: ...


class Arrangement(Protocol):
    """How the weights of a model lie in memory: the order of their channels, and beside which.

    engaged: whether that is as the layers want it. moved: whether channels are in another order
    than in the checkpoint. heads: by structure, the order of heads that are moved; it is replaced,
    never changed.
    """

    engaged: bool
    heads: dict[str, list[list[int]]]

    @property
    def moved(self) -> bool: ...

    @property
    def intact(self) -> bool:
        """Whether what was reordered is still there, and nothing of others lies beside it."""

    def note(self, premises: Premises) -> None:
        """Note what was reordered."""

    def put_back_copies(self, state: dict[str, Any]) -> None:
        """Put copies in the order of the checkpoint in the place of weights in a state_dict."""

    def moves(self, layers: Sequence[Any]) -> bool:
        """Whether `engage` puts channels into another order."""

    def engage(self, layers: Sequence[Any], why_not: str | None, whole: bool) -> None:
        """Bring the channels into the order that the layers want. whole: before a forward of the
        whole model, and not of a part.
        """

    def release(self) -> bool:
        """Undo all of it. Whether there was anything to undo."""
