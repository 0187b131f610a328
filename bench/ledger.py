"""What a forward and its backward keep and run, written down with sizes in the place of numbers.

A `Ledger` is what the operators of `bench.operators` book on:

- the tensors that autograd keeps for the backward, as whole storages counted once, which is how
  `bench.memory.kept_by` counts them;
- the kernels of the forward and of the backward, with their FLOPs (two for a multiply and an add)
  and the bytes of their operands and results. A tensor that two operators use gets two gradients,
  whose sum is one more kernel.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod


@dataclass(eq=False)
class Storage:
    """held: alive before the forward began, as parameters and buffers are; never counted."""

    nbytes: int
    held: bool = False


@dataclass(eq=False)
class Value:
    """A tensor without content. grad: whether it needs a gradient."""

    shape: tuple[int, ...]
    itemsize: int
    grad: bool
    storage: Storage
    users: int = 0  # operators that send it a gradient

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize


@dataclass(frozen=True)
class Kernel:
    """kind: "gemm", "attention" or "pointwise"; part: what it belongs to, such as "norm".

    itemsize: of the numbers that a gemm or an attention multiplies.
    """

    kind: str
    part: str
    flops: int
    nbytes: int
    itemsize: int = 4


@dataclass
class Ledger:
    """What was booked so far.

    device: "cpu" or "cuda", which decides what the attention keeps and how slices are handled;
    fused: whether norms, RoPE and the loss are liger-kernel's; part: the name that everything
    booked from now on goes under.
    """

    device: str = "cpu"
    fused: bool = False
    part: str = ""
    saved: dict[Storage, str] = field(default_factory=dict)  # and the part that kept it first
    alive: set[Storage] = field(default_factory=set)  # kept by other means than autograd's
    trained: list[Value] = field(default_factory=list)
    forward: list[Kernel] = field(default_factory=list)
    backward: list[Kernel] = field(default_factory=list)
    marks: list[tuple[int, int]] = field(default_factory=list)  # see mark
    working: int = 0  # bytes alive within the backward of a layer besides what is kept
    making: int = 0  # the same within the forward of a layer
    recomputed: int = 0  # bytes kept by the checkpointed region that keeps most, when it is rerun
    _last_save: int = 0  # kernels of the forward that ran before the last tensor was kept

    def parameter(self, shape: tuple[int, ...], itemsize: int, trained: bool) -> Value:
        value = Value(shape, itemsize, trained, Storage(prod(shape) * itemsize, held=True))
        if trained:
            self.trained.append(value)
        return value

    def new(self, shape: tuple[int, ...], itemsize: int, *sources: Value) -> Value:
        """A result, which needs a gradient if a source does."""
        grad = any(source.grad for source in sources)
        return Value(shape, itemsize, grad, Storage(prod(shape) * itemsize))

    def view(self, x: Value, shape: tuple[int, ...]) -> Value:
        """The same storage under another shape; its gradient costs nothing."""
        return Value(shape, x.itemsize, x.grad, x.storage)

    def save(self, *values: Value) -> None:
        """Keeps tensors for the backward.

        Autograd does so before it runs an operator, the result's apart. Where a forward is run
        again for a checkpoint, it stops at the last one, a parameter or not.
        """
        self._last_save = len(self.forward)
        for value in values:
            if not value.storage.held:
                self.saved.setdefault(value.storage, self.part)

    def hold(self, *values: Value) -> None:
        """Keeps a tensor alive without autograd, on a leaf or in the arguments of a checkpoint."""
        self.alive.update(value.storage for value in values)

    def run(self, nbytes: int) -> None:
        """A pointwise kernel, a copy or a sum, of the forward."""
        self.forward.append(Kernel("pointwise", self.part, 0, nbytes))

    def run_back(self, nbytes: int) -> None:
        """The same in the backward."""
        self.backward.append(Kernel("pointwise", self.part, 0, nbytes))

    def send_grad(self, *values: Value) -> None:
        """An operator's backward gives each of these a gradient, if it needs one."""
        for value in values:
            if value.grad:
                value.users += 1
                if value.users > 1:
                    self.run_back(3 * value.nbytes)

    def saved_bytes(self) -> int:
        return sum(storage.nbytes for storage in self.saved)

    def mark(self) -> None:
        """Notes (saved bytes, gradient bytes) of all that was booked so far."""
        self.marks.append((self.saved_bytes(), self.gradient_bytes()))

    def gradient_bytes(self) -> int:
        return sum(value.nbytes for value in self.trained)

    def unseen_bytes(self) -> int:
        return sum(storage.nbytes for storage in self.alive - self.saved.keys())

    def saved_by_part(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for storage, part in self.saved.items():
            sizes[part] = sizes.get(part, 0) + storage.nbytes
        return sizes

    def checkpoint(self, region: Callable[[Value], Value], x: Value) -> Value:
        """Runs `region` on x as torch.utils.checkpoint does, without reentrance.

        Only x is kept. The backward runs the forward again, up to where the last tensor that it
        needs has been made.
        """
        self.save(x)
        outer, self.saved = self.saved, {}
        start = len(self.forward)
        y = region(x)
        self.backward += self.forward[start : self._last_save]
        inner = sum(storage.nbytes for storage in self.saved if storage not in outer)
        self.recomputed = max(self.recomputed, inner)
        self.saved = outer
        return y
