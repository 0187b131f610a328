"""S2FT in the PEFT host: in-slices of R channels of o_proj and down_proj.

Sizes: M tokens, K hidden, F intermediate, a weight (N, K).
"""

from bench.ledger import Value
from bench.projections import swiglu
from bench.projections.plain import Plain


class S2FTUnfused(Plain):
    """The dense layers one by one, with d_delta of the two in-slices.

    Keeps a copy of the trained channels of x, (M, R), and nothing else of x.
    """

    additive = False

    def linear(self, x: Value, name: str) -> Value:
        budget = self.budget
        slices = {"o_proj": budget.heads * self.shape.head_dim, "down_proj": budget.channels}
        r = slices.get(name, 0)
        return self.sliced(x, name, r) if r else self.base(x, name)

    def sliced(self, x: Value, name: str, r: int) -> Value:
        book, size = self.book, self.itemsize
        n, k = self.weights[name].shape
        m = x.numel // k
        compact = book.new((m, r), size)
        self.before(n, r)
        book.run(2 * compact.nbytes)
        book.part = "linear"
        y = book.new((*x.shape[:-1], n), size, x)
        book.gemm(m, n, k, size)
        if x.grad:
            book.gemm(m, k, n, size, back=True)
        self.beside(m, n, r, needs_dx=x.grad)
        book.part = "slice"
        book.save(compact)
        y.grad = True
        self.gradient(m, n, r)
        book.send_grad(x)
        return y

    def before(self, n: int, r: int) -> None:
        """The delta (N, R), and in place, that it is written into the weight."""
        book, size = self.book, self.itemsize
        book.parameter((n, r), 4, trained=True)
        book.part = "slice"
        if not self.additive:
            book.run(n * r * (4 + 2 * size))  # base slice + delta, fp32, into the weight

    def beside(self, m: int, n: int, r: int, needs_dx: bool) -> None:
        """Additive, what the slice adds to y and to dx."""
        if not self.additive:
            return
        book, size = self.book, self.itemsize
        book.part = "slice"
        book.cast(book.new((n, r), 4), size)
        book.gemm(m, n, r, size, more=m * n * size)  # y is read, too
        if needs_dx:
            if size != 4:
                book.run_back(n * r * (4 + size))
            book.gemm(m, r, n, size, back=True, more=m * r * size)

    def gradient(self, m: int, n: int, r: int) -> None:
        """d_delta (N, R) from dy (M, N) and the trained channels (M, R)."""
        book, size = self.book, self.itemsize
        book.part = "slice"
        if book.device != "cpu":
            book.gemm(n, r, m, size, back=True, more=n * r * (4 - size))  # d_delta is fp32
            return
        if size != 4:  # plain torch accumulates in fp32 by casting both operands
            book.run_back(m * n * (size + 4))
            book.run_back(m * r * (size + 4))
        book.gemm(n, r, m, 4, back=True)
        book.run_back(2 * 4 * n * r)  # its transpose

    def working(self, tokens: int) -> int:
        return max(super().working(tokens), self.working_on_slice(tokens, self.shape.intermediate))

    def working_on_slice(self, tokens: int, beside: int) -> int:
        """In d_delta of down_proj in plain torch: fp32 casts of its operands, it and its transpose,
        `beside` numbers of a token more, and the gradients that come from above."""
        if self.book.device != "cpu":
            return 0
        hidden, channels = self.shape.hidden, self.budget.channels
        casts = 4 * (hidden + channels) if self.itemsize != 4 else 0
        each = self.itemsize * (beside + 2 * hidden) + casts
        return tokens * each + 2 * 4 * hidden * channels


class S2FTInplace(S2FTUnfused):
    """The FFN as one Function. On CUDA gate and up are one product, as are q and k, and q, k and v
    are one node of the backward; a BLAS on a CPU is slower at the wider product.

    Keeps gate and up, (M, F) each, and nothing else of the FFN; of o_proj the trained channels of
    x. The backward writes over gate and up, from which it makes h[:, S] anew.
    """

    def qkv(self, x: Value) -> list[Value]:
        book, size = self.book, self.itemsize
        if book.device == "cpu":
            return super().qkv(x)
        k = x.shape[-1]
        m = x.numel // k
        names = ("q_proj", "k_proj", "v_proj")
        nq, nk, nv = widths = [self.weights[name].shape[0] for name in names]
        for number, n in enumerate(widths if x.grad else ()):
            book.part = "linear"  # the products after the first add to dx
            book.gemm(m, k, n, size, back=True, more=m * k * size if number else 0)
        qk, v = (self.side_by_side(x, *together) for together in (names[:2], names[2:]))
        if x.grad:
            book.save(*(self.weights[name] for name in names))
        book.send_grad(x)
        return [*(book.view(qk, (*x.shape[:-1], n)) for n in (nq, nk)), v]

    def side_by_side(self, x: Value, *names: str) -> Value:
        """Frozen layers in one product, the biases copied into one: their outputs in one tensor."""
        book, size = self.book, self.itemsize
        n, k = sum(self.weights[name].shape[0] for name in names), x.shape[-1]
        biases = sum(self.biases[name].nbytes for name in names if name in self.biases)
        book.part = "linear"
        if biases:
            book.run(2 * biases)
        book.gemm(x.numel // k, n, k, size, more=biases)
        return book.new((*x.shape[:-1], n), size, x)

    def mlp(self, x: Value) -> Value:
        book, size, r = self.book, self.itemsize, self.budget.channels
        if not r:
            return super().mlp(x)
        n, f = self.weights["down_proj"].shape
        k = x.shape[-1]
        m = x.numel // k
        self.before(n, r)
        names = [("gate_proj",), ("up_proj",)]
        if book.device != "cpu":
            names = [("gate_proj", "up_proj")]
        gate_up = [self.side_by_side(x, *together) for together in names]
        swiglu.forward(book, m, f, size)
        book.part = "linear"
        book.gemm(m, n, f, size)
        if x.grad:
            book.gemm(m, f, n, size, back=True)
            for number, value in enumerate(gate_up):  # the second product adds to dx
                more = m * k * size if number else 0
                book.gemm(m, k, value.shape[-1], size, back=True, more=more)
        if self.additive and book.device == "cpu":
            book.run(2 * m * r * size)  # the trained channels of h
        self.beside(m, n, r, needs_dx=x.grad)
        book.part = "swiglu"
        book.save(*gate_up)
        if x.grad:
            swiglu.backward(book, m, f, r, size)
        else:
            swiglu.rebuild(book, m, r, size)
        self.gradient(m, n, r)
        book.send_grad(x)
        y = book.new((*x.shape[:-1], n), size)
        y.grad = True
        return y

    def working(self, tokens: int) -> int:
        size, shape, channels = self.itemsize, self.shape, self.budget.channels
        if not channels:
            return super().working(tokens)
        of_channel = swiglu.working(size, self.book.device == "cpu")
        ffn = of_channel * shape.intermediate + size * (2 * shape.hidden + channels)
        norm = 4 * 4 * shape.hidden  # as in Plain
        return max(tokens * max(ffn, norm), self.working_on_slice(tokens, 0))


class S2FTAdditive(S2FTInplace):
    """The base layer as it is; the slice's part is added to y and, where it is needed, to dx."""

    additive = True
