"""A forward and its backward, written down with sizes in the place of numbers.

A `Ledger` offers the operators that a Llama is made of. Called on `Value`s, which have a shape but
no content, each one books what eager PyTorch does for it:

- the tensors that autograd keeps for the backward, as whole storages counted once, which is how
  `bench.memory.kept_by` counts them. The rules are those of PyTorch's derivative formulas: a factor
  is kept if the *other* one needs a gradient, a sum keeps nothing, a softmax keeps its result;
- the kernels of the forward and of the backward, with their FLOPs (two for a multiply and an add)
  and the bytes of their operands and results. A tensor that two operators use gets two gradients,
  whose sum is one more kernel.

Sums over a ledger are therefore closed formulas in the sizes, in the order of the model's source.
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
    part: the name that everything booked from now on goes under.
    """

    device: str = "cpu"
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

    # Bookkeeping

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

    # Pointwise operators

    def cast(self, x: Value, itemsize: int) -> Value:
        """x.to(dtype): nothing where it has that size already. Keeps nothing."""
        if x.itemsize == itemsize:
            return x
        y = self.new(x.shape, itemsize, x)
        self.run(x.nbytes + y.nbytes)
        if x.grad:
            self.run_back(x.nbytes + y.nbytes)
        self.send_grad(x)
        return y

    def add(self, a: Value, b: Value) -> Value:
        """a + b of one shape, in the wider dtype. Keeps nothing; both get the same gradient."""
        y = self.new(a.shape, max(a.itemsize, b.itemsize), a, b)
        self.run(a.nbytes + b.nbytes + y.nbytes)
        for x in (a, b):
            if x.grad and x.itemsize != y.itemsize:
                self.run_back(x.nbytes + y.nbytes)
        self.send_grad(a, b)
        return y

    def mul(self, a: Value, b: Value) -> Value:
        """a * b for a shaped like the result and b broadcast to it. Keeps the factors."""
        y = self.new(a.shape, max(a.itemsize, b.itemsize), a, b)
        if b.grad:
            self.save(a)
        if a.grad:
            self.save(b)
        self.run(a.nbytes + b.nbytes + y.nbytes)
        if a.grad:
            self.run_back(y.nbytes + b.nbytes + y.nbytes)
        if b.grad:
            self.run_back(y.nbytes + a.nbytes + y.nbytes)
            if b.numel < y.numel:
                self.run_back(y.nbytes + b.nbytes)
        self.send_grad(a, b)
        return y

    def scale(self, x: Value) -> Value:
        """x times, plus or to the power of a number of which nothing needs to be kept."""
        y = self.new(x.shape, x.itemsize, x)
        self.run(2 * x.nbytes)
        if x.grad:
            self.run_back(2 * x.nbytes)
        self.send_grad(x)
        return y

    def rms_norm(self, x: Value, weight: Value) -> Value:
        """weight * x / rms(x) in the operators of transformers, computed in fp32.

        Keeps x in fp32 (square and product), 1 / rms of every row in fp32 (its own result, and the
        product), and where weight is trained, the normed x in the dtype of x.
        """
        x32 = self.cast(x, 4)
        rows = (*x.shape[:-1], 1)
        square = self.new(x.shape, 4, x32)
        if x32.grad:
            self.save(x32)
        self.run(2 * x32.nbytes)
        mean = self.new(rows, 4, x32)
        self.run(square.nbytes + mean.nbytes)
        self.run(2 * mean.nbytes)  # + eps
        self.run(2 * mean.nbytes)
        inverse = self.new(rows, 4, mean)
        if x32.grad:
            self.save(inverse)
            for operands in (2, 2, 3):  # -1/2 dy y³
                self.run_back(operands * mean.nbytes)
            self.run_back(mean.nbytes + square.nbytes)  # of the mean, spread over the row
            for operands in (2, 2, 3):  # 2 x¹ dy
                self.run_back(operands * square.nbytes)
            self.send_grad(x32)
        return self.mul(self.cast(self.mul(x32, inverse), x.itemsize), weight)

    def rotate(self, x: Value, cos: Value, sin: Value) -> Value:
        """x cos + rotate_half(x) sin; cos and sin (length, head_dim) are kept."""
        half = x.nbytes // 2
        first = self.mul(x, cos)
        self.run(2 * half)  # -x2
        turned = self.new(x.shape, x.itemsize, x)
        self.run(2 * x.nbytes)  # its concatenation with x1
        if x.grad:
            self.run_back(2 * half)
            for _ in range(2):  # a half, filled up with zeros
                self.run_back(half + x.nbytes)
        self.send_grad(x, x)
        return self.add(first, self.mul(turned, sin))

    def silu(self, x: Value) -> Value:
        """Keeps x."""
        y = self.new(x.shape, x.itemsize, x)
        if x.grad:
            self.save(x)
            self.run_back(3 * x.nbytes)
        self.run(2 * x.nbytes)
        self.send_grad(x)
        return y

    def copy_back(self, x: Value) -> Value:
        """A view whose gradient comes in another layout, and has to be copied into x's."""
        if x.grad:
            self.run_back(2 * x.nbytes)
        return x

    # Matrix products, attention, embedding, loss

    def gemm(
        self, m: int, n: int, k: int, itemsize: int, back: bool = False, more: int = 0
    ) -> None:
        """(m, k) times (k, n): operands are read, the result written, once; `more` bytes too."""
        nbytes = (m * k + k * n + m * n) * itemsize + more
        kernels = self.backward if back else self.forward
        kernels.append(Kernel("gemm", self.part, 2 * m * n * k, nbytes, itemsize))

    def linear(self, x: Value, weight: Value, bias: Value | None = None) -> Value:
        """x weightᵀ + bias for weight (N, K), bias (N,). Keeps x if weight is trained."""
        n, k = weight.shape
        m = x.numel // k
        y = self.new((*x.shape[:-1], n), x.itemsize, x, weight)
        if weight.grad:
            self.save(x)
        if x.grad:
            self.save(weight)
        self.gemm(m, n, k, x.itemsize, more=bias.nbytes if bias else 0)
        if x.grad:
            self.gemm(m, k, n, x.itemsize, back=True)
        if weight.grad:
            self.gemm(n, k, m, x.itemsize, back=True)
        if bias and bias.grad:
            self.run_back(y.nbytes + bias.nbytes)
        self.send_grad(x, weight)
        return y

    def attention(self, q: Value, k: Value, v: Value, efficient: bool = False) -> Value:
        """Causal attention by a flash-like kernel: (B, H, L, D), with fewer heads in k and v.

        Keeps q, k, v, the result and the logsumexp of every row in fp32. On CUDA the state of the
        random generator as well, 24 bytes (flash) or 16 (efficient, which rounds the rows up to a
        multiple of 32). FLOPs are those at or below the diagonal.
        """
        batch, heads, length, head_dim = q.shape
        y = self.new(q.shape, q.itemsize, q, k, v)
        rows = -(-length // 32) * 32 if efficient else length
        logsumexp = self.new((batch, heads, rows), 4, q)
        operands = q.nbytes + k.nbytes + v.nbytes + y.nbytes + logsumexp.nbytes
        product = batch * heads * length * (length + 1) * head_dim
        if y.grad:
            self.save(q, k, v)
        self.forward.append(Kernel("attention", self.part, 2 * product, operands, q.itemsize))
        if y.grad:
            self.save(y, logsumexp)
            if self.device == "cuda":
                self.save(self.new((2 if efficient else 3,), 8))
            operands += y.nbytes + q.nbytes + k.nbytes + v.nbytes  # their gradients
            self.backward.append(Kernel("attention", self.part, 5 * product, operands, q.itemsize))
        self.send_grad(q, k, v)
        return y

    def embedding(self, tokens: Value, table: Value) -> Value:
        """Rows of table (V, h). Keeps the tokens, which are the batch itself, if it is trained."""
        y = self.new((*tokens.shape, table.shape[1]), table.itemsize, table)
        if table.grad:
            self.save(tokens)
        self.run(tokens.nbytes + 2 * y.nbytes)
        if table.grad:
            self.run_back(tokens.nbytes + 2 * y.nbytes + table.nbytes)
        self.send_grad(table)
        return y

    def cross_entropy(self, logits: Value) -> Value:
        """The mean over all tokens of the next-token loss, in fp32.

        Keeps the log-probabilities in fp32, the labels shifted by one, int64, and the count of the
        tokens, fp32. Shifted labels of one sequence are a view of the padded ones, with one more.
        """
        batch, length, _ = logits.shape
        tokens = batch * length
        logits32 = self.cast(logits, 4)
        self.run(8 * batch * (2 * length + 1))  # padded
        if batch == 1:
            labels = self.new((length + 1,), 8)
        else:
            labels = self.new((tokens,), 8)
            self.run(2 * labels.nbytes)
        log_probabilities = self.new(logits.shape, 4, logits32)
        self.run(2 * logits32.nbytes)
        loss = self.new((), 4, logits32)
        if logits.grad:
            self.save(log_probabilities, labels)
        self.run((8 + 4) * tokens)  # one number of every row
        if logits.grad:
            self.save(self.new((), 4))
            self.run_back(logits32.nbytes + 8 * tokens)  # zeros, but for one number of every row
            self.run_back(3 * logits32.nbytes)
        self.send_grad(logits32)
        return loss
