"""The linear layers of `bench.methods.lora_fused`. Sizes: a weight (N, K), r the rank."""

from bench.ledger import Value
from bench.projections import swiglu
from bench.projections.plain import Plain


class LoRAFused(Plain):
    """`bench.methods.lora_fused`: stacks of layers that read the same x, and one FFN Function.

    Keeps x and x A of q, k, v together; x and x A of o_proj; of the FFN x, gate, up, x A and h A.
    On CUDA q and k are one product of the forward, and gate and up one of forward and backward; a
    BLAS on a CPU is slower at the wider product.
    """

    def stack(
        self, x: Value, *products: tuple[str, ...], keep: bool = True, whole: bool = False
    ) -> list[Value]:
        """Layers that read x, those of one of `products` in one product of the forward.

        keep: whether x and x A are kept; whole: whether dx has the products of the forward, too.
        """
        book, size, rank = self.book, self.itemsize, self.budget.rank
        widths = [[self.weights[name].shape[0] for name in names] for names in products]
        k = self.weights[products[0][0]].shape[1]
        ranks = rank * sum(len(group) for group in widths)
        m = x.numel // k
        low = book.new((m, ranks), size)
        book.parameter((ranks, k), size, trained=True)
        book.parameter((rank, sum(map(sum, widths))), size, trained=True)
        book.part = "linear"
        for names, group in zip(products, widths, strict=True):
            biases = sum(self.biases[name].nbytes for name in names if name in self.biases)
            book.gemm(m, sum(group), k, size, more=biases)
        book.part = "adapter"
        book.gemm(m, ranks, k, size)
        layers = [n for group in widths for n in group]
        for n in layers:
            book.gemm(m, n, rank, size, more=m * n * size)
            book.gemm(m, rank, n, size, back=True)  # d(x A)
            book.gemm(rank, n, m, size, back=True)  # dB
        book.part = "linear"
        dx_parts = list(map(sum, widths)) if whole else layers
        for number, n in enumerate(dx_parts if x.grad else ()):  # after the first they add to dx
            book.gemm(m, k, n, size, back=True, more=m * k * size if number else 0)
        book.part = "adapter"
        book.gemm(ranks, k, m, size, back=True)  # dA
        if x.grad:
            book.gemm(m, k, ranks, size, back=True, more=m * k * size)
        if keep:
            book.save(x, low)
        ys = [book.new((*x.shape[:-1], n), size, x) for group in widths for n in group]
        for y in ys:
            y.grad = True
        book.send_grad(x)
        return ys

    def qkv(self, x: Value) -> list[Value]:
        return self.stack(x, *self.together("q_proj", "k_proj"), ("v_proj",))

    def together(self, *names: str) -> list[tuple[str, ...]]:
        """The products that `names` are: one, or on a CPU one each."""
        return [(name,) for name in names] if self.book.device == "cpu" else [names]

    def o(self, x: Value) -> Value:
        return self.stack(x, ("o_proj",))[0]

    def mlp(self, x: Value) -> Value:
        book = self.book
        gate, up = self.stack(x, *self.together("gate_proj", "up_proj"), whole=True)
        h = book.new(gate.shape, self.itemsize, gate)
        m, f = h.numel // h.shape[-1], h.shape[-1]
        swiglu.forward(book, m, f, self.itemsize)
        swiglu.backward(book, m, f, f, self.itemsize)
        (y,) = self.stack(h, ("down_proj",), keep=False)
        low = book.new((m, self.budget.rank), self.itemsize)
        book.save(gate, up, low)
        return y

    def working(self, tokens: int) -> int:
        """Besides what SwiGLU works with, h: dgate and dup take the place of gate and up."""
        size = self.itemsize
        each = size + swiglu.working(size, self.book.device == "cpu")
        return tokens * (each * self.shape.intermediate + 2 * size * self.shape.hidden)
