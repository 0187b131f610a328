"""LoRA and DoRA as PEFT has them: adapters of rank r beside the linear layers."""

from bench.ledger import Value
from bench.projections.plain import Plain


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
