"""Methods that train scattered entries of the linear layers: PEFT's SHiRA, and SpIEL."""

from bench.ledger import Value
from bench.methods.budget import entries_in_all, entries_of_layers
from bench.projections.plain import Plain


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
