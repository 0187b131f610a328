"""The linear layers of one decoder layer on a `bench.ledger.Ledger`, as each method has them.

Sizes: M tokens, a weight (N, K), r the rank of an adapter, R the channels of a slice.
"""

from bench.ledger import Ledger, Value
from bench.methods import Budget
from bench.methods.budget import entries_in_all, entries_of_layers
from bench.shapes import Shape


class Plain:
    """The linear layers as the model has them. trained: their weights; biases: their biases."""

    def __init__(
        self,
        book: Ledger,
        shape: Shape,
        budget: Budget,
        itemsize: int,
        trained: bool = False,
        trained_biases: bool = False,
    ) -> None:
        self.book, self.shape, self.budget, self.itemsize = book, shape, budget, itemsize
        biased = ("q_proj", "k_proj", "v_proj") if shape.model_type == "qwen2" else ()
        sizes = shape.linears()
        self.weights = {name: book.parameter(sizes[name], itemsize, trained) for name in sizes}
        self.biases = {
            name: book.parameter(sizes[name][:1], itemsize, trained_biases) for name in biased
        }

    def linear(self, x: Value, name: str) -> Value:
        return self.base(x, name)

    def base(self, x: Value, name: str) -> Value:
        """The layer as the model has it, under any method."""
        self.book.part = "linear"
        return self.book.linear(x, self.weights[name], self.biases.get(name))

    def qkv(self, x: Value) -> list[Value]:
        return [self.linear(x, name) for name in ("q_proj", "k_proj", "v_proj")]

    def o(self, x: Value) -> Value:
        return self.linear(x, "o_proj")

    def mlp(self, x: Value) -> Value:
        gate = self.linear(x, "gate_proj")
        self.book.part = "swiglu"
        activated = self.book.silu(gate)
        up = self.linear(x, "up_proj")
        self.book.part = "swiglu"
        return self.linear(self.book.mul(activated, up), "down_proj")

    def edit(self, x: Value) -> Value:
        """What a method does to the output of the layer."""
        return x

    def working(self, tokens: int) -> int:
        """The most bytes alive at once in the backward of a layer besides all that it kept.

        In the FFN dh, dgate, dup and the gradients that come from above, or in a norm four copies
        of dx in fp32.
        """
        shape = self.shape
        ffn = self.itemsize * (3 * shape.intermediate + 2 * shape.hidden)
        return tokens * max(ffn, 4 * 4 * shape.hidden)

    def making(self) -> int:
        """The most bytes alive at once in the forward of a layer that it does not keep."""
        return 0


class LoRA(Plain):
    """base(x) + B(A(x)) * scaling, as PEFT has it, with adapters in the dtype of the model.

    Keeps x and A(x) of every layer, in the dtype of the adapters. Where that is not the model's,
    each makes a copy of x of its own.
    """

    def adapter_itemsize(self) -> int:
        return self.itemsize

    def linear(self, x: Value, name: str) -> Value:
        book, size = self.book, self.adapter_itemsize()
        n, k = self.weights[name].shape
        y = self.base(x, name)
        book.part = "adapter"
        low = book.linear(
            book.cast(x, size), book.parameter((self.budget.rank, k), size, trained=True)
        )
        wide = book.linear(low, book.parameter((n, self.budget.rank), size, trained=True))
        return book.cast(book.add(y, book.scale(wide)), y.itemsize)


class LoRAFP32(LoRA):
    def adapter_itemsize(self) -> int:
        return 4

    def working(self, tokens: int) -> int:
        casts = 2 * 4 * self.shape.intermediate if self.itemsize != 4 else 0
        return super().working(tokens) + tokens * casts


class DoRA(Plain):
    """base(x) + (m - 1) base(x) + m B(A(x)) scaling for m = magnitude / norm, as PEFT has it.

    Keeps x, A(x), B(A(x)), base(x), the norm, m and m - 1. The norm of the rows of W + scaling BA
    is computed anew in every forward, from A and B applied to a unit matrix.
    """

    def linear(self, x: Value, name: str) -> Value:
        book, size, rank = self.book, self.itemsize, self.budget.rank
        n, k = self.weights[name].shape
        y = self.base(x, name)
        book.part = "adapter"
        book.run(k * k * size)  # the unit matrix
        book.gemm(k, rank, k, size)
        book.gemm(k, n, rank, size)
        for tensors in (2, 3):  # W + scaling BA
            book.run(tensors * n * k * size)
        book.run((n * k + n) * size)

        ratio = book.mul(  # a quotient keeps its divisor, as a product does
            book.parameter((n,), size, trained=True), book.new((n,), size)
        )
        low = book.linear(x, book.parameter((rank, k), size, trained=True))
        wide = book.linear(low, book.parameter((n, rank), size, trained=True))
        less_one = book.new((n,), size, ratio)
        book.run(2 * n * size)
        book.send_grad(ratio)
        product = y
        if name in self.biases:  # which the magnitude leaves alone
            product = book.new(y.shape, size, y)
            book.run(2 * y.nbytes + self.biases[name].nbytes)
            book.send_grad(y)
        change = book.add(book.mul(product, less_one), book.scale(book.mul(wide, ratio)))
        return book.add(y, change)

    def making(self) -> int:
        """The unit matrix, BA, its multiple, and W + that, of one layer."""
        sizes = self.shape.linears().values()
        return max(3 * n * k + k * k for n, k in sizes) * self.itemsize


class SHiRA(Plain):
    """(W + scattered entries) x, as PEFT has it: with a dense copy of W in every forward.

    Keeps x, that copy, and a sparse tensor: the entries times their scaling and their rows and
    columns in int64, cast from int32 in every forward. The gradient of the copy is dense.
    """

    def linear(self, x: Value, name: str) -> Value:
        book, size, weight = self.book, self.itemsize, self.weights[name]
        n, k = weight.shape
        entries = self.budget.shira_rank * (n + k)
        book.part = "adapter"
        book.run(2 * weight.nbytes)  # the copy
        values = book.scale(book.parameter((entries,), size, trained=True))
        places = book.new((2, entries), 8)
        book.run(places.nbytes // 2 + places.nbytes)
        book.save(values, places)
        book.run(entries * (3 * size + 16))  # added at (row, column), two int64
        book.run_back(entries * (2 * size + 16))
        book.part = "linear"
        return book.linear(x, book.new(weight.shape, size, values), self.biases.get(name))


class S2FTInplace(Plain):
    """The dense layer with d_delta of an in-slice of R channels of o_proj and down_proj.

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
        m, on_cpu = x.numel // k, book.device == "cpu"
        compact = book.new((m, r), size)
        book.parameter((n, r), 4, trained=True)
        book.part = "slice"
        if not self.additive:
            # base slice + delta, fp32, into the weight: one kernel, or plain torch's casts, sum
            # and copy.
            casts = () if size == 4 else (4 + size, 4 + size)
            for nbytes in (*casts, 12, 2 * size) if on_cpu else (4 + 2 * size,):
                book.run(n * r * nbytes)
        book.run(2 * compact.nbytes)
        book.part = "linear"
        y = book.new((*x.shape[:-1], n), size, x)
        book.gemm(m, n, k, size)
        if x.grad:
            book.gemm(m, k, n, size, back=True)
        book.part = "slice"
        if self.additive:
            book.cast(book.new((n, r), 4), size)
            book.gemm(m, n, r, size, more=m * n * size)  # y is read, too
            if x.grad:
                if size != 4:
                    book.run_back(n * r * (4 + size))
                book.gemm(m, r, n, size, back=True, more=m * r * size)
        book.save(compact)
        y.grad = True
        if on_cpu and size != 4:  # plain torch accumulates in fp32 by casting both operands
            book.run_back(m * n * (size + 4))
            book.run_back(m * r * (size + 4))
            book.gemm(n, r, m, 4, back=True)
        else:
            book.gemm(n, r, m, size, back=True, more=n * r * (4 - size))  # d_delta is fp32
        if on_cpu:
            book.run_back(2 * 4 * n * r)  # its transpose
        book.send_grad(x)
        return y

    def working(self, tokens: int) -> int:
        if self.book.device != "cpu":
            return super().working(tokens)
        # d_delta of down_proj in plain torch: fp32 casts of its operands, it and its transpose
        hidden, channels = self.shape.hidden, self.budget.channels
        casts = 4 * (hidden + channels) if self.itemsize != 4 else 0
        each = self.itemsize * (self.shape.intermediate + 2 * hidden) + casts
        return max(super().working(tokens), tokens * each + 2 * 4 * hidden * channels)


class S2FTAdditive(S2FTInplace):
    """The base layer as it is; the slice's part is added to y and, where it is needed, to dx."""

    additive = True


class SpIEL(Plain):
    """The dense layer, into which entries are written before the forward, with their gradients.

    Keeps x. On a CPU the gradients are read out of a dense product, made a few rows at a time; on
    CUDA out of its tiles, which are not written to memory.
    """

    def linear(self, x: Value, name: str) -> Value:
        book, size, weight = self.book, self.itemsize, self.weights[name]
        n, k = weight.shape
        m, on_cpu = x.numel // k, book.device == "cpu"
        entries = self.entries()[name]
        book.parameter((entries,), 4, trained=True)
        book.part = "entries"
        line = 64 if on_cpu else 32  # bytes that a single number comes and goes with
        written = 2 * min(entries * line, weight.nbytes)
        book.run(entries * (4 + 4 + size) + written)  # delta, position, W0
        book.part = "linear"
        bias = self.biases.get(name)
        y = book.new((*x.shape[:-1], n), size, x)
        book.gemm(m, n, k, size, more=bias.nbytes if bias else 0)
        book.save(x)
        if x.grad:
            book.gemm(m, k, n, size, back=True)
        book.part = "entries"
        if on_cpu:
            book.gemm(n, k, m, 4, back=True)
            book.run_back(entries * (4 + 8 + 4 + 4))
        else:
            book.gemm(n, k, m, size, back=True, more=10 * entries - n * k * size)
        y.grad = True
        book.send_grad(x)
        return y

    def entries(self) -> dict[str, int]:
        """Of each weight of the layer, by name."""
        sizes = self.shape.linears()
        linears = list(sizes.values())
        wanted = entries_in_all(self.budget, self.shape.parameters(), linears * self.shape.layers)
        counts = entries_of_layers(wanted, linears * self.shape.layers)
        return dict(zip(sizes, counts, strict=False))  # all layers are alike


class LoRAFused(Plain):
    """`bench.methods.lora_fused`: stacks of layers that read the same x, and one FFN Function.

    Keeps x and x A of q, k, v together; x and x A of o_proj; of the FFN x, gate, up, x A and h A.
    """

    def stack(self, x: Value, *products: tuple[str, ...], keep: bool = True) -> list[Value]:
        """Layers that read x, those of one of `products` in one product of the forward.

        keep: whether x and x A are kept.
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
        dx_parts = 0
        for n in (n for group in widths for n in group):
            book.part = "adapter"
            book.gemm(m, n, rank, size, more=m * n * size)
            book.gemm(m, rank, n, size, back=True)  # d(x A)
            book.gemm(rank, n, m, size, back=True)  # dB
            book.part = "linear"
            if x.grad:  # the products after the first add to dx
                book.gemm(m, k, n, size, back=True, more=m * k * size if dx_parts else 0)
                dx_parts += 1
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
        return self.stack(x, ("q_proj", "k_proj"), ("v_proj",))

    def o(self, x: Value) -> Value:
        return self.stack(x, ("o_proj",))[0]

    def mlp(self, x: Value) -> Value:
        book = self.book
        gate, up = self.stack(x, ("gate_proj", "up_proj"))
        h = book.new(gate.shape, self.itemsize, gate)
        book.part = "swiglu"
        for nbytes in self._swiglu_bytes():
            book.run(h.numel * nbytes)
        for nbytes in self._swiglu_bwd_bytes():
            book.run_back(h.numel * nbytes)
        (y,) = self.stack(h, ("down_proj",), keep=False)
        low = book.new((h.numel // h.shape[-1], self.budget.rank), self.itemsize)
        book.save(gate, up, low)
        return y

    def working(self, tokens: int) -> int:
        # dh, dgate, dup and h; in plain torch four more, and all but the first three in fp32
        each = 4 * self.itemsize if self.book.device != "cpu" else 32 if self.itemsize == 4 else 38
        return tokens * (each * self.shape.intermediate + 2 * self.itemsize * self.shape.hidden)

    def _swiglu_bytes(self) -> tuple[int, ...]:
        size = self.itemsize
        return (2 * size, 3 * size) if self.book.device == "cpu" else (3 * size,)

    def _swiglu_bwd_bytes(self) -> tuple[int, ...]:
        """Of one channel: a kernel that writes dgate, dup and h, or plain torch in fp32."""
        size = self.itemsize
        if self.book.device != "cpu":
            return (6 * size,)
        cast = () if size == 4 else (4 + size,)
        return (*cast * 6, 8, 12, 12, 8, 12, 12, 12, 12, 8, 8, 12)


class LoReFT(Plain):
    """The layer as it is; its output is edited at a few positions by an fp32 map of rank r.

    Keeps, in fp32, the output at these positions, the edit in r dimensions and what the
    orthogonal parametrization of R needs; the edit in the dtype of the model; the positions.
    """

    def edit(self, x: Value) -> Value:
        book, size = self.book, self.itemsize
        batch, length, hidden = x.shape
        rank, positions = self.budget.reft_rank, 2 * min(self.budget.reft_positions, length // 2)
        tokens = batch * positions
        book.part = "adapter"
        reflectors = book.parameter((hidden, rank), 4, trained=True)
        book.parameter((rank, hidden), 4, trained=True)
        book.parameter((rank,), 4, trained=True)
        where = book.new((positions,), 8)
        A = book.new((hidden, rank), 4, reflectors)
        Q, R = book.new((hidden, rank), 4, A), book.new((hidden, rank), 4, A)
        tau, doubled, signs = (book.new((rank,), 4) for _ in range(3))
        book.save(A, tau, doubled, signs, Q)
        book.gemm(hidden, rank, hidden, 4)  # by a fixed rotation, (hidden, hidden)
        book.gemm(hidden, rank, hidden, 4, back=True)

        at = book.new((batch, positions, hidden), 4)
        low = book.new((batch, positions, rank), 4)
        edit = book.new((batch, positions, hidden), size)
        book.save(where, at, R, low, edit)
        for back in (False, True):
            for _ in range(3 if not back else 6):
                book.gemm(tokens, rank, hidden, 4, back=back)
        book.run(2 * at.numel * size)
        book.run(at.nbytes + edit.nbytes)
        y = book.new(x.shape, size, x)
        book.run(2 * x.nbytes + 3 * edit.nbytes)  # a copy, and the edit added
        book.run_back(2 * edit.nbytes)
        if x.grad:
            book.run_back(x.nbytes + 2 * edit.nbytes)  # zeros, and the gradient at the positions
        book.send_grad(x, x)
        y.grad = True
        return y


PROJECTIONS: dict[str, type[Plain]] = {
    "frozen": Plain,
    "full": Plain,
    "lora": LoRA,
    "lora_fp32": LoRAFP32,
    "lora_fused": LoRAFused,
    "dora": DoRA,
    "galore": Plain,
    "lisa": Plain,
    "loreft": LoReFT,
    "shira": SHiRA,
    "spiel": SpIEL,
    "spiel_ma": SpIEL,
    "s2ft_inplace": S2FTInplace,
    "s2ft_additive": S2FTAdditive,
}
